"""When in training something starts: dated between two checkpoints, with an interval over prompts.  Pure."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from ..measures.logit_diff import CLEAR_OF_ZERO, NAMED, PATTERN, effect, finished, recovered, success
from ..measures.training import STEPS, TrainingPoints, positions_of
from .bootstrap import LEVEL, noise_of_means
from .changepoint import evaluate_shape
from .drops import chance_drops, students
from .multiple_testing import adjust

CAPABILITY, DIVERGENCE = "pair told apart", "even − odd divergence"
"""Names of measures that others look up."""

HALF = 0.5
"""A rate that counts: half of the prompts."""


@dataclass(frozen=True)
class Series:
    """One measure over training, prompt by prompt."""

    name: str
    layer: int | None
    values: Float[np.ndarray, "checkpoint trial"]

    threshold: float
    """The mean is past once it is above this."""

    unit: str
    """`nats`, or `rate`: a mean of counts between `lowest` and 1."""

    two_sided: bool = False
    """Whether being below the negative threshold counts as well."""

    lowest: float = 0.0

    @functools.cached_property
    def resampled(self) -> Float[np.ndarray, "checkpoint resample"]:
        """Means over prompts drawn with replacement, the same ones for every series of as many; about their centre as
        wide as Student's interval (`drops.students`), for resampled means of few prompts scatter too little."""
        n = self.values.shape[1]
        wider = students(n) if n > 1 else 1.0
        resampled: Float[np.ndarray, "checkpoint resample"] = self.values.mean(
            1, keepdims=True
        ) + wider * noise_of_means(self.values)
        return resampled

    def past(self, mean: Float[np.ndarray, "checkpoint *resample"]) -> Bool[np.ndarray, "checkpoint *resample"]:
        return (np.abs(mean) if self.two_sided else mean) > self.threshold


@dataclass(frozen=True)
class Onset:
    """Something started after one checkpoint and by another; None where it was there at the first, or never came."""

    after: int | None
    by: int | None

    low: int | None
    """Bounds of the interval over prompts: it started after `low` ..."""

    high: int | None
    """... and by `high`, both steps."""

    significant: int | None
    """Step of the first significant checkpoint (`significant_checkpoints`); None for never."""

    @property
    def censored(self) -> str:
        """`left`: there from the first checkpoint on; `right`: not there by the last one; else nothing."""
        return "right" if self.by is None else "left" if self.after is None else ""

    def __str__(self) -> str:
        return self.text(STEPS)

    def text(self, points: TrainingPoints) -> str:
        """Between which points of training, `20 to 30`."""
        if self.by is None:
            return "never"
        by = points.name(self.by)
        return f"by {by}" if self.after is None else f"{points.name(self.after)} to {by}"


def onset_of(steps: Int[np.ndarray, " checkpoint"], series: Series) -> Onset:
    """The onset: the mean crosses the threshold at two consecutive checkpoints (the last may stand alone), or is
    significantly past it at one: an onset is never after its first significant checkpoint.

    It is known only to lie between that checkpoint and the one before (interval censoring: Turnbull 1976).  The
    interval is the bootstrap over prompts (Efron and Tibshirani 1993) of both ends (`Series.resampled`).  A mean that
    lies on the threshold crosses it by chance sooner or later: an onset counts for something only where it is
    `significant` too.
    """
    n = len(steps)
    index = int(first_sustained(series.past(series.values.mean(1))))
    resampled = np.atleast_1d(first_sustained(series.past(series.resampled)))
    tail = (1 - LEVEL) / 2
    low, high = (int(np.quantile(resampled, q, method="nearest")) for q in (tail, 1 - tail))
    significant = np.flatnonzero(significant_checkpoints(series))
    if len(significant):
        index = min(index, int(significant[0]))
        low = min(low, index)

    def step(at: int) -> int | None:
        return int(steps[at]) if 0 <= at < n else None

    first = int(steps[significant[0]]) if len(significant) else None
    return Onset(step(index - 1) if index < n else None, step(index), step(low - 1), step(high), first)


def significant_checkpoints(series: Series) -> Bool[np.ndarray, " checkpoint"]:
    """The checkpoints at which the mean over prompts is significantly past the threshold, all of them taken together.

    t-tests over prompts (Student 1908), against the binomial tail for rates, since nothing between two bounds varies
    more than a coin of the same mean (Hoeffding 1963); adjusted over the checkpoints (Holm 1979).  Nowhere for one
    prompt.
    """
    if series.values.shape[1] < 2:
        return np.zeros(len(series.values), dtype=bool)
    p = _p_above(series, 1)
    if series.two_sided:
        p = np.minimum(1, 2 * np.minimum(p, _p_above(series, -1)))
    return adjust(p, "holm") <= 1 - LEVEL


