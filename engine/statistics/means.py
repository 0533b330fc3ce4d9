"""Intervals and tests of means over distinct prompts, which hold for few prompts and for skewed values.  Pure."""

import numpy as np
from jaxtyping import Float

from .bootstrap import LEVEL
from .joint import ROUNDING

Cells = Float[np.ndarray, "*cell"]


def interval(values: Float[np.ndarray, "*cell trial"], read_together: int = 1) -> tuple[Cells, Cells]:
    """Of the mean over distinct prompts, 95 %; NaN for one.

    Student's, corrected for skewness (Willink 2005, Communications in Statistics 34, 753-766, from the expansion of
    Johnson 1978 and Hall 1992; here with the plain third moment): from mean - G(t) s / sqrt(n) to mean - G(-t)
    s / sqrt(n), where G(r) = (cbrt(1 + 6 a (r - a)) - 1) / (2 a), a = m3 / (6 sqrt(n) s^3) and t is Student's quantile.
    Where values are symmetric it is Student's.  A standard deviation below that of float32 replay's rounding is taken
    to be as large: what all prompts share to the last digit would otherwise be certain, rounding included.

    Where so many means are `read_together`, or the largest of so many, each is wide enough for all of them to cover in
    95 %, however they depend on each other: 5 % are shared out equally (Bonferroni; Dunn 1961,
    doi:10.1080/01621459.1961.10482090).  The correction for skewness stays what it is at 95 %, as in `p_above`.
    """
    from scipy.special import stdtrit  # start-up counts

    n = values.shape[-1]
    if n < 2:
        unknown = np.full(values.shape[:-1], np.nan)
        return unknown, unknown
    mean, error, skew = _moments(values)
    reach = stdtrit(n - 1, (1 + LEVEL) / 2)
    further = stdtrit(n - 1, 1 - (1 - LEVEL) / (2 * read_together)) - reach
    return mean - (_pivot(reach, skew) + further) * error, mean - (_pivot(-reach, skew) - further) * error


def p_above(values: Float[np.ndarray, "*cell trial"], threshold: float) -> Cells:
    """One-sided p: how likely a mean so far above `threshold` is, did it lie on it; NaN for one prompt.

    Student's test corrected for skewness, the inverse of `interval`: that leaves `threshold` out exactly where twice
    the smaller p of both sides is below 5 %.  Beyond the interval's ends the correction stays what it is there: its
    expansion is too sure of very small p where prompts are few, or never reaches them.
    """
    from scipy.special import stdtr, stdtrit  # start-up counts

    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.nan)
    mean, error, skew = _moments(values)
    t, reach = (mean - threshold) / error, stdtrit(n - 1, (1 + LEVEL) / 2)
    within = np.clip(t, _pivot(-reach, skew), _pivot(reach, skew))
    correction = skew + 2 * skew * within**2 + 4 / 3 * skew**2 * within**3
    p: Cells = stdtr(n - 1, -(t + correction))
    return p


def p_differs(values: Float[np.ndarray, "*cell trial"], threshold: float = 0.0) -> Cells:
    """Two-sided p of a mean that is `threshold`: twice the smaller of both sides."""
    p: Cells = np.minimum(1, 2 * np.minimum(p_above(values, threshold), p_above(-values, -threshold)))
    return p


def p_equivalent(values: Float[np.ndarray, "*cell trial"], margin: float) -> Cells:
    """p of a mean that is `margin` or more from zero, either way: small where the effect is shown to be smaller.

    Two one-sided tests, the larger p of both (TOST: Schuirmann 1987, doi:10.1007/BF01068419).
    """
    p: Cells = np.maximum(p_above(values, -margin), p_above(-values, -margin))
    return p


def _moments(values: Float[np.ndarray, "*cell trial"]) -> tuple[Cells, Cells, Cells]:
    """Mean, its standard error, and the coefficient of skewness that `interval` calls a."""
    n = values.shape[-1]
    mean = values.mean(-1)
    apart = values - mean[..., None]
    spread = np.maximum(np.sqrt((apart**2).sum(-1) / (n - 1)), ROUNDING)
    return mean, spread / np.sqrt(n), (apart**3).mean(-1) / (6 * np.sqrt(n) * spread**3)


def _pivot(reach: float, skew: Cells) -> Cells:
    """G; its limit for no skewness is `reach` itself."""
    small = np.abs(skew) < 1e-7
    a = np.where(small, 1.0, skew)
    pivot: Cells = np.where(small, reach, (np.cbrt(1 + 6 * a * (reach - a)) - 1) / (2 * a))
    return pivot


def t_test(values: Float[np.ndarray, "*cell trial"], level: float = LEVEL) -> tuple[Cells, Cells, Cells]:
    """Student's own interval and two-sided p of no effect, without correction: for the few values of training runs,
    whose skewness nobody can estimate; NaN for one (Student 1908)."""
    from scipy.special import stdtr, stdtrit  # start-up counts

    n = values.shape[-1]
    if n < 2:
        unknown = np.full(values.shape[:-1], np.nan)
        return unknown, unknown, unknown
    mean, error, _ = _moments(values)
    reach = stdtrit(n - 1, (1 + level) / 2) * error
    return mean - reach, mean + reach, 2 * stdtr(n - 1, -np.abs(mean) / error)
