"""The same question asked of several training runs: what varies between seeds, and what does not.  Pure.

Head numbers mean nothing across training runs: nothing ties head 3 of one seed to head 3 of another.  So heads are
matched by the size of their effects within each training run, and even against odd heads is tested jointly, with the
heads of every training run relabelled on their own.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from ..measures.logit_diff import best_layer, effect, finished
from ..measures.training import positions_of, tokens_of
from ..study.patch_settings import PatchSettings
from .head_effects import HeadEffect, head_effects, rank_heads
from .joint import ROUNDING
from .means import interval, t_test
from .onset import HALF, first_sustained
from .permutation import EqualSplits, differences_at, find_equal_splits, permutation_p_value

RANKS = 3
"""So many of the heads with the largest effects are compared."""

LABELLINGS = 9_999
"""Random relabellings of the heads of all training runs, where all equal splits were run."""

SCALES = {
    "capability": "log",
    "all": "nats",
    **{f"head_{rank}": "nats" for rank in range(1, RANKS + 1)},
    "head_1_from": "log",
    "parity": "nats",
}
"""Column of the table → what its values are: nats, or points of training (means are geometric)."""


@dataclass(frozen=True)
class TrainingRun:
    """One training run, as far as it was patched."""

    name: str
    """What to call it: unlike those it is compared with."""

    group: str
    """What it is a replicate of: training runs of one group differ in nothing but the seed."""

    run: xr.Dataset
    """Its patched run."""

    settings: PatchSettings


@dataclass(frozen=True)
class Comparison:
    """What several training runs say to one question."""

    unit: str
    """What training is measured in: `tokens` where those of all training runs are known, else `steps`."""

    at: dict[str, str]
    """Training run → the checkpoint at which it is compared: its last by the end of the shortest."""

    table: pd.DataFrame
    """A row a training run, columns as in `SCALES` and `group`, `checkpoint`, `layer`, `n_significant`, `heads` (names
    of those with the largest effects), `all_low` and so on (intervals over prompts), `parity_p`."""

    over_seeds: dict[str, dict[str, "OverSeeds"]]
    """Group → column of `SCALES` → what it comes to over the training runs of the group."""

    parity: dict[str, "JointParity"]
    """Group → the signed joint test of even against odd; only where equal splits of every training run of it were
    run."""

    timeline: pd.DataFrame
    """A row a training run and checkpoint: `position` (in `unit`), `all` (nats), `head_1` (of the head that is the
    largest in the end), `parity`, `both_right` (share of prompt pairs)."""

    heads: pd.DataFrame
    """A row a training run, checkpoint, layer and head, as `head_effects` has them; none of a run whose heads were not
    patched alone."""

    @property
    def summary(self) -> pd.DataFrame:
        """A row a group and quantity, columns as the fields of `OverSeeds`."""
        rows = {(group, name): asdict(of) for group, each in self.over_seeds.items() for name, of in each.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["group", "quantity"])


@dataclass(frozen=True)
class JointParity:
    """Even against odd heads over the training runs of a group."""

    p: float
    least: float
    """The smallest p that so many relabellings could give."""


@dataclass(frozen=True)
class OverSeeds:
    """One quantity over the training runs of a group."""

    n: int
    """Training runs that have a value."""

    of: int
    """Training runs."""

    mean: float
    """Geometric for points of training; NaN where none has a value."""

    low: float
    """Student's 95 % interval over seeds, NaN for one: where the mean of many other seeds would lie."""

    high: float
    least: float
    most: float


def compare(training_runs: Sequence[TrainingRun]) -> Comparison:
    """Compare training runs at the last point of training that all of them reach.

    Raises `ValueError` where one has no finished checkpoint with a known step, or names are not distinct.
    """
    if len({run.name for run in training_runs}) < len(training_runs):
        raise ValueError("two training runs have one name")
    timelines = {run.name: _Timeline.of(run) for run in training_runs}
    tokens = {name: tokens_of(line.run) for name, line in timelines.items()}
    if in_tokens := all((seen >= 0).all() for seen in tokens.values()):
        timelines = {name: replace(line, position=tokens[name]) for name, line in timelines.items()}
    end = min(line.position[-1] for line in timelines.values())
    places = {name: int(np.searchsorted(line.position, end, side="right")) - 1 for name, line in timelines.items()}
    rows = {run.name: _row(timelines[run.name], places[run.name]) for run in training_runs}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("training_run")
    table.insert(0, "group", [run.group for run in training_runs])
    frames = [timelines[run.name].frame(places[run.name]).assign(training_run=run.name) for run in training_runs]
    return Comparison(
        unit="tokens" if in_tokens else "steps",
        at={name: timelines[name].labels[place] for name, place in places.items()},
        table=table,
        over_seeds={str(group): _over_seeds(members) for group, members in table.groupby("group", sort=False)},
        parity=_joint_parity(
            {run.name: run.group for run in training_runs},
            {name: line.parity_null(places[name]) for name, line in timelines.items()},
        ),
        timeline=pd.concat(frames).set_index("training_run", append=True).swaplevel(),
        heads=pd.concat({name: line.effects for name, line in timelines.items()}, names=["training_run"]),
    )