def _p_above(series: Series, sign: int) -> Float[np.ndarray, " checkpoint"]:
    """How likely the mean, turned over where `sign` is -1, lies so far above the threshold, did it lie on it."""
    from scipy.special import bdtrc, stdtr  # start-up counts

    values, n = sign * series.values, series.values.shape[1]
    if series.unit == "rate":
        width = 1 - series.lowest
        heads = np.floor((values - series.lowest).sum(1) / width + 1e-9)
        return np.where(heads > 0, bdtrc(np.maximum(heads - 1, 0), n, (series.threshold - series.lowest) / width), 1.0)
    error = values.std(1, ddof=1) / np.sqrt(n)
    above = values.mean(1) - series.threshold
    return np.where(error > 0, stdtr(n - 1, -above / np.where(error > 0, error, 1)), np.where(above > 0, 0.0, 1.0))


def first_sustained(past: Bool[np.ndarray, "checkpoint *resample"]) -> Int[np.ndarray, "*resample"]:
    """Index of the first checkpoint that is past, and so is the next or there is none; their number where none is."""
    followed = np.concatenate([past[1:], np.ones_like(past[:1])])
    lasting = past & followed
    return np.where(lasting.any(0), lasting.argmax(0), len(past))


@dataclass(frozen=True)
class Decline:
    """A stretch of training over which a mean goes back."""

    start: int
    end: int

    depth: float
    """From the checkpoint at step `start` to the one at `end`, in the measure's unit."""

    at_least: float
    """What is left of the depth when as much is taken off as noise over prompts drops anywhere, in 95 % of cases."""

    def __str__(self) -> str:
        return self.text(STEPS)

    def text(self, points: TrainingPoints) -> str:
        """Where from and where to, and how deep: `20 to 30: -1.50`."""
        return f"{points.name(self.start)} to {points.name(self.end)}: -{self.depth:.2f}"


def declines(steps: Int[np.ndarray, " checkpoint"], series: Series) -> list[Decline]:
    """Every stretch over which the mean drops by more than noise would, the deepest first.

    Means over prompts drop by chance somewhere.  A drop is named when it is deeper than noise drops to that checkpoint
    or, by as many times its own size, to any other in 95 % of resamples (balanced simultaneous bootstrap: Beran 1988;
    wider by Student's quantile over the normal one, for the size is estimated).  So a series that never drops names one
    in about 5 % of cases.  After the deepest drop those before and after it are looked for.  A two-sided measure drops
    away from the side it goes furthest to.  Nothing is named of one prompt.
    """
    if series.values.shape[1] < 2:
        return []
    mean, noise = series.values.mean(1), noise_of_means(series.values)
    margins = chance_drops(noise)
    if series.two_sided:
        mean = mean * np.sign(mean[np.abs(mean).argmax()])
        margins = np.maximum(margins, chance_drops(-noise))
    margins = margins * students(series.values.shape[1]) + 1e-6 * np.abs(mean).max()
    declined, stretches = [], [(0, len(mean))]
    while stretches:
        first, last = stretches.pop()
        drop = np.maximum.accumulate(mean[first:last]) - mean[first:last]
        end = first + int(drop.argmax())
        start = first + int(mean[first : end + 1].argmax())
        depth = float(mean[start] - mean[end])
        if depth > margins[end]:
            declined.append(Decline(int(steps[start]), int(steps[end]), depth, float(depth - margins[end])))
            stretches += [(first, start + 1), (end, last)]
    return sorted(declined, key=lambda decline: -decline.depth)


def series_of(run: xr.Dataset, direction: str) -> Iterator[Series]:
    """What is dated: capability, the clean prompt's answer, the bug, what each layer's heads do to it, when their
    normalised recovery is above half (nats beyond half of the gap; share of prompts whose recovery is), and how even
    and odd heads diverge.

    Capability is judged by pairs: the logit difference of the clean prompt exceeds that of the corrupt one, and the one
    is answered rightly and the other not.  A model that answers both prompts alike has the clean one right, and no
    capability.

    Each in nats and, beside it, as the discrete rate, which can jump where nothing else does (Schaeffer et al. 2023,
    arXiv:2304.15004).
    """
    complete = finished(run)
    complete = complete.sel(subset=[name for name in NAMED if name in complete.subset.values]).load()
    clean, corrupt = (complete[f"{name}_logit_diff"].transpose("checkpoint", "trial") for name in ("clean", "corrupt"))
    yield Series(CAPABILITY, None, _array(clean - corrupt), CLEAR_OF_ZERO, "nats")
    yield Series(CAPABILITY, None, _array(success(clean) * (1 - success(corrupt))), HALF, "rate")
    yield Series("clean right", None, _array(clean), 0.0, "nats")
    yield Series("clean right", None, _array(success(clean)), HALF, "rate")
    yield Series("corrupt wrong", None, -_array(corrupt), 0.0, "nats")
    yield Series("corrupt wrong", None, 1 - _array(success(corrupt)), HALF, "rate")
    sign = 1 if direction == "denoise" else -1
    source, target = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    gap = clean - corrupt
    labels = set(complete.subset.values)
    moved = effect(complete, direction)
    for layer in map(int, complete.layer.values):
        at = complete.logit_diff.sel(layer=layer).transpose("checkpoint", "subset", "trial")
        if "all" in labels:
            patched = moved.sel(layer=layer, subset="all").transpose("checkpoint", "trial")
            yield Series("all heads matter", layer, _array(patched), CLEAR_OF_ZERO, "nats")
            rate = sign * (success(at.sel(subset="all")) - success(target))
            yield Series("all heads matter", layer, _array(rate), PATTERN, "rate", lowest=-1)
            # Of a gap near zero half is next to nothing, and anything would recover it.
            beyond = patched - HALF * gap.clip(min=CLEAR_OF_ZERO)
            yield Series("recovery above half", layer, _array(beyond), 0.0, "nats")
            share = recovered(at.sel(subset="all"), source, target)
            yield Series("recovery above half", layer, _array(share > HALF), HALF, "rate")
        if {"even", "odd"} <= labels:
            diverged = at.sel(subset="even") - at.sel(subset="odd")
            yield Series(DIVERGENCE, layer, _array(diverged), CLEAR_OF_ZERO, "nats", two_sided=True)
            rate = success(at.sel(subset="even")) - success(at.sel(subset="odd"))
            yield Series(DIVERGENCE, layer, _array(rate), PATTERN, "rate", two_sided=True, lowest=-1)


