"""The published study's five hypotheses about when even and odd heads part, each held against the data.  Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from ..measures.logit_diff import best_layer
from ..report.findings.finding import Finding
from ..study.patch_settings import PatchSettings
from .bootstrap import LEVEL
from .changepoint import GAP, Shape, evaluate_shape
from .onset import Onset, Series, compare_onsets, known_steps, onset_of, onsets, pick, series_of
from .permutation import parity

THIRDS = {"H1 early": (0, 1), "H2 middle": (1, 2), "H3 late": (2, 3)}
"""Which third of the training something must start in."""

SHAPES = {"H4 gradual": "gradual", "H5 sudden": "sudden"}

JUMP = ("sudden", "gradual")
"""Shapes of a rate and of its logit difference where the jump is the threshold's."""

FEWEST = 3
"""Checkpoints of known steps below which nothing is said of when."""


@dataclass(frozen=True)
class Verdict:
    """What the data say of one hypothesis."""

    hypothesis: str
    verdict: str
    """`supported`, `contradicted` or `undecided`."""

    evidence: str


def evaluate(steps: Int[np.ndarray, " checkpoint"], series: Series, p: float | None = None) -> list[Verdict]:
    """The five hypotheses, for one measure of how even and odd heads part.

    H1, H2, H3: it starts in the first, second, last third of the training, from step 0 to the last checkpoint, in
    steps.  Supported where the whole interval of the onset lies in the third, contradicted where none of it does, or
    nothing starts; undecided between, and where what starts may be chance: it is evident neither over prompts
    (`onset.significant_checkpoints`) nor by `p`.  The evidence names the thirds of log(1 + step) as well, for
    much that a model learns it learns early.  H4, H5: the change is gradual, sudden (`shape.evaluate_shape`).

    `p` is the place of even against odd among the halvings run where it is known, exact for these prompts: what other
    halvings show as well is no specialization of even heads, and supports nothing.  The values of one prompt are taken
    as they are: there is no interval, and nothing can be evident.
    """
    onset, shape = onset_of(steps, series), evaluate_shape(steps.astype(float), series.values)
    one_prompt = series.values.shape[1] == 1
    stands_out, like_others = p is not None and p <= 1 - LEVEL, p is not None and p > 1 - LEVEL
    by_chance = onset.by is not None and onset.evident is None and not one_prompt and not stands_out
    interval = (0 if onset.low is None else onset.low, np.inf if onset.high is None else onset.high)
    end = int(steps[-1])
    told = f"{series.name} ({series.unit}) starts {_told(onset, one_prompt)}; {_by_log(*interval, end)}"
    if p is not None:
        told += f"; p = {p:.2g} among the halvings run"
    verdicts = []
    for name, third in THIRDS.items():
        verdict = "undecided" if by_chance else _in_third(interval, *third, end)
        verdicts.append(Verdict(name, verdict, told))
    for name, wanted in SHAPES.items():
        verdict = {wanted: "supported", "undecided": "undecided"}.get(shape.verdict, "contradicted")
        verdicts.append(Verdict(name, verdict, _of_shape(shape)))
    return [_open(one) if like_others and one.verdict == "supported" else one for one in verdicts]


def _open(one: Verdict) -> Verdict:
    return replace(one, verdict="undecided", evidence=f"{one.evidence}; other halvings part as far")


def _in_third(interval: tuple[float, float], first: int, last: int, end: float) -> str:
    """Of the way from zero to `end`."""
    low, high = interval
    lower, upper = end * first / 3, end * last / 3
    if lower <= low and high <= upper:
        return "supported"
    return "contradicted" if high <= lower or low >= upper else "undecided"


def _by_log(low: float, high: float, end: int) -> str:
    logs, last = (float(np.log1p(low)), float(np.log1p(high))), float(np.log1p(end))
    possible = [name.split()[1] for name, third in THIRDS.items() if _in_third(logs, *third, last) != "contradicted"]
    return f"over log steps {' or '.join(possible) or 'in no third'}"


def _told(onset: Onset, one_prompt: bool) -> str:
    if one_prompt:
        return f"{onset}, one prompt: no interval"
    evident = "at no checkpoint beyond chance" if onset.evident is None else f"beyond chance by {onset.evident:,}"
    return f"{onset}, interval {_interval(onset)}, {evident}"


