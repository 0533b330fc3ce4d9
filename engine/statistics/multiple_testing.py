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
    if correction == "holm":
        return _holm(p)
    from scipy.stats import false_discovery_control  # start-up counts

    return false_discovery_control(p, method="bh")


def _holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """The smallest of m tests times m, the next times m - 1, and so on; never less than what comes before it."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted
