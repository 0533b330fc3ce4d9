"""How figures look: colours, sizes, where checkpoints stand and which of their labels fit."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..checkpoints.training_place import short_stage
from ..measures.training import TrainingPoints
from .colours import LINES, PAGE
from .result import Result

INK, FAINT = PAGE["ink"].light, PAGE["faint"].light
"""Lines and words of a figure, and its grid.  On a page they become the page's own."""

PAPER = "#fefefe"
"""The background of a figure; on a page there is none."""

COLOURS = {name: colour.light for name, colour in LINES.items()}
MARKERS = {"clean": "^", "corrupt": "v", "even": "s", "odd": "D", "all": "o"}
SPARE = ("all", "even", "odd")
"""Whose looks other subsets take, strongest first."""

STYLE: Any = {
    "axes.titlelocation": "left",
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    **dict.fromkeys(["font.size", "axes.titlesize"], 9),
    **dict.fromkeys(["axes.linewidth", "xtick.major.width", "ytick.major.width"], 0.6),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
    # A name with dollar signs is a name, not a formula.
    "text.parse_math": False,
    # The same run gives the same file: no random ids, no date.
    "svg.hashsalt": "headlapse",
}

WIDTH, CHARACTER = 7.6, 0.075
"""Inches: a full figure, and about one digit of a tick label."""

PNG_DPI = 160


def lay_out(figure: Figure) -> None:
    """Find every part's place, once and not for each format again."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")


# Figure.savefig would draw everything once more beforehand, for a layout that is there already.
def to_svg(figure: Figure) -> str:
    text = StringIO()
    with matplotlib.rc_context(STYLE):
        canvas: Any = FigureCanvasSVG(figure)  # untyped in matplotlib
        canvas.print_svg(text, metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    return text.getvalue()


def write_png(figure: Figure, path: Path) -> None:
    figure.set_dpi(PNG_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(path, metadata={"Software": None})


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


def label_steps(axes: Axes, result: Result) -> list[int]:
    """Steps below a panel that is as wide as the page, the roundest first; returns who has a label."""
    labels, steps = step_labels(result), result.table["step"]
    x, is_log = place_steps(result.positions)
    zeros = [len(step) - len(step.rstrip("0")) for step in steps.astype(str)]
    roundest = sorted(range(len(zeros)), key=lambda index: -zeros[index])
    ticks = choose_ticks(x, labels, WIDTH - 1.1, roundest)
    axes.set_xticks(x[ticks], [labels[tick] for tick in ticks])
    axes.set_xlabel(f"{axis_name(result.points)}{' (logarithmic)' if is_log else ''}")
    return ticks


def step_labels(result: Result) -> list[str]:
    """Steps as short as they can be written, after their stage where they have one; an unknown step's place goes by its
    label."""
    labels = []
    stages = result.run.stage.values if "stage" in result.run.coords else [""] * len(result.table)
    for (label, step), stage in zip(result.table["step"].items(), stages, strict=True):
        short = str(label) if len(str(label)) <= 12 else f"{str(label)[:11]}…"
        short = short if step < 0 else str(step) if step < 10_000 else f"{step / 1000:g}k"
        labels.append(f"{short_stage(str(stage))} {short}".strip())
    return labels


def axis_name(points: TrainingPoints) -> str:
    """What checkpoints are placed by."""
    if points.unit == "tokens":
        return "tokens seen"
    return "training step, counted on over stages" if points.labels else "training step"
