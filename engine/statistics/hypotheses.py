"""The published study's five hypotheses about when even and odd heads part, each held against the data.  Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from headlapse.engine.measures import best_layer
from headlapse.engine.statistics.onset import Onset, Series, comes_first, date, known_steps, onsets, pick, series_of
from headlapse.engine.statistics.shape import GAP, judge_shape
from headlapse.engine.statistics.splits import parity
from headlapse.engine.statistics.told import Told

THIRDS = {"H1 early": (0, 1), "H2 middle": (1, 2), "H3 late": (2, 3)}
"""Which third of the training, in steps, something must start in."""

SHAPES = {"H4 gradual": "gradual", "H5 sudden": "sudden"}

FEWEST = 3
"""Checkpoints of known steps below which nothing is said of when."""


@dataclass(frozen=True)
class Verdict:
    """What the data say of one hypothesis."""

    hypothesis: str
    verdict: str
    """`supported`, `contradicted` or `undecided`."""

    evidence: str


def judge(steps: Int[np.ndarray, " checkpoint"], series: Series, p: float | None = None) -> list[Verdict]:
    """The five hypotheses, for one measure of how even and odd heads part.

    H1, H2, H3: it starts in the first, second, last third of the training covered, in steps.  Supported where the
    whole interval of the onset lies in the third, contradicted where none of it does, or nothing starts; undecided
    between.  H4, H5: the change is gradual, sudden (`shape.judge_shape`).  `p` is the place of even against odd among
    the halvings run where it is known: a start that any halving would show is no specialization of even heads.
    """
    onset, shape = date(steps, series), judge_shape(steps.astype(float), series.values)
    told = f"{series.name} ({series.unit}) starts {onset}, interval {_interval(onset)}"
    chance = "" if p is None else f"; p = {p:.2g} among the halvings run"
    verdicts = [Verdict(name, _in_third(steps, onset, *third), f"{told}{chance}") for name, third in THIRDS.items()]
    for name, wanted in SHAPES.items():
        verdict = {wanted: "supported", "undecided": "undecided"}.get(shape.verdict, "contradicted")
        verdicts.append(Verdict(name, verdict, _of_shape(shape.bic, shape.gap, shape.verdict)))
    return verdicts


def _in_third(steps: Int[np.ndarray, " checkpoint"], onset: Onset, first: int, last: int) -> str:
    start, covered = int(steps[0]), int(np.ptp(steps))
    lower, upper = start + covered * first / 3, start + covered * last / 3
    if onset.censored == "right":
        return "undecided" if onset.low is not None and onset.low < steps[-2] else "contradicted"
    low = start if onset.low is None else onset.low
    high = np.inf if onset.high is None else onset.high
    if lower <= low and high <= upper:
        return "supported"
    return "contradicted" if high <= lower or low >= upper else "undecided"


def _interval(onset: Onset) -> str:
    low = "before the first checkpoint" if onset.low is None else f"{onset.low:,}"
    return f"{low} to {'never' if onset.high is None else f'{onset.high:,}'}"


def _of_shape(bic: dict[str, float], gap: float, verdict: str) -> str:
    if not bic:
        return "too few checkpoints to tell shapes apart"
    least = min(bic.values())
    told = ", ".join(f"{name} {value - least:.0f}" for name, value in bic.items())
    hidden = f"; {gap:.0%} of the steps lie unobserved where a step fits best" if gap > GAP else ""
    return f"{verdict}: BIC above the best: {told}{hidden}"


def hypotheses(run: xr.Dataset, direction: str, layer: int, unit: str = "nats") -> pd.DataFrame | None:
    """Hypothesis, verdict and evidence for even against odd heads of one layer; None where they were not patched, or
    fewer than three checkpoints are known."""
    done = known_steps(run)
    if done.sizes["checkpoint"] < FEWEST:
        return None
    series = pick(list(series_of(done, direction)), "even and odd part", unit, layer)
    if series is None:
        return None
    against = parity(done)
    p = None if against is None else float(against["p"].loc[(done.checkpoint.values[-1], layer)])
    return pd.DataFrame(map(vars, judge(done.step.values.astype(int), series, p)))


def tell_when(run: xr.Dataset, settings: dict[str, Any]) -> Iterator[Told]:
    """Onsets, shapes and hypotheses at the layer that all heads move most at the last checkpoint.

    Nothing where fewer than three checkpoints of known steps are finished.
    """
    done, direction = known_steps(run), settings["direction"]
    if done.sizes["checkpoint"] < FEWEST:
        return
    layer = int(best_layer(done, direction).values[-1])
    yield _tell_onsets(done, direction, layer)
    found = hypotheses(done, direction, layer)
    if found is not None:
        table = found.set_index("hypothesis").rename_axis(None)
        table["evidence"] = table["evidence"].str.ljust(table["evidence"].str.len().max())
        note = f"the study's hypotheses for even against odd heads of layer {layer}, by thirds of the steps covered"
        yield Told("The study's hypotheses", table, (note,), "hypotheses", found.set_index("hypothesis"))


def _tell_onsets(done: xr.Dataset, direction: str, layer: int) -> Told:
    frame = onsets(done, direction)
    shown = frame[frame["layer"].isna() | (frame["layer"] == layer)]
    table = pd.DataFrame(
        {
            "starts between steps": shown["onset"],
            "95 % interval": [_interval(Onset(None, None, *_bounds(row))) for _, row in shown.iterrows()],
            "over steps": shown["shape"],
            "over log steps": shown["shape_log"],
            "falls": shown["dip"],
        }
    )
    table.index = pd.Index([f"{row['measure']}, {row['unit']} > {row['goal']:g}" for _, row in shown.iterrows()])
    how_to_read = (
        f"when the mean over prompts passes a goal for two checkpoints running, at layer {layer} (most moved at the "
        "last checkpoint); rates beside nats, for they can jump where nothing else does; curves compared by BIC"
    )
    notes = (how_to_read, *_order(done, direction, layer))
    return Told("When it starts", table, notes, "onsets", frame.set_index(["measure", "layer", "unit"]))


def _order(done: xr.Dataset, direction: str, layer: int) -> list[str]:
    """Whether the model can do the task before even and odd heads part."""
    series = list(series_of(done, direction))
    able, parted = pick(series, "clean right", "nats", None), pick(series, "even and odd part", "nats", layer)
    if able is None or parted is None:
        return []
    verdict, shares = comes_first(done.step.values.astype(int), able, parted)
    return [
        f"capability (clean right) against specialization (even and odd part): {verdict}; it starts before it in "
        f"{shares[0]:.0%} of resamples and after it in {shares[1]:.0%}"
    ]


def _bounds(row: pd.Series) -> tuple[int | None, int | None]:
    low, high = (None if pd.isna(row[name]) else int(row[name]) for name in ("low", "high"))
    return low, high
