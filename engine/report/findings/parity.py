"""Even against odd heads, as a table: the difference, its interval and its permutation p-value."""

import math

import pandas as pd
import xarray as xr

from ...statistics.bootstrap import LEVEL
from ...statistics.multiple_testing import NAMES
from ...statistics.permutation import EqualSplits, find_equal_splits, joint_parity, parity
from ...study.reading import Correction
from ...study.subsets import LARGEST_SWEEP
from .finding import Finding

MANY = 2000
"""Equal splits beyond which a sample of them is offered."""

TITLE = "Even against odd heads, among the equal splits of the heads"


def parity_finding(run: xr.Dataset, correction: Correction = "bh") -> Finding:
    """Per checkpoint the layer with the smallest p-value, and how to read it."""
    frame, splits = parity(run, correction), find_equal_splits(run)
    if frame is None or splits is None:
        n_groups = int(run.attrs.get("patch", {}).get("n_groups", 1))
        return Finding(TITLE, None, (_no_null(run.sizes["head"], n_groups),), "parity")
    order = pd.DataFrame({"p": frame["p"], "size": -frame["difference"].abs()})
    best = order.sort_values(["p", "size"], kind="stable").groupby("checkpoint", sort=False).head(1).index
    shown = frame.loc[[label for label in frame.index if label in set(best)]].reset_index("layer")
    error = [f" ± {value:.3f}" if splits.sampled else "" for value in shown["p_error"]]
    table = pd.DataFrame(
        {
            "layer": shown["layer"].astype(str),
            "even - odd": [f"{value:+.2f}" for value in shown["difference"]],
            "95 % interval": [
                "-" if math.isnan(low) else f"{low:+.2f} .. {high:+.2f}"  # one prompt has no interval
                for low, high in zip(shown["low"], shown["high"], strict=True)
            ],
            "p": [f"{value:.3f}{wide}" for value, wide in zip(shown["p"], error, strict=True)],
            "p adjusted": [f"{value:.3f}" for value in shown["p_adjusted"]],
            "p joint": [f"{value:.3f}" for value in shown["p_joint"]],
            "p even": [f"{value:.3f}" for value in shown["p_even"]],
            "p odd": [f"{value:.3f}" for value in shown["p_odd"]],
        }
    )
    small = int((frame["p_adjusted"] <= 1 - LEVEL).sum())
    how_to_read = (
        f"even - odd (mean logit difference, nats) at the layer with the smallest p-value (permutation test over "
        f"{describe_null(splits, run.sizes['head'])}), adjusted over {len(frame)} layers and checkpoints "
        f"({NAMES[correction]}); {small} of them are at most {1 - LEVEL:.2f}; p joint by one relabelling of them all "
        "(max-T); p even and p odd are the p-values of either alone among the subsets of its size, not adjusted"
    )
    last = frame.loc[frame.index[-1][0]]
    by_layer = ", ".join(f"{layer}: {p:.3f}" for layer, p in last["p"].items())
    notes = (how_to_read, f"layers at {frame.index[-1][0]} (p): {by_layer}", *_joint_note(run))
    return Finding(TITLE, table, notes, "parity", frame)


def _joint_note(run: xr.Dataset) -> list[str]:
    test = joint_parity(run)
    if test is None:
        return []
    labellings = f"{'all' if test.exact else 'random'} {test.n_labellings:,} relabellings"
    return [
        f"all layers and checkpoints together: p = {test.p:.3g} ({labellings}: one split for all, halves swapped layer "
        f"by layer); summed over layers p = {test.p_signed:.3g}, in any one layer p = {test.p_unsigned:.3g}"
    ]


def describe_null(splits: EqualSplits, n_heads: int) -> str:
    """The splits that p is taken over."""
    n, least = len(splits.halves), splits.least_p
    if not splits.sampled:
        some = "" if n == math.comb(n_heads, n_heads // 2) else " that exchanging heads of key/value groups gives"
        return f"all {n:,} equal splits of {n_heads} heads{some} (two-sided, at least {least:.2g})"
    others = splits.n_splits - 1
    return (
        f"{others:,} random ones, each with its complement, of the {math.comb(n_heads, n_heads // 2):,} equal splits "
        f"of {n_heads} heads (two-sided, (k + 1) / (N + 1), at least {least:.2g}, ± its standard error as a sample)"
    )


def how_to_test(n_heads: int, n_groups: int = 1) -> list[str]:
    """Words of `--subsets` that run a permutation null: all equal splits, a sample, or both, as is sensible."""
    n_splits = math.comb(n_heads, n_heads // 2)
    every = "balanced" if n_heads % 2 == 0 else f"size:{n_heads // 2} size:{n_heads - n_heads // 2}"
    if n_splits > LARGEST_SWEEP:
        return ["splits:1000"]
    if n_splits > MANY:
        return [every, "splits:1000"] if n_groups == 1 else ["splits:1000", every]
    return [every]


def _no_null(n_heads: int, n_groups: int) -> str:
    """What was not run, and what runs it."""
    n_splits = math.comb(n_heads, n_heads // 2)
    does = {True: "samples a thousand", False: "runs them all"}
    words = how_to_test(n_heads, n_groups)
    runs = ", ".join(f"--subsets {word} {does['splits' in word]}" for word in words)
    return f"even - odd was not tested: {n_splits:,} equal splits of {n_heads} heads exist; {runs}"
