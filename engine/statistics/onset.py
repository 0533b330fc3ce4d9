"""When in training something starts: dated between two checkpoints, with an interval over prompts.  Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from headlapse.engine.measures import CLEAR_OF_ZERO, effect, finished, success
from headlapse.engine.statistics.intervals import LEVEL, resampled_means
from headlapse.engine.statistics.shape import judge_shape

HALF, PATTERN = 0.5, 0.3
"""Rates that count: half of the prompts, and what the published study calls a pattern (even rate minus odd rate)."""


@dataclass(frozen=True)
class Series:
    """One measure over training, prompt by prompt."""

    name: str
    layer: int | None
    values: Float[np.ndarray, "checkpoint trial"]

    goal: float
    """The mean counts as past once it is above this."""

    unit: str
    two_sided: bool = False
    """Whether being below the negative goal counts as well."""

    def past(self, mean: Float[np.ndarray, "checkpoint *resample"]) -> Bool[np.ndarray, "checkpoint *resample"]:
        return (np.abs(mean) if self.two_sided else mean) > self.goal


@dataclass(frozen=True)
class Onset:
    """Something started after one checkpoint and by another; None where it was there at the first, or never came."""

    after: int | None
    by: int | None

    low: int | None
    """Bounds of the interval over prompts: it started after `low` ..."""

    high: int | None
    """... and by `high`, both steps."""

    @property
    def censored(self) -> str:
        """`left`: there from the first checkpoint on; `right`: not there by the last one; else nothing."""
        return "right" if self.by is None else "left" if self.after is None else ""

    def __str__(self) -> str:
        if self.by is None:
            return "never"
        return f"by {self.by:,}" if self.after is None else f"{self.after:,} to {self.by:,}"


def date(steps: Int[np.ndarray, " checkpoint"], series: Series) -> Onset:
    """The onset: the first checkpoint at which the mean is past the goal and still is at the next one (the last
    checkpoint may stand alone).

    It is known only to lie between that checkpoint and the one before (interval censoring: Turnbull 1976).  The
    interval is the percentile bootstrap over prompts (Efron and Tibshirani 1993) of both ends.
    """
    n = len(steps)
    index = int(first_lasting(series.past(series.values.mean(1))))
    found = np.atleast_1d(first_lasting(series.past(resampled_means(series.values))))
    tail = (1 - LEVEL) / 2
    low, high = (int(np.quantile(found, q, method="nearest")) for q in (tail, 1 - tail))

    def step(at: int) -> int | None:
        return int(steps[at]) if 0 <= at < n else None

    return Onset(step(index - 1) if index < n else None, step(index), step(low - 1), step(high))


def first_lasting(past: Bool[np.ndarray, "checkpoint *resample"]) -> Int[np.ndarray, "*resample"]:
    """Index of the first checkpoint that is past, and so is the next or there is none; their number where none is."""
    followed = np.concatenate([past[1:], np.ones_like(past[:1])])
    lasting = past & followed
    return np.where(lasting.any(0), lasting.argmax(0), len(past))


@dataclass(frozen=True)
class Dip:
    """The deepest fall of a mean over training."""

    start: int
    end: int

    depth: float
    """From the checkpoint at step `start` to the one at `end`, in the measure's unit."""

    low: float
    high: float
    """Bootstrap interval of the depth over prompts."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval is clear of zero."""
        return self.low > 0


def deepest_dip(steps: Int[np.ndarray, " checkpoint"], values: Float[np.ndarray, "checkpoint trial"]) -> Dip | None:
    """Where the mean falls furthest from a checkpoint to a later one; None where it never falls.

    The place is chosen on the same prompts, so that the interval flatters it a little.
    """
    mean = values.mean(1)
    falls = np.triu(mean[:, None] - mean[None, :], k=1)
    start, end = np.unravel_index(int(falls.argmax()), falls.shape)
    if falls[start, end] <= 0:
        return None
    resampled = resampled_means(values[[start, end]])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled[0] - resampled[1], [tail, 1 - tail])
    return Dip(int(steps[start]), int(steps[end]), float(falls[start, end]), float(low), float(high))