@dataclass(frozen=True)
class _Timeline:
    """A training run's finished checkpoints of known step, in order."""

    run: xr.Dataset
    settings: PatchSettings
    position: Int[np.ndarray, " checkpoint"]

    @classmethod
    def of(cls, run: TrainingRun) -> "_Timeline":
        complete = finished(run.run)
        known = complete.isel(checkpoint=np.flatnonzero(positions_of(complete) >= 0))
        if not known.sizes["checkpoint"]:
            raise ValueError(f"{run.name} has no finished checkpoint with a known step")
        return cls(known, run.settings, positions_of(known))

    @property
    def labels(self) -> list[str]:
        return [str(label) for label in self.run.checkpoint.values]

    @property
    def has_all(self) -> bool:
        return "all" in self.run.subset.values

    @property
    def has_parity(self) -> bool:
        return {"even", "odd"} <= set(self.run.subset.values)

    def layer(self, place: int) -> int:
        """Where all heads together have the largest effect: relabelling the heads does not change it."""
        return int(best_layer(self.run.isel(checkpoint=[place]), self.settings.direction).values[0])

    def nats(self, subset: str, layer: int) -> Float[np.ndarray, "checkpoint trial"]:
        moved = effect(self.run, self.settings.direction).sel(subset=subset, layer=layer)
        nats: Float[np.ndarray, "checkpoint trial"] = moved.transpose("checkpoint", "trial").values.astype(float)
        return nats

    def even_minus_odd(self, layer: int) -> Float[np.ndarray, "checkpoint trial"]:
        difference: Float[np.ndarray, "checkpoint trial"] = self.nats("even", layer) - self.nats("odd", layer)
        return difference

    def both_right(self) -> Float[np.ndarray, " checkpoint"]:
        """Share of prompt pairs of which both prompts are answered rightly: the clean one by the right answer, the
        corrupt one by the other."""
        right = (self.run.clean_logit_diff > 0) & (self.run.corrupt_logit_diff <= 0)
        share: Float[np.ndarray, " checkpoint"] = right.transpose("checkpoint", "trial").values.mean(1)
        return share

    def parity_null(self, place: int) -> tuple[Float[np.ndarray, " split"], EqualSplits] | None:
        """Differences of mean logit difference of every equal split that was run, in the leading layer."""
        splits = find_equal_splits(self.run)
        if splits is None:
            return None
        return differences_at(self.run, splits, self.layer(place), place), splits

    def frame(self, place: int) -> pd.DataFrame:
        """What is drawn over training, in the layer and of the head that lead at `place`."""
        layer, head = self.layer(place), self.ranked(place)[:1]
        columns = {"position": self.position, "both_right": self.both_right()}
        if self.has_all:
            columns["all"] = self.nats("all", layer).mean(1)
        if head:
            columns["head_1"] = self.nats(self._subset_of(head[0].head), head[0].layer).mean(1)
        if self.has_parity:
            columns["parity"] = self.even_minus_odd(layer).mean(1)
        return pd.DataFrame(columns, index=pd.Index(self.labels, name="checkpoint"))

    def _subset_of(self, head: int) -> str:
        mask = self.run.mask.values
        return str(self.run.subset.values[np.flatnonzero((mask.sum(1) == 1) & mask[:, head])[0]])

    @functools.cached_property
    def effects(self) -> pd.DataFrame:
        return head_effects(self.run, self.settings)

    def ranked(self, place: int) -> list[HeadEffect]:
        """Heads that were patched alone, those with the largest effects first."""
        return [] if self.effects.empty else rank_heads(self.effects, self.labels[place])


def _row(line: _Timeline, place: int) -> dict[str, object]:
    layer, heads = line.layer(place), line.ranked(place)
    row: dict[str, object] = {
        "checkpoint": line.labels[place],
        "capability": _first_position(line.both_right() > HALF, line.position),
        "layer": layer,
        "n_significant": sum(head.is_significant for head in heads),
        "n_heads": len(heads),
        "heads": tuple(str(head) for head in heads[:RANKS]),
    }
    if line.has_all:
        row |= _estimate("all", line.nats("all", layer)[place])
    for rank, head in enumerate(heads[:RANKS], start=1):
        row |= {f"head_{rank}": head.effect, f"head_{rank}_low": head.low, f"head_{rank}_high": head.high}
    if heads and heads[0].is_significant and heads[0].by is not None:
        row["head_1_from"] = float(line.position[line.labels.index(heads[0].by)])
    if line.has_parity:
        row |= _estimate("parity", line.even_minus_odd(layer)[place])
    if (null := line.parity_null(place)) is not None:
        row["parity_p"] = permutation_p_value(float(null[0][null[1].even]), null[0])
    return row


def _estimate(name: str, values: Float[np.ndarray, " trial"]) -> dict[str, float]:
    low, high = interval(values[None])
    return {name: float(values.mean()), f"{name}_low": float(low[0]), f"{name}_high": float(high[0])}


def _first_position(holds: Bool[np.ndarray, " checkpoint"], position: Int[np.ndarray, " checkpoint"]) -> float:
    """Where it first holds at two consecutive checkpoints (the last may stand alone); NaN for never."""
    first = int(first_sustained(holds))
    return float(position[first]) if first < len(position) else float("nan")


def _over_seeds(members: pd.DataFrame) -> dict[str, OverSeeds]:
    quantities = {name: scale for name, scale in SCALES.items() if name in members}
    return {name: over_seeds(members[name].to_numpy(float), scale == "log") for name, scale in quantities.items()}


def over_seeds(values: Float[np.ndarray, " training_run"], is_log: bool = False) -> OverSeeds:
    """Mean over training runs and Student's 95 % interval of it (Student 1908).

    On logarithms, so that the mean is geometric, where `is_log`; a value of 0, as of step 0, makes it arithmetic.
    """
    there = values[~np.isnan(values)]
    if not len(there):
        return OverSeeds(0, len(values), *[float("nan")] * 5)
    use_log = is_log and there.min() > 0
    scaled = np.log(there) if use_log else there
    low, high, _ = t_test(scaled[None])
    bounds = np.array([scaled.mean(), low[0], high[0]])
    mean, lower, upper = map(float, np.exp(bounds) if use_log else bounds)
    return OverSeeds(len(there), len(values), mean, lower, upper, float(there.min()), float(there.max()))


def _joint_parity(
    group_of: Mapping[str, str], nulls: Mapping[str, tuple[Float[np.ndarray, " split"], EqualSplits] | None]
) -> dict[str, JointParity]:
    tests = {}
    for group in dict.fromkeys(group_of.values()):
        of_group = [null for name, null in nulls.items() if group_of[name] == group]
        if len(of_group) > 1 and all(null is not None for null in of_group):
            tests[group] = parity_over_seeds([null for null in of_group if null is not None])
    return tests


def parity_over_seeds(nulls: Sequence[tuple[Float[np.ndarray, " split"], EqualSplits]], seed: int = 0) -> JointParity:
    """Whether even heads differ from odd ones, in the same direction, over training runs: two-sided.

    The statistic is the mean over training runs of even minus odd, each divided by the standard deviation of its equal
    splits, so that none counts for more because its effects are larger.  Under the null the heads of every training run
    could be numbered otherwise, each on its own (Fisher 1935); p is (k + 1) / (N + 1) with N random relabellings of all
    of them (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).  Where the splits of a run are a sample, each of them
    serves in one relabelling, for two that share a split are not independent.
    """
    rng = np.random.default_rng(seed)
    scaled = [(null / max(float(null.std()), ROUNDING), splits) for null, splits in nulls]
    drawn = [_relabelled(values, splits, rng) for values, splits in scaled]
    n = min(map(len, drawn))
    means = np.mean([values[:n] for values in drawn], axis=0)
    actual = np.mean([values[splits.even] for values, splits in scaled])
    p = float((1 + (np.abs(means) >= abs(actual) - ROUNDING).sum()) / (n + 1))
    n_labellings = math.prod(len(values) for values, _ in scaled)  # actual and its opposite among them
    return JointParity(p, max(2 / n_labellings, 1 / (n + 1)))


def _relabelled(
    values: Float[np.ndarray, " split"], splits: EqualSplits, rng: np.random.Generator
) -> Float[np.ndarray, " relabelling"]:
    """Differences of one training run under random relabellings of its heads, without the identity."""
    if not splits.sampled:
        return values[rng.integers(len(values), size=LABELLINGS)]
    actual = frozenset((splits.halves[splits.even], splits.rests[splits.even]))
    once: dict[frozenset[int], int] = {}
    for place, pair in enumerate(zip(splits.halves, splits.rests, strict=True)):
        once.setdefault(frozenset(pair), place)
    places = np.array([place for pair, place in once.items() if pair != actual])
    # Of two halves as large either may be called the even one.
    sign = rng.choice([-1.0, 1.0], size=len(places)) if splits.swaps else 1.0
    drawn: Float[np.ndarray, " relabelling"] = values[rng.permutation(places)] * sign
    return drawn
