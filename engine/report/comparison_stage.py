"""What the page of a comparison carries: each training run's heads over training, on one axis for all of them."""

from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from ..statistics.bootstrap import LEVEL
from ..statistics.comparison import Comparison
from .colours import SCALES
from .findings.comparison import format_position
from .packing import MISSING, hundredths, pack
from .plot_style import place_steps
from .stage import embedded, source

NAMED = {"head_1": "largest head", "all": "all heads of the layer", "parity": "even − odd"}
"""What is drawn over training, by its column of the timeline."""


def comparison_payload(comparison: Comparison) -> dict[str, Any]:
    """What `comparison.js` shows.  Effects are packed hundredths of a nat."""
    positions = np.unique(comparison.timeline["position"].to_numpy())
    x, is_log = place_steps(positions)
    return {
        "unit": comparison.unit,
        "level": round(100 * LEVEL),
        "missing": MISSING,
        "positions": [int(position) for position in positions],
        "labels": [format_position(float(position)) for position in positions],
        "x": [round(float(place), 4) for place in x],
        "is_log": is_log,
        "levels": SCALES["effect"].n_levels,
        "named": NAMED,
        "runs": [_run(comparison, str(name), positions) for name in comparison.table.index],
    }


def _run(comparison: Comparison, name: str, positions: np.ndarray) -> dict[str, Any]:
    timeline, heads = comparison.timeline.loc[name], comparison.table["heads"][name]
    drawn = [column for column in NAMED if column in timeline and not timeline[column].isna().all()]
    return {
        "name": name,
        "checkpoints": [str(label) for label in timeline.index],
        "places": np.searchsorted(positions, timeline["position"]).tolist(),
        "largest": heads[0] if heads else None,
        "lines": {column: pack(hundredths(timeline[column].to_numpy(float))) for column in drawn},
        "heads": _heads(comparison.heads, name),
    }


def _heads(effects: pd.DataFrame, name: str) -> dict[str, Any] | None:
    """Effects of single heads (checkpoint, layer, head); None where they were not patched alone."""
    if effects.empty or name not in effects.index.unique("training_run"):
        return None
    frame = effects.loc[name]
    shape = [frame.index.unique(level).size for level in ("checkpoint", "layer", "head")]
    packed = {
        column: pack(hundredths(frame[column].to_numpy(float).reshape(shape))) for column in ("effect", "low", "high")
    }
    significant = (frame["p_adjusted"].to_numpy().reshape(shape) <= 1 - LEVEL).astype(np.int64)
    layers = [int(layer) for layer in frame.index.unique("layer")]
    return {"layers": layers, "n_heads": shape[2], "significant": pack(significant), **packed}


def comparison_stage(comparison: Comparison) -> tuple[Markup, Markup]:
    """The place of the small multiples, hidden until their script has run, and what the page ends in."""
    # What it imports stands before it, in the one script of the page.
    own = source("comparison.js").partition('from "./stage.js";\n')[2]
    script = f"{source('stage.js')}\n{own}"
    return embedded("multiples", source("comparison.css"), script, "show", comparison_payload(comparison))
