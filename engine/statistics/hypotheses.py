"""The published study's five hypotheses about when even and odd heads diverge, each held against the data.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Int

from ..measures.logit_diff import CLEAR_OF_ZERO, effect
from ..measures.training import positions_of
from .changepoint import NON_MONOTONE, Shape, evaluate_shape
from .onset import DIVERGENCE, Series, known_steps, pick, series_of
from .parity_onset import ParityOnset, date_parity
from .permutation import find_equal_splits

THIRDS = {"H1 early": (0, 1), "H2 middle": (1, 2), "H3 late": (2, 3)}
"""Which third of the training something must start in."""

SHAPES = {"H4 gradual": "gradual", "H5 sudden": "sudden"}

FEWEST = 3
"""Checkpoints of known steps below which nothing is said of when."""

PART = 2 / 3
"""Of a layer's whole effect: no pattern is said to be there where one that makes so much of it is excluded."""

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "cannot tell"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the data say of the five hypotheses, and what that rests on."""

    onset: ParityOnset | None
    """Of the pattern among the equal splits that were run; None where none were."""

    shape: Shape
    """Of even − odd over training."""

    end: int
    """The last step."""

    verdicts: Mapping[str, str]
    """By hypothesis `supported`, `contradicted`, `cannot tell`, or `non-monotone` for those of shape."""

    @property
    def log_thirds(self) -> list[str]:
        """The thirds of log(1 + step) in which it may start: much that a model learns it learns early."""
        if self.onset is None:
            return []
        low, high = (float(np.log1p(bound)) for bound in self.onset.interval)
        end = float(np.log1p(self.end))
        return [
            name.split()[1] for name, third in THIRDS.items() if _in_third((low, high), *third, end) != CONTRADICTED
        ]


def evaluate(steps: Int[np.ndarray, " checkpoint"], onset: ParityOnset | None, shape: Shape) -> Evaluation:
    """The five hypotheses, from the onset of the pattern in one layer and the shape of even − odd there.

    H1, H2, H3: it starts in the first, second, last third of the training, from step 0 to the last checkpoint, in
    steps.  Supported where the whole interval of the onset lies in the third and the pattern is there at the last
    checkpoint; contradicted where none of the interval does; open between.  So a third is contradicted only where a
    pattern was significant before it, or could be excluded up to its end.  H4, H5: the change is gradual, sudden, or
    neither because it is not monotone (`changepoint.evaluate_shape`); of no pattern nothing is said.

    Without an onset, for no equal splits were run, every hypothesis is open: what dates the difference between two sets
    of heads says nothing of parity.
    """
    end = int(steps[-1])
    if onset is None:
        return Evaluation(None, shape, end, dict.fromkeys((*THIRDS, *SHAPES), OPEN))
    verdicts = {name: _in_third(onset.interval, *third, end) for name, third in THIRDS.items()}
    verdicts |= _shapes(shape)
    if not onset.lasts:
        kept = {name: CONTRADICTED for name in THIRDS if verdicts[name] == CONTRADICTED}
        verdicts = {name: kept.get(name, OPEN) for name in verdicts}
    return Evaluation(onset, shape, end, verdicts)


def _shapes(shape: Shape) -> dict[str, str]:
    known = {"undecided": OPEN, NON_MONOTONE: NON_MONOTONE}
    return {name: ({wanted: SUPPORTED} | known).get(shape.verdict, CONTRADICTED) for name, wanted in SHAPES.items()}


def _in_third(interval: tuple[float, float], first: int, last: int, end: float) -> str:
    """Of the way from zero to `end`."""
    low, high = interval
    lower, upper = end * first / 3, end * last / 3
    if lower <= low and high <= upper:
        return SUPPORTED
    return CONTRADICTED if high <= lower or low >= upper else OPEN


def hypotheses(run: xr.Dataset, direction: str, layer: int) -> Evaluation | None:
    """The hypotheses for even against odd heads of one layer; None where they were not patched, or fewer than three
    checkpoints are known."""
    complete = known_steps(run)
    if complete.sizes["checkpoint"] < FEWEST:
        return None
    series = pick(list(series_of(complete, direction)), DIVERGENCE, "nats", layer)
    if series is None:
        return None
    steps = positions_of(complete)
    return evaluate(steps, parity_onset(complete, direction, layer), _shape(steps, series))


def _shape(steps: Int[np.ndarray, " checkpoint"], series: Series) -> Shape:
    return evaluate_shape(steps.astype(float), series.values)


def parity_onset(run: xr.Dataset, direction: str, layer: int) -> ParityOnset | None:
    """Since when even and odd heads of a layer differ beyond their numbering; None where no equal splits were run.

    Of checkpoints with known steps.  What must be excluded where nothing is significant is a pattern of two thirds
    (`PART`) of the layer's whole effect at the last checkpoint, and of half a nat at least; where the whole layer was
    not patched, of even and odd heads' together.
    """
    complete = known_steps(run)
    splits = find_equal_splits(complete)
    if splits is None or not complete.sizes["checkpoint"]:
        return None
    at_layer = complete.sel(layer=layer)
    logit_diff = at_layer.logit_diff.transpose("checkpoint", "subset", "trial").values
    moved = effect(at_layer.isel(checkpoint=-1), direction).mean("trial")
    named = "all" in moved.subset.values
    whole = float(moved.sel(subset="all") if named else moved.sel(subset=["even", "odd"]).sum("subset"))
    size, whole = (max(part * abs(whole), CLEAR_OF_ZERO) for part in (PART, 1.0))
    differences = splits.differences(logit_diff[:, None]).at_layer(0)
    return date_parity(positions_of(complete), differences, splits, size, whole)
