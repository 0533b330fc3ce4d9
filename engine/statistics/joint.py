"""Even against odd heads in all layers and at all checkpoints together: one relabelling of the heads for all.  Pure.

The null: in each layer it does not matter which heads are called even.  A relabelling takes one of the equal splits
that were run, the same in every layer and at every checkpoint, and decides for each layer by itself which of its halves
is called even.  Statistics of a relabelling are then a matter of indices and signs; no run is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

ROUNDING = 1e-5
"""Nats: differences up to this are float32 replay's rounding, and count as equal."""

NEGLIGIBLE = 0.05
"""Nats: where the splits of a layer differ by less, it counts for less."""

ENUMERATED = 20_000
"""So many relabellings are all tried; of more a random sample is."""

DRAWN = 9_999
"""Random relabellings beside the one at hand, where they are sampled."""

NEAR = 1e-9
"""Statistics closer than this, as a share of the largest, are equal: sums of the same numbers in another order."""

_CHUNK = 2**22
"""Numbers at once."""


@dataclass(frozen=True)
class JointTest:
    """Whether even and odd heads differ anywhere, as p-values that hold for all layers and checkpoints together."""

    p: float
    """Of the smaller of the two below, which has its own distribution over the relabellings (Westfall and Young 1993,
    section 2.3)."""

    p_signed: float
    """Of the largest sum over layers at any checkpoint: finds what goes the same way in many layers."""

    p_unsigned: float
    """Of the largest difference in any layer at any checkpoint, either way: finds what is in one layer."""

    n_labellings: int
    """Relabellings, the one at hand among them."""

    exact: bool
    """Whether these are all, else a random sample of them."""

    @property
    def least(self) -> float:
        """The smallest p that so many can give."""
        return 1 / self.n_labellings


@dataclass(frozen=True, eq=False)
class SplitDifferences:
    """What every equal split of the heads makes, half minus complement, at each layer and checkpoint."""

    nats: Float[np.ndarray, "*cell split"]
    """Mean over prompts."""

    noise: Float[np.ndarray, "*cell"]
    """Sampling variance of such a mean, averaged over the splits; zero for one prompt."""

    even: int
    """Place of even against odd heads among the splits."""

    swaps: bool
    """Whether halves are of equal size.  The halves of a split can then be swapped, and `nats` has both."""

    @property
    def of_even(self) -> Float[np.ndarray, "*cell"]:
        return self.nats[..., self.even]

    def at_layer(self, layer: int) -> "SplitDifferences":
        """Of one layer, by its place; `nats` are (checkpoint, layer, split)."""
        return SplitDifferences(self.nats[:, layer], self.noise[:, layer], self.even, self.swaps)

    def standardised(self) -> Float[np.ndarray, "*cell split"]:
        """In units of what the splits of that layer and checkpoint make.

        Less their mean, divided by the root of their mean square, of the sampling variance and of `NEGLIGIBLE` squared.
        None of these depends on which split is called even, so that a test stays exact, and a layer or checkpoint with
        large effects counts no more than another; one where nothing but noise over prompts, or next to nothing, differs
        counts less.  Not divided by the error over prompts alone, which would praise the layer where prompts agree,
        whatever its heads do.
        """
        centred = self.nats - self.nats.mean(-1, keepdims=True)
        size = np.sqrt((centred**2).mean(-1) + self.noise + NEGLIGIBLE**2)
        standardised: Float[np.ndarray, "*cell split"] = centred / size[..., None]
        return standardised


def single_step(differences: SplitDifferences) -> Float[np.ndarray, "*cell"]:
    """p of every cell, adjusted for all of them at once by the distribution of their largest (max-T: Westfall and Young
    1993, section 2.3; the chance of any false finding is at most what p says)."""
    size = np.abs(differences.standardised())
    largest = np.sort(size.reshape(-1, size.shape[-1]).max(0))
    reached = np.searchsorted(largest, size[..., differences.even] - _slack(largest))
    p: Float[np.ndarray, "*cell"] = (len(largest) - reached) / len(largest)
    return p


