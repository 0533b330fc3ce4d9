"""Transforms over all subsets of a layer's heads.  Shapes: N = 2**H subsets by bits, X anything that is beside them.

Bit h of a subset's index says whether head h is in it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def walsh_hadamard(values_NX: Array) -> Array:
    """For every subset S the sum over all subsets T of (-1)^|S & T| v(T): NX, in N log N steps.

    Fino and Algazi 1976, Unified matrix treatment of the fast Walsh-Hadamard transform.
    """
    return _butterfly(values_NX, lambda without, with_it: (without + with_it, without - with_it))


def subset_sums(values_NX: Array) -> Array:
    """For every subset S the sum over the subsets T of S of v(T): NX (the zeta transform)."""
    return _butterfly(values_NX, lambda without, with_it: (without, without + with_it))


def subset_minima(values_NX: Array) -> Array:
    """For every subset S the smallest v(T) over the subsets T of S: NX; NaN where one of them is."""
    return _butterfly(values_NX, lambda without, with_it: (without, np.minimum(without, with_it)))


def _butterfly(values_NX: Array, step: Callable[[Array, Array], tuple[Array, Array]]) -> Array:
    """Apply `step` to the values without and with each head in turn."""
    n = len(values_NX)
    assert n and n & (n - 1) == 0, f"{n} is no power of two"
    size = 1
    while size < n:
        halves = values_NX.reshape(-1, 2, size, *values_NX.shape[1:])
        values_NX = np.stack(step(halves[:, 0], halves[:, 1]), axis=1).reshape(values_NX.shape)
        size *= 2
    return values_NX
