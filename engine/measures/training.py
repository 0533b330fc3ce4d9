"""How far into its training each checkpoint of a run is, over all stages, and how that is said.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from ..checkpoints.training_place import UNKNOWN, Place, positions

POSITION = "training_position"
"""The coordinate that `placed` adds."""


def positions_of(run: xr.Dataset) -> Int[np.ndarray, " checkpoint"]:
    """Steps from the start of the training, counted on over stages (`training_place.positions`); -1 where unknown.

    Without stages that is the step.  Tokens, where no step is known.  A run that lost checkpoints after it was `placed`
    keeps its positions.
    """
    if POSITION in run.coords:
        return run[POSITION].values
    rows = zip(_along(run, "stage", ""), run.step.values.tolist(), _along(run, "tokens_seen", UNKNOWN), strict=True)
    return np.array(positions([Place(str(stage), int(step), int(seen)) for stage, step, seen in rows]), dtype=np.int64)


def tokens_of(run: xr.Dataset) -> Int[np.ndarray, " checkpoint"]:
    """Tokens seen from the start of the training, counted on over stages; -1 where unknown."""
    rows = zip(_along(run, "stage", ""), _along(run, "tokens_seen", UNKNOWN), strict=True)
    return np.array(positions([Place(str(stage), tokens=int(seen)) for stage, seen in rows]), dtype=np.int64)


def placed(run: xr.Dataset) -> xr.Dataset:
    """The run with its positions as a coordinate."""
    return run.assign_coords({POSITION: ("checkpoint", positions_of(run))})


@dataclass(frozen=True)
class TrainingPoints:
    """How positions in a training are said: as steps, or by the checkpoints' labels where steps alone do not tell."""

    labels: Mapping[int, str]
    """Position -> label; empty where positions are steps."""

    unit: str = "steps"
    """What positions count, or `tokens`."""

    @classmethod
    def of(cls, run: xr.Dataset) -> "TrainingPoints":
        at, steps = positions_of(run), run.step.values
        known = at >= 0
        if np.array_equal(at[known], steps[known]) and not any(np.array(_along(run, "stage", ""), dtype=object)[known]):
            return cls({})
        labels = {int(point): str(label) for point, label in zip(at, run.checkpoint.values, strict=True)}
        return cls(labels, "steps" if (steps >= 0).any() else "tokens")

    def name(self, position: int) -> str:
        """`1,000`, or a label."""
        return self.labels[position] if self.labels else f"{position:,}"

    def words(self, position: int) -> str:
        """`step 1,000`, or a label."""
        return self.name(position) if self.labels else f"step {position:,}"


STEPS = TrainingPoints({})
"""Of a training without stages."""


def _along(run: xr.Dataset, name: str, absent: str | int) -> list[Any]:
    """A coordinate's value for each checkpoint; older runs lack some."""
    return run[name].values.tolist() if name in run.coords else [absent] * run.sizes["checkpoint"]
