"""Figures of the evidence: even against odd among the equal splits of the heads; single heads over training."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from ..measures.logit_diff import effect
from ..statistics.means import interval
from ..statistics.permutation import find_equal_splits, permutation_p_value
from .plot_style import COLOURS, FAINT, MARKERS, WIDTH, label_steps, place_steps
from .result import Result, head_name

LINES = 5
"""Heads that have a line over training."""

DRAWN = 2000
"""More lines than this are pixels even in an SVG, which would take megabytes."""


def draw_splits(result: Result) -> Figure | None:
    """Per layer the difference of every equal split at the last checkpoint; None where they were not run."""
    splits = find_equal_splits(result.run)
    if splits is None:
        return None
    nats = result.nats.isel(checkpoint=-1).transpose("layer", "subset").values
    null = nats[:, splits.halves] - nats[:, splits.rests]
    even = null[:, splits.even]
    layers = [result.site(layer) for layer in result.nats.layer.values.tolist()]
    figure = Figure(figsize=(WIDTH, 1.4 + 0.32 * len(layers)))
    figure.set_layout_engine("constrained", w_pad=0.1)
    axes = figure.subplots()
    looks: dict[str, Any] = {"color": FAINT, "linewidth": 0.6, "alpha": max(0.08, min(0.8, 40 / len(splits.halves)))}
    looks["rasterized"] = null.size > DRAWN
    for row, values in enumerate(null):
        label = "" if row else f"{'some' if splits.sampled else 'all'} {len(splits.halves):,} equal splits"
        axes.vlines(values, row - 0.32, row + 0.32, label=label, **looks)
    at: dict[str, Any] = {"color": COLOURS["even"], "marker": MARKERS["even"], "markersize": 5.5, "linestyle": "none"}
    axes.plot(even, np.arange(len(layers)), label="even − odd", zorder=3, **at)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylim(-0.6, len(layers) - 0.4)
    axes.set_ylabel("layer")
    axes.set_xlabel("difference of mean logit differences (nats)")
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(
        range(len(layers)), [f"p = {permutation_p_value(float(e), n):.3f}" for e, n in zip(even, null, strict=True)]
    )
    beside.tick_params(length=0, labelsize=7.5)
    beside.spines[:].set_visible(False)
    figure.suptitle(f"Even heads against odd heads, at {result.last}", x=0.01, ha="left", fontsize=9.5, weight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def heads_alone(result: Result) -> xr.Dataset:
    """The effect of each head patched alone: `value`, `low` and `high` (checkpoint, layer, head) in nats."""
    moved = effect(result.run.isel(subset=list(result.single_heads)), result.settings.direction)
    by_trial = moved.transpose("checkpoint", "layer", "subset", "trial").values.astype(float)
    low, high = interval(by_trial)
    dims = ("checkpoint", "layer", "head")
    variables = {"value": by_trial.mean(-1), "low": low, "high": high}
    coords = {"layer": moved.layer.values, "head": np.arange(by_trial.shape[2])}
    return xr.Dataset({name: (dims, values) for name, values in variables.items()}, coords)


def shares_of_heads(result: Result, shares: pd.DataFrame) -> xr.Dataset:
    """Shapley values as `value`, `low` and `high` (checkpoint, layer, head) in nats."""
    named = {"shapley": "value", "shapley_low": "low", "shapley_high": "high"}
    return shares[list(named)].rename(columns=named).to_xarray().sel(checkpoint=list(result.table.index))


def draw_over_training(result: Result, values: xr.Dataset, quantity: str) -> Figure:
    """The heads with the largest effects of any checkpoint, over training: a line each with its interval.

    `values` holds `value`, `low` and `high` (checkpoint, layer, head) in nats; `quantity` says what they are.
    """
    places = values.value.stack(place=["layer", "head"])
    largest = np.argsort(-np.abs(places.values).max(0), kind="stable")[:LINES]
    x, _ = place_steps(result.positions)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    for order, at in enumerate(largest):
        layer, head = places.place.values[at]
        where = {"layer": layer, "head": head}
        colour = list(COLOURS.values())[order % len(COLOURS)]
        looks: Any = {"color": colour, "marker": list(MARKERS.values())[order % len(MARKERS)], "markersize": 3.5}
        axes.plot(
            x, values.value.sel(where), label=head_name(result.site(int(layer)), int(head)), linewidth=1.1, **looks
        )
        axes.fill_between(x, values.low.sel(where), values.high.sel(where), color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes.set_ylabel(f"{quantity}\n(nats)")
    label_steps(axes, result)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=LINES)
    return figure
