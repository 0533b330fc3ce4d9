"""The published study's five hypotheses about when even and odd heads diverge, each held against the data.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Int

from .bootstrap import LEVEL
from .changepoint import Shape, evaluate_shape
from .onset import DIVERGENCE, Onset, Series, known_steps, onset_of, pick, series_of
from .permutation import parity

THIRDS = {"H1 early": (0, 1), "H2 middle": (1, 2), "H3 late": (2, 3)}
"""Which third of the training something must start in."""

SHAPES = {"H4 gradual": "gradual", "H5 sudden": "sudden"}

FEWEST = 3
"""Checkpoints of known steps below which nothing is said of when."""

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "cannot tell"


@dataclass(frozen=True)
class Evaluation:
    """What the data say of the five hypotheses, and what that rests on."""

    series: Series
    onset: Onset
    shape: Shape

    p: float | None
    """Permutation p-value of even − odd among the equal splits that were run; None where none were."""

    end: int
    """The last step."""

    verdicts: Mapping[str, str]
    """By hypothesis `supported`, `contradicted` or `cannot tell`."""

    @property
    def one_prompt(self) -> bool:
        return bool(self.series.values.shape[1] == 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the onset, over prompts, in steps: from 0 where it may have been there from the first, infinite where it
        may never come."""
        onset = self.onset
        return (0 if onset.low is None else onset.low, np.inf if onset.high is None else onset.high)

    @property
    def log_thirds(self) -> list[str]:
        """The thirds of log(1 + step) in which it may start: much that a model learns it learns early."""
        low, high = (float(np.log1p(bound)) for bound in self.interval)
        end = float(np.log1p(self.end))
        return [
            name.split()[1] for name, third in THIRDS.items() if _in_third((low, high), *third, end) != CONTRADICTED
        ]


def evaluate(steps: Int[np.ndarray, " checkpoint"], series: Series, p: float | None) -> Evaluation:
    """The five hypotheses, for one measure of how even and odd heads diverge.

    H1, H2, H3: it starts in the first, second, last third of the training, from step 0 to the last checkpoint, in
    steps.  Supported where the whole interval of the onset lies in the third, contradicted where none of it does, or
    nothing starts; open between, and where what starts may be chance: it is significant neither over prompts
    (`onset.significant_checkpoints`) nor by `p`.  H4, H5: the change is gradual, sudden (`changepoint.evaluate_shape`).

    `p` is the permutation p-value of even against odd among the equal splits that were run, exact for these prompts.
    Without one every hypothesis is open: what dates the difference between two sets of heads says nothing of parity.
    With a large one nothing is supported, for other equal splits differ as much.  The values of one prompt are taken as
    they are: there is no interval, and nothing can be significant.
    """
    onset, shape = onset_of(steps, series), evaluate_shape(steps.astype(float), series.values)
    unruled = Evaluation(series, onset, shape, p, int(steps[-1]), {})
    verdicts = _thirds(unruled) | _shapes(shape)
    if p is None:
        verdicts = dict.fromkeys(verdicts, OPEN)
    elif p > 1 - LEVEL:
        verdicts = {name: OPEN if verdict == SUPPORTED else verdict for name, verdict in verdicts.items()}
    return Evaluation(series, onset, shape, p, int(steps[-1]), verdicts)


def _thirds(evaluation: Evaluation) -> dict[str, str]:
    onset = evaluation.onset
    stands_out = evaluation.p is not None and evaluation.p <= 1 - LEVEL
    by_chance = onset.by is not None and onset.significant is None and not evaluation.one_prompt and not stands_out
    return {
        name: OPEN if by_chance else _in_third(evaluation.interval, *third, evaluation.end)
        for name, third in THIRDS.items()
    }


def _shapes(shape: Shape) -> dict[str, str]:
    return {
        name: {wanted: SUPPORTED, "undecided": OPEN}.get(shape.verdict, CONTRADICTED) for name, wanted in SHAPES.items()
    }


def _in_third(interval: tuple[float, float], first: int, last: int, end: float) -> str:
    """Of the way from zero to `end`."""
    low, high = interval
    lower, upper = end * first / 3, end * last / 3
    if lower <= low and high <= upper:
        return SUPPORTED
    return CONTRADICTED if high <= lower or low >= upper else OPEN


def hypotheses(run: xr.Dataset, direction: str, layer: int, unit: str = "nats") -> Evaluation | None:
    """The hypotheses for even against odd heads of one layer; None where they were not patched, or fewer than three
    checkpoints are known."""
    complete = known_steps(run)
    if complete.sizes["checkpoint"] < FEWEST:
        return None
    series = pick(list(series_of(complete, direction)), DIVERGENCE, unit, layer)
    if series is None:
        return None
    against = parity(complete)
    p = None if against is None else float(against["p"].loc[(complete.checkpoint.values[-1], layer)])
    return evaluate(complete.step.values.astype(int), series, p)
