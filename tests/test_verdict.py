"""Laws of the verdict: it names what was planted in its first lines, and says no more than was tested."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr

from headlapse.engine.report.findings.verdict import format_estimate, format_p, verdict
from headlapse.engine.statistics.head_effects import head_effects
from headlapse.engine.study.patch_settings import Direction, PatchSettings
from headlapse.engine.study.reading import Reading
from headlapse.engine.study.subsets import parse_subsets
from tests.simulating import unchecked

STUDY = {"model": "org/tiny", "task": "decimal"}
STEPS = (0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
DEFAULT = ("even", "odd", "all", "each", "splits")
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
    settings = PatchSettings(direction=direction, layers=tuple(range(N_LAYERS)), subsets=tuple(words), joint=joint)
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
    assert not [line for line in lines if re.search(r"\b(nan|inf)\b", line)]
    return lines


def line_about(lines: Sequence[str], label: str) -> str:
    return next((line[11:] for line in lines if line.startswith(f"{label:<11}")), "")


def test_the_default_run_names_the_head_that_does_everything_within_five_lines_with_interval_and_onset() -> None:
    lines = lines_of({(1, 5): 3.0})
    row = next(line for line in lines[:5] if line.startswith("  L1.H5"))
    assert "p < .001" in row and "from step 32-48" in row and "% of layer 1" in row
    run, settings = planted_run({(1, 5): 3.0})
    frame = head_effects(run, settings).loc[("step256", 1, 5)]
    assert format_estimate(frame["effect"], frame["low_joint"], frame["high_joint"]) in row
    assert "joint 95 %" in line_about(lines, "heads")
    assert not any(line.startswith("  L") for line in lines if line != row), "no other head is named"


def test_heads_are_ranked_by_the_size_of_their_effect_whichever_way_it_goes() -> None:
    lines = lines_of({(1, 5): 3.0, (2, 3): 1.5, (1, 0): -2.0, (0, 2): 0.8})
    assert [line.split()[0] for line in lines if line.startswith("  L")] == ["L1.H5", "L1.H0", "L2.H3"]
    assert "4 of 32 significant at step256" in line_about(lines, "heads")
    assert "-2." in next(line for line in lines if line.startswith("  L1.H0"))


def test_an_effect_below_the_margin_has_no_onset_however_sure_it_is() -> None:
    lines = lines_of({(1, 5): 3.0, (2, 3): 0.1}, noise=0.01)
    small = next(line for line in lines if line.startswith("  L2.H3"))
    assert "p < .001" in small and "below 0.5 nats" in small and "step" not in small
    run, settings = planted_run({(1, 5): 3.0, (2, 3): 0.1}, noise=0.01)
    lines = verdict(run, settings, STUDY, reading=Reading(margin=0.05))
    assert "from step 32-48" in next(line for line in lines if line.startswith("  L2.H3"))


def test_a_head_that_mattered_for_a_while_is_named_where_it_did() -> None:
    run, settings = planted_run({(1, 5): 3.0})
    run.logit_diff[-3:] = run.corrupt_logit_diff[-3:] + 0 * run.logit_diff[-3:]
    lines = verdict(run, settings, STUDY)
    assert "none at step256" in line_about(lines, "heads") and any(line.startswith("  L1.H5") for line in lines[:5])


@pytest.mark.parametrize("seed", range(5))
def test_where_no_head_matters_it_says_so_and_names_no_head_as_one_that_does(seed: int) -> None:
    lines = lines_of({}, seed=seed)
    assert "none of 32 heads has a lasting significant effect" in line_about(lines, "heads")
    assert not [line for line in lines if line.startswith("  L")]


def test_what_has_no_null_is_not_judged_and_how_to_test_it_is_said() -> None:
    line = line_about(lines_of({(1, 5): 3.0}, words=DEFAULT[:-1]), "even/odd")
    assert line.startswith("not tested") and "--subsets balanced" in line
    assert "p =" not in line and "p <" not in line and "pattern" not in line
    assert not line_about(lines_of({(1, 5): 3.0}, words=("all", "each")), "even/odd"), "nobody asked for it"


def test_with_a_null_yes_no_and_cannot_tell_are_three_things() -> None:
    words = ("even", "odd", "all", "balanced")
    even = {(layer, head): 1.0 for layer in range(N_LAYERS) for head in range(0, N_HEADS, 2)}
    yes = line_about(lines_of(even, words=words), "even/odd")
    assert yes.startswith("yes: +4.") and "from step 32-48, p = .029 of 70 splits" in yes
    alike = {(1, head): 2 + 0.1 * head for head in range(N_HEADS)}
    no = line_about(lines_of(alike, words=words), "even/odd")
    assert no.startswith("no pattern: -0.") and "of 70 splits" in no
    one = line_about(lines_of({(1, 5): 3.0}, words=words), "even/odd")
    assert one.startswith("cannot tell (power 48 %): -3."), "one head hides a pattern of the other half"
    unequal = line_about(lines_of({(1, head): 0.5 * head for head in range(N_HEADS)}, words=words), "even/odd")
    assert unequal.startswith("no, neither carries the layer: -2.05 [") and "p = .57 of 70" in unequal
    few = line_about(lines_of({(1, 5): 3.0}, seed=1), "even/odd")
    assert few.startswith("cannot tell: ") and "5 splits are too few: --subsets balanced" in few


def test_heads_of_which_too_few_equal_splits_exist_are_told_of_no_words_that_would_help() -> None:
    """Of eight heads in four groups eight pairs of halves are alike, whose p is at least 1/8."""
    run, settings = planted_run({(1, 5): 3.0}, words=("even", "odd", "all", "balanced"))
    settings = replace(settings, n_groups=4)
    run.attrs["patch"] = settings.to_attributes()
    said = line_about(verdict(run, settings, STUDY), "even/odd")
    assert "8 heads have too few equal splits" in said and "--subsets" not in said


def test_the_default_run_finds_what_goes_through_all_layers() -> None:
    even = {(layer, head): 1.0 for layer in range(N_LAYERS) for head in range(0, N_HEADS, 2)}
    assert line_about(lines_of(even), "even/odd").startswith("yes, all layers together (joint test p = .021): +4.")


@pytest.mark.slow
def test_parity_is_said_to_be_there_in_at_most_five_percent_of_models_without_it() -> None:
    """200 models of random heads, one of them dominant: 5 % within three standard errors (4.6 points)."""
    rng, words = np.random.default_rng(0), ("even", "odd", "all", "balanced")
    said = []
    for _ in range(200):
        heads = {(0, head): float(nats) for head, nats in enumerate(rng.standard_normal(N_HEADS))}
        run, settings = planted_run(heads | {(0, int(rng.integers(N_HEADS))): 4.0}, words, steps=(256,), n_prompts=4)
        with unchecked():
            lines = verdict(run.isel(layer=[0]), settings, STUDY)
        said.append(line_about(lines, "even/odd"))
    assert np.mean([line.startswith("yes") for line in said]) <= 0.05 + 0.046
    assert all(line.startswith(("yes", "no pattern", "no, ", "cannot tell")) for line in said)


def test_a_constant_answer_is_no_capability() -> None:
    run, settings = planted_run({})
    run["corrupt_logit_diff"] = 0 * run.corrupt_logit_diff + 2.0
    assert line_about(verdict(run, settings, STUDY), "task").startswith("not learnt")
    able = line_about(lines_of({}), "task")
    assert "clean right from step 16-32" in able and "15 of 15" in able


WORDS = (DEFAULT, ("all",), ("even", "odd"), ("lattice",), ("none",), ("splits:5",))
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"n_prompts": 1}, {"n_prompts": 2}, {"direction": "noise"}, {"joint": True}, {"noise": 0.0},
)  # fmt: skip


@pytest.mark.parametrize("steps", [(256,), (0, -1), (0, 1000, 143_000)], ids=str)
@pytest.mark.parametrize("words", WORDS, ids="+".join)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_kind_of_run_has_a_verdict(
    steps: tuple[int, ...], words: tuple[str, ...], options: dict[str, Any]
) -> None:
    lines = lines_of({(1, 5): 3.0}, steps=steps, words=words, **options)
    assert line_about(lines, "task") and line_about(lines, "seeds") and line_about(lines, "checked")
    if options.get("n_prompts") == 1:
        assert not [line for line in lines if " p = " in line and " splits" not in line], "those need no prompts"
    if options.get("joint") or words in (("all",), ("even", "odd"), ("none",), ("splits:5",)):
        assert "single heads" in line_about(lines, "heads"), "what was not run is named"


def test_a_run_without_a_finished_checkpoint_says_that() -> None:
    run, settings = planted_run({})
    run["complete"] = ("checkpoint", [False] * len(STEPS))
    assert verdict(run, settings, STUDY)[1] == "task       no checkpoint is finished yet"


def test_long_names_are_cut_and_a_path_is_not() -> None:
    run, settings = planted_run({(1, 5): 3.0})
    page = "very/" * 30 + "index.html"
    lines = verdict(run, settings, {"model": "m" * 90, "task": "t" * 40}, page)
    assert all(len(line) <= 100 for line in lines[:-1]) and lines[-1] == f"page       {page}"


def test_numbers_have_no_more_digits_than_their_interval_supports() -> None:
    assert format_estimate(3.4567, 2.1, 4.8) == "+3.5 [+2.1, +4.8]"
    assert format_estimate(3.4567, 3.4, 3.5) == "+3.457 [+3.400, +3.500]"
    assert format_estimate(34.567, 14.1, 54.8) == "+35 [+14, +55]"
    assert format_estimate(3.4567, np.nan, np.nan) == "+3.46"
    assert [format_p(p) for p in (1e-9, 0.004, 0.0449, 0.41, 1.0)] == [
        "p < .001", "p = .004", "p = .045", "p = .41", "p = 1.00",
    ]  # fmt: skip


def test_the_published_protocol_ends_in_the_studys_table_and_its_rule() -> None:
    subsets = parse_subsets(("none", "balanced"), 4)
    success = np.zeros((2, 1, len(subsets), 1), dtype=bool)
    success[1, 0, list(subsets.labels).index("even")] = True
    settings = PatchSettings("published", layers=(6,), subsets=("none", "balanced"), n_tokens=20)
    run = xr.Dataset(
        {"success": (("checkpoint", "layer", "subset", "trial"), success)},
        coords={
            "checkpoint": ["step120000", "step143000"], "step": ("checkpoint", [120_000, 143_000]),
            "complete": ("checkpoint", [True, True]), "layer": [6], "subset": list(subsets.labels),
            "mask": (("subset", "head"), subsets.mask),
        },
        attrs={"patch": settings.to_attributes()},
    )  # fmt: skip
    study = {"model": "EleutherAI/pythia-160m", "task": "published"}
    lines = verdict(run, settings, study)
    row = next(line for line in lines if line.startswith("step143000"))
    assert row.split()[-7:] == ["0%", "100%", "0%", "0%", "100%", "0%", "yes"]
    rule = line_about(lines, "rule")
    assert "> 0.3 at 1 of 2 checkpoints" in rule and "1 of 6 equal splits" in rule
    assert "supported" not in " ".join(lines)
    two = run.sel(subset=["none", "even", "odd"])
    assert "not tested" in line_about(verdict(two, settings, study), "rule")
