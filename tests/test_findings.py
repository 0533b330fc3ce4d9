"""Laws of all findings together: whatever a run holds, they are told without a crash, a warning or a nan."""

import re

import numpy as np
import pytest
import xarray as xr

from headlapse.engine.report.findings.all_findings import findings
from headlapse.engine.report.findings.timeline import format_timeline
from headlapse.engine.study.patch_settings import PatchSettings
from headlapse.engine.study.subsets import parse_subsets

N_HEADS = 5
ASKED: tuple[tuple[str, ...], ...] = (
    ("even", "odd", "all"), ("lattice",), ("balanced",), ("orders:3",), ("each",), ("even", "odd", "splits:3"),
)  # fmt: skip


def run_of(n_prompts: int, steps: list[int], words: tuple[str, ...], noise: float) -> xr.Dataset:
    """Two layers; patched runs are noise about zero, the clean run is right and the corrupt one wrong by two nats."""
    rng, subsets = np.random.default_rng(0), parse_subsets(words, N_HEADS)
    patched = noise * rng.standard_normal((len(steps), 2, len(subsets.labels), n_prompts))
    plain = 2 + noise * rng.standard_normal((len(steps), n_prompts))
    by_prompt = ("checkpoint", "trial")
    run = xr.Dataset(
        {
            "logit_diff": (("checkpoint", "layer", "subset", "trial"), patched.astype(np.float32)),
            "clean_logit_diff": (by_prompt, plain.astype(np.float32)),
            "corrupt_logit_diff": (by_prompt, -plain.astype(np.float32)),
        },
        coords={
            "checkpoint": [f"c{index}" for index in range(len(steps))],
            "step": ("checkpoint", steps),
            "complete": ("checkpoint", [True] * len(steps)),
            "layer": [0, 1],
            "subset": list(subsets.labels),
            "mask": (("subset", "head"), subsets.mask),
        },
    )
    return run.assign_attrs(patch=settings(words).to_attributes())


def settings(words: tuple[str, ...]) -> PatchSettings:
    return PatchSettings(subsets=words, layers=(0, 1))


FEW = [(1, 0.0), (4, 1.0)]
MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1.0), (2, 1e-9), (4, 0.0))]


@pytest.mark.parametrize("words", ASKED, ids="+".join)
@pytest.mark.parametrize("steps", [[0], pytest.param([-1, -1, -1], marks=pytest.mark.slow), [0, 10, 40, 90]], ids=str)
@pytest.mark.parametrize(("n_prompts", "noise"), FEW + MORE)
def test_nothing_is_said_that_is_not_a_number(
    n_prompts: int, noise: float, steps: list[int], words: tuple[str, ...]
) -> None:
    run = run_of(n_prompts, steps, words, noise)
    texts = [format_timeline(run, settings(words)), *map(str, findings(run, settings(words)))]
    assert all(texts) and not [
        line for text in texts for line in text.splitlines() if re.search(r"\b(nan|inf)\b", line)
    ]