def _array(values: xr.DataArray) -> Float[np.ndarray, "checkpoint trial"]:
    return values.values.astype(float)


def known_steps(run: xr.Dataset) -> xr.Dataset:
    """The finished checkpoints whose place in training is known, in order; of several at one place the first."""
    complete = finished(run)
    places = positions_of(complete)
    first = np.array([place >= 0 and place not in places[:at] for at, place in enumerate(places)], dtype=bool)
    return complete.isel(checkpoint=np.flatnonzero(first))


def onsets(run: xr.Dataset, direction: str) -> pd.DataFrame:
    """One row for each measure, layer and unit.

    Columns: `measure`, `layer` (missing for unpatched runs), `unit`, `threshold`, `after` and `by` (steps between which
    it starts, counted on over stages), `low` and `high` (their interval over prompts), `significant` (step of the first
    significant checkpoint), `censored`, `onset` (in words, with labels where training has stages), `shape` and
    `shape_log` (sudden, gradual, non-monotone, none or undecided, over steps, to which tokens seen are proportional,
    and over their logarithm), `drops` (stretches over which it goes back, the deepest first).
    """
    complete = known_steps(run)
    steps, points = positions_of(complete), TrainingPoints.of(complete)
    records = []
    for series in series_of(complete, direction):
        onset = onset_of(steps, series)
        records.append(
            {
                "measure": series.name, "layer": series.layer, "unit": series.unit, "threshold": series.threshold,
                "after": onset.after, "by": onset.by, "low": onset.low, "high": onset.high,
                "significant": onset.significant,
                "censored": onset.censored, "onset": onset.text(points),
                "shape": evaluate_shape(steps.astype(float), series.values).verdict,
                "shape_log": evaluate_shape(np.log(np.maximum(steps, 1)), series.values).verdict,
                "drops": "; ".join(decline.text(points) for decline in declines(steps, series)),
            }
        )  # fmt: skip
    return pd.DataFrame(records).astype(dict.fromkeys(("layer", "after", "by", "low", "high", "significant"), "Int64"))


@dataclass(frozen=True)
class Order:
    """Which of two things starts first."""

    verdict: str
    """`first`, `later` or `undecided`."""

    before: float
    after: float
    """Shares of resamples in which the one surely starts before, and after, the other."""

    low: float
    high: float
    """Steps by which the other starts later, an interval over prompts and gaps; infinite where one never starts."""


def compare_onsets(steps: Int[np.ndarray, " checkpoint"], first: Series, second: Series) -> Order:
    """Whether `first` starts before `second`: `first` or `later` where the interval of the difference is clear of zero
    and what starts first is significant.

    The same prompts are drawn for both (Efron and Tibshirani 1993, chapter 8).  An onset lies anywhere between two
    checkpoints, so that of two between the same ones nothing is said, and the interval is of the least and the greatest
    difference possible.
    """
    onsets_resampled = [first_sustained(series.past(series.resampled)) for series in (first, second)]
    ends = np.concatenate([[-np.inf], steps.astype(float), [np.inf]])
    after, by = (np.stack([ends[at + shift] for at in onsets_resampled]) for shift in (0, 1))
    tail = (1 - LEVEL) / 2
    low = float(np.quantile(after[1] - by[0], tail, method="inverted_cdf"))
    high = float(np.quantile(by[1] - after[0], 1 - tail, method="inverted_cdf"))
    verdict = "undecided"
    if low >= 0 and onset_of(steps, first).significant is not None:
        verdict = "first"
    elif high <= 0 and onset_of(steps, second).significant is not None:
        verdict = "later"
    return Order(
        verdict,
        float((onsets_resampled[0] < onsets_resampled[1]).mean()),
        float((onsets_resampled[0] > onsets_resampled[1]).mean()),
        low,
        high,
    )


def pick(series: Sequence[Series], name: str, unit: str, layer: int | None) -> Series | None:
    """The one of that name, unit and layer."""
    return next((one for one in series if (one.name, one.unit, one.layer) == (name, unit, layer)), None)
