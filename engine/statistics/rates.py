"""Restore and break rates relative to the unpatched run: a prompt that it already answers rightly cannot be restored.

A failing prompt is one that the unpatched target run fails.  Pure.
"""

import functools
import math

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from ..measures.logit_diff import NAMED, finished, recovered, success
from .bootstrap import LEVEL
from .means import interval


@functools.cache
def share(count: int, n: int) -> tuple[float, float, float]:
    """Share, and Wilson's interval (Wilson 1927; Brown, Cai and DasGupta 2001 for few observations); NaN of none."""
    if n == 0:
        return math.nan, math.nan, math.nan
    from scipy.stats import binomtest  # start-up counts

    bounds = binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return count / n, float(bounds.low), float(bounds.high)


def rates(run: xr.Dataset, direction: str) -> pd.DataFrame:
    """Even, odd and all heads (where run) at every checkpoint and layer, against the unpatched target run.

    Columns: `n` (distinct prompts), `failing` (of them the target run fails), `restored` (failing prompts that the
    patched run answers rightly), `broken` (other prompts that it answers wrongly); `restore_rate` of the failing and
    `break_rate` of the others, each with `_low` and `_high`; `recovery`, the mean normalised recovery of the
    logit-difference gap (Wang et al. 2022, arXiv:2211.00593), `_low` and `_high`, over the `n_clear` prompts whose gap
    is clear of zero.
    """
    complete = finished(run)
    named = [name for name in NAMED if name in complete.subset.values]
    patched = complete.logit_diff.sel(subset=named).transpose("checkpoint", "layer", "subset", "trial")
    source, target = complete.clean_logit_diff, complete.corrupt_logit_diff
    if direction == "noise":
        source, target = target, source
    right, was_right = success(patched) == 1, success(target) == 1
    counts = {
        "n": xr.full_like(patched.isel(trial=0, drop=True), complete.sizes["trial"], dtype=int),
        "failing": (~was_right).sum("trial"),
        "restored": (right & ~was_right).sum("trial"),
        "broken": (~right & was_right).sum("trial"),
    }
    columns = {name: values.values.ravel() for name, values in zip(counts, xr.broadcast(*counts.values()), strict=True)}
    for name, count, of in (
        ("restore_rate", "restored", columns["failing"]),
        ("break_rate", "broken", columns["n"] - columns["failing"]),
    ):
        shares = [share(int(k), int(n)) for k, n in zip(columns[count], of, strict=True)]
        columns |= dict(zip(with_interval(name), np.array(shares).reshape(-1, 3).T, strict=True))
    recovery = recovered(patched, source, target).transpose(*patched.dims).values.astype(float)
    columns |= dict(zip(with_interval("recovery"), (x.ravel() for x in _mean_and_interval(recovery)), strict=True))
    columns["n_clear"] = (~np.isnan(recovery)).sum(-1).ravel()
    levels = (complete.checkpoint.values, complete.layer.values, named)
    return pd.DataFrame(columns, index=pd.MultiIndex.from_product(levels, names=["checkpoint", "layer", "subset"]))


def with_interval(name: str) -> tuple[str, str, str]:
    """Columns of an estimate and of its interval."""
    return name, f"{name}_low", f"{name}_high"


def _mean_and_interval(
    values: Float[np.ndarray, "checkpoint layer subset trial"],
) -> tuple[Float[np.ndarray, "checkpoint layer subset"], ...]:
    """Mean over the prompts that are not NaN, and its interval; a checkpoint's cells share those prompts."""
    means = tuple(np.full(values.shape[:-1], np.nan) for _ in range(3))
    clear = ~np.isnan(values).any((1, 2))
    for pattern in np.unique(clear, axis=0):
        if pattern.any():
            alike = (clear == pattern).all(1)
            values_of_clear = values[alike][..., pattern]
            for into, part in zip(means, (values_of_clear.mean(-1), *interval(values_of_clear)), strict=True):
                into[alike] = part
    return means
