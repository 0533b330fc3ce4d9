"""Laws of when: a planted start is dated within its interval, and what never starts is not dated."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from headlapse.engine.report.findings.hypotheses import hypotheses_finding, hypotheses_table
from headlapse.engine.report.findings.onsets import onsets_finding
from headlapse.engine.statistics.bootstrap import noise_of_means, resampled_means
from headlapse.engine.statistics.changepoint import Shape, evaluate_shape
from headlapse.engine.statistics.hypotheses import Evaluation, evaluate, hypotheses
from headlapse.engine.statistics.multiple_testing import adjust
from headlapse.engine.statistics.onset import (
    DIVERGENCE,
    Order,
    Series,
    _p_above,
    compare_onsets,
    declines,
    first_sustained,
    known_steps,
    onset_of,
    onsets,
    series_of,
    significant_checkpoints,
)
from headlapse.engine.statistics.parity_onset import ParityOnset
from headlapse.engine.study.patch_settings import PatchSettings
from tests.simulating import unchecked

STEPS = np.array([0, 10, 20, 30, 40, 50, 60, 70])


def series(values: np.ndarray, threshold: float = 0.5, two_sided: bool = False) -> Series:
    return Series(
        "it", None, values if values.ndim == 2 else values[:, None].repeat(6, 1), threshold, "nats", two_sided
    )


def test_resampled_means_are_means_of_prompts_drawn_with_replacement() -> None:
    values = np.random.default_rng(0).standard_normal((2, 5))
    means = resampled_means(values, 2000)
    assert means.shape == (2, 2000)
    assert means.mean(1) == pytest.approx(values.mean(1), abs=0.05)
    assert means.std(1) == pytest.approx(values.std(1) / np.sqrt(5), rel=0.1)
    assert np.allclose(resampled_means(values[::-1], 2000), means[::-1]), "the same draws for every cell"
    counts = resampled_means(np.eye(5), 50) * 5
    assert np.allclose(counts, counts.round()) and np.allclose(counts.sum(0), 5)


def test_layers_and_checkpoints_are_resampled_as_if_each_stood_alone() -> None:
    values = np.random.default_rng(8).standard_normal((2, 3, 5))
    for resample in (resampled_means, noise_of_means):
        together = resample(values, 40)
        assert together.shape == (2, 3, 40)
        np.testing.assert_allclose(together[1, 2], resample(values[1, 2], 40), atol=1e-12)


def test_noise_of_few_prompts_is_as_wide_as_the_standard_error_of_their_mean() -> None:
    """Of four prompts the plain bootstrap would be narrower by sqrt(3/4), 13 %."""
    values = np.random.default_rng(3).standard_normal((50, 4))
    ratio = noise_of_means(values).std(1) / stats.sem(values, axis=1)
    assert ratio == pytest.approx(1.0, abs=0.06) and ratio.mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("past", "at"),
    [("0011", 2), ("0101", 3), ("0100", 4), ("0110", 1), ("0000", 4), ("1111", 0), ("0001", 3), ("1000", 4)],
)
def test_a_start_lasts_for_two_checkpoints_or_is_the_last(past: str, at: int) -> None:
    assert int(first_sustained(np.array([mark == "1" for mark in past]))) == at


def test_an_onset_lies_between_two_checkpoints() -> None:
    found = onset_of(STEPS, series(np.array([0, 0, 0, 1, 1, 1, 1, 1.0])))
    assert (found.after, found.by, found.low, found.high, found.censored) == (20, 30, 20, 30, "")
    assert str(found) == "20 to 30"


def test_what_is_there_from_the_first_or_never_comes_is_censored() -> None:
    always, never = onset_of(STEPS, series(np.ones(8))), onset_of(STEPS, series(np.zeros(8)))
    assert (always.censored, always.after, always.by, str(always)) == ("left", None, 0, "by 0")
    assert (never.censored, never.after, never.by, never.high) == ("right", None, None, None) and str(never) == "never"
    assert never.low == 70, "after the last checkpoint, if ever"


def test_a_two_sided_measure_starts_on_either_side() -> None:
    falling = np.array([0, 0, -1, -1, -1, -1, -1, -1.0])
    assert onset_of(STEPS, series(falling)).by is None and onset_of(STEPS, series(falling, two_sided=True)).by == 20


@pytest.mark.slow
def test_planted_onsets_lie_in_their_interval_as_often_as_it_says() -> None:
    """200 series of 20 prompts that cross the goal slowly under noise: the true crossing is covered in 95 %, within
    three standard errors (4.6 points)."""
    draw, covered = np.random.default_rng(1), 0
    steps = np.arange(0, 200, 10)
    for _ in range(200):
        true = draw.uniform(60, 140)
        values = (steps[:, None] - true) / 40 + 0.5 + draw.standard_normal(20)
        with unchecked():
            onset = onset_of(steps, series(values))
        low = -np.inf if onset.low is None else onset.low
        high = np.inf if onset.high is None else onset.high
        covered += low < true <= high
    assert covered / 200 > 0.95 - 0.046


@pytest.mark.slow
@pytest.mark.parametrize("n_checkpoints", [11, 60])
def test_noise_about_the_goal_is_dated_and_evident_nowhere(n_checkpoints: int) -> None:
    """300 series of 15 prompts whose mean lies on the goal: the mean passes it by chance, which is evident in at most
    5 %, within three standard errors (3.8 points).  The same for counts, on a coin's side and on a die's."""
    draw, steps = np.random.default_rng(5), np.arange(n_checkpoints)
    kinds = {
        "nats": lambda: series(draw.standard_normal((n_checkpoints, 15)), 0.0),
        "both sides": lambda: series(0.5 + draw.standard_normal((n_checkpoints, 15)), 0.5, two_sided=True),
        "coin": lambda: Series("it", None, draw.binomial(1, 0.5, (n_checkpoints, 15)).astype(float), 0.5, "rate"),
        "difference": lambda: Series(
            "it", None, draw.choice([-1.0, 0, 1], (n_checkpoints, 15), p=[0.15, 0.4, 0.45]), 0.3, "rate", True, -1.0
        ),
    }  # fmt: skip
    for kind, make in kinds.items():
        with unchecked():
            evident = np.mean([significant_checkpoints(one).any() for one in [make() for _ in range(300)]])
        assert evident <= 0.05 + 0.038, (kind, evident)
    dated = [onset_of(steps, kinds["nats"]()) for _ in range(20)]
    assert (
        sum(onset.by is not None for onset in dated) > 10 and sum(onset.significant is not None for onset in dated) <= 3
    )


def test_what_is_evident_is_scipys_tests_adjusted() -> None:
    values = np.random.default_rng(6).normal(0.5, 1, (9, 15)) + np.linspace(-1, 1, 9)[:, None]
    p = stats.ttest_1samp(values, 0.5, axis=1, alternative="greater").pvalue
    expected = adjust(p, "holm") <= 0.05
    assert (significant_checkpoints(series(values)) == expected).all() and 0 < expected.sum() < 9
    counts = (values > 0.5).astype(float)
    exact = np.array([stats.binomtest(int(row.sum()), 15, 0.5, "greater").pvalue for row in counts])
    found = significant_checkpoints(Series("it", None, counts, 0.5, "rate"))
    assert (found == (adjust(exact, "holm") <= 0.05)).all() and 0 < found.sum() < 9


def test_a_rate_is_held_against_a_coin_at_every_count() -> None:
    """Values from -1 to 1 are counts of half as many heads: of three prompts +1, 0 and 0 are two heads of three."""
    for n_ones in range(8):
        ones = (np.arange(7) < n_ones).astype(float)[None]
        for threshold in (0.1, 0.5):
            exact = stats.binomtest(n_ones, 7, threshold, "greater").pvalue
            assert _p_above(Series("it", None, ones, threshold, "rate"), 1) == pytest.approx(exact)
            both_ways = Series("it", None, 2 * ones - 1, 2 * threshold - 1, "rate", lowest=-1.0)
            assert _p_above(both_ways, 1) == pytest.approx(exact)
    halves = Series("it", None, np.array([[1.0, 0, 0]]), 0.0, "rate", lowest=-1.0)
    assert _p_above(halves, 1) == pytest.approx(4 / 8), "two of three coins or more"


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(("p", "is_significant"), [(0.049, True), (0.051, False)])
def test_past_a_two_sided_threshold_five_percent_are_shared_by_both_sides(
    side: int, p: float, is_significant: bool
) -> None:
    spread = np.array([-1.0, -0.5, 0, 0, 0.5, 1])
    mean = 0.5 + stats.t.isf(p / 2, 5) * stats.sem(spread)
    assert significant_checkpoints(series(side * (mean + spread)[None], two_sided=True)).item() is is_significant


def test_two_prompts_that_agree_are_evidence_and_one_is_none() -> None:
    two = np.array([[5.0, 5.001]])
    assert significant_checkpoints(series(two)).all() and not significant_checkpoints(series(two[:, :1])).any()


def test_from_one_checkpoint_to_the_next_as_much_of_a_drop_is_left_as_a_normal_bound_leaves() -> None:
    """95 % of normal noise drops by less than 1.645 standard errors of the difference; few prompts widen that as they
    widen an interval: Student's quantile over the normal one."""
    values = np.array([4 + stats.norm.ppf((np.arange(8) + 0.5) / 8), np.full(8, 1.0)])
    [drop] = declines(STEPS[:2], series(values))
    wider = stats.t.isf(0.025, 7) / stats.norm.isf(0.025)
    margin = stats.norm.isf(0.05) * stats.sem(values[0] - values[1]) * wider
    assert drop.depth == pytest.approx(values[0].mean() - values[1].mean())
    assert drop.depth - drop.at_least == pytest.approx(margin, rel=0.05)


