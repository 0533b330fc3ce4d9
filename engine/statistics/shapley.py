"""Heads as players of a game: what a coalition is worth is what patching it does.  Pure.

Values stand along the first axis for every coalition, bit h of whose index says whether head h is in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from ...kernels.walsh import walsh_hadamard

Values = Float[np.ndarray, "coalition *trial"]


def shapley(values: Values) -> Float[np.ndarray, "head *trial"]:
    """What each head adds, averaged over all orders in which heads can join (Shapley 1953); sums to v(all) - v(none).

    Exact, from every coalition: sum over S without h of |S|! (n - |S| - 1)! / n! (v(S + h) - v(S)).
    """
    n, size = _n_heads(values), sizes(_n_heads(values))
    joining = np.array([0.0] + [1 / (n * math.comb(n - 1, k - 1)) for k in range(1, n + 1)])
    missing = np.array([1 / (n * math.comb(n - 1, k)) for k in range(n)] + [0.0])
    weight = np.where(members(n).T, joining[size], -missing[size])
    return np.tensordot(weight, values, axes=1)


def banzhaf(values: Values) -> Float[np.ndarray, "head *trial"]:
    """What each head adds, averaged over all coalitions of the others (Banzhaf 1965), from the Walsh spectrum."""
    n = _n_heads(values)
    return -_spectrum(values)[1 << np.arange(n)] / 2 ** (n - 1)


def banzhaf_interactions(values: Values) -> Float[np.ndarray, "head head *trial"]:
    """How much more two heads do together than one by one, averaged over all coalitions of the others.

    Owen 1972; Grabisch and Roubens 1999, from the Walsh spectrum.  Zero on the diagonal.
    """
    n = _n_heads(values)
    bit = 1 << np.arange(n)
    found = _spectrum(values)[bit[:, None] | bit] / 2.0 ** (n - 2)
    found[np.arange(n), np.arange(n)] = 0
    return found


def shapley_interactions(values: Values) -> Float[np.ndarray, "head head *trial"]:
    """How much more two heads do together than one by one, averaged over all orders (Grabisch and Roubens 1999).

    Sum over S without i and j of |S|! (n - |S| - 2)! / (n - 1)! (v(S + i + j) - v(S + i) - v(S + j) + v(S)); zero on
    the diagonal.
    """
    n = _n_heads(values)
    found = np.zeros((n, n, *values.shape[1:]))
    others = np.array([1 / ((n - 1) * math.comb(n - 2, k)) for k in range(n - 1)])
    within, size, every = members(n), sizes(n), np.arange(2**n)
    for i in range(n):
        for j in range(i):
            rest = every[~within[:, i] & ~within[:, j]]
            a, b = 1 << i, 1 << j
            more = values[rest | a | b] - values[rest | a] - values[rest | b] + values[rest]
            found[i, j] = found[j, i] = np.tensordot(others[size[rest]], more, axes=1)
    return found


@dataclass(frozen=True)
class Smallest:
    """The smallest coalitions that do something."""

    size: int
    """Heads; -1 where no coalition does it."""

    count: int
    """Coalitions of that size that do it."""

    heads: tuple[int, ...]
    """The one of them that does it best."""


def smallest_sufficient(mean: Float[np.ndarray, " coalition"], goal: float) -> Smallest:
    """The fewest heads whose patch alone is worth at least `goal`."""
    return _smallest(mean >= goal, mean)


def smallest_necessary(mean: Float[np.ndarray, " coalition"], goal: float) -> Smallest:
    """The fewest heads without which all others together are worth at most `goal`."""
    without = mean[::-1]  # what is left when a coalition is taken away: the complement of its bits
    return _smallest(without <= goal, -without)


def sampled_shapley(
    worth: Float[np.ndarray, "order step *trial"], orders: Int[np.ndarray, "order head"]
) -> tuple[Float[np.ndarray, "head *trial"], Float[np.ndarray, "head *trial"]]:
    """Estimate and standard error from the worth of every beginning of some orders, the empty one first.

    Each order is followed by its reverse, and the two count as one draw (Castro, Gomez and Tejada 2009; antithetic
    orders: Mitchell et al. 2022, arXiv:2104.12199).  The error is NaN for a single pair.
    """
    added = np.diff(worth, axis=1)
    gained = np.empty_like(added)
    for gain, order, row in zip(gained, orders, added, strict=True):
        gain[order] = row
    pairs = gained.reshape(len(orders) // 2, 2, *gained.shape[1:]).mean(1)
    if len(pairs) < 2:
        return pairs[0], np.full_like(pairs[0], np.nan)
    return pairs.mean(0), pairs.std(0, ddof=1) / math.sqrt(len(pairs))


def members(n_heads: int) -> np.ndarray:
    """Which heads are in each coalition: (coalition, head)."""
    return (np.arange(2**n_heads)[:, None] >> np.arange(n_heads) & 1).astype(bool)


def sizes(n_heads: int) -> np.ndarray:
    """How many heads are in each coalition."""
    return members(n_heads).sum(1)


def index_of(heads: Sequence[int]) -> int:
    """A coalition's place."""
    return sum(1 << head for head in heads)


def _smallest(does: np.ndarray, merit: np.ndarray) -> Smallest:
    n = _n_heads(does)
    if not does.any():
        return Smallest(-1, 0, ())
    size = sizes(n)
    least = int(size[does].min())
    chosen = np.flatnonzero(does & (size == least))
    best = chosen[merit[chosen].argmax()]
    return Smallest(least, len(chosen), tuple(np.flatnonzero(members(n)[best]).tolist()))


def _spectrum(values: np.ndarray) -> np.ndarray:
    return walsh_hadamard(np.asarray(values, dtype=float))


def _n_heads(values: np.ndarray) -> int:
    n = len(values).bit_length() - 1
    assert len(values) == 2**n, f"{len(values)} values are no lattice"
    return n
