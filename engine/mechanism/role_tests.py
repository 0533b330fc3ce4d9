"""Whether a head's score is above its null by more than chance, all heads of a checkpoint taken together.  Pure."""

import numpy as np
from jaxtyping import Float

from ..statistics.multiple_testing import adjust

SMALLEST_SPREAD = 1e-6
"""Standard deviation of what does not vary: shares of attention are rounded in their seventh digit."""


def paired_p_values(above: Float[np.ndarray, "layer head unit"]) -> Float[np.ndarray, "layer head"]:
    """One-sided t-tests (Student 1908) of scores minus nulls over sequences or prompts, adjusted over all heads (Holm
    1979); NaN for one unit."""
    from scipy.special import stdtr  # start-up counts

    n = above.shape[-1]
    if n < 2:
        return np.full(above.shape[:-1], np.nan)
    error = np.maximum(above.std(-1, ddof=1), SMALLEST_SPREAD) / np.sqrt(n)
    p = stdtr(n - 1, -above.mean(-1) / error)
    return adjust(p.ravel(), "holm").reshape(p.shape)


def shuffled_p_values(
    score: Float[np.ndarray, "layer head"], shuffled: Float[np.ndarray, "shuffle layer head"]
) -> Float[np.ndarray, "layer head"]:
    """How often labels shuffled at random give any head at all so large a score, the shuffle that is the truth included
    (max statistic: Westfall and Young 1993)."""
    largest = shuffled.max((1, 2))
    as_large = (largest[:, None, None] >= score).sum(0)
    p: Float[np.ndarray, "layer head"] = (1 + as_large) / (1 + len(shuffled))
    return p
