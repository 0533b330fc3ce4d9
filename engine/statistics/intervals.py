"""How sure a mean over distinct prompts is.  Pure."""

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
"""Of intervals."""

RESAMPLES = 4999


def interval(values: Float[np.ndarray, "*cell trial"]) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
    """Percentile bootstrap of the mean over distinct prompts (Efron and Tibshirani 1993, chapter 13); NaN for one."""
    if values.shape[-1] < 2:
        unknown = np.full(values.shape[:-1], np.nan)
        return unknown, unknown
    from scipy.stats import bootstrap  # takes most of a second, and only this table needs it

    found = bootstrap(
        (values,), np.mean, axis=-1, confidence_level=LEVEL, n_resamples=RESAMPLES, batch=100, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def resampled_means(
    values: Float[np.ndarray, "*cell trial"], n_resamples: int = RESAMPLES
) -> Float[np.ndarray, "*cell resample"]:
    """Means over prompts drawn with replacement; the same draws for every cell, and for every call of as many prompts.

    The bootstrap of Efron and Tibshirani 1993, chapter 6.
    """
    n = values.shape[-1]
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return values @ (drawn.T / n)
