"""Laws of dating a pattern: a head that differs first is no pattern, and what cannot be told is not told."""

from pathlib import Path

import numpy as np
import pytest

from headlapse.engine.checkpoints.planted import N_HEADS, planted, tokenizer
from headlapse.engine.measures.logit_diff import finished
from headlapse.engine.report.findings.hypotheses import hypotheses_finding
from headlapse.engine.report.findings.verdict import verdict
from headlapse.engine.statistics.changepoint import Shape
from headlapse.engine.statistics.hypotheses import (
    CONTRADICTED,
    OPEN,
    SUPPORTED,
    THIRDS,
    Evaluation,
    evaluate,
    hypotheses,
)
from headlapse.engine.statistics.joint import SplitDifferences
from headlapse.engine.statistics.parity_onset import ParityOnset, date_parity, excluded
from headlapse.engine.statistics.permutation import EqualSplits, find_equal_splits, permutation_p_value
from headlapse.engine.study.patch_settings import PatchSettings
from tests.models import save
from tests.simulating import unchecked
from tests.test_ground_truth import MANY_PAIRS, NOISE, cached_and_patched
from tests.test_splits import run_of

STUDY_STEPS = np.array([1, 2, 4, 8, 16, 32, 64, 80, 100, 120, 143]) * 1000
"""The published study's checkpoints."""

UNKNOWN = Shape("undecided", {}, 0.0)


def splits_of(n_heads: int, words: tuple[str, ...] = ("balanced",)) -> EqualSplits:
    splits = find_equal_splits(run_of(np.zeros((1, 1, n_heads)), words))
    assert splits is not None
    return splits


def dated(heads: np.ndarray, steps: np.ndarray, splits: EqualSplits, noise: float = 0.0, seed: int = 0) -> ParityOnset:
    """Of heads (checkpoint, head) that add up, each subset with noise of its own; what is asked about is two thirds of
    what all heads add at the last."""
    n_subsets, rng = len(splits.halves), np.random.default_rng(seed)
    scatter = noise * rng.standard_normal((len(steps), n_subsets))
    place = {half: at for at, half in enumerate(splits.halves)}
    scatter = scatter - scatter[:, [place[rest] for rest in splits.rests]] if splits.swaps else scatter
    nats = heads @ (2.0 * splits.mask - 1).T + scatter
    differences = SplitDifferences(nats, np.full(len(steps), 2 * noise**2), splits.even, splits.swaps)
    whole = abs(float(heads[-1].sum()))
    return date_parity(steps, differences, splits, max(2 / 3 * whole, 0.5), max(whole, 0.5))


def verdicts(onset: ParityOnset, steps: np.ndarray) -> dict[str, str]:
    found: Evaluation = evaluate(steps, onset, UNKNOWN)
    return {name: found.verdicts[name] for name in THIRDS}


# --- what is excluded ---