def test_one_prompt_makes_nothing_evident_and_nothing_fall() -> None:
    one = series(np.array([0, 0, 0, 9, 9, 9, 0, 9.0])[:, None])
    assert onset_of(STEPS, one).significant is None and declines(STEPS, one) == []
    assert not noise_of_means(one.values, 20).any()


def test_falls_are_named_the_deepest_first() -> None:
    mean = np.array([0, 4, 4.1, 1, 3, 5, 5.1, 3.9])
    found = declines(STEPS, series(mean[:, None] + np.random.default_rng(0).normal(0, 0.2, (8, 30))))
    assert [(fall.start, fall.end) for fall in found] == [(20, 30), (60, 70)]
    assert all(0 < fall.at_least < fall.depth for fall in found)
    assert [fall.depth for fall in found] == pytest.approx([3.1, 1.2], abs=0.2)
    assert str(found[0]).startswith("20 to 30: -3.")
    assert declines(STEPS, series(np.arange(8.0))) == []


def test_a_two_sided_measure_falls_from_the_side_it_goes_furthest_to() -> None:
    mean = np.array([0, 0, -3, -3, 0, 0, -4, -4.0])
    values = mean[:, None] + np.random.default_rng(0).normal(0, 0.2, (8, 30))
    found = declines(STEPS, series(values, two_sided=True))
    assert len(found) == 1 and found[0].start in (20, 30) and found[0].end in (40, 50)


