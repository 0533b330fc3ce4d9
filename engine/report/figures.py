"""The report's figures: a timeline, a map of layers over checkpoints, a map of layers over heads."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..measures.logit_diff import NAMED
from ..study.study import RUNS
from .colours import SCALES, words_on
from .head_figures import draw_over_training, draw_splits, heads_alone, shares_of_heads
from .plot_style import (
    COLOURS,
    FAINT,
    MARKERS,
    SPARE,
    STYLE,
    WIDTH,
    choose_ticks,
    label_steps,
    lay_out,
    place_steps,
    step_labels,
)
from .result import Result, heads_of, signed

SHOWS = {
    "timeline": "Mean logit difference and success rate of unpatched and patched runs at every checkpoint",
    "heatmap": "Change of the mean logit difference, and success rate, by layer and checkpoint",
    "heads": "Change of the mean logit difference, and success rate, by layer and head, at the last checkpoint",
    "training": "Effects of single heads over training",
    "splits": "Difference between the halves of every equal split of the heads, by layer",
    "shapley": "Shapley values of single heads over training",
    "multiples": "Effects of heads over training, a panel for every training run",
}
"""What each figure shows, for those who do not see it."""

CELLS = 4000
"""A map of more cells is an image, in the light scheme only: as shapes it would take megabytes."""


def draw(result: Result, shares: pd.DataFrame | None = None) -> dict[str, Figure]:
    """The figures by file stem; `heads`, `training`, `splits` and `shapley` only where what they show was run.

    `shares`: Shapley values with their intervals, by checkpoint, layer and head.
    """
    with matplotlib.rc_context(STYLE):
        figures = {"timeline": _draw_timeline(result), "heatmap": _draw_heatmap(result)}
        if result.single_heads:
            figures["heads"] = _draw_heads(result)
            figures["training"] = draw_over_training(result, heads_alone(result), "effect of the head alone")
        if splits := draw_splits(result):
            figures["splits"] = splits
        if shares is not None:
            figures["shapley"] = draw_over_training(result, shares_of_heads(result, shares), "Shapley value")
        for figure in figures.values():
            lay_out(figure)
    return figures


def _draw_timeline(result: Result) -> Figure:
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = result.positions
    x, _ = place_steps(steps)
    known = steps >= 0
    for column, label, style in _lines(result):
        for axes, name in ((upper, column), (lower, f"{column}_rate")):
            y = result.table[name].to_numpy()
            axes.plot(x[known], y[known], label=label, **style)
            axes.plot(x[~known], y[~known], **{**style, "linestyle": "none"})
    upper.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    upper.set_ylabel("mean logit difference\nright − wrong (nats)")
    lower.set_ylabel("success rate\n(share of prompts)")
    lower.set_ylim(-0.05, 1.05)
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (upper, lower):
        axes.grid(axis="y", color=FAINT, linewidth=0.3, alpha=0.5)
        if known.any() and not known.all():
            axes.axvline((x[known].max() + x[~known].min()) / 2, color=FAINT, linewidth=0.8, linestyle=":")
    ticks = label_steps(lower, result)
    if len(result.nats.layer) > 1:
        _label_layers(upper, result, x, ticks)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _lines(result: Result) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Column, label and looks of every line: unpatched runs dashed, patched runs solid."""
    few = len(result.table) <= 40
    sizes = {"linewidth": 1.1 if few else 0.8, "markersize": 4.5 if few else 2.0}
    for run in RUNS:
        looks = {"color": COLOURS[run], "marker": MARKERS[run], "linestyle": (0, (4, 2))}
        yield run, f"{run}, unpatched", looks | sizes
    for subset, spare in zip(result.shown, SPARE, strict=False):
        like = subset if subset in NAMED else spare
        looks = {"color": COLOURS[like], "marker": MARKERS[like], "linestyle": "-"}
        yield subset, f"{heads_of(subset)} patched", looks | sizes


