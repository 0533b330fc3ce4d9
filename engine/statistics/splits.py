"""Even heads against odd ones, held against every other way to halve a layer's heads.  Pure."""

import math

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from headlapse.engine.measures import finished
from headlapse.engine.statistics.intervals import LEVEL, interval
from headlapse.engine.subsets import LARGEST_SWEEP


def half_and_rest(mask: Bool[np.ndarray, "subset head"]) -> tuple[list[int], list[int]] | None:
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


def place(value: float, null: Float[np.ndarray, " split"]) -> float:
    """Two-sided p: how often chance gives as much as `value`, which is one of the `null`, either way.

    Twice the smaller tail, the exact test of a labelling among all labellings (Fisher 1935; Good 2005, chapter 3).
    """
    slack = 1e-6 * np.abs(null).max()  # equal sums of float32 in another order are equal
    return float(min(1.0, 2 * min((null >= value - slack).mean(), (null <= value + slack).mean())))


def parity(run: xr.Dataset) -> pd.DataFrame | None:
    """Even minus odd at every checkpoint and layer, among all halvings of the heads; None unless all were run.

    Columns: `strength` (difference of mean logit differences, nats), `low` and `high` (its interval), `p` (its place
    among the halvings) and `p_adjusted` over all rows (Benjamini and Hochberg 1995).
    """
    done = finished(run)
    rows = half_and_rest(done.mask.values)
    if rows is None or "even" not in done.subset.values:
        return None
    from scipy.stats import false_discovery_control

    halves, rests = rows
    even = halves.index(list(done.subset.values).index("even"))
    logit_diff = done.logit_diff.transpose("checkpoint", "layer", "subset", "trial").values
    by_trial = (logit_diff[..., halves[even], :] - logit_diff[..., rests[even], :]).astype(float)
    mean = logit_diff.mean(-1, dtype=float)
    null = mean[..., halves] - mean[..., rests]
    low, high = interval(by_trial)
    p = np.array([[place(layer[even], layer) for layer in checkpoint] for checkpoint in null])
    index = pd.MultiIndex.from_product([done.checkpoint.values, done.layer.values], names=["checkpoint", "layer"])
    columns = {"strength": null[..., even], "low": low, "high": high, "p": p}
    frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=index)
    return frame.assign(p_adjusted=false_discovery_control(frame["p"], method="bh"))


def format_parity(run: xr.Dataset) -> str:
    """Per checkpoint the layer where even and odd differ most for chance, and how to read it."""
    frame = parity(run)
    n_heads = run.sizes["head"]
    n_splits = math.comb(n_heads, n_heads // 2)
    if frame is None:
        words = "balanced" if n_heads % 2 == 0 else f"size:{n_heads // 2} size:{n_heads - n_heads // 2}"
        mend = "too many to run" if n_splits > LARGEST_SWEEP else f"--subsets {words} runs them all"
        return f"even - odd has nothing to be held against: {n_splits:,} halvings of {n_heads} heads exist; {mend}"
    order = pd.DataFrame({"p": frame["p"], "size": -frame["strength"].abs()})
    best = order.sort_values(["p", "size"], kind="stable").groupby("checkpoint", sort=False).head(1).index
    shown = frame.loc[[label for label in frame.index if label in set(best)]].reset_index("layer")
    table = pd.DataFrame(
        {
            "layer": shown["layer"].astype(str),
            "even - odd": [f"{value:+.2f}" for value in shown["strength"]],
            "95 % interval": [
                f"{low:+.2f} .. {high:+.2f}" for low, high in zip(shown["low"], shown["high"], strict=True)
            ],
            "p": [f"{value:.3f}" for value in shown["p"]],
            "p adjusted": [f"{value:.3f}" for value in shown["p_adjusted"]],
        }
    )
    small = int((frame["p_adjusted"] <= 1 - LEVEL).sum())
    return (
        f"{table.to_string()}\n"
        f"even - odd (mean logit difference, nats) at the layer where chance gives it least: p is its place among all "
        f"{n_splits:,} halvings of {n_heads} heads (two-sided, at least {2 / n_splits:.2g}), adjusted over "
        f"{len(frame)} layers and checkpoints (Benjamini-Hochberg); {small} of them are at most {1 - LEVEL:.2f}"
    )
