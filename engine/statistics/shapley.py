"""Shapley and Banzhaf values, interactions, smallest sufficient and necessary sets of heads.  Pure.

In the words of game theory heads are players, and the worth of a subset (a coalition there) is the effect of patching
it.  Values stand along the first axis for every subset, bit h of whose index says whether head h is in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ...kernels.walsh import walsh_hadamard

Values = Float[np.ndarray, "subset *trial"]


def shapley(values: Values) -> Float[np.ndarray, "head *trial"]:
    """What each head adds, averaged over all orders in which heads can join (Shapley 1953); sums to v(all) - v(none).

    Exact, from every subset: sum over S without h of |S|! (n - |S| - 1)! / n! (v(S + h) - v(S)).
    """
    n, size = _n_heads(values), sizes(_n_heads(values))
    joining = np.array([0.0] + [1 / (n * math.comb(n - 1, k - 1)) for k in range(1, n + 1)])
    missing = np.array([1 / (n * math.comb(n - 1, k)) for k in range(n)] + [0.0])
    weight = np.where(members(n).T, joining[size], -missing[size])
    return np.tensordot(weight, values, axes=1)


def banzhaf(values: Values) -> Float[np.ndarray, "head *trial"]:
    """What each head adds, averaged over all subsets of the others (Banzhaf 1965), from the Walsh spectrum."""
    n = _n_heads(values)
    main_effects: Float[np.ndarray, head * trial] = -_spectrum(values)[1 << np.arange(n)] / 2 ** (n - 1)
    return main_effects


def banzhaf_interactions(values: Values) -> Float[np.ndarray, "head head *trial"]:
    """How much more two heads do together than one by one, averaged over all subsets of the others.

    Owen 1972; Grabisch and Roubens 1999, from the Walsh spectrum.  Zero on the diagonal.
    """
    n = _n_heads(values)
    bit = 1 << np.arange(n)
    interactions: Float[np.ndarray, "head head *trial"] = _spectrum(values)[bit[:, None] | bit] / 2.0 ** (n - 2)
    interactions[np.arange(n), np.arange(n)] = 0
    return interactions


def shapley_interactions(values: Values) -> Float[np.ndarray, "head head *trial"]:
    """How much more two heads do together than one by one, averaged over all orders (Grabisch and Roubens 1999).

    Sum over S without i and j of |S|! (n - |S| - 2)! / (n - 1)! (v(S + i + j) - v(S + i) - v(S + j) + v(S)); zero on
    the diagonal.
    """
    n = _n_heads(values)
    interactions = np.zeros((n, n, *values.shape[1:]))
    others = np.array([1 / ((n - 1) * math.comb(n - 2, k)) for k in range(n - 1)])
    within, size, every = members(n), sizes(n), np.arange(2**n)
    for i in range(n):
        for j in range(i):
            rest = every[~within[:, i] & ~within[:, j]]
            a, b = 1 << i, 1 << j
            more = values[rest | a | b] - values[rest | a] - values[rest | b] + values[rest]
            interactions[i, j] = interactions[j, i] = np.tensordot(others[size[rest]], more, axes=1)
    return interactions


@dataclass(frozen=True)
class Smallest:
    """The smallest subsets with some property."""

    size: int
    """Heads; -1 where no subset has it."""

    count: int
    """Subsets of that size that have it."""

    heads: tuple[int, ...]
    """The best of them."""


def smallest_sufficient(mean: Float[np.ndarray, " subset"], threshold: float) -> Smallest:
    """The fewest heads whose patch alone has an effect of at least `threshold`."""
    return _smallest(mean >= threshold, mean)


def smallest_necessary(mean: Float[np.ndarray, " subset"], threshold: float) -> Smallest:
    """The fewest heads without which the effect of all others together is at most `threshold`."""
    without = mean[::-1]  # what is left when a subset is taken away: the complement of its bits
    return _smallest(without <= threshold, -without)


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


def members(n_heads: int) -> Bool[np.ndarray, "subset head"]:
    """Which heads are in each subset."""
    return (np.arange(2**n_heads)[:, None] >> np.arange(n_heads) & 1).astype(bool)


def sizes(n_heads: int) -> Int[np.ndarray, " subset"]:
    """How many heads are in each subset."""
    counts: Int[np.ndarray, " subset"] = members(n_heads).sum(1)
    return counts


def index_of(heads: Sequence[int]) -> int:
    """A subset's index."""
    return sum(1 << head for head in heads)


def _smallest(has_it: Bool[np.ndarray, " subset"], merit: Float[np.ndarray, " subset"]) -> Smallest:
    n = _n_heads(has_it)
    if not has_it.any():
        return Smallest(-1, 0, ())
    size = sizes(n)
    least = int(size[has_it].min())
    chosen = np.flatnonzero(has_it & (size == least))
    best = chosen[merit[chosen].argmax()]
    return Smallest(least, len(chosen), tuple(np.flatnonzero(members(n)[best]).tolist()))


def _spectrum(values: np.ndarray) -> np.ndarray:
    return walsh_hadamard(np.asarray(values, dtype=float))


def _n_heads(values: np.ndarray) -> int:
    n = len(values).bit_length() - 1
    assert len(values) == 2**n, f"{len(values)} values are not those of all subsets"
    return n
