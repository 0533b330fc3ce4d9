"""Even against odd heads: a permutation test over all equal splits of a layer's heads, or a sample of them.  Pure."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from ..measures.logit_diff import PATTERN, finished, success
from ..study.reading import Correction
from ..study.subsets import count_halves, is_symmetric, parse_subsets
from .joint import NEAR, ROUNDING, JointTest, SplitDifferences, joint_test, single_step
from .means import interval
from .multiple_testing import adjust


@dataclass(frozen=True, eq=False)
class EqualSplits:
    """Rows of a run's subsets that are equal splits of the heads, even against odd among them: the permutation null.

    Only those that exchanging heads makes of even against odd (`subsets.is_symmetric`).
    """

    halves: list[int]
    """The larger halves where the number of heads is odd; else both halves of every split."""

    rests: list[int]
    """Their complements."""

    even: int
    """Place of the even heads among the halves."""

    sampled: bool
    """Whether they are a random sample and not all."""

    mask: Bool[np.ndarray, "split head"]
    """Heads of the halves."""

    @property
    def n_splits(self) -> int:
        """Each counted once, even against odd among them."""
        return len({frozenset(pair) for pair in zip(self.halves, self.rests, strict=True)})

    @property
    def swaps(self) -> bool:
        """Whether both halves of a split are there, so that swapping them is a relabelling too."""
        return len(self.halves) == 2 * self.n_splits

    @property
    def least_p(self) -> float:
        """The smallest two-sided p-value that one layer and checkpoint can have."""
        return 2 / len(self.halves)

    def overlap(self, split: int) -> Float[np.ndarray, " split"]:
        """How far each split is `split`: 1 for itself, -1 with its halves swapped, 0 where neither is favoured.

        A pattern in which each head of one half of `split` adds as much, and each of the other half takes as much away,
        shows in every split by this share.
        """
        sides = 2.0 * self.mask - 1
        overlap: Float[np.ndarray, " split"] = sides @ sides[split] / self.mask.shape[1]
        return overlap

    def differences(self, logit_diff: Float[np.ndarray, "checkpoint layer subset trial"]) -> SplitDifferences:
        """Each half minus its complement, a layer and checkpoint at a time: all prompts of all splits take much."""
        n = logit_diff.shape[-1]
        shape = logit_diff.shape[:2]
        nats, noise = np.empty((*shape, len(self.halves))), np.zeros(shape)
        for cell in np.ndindex(*shape):
            values = logit_diff[cell]
            by_prompt = values[self.halves].astype(float) - values[self.rests]
            nats[cell] = by_prompt.mean(-1)
            if n > 1:
                noise[cell] = by_prompt.var(-1, ddof=1).mean() / n
        return SplitDifferences(nats, noise, self.even, self.swaps)


def find_equal_splits(run: xr.Dataset) -> EqualSplits | None:
    """All equal splits where all were run, else the sample that the run's `splits:N` (once `halvings:N`) drew; None
    where neither is there.

    Halves that somebody chose are no sample, and no part of the null.  A sample is drawn once and serves every layer
    and checkpoint; its p are exact over draws of it.
    """
    mask, patch = run.mask.values, run.attrs.get("patch", {})
    n_heads, n_groups = mask.shape[1], int(patch.get("n_groups", 1))
    even_row = (np.arange(n_heads) % 2 == 0).tobytes()
    row_of = {heads.tobytes(): row for row, heads in enumerate(mask)}
    if even_row not in row_of:
        return None
    if (rows := halves_and_complements(mask, n_groups)) is not None:
        return _splits(*rows, row_of[even_row], mask, sampled=False)
    words = [word for word in patch.get("subsets", []) if word == "splits" or word.startswith(("splits:", "halvings:"))]
    if not words:
        return None
    drawn = {row_of[heads.tobytes()] for heads in parse_subsets(words, n_heads, n_groups=n_groups).mask}
    size = n_heads - n_heads // 2
    halves = [row for row in sorted(drawn) if mask[row].sum() == size]
    return _splits(halves, [row_of[(~mask[row]).tobytes()] for row in halves], row_of[even_row], mask, sampled=True)


def _splits(
    halves: list[int], rests: list[int], even: int, mask: Bool[np.ndarray, "subset head"], sampled: bool
) -> EqualSplits:
    return EqualSplits(halves, rests, halves.index(even), sampled, mask[halves])


def halves_and_complements(
    mask: Bool[np.ndarray, "subset head"], n_groups: int = 1
) -> tuple[list[int], list[int]] | None:
    """Rows of every half of the heads (the larger one where their number is odd) and of its complement.

    Of those alone that exchanging heads makes of the even ones; None unless all of them are there.
    """
    n_heads = mask.shape[1]
    row_of = {heads.tobytes(): row for row, heads in enumerate(mask)}
    halves = np.flatnonzero((mask.sum(1) == n_heads - n_heads // 2) & is_symmetric(mask, n_groups))
    if len(halves) < count_halves(n_heads, n_groups):
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
    tails = 1 if splits.swaps else 2
    share = p / tails
    return tails * np.sqrt(share * (1 - share) / splits.n_splits)


def parity(run: xr.Dataset, correction: Correction = "bh") -> pd.DataFrame | None:
    """Even minus odd at every checkpoint and layer, against the equal splits of the heads; None unless they were run.

    Columns: `difference` (of mean logit differences, nats), `low` and `high` (its interval), `p` (permutation
    p-value), `p_error` (its standard error where the splits are a sample), `p_even`, `p_odd`: those of even and of odd
    heads alone among the subsets of their size; `p_adjusted` over all rows by `correction`, and `p_joint`: adjusted by
    one relabelling of all layers and checkpoints (`joint.joint_test`).
    """
    complete = finished(run)
    splits = find_equal_splits(complete)
    if splits is None:
        return None
    logit_diff = complete.logit_diff.transpose("checkpoint", "layer", "subset", "trial").values
    mean = logit_diff.mean(-1, dtype=float)
    row_even, row_odd = splits.halves[splits.even], splits.rests[splits.even]
    low, high = interval((logit_diff[..., row_even, :] - logit_diff[..., row_odd, :]).astype(float))
    differences = splits.differences(logit_diff)
    null = differences.nats
    p = _p_values(null, splits.even)
    columns = {
        "difference": null[..., splits.even],
        "low": low,
        "high": high,
        "p": p,
        "p_error": sampling_error(p, splits),
        "p_even": _p_values(mean[..., splits.halves], splits.even),
        "p_odd": _p_values(mean[..., splits.rests], splits.even),
        "p_joint": single_step(differences),
    }
    index = pd.MultiIndex.from_product(
        [complete.checkpoint.values, complete.layer.values], names=["checkpoint", "layer"]
    )
    frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index)
    frame.insert(7, "p_adjusted", adjust(frame["p"].to_numpy(), correction))
    return frame


def differences_at(run: xr.Dataset, splits: EqualSplits, layer: int, place: int = -1) -> Float[np.ndarray, " split"]:
    """Half minus complement of every split in one layer, at the checkpoint at `place`: mean over prompts, nats."""
    cell = run.logit_diff.isel(checkpoint=[place]).sel(layer=[layer])
    nats: Float[np.ndarray, " split"] = splits.differences(
        cell.transpose("checkpoint", "layer", "subset", "trial").values
    ).nats[0, 0]
    return nats


def permutation_p(run: xr.Dataset, splits: EqualSplits, layer: int) -> float:
    """The permutation p-value of even against odd in one layer at the last checkpoint of a run that is complete."""
    null = differences_at(run, splits, layer)
    return permutation_p_value(float(null[splits.even]), null)


def meeting_the_rule(run: xr.Dataset, layer: int) -> tuple[float, int, int] | None:
    """Even − odd success rate in one layer at the last checkpoint, how many equal splits differ by more than the
    published study's rule asks for (`PATTERN`), whichever half is called even, and how many there are.

    None unless all equal splits were run: a few say little of all.
    """
    splits = find_equal_splits(run)
    if splits is None or splits.sampled:
        return None
    rate = success(run.logit_diff.isel(checkpoint=-1).sel(layer=layer)).transpose("subset", "trial").values.mean(-1)
    differences = rate[splits.halves] - rate[splits.rests]
    return float(differences[splits.even]), int((np.abs(differences) > PATTERN + NEAR).sum()), len(differences)


def joint_parity(run: xr.Dataset) -> JointTest | None:
    """Whether even and odd heads differ anywhere, all layers and checkpoints together; None unless splits were run."""
    complete = finished(run)
    splits = find_equal_splits(complete)
    if splits is None or not complete.sizes["checkpoint"]:
        return None
    logit_diff = complete.logit_diff.transpose("checkpoint", "layer", "subset", "trial").values
    # Each split once, by the half with head 0: halves are swapped layer by layer.
    once = np.flatnonzero(splits.mask[:, 0]) if splits.swaps else np.arange(len(splits.halves))
    return joint_test(splits.differences(logit_diff), once)


def _p_values(null: Float[np.ndarray, "checkpoint layer split"], row: int) -> Float[np.ndarray, "checkpoint layer"]:
    return np.array([[permutation_p_value(layer[row], layer) for layer in checkpoint] for checkpoint in null])
