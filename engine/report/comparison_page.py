"""The page of a comparison: the answer, small multiples over training, every training run in a table."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..statistics.comparison import Comparison
from .comparison_stage import comparison_stage
from .figures import SHOWS
from .findings.comparison import Roles, comparison_table, format_position, lines
from .page import atomic_file, inline_figure, make_folder, template
from .plot_style import COLOURS, FAINT, STYLE, WIDTH, lay_out, place_steps, to_svg

COLUMNS, ROW_HEIGHT = 3, 1.9
"""Of the small multiples: side by side, and inches each."""

DRAWN = {"all": "all heads of the layer", "head_1": "the head largest in the end", "parity": "even − odd"}
LOOKS = {"all": "all", "head_1": "clean", "parity": "even"}


def write_comparison(comparison: Comparison, roles: Roles, stores: Mapping[str, Path], out: Path) -> Path:
    """Write the page and its tables as CSV into `out`; the page's path.  Every file appears whole, the page last.

    `stores`: training run → where its store is.  Raises `UserError` where a store or a file is in the way.
    """
    make_folder(out)
    tables = {"runs": comparison.table, "seeds": comparison.summary, "timeline": comparison.timeline}
    for name, table in tables.items():
        with atomic_file(out / f"{name}.csv") as partial:
            table.to_csv(partial)
    with atomic_file(out / "index.html") as partial:
        partial.write_text(_page(comparison, roles, stores), encoding="utf-8")
    return out / "index.html"


def _page(comparison: Comparison, roles: Roles, stores: Mapping[str, Path]) -> str:
    return template("comparison.html.j2").render(
        lines=list(lines(comparison, roles)),
        table=comparison_table(comparison),
        figures={"multiples": inline_figure(to_svg(draw(comparison)), "multiples")},
        shows=SHOWS,
        stage=comparison_stage(comparison),
        unit=comparison.unit,
        stores=stores,
        at=comparison.at,
        n_seeds=int(comparison.summary["of"].max()),
    )


def draw(comparison: Comparison) -> Figure:
    """A small panel a training run: effects over training, on one scale for all of them."""
    names = list(comparison.table.index)
    n_rows = -(-len(names) // COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + n_rows * ROW_HEIGHT), layout="constrained")
        panels = figure.subplots(n_rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
        everywhere = comparison.timeline["position"].to_numpy()
        for axes, name in zip(panels, names, strict=False):
            _panel(axes, name, comparison.timeline.loc[name], everywhere)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes in panels[::COLUMNS]:
            axes.set_ylabel("nats")
        for axes in panels[max(0, len(names) - COLUMNS) : len(names)]:
            axes.set_xlabel(comparison.unit)
            axes.tick_params(labelbottom=True)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        lay_out(figure)
    return figure


def _panel(axes: Axes, name: str, timeline: pd.DataFrame, everywhere: Int[np.ndarray, " checkpoint"]) -> None:
    x, labels = _places(timeline["position"].to_numpy(), everywhere)
    for column, words in DRAWN.items():
        if column in timeline:
            axes.plot(x, timeline[column], label=words, color=COLOURS[LOOKS[column]], linewidth=1.4)
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes.set_title(name if len(name) <= 30 else f"…{name[-29:]}")
    axes.set_xticks(list(labels), list(labels.values()))


def _places(
    position: Int[np.ndarray, " checkpoint"], everywhere: Int[np.ndarray, " all"]
) -> tuple[Float[np.ndarray, " checkpoint"], dict[float, str]]:
    """Where points of training stand on an axis that all panels share, and three of its labels."""
    known = np.unique(everywhere)
    x, _ = place_steps(known)
    shown = {float(x[place]): format_position(float(known[place])) for place in (0, len(known) // 2, len(known) - 1)}
    return x[np.searchsorted(known, position)], shown