def series_of(run: xr.Dataset, direction: str) -> Iterator[Series]:
    """What is dated: capability, the bug, what each layer's heads do to it, and how even and odd heads part.

    Each in nats and, beside it, as the discrete rate, which can jump where nothing else does (Schaeffer et al. 2023,
    arXiv:2304.15004).
    """
    done = finished(run)
    clean, corrupt = (done[f"{name}_logit_diff"].transpose("checkpoint", "trial") for name in ("clean", "corrupt"))
    yield Series("clean right", None, _array(clean), 0.0, "nats")
    yield Series("clean right", None, _array(success(clean)), HALF, "rate")
    yield Series("corrupt wrong", None, -_array(corrupt), 0.0, "nats")
    yield Series("corrupt wrong", None, 1 - _array(success(corrupt)), HALF, "rate")
    sign = 1 if direction == "denoise" else -1
    target = corrupt if direction == "denoise" else clean
    labels = set(done.subset.values)
    moved = effect(done, direction)
    for layer in map(int, done.layer.values):
        at = done.logit_diff.sel(layer=layer).transpose("checkpoint", "subset", "trial")
        if "all" in labels:
            patched = moved.sel(layer=layer, subset="all").transpose("checkpoint", "trial")
            yield Series("all heads matter", layer, _array(patched), CLEAR_OF_ZERO, "nats")
            rate = sign * (success(at.sel(subset="all")) - success(target))
            yield Series("all heads matter", layer, _array(rate), PATTERN, "rate")
        if {"even", "odd"} <= labels:
            parted = at.sel(subset="even") - at.sel(subset="odd")
            yield Series("even and odd part", layer, _array(parted), CLEAR_OF_ZERO, "nats", two_sided=True)
            rate = success(at.sel(subset="even")) - success(at.sel(subset="odd"))
            yield Series("even and odd part", layer, _array(rate), PATTERN, "rate", two_sided=True)


def _array(values: xr.DataArray) -> Float[np.ndarray, "checkpoint trial"]:
    return values.values.astype(float)


def known_steps(run: xr.Dataset) -> xr.Dataset:
    """The finished checkpoints whose step is known, in order; of several at one step the first."""
    done = finished(run)
    steps = done.step.values
    first = np.array([step >= 0 and step not in steps[:at] for at, step in enumerate(steps)], dtype=bool)
    return done.isel(checkpoint=np.flatnonzero(first))


def onsets(run: xr.Dataset, direction: str) -> pd.DataFrame:
    """One row for each measure, layer and unit.

    Columns: `measure`, `layer` (missing for unpatched runs), `unit`, `goal`, `after` and `by` (steps between which it
    starts), `low` and `high` (their interval over prompts), `censored`, `shape` and `shape_log` (sudden, gradual, none
    or undecided, over steps, to which tokens seen are proportional, and over their logarithm), `dip` (the deepest
    fall, where its interval is clear of zero).
    """
    done = known_steps(run)
    steps = done.step.values.astype(int)
    rows = []
    for series in series_of(done, direction):
        onset, dip = date(steps, series), deepest_dip(steps, series.values)
        rows.append(
            {
                "measure": series.name, "layer": series.layer, "unit": series.unit, "goal": series.goal,
                "after": onset.after, "by": onset.by, "low": onset.low, "high": onset.high,
                "censored": onset.censored, "onset": str(onset),
                "shape": judge_shape(steps.astype(float), series.values).verdict,
                "shape_log": judge_shape(np.log(np.maximum(steps, 1)), series.values).verdict,
                "dip": f"{dip.start:,} to {dip.end:,}: -{dip.depth:.2f}" if dip and dip.is_clear else "",
            }
        )  # fmt: skip
    return pd.DataFrame(rows).astype(dict.fromkeys(("layer", "after", "by", "low", "high"), "Int64"))


def comes_first(
    steps: Int[np.ndarray, " checkpoint"], one: Series, other: Series
) -> tuple[str, Float[np.ndarray, " two"]]:
    """`first`, `later` or `undecided`: whether `one` starts before `other`, with the shares of resamples in which it
    surely starts before and surely after.

    The same prompts are drawn for both, and of two onsets between the same checkpoints nothing is said.
    """
    found = [first_lasting(series.past(resampled_means(series.values))) for series in (one, other)]
    shares = np.array([(found[0] < found[1]).mean(), (found[0] > found[1]).mean()])
    if shares[0] >= (1 + LEVEL) / 2:
        return "first", shares
    return ("later", shares) if shares[1] >= (1 + LEVEL) / 2 else ("undecided", shares)


def pick(series: Sequence[Series], name: str, unit: str, layer: int | None) -> Series | None:
    """The one of that name, unit and layer."""
    return next((one for one in series if (one.name, one.unit, one.layer) == (name, unit, layer)), None)
