"""Means over prompts drawn with replacement, and how far noise moves them.  Pure."""

import functools

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
"""Of intervals."""

RESAMPLES = 4999


def resampled_means(
    values: Float[np.ndarray, "*cell trial"], n_resamples: int = RESAMPLES
) -> Float[np.ndarray, "*cell resample"]:
    """Means over prompts drawn with replacement; the same draws for every cell, and for every call of as many prompts.

    The bootstrap of Efron and Tibshirani 1993, chapter 6.
    """
    means: Float[np.ndarray, "*cell resample"] = values @ _draws(values.shape[-1], n_resamples)
    return means


@functools.lru_cache(maxsize=2)
def _draws(n: int, n_resamples: int) -> Float[np.ndarray, "trial resample"]:
    """Share of each prompt in each resample."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    shares = np.ascontiguousarray(drawn.T / n)
    shares.flags.writeable = False
    return shares


def noise_of_means(
    values: Float[np.ndarray, "*cell trial"], n_resamples: int = RESAMPLES
) -> Float[np.ndarray, "*cell resample"]:
    """How far means of other prompts would lie from these, cells together; all zero for one prompt.

    Resampled means about their centre, wider by sqrt(n / (n - 1)), for a bootstrap is too narrow by as much (Efron and
    Tibshirani 1993, section 5.3).
    """
    n = values.shape[-1]
    noise = resampled_means(values, n_resamples)
    noise -= values.mean(-1, keepdims=True)
    noise *= np.sqrt(n / max(n - 1, 1))
    return noise
