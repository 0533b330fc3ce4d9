"""The effect of the layer with the largest one, not inflated by choosing it.  Pure."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from .means import interval

FEWEST = 4
"""Prompts below which they are not halved."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a layer does on prompts that had no part in choosing it."""

    layers: tuple[int, int]
    """Places along the layer axis: chosen by the first half of the prompts, and by the second."""

    nats: Float[np.ndarray, " trial"]
    """Each prompt's effect at the layer that the other half chose."""

    effect: float
    low: float
    high: float

    @property
    def agrees(self) -> bool:
        """Whether both halves choose the same layer.  What is held out is then all of its prompts."""
        return self.layers[0] == self.layers[1]


def held_out(effects: Float[np.ndarray, "layer trial"]) -> HeldOut | None:
    """The layer of the largest mean effect is chosen on one half of the prompts and estimated on the other; the halves
    are swapped, and both estimates are averaged.

    No prompt is measured at a layer that it helped to choose, so that the mean is not biased by the choice (two-fold
    cross-fitting: Stone 1974; Chernozhukov et al. 2018, doi:10.1111/ectj.12097).  It is that of layers chosen by half
    of the prompts, which choose worse than all.  None below four prompts.
    """
    n = effects.shape[1]
    if n < FEWEST:
        return None
    first = halves(n)
    chosen = tuple(int(effects[:, half].mean(1).argmax()) for half in (first, ~first))
    nats = np.where(first, effects[chosen[1]], effects[chosen[0]])
    (low,), (high,) = interval(nats[None])
    return HeldOut((chosen[0], chosen[1]), nats, float(nats.mean()), float(low), float(high))


def halves(n: int) -> Bool[np.ndarray, " trial"]:
    """Which of n prompts are in the first half: drawn once for every number, whatever order a task draws them in."""
    first = np.zeros(n, dtype=bool)
    first[np.random.default_rng(n).permutation(n)[: n // 2]] = True
    return first