@pytest.mark.slow
@pytest.mark.parametrize("n_checkpoints", [11, 30])
def test_noise_alone_falls_as_often_as_it_says(n_checkpoints: int) -> None:
    """200 series of 15 prompts, flat or rising: a fall is named in at most 5 %, within three standard errors (4.6
    points); prompts may differ, and go their own ways."""
    draw, steps = np.random.default_rng(7), np.arange(n_checkpoints)
    shape = (200, n_checkpoints, 15)
    flat = draw.standard_normal(shape)
    kinds = {
        ("flat", False): flat,
        ("flat", True): flat,
        ("rising", False): flat + 0.01 * steps[:, None],
        ("wandering", False): flat.cumsum(1),
        ("far apart", False): 0.3 * flat + 9 * draw.standard_normal((200, 1, 15)),
    }
    for (kind, two_sided), values in kinds.items():
        with unchecked():
            named = np.mean([bool(declines(steps, series(one, two_sided=two_sided))) for one in values])
        assert named <= 0.05 + 0.046, (kind, two_sided, named)


def test_capability_and_specialization_are_put_in_order_only_where_the_data_do() -> None:
    early, late = (series(np.array([0, 0, 0, 0, 0, 0, 0, 0.0]) + (at <= STEPS)) for at in (20, 60))
    assert compare_onsets(STEPS, early, late) == Order("first", 1.0, 0.0, 30.0, 50.0), "(10, 20] against (50, 60]"
    assert compare_onsets(STEPS, late, early) == Order("later", 0.0, 1.0, -50.0, -30.0)
    next_one = series(1.0 * (STEPS >= 30)[:, None].repeat(6, 1))
    assert compare_onsets(STEPS, early, next_one) == Order("first", 1.0, 0.0, 0.0, 20.0), "by 20, and after 20"
    assert compare_onsets(STEPS, next_one, early) == Order("later", 0.0, 1.0, -20.0, 0.0)
    assert compare_onsets(STEPS, early, early) == Order("undecided", 0.0, 0.0, -10.0, 10.0)
    noise = np.random.default_rng(0).normal(0, 1, (2, 8, 10)) + (STEPS >= 30)[None, :, None] * 0.7
    assert compare_onsets(STEPS, series(noise[0]), series(noise[1])).verdict == "undecided"
    never = series(np.zeros(8))
    assert compare_onsets(STEPS, early, never) == Order("first", 1.0, 0.0, 50.0, np.inf)
    assert compare_onsets(STEPS, never, never).verdict == "undecided"