def test_a_pattern_is_excluded_where_the_test_of_the_rest_rejects_it() -> None:
    """By its definition, split by split: without the pattern even against odd lies too low by chance in 5 %."""
    splits, rng = splits_of(8), np.random.default_rng(0)
    sides = 2.0 * splits.mask - 1
    overlap = splits.overlap(splits.even)
    assert overlap[splits.even] == 1 and sorted(set(overlap)) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    for size in (1.0, 3.0, 8.0, -3.0):
        nats = sides @ rng.standard_normal(8)
        rest = np.sign(size) * (nats - size * overlap)
        expected = (rest <= rest[splits.even] + 1e-6).mean() <= 0.05
        assert bool(excluded(nats, splits.even, overlap, size)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("n_heads", [8, 12])
def test_a_pattern_that_is_there_is_excluded_in_five_percent_at_most(n_heads: int) -> None:
    """4,000 layers of random heads with a pattern of just that size: within three standard errors (1 point)."""
    splits, rng = splits_of(n_heads), np.random.default_rng(n_heads)
    even = 1.0 * (np.arange(n_heads) % 2 == 0)
    heads = rng.standard_normal((4000, n_heads)) + 3.0 * even / (n_heads / 2)
    nats = heads @ (2.0 * splits.mask - 1).T
    assert excluded(nats, splits.even, splits.overlap(splits.even), 3.0).mean() <= 0.05 + 0.0104


# --- when ---


def test_the_excess_is_dated_and_not_the_head_that_differs_first() -> None:
    """Head 5 acts from step 200 on, all even heads from step 700 of 800, as much each."""
    steps, splits = np.arange(0, 801, 100), splits_of(12)
    for first_head in (5, 0):
        heads = np.zeros((9, 12))
        heads[steps >= 200, first_head] = 1.0
        heads[steps >= 700, ::2] = 1.0
        onset = dated(heads, steps, splits, 0.05)
        assert (onset.after, onset.by, onset.lasts) == (600, 700, True)
        assert verdicts(onset, steps) == dict(zip(THIRDS, (CONTRADICTED, CONTRADICTED, SUPPORTED), strict=True))


def test_a_head_alone_is_no_pattern_and_what_few_splits_cannot_show_is_open() -> None:
    steps = np.arange(0, 801, 100)
    heads = np.zeros((9, 8))
    heads[steps >= 200, 5] = 3.0
    onset = dated(heads, steps, splits_of(8), 0.05)
    assert onset.by is None and not onset.lasts and onset.p > 0.5 and 0.4 <= onset.power <= 0.6
    assert SUPPORTED not in verdicts(onset, steps).values()
    perfect = 1.0 * (np.arange(8) % 2 == 0) * (steps >= 700)[:, None]
    few = dated(perfect, steps, splits_of(8, ("splits",)))
    assert few.least_p > 0.05 and few.power == 0 and set(verdicts(few, steps).values()) == {OPEN}


@pytest.mark.slow
@pytest.mark.parametrize("n_heads", [8, 12])
def test_a_half_that_carries_the_layer_is_denied_in_five_percent_at_most(n_heads: int) -> None:
    """2,000 layers of random heads, the odd ones of which add up to nothing: 5 % within three standard errors."""
    splits, rng, steps = splits_of(n_heads), np.random.default_rng(n_heads), np.array([0])
    heads = rng.standard_normal((2000, 1, n_heads))
    heads[..., ::2] += 6 / n_heads
    heads[..., 1::2] -= heads[..., 1::2].mean(-1, keepdims=True)
    with unchecked():
        denied = [dated(one, steps, splits).neither_carries for one in heads]
    assert np.mean(denied) <= 0.05 + 0.0146


def test_where_every_head_does_the_same_a_pattern_is_excluded_at_each_checkpoint() -> None:
    steps = np.arange(0, 801, 100)
    heads = np.tile(1 + 0.05 * np.random.default_rng(1).standard_normal(8), (9, 1)) * (steps >= 300)[:, None]
    onset = dated(heads, steps, splits_of(8), 0.01)
    assert onset.is_absent and onset.interval == (np.inf, np.inf) and onset.power == 1
    assert set(verdicts(onset, steps).values()) == {CONTRADICTED}


def test_what_was_there_and_is_gone_supports_nothing() -> None:
    steps = np.arange(0, 801, 100)
    heads = 1.0 * (np.arange(12) % 2 == 0) * ((steps >= 300) & (steps < 600))[:, None]
    onset = dated(heads, steps, splits_of(12), 0.02)
    assert onset.by == 300 and not onset.lasts
    assert verdicts(onset, steps)["H2 middle"] == OPEN and verdicts(onset, steps)["H3 late"] == CONTRADICTED


def simulated(
    n_heads: int, steps: np.ndarray, rng: np.random.Generator, from_step: float | None, dominant: bool
) -> np.ndarray:
    """Heads of random effects, half a nat, that start at random; even ones carry a nat each from a step on."""
    effects = 0.5 * rng.standard_normal(n_heads)
    if dominant:
        effects[rng.integers(n_heads)] += 3 * rng.choice([-1, 1])
    heads = effects * (steps[:, None] >= rng.uniform(0, steps[-1], n_heads))
    if from_step is not None:
        heads = heads + 1.0 * (np.arange(n_heads) % 2 == 0) * (steps[:, None] >= from_step)
    return np.asarray(heads)


@pytest.mark.slow
def test_without_parity_any_verdict_but_no_or_cannot_tell_appears_in_five_percent_at_most() -> None:
    """500 series, every second with a dominant head, of 8 and 12 heads: yes, or a hypothesis supported, in at most 5 %
    within three standard errors (2.9 points)."""
    rng, said = np.random.default_rng(2), []
    with unchecked():
        for n in range(500):
            n_heads, steps = ((12, STUDY_STEPS), (8, np.arange(0, 801, 50)))[n % 4 // 2]
            onset = dated(simulated(n_heads, steps, rng, None, n % 2 == 0), steps, SPLITS[n_heads], 0.05, n)
            said.append(onset.p <= 0.05 or SUPPORTED in verdicts(onset, steps).values())
    assert np.mean(said) <= 0.05 + 0.029


SPLITS = {n_heads: splits_of(n_heads) for n_heads in (8, 12)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("from_step", "true", "dominant"),
    [(115_000, "H3 late", False), (115_000, "H3 late", True), (70_000, "H2 middle", False), (3000, "H1 early", True)],
)
def test_in_the_studys_own_design_the_answer_is_right_or_open(from_step: int, true: str, dominant: bool) -> None:
    """Twelve heads, eleven checkpoints, 300 series: wrong in at most 5 %, within two standard errors (2.5 points)."""
    rng, wrong, right = np.random.default_rng(from_step), 0, 0
    with unchecked():
        for n in range(300):
            heads = simulated(12, STUDY_STEPS, rng, from_step, dominant)
            found = verdicts(dated(heads, STUDY_STEPS, SPLITS[12], 0.05, n), STUDY_STEPS)
            others = [found[name] for name in THIRDS if name != true]
            wrong += SUPPORTED in others or found[true] == CONTRADICTED
            right += found[true] == SUPPORTED
    assert wrong / 300 <= 0.05 + 0.025
    assert right / 300 >= (0.1 if dominant else 0.6)


# --- through real runs ---


@pytest.mark.slow
@pytest.mark.parametrize("first", [5, 0])
def test_a_head_from_step_200_and_all_even_heads_from_700_are_late_through_caching_and_patching(
    tmp_path: Path, first: int
) -> None:
    """Head `first` alone writes from step 200 of 800 on, and every even head from 700 on."""
    for seed, step in enumerate(range(0, 801, 100)):
        carriers = sorted({first, *range(0, N_HEADS, 2)}) if step >= 700 else [first]
        model = planted(0.25 if step >= 200 else 0.0, NOISE, seed, carriers=carriers)
        save(model, tmp_path / "model" / f"step{step}", tokenizer=tokenizer())
    run = finished(cached_and_patched(tmp_path / "model", tmp_path, ("balanced", "all"), ("1",), pairs=MANY_PAIRS))
    found = hypotheses(run, "denoise", 1)
    assert found is not None and found.verdicts["H3 late"] == SUPPORTED
    assert found.verdicts["H1 early"] == found.verdicts["H2 middle"] == CONTRADICTED
    settings = PatchSettings.from_attributes(run.attrs["patch"])
    row = next(line for line in str(hypotheses_finding(run, settings)).splitlines() if line.startswith("H3 late"))
    assert row.split()[-1] == "supported"
    line = next(line for line in verdict(run, settings, {"model": "m", "task": "t"}) if line.startswith("even/odd"))
    assert "yes" in line and "from step 600-700" in line


def test_the_p_at_the_last_checkpoint_is_the_permutation_tests() -> None:
    splits, heads = SPLITS[8], np.random.default_rng(3).standard_normal((4, 8))
    onset = dated(heads, np.arange(4), splits)
    nats = heads[-1] @ (2.0 * splits.mask - 1).T
    assert onset.p == permutation_p_value(float(nats[splits.even]), nats)
