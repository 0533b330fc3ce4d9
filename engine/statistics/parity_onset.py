"""When even and odd heads start to differ by more than the arbitrary numbering of heads explains.  Pure.

What is dated is the excess of even over odd heads over the other equal splits of the same layer, never the difference
itself: any head that differs from the others makes one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from .bootstrap import LEVEL
from .joint import SplitDifferences, single_step
from .permutation import EqualSplits, permutation_p_value

PLANTED = 64
"""Splits along which a pattern is planted to find the power."""


@dataclass(frozen=True, eq=False)
class ParityOnset:
    """Since when even and odd heads differ beyond the numbering of heads, in one layer."""

    p: float
    """Permutation p-value at the last checkpoint."""

    p_adjusted: Float[np.ndarray, " checkpoint"]
    """At every checkpoint, adjusted for all of them by one relabelling (`joint.single_step`)."""

    absent: Bool[np.ndarray, " checkpoint"]
    """Where a pattern of `size` is excluded at 5 %."""

    size: float
    """Nats between even and odd heads: the difference where it is first significant, else what was asked about."""

    after: int | None
    """The last step up to which a pattern is excluded at every checkpoint; None where it may be there at the first."""

    by: int | None
    """The first significant step; None for never."""

    lasts: bool
    """Whether it is significant at the last checkpoint, and goes the way it went at `by`."""

    power: float
    """Probability that a pattern of the size that was asked about is found at the last checkpoint."""

    least_p: float
    """The smallest p that so many splits can give."""

    neither_carries: bool
    """Whether it is excluded at the last checkpoint, at 5 %, that one of the halves carries the whole effect of the
    layer and the other nothing."""

    @property
    def is_absent(self) -> bool:
        """Whether a pattern of that size is excluded everywhere, and none is significant."""
        return self.by is None and bool(self.absent.all())

    @property
    def interval(self) -> tuple[float, float]:
        """Between which steps it starts: from 0 where it may be there from the first on, infinite where it may never
        come or surely never comes."""
        if self.is_absent:
            return np.inf, np.inf
        return 0 if self.after is None else self.after, np.inf if self.by is None else self.by


def date_parity(
    steps: Int[np.ndarray, " checkpoint"],
    differences: SplitDifferences,
    splits: EqualSplits,
    least_size: float,
    whole: float,
) -> ParityOnset:
    """Date the pattern in one layer from the differences of its equal splits at every checkpoint; `whole` is the effect
    of all its heads at the last one, in nats.

    It is there by the first checkpoint where it is significant, all checkpoints taken together (max-T over checkpoints,
    one relabelling for all: Westfall and Young 1993).  It is not there yet as long as a pattern as large as that first
    significant one is excluded (`excluded`).  In between it may be there.  Where it is never significant, a pattern is
    held to be absent where one of `least_size` nats is excluded either way.
    """
    null, even = differences.nats, splits.even
    adjusted, p = single_step(differences), permutation_p_value(float(null[-1, even]), null[-1])
    significant = np.flatnonzero(adjusted <= 1 - LEVEL)
    first = int(significant[0]) if len(significant) else None
    overlap = splits.overlap(even)
    if first is None:
        size = least_size
        absent = _excluded_either_way(null, even, overlap, size)
    else:
        size = float(null[first, even])
        absent = excluded(null, even, overlap, size)
    neither_carries = bool(_excluded_either_way(null[-1], even, overlap, whole))
    n_before = int(np.argmin(np.append(absent[: len(absent) if first is None else first], False)))
    lasts = first is not None and p <= 1 - LEVEL and bool(null[first, even] * null[-1, even] > 0)
    return ParityOnset(
        p, adjusted, absent, abs(size), int(steps[n_before - 1]) if n_before else None,
        None if first is None else int(steps[first]), lasts, power_of(null[-1], splits, least_size), splits.least_p,
        neither_carries,
    )  # fmt: skip


def excluded(
    null: Float[np.ndarray, "*cell split"], even: int, overlap: Float[np.ndarray, " split"], size: float
) -> Bool[np.ndarray, "*cell"]:
    """Where a pattern of `size` nats, even heads more than odd ones (less, below zero), is excluded at 5 %.

    Were it there, the differences without it would be those of arbitrary numbers; without it even against odd is then
    too far on the other side, which it is by chance in 5 % of cases at most.  The inversion of the permutation test for
    an effect that adds up over heads (Fisher 1935; Good 2005, section 3.2).
    """
    sign = np.sign(size) if size else 1.0
    left = sign * (null - size * overlap)
    slack = 1e-6 * np.abs(null).max(-1) + 1e-9
    p = (left <= (left[..., even] + slack)[..., None]).mean(-1)
    return np.asarray(p <= 1 - LEVEL)


def _excluded_either_way(
    null: Float[np.ndarray, "*cell split"], even: int, overlap: Float[np.ndarray, " split"], size: float
) -> Bool[np.ndarray, "*cell"]:
    return np.asarray(excluded(null, even, overlap, size) & excluded(null, even, overlap, -size))


def power_of(null: Float[np.ndarray, " split"], splits: EqualSplits, size: float) -> float:
    """How likely a pattern of `size` nats would be significant at one checkpoint, on top of what its heads do already.

    Planted along each of the splits in turn, or some of them: the share of those that the permutation test finds.
    """
    if splits.least_p > 1 - LEVEL or not size:
        return 0.0
    every = np.arange(len(splits.halves))
    chosen = every if len(every) <= PLANTED else np.random.default_rng(0).choice(every, PLANTED, replace=False)
    p = [_p_planted(null, splits, int(split), size) for split in chosen]
    return float(np.mean(np.array(p) <= 1 - LEVEL))


def _p_planted(null: Float[np.ndarray, " split"], splits: EqualSplits, split: int, size: float) -> float:
    with_pattern = null + size * splits.overlap(split)
    return permutation_p_value(float(with_pattern[split]), with_pattern)