# --- of a patched run ---


def run_of(parted: np.ndarray, repaired: np.ndarray, steps: np.ndarray = STEPS, noise: float = 0.1) -> xr.Dataset:
    """Two layers; at the second, all heads move the corrupt run by `repaired`, and even and odd ones differ by
    `parted`."""
    n, rng = len(steps), np.random.default_rng(0)
    corrupt, clean = np.full((n, 12), -3.0), np.full((n, 12), 3.0)
    moved = np.zeros((n, 2, 3, 12))
    moved[:, 1, 2] = repaired[:, None]
    moved[:, 1, 0], moved[:, 1, 1] = parted[:, None] / 2, -parted[:, None] / 2
    moved += rng.normal(0, noise, moved.shape)
    dims = ("checkpoint", "layer", "subset", "trial")
    mask = np.array([[True, False] * 2, [False, True] * 2, [True] * 4])
    return xr.Dataset(
        {
            "logit_diff": (dims, (corrupt[:, None, None] + moved).astype(np.float32)),
            "clean_logit_diff": (("checkpoint", "trial"), clean.astype(np.float32)),
            "corrupt_logit_diff": (("checkpoint", "trial"), corrupt.astype(np.float32)),
        },
        coords={
            "checkpoint": [f"c{at}" for at in range(n)], "step": ("checkpoint", steps),
            "complete": ("checkpoint", np.ones(n, bool)), "layer": [3, 4], "subset": ["even", "odd", "all"],
            "mask": (("subset", "head"), mask),
        },
    )  # fmt: skip


