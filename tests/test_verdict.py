"""Laws of the verdict: it names what was planted in its first lines, and says no more than was tested."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from headlapse.engine.report.findings.verdict import verdict
from headlapse.engine.study.patch_settings import Direction, PatchSettings
from headlapse.engine.study.subsets import parse_subsets

STUDY = {"model": "org/tiny", "task": "decimal"}
STEPS = (0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
DEFAULT = ("even", "odd", "all", "each")
N_LAYERS, N_HEADS = 4, 8


def planted_run(
    heads: dict[tuple[int, int], float], words: Sequence[str] = DEFAULT, onset: int = 48, steps: Sequence[int] = STEPS,
    n_prompts: int = 15, noise: float = 0.2, direction: Direction = "denoise", joint: bool = False, seed: int = 0,
) -> tuple[xr.Dataset, PatchSettings]:  # fmt: skip
    """Each head adds its effect, in nats, from the step `onset` on; the model can do the task from step 32 on."""
    rng, subsets = np.random.default_rng(seed), parse_subsets(words, N_HEADS)
    effects = np.zeros((N_LAYERS, N_HEADS))
    for place, nats in heads.items():
        effects[place] = nats
    after = (np.array(steps) >= onset) | (np.array(steps) < 0)
    by_prompt = rng.uniform(0.5, 1.5, n_prompts)
    moved = np.einsum("sh,lh,c,p->clsp", subsets.mask, effects, after, by_prompt)
    if joint:
        moved = moved.sum(1, keepdims=True)
    moved += noise * rng.standard_normal(moved.shape) * subsets.mask.any(1)[None, None, :, None]
    able = np.where((np.array(steps) >= 32) | (np.array(steps) < 0), 2.0, -1.0)[:, None]
    clean = able + 0.3 * rng.standard_normal((len(steps), n_prompts))
    corrupt = -2 + 0.3 * rng.standard_normal((len(steps), n_prompts))
    target = corrupt if direction == "denoise" else clean
    sign = 1 if direction == "denoise" else -1
    settings = PatchSettings(
        direction=direction, layers=tuple(range(N_LAYERS)), subsets=tuple(words), joint=joint
    )
    run = xr.Dataset(
        {
            "logit_diff": (("checkpoint", "layer", "subset", "trial"), target[:, None, None] + sign * moved),
            "clean_logit_diff": (("checkpoint", "trial"), clean),
            "corrupt_logit_diff": (("checkpoint", "trial"), corrupt),
        },
        coords={
            "checkpoint": [f"step{step}" if step >= 0 else "main" for step in steps],
            "step": ("checkpoint", list(steps)), "complete": ("checkpoint", [True] * len(steps)),
            "layer": [0] if joint else np.arange(N_LAYERS), "subset": list(subsets.labels),
            "mask": (("subset", "head"), subsets.mask), "self_check": ("checkpoint", np.full(len(steps), 2.5e-6)),
        },
        attrs={"patch": settings.to_attributes()},
    )  # fmt: skip
    return run, settings


def lines_of(heads: dict[tuple[int, int], float], page: str | None = None, **options: object) -> list[str]:
    run, settings = planted_run(heads, **options)  # type: ignore[arg-type]
    lines = verdict(run, settings, STUDY, page)
    assert len(lines) <= 12 and all(len(line) <= 100 for line in lines), lines
    assert not [line for line in lines if "nan" in line or "inf" in line]
    return lines


def line_about(lines: Sequence[str], label: str) -> str:
    return next((line[11:] for line in lines if line.startswith(f"{label:<11}")), "")
