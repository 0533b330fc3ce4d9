"""Laws of shapes: planted curves are called what they are, and what nobody looked at is left open."""

import numpy as np
import pytest

from headlapse.engine.statistics.changepoint import (
    DIVIDE,
    GAP,
    NON_MONOTONE,
    WIDEST,
    Shape,
    _verdict,
    changes,
    evaluate_shape,
    sampling_variance,
)
from tests.simulating import unchecked

DENSE = np.linspace(0, 1, 31)
NAMES = ("constant", "step", "steep", "line", "slow")


def noisy(mean: np.ndarray, seed: int = 0, noise: float = 0.5) -> np.ndarray:
    return mean[:, None] + noise * np.random.default_rng(seed).standard_normal((len(mean), 15))


@pytest.mark.parametrize("seed", range(5))
def test_dense_checkpoints_tell_a_jump_from_a_rise(seed: int) -> None:
    assert evaluate_shape(DENSE, noisy(3.0 * (DENSE > 0.4), seed)).verdict == "sudden"
    assert evaluate_shape(DENSE, noisy(3.0 * DENSE, seed)).verdict == "gradual"
    assert evaluate_shape(DENSE, noisy(3 / (1 + np.exp(-(DENSE - 0.5) / 0.1)), seed)).verdict == "gradual"


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.5, 1.0, 2.0, 8.0])
def test_a_slow_rise_is_rarely_called_sudden_nor_a_jump_gradual(size: float) -> None:
    """100 series each, of rises from half the prompts' scatter on; what is too weak to tell is left open."""
    draw = np.random.default_rng(9)
    slow, jump = size / (1 + np.exp(-(DENSE - 0.5) / 0.1)), size * (DENSE > 0.4)
    with unchecked():
        rises, jumps = (
            [evaluate_shape(DENSE, mean[:, None] + draw.standard_normal((31, 15))).verdict for _ in range(100)]
            for mean in (slow, jump)
        )
    assert rises.count("sudden") <= 5 and jumps.count("gradual") <= 5
    if size >= 2:
        assert rises.count("gradual") >= 80 and jumps.count("sudden") >= 80


def test_a_jump_across_a_gap_is_left_open() -> None:
    x = np.concatenate([np.linspace(0, 0.5, 12), np.linspace(0.75, 1, 6)])
    shape = evaluate_shape(x, noisy(3.0 * (x > 0.6)))
    assert shape.verdict == "undecided" and shape.gap == pytest.approx(0.25)


def test_what_rises_and_falls_again_is_neither_and_its_gap_is_known() -> None:
    shape = evaluate_shape(DENSE, noisy(4.0 * np.sin(np.pi * DENSE), noise=0.1))
    assert shape.verdict == NON_MONOTONE and shape.gap == pytest.approx(1 / (len(DENSE) - 1))


@pytest.mark.slow
def test_noise_alone_is_rarely_called_anything() -> None:
    """300 series of independent noise: a shape is seen in 5 % at most, within three standard errors (3.8 points)."""
    with unchecked():
        verdicts = [evaluate_shape(DENSE, noisy(np.zeros(31), seed)).verdict for seed in range(300)]
    assert np.mean([verdict in ("sudden", "gradual") for verdict in verdicts]) < 0.05 + 0.038


def test_too_few_checkpoints_say_nothing() -> None:
    shape = evaluate_shape(np.arange(3.0), np.arange(3.0)[:, None])
    assert shape == Shape("undecided", {}, gap=1.0, changes=True), "all of the range is a gap"
    assert evaluate_shape(np.arange(4.0), np.arange(4.0)[:, None]).verdict == "gradual", "four are enough for a line"
    assert evaluate_shape(np.zeros(6), noisy(np.zeros(6))).verdict == "undecided"


def test_bic_is_its_definition() -> None:
    y = np.array([0.0, 1.0, 0.0, 1.0, 5.0, 6.0, 5.0, 6.0])
    shape = evaluate_shape(np.arange(8.0), y[:, None])
    n, left = 8, 8 * 0.25
    assert tuple(shape.bic) == NAMES
    assert shape.bic["step"] == pytest.approx(n * np.log(left / n) + n + 3 * np.log(n))
    assert shape.bic["constant"] == pytest.approx(n * np.log(y.var()) + n + np.log(n))
    slope, intercept = np.polyfit(np.arange(8.0), y, 1)
    rest = ((y - slope * np.arange(8.0) - intercept) ** 2).sum()
    assert shape.bic["line"] == pytest.approx(n * np.log(rest / n) + n + 2 * np.log(n))


