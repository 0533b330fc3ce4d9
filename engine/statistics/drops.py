"""How far a mean over training goes back by chance.  Pure."""

import numpy as np
from jaxtyping import Float

from .bootstrap import LEVEL, noise_of_means

RESAMPLES = 999
"""By which a turn is distinguished from noise."""

TURN = 0.2
"""Share of the range of the means below which going back counts for nothing, however sure it is."""


def turns(values: Float[np.ndarray, "checkpoint trial"]) -> bool:
    """Whether the mean over prompts surely goes up and surely goes down, each by a fifth of its range or more.

    Surely: by more than noise over prompts does anywhere in 95 % of resamples (`chance_drops`).  Never for one prompt.
    """
    n = values.shape[1]
    if n < 2 or len(values) < 3:
        return False
    mean, noise = values.mean(1), noise_of_means(values, RESAMPLES)
    least = TURN * np.ptp(mean) + 1e-6 * np.abs(mean).max()
    return all(_drops(sign * mean, sign * noise, least, students(n)) for sign in (1, -1))


def _drops(
    mean: Float[np.ndarray, " checkpoint"], noise: Float[np.ndarray, "checkpoint resample"], least: float, wider: float
) -> bool:
    drop = np.maximum.accumulate(mean) - mean
    return bool((drop > np.maximum(wider * chance_drops(noise), least)).any())


def chance_drops(noise: Float[np.ndarray, "checkpoint resample"]) -> Float[np.ndarray, " checkpoint"]:
    """How far noise drops to each checkpoint, from whichever before, in all but 5 % of cases together.

    Balanced simultaneous bootstrap: Beran 1988.
    """
    fallen = np.maximum.accumulate(noise, axis=0)
    fallen -= noise
    size = np.sqrt(np.einsum("cr,cr->c", fallen, fallen) / noise.shape[1])
    fallen /= np.where(size > 0, size, 1)[:, None]
    deepest: Float[np.ndarray, " checkpoint"] = size * np.quantile(fallen.max(0), LEVEL)
    return deepest


def students(n: int) -> float:
    """How much wider an interval is when its standard error is estimated from n prompts (Student 1908)."""
    from scipy.special import ndtri, stdtrit  # start-up counts

    return float(stdtrit(n - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2))
