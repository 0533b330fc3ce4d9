"""Laws of adjusted p-values, against hand-worked numbers and what the procedures reject by their definition."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from headlapse.engine.statistics.multiple_testing import CORRECTIONS, Correction, adjust


def rejected_by_definition(p: np.ndarray, level: float, correction: Correction) -> set[int]:
    """Holm 1979: step down while p_(i) <= level / (m - i + 1).  Benjamini and Hochberg 1995: all up to the last i with
    p_(i) <= i level / m."""
    order, m = np.argsort(p, kind="stable"), len(p)
    if correction == "holm":
        n = next((i for i in range(m) if p[order[i]] > level / (m - i)), m)
    else:
        n = max((i + 1 for i in range(m) if p[order[i]] <= (i + 1) * level / m), default=0)
    return set(order[:n].tolist())


def test_holm_worked_by_hand() -> None:
    """Sorted .005, .01, .03, .04 times 4, 3, 2, 1 are .02, .03, .06, .04, and the last may not be less than .06."""
    np.testing.assert_allclose(adjust(np.array([0.01, 0.04, 0.03, 0.005]), "holm"), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(adjust(np.array([0.5, 0.9]), "holm"), [1.0, 1.0])
    np.testing.assert_allclose(adjust(np.array([0.2]), "holm"), [0.2])
    np.testing.assert_array_equal(adjust(np.array([0.7, 0.9]), "holm"), [1.0, 1.0], "2 x 0.7 is no probability")


def test_benjamini_and_hochberg_worked_by_hand() -> None:
    """Sorted .005, .01, .03, .04 times 4/1, 4/2, 4/3, 4/4 are .02, .02, .04, .04."""
    np.testing.assert_allclose(adjust(np.array([0.01, 0.04, 0.03, 0.005])), [0.02, 0.04, 0.04, 0.02])


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_is_adjusted_to_a_level_at_most_is_what_the_procedure_rejects_at_it(correction: Correction) -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        p, level = draw.random(draw.integers(1, 12)) ** 3, draw.random()
        found = set(np.flatnonzero(adjust(p, correction) <= level).tolist())
        assert found == rejected_by_definition(p, level, correction)


def test_holm_never_says_less_than_benjamini_and_hochberg_and_both_never_less_than_p() -> None:
    p = np.random.default_rng(1).random(50) ** 4
    assert (adjust(p, "holm") >= adjust(p, "bh") - 1e-12).all() and (adjust(p, "bh") >= p - 1e-12).all()


def test_benjamini_and_hochberg_are_scipys_to_the_last_bit() -> None:
    draw = np.random.default_rng(2)
    for n in (1, 2, 17, 300):
        for p in (draw.random(n) ** 4, np.round(draw.random(n), 1)):
            np.testing.assert_array_equal(adjust(p), false_discovery_control(p, method="bh"))