def test_every_measure_of_a_run_is_dated_by_layer_and_unit() -> None:
    jump = 4.0 * (STEPS >= 40)
    frame = onsets(run_of(parted=jump, repaired=1.5 * jump), "denoise").set_index(["measure", "layer", "unit"])
    assert len(frame) == 6 + 2 * 6
    assert frame.loc[("even − odd divergence", 4, "nats"), "by"] == 40
    assert frame.loc[("all heads matter", 4, "rate"), "after"] == 30
    assert frame.loc[("even − odd divergence", 3, "nats"), "censored"] == "right"
    able = onsets(run_of(jump, jump), "denoise").iloc[0]
    assert (able["measure"], able["unit"], able["censored"]) == ("pair told apart", "nats", "left")


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_series_of_two_prompts_is_worked_by_hand(direction: str) -> None:
    """Unpatched 2 and -1 (clean), -3 and 1 (corrupt): gaps of 5 and -2 nats.  All heads give 1 and 3."""
    dims = ("checkpoint", "trial")
    run = run_of(np.zeros(1), np.zeros(1), STEPS[:1]).isel(layer=[1], trial=[0, 1])
    run = run.assign(clean_logit_diff=(dims, [[2.0, -1]]), corrupt_logit_diff=(dims, [[-3.0, 1]]))
    run["logit_diff"] = (("checkpoint", "layer", "subset", "trial"), [[[[1.0, -2], [-1, -1], [1, 3]]]])
    found = {(one.name, one.unit): one for one in series_of(run, direction)}
    of_all = {
        "denoise": ([4.0, 2], [1.0, 0], [4 - 2.5, 2 - 0.25], [1.0, 0]),  # recovered are 4/5 and -1
        "noise": ([1.0, -4], [0.0, -1], [1 - 2.5, -4 - 0.25], [0.0, 1]),  # recovered are 1/5 and 2
    }[direction]
    expected = {
        ("pair told apart", "nats"): ([5.0, -2], 0.5, False, 0.0),
        ("pair told apart", "rate"): ([1.0, 0], 0.5, False, 0.0),
        ("clean right", "nats"): ([2.0, -1], 0.0, False, 0.0),
        ("clean right", "rate"): ([1.0, 0], 0.5, False, 0.0),
        ("corrupt wrong", "nats"): ([3.0, -1], 0.0, False, 0.0),
        ("corrupt wrong", "rate"): ([1.0, 0], 0.5, False, 0.0),
        ("all heads matter", "nats"): (of_all[0], 0.5, False, 0.0),
        ("all heads matter", "rate"): (of_all[1], 0.3, False, -1.0),
        ("recovery above half", "nats"): (of_all[2], 0.0, False, 0.0),
        ("recovery above half", "rate"): (of_all[3], 0.5, False, 0.0),
        (DIVERGENCE, "nats"): ([2.0, -1], 0.5, True, 0.0),
        (DIVERGENCE, "rate"): ([1.0, 0], 0.3, True, -1.0),
    }
    assert list(found) == list(expected)
    for key, (values, *rest) in expected.items():
        one = found[key]
        assert one.values.tolist() == [values], key
        assert [one.threshold, one.two_sided, one.lowest] == rest, key
        assert one.layer == (None if key[0] in ("pair told apart", "clean right", "corrupt wrong") else 4)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_half_of_the_gap_is_recovered_only_where_there_is_a_gap(direction: str) -> None:
    """All heads close 60 % of a gap that opens at 20, 40 % until 40; before, nothing is there to be closed."""
    run = run_of(np.zeros(8), np.zeros(8), noise=0)
    gap = np.where(STEPS >= 20, 6.0, 0.0)[:, None].repeat(12, 1)
    closed = np.where(STEPS >= 40, 0.6, 0.4)[:, None] * gap
    clean, corrupt = gap - 3, gap * 0 - 3
    run["clean_logit_diff"] = (("checkpoint", "trial"), clean)
    run["corrupt_logit_diff"] = (("checkpoint", "trial"), corrupt)
    run["logit_diff"] = run.logit_diff.astype(float)
    run.logit_diff.loc[{"layer": 4, "subset": "all"}] = corrupt + closed if direction == "denoise" else clean - closed
    frame = onsets(run, direction).set_index(["measure", "layer", "unit"])
    for unit in ("nats", "rate"):
        assert frame.loc[("recovery above half", 4, unit), "by"] == 40


def test_the_direction_decides_what_matters() -> None:
    run = run_of(parted=np.zeros(8), repaired=np.zeros(8))
    run["logit_diff"] = 0 * run.logit_diff + 3
    run.logit_diff.loc[{"layer": 4, "subset": "all"}] = -3.0
    frame = onsets(run, "noise").set_index(["measure", "layer", "unit"])
    assert frame.loc[("all heads matter", 4, "nats"), "by"] == frame.loc[("all heads matter", 4, "rate"), "by"] == 0
    assert frame.loc[("all heads matter", 3, "nats"), "censored"] == "right"


def test_checkpoints_of_unknown_or_doubled_steps_are_left_out() -> None:
    run = run_of(np.zeros(8), np.zeros(8), steps=np.array([0, 10, 10, 20, -1, 30, -1, 40]))
    assert known_steps(run).step.values.tolist() == [0, 10, 20, 30, 40]
    assert next(iter(series_of(known_steps(run), "denoise"))).values.shape == (5, 12)


def dated(after: int | None, by: int | None, lasts: bool = True) -> ParityOnset:
    """A pattern that starts between two steps, where None is the first or never."""
    everywhere = np.zeros(len(STEPS), dtype=bool)
    return ParityOnset(0.01 if lasts else 0.4, 0.5 + everywhere, everywhere, 1.0, after, by, lasts, 0.9, 0.002, False)


def verdicts(evaluation: Evaluation) -> dict[str, str]:
    return {hypothesis.split()[1]: verdict for hypothesis, verdict in evaluation.verdicts.items()}