def _label_layers(axes: Axes, result: Result, x: Float[np.ndarray, " checkpoint"], ticks: Sequence[int]) -> None:
    """Above the panel, small, the layer that the patched lines stand for."""
    above = axes.secondary_xaxis("top")
    above.set_xticks(x[ticks], [str(result.table["best_layer"].iloc[tick]) for tick in ticks])
    above.tick_params(length=0, labelsize=7.5, pad=1)
    above.set_xlabel("best layer", fontsize=7.5)
    above.spines[:].set_visible(False)


def _draw_heatmap(result: Result) -> Figure:
    at = {"subset": result.nats.subset.values.tolist().index(result.mapped)}
    title = f"{heads_of(result.mapped)} patched, {result.where}"
    return _draw_maps(
        result, at, title, "checkpoint" if result.points.labels else "checkpoint (training step)", step_labels(result)
    )


def _draw_heads(result: Result) -> Figure:
    single = list(result.single_heads)
    at = {"checkpoint": -1, "subset": single}
    title = f"each head patched alone, {result.where}, at {result.last}"
    return _draw_maps(result, at, title, "head", [str(head) for head in range(len(single))])


def _draw_maps(result: Result, at: dict[str, Any], title: str, across: str, columns: Sequence[str]) -> Figure:
    """Two maps of what is `at` those places: change of the logit difference, centred at zero, and success rate."""
    change, rate = (values.isel(at).transpose("layer", ...).values for values in (result.change, result.rate))
    layers = [result.site(layer) for layer in result.nats.layer.values.tolist()]
    n_layers, n_columns = change.shape
    width = min(WIDTH, max(4.6, 3.2 + 0.5 * n_columns))
    height = min(4.2, 0.45 + 0.3 * n_layers)
    figure = Figure(figsize=(width, 2 * height + 1.7))
    figure.set_layout_engine("constrained", hspace=0.08)
    figure.suptitle(title[0].upper() + title[1:], x=0.01, ha="left", fontsize=9.5, weight="bold")
    upper, lower = figure.subplots(2, 1, sharex=True)
    # A map of nothing but zeros still needs a scale.
    limit = float(abs(change).max()) or 1.0
    _draw_map(figure, upper, change, ("effect", -limit, limit), "nats", lambda nats: signed(nats, 1))
    _draw_map(figure, lower, 100 * rate, ("rate", 0.0, 100.0), "% of prompts", "{:.0f}".format)
    upper.set_title("change of mean logit difference")
    lower.set_title("success rate")
    ticks = choose_ticks(np.arange(n_columns, dtype=float), columns, width - 1.8, range(n_columns))
    lower.set_xticks(ticks, [columns[tick] for tick in ticks])
    lower.set_xlabel(across)
    for axes in (upper, lower):
        every = max(1, -(-n_layers // 16))
        axes.set_yticks(range(0, n_layers, every), layers[::every])
        axes.set_ylabel("layer")
    return figure


def _draw_map(
    figure: Figure,
    axes: Axes,
    values: Float[np.ndarray, "layer column"],
    colours: tuple[str, float, float],
    unit: str,
    write: Callable[[float], str],
) -> None:
    """One map in `colours` (scale, lowest, highest), with its numbers written into the cells where there is room.

    Each cell is a shape of its own rather than a pixel of an image, so that a page can colour it in either scheme.
    """
    scale, lowest, highest = colours
    looks: Any = {"cmap": SCALES[scale].colormap(), "vmin": lowest, "vmax": highest, "rasterized": values.size > CELLS}
    n_layers, n_columns = values.shape
    mesh = axes.pcolormesh(np.arange(n_columns + 1) - 0.5, np.arange(n_layers + 1) - 0.5, values, **looks)
    bar = figure.colorbar(mesh, ax=axes, label=unit, pad=0.015, aspect=12)
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if n_columns <= 16 and n_layers <= 16:
        for (layer, column), value in np.ndenumerate(values):
            colour = words_on(scale, SCALES[scale].level((float(value) - lowest) / (highest - lowest)))
            axes.text(column, layer, write(float(value)), ha="center", va="center", color=colour, fontsize=7)