def _interval(onset: Onset) -> str:
    if onset.high is None:
        return "any time to never" if onset.low is None else f"{onset.low:,} to never"
    return f"by {onset.high:,}" if onset.low is None else f"{onset.low:,} to {onset.high:,}"


def _of_shape(shape: Shape) -> str:
    if not shape.bic:
        return "too few checkpoints to tell shapes apart"
    least = min(shape.bic.values())
    told = ", ".join(f"{name} {value - least:.0f}" for name, value in shape.bic.items())
    hidden = f"; {shape.gap:.0%} of the steps lie unobserved where a step fits best" if shape.gap > GAP else ""
    noise = "" if shape.changes else "; other prompts might not show the change"
    return f"{shape.verdict}: BIC above the best: {told}{hidden}{noise}"


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
    return pd.DataFrame(map(vars, evaluate(done.step.values.astype(int), series, p)))


def onset_findings(run: xr.Dataset, settings: PatchSettings) -> Iterator[Finding]:
    """Onsets, shapes and hypotheses at the layer that all heads move most at the last checkpoint.

    Nothing where fewer than three checkpoints of known steps are finished.
    """
    done, direction = known_steps(run), settings.direction
    if done.sizes["checkpoint"] < FEWEST:
        return
    layer = int(best_layer(done, direction).values[-1])
    yield _tell_onsets(done, direction, layer)
    found = hypotheses(done, direction, layer)
    if found is not None:
        yield _tell_hypotheses(found, layer)


def _tell_hypotheses(found: pd.DataFrame, layer: int) -> Finding:
    """Verdicts as a table, and beneath it each evidence once, with the hypotheses that it speaks to."""
    table = found.set_index("hypothesis")[["verdict"]].rename_axis(None)
    notes = [f"the study's hypotheses for even against odd heads of layer {layer}, by thirds of the steps to the last"]
    for evidence, alike in found.groupby("evidence", sort=False):
        notes.append(f"{', '.join(name.split()[0] for name in alike['hypothesis'])}: {evidence}")
    return Finding("The study's hypotheses", table, tuple(notes), "hypotheses", found.set_index("hypothesis"))


def _tell_onsets(done: xr.Dataset, direction: str, layer: int) -> Finding:
    frame = onsets(done, direction)
    shown = frame[frame["layer"].isna() | (frame["layer"] == layer)]
    table = pd.DataFrame(
        {
            "starts": shown["onset"],
            "95 % interval": [_interval(Onset(None, None, *_bounds(row), None)) for _, row in shown.iterrows()],
            "evident": ["never" if pd.isna(step) else f"{step:,}" for step in shown["evident"]],
            "steps": shown["shape"],
            "log steps": shown["shape_log"],
            "falls": [_deepest(told) for told in shown["falls"]],
        }
    )
    table.index = pd.Index([f"{row['measure']}, {row['unit']} > {row['goal']:g}" for _, row in shown.iterrows()])
    how_to_read = (
        f"steps between which the mean over prompts passes a goal for two checkpoints running, at layer {layer} (most "
        "moved at the last checkpoint), and the first at which it is past it beyond chance; the shape of the change by "
        "BIC; falls deeper than noise over prompts falls anywhere"
    )
    notes = (how_to_read, *_jumps(shown), *_order(done, direction, layer))
    return Finding("When it starts", table, notes, "onsets", frame.set_index(["measure", "layer", "unit"]))


def _deepest(falls: str) -> str:
    """The first of them, and how many more there are."""
    first, *others = falls.split("; ")
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


def _order(done: xr.Dataset, direction: str, layer: int) -> list[str]:
    """Whether the model can do the task before even and odd heads part."""
    series = list(series_of(done, direction))
    able, parted = pick(series, "clean right", "nats", None), pick(series, "even and odd part", "nats", layer)
    if able is None or parted is None:
        return []
    order = compare_onsets(done.step.values.astype(int), able, parted)
    apart = " to ".join(f"{steps:,.0f}" if np.isfinite(steps) else "any number of" for steps in (order.low, order.high))
    return [
        f"capability (clean right) against specialization (even and odd part): {order.verdict}; it starts before it in "
        f"{order.before:.0%} of resamples and after it in {order.after:.0%}, by {apart} steps"
    ]


def _bounds(row: pd.Series) -> tuple[int | None, int | None]:
    low, high = (None if pd.isna(row[name]) else int(row[name]) for name in ("low", "high"))
    return low, high