def judged(onset: ParityOnset | None, steps: np.ndarray = STEPS, shape: str = "undecided") -> dict[str, str]:
    return verdicts(evaluate(steps, onset, Shape(shape, {}, 0.0)))


def test_without_a_permutation_null_no_hypothesis_is_judged() -> None:
    """What differs between two sets of heads, however surely, says nothing of parity: no p, no verdict."""
    steps = np.arange(0, 310, 10)
    run = run_of(4.0 * (steps >= 150), np.ones(31), steps)
    evaluation = hypotheses(run, "denoise", 4)
    assert evaluation is not None and evaluation.onset is None
    assert set(verdicts(evaluation).values()) == {"cannot tell"}
    text = str(hypotheses_finding(run, PatchSettings(layers=(3, 4))))
    assert "cannot tell: no null was run (--subsets even odd all balanced)" in text
    assert "supported" not in text and "contradicted" not in text


def test_a_third_is_supported_where_the_whole_interval_lies_in_it() -> None:
    """Of steps 0 to 70: thirds end at 23.3 and 46.7."""
    found = judged(dated(30, 40))
    assert (found["early"], found["middle"], found["late"]) == ("contradicted", "supported", "contradicted")
    wide = judged(dated(20, 40))
    assert (wide["early"], wide["middle"], wide["late"]) == ("cannot tell", "cannot tell", "contradicted")
    assert judged(dated(None, 0))["early"] == "supported", "there at step 0"
    never = judged(dated(50, None, lasts=False))
    assert (never["early"], never["middle"], never["late"]) == ("contradicted", "contradicted", "cannot tell")


def test_what_does_not_last_supports_nothing() -> None:
    found = judged(dated(30, 40, lasts=False), shape="sudden")
    assert "supported" not in found.values() and found["sudden"] == found["gradual"] == "cannot tell"
    assert found["late"] == "contradicted", "it started before"


@pytest.mark.parametrize(
    ("shape", "gradual", "sudden"),
    [("gradual", "supported", "contradicted"), ("sudden", "contradicted", "supported"),
     ("non-monotone", "non-monotone", "non-monotone"), ("undecided", "cannot tell", "cannot tell"),
     ("none", "contradicted", "contradicted")],
)  # fmt: skip
def test_shapes_are_gradual_sudden_or_neither(shape: str, gradual: str, sudden: str) -> None:
    found = judged(dated(30, 40), shape=shape)
    assert (found["gradual"], found["sudden"]) == (gradual, sudden)


def test_the_published_strengths_leave_open_whether_they_are_sudden() -> None:
    """Even minus odd success rate of the published study at its eleven checkpoints."""
    steps = np.array([1, 2, 4, 8, 16, 32, 64, 80, 100, 120, 143]) * 1000
    shape = evaluate_shape(steps.astype(float), np.array([0.0] * 10 + [1.0])[:, None])
    evaluation = evaluate(steps, dated(120_000, 143_000), shape)
    found, evidence = verdicts(evaluation), hypotheses_table(evaluation)["evidence"]
    assert found["late"] == "supported" and "from step 143,000 on" in evidence["H3 late"]
    assert "excluded up to step 120,000" in evidence["H3 late"]
    assert found["sudden"] == found["gradual"] == "cannot tell"
    assert "16% of the steps lie unobserved" in evidence["H5 sudden"]


def test_two_checkpoints_are_too_few() -> None:
    assert hypotheses(run_of(np.zeros(2), np.ones(2), STEPS[:2]), "denoise", 4) is None


def test_thirds_are_of_the_training_and_not_of_the_checkpoints_at_hand() -> None:
    steps = np.arange(120, 144) * 1000
    found = judged(dated(124_000, 125_000), steps)
    assert (found["early"], found["late"]) == ("contradicted", "supported")
    late = evaluate(np.array([1, 10, 100, 1000, 10_000]), dated(100, 1000), Shape("undecided", {}, 0.0))
    assert late.verdicts["H1 early"] == "supported"
    assert "over log steps middle or late" in hypotheses_table(late)["evidence"].iloc[0]


