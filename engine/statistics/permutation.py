"""Even heads against odd ones, held against every other way to halve a layer's heads, or a sample of them.  Pure."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from ..measures.logit_diff import finished
from ..report.findings.finding import Finding
from ..study.subsets import LARGEST_SWEEP, parse_subsets
from .bootstrap import LEVEL, interval
from .multiple_testing import NAMES, Correction, adjust

ROUNDING = 1e-5
"""Nats: differences up to this are float32 replay's rounding, and count as equal."""

MANY = 2000
"""EqualSplits beyond which a sample of them is offered."""

TITLE = "Even against odd heads, among all ways to halve them"


@dataclass(frozen=True)
class EqualSplits:
    """Rows of a run's subsets that halve the heads: what even and odd are held against, and they themselves."""

    halves: list[int]
    """The larger halves where the heads are odd in number; else both halves of every halving."""

    rests: list[int]
    """What each of them leaves."""

    even: int
    """Place of the even heads among the halves."""

    sampled: bool
    """Whether they are a random sample and not all."""

    @property
    def n_splits(self) -> int:
        """Each counted once, even against odd among them."""
        return len({frozenset(pair) for pair in zip(self.halves, self.rests, strict=True)})


def find_equal_splits(run: xr.Dataset) -> EqualSplits | None:
    """All halvings where all were run, else the sample that the run's `halvings:N` drew; None where neither is there.

    Halves that somebody chose are no sample: they are not held against.  A sample is drawn once and serves every layer
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
    words = [word for word in run.attrs.get("patch", {}).get("subsets", []) if word.startswith("halvings:")]
    if not words:
        return None
    drawn = {row_of[heads.tobytes()] for heads in parse_subsets(words, n_heads).mask}
    size = n_heads - n_heads // 2
    halves = [row for row in sorted(drawn) if mask[row].sum() == size]
    rests = [row_of[(~mask[row]).tobytes()] for row in halves]
    return EqualSplits(halves, rests, halves.index(even), sampled=True)


def halves_and_complements(mask: Bool[np.ndarray, "subset head"]) -> tuple[list[int], list[int]] | None:
    """Rows of every half of the heads (the larger one where their number is odd) and of what it leaves.

    None unless all of them are there.
    """
    n_heads = mask.shape[1]
    row_of = {heads.tobytes(): row for row, heads in enumerate(mask)}
    halves = np.flatnonzero(mask.sum(1) == n_heads - n_heads // 2)
    if len(halves) < math.comb(n_heads, n_heads // 2):
        return None
    rests = [row_of.get((~mask[row]).tobytes()) for row in halves]
    found = [row for row in rests if row is not None]
    return (halves.tolist(), found) if len(found) == len(halves) else None


def permutation_p_value(value: float, null: Float[np.ndarray, " split"], slack: float = ROUNDING) -> float:
    """Two-sided p: how often chance gives as much as `value`, which is one of the `null`, either way.

    Twice the smaller tail, the exact test of a labelling among all labellings (Fisher 1935; Good 2005, chapter 3).
    Among `value` and N random others a tail is (k + 1) / (N + 1), where k of those N reach it, which is exact as well
    (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).  What differs by no more than `slack` is equal.
    """
    slack = max(slack, 1e-6 * np.abs(null).max())  # equal sums of float32 in another order are equal
    return float(min(1.0, 2 * min((null >= value - slack).mean(), (null <= value + slack).mean())))


def sampling_error(p: Float[np.ndarray, "*cell"], halvings: EqualSplits) -> Float[np.ndarray, "*cell"]:
    """Standard error with which a sampled p stands for the exact one, binomial; zero where all halvings were run.

    With halves of equal size every halving counts towards both tails, so that p itself is a share of the halvings;
    otherwise its half is.
    """
    if not halvings.sampled:
        return np.zeros_like(p)
    tails = 1 if len(halvings.halves) == 2 * halvings.n_splits else 2
    share = p / tails
    return tails * np.sqrt(share * (1 - share) / halvings.n_splits)


def parity(run: xr.Dataset, correction: Correction = "bh") -> pd.DataFrame | None:
    """Even minus odd at every checkpoint and layer, among the halvings of the heads; None unless they were run.

    Columns: `strength` (difference of mean logit differences, nats), `low` and `high` (its interval), `p` (its place
    among the halvings), `p_error` (its standard error where they are a sample), `p_adjusted` over all rows, and
    `p_even`, `p_odd`: the places of even and of odd heads alone among the subsets of their size.
    """
    done = finished(run)
    halvings = find_equal_splits(done)
    if halvings is None:
        return None
    logit_diff = done.logit_diff.transpose("checkpoint", "layer", "subset", "trial").values
    mean = logit_diff.mean(-1, dtype=float)
    halves, rests, even = mean[..., halvings.halves], mean[..., halvings.rests], halvings.even
    row_even, row_odd = halvings.halves[even], halvings.rests[even]
    low, high = interval((logit_diff[..., row_even, :] - logit_diff[..., row_odd, :]).astype(float))
    null = halves - rests
    p = _places(null, even)
    columns = {
        "strength": null[..., even],
        "low": low,
        "high": high,
        "p": p,
        "p_error": sampling_error(p, halvings),
        "p_even": _places(halves, even),
        "p_odd": _places(rests, even),
    }
    index = pd.MultiIndex.from_product([done.checkpoint.values, done.layer.values], names=["checkpoint", "layer"])
    frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index)
    return frame.assign(p_adjusted=adjust(frame["p"].to_numpy(), correction))


def _places(null: Float[np.ndarray, "checkpoint layer split"], at: int) -> Float[np.ndarray, "checkpoint layer"]:
    return np.array([[permutation_p_value(layer[at], layer) for layer in checkpoint] for checkpoint in null])


def parity_finding(run: xr.Dataset, correction: Correction = "bh") -> Finding:
    """Per checkpoint the layer where even and odd differ most for chance, and how to read it."""
    frame = parity(run, correction)
    halvings = find_equal_splits(run)
    if frame is None or halvings is None:
        return Finding(TITLE, None, (_nothing_to_hold_against(run.sizes["head"]),))
    order = pd.DataFrame({"p": frame["p"], "size": -frame["strength"].abs()})
    best = order.sort_values(["p", "size"], kind="stable").groupby("checkpoint", sort=False).head(1).index
    shown = frame.loc[[label for label in frame.index if label in set(best)]].reset_index("layer")
    error = [f" ± {value:.3f}" if halvings.sampled else "" for value in shown["p_error"]]
    table = pd.DataFrame(
        {
            "layer": shown["layer"].astype(str),
            "even - odd": [f"{value:+.2f}" for value in shown["strength"]],
            "95 % interval": [
                "-" if math.isnan(low) else f"{low:+.2f} .. {high:+.2f}"  # one prompt has no interval
                for low, high in zip(shown["low"], shown["high"], strict=True)
            ],
            "p": [f"{value:.3f}{wide}" for value, wide in zip(shown["p"], error, strict=True)],
            "p adjusted": [f"{value:.3f}" for value in shown["p_adjusted"]],
            "p even": [f"{value:.3f}" for value in shown["p_even"]],
            "p odd": [f"{value:.3f}" for value in shown["p_odd"]],
        }
    )
    small = int((frame["p_adjusted"] <= 1 - LEVEL).sum())
    how_to_read = (
        f"even - odd (mean logit difference, nats) at the layer where chance gives it least: p is its place among "
        f"{_told(halvings, run.sizes['head'])}, adjusted over {len(frame)} layers and checkpoints "
        f"({NAMES[correction]}); {small} of them are at most {1 - LEVEL:.2f}; p even and p odd are the places of "
        f"either alone among the subsets of its size, not adjusted"
    )
    last = frame.loc[frame.index[-1][0]]
    by_layer = ", ".join(f"{layer}: {p:.3f}" for layer, p in last["p"].items())
    return Finding(TITLE, table, (how_to_read, f"layers at {frame.index[-1][0]} (p): {by_layer}"), "parity", frame)


def _told(halvings: EqualSplits, n_heads: int) -> str:
    """What p is a place among."""
    n, least = len(halvings.halves), 2 / len(halvings.halves)
    if not halvings.sampled:
        return f"all {n:,} halvings of {n_heads} heads (two-sided, at least {least:.2g})"
    others = halvings.n_splits - 1
    return (
        f"{others:,} random ones, each with what it leaves, of the {math.comb(n_heads, n_heads // 2):,} halvings of "
        f"{n_heads} heads (two-sided, (k + 1) / (N + 1), at least {least:.2g}, ± its standard error as a sample)"
    )


def _nothing_to_hold_against(n_heads: int) -> str:
    """What was not run, and what runs it."""
    n_splits = math.comb(n_heads, n_heads // 2)
    words = "balanced" if n_heads % 2 == 0 else f"size:{n_heads // 2} size:{n_heads - n_heads // 2}"
    all_of_them, sample = f"--subsets {words} runs them all", "--subsets halvings:1000 samples a thousand"
    mend = sample if n_splits > LARGEST_SWEEP else f"{all_of_them}, {sample}" if n_splits > MANY else all_of_them
    return f"even - odd has nothing to be held against: {n_splits:,} halvings of {n_heads} heads exist; {mend}"
