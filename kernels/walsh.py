"""Transforms over the lattice of head subsets.  Shapes: N = 2**H subsets by bits, X anything that is beside them.

Bit h of a subset's index says whether head h is in it.
"""

import torch
from torch import Tensor


def walsh_hadamard(values_NX: Tensor) -> Tensor:
    """For every subset S the sum over all subsets T of (-1)^|S & T| v(T): NX, in N log N steps.

    Fino and Algazi 1976, Unified matrix treatment of the fast Walsh-Hadamard transform.
    """

    def step(without: Tensor, with_it: Tensor) -> tuple[Tensor, Tensor]:
        return without + with_it, without - with_it

    return _butterfly(values_NX, step)


def subset_sums(values_NX: Tensor) -> Tensor:
    """For every subset S the sum over the subsets T of S of v(T): NX (the zeta transform)."""
    return _butterfly(values_NX, lambda without, with_it: (without, without + with_it))


def subset_minima(values_NX: Tensor) -> Tensor:
    """For every subset S the smallest v(T) over the subsets T of S: NX."""
    return _butterfly(values_NX, lambda without, with_it: (without, torch.minimum(without, with_it)))


def _butterfly(values_NX, step) -> Tensor:
    """Apply `step` to the values without and with each head in turn."""
    n = len(values_NX)
    assert n and n & (n - 1) == 0, f"{n} is no power of two"
    size = 1
    while size < n:
        halves = values_NX.unflatten(0, (-1, 2, size))
        values_NX = torch.stack(step(halves[:, 0], halves[:, 1]), dim=1).flatten(0, 2)
        size *= 2
    return values_NX