def test_the_text_says_where_a_rate_jumps_and_the_nats_do_not() -> None:
    """Every prompt's logit difference rises steadily and passes zero at about the same time."""
    steps = np.arange(0, 310, 10)
    run = run_of(np.zeros(31), np.zeros(31), steps)
    rising = (steps[:, None] - 155) / 50 + np.random.default_rng(2).normal(0, 0.02, (31, 12))
    run["clean_logit_diff"] = (("checkpoint", "trial"), rising.astype(np.float32))
    when = str(onsets_finding(run, PatchSettings()))
    assert "clean right: the rate jumps and the nats do not" in when


def test_the_text_tells_onsets_and_hypotheses_of_the_layer_that_moves_most() -> None:
    jump = 4.0 * (STEPS >= 40)
    run = run_of(jump, 1.5 * jump)
    when, tested = str(onsets_finding(run, PatchSettings())), str(hypotheses_finding(run, PatchSettings()))
    row = next(line for line in when.splitlines() if line.startswith("even − odd divergence, nats"))
    assert "30 to 40" in row and "at layer 4" in when
    assert "specialization" not in when, "without a null what parts is no specialization"
    assert tested.splitlines()[1].split()[:3] == ["H1", "early", "cannot"]
    short = run_of(jump[:2], jump[:2], STEPS[:2])
    assert onsets_finding(short, PatchSettings()) is None and hypotheses_finding(short, PatchSettings()) is None


@pytest.mark.slow
@pytest.mark.parametrize("n_prompts", [5, 8, 15])
@pytest.mark.parametrize("kind", ["normal", "lognormal", "rate"])
def test_intervals_of_onsets_hold_for_few_prompts_too(n_prompts: int, kind: str) -> None:
    """150 series of 20 checkpoints: the crossing lies in at least 95 %, within three standard errors (5.3 points)."""
    rng, steps, covered = np.random.default_rng(n_prompts), np.arange(20) * 10, 0
    with unchecked():
        for _ in range(150):
            true = rng.uniform(30, 160)
            mean, shape = ((steps - true) / 50)[:, None], (20, n_prompts)
            values = {
                "normal": lambda mean=mean, shape=shape: mean + rng.standard_normal(shape),
                "lognormal": lambda mean=mean, shape=shape: mean + rng.lognormal(size=shape) - np.exp(0.5),
                "rate": lambda mean=mean, shape=shape: (mean + rng.logistic(size=shape) > 0) * 1.0,
            }[kind]()
            unit = "rate" if kind == "rate" else "nats"
            onset = onset_of(steps, Series("it", None, values, 0.5 if unit == "rate" else 0.0, unit))
            low, high = -1 if onset.low is None else onset.low, np.inf if onset.high is None else onset.high
            covered += low <= true <= high
    assert covered / 150 >= 0.95 - 0.053


def test_a_constant_answer_is_no_capability_and_clean_right_all_the_same() -> None:
    """Both prompts of every pair are answered alike, rightly for the clean one."""
    run = run_of(np.zeros(8), np.zeros(8))
    answered = 3 + np.random.default_rng(3).normal(0, 0.1, (8, 12)).astype(np.float32)
    run["clean_logit_diff"] = run["corrupt_logit_diff"] = (("checkpoint", "trial"), answered)
    frame = onsets(run, "denoise").set_index(["measure", "layer", "unit"])["censored"]
    for unit in ("nats", "rate"):
        assert frame.loc[("pair told apart", slice(None), unit)].tolist() == ["right"]
        assert frame.loc[("clean right", slice(None), unit)].tolist() == ["left"]


def test_an_onset_is_never_after_its_first_significant_checkpoint() -> None:
    """What is surely there at 20 and gone at 30 has started by 20, though it lasts only from 50 on."""
    values = np.array([0, 0, 2, 0, 0, 2, 2, 2.0])[:, None] + np.random.default_rng(4).normal(0, 0.1, (8, 10))
    onset = onset_of(STEPS, series(values))
    assert (onset.after, onset.by, onset.significant) == (10, 20, 20) and onset.low is not None and onset.low <= 20
    rng = np.random.default_rng(5)
    for _ in range(50):
        noisy = rng.normal(0, 1, (8, 1)) + rng.normal(0, 1, (8, 10))
        found = onset_of(STEPS, series(noisy, two_sided=True))
        assert found.significant is None or (found.by is not None and found.by <= found.significant)
