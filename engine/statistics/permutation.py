"""Even against odd heads: a permutation test over all equal splits of a layer's heads, or a sample of them.  Pure."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from ..measures.logit_diff import finished
from ..study.subsets import parse_subsets
from .bootstrap import interval
from .multiple_testing import Correction, adjust

ROUNDING = 1e-5
"""Nats: differences up to this are float32 replay's rounding, and count as equal."""


@dataclass(frozen=True)
class EqualSplits:
    """Rows of a run's subsets that are equal splits of the heads, even against odd among them: the permutation null."""

    halves: list[int]
    """The larger halves where the number of heads is odd; else both halves of every split."""

    rests: list[int]
    """Their complements."""

    even: int
    """Place of the even heads among the halves."""

    sampled: bool
    """Whether they are a random sample and not all."""

    @property
    def n_splits(self) -> int:
        """Each counted once, even against odd among them."""
        return len({frozenset(pair) for pair in zip(self.halves, self.rests, strict=True)})


def find_equal_splits(run: xr.Dataset) -> EqualSplits | None:
    """All equal splits where all were run, else the sample that the run's `splits:N` (once `halvings:N`) drew; None
    where neither is there.

    Halves that somebody chose are no sample, and no part of the null.  A sample is drawn once and serves every layer
    and checkpoint; its p are exact over draws of it.
    """
    mask = run.mask.values
    row_of = {heads.tobytes(): row for row, heads in enumerate(mask)}
    n_heads = mask.shape[1]
    even = row_of.get((np.arange(n_heads) % 2 == 0).tobytes())
    if even is None:
        return None
    if (rows := halves_and_complements(mask)) is not None:
        return EqualSplits(*rows, even=rows[0].index(even), sampled=False)
    words = [
        word for word in run.attrs.get("patch", {}).get("subsets", []) if word.startswith(("splits:", "halvings:"))
    ]
    if not words:
        return None
    drawn = {row_of[heads.tobytes()] for heads in parse_subsets(words, n_heads).mask}
    size = n_heads - n_heads // 2
    halves = [row for row in sorted(drawn) if mask[row].sum() == size]
    rests = [row_of[(~mask[row]).tobytes()] for row in halves]
    return EqualSplits(halves, rests, halves.index(even), sampled=True)


def halves_and_complements(mask: Bool[np.ndarray, "subset head"]) -> tuple[list[int], list[int]] | None:
    """Rows of every half of the heads (the larger one where their number is odd) and of its complement.

    None unless all of them are there.
    """
    n_heads = mask.shape[1]
    row_of = {heads.tobytes(): row for row, heads in enumerate(mask)}
    halves = np.flatnonzero(mask.sum(1) == n_heads - n_heads // 2)
    if len(halves) < math.comb(n_heads, n_heads // 2):
        return None
    rests = [row_of.get((~mask[row]).tobytes()) for row in halves]
    present = [row for row in rests if row is not None]
    return (halves.tolist(), present) if len(present) == len(halves) else None


def permutation_p_value(value: float, null: Float[np.ndarray, " split"], slack: float = ROUNDING) -> float:
    """Two-sided p: how often chance gives as much as `value`, which is one of the `null`, either way.

    Twice the smaller tail, the exact test of a labelling among all labellings (Fisher 1935; Good 2005, chapter 3).
    Among `value` and N random others a tail is (k + 1) / (N + 1), where k of those N reach it, which is exact as well
    (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).  What differs by no more than `slack` is equal.
    """
    slack = max(slack, 1e-6 * np.abs(null).max())  # equal sums of float32 in another order are equal
    return float(min(1.0, 2 * min((null >= value - slack).mean(), (null <= value + slack).mean())))


def sampling_error(p: Float[np.ndarray, "*cell"], splits: EqualSplits) -> Float[np.ndarray, "*cell"]:
    """Standard error with which a sampled p stands for the exact one, binomial; zero where all equal splits were run.

    With halves of equal size every split counts towards both tails, so that p itself is a share of the splits;
    otherwise its half is.
    """
    if not splits.sampled:
        return np.zeros_like(p)
    tails = 1 if len(splits.halves) == 2 * splits.n_splits else 2
    share = p / tails
    return tails * np.sqrt(share * (1 - share) / splits.n_splits)


def parity(run: xr.Dataset, correction: Correction = "bh") -> pd.DataFrame | None:
    """Even minus odd at every checkpoint and layer, against the equal splits of the heads; None unless they were run.

    Columns: `difference` (of mean logit differences, nats), `low` and `high` (its interval), `p` (permutation
    p-value), `p_error` (its standard error where the splits are a sample), `p_adjusted` over all rows, and `p_even`,
    `p_odd`: those of even and of odd heads alone among the subsets of their size.
    """
    complete = finished(run)
    splits = find_equal_splits(complete)
    if splits is None:
        return None
    logit_diff = complete.logit_diff.transpose("checkpoint", "layer", "subset", "trial").values
    mean = logit_diff.mean(-1, dtype=float)
    halves, rests, even = mean[..., splits.halves], mean[..., splits.rests], splits.even
    row_even, row_odd = splits.halves[even], splits.rests[even]
    low, high = interval((logit_diff[..., row_even, :] - logit_diff[..., row_odd, :]).astype(float))
    null = halves - rests
    p = _p_values(null, even)
    columns = {
        "difference": null[..., even],
        "low": low,
        "high": high,
        "p": p,
        "p_error": sampling_error(p, splits),
        "p_even": _p_values(halves, even),
        "p_odd": _p_values(rests, even),
    }
    index = pd.MultiIndex.from_product(
        [complete.checkpoint.values, complete.layer.values], names=["checkpoint", "layer"]
    )
    frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index)
    return frame.assign(p_adjusted=adjust(frame["p"].to_numpy(), correction))


def _p_values(null: Float[np.ndarray, "checkpoint layer split"], row: int) -> Float[np.ndarray, "checkpoint layer"]:
    return np.array([[permutation_p_value(layer[row], layer) for layer in checkpoint] for checkpoint in null])
