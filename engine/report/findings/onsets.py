"""When something starts, as a table, with how its change looks and where it goes back."""

import numpy as np
import pandas as pd
import xarray as xr

from ...measures.logit_diff import best_layer
from ...measures.training import TrainingPoints, positions_of
from ...statistics.hypotheses import FEWEST, parity_onset
from ...statistics.onset import CAPABILITY, DIVERGENCE, compare_onsets, known_steps, onsets, pick, series_of
from ...study.patch_settings import PatchSettings
from .finding import Finding

JUMP = ("sudden", "gradual")
"""Shapes of a rate and of its logit difference where the jump is the threshold's."""


def onsets_finding(run: xr.Dataset, settings: PatchSettings) -> Finding | None:
    """Onsets at the layer with the largest effect of all heads at the last checkpoint.

    None where fewer than three checkpoints of known steps are finished.
    """
    complete, direction = known_steps(run), settings.direction
    if complete.sizes["checkpoint"] < FEWEST:
        return None
    layer = int(best_layer(complete, direction).values[-1])
    frame, points = onsets(complete, direction), TrainingPoints.of(complete)
    shown = frame[frame["layer"].isna() | (frame["layer"] == layer)]
    table = pd.DataFrame(
        {
            "starts": shown["onset"],
            "95 % interval": [format_interval(*_bounds(row), points) for _, row in shown.iterrows()],
            "significant": ["never" if pd.isna(at) else points.name(int(at)) for at in shown["significant"]],
            points.unit: shown["shape"],
            f"log {points.unit}": shown["shape_log"],
            "drops": [_deepest(drops) for drops in shown["drops"]],
        }
    )
    names = [f"{row['measure']}, {row['unit']} > {row['threshold']:g}" for _, row in shown.iterrows()]
    table.index = pd.Index(names)
    between = "checkpoints" if points.labels else "steps"
    how_to_read = (
        f"{between} between which the mean over prompts crosses the threshold at two consecutive checkpoints, at layer "
        f"{layer} (largest effect at the last checkpoint), and the first significant checkpoint; the shape of the "
        "change by BIC; drops deeper than the noise over prompts drops anywhere"
    )
    notes = (how_to_read, *_jumps(shown), *_order(complete, direction, layer))
    return Finding("When it starts", table, notes, "onsets", frame.set_index(["measure", "layer", "unit"]))


def format_interval(low: int | None, high: int | None, points: TrainingPoints) -> str:
    """Bounds of an onset, None where it may have been there from the first, or may never come."""
    if high is None:
        return "any time to never" if low is None else f"{points.name(low)} to never"
    return f"by {points.name(high)}" if low is None else f"{points.name(low)} to {points.name(high)}"


def _deepest(drops: str) -> str:
    """The first of them, and how many more there are."""
    first, *others = drops.split("; ")
    return f"{first} (+{len(others)})" if others else first


def _jumps(shown: pd.DataFrame) -> list[str]:
    """Measures whose rate jumps where their logit difference does not."""
    shape = shown.set_index(["measure", "unit"])["shape"]
    jumping = [name for name in shown["measure"].unique() if (shape[name, "rate"], shape[name, "nats"]) == JUMP]
    if not jumping:
        return []
    return [
        f"{', '.join(jumping)}: the rate jumps and the nats do not, as a threshold alone can make it (Schaeffer et al. "
        "2023)"
    ]


def _order(complete: xr.Dataset, direction: str, layer: int) -> list[str]:
    """Whether the model can do the task before even and odd heads diverge; nothing where that is no pattern."""
    onset = parity_onset(complete, direction, layer)
    if onset is None or not onset.lasts:
        return []  # what parts first may be any head
    series = list(series_of(complete, direction))
    able, diverged = pick(series, CAPABILITY, "nats", None), pick(series, DIVERGENCE, "nats", layer)
    if able is None or diverged is None:
        return []
    unit = TrainingPoints.of(complete).unit
    order = compare_onsets(positions_of(complete), able, diverged)
    apart = " to ".join(f"{steps:,.0f}" if np.isfinite(steps) else "any number of" for steps in (order.low, order.high))
    return [
        f"capability ({CAPABILITY}) against specialization ({DIVERGENCE}): {order.verdict}; it starts before it in "
        f"{order.before:.0%} of resamples and after it in {order.after:.0%}, by {apart} {unit}"
    ]


def _bounds(row: pd.Series) -> tuple[int | None, int | None]:
    low, high = (None if pd.isna(row[name]) else int(row[name]) for name in ("low", "high"))
    return low, high
