"""Many tests at once: p-values adjusted for how many there are.  Pure."""

from typing import get_args

import numpy as np
from jaxtyping import Float

from ..study.reading import Correction

CORRECTIONS: tuple[Correction, ...] = get_args(Correction)

NAMES: dict[Correction, str] = {"bh": "Benjamini-Hochberg", "holm": "Holm"}


def adjust(p: Float[np.ndarray, " test"], correction: Correction = "bh") -> Float[np.ndarray, " test"]:
    """Adjusted p-values: those at most q are what the procedure rejects at q.

    `bh` bounds the share of false findings among all findings (Benjamini and Hochberg 1995), `holm` the chance of any
    false finding, however the tests depend on each other (Holm 1979).
    """
    return _holm(p) if correction == "holm" else _benjamini_hochberg(p)


def _benjamini_hochberg(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """The i-th smallest of m tests times m / i; never more than what comes after it.

    As `scipy.stats.false_discovery_control`, to the last bit; importing that takes longer than patching 50 checkpoints.
    """
    order, m = np.argsort(p), len(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum.accumulate((p[order] * (m / np.arange(1, m + 1)))[::-1])[::-1].clip(0, 1)
    return adjusted


def _holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """The smallest of m tests times m, the next times m - 1, and so on; never less than what comes before it."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted
