"""Measures of a run: success, effect, recovery and timeline from raw logit differences.  Pure.

The logit difference (Wang et al. 2022, arXiv:2211.00593) is always kept; `engine.replay.vocabulary_measures` computes
the others.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from .training import placed, positions_of

NAMED = ("even", "odd", "all")
"""Subsets that have columns of their own in the timeline."""

PATTERN = 0.3
"""Even minus odd success rate above which the published study speaks of a pattern."""

CLEAR_OF_ZERO = 0.5
"""Nats between clean and corrupt below which a recovered fraction means nothing and is left out."""


def success(logit_diff: xr.DataArray) -> xr.DataArray:
    """1 where the right answer's logit is above the wrong one's, NaN where nothing was computed."""
    return (logit_diff > 0).where(logit_diff.notnull())


def recovered(patched: xr.DataArray, source: xr.DataArray, target: xr.DataArray) -> xr.DataArray:
    """Share of the gap between target and source run that the patch closes; NaN where the gap is near zero.

    (patched - target) / (source - target), the normalised metric of activation patching
    (Wang et al. 2022, arXiv:2211.00593; Zhang and Nanda 2023, arXiv:2309.16042).
    """
    gap = source - target
    return (patched - target) / gap.where(abs(gap) >= CLEAR_OF_ZERO)


def finished(run: xr.Dataset) -> xr.Dataset:
    """Only the checkpoints whose patched runs are all there, in order of training, with their positions in it."""
    run = placed(run)
    at = positions_of(run)
    ordered = run.isel(checkpoint=np.lexsort((at, at < 0)))
    return ordered.isel(checkpoint=np.flatnonzero(ordered.complete.values))


def each_checkpoint(run: xr.Dataset) -> Iterator[xr.Dataset]:
    """A run's checkpoints in memory one by one: all of them together may not fit."""
    for index in range(run.sizes["checkpoint"]):
        yield run.isel(checkpoint=[index]).load()


def effect(run: xr.Dataset, direction: str) -> xr.DataArray:
    """How far each patched run moved the logit difference towards the source run, in nats."""
    target = run.corrupt_logit_diff if direction == "denoise" else run.clean_logit_diff
    difference = run.logit_diff - target
    return xr.DataArray(difference if direction == "denoise" else -difference)


def effects_by_checkpoint(
    run: xr.Dataset, direction: str, measure: str = "logit_diff"
) -> Iterator[Float[np.ndarray, "layer subset trial"]]:
    """`effect` of one checkpoint after another as plain arrays of float64: all of them together may not fit.

    Of another `measure` that the run kept, the same: towards the source run, in that measure's unit.
    """
    target = run[f"{'corrupt' if direction == 'denoise' else 'clean'}_{measure}"]
    patched = run[measure].transpose("checkpoint", "layer", "subset", "trial").variable
    unpatched = target.transpose("checkpoint", "trial").variable
    for index in range(run.sizes["checkpoint"]):
        difference = patched[index].values - unpatched[index].values
        yield (difference if direction == "denoise" else -difference).astype(float)


def best_layer(run: xr.Dataset, direction: str) -> xr.DataArray:
    """Per checkpoint the layer with the largest effect when all its heads are patched, averaged over trials;
    where `all` was not run, of the subset with the largest effect.
    """
    effects = effect(run, direction).mean("trial")
    judged = effects.sel(subset="all", drop=True) if "all" in run.subset.values else effects.max("subset")
    return judged.idxmax("layer")


def timeline(run: xr.Dataset, direction: str) -> pd.DataFrame:
    """One row a checkpoint: unpatched runs, and even, odd and all heads of the checkpoint's best layer.

    Columns: step, `clean`, `corrupt` and, where run, `even`, `odd`, `all` (mean logit difference, nats), each with its
    `_rate` (success rate), `even_minus_odd_rate`, `best_layer`.
    """
    complete = finished(run)
    columns: dict[str, Float[np.ndarray, " checkpoint"]] = {"step": complete.step.values}
    layer = best_layer(complete, direction)
    at_best = complete.logit_diff.sel(layer=layer)
    named = [name for name in NAMED if name in complete.subset.values]
    series = {"clean": complete.clean_logit_diff, "corrupt": complete.corrupt_logit_diff}
    series |= {name: at_best.sel(subset=name) for name in named}
    for name, values in series.items():
        columns[name] = values.mean("trial").values
        columns[f"{name}_rate"] = success(values).mean("trial").values
    if {"even", "odd"} <= set(named):
        columns["even_minus_odd_rate"] = columns["even_rate"] - columns["odd_rate"]
    columns["best_layer"] = layer.values.astype(int)
    return pd.DataFrame(columns, index=pd.Index(complete.checkpoint.values, name="checkpoint"))


def strongest(run: xr.Dataset, direction: str) -> pd.DataFrame:
    """One row a checkpoint: the subset with the largest effect in its best layer: name, mean (nats), success rate."""
    complete = finished(run)
    layer = best_layer(complete, direction)
    best = effect(complete, direction).sel(layer=layer).mean("trial").argmax("subset")
    values = complete.logit_diff.sel(layer=layer).isel(subset=best)
    columns = {"subset": complete.subset.values[best.values], "mean": values.mean("trial").values}
    return pd.DataFrame(columns | {"rate": success(values).mean("trial").values}, index=complete.checkpoint.values)