def test_prompts_that_differ_alike_everywhere_change_no_shape() -> None:
    """Prompts far apart that all rise alike rise; those that scatter at every checkpoint anew prove nothing."""
    draw = np.random.default_rng(0)
    x = np.linspace(0, 1, 31)
    for mean, verdict in ((3.0 * (x > 0.4), "sudden"), (3.0 * x, "gradual"), (0 * x, "none")):
        assert evaluate_shape(x, noisy(mean) + 10 * draw.standard_normal(15)).verdict == verdict
    assert evaluate_shape(x, (0.5 * x)[:, None] + draw.normal(0, 9, (31, 16))).verdict == "none"
    assert evaluate_shape(x, (0.5 * x)[:, None]).verdict == "gradual"


def test_the_sampling_variance_is_the_interaction_of_an_analysis_of_variance() -> None:
    """Hand-worked: prompts 0 and 4 apart, and one cell off by 2."""
    values = np.array([[0.0, 4.0], [0.0, 4.0], [2.0, 4.0]])
    assert sampling_variance(values) == pytest.approx((4 / 3) / (1 * 2) / 2)
    assert sampling_variance(values[:, :1]) == 0 and sampling_variance(values[:1]) == 0


@pytest.mark.slow
def test_prompts_that_go_their_own_ways_make_no_change_of_the_mean() -> None:
    """300 series of 15 prompts, each a random walk of its own: a shape is seen in at most 5 %, within three standard
    errors (3.8 points)."""
    walks = np.random.default_rng(3).normal(0, 0.3, (300, 31, 15)).cumsum(1)
    with unchecked():
        verdicts = [evaluate_shape(DENSE, one).verdict for one in walks]
    assert np.mean([verdict in ("sudden", "gradual") for verdict in verdicts]) <= 0.05 + 0.038
    assert changes(DENSE, walks[0] + 9 * DENSE[:, None])


@pytest.mark.parametrize("kind, width", [("steep", DIVIDE), ("slow", np.geomspace(DIVIDE, WIDEST, 10)[3])])
@pytest.mark.parametrize("middle", [5.0, 5.5, 8.5])
def test_a_logistic_rise_between_or_at_checkpoints_is_fitted_by_its_own_family_alone(
    kind: str, width: float, middle: float
) -> None:
    """Nothing of it is left over, so that BIC is that of the least variance there is."""
    x = np.arange(12.0)
    y = 5 + 3 / (1 + np.exp(-(x - middle) / (11 * width)))
    bic = evaluate_shape(x, y[:, None]).bic
    least = (1e-9 + 1e-6 * y.max()) ** 2
    assert bic[kind] == pytest.approx(12 * np.log(least) + 4 * np.log(12), abs=0.1)
    assert all(bic[other] > bic[kind] + 6 for other in bic if other != kind)


@pytest.mark.parametrize(
    "sudden, gradual, gap, verdict",
    [
        (-10, -3, 0.05, "sudden"),
        (-10, -4, GAP, "sudden"),
        (-2, 9, 0.05, "sudden"),
        (-10, -5, 0.05, "undecided"),
        (-10, -3, 0.2, "undecided"),
        (-1.9, 9, 0.05, "undecided"),
        (1.9, 9, 0.05, "undecided"),
        (2, 9, 0.05, "none"),
        (-4, -10, 0.2, "gradual"),
    ],
)
def test_a_verdict_takes_six_of_bic_between_shapes_and_two_against_a_constant(
    sudden: float, gradual: float, gap: float, verdict: str
) -> None:
    for other in ("step", "steep"), ("steep", "step"):
        bic = {"constant": 0.0, "line": gradual + 1, "slow": gradual, other[0]: sudden, other[1]: sudden + 1}
        assert _verdict(bic, gap) == verdict