def joint_test(differences: SplitDifferences, once: Int[np.ndarray, " split"]) -> JointTest:
    """The joint test of all layers and checkpoints; `once` are the places of the splits, each by one of its halves.

    Exact where all relabellings are tried; of a sample p is (k + 1) / (N + 1), exact as well (Phipson and Smyth 2010).
    Swapping is exact layer by layer because which half of a split is even is as arbitrary as the split, and layers have
    head numbers of their own.  That one split serves all layers keeps the test exact also where splits are a sample.
    """
    values, even = differences.standardised()[..., once], int(np.flatnonzero(once == differences.even)[0])
    n_layers, n_splits = values.shape[1:]
    exact = not differences.swaps or n_splits * 2 ** (n_layers - 1) <= ENUMERATED
    splits, signs = _labellings(n_layers, n_splits, even, differences.swaps, exact)
    unsigned = np.abs(values).max((0, 1))[splits]
    signed = np.concatenate(list(_largest_sums(values, splits, signs)))
    p_signed, p_unsigned = _p_of_each(signed), _p_of_each(unsigned)
    # Ties of the smaller are broken by the larger: few splits give few values of `p_unsigned`.
    both = np.minimum(p_signed, p_unsigned) + np.maximum(p_signed, p_unsigned) / (2 * len(splits))
    p = float((both <= both[0] + NEAR).mean())
    return JointTest(p, float(p_signed[0]), float(p_unsigned[0]), len(splits), exact)


def _labellings(
    n_layers: int, n_splits: int, even: int, swaps: bool, exact: bool
) -> tuple[Int[np.ndarray, " labelling"], Float[np.ndarray, "labelling layer"]]:
    """Split and signs of each relabelling, the one at hand first.  All signs turned over change nothing, so that the
    first layer's stays."""
    if not swaps:
        splits = np.concatenate([[even], np.delete(np.arange(n_splits), even)])
        return splits, np.ones((n_splits, n_layers))
    if exact:
        turned = (np.arange(2 ** (n_layers - 1))[:, None] >> np.arange(n_layers - 1)) & 1
        signs = np.concatenate([np.ones((len(turned), 1)), 1.0 - 2.0 * turned], axis=1)
        order = np.concatenate([[even], np.delete(np.arange(n_splits), even)])
        return np.repeat(order, len(signs)), np.tile(signs, (n_splits, 1))
    draw = np.random.default_rng(0)
    splits = np.concatenate([[even], draw.integers(n_splits, size=DRAWN)])
    signs = np.concatenate([np.ones((1, n_layers)), 2.0 * draw.integers(2, size=(DRAWN, n_layers)) - 1])
    return splits, signs


def _largest_sums(
    values: Float[np.ndarray, "checkpoint layer split"],
    splits: Int[np.ndarray, " labelling"],
    signs: Float[np.ndarray, "labelling layer"],
) -> Iterator[Float[np.ndarray, " labelling"]]:
    """The largest sum over layers at any checkpoint, either way, chunk by chunk."""
    by_split = values.transpose(2, 0, 1)
    size = max(1, _CHUNK // by_split[0].size)
    for first in range(0, len(splits), size):
        chunk = slice(first, first + size)
        yield np.abs(np.einsum("bcl,bl->bc", by_split[splits[chunk]], signs[chunk])).max(1)


def _p_of_each(statistic: Float[np.ndarray, " labelling"]) -> Float[np.ndarray, " labelling"]:
    """For each relabelling the share of them whose statistic is at least as large."""
    ordered = np.sort(statistic)
    p: Float[np.ndarray, " labelling"] = 1 - np.searchsorted(ordered, statistic - _slack(ordered)) / len(ordered)
    return p


def _slack(ordered: Float[np.ndarray, " value"]) -> float:
    """Differences up to this are those of sums in another order, in float32 replay."""
    return 1e-6 * float(np.abs(ordered[-1])) + NEAR
