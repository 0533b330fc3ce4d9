"""One patched run as the report shows it: means over trials, the timeline, and how its parts are called."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from ..measures.logit_diff import NAMED, each_checkpoint, effect, finished, success, timeline
from ..measures.training import TrainingPoints, positions_of
from ..runtime.errors import UserError
from ..store.store import Store
from ..study.patch_settings import PatchSettings

STRONGEST = 3
"""So many of the subsets with the largest effects stand in the timeline where none of `NAMED` was patched."""


@dataclass(frozen=True)
class Result:
    """One patched run, reduced to its means over trials; only finished checkpoints, in order of training."""

    name: str
    settings: PatchSettings

    run: xr.Dataset
    """Trial by trial, lazily."""

    nats: xr.DataArray
    """Mean logit difference (checkpoint, layer, subset)."""

    rate: xr.DataArray
    """Share of trials with the right answer ahead (checkpoint, layer, subset)."""

    table: pd.DataFrame
    """One row a checkpoint, as `measures.timeline` makes it, with the columns of `shown`."""

    shown: tuple[str, ...]
    """The subsets in the timeline."""

    mapped: str
    """The subset in the heatmap."""

    not_finite: tuple[str, ...]
    """Checkpoints left out because they hold numbers that are none."""

    @property
    def target(self) -> str:
        """The run that was patched into."""
        return "corrupt" if self.settings.direction == "denoise" else "clean"

    @property
    def source(self) -> str:
        return "clean" if self.target == "corrupt" else "corrupt"

    @property
    def where(self) -> str:
        """Which layers are patched, in words."""
        layers = self.settings.layers
        if len(layers) == 1:
            return f"layer {layers[0]}"
        return f"layers {ranges(layers)} together" if self.settings.joint else "one layer at a time"

    @property
    def last(self) -> str:
        """The last checkpoint in words."""
        at = int(self.positions[-1])
        return self.points.words(at) if at >= 0 and not self.points.labels else f"checkpoint {self.table.index[-1]}"

    @property
    def positions(self) -> Int[np.ndarray, " checkpoint"]:
        """How far into the training each checkpoint is, in steps counted on over stages; -1 where unknown."""
        return positions_of(self.run)

    @property
    def points(self) -> TrainingPoints:
        """How those are said."""
        return TrainingPoints.of(self.run)

    @property
    def change(self) -> xr.DataArray:
        """Patched minus unpatched target run: mean logit difference in nats (checkpoint, layer, subset)."""
        return self.nats - xr.DataArray(self.table[self.target].to_numpy(), dims="checkpoint")

    @property
    def single_heads(self) -> tuple[int, ...]:
        """Where the subset axis has every single head, in order of heads; empty unless all are there."""
        mask = self.run["mask"].values
        single = {int(mask[row].argmax()): int(row) for row in np.flatnonzero(mask.sum(1) == 1)}
        n_heads = mask.shape[1]
        return tuple(single[head] for head in range(n_heads)) if len(single) == n_heads else ()

    def site(self, layer: int) -> str:
        """What a place on the layer axis is called: several layers where they were patched jointly."""
        return ranges(self.settings.layers) if self.settings.joint else str(layer)


def read_result(store: Store, name: str) -> Result:
    """A patched run's means and timeline, one checkpoint in memory at a time.

    Raises `UserError` where it has no finished checkpoint.
    """
    patch = store.patch(name)
    run, direction = finished(patch.load()), patch.settings.direction
    finite, means, rates, rows = [], [], [], []
    for checkpoint in each_checkpoint(run):
        raw_values = [checkpoint[raw].values for raw in ("logit_diff", "clean_logit_diff", "corrupt_logit_diff")]
        finite.append(all(np.isfinite(values).all() for values in raw_values))
        if finite[-1]:
            means.append(checkpoint.logit_diff.mean("trial").values)
            rates.append(success(checkpoint.logit_diff).mean("trial").values)
            rows.append(timeline(checkpoint, direction))
    if not rows:
        what = "only numbers that are not finite" if finite else "no finished checkpoint"
        raise UserError(f"patched run {name} of {store.path} has {what}; run its headlapse patch command again")
    not_finite = tuple(map(str, run.checkpoint.values[~np.array(finite)]))
    run = run.isel(checkpoint=np.flatnonzero(finite))
    like = run.logit_diff.isel(trial=0).reset_coords(drop=True)
    nats, rate = (like.copy(data=np.concatenate(values)) for values in (means, rates))
    table = pd.concat(rows)
    named = tuple(word for word in NAMED if word in run.subset.values)
    strongest = _strongest(run.isel(checkpoint=[-1]), direction)
    if not named:
        table = _with_subsets(table, strongest, nats, rate)
    mapped = "all" if "all" in named else strongest[0]
    return Result(name, patch.settings, run, nats, rate, table, named or strongest, mapped, not_finite)


def _strongest(run: xr.Dataset, direction: str) -> tuple[str, ...]:
    """The subsets with the largest mean effects towards the source run, each at its best layer."""
    effects = effect(run, direction).mean(["checkpoint", "trial"]).max("layer")
    order = np.argsort(-effects.values, kind="stable")[:STRONGEST]
    return tuple(map(str, effects.subset.values[order]))


def ranges(numbers: Sequence[int]) -> str:
    """`4–8, 11`"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _with_subsets(table: pd.DataFrame, shown: Sequence[str], nats: xr.DataArray, rate: xr.DataArray) -> pd.DataFrame:
    """The timeline with two more columns for every subset, at each checkpoint's best layer."""
    layer = xr.DataArray(table["best_layer"].to_numpy(), dims="checkpoint")
    more = {}
    for subset in shown:
        more[subset] = nats.sel(subset=subset, layer=layer).values
        more[f"{subset}_rate"] = rate.sel(subset=subset, layer=layer).values
    return table.drop(columns="best_layer").assign(**more, best_layer=table["best_layer"])


def heads_of(subset: str) -> str:
    """A subset in words: `even heads`, `head 3`, `heads 0,2,4`."""
    if subset == "none":
        return "no head"
    if subset in NAMED:
        return f"{subset} heads"
    short = subset if len(subset) <= 24 else f"{subset[:23]}…"
    return f"head{'s' * (',' in subset)} {short}"


def head_name(layer: int | str, head: int) -> str:
    """`L3.H1`; of several layers patched at once `L0–3.H1`."""
    return f"L{layer}.H{head}"


def signed(value: float, digits: int) -> str:
    """`+1.2`, `−1.2`, and zero without a sign."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def listed(labels: Sequence[str]) -> str:
    """Up to a dozen labels, or the first few, the last one and how many."""
    if len(labels) <= 12:
        return ", ".join(labels)
    return f"{', '.join(labels[:6])}, ... {labels[-1]} ({len(labels)} checkpoints)"
