"""Figures of the evidence: even against odd among all halvings of the heads."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from headlapse.engine.report.looks import COLOURS, FAINT, MARKERS, WIDTH
from headlapse.engine.report.result import Result
from headlapse.engine.statistics.splits import half_and_rest, place

DRAWN = 2000
"""More lines than this are pixels even in an SVG, which would take megabytes."""


def draw_splits(result: Result) -> Figure | None:
    """Per layer every halving's difference at the last checkpoint, and even − odd among them; None unless all ran."""
    rows = half_and_rest(result.run["mask"].values)
    labels = list(result.run.subset.values)
    if rows is None or "even" not in labels:
        return None
    halves, rests = rows
    nats = result.nats.isel(checkpoint=-1).transpose("layer", "subset").values
    null = nats[:, halves] - nats[:, rests]
    even = null[:, halves.index(labels.index("even"))]
    layers = [result.site(layer) for layer in result.nats.layer.values.tolist()]
    figure = Figure(figsize=(WIDTH, 1.4 + 0.32 * len(layers)))
    figure.set_layout_engine("constrained", w_pad=0.1)
    axes = figure.subplots()
    looks: dict[str, Any] = {"color": FAINT, "linewidth": 0.6, "alpha": max(0.08, min(0.8, 40 / len(halves)))}
    looks["rasterized"] = null.size > DRAWN
    for row, values in enumerate(null):
        axes.vlines(values, row - 0.32, row + 0.32, label="" if row else f"all {len(halves):,} halvings", **looks)
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
    beside.set_yticks(range(len(layers)), [f"p = {place(float(e), n):.3f}" for e, n in zip(even, null, strict=True)])
    beside.tick_params(length=0, labelsize=7.5)
    beside.spines[:].set_visible(False)
    figure.suptitle(f"Even heads against odd heads, at {result.last}", x=0.01, ha="left", fontsize=9.5, weight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure
