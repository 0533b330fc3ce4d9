"""The report's figures: a timeline, a map of layers over checkpoints, a map of layers over heads."""

from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headlapse.engine.measures import NAMED
from headlapse.engine.report.result import Result, heads_of, signed
from headlapse.engine.study import RUNS

INK, PAPER, FAINT = "#22262b", "#fefefe", "#8d949c"
"""Lines and words of a figure, its background, its grid.  On the page ink and paper become the page's own."""

COLOURS = {"clean": "#265cfc", "corrupt": "#fc6626", "even": "#9674d4", "odd": "#6e613c", "all": "#359696"}
MARKERS = {"clean": "^", "corrupt": "v", "even": "s", "odd": "D", "all": "o"}
SPARE = ("all", "even", "odd")
"""Whose looks other subsets take, strongest first.  The colours stay at least 30 apart (CIELAB) under simulated
protanopia and deuteranopia (Machado et al. 2009) and stand out from a light and a dark page."""

STYLE: Any = {
    "axes.titlelocation": "left",
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    **dict.fromkeys(["font.size", "axes.titlesize"], 9),
    **dict.fromkeys(["axes.linewidth", "xtick.major.width", "ytick.major.width"], 0.6),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
    # The same run gives the same file: no random ids, no date.
    "svg.hashsalt": "headlapse",
}

WIDTH, CHARACTER = 7.6, 0.075
"""Inches: a full figure, and about one digit of a tick label."""


def draw(result: Result) -> dict[str, Figure]:
    """The figures by file stem; `heads` only where every single head was patched."""
    with matplotlib.rc_context(STYLE):
        figures = {"timeline": _draw_timeline(result), "heatmap": _draw_heatmap(result)}
        if single := _single_heads(result):
            figures["heads"] = _draw_heads(result, single)
        for figure in figures.values():  # laid out once, not for every format again
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
    return figures


def to_svg(figure: Figure) -> str:
    text = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    return text.getvalue()


def _draw_timeline(result: Result) -> Figure:
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = result.table["step"].to_numpy()
    x, is_log = place_steps(steps)
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
    lower.set_xlabel(f"training step{' (logarithmic)' if is_log else ''}")
    _label_steps(upper, lower, result, x)
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


def _label_steps(upper: Axes, lower: Axes, result: Result, x: Float[np.ndarray, " checkpoint"]) -> None:
    """Steps below the panels, the roundest first; above them, small, the layer that the patched lines stand for."""
    labels, steps = _step_labels(result), result.table["step"].astype(str)
    zeros = [len(step) - len(step.rstrip("0")) for step in steps]
    roundest = sorted(range(len(zeros)), key=lambda index: -zeros[index])
    ticks = choose_ticks(x, labels, WIDTH - 1.1, roundest)
    lower.set_xticks(x[ticks], [labels[tick] for tick in ticks])
    if len(result.nats.layer) == 1:
        return
    above = upper.secondary_xaxis("top")
    above.set_xticks(x[ticks], [str(result.table["best_layer"].iloc[tick]) for tick in ticks])
    above.tick_params(length=0, labelsize=7.5, pad=1)
    above.set_xlabel("best layer", fontsize=7.5)
    above.spines[:].set_visible(False)


def place_steps(steps: Int[np.ndarray, " checkpoint"]) -> tuple[Float[np.ndarray, " checkpoint"], bool]:
    """Where checkpoints stand on the x axis, and whether that is logarithmic.

    Logarithmic once steps span a factor of ten; step 0 and unknown steps (-1) then stand apart at the ends.
    """
    x = steps.astype(float)
    positive = steps[steps > 0]
    is_log = len(positive) > 0 and bool(positive.max() >= 10 * positive.min())
    if is_log:
        x[steps > 0] = np.log10(positive)
        x[steps == 0] = x[steps > 0].min() - max(0.3, np.ptp(x[steps > 0]) / 16)
    known = x[steps >= 0]
    last, gap = (known.max(), np.ptp(known) / 12 or 1.0) if len(known) else (0.0, 1.0)
    x[steps < 0] = last + gap * np.arange(1, 1 + (steps < 0).sum())
    return x, is_log


def choose_ticks(
    x: Float[np.ndarray, " checkpoint"], labels: Sequence[str], inches: float, order: Sequence[int]
) -> list[int]:
    """Checkpoints whose labels fit side by side on an axis of that width: the ends first, then in the order given."""
    scale = inches / (np.ptp(x) or 1.0)
    widths = [len(label) * CHARACTER + 0.1 for label in labels]
    chosen: list[int] = []
    for index in dict.fromkeys([0, len(x) - 1, *order]):
        if all(abs(x[index] - x[other]) * scale > (widths[index] + widths[other]) / 2 for other in chosen):
            chosen.append(index)
    return sorted(chosen)


def _step_labels(result: Result) -> list[str]:
    """Steps as short as they can be written; an unknown step's place goes by its label."""
    labels = []
    for label, step in result.table["step"].items():
        short = str(label) if len(str(label)) <= 12 else f"{str(label)[:11]}…"
        labels.append(short if step < 0 else str(step) if step < 10_000 else f"{step / 1000:g}k")
    return labels


def _draw_heatmap(result: Result) -> Figure:
    at = {"subset": result.nats.subset.values.tolist().index(result.mapped)}
    title = f"{heads_of(result.mapped)} patched, {result.where}"
    return _draw_maps(result, at, title, "checkpoint (training step)", _step_labels(result))


def _single_heads(result: Result) -> list[int]:
    """Where the subset axis has every single head, in order of heads; empty unless all are there."""
    mask = result.run["mask"].values
    single = {int(mask[row].argmax()): int(row) for row in np.flatnonzero(mask.sum(1) == 1)}
    n_heads = mask.shape[1]
    return [single[head] for head in range(n_heads)] if len(single) == n_heads else []


def _draw_heads(result: Result, single: list[int]) -> Figure:
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
    _draw_map(figure, upper, change, ("RdBu", -limit, limit), "nats", lambda nats: signed(nats, 1))
    _draw_map(figure, lower, 100 * rate, ("Greens", 0.0, 100.0), "% of prompts", "{:.0f}".format)
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
    """One map in `colours` (name, lowest, highest), with its numbers written into the cells where there is room."""
    name, lowest, highest = colours
    looks: Any = {"aspect": "auto", "origin": "lower", "interpolation": "none"}
    image = axes.imshow(values, cmap=name, vmin=lowest, vmax=highest, **looks)
    figure.colorbar(image, ax=axes, label=unit, pad=0.015, aspect=12).outline.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if values.shape[1] <= 16 and values.shape[0] <= 16:
        shades = image.to_rgba(values)
        for (layer, column), value in np.ndenumerate(values):
            colour = _readable(shades[layer, column])
            axes.text(column, layer, write(float(value)), ha="center", va="center", color=colour, fontsize=7)


def _readable(shade: Float[np.ndarray, " rgba"]) -> str:
    """Black or white, whichever stands out more against a colour (relative luminance, WCAG 2)."""
    rgb = shade[:3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#ffffff" if linear @ [0.2126, 0.7152, 0.0722] < 0.18 else "#111111"
