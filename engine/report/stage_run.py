"""One patched run on its way into the stage: whatever it measured, of whichever sets of heads there is room for."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from ..measures.logit_diff import CLEAR_OF_ZERO, NAMED, effects_by_checkpoint
from ..statistics import shapley
from ..statistics.bootstrap import LEVEL
from ..statistics.head_effects import head_effects, rank_heads, telling_checkpoint
from ..statistics.head_subsets import SHARE, all_subset_rows, sampled
from ..statistics.means import interval, p_differs
from ..statistics.multiple_testing import adjust
from ..study.study import MEASURES
from .packing import RATIO, hundredths, pack, powers, size_of
from .plot_style import axis_name, place_steps, step_labels
from .result import Result, listed, ranges

MOST_EFFECTS = 700_000
"""Effects of one run that are carried, as means over prompts: all subsets of 12 layers of 12 heads at 11 checkpoints
are 540,672.  Of more the subsets nearest to no head and to all heads are."""

MOST_TEXT = 2_100_000
"""Characters that numbers take in all, with intervals of every subset."""

DETAIL_TEXT = 850_000
"""Characters up to which there is room for details: single prompts, other measures, other runs."""

DETAIL_EFFECTS = 4_000_000
"""Effects of single prompts above which none is tried: they could not fit."""

MOST_FEW = 100_000
"""Characters that a further measure of a few subsets may take."""

MOST_TEXTS = DETAIL_EFFECTS // 8
"""Generated texts above which none is tried."""

FEW = "single heads, all but one, even, odd, all and none"
"""The subsets that have what there is no room for of all of them."""

IN_WORDS = {
    "success": "success rates", "recovery": "normalised recovery", "probability": "the probability", "rank": "the rank",
    "kl": "the divergence", "sequence": "the log-probability of whole answers", "answers": "generated answers",
}  # fmt: skip
"""Measures beside the logit difference, in a sentence."""

Rows = Int[np.ndarray, " row"]
Maker = Callable[[Rows], dict[str, Any]]
"""Makes what is carried of one measure, of these of the subsets."""


@dataclass(frozen=True)
class Effects:
    """Means over prompts of one measure, for the subsets that are carried.  Patched minus unpatched target run."""

    mean: Float[np.ndarray, "checkpoint layer subset"]
    low: Float[np.ndarray, "checkpoint layer subset"]
    high: Float[np.ndarray, "checkpoint layer subset"]

    p: Float[np.ndarray, "checkpoint layer alone"]
    """Of no effect, of each head that was patched alone, in order of heads."""


class StageRun:
    """A patched run, and what of it there is room for."""

    def __init__(self, result: Result) -> None:
        self.result, self.settings = result, result.settings
        self.run = result.run.transpose("checkpoint", "layer", "subset", "trial", ...)
        self.sign = 1 if self.settings.direction == "denoise" else -1
        """Patched minus target, as a part of the effect towards the source run."""

        mask: Bool[np.ndarray, "subset head"] = self.run.mask.values
        every = all_subset_rows(mask)
        cells = self.run.sizes["checkpoint"] * self.run.sizes["layer"]
        most = MOST_EFFECTS // cells
        self.lattice = every is not None and len(every) <= most
        self.rows = every if every is not None and self.lattice else _nearest(mask, most)
        self.mask = mask[self.rows]
        self.every: Rows = np.arange(len(self.rows))
        self.few: Rows = self._few()
        self.effects = self._read("logit_diff", self.every)

    def start(self) -> dict[str, Any]:
        """Where the page begins: at the head that matters most where one surely does; else at no head, and the end."""
        single = self.single
        labels = list(self.result.table.index)
        at = telling_checkpoint(single) if len(single) else None
        if at is None:
            layer = int(self.result.table["best_layer"].iloc[-1])
            return {"checkpoint": len(labels) - 1, "layer": layer, "heads": []}
        head = rank_heads(single, at)[0]
        return {"checkpoint": labels.index(at), "layer": head.layer, "heads": [head.head]}

    def carried(self, taken: int) -> dict[str, Any]:
        """Everything that there is room for beside `taken` characters."""
        result, run = self.result, self.run
        x, is_log = place_steps(result.positions)
        carried: dict[str, Any] = {
            "name": result.name, "direction": self.settings.direction, "source": result.source,
            "target": result.target, "positions": self.settings.positions, "joint": self.settings.joint,
            "n_heads": self.mask.shape[1], "n_trials": run.sizes["trial"], "n_subsets": run.sizes["subset"],
            "subsets": list(self.settings.subsets), "dtype": self.settings.dtype, "generate": self.settings.generate,
            "layers": [int(layer) for layer in run.layer.values],
            "patched_layers": list(self.settings.layers), "layer_words": ranges(self.settings.layers),
            "checkpoints": [
                {
                    "label": str(label), "step": int(step), "known": bool(place >= 0), "short": short,
                    "x": round(float(at), 4),
                }
                for label, step, place, short, at in zip(
                    result.table.index, result.table["step"], result.positions, step_labels(result), x, strict=True
                )
            ],
            "is_log": is_log, "axis": axis_name(result.points), "by_label": bool(result.points.labels),
            "lattice": self.lattice,
            "mask": None if self.lattice else pack(np.packbits(self.mask, axis=1).astype(np.int64)),
            "measures": {"logit_diff": self._means("logit_diff", self.effects, self.every)},
            "fine": pack(self._fine()),
            "texts": None,
            "starts": self._starts(),
            "sufficient": None, "necessary": None, "shapley": self._shapley(),
            "notes": list(self._notes()),
        }  # fmt: skip
        if self.lattice:
            carried |= self._smallest()
        if run.sizes["trial"] > 1:
            spread, note = self._fitting_spread(MOST_TEXT - taken - size_of(carried))
            carried["measures"]["logit_diff"]["spread"] = spread
            carried["notes"] += [note] if note else []
        self._add_measures(carried, taken)
        self._add_prompts(carried, taken)
        return carried

    def _notes(self) -> Iterator[str]:
        n_all, n_here = self.run.sizes["subset"], len(self.rows)
        if n_here < n_all:
            yield (
                f"{n_here:,} of the {n_all:,} subsets of this run are on this page, those of few heads and of all but "
                "few; all of them are in the store"
            )
        if self.result.not_finite:
            yield f"left out because not all numbers are finite: {', '.join(self.result.not_finite)}"
        if self.run.sizes["trial"] < 2:
            yield "one prompt has no interval"
        if self.settings.joint and len(self.settings.layers) > 1:
            yield f"layers {ranges(self.settings.layers)} were patched together, with the same heads in each"

    # --- measures ---

    def _read(self, measure: str, rows: Rows) -> Effects:
        """The effects of these subsets, one checkpoint in memory at a time."""
        means, lows, highs, ps = (list[np.ndarray]() for _ in range(4))
        alone = np.searchsorted(rows, self.alone)
        for effect in self._effects(measure, rows):
            low, high = interval(effect)
            parts = (effect.mean(-1), low, high, p_differs(effect[:, alone]))
            for values, of in zip((means, lows, highs, ps), parts, strict=True):
                values.append(of)
        return Effects(np.array(means), np.array(lows), np.array(highs), np.array(ps))

    def _effects(self, measure: str, rows: Rows) -> Iterator[Float[np.ndarray, "layer row trial"]]:
        """Patched minus unpatched target run, prompt by prompt, of one checkpoint after another."""
        for towards in effects_by_checkpoint(self.run, self.settings.direction, measure):
            yield self.sign * towards[:, self.rows[rows]]

    def _unpatched(self, run: str, measure: str = "logit_diff") -> Float[np.ndarray, "checkpoint trial"]:
        values: Float[np.ndarray, "checkpoint trial"] = self.run[f"{run}_{measure}"].values.astype(float)
        return values

    @functools.cached_property
    def alone(self) -> Rows:
        """Where each head that was patched alone stands, in order of heads."""
        rows: Rows = np.flatnonzero(self.mask.sum(1) == 1)
        return rows[np.argsort(self.mask[rows].argmax(1), kind="stable")]

    def _few(self) -> Rows:
        """Where the subsets that `FEW` names stand."""
        sizes, n = self.mask.sum(1), self.mask.shape[1]
        is_named = np.isin(self.run.subset.values[self.rows].astype(str), ("none", *NAMED))
        return np.flatnonzero((sizes <= 1) | (sizes >= n - 1) | is_named)

    def _listed(self, rows: Rows) -> list[int] | None:
        """Which of the subsets that are carried; None for all of them."""
        return None if len(rows) == len(self.rows) else rows.tolist()

    def _means(self, name: str, effects: Effects, rows: Rows) -> dict[str, Any]:
        """Means of one measure and what goes with them; intervals are added where there is room."""
        return {
            "mean": pack(hundredths(effects.mean), self.lattice and len(rows) == len(self.rows)),
            "rows": self._listed(rows),
            "unpatched": {run: pack(hundredths(self._unpatched(run, name).mean(-1))) for run in ("clean", "corrupt")},
            "significant": self._significant(effects),
            "spread": None,
            "by_prompt": None,
        }

    def _significant(self, effects: Effects) -> dict[str, Any] | None:
        """Whether the effect of each head alone is (adjusted over all heads and checkpoints); None where unknown."""
        if (self.settings.joint and len(self.settings.layers) > 1) or not effects.p.size or np.isnan(effects.p).any():
            return None
        is_so = adjust(effects.p.ravel()).reshape(effects.p.shape) <= 1 - LEVEL
        return {"heads": self.mask[self.alone].argmax(1).tolist(), "is": pack(is_so.astype(np.int64))}

    def _fitting_spread(self, room: int) -> tuple[dict[str, Any], str]:
        """Intervals in at most `room` characters, and what is to be said of them: exact ones of all subsets, else
        rounded ones, else exact ones of a few."""
        for make, note in ((_spread, ""), (_coarse_spread, "intervals are rounded: half-widths are within 1 %")):
            if size_of(spread := make(self.effects)) <= room:
                return spread, note
        few = _spread(self._read("logit_diff", self.few)) | {"rows": self._listed(self.few)}
        return few, f"no room on this page for the intervals of all subsets: {FEW} have theirs"

    # --- further measures ---

    def _add_measures(self, carried: dict[str, Any], taken: int) -> None:
        """Whatever was measured besides, of all subsets where there is room, else of a few, else not at all."""
        makers: dict[str, Maker] = {"success": self._success, "recovery": self._recovery}
        makers |= {name: functools.partial(self._further, name) for name in MEASURES if name in self.run}
        if "text" in self.run:
            makers["answers"] = self._answers
        few, none = [], []
        for name, make in makers.items():
            value = self._fitting(carried, taken, make)
            if value is None:
                none.append(name)
            elif not value and name in MEASURES:
                carried["notes"].append(f"{IN_WORDS[name]} is not shown: not all of its numbers are finite")
            elif value:
                carried["measures"][name] = value
                few += [name] * (value["rows"] is not None)
        for names, of in ((few, f" of all subsets: {FEW} have theirs"), (none, "")):
            if names:
                carried["notes"].append(f"no room on this page for {listed([IN_WORDS[name] for name in names])}{of}")

    def _fitting(self, carried: dict[str, Any], taken: int, make: Maker) -> dict[str, Any] | None:
        """What `make` makes of all subsets that are carried, or of a few, whichever there is room for."""
        room = DETAIL_TEXT - taken - size_of(carried)
        if self.effects.mean.size <= room and size_of(value := make(self.every)) <= room:
            return value
        value = make(self.few)
        return value if size_of(value) <= min(MOST_FEW, MOST_TEXT - taken - size_of(carried)) else None

    def _further(self, name: str, rows: Rows) -> dict[str, Any]:
        """A measure that the run kept beside the logit difference; empty where not all of its numbers are finite."""
        effects = self._read(name, rows)
        if not np.isfinite(effects.mean).all():
            return {}
        spread = _spread(effects) if self.run.sizes["trial"] > 1 else None
        return self._means(name, effects, rows) | {"spread": spread}

    def _success(self, rows: Rows) -> dict[str, Any]:
        """Prompts whose right answer comes before the wrong one."""
        return self._counts(self.run.logit_diff > 0, self._unpatched(self.result.target) > 0, rows)

    def _answers(self, rows: Rows) -> dict[str, Any]:
        """Prompts whose generated text begins with the right answer."""
        return self._counts(self.run.success, self.run[f"{self.result.target}_success"].values, rows)

    def _counts(
        self, is_right: xr.DataArray, target: Bool[np.ndarray, "checkpoint trial"], rows: Rows
    ) -> dict[str, Any]:
        """How many prompts that the target run fails a patch restores, and how many others it breaks."""
        restored, broken = [], []
        for at, before in enumerate(target):
            right = is_right[at].values[:, self.rows[rows]]
            restored.append((right & ~before).sum(-1))
            broken.append((~right & before).sum(-1))
        counts = {"restored": np.array(restored), "broken": np.array(broken), "right": target.sum(1)}
        return {name: pack(values.astype(np.int64)) for name, values in counts.items()} | {"rows": self._listed(rows)}

    def _recovery(self, rows: Rows) -> dict[str, Any]:
        """Mean normalised recovery over the prompts whose gap is clear of zero, with intervals; in percent of it.
        Empty where no prompt has such a gap at any checkpoint."""
        gap = self._unpatched(self.result.source) - self._unpatched(self.result.target)
        clear = np.abs(gap) >= CLEAR_OF_ZERO
        if not clear.any():
            return {}
        values = []
        for at, effect in enumerate(self._effects("logit_diff", rows)):
            share = effect[..., clear[at]] / gap[at, clear[at]]
            none = np.full(share.shape[:-1], np.nan)
            values.append([share.mean(-1), *interval(share)] if clear[at].any() else [none] * 3)
        packed = dict(zip(("mean", "low", "high"), map(pack, hundredths(np.array(values)).swapaxes(0, 1)), strict=True))
        return {"n_clear": clear.sum(1).tolist(), "rows": self._listed(rows)} | packed

    # --- prompt by prompt ---

    def _add_prompts(self, carried: dict[str, Any], taken: int) -> None:
        """Texts and effects prompt by prompt, where there is room."""

        def fits(value: Any) -> bool:
            return value is not None and taken + size_of([carried, value]) <= DETAIL_TEXT

        missing = []
        if "text" in self.run:
            if fits(texts := self._texts()):
                carried["texts"] = texts
            else:
                missing.append("the generated texts")
        for name in filter(carried["measures"].get, ("logit_diff", *MEASURES)):
            if fits(effects := self._by_prompt(name)):
                carried["measures"][name]["by_prompt"] = effects
            else:
                missing.append(f"the effect on each prompt by {IN_WORDS.get(name, 'the logit difference')}")
        carried["notes"] += [f"no room on this page for {listed(missing)}"] if missing else []

    def _by_prompt(self, name: str) -> dict[str, Any] | None:
        """Effects prompt by prompt, and the unpatched target run; None where these are too many."""
        if self.effects.mean.size * self.run.sizes["trial"] > DETAIL_EFFECTS:
            return None
        effect = np.array([of.transpose(0, 2, 1) for of in self._effects(name, self.every)])
        target = pack(hundredths(self._unpatched(self.result.target, name)))
        return {"effect": pack(hundredths(effect), self.lattice), "target": target}

    def _texts(self) -> dict[str, Any] | None:
        """Generated texts, each of them once, and which of them every run wrote; None where these are too many."""
        target = self.run[f"{self.result.target}_text"].values.astype(str)
        if target.size * self.run.sizes["layer"] * len(self.rows) > MOST_TEXTS:
            return None
        patched = self.run.text.values[:, :, self.rows].swapaxes(2, 3).astype(str)
        words, at = np.unique(np.concatenate([patched.ravel(), target.ravel()]), return_inverse=True)
        numbers = at.astype(np.int64)
        return {
            "words": words.tolist(),
            "patched": pack(numbers[: patched.size].reshape(patched.shape)),
            "target": pack(numbers[patched.size :].reshape(target.shape)),
        }

    # --- single heads, and the smallest sets ---

    @functools.cached_property
    def single(self) -> pd.DataFrame:
        """Each head alone, as in the tables."""
        return head_effects(self.run, self.settings)

    def _fine(self) -> Int[np.ndarray, "checkpoint layer head"]:
        """Each head alone in ten-thousandths of a nat, so that sums of them are right to two decimals; zero for heads
        that were not patched alone."""
        fine = np.zeros((*self.effects.mean.shape[:2], self.mask.shape[1]), dtype=np.int64)
        for row in np.flatnonzero(self.mask.sum(1) == 1):
            fine[..., self.mask[row].argmax()] = np.rint(self.effects.mean[..., row] * 10_000)
        return fine

    def _starts(self) -> list[dict[str, Any]]:
        """Where heads start to matter: those that are significant where it tells, by the checkpoint of their onset."""
        single = self.single
        at = telling_checkpoint(single) if len(single) else None
        if at is None:
            return []
        labels = [str(label) for label in self.result.table.index]
        by: dict[int, list[str]] = {}
        for head in rank_heads(single, at):
            if head.is_significant and head.by is not None:
                by.setdefault(labels.index(head.by), []).append(str(head))
        return [{"checkpoint": place, "heads": heads} for place, heads in sorted(by.items())]

    def _smallest(self) -> dict[str, Any]:
        """Smallest sufficient and necessary sets of heads by checkpoint and layer, as in the tables: bits, -1 for none,
        and how many such sets there are."""
        found = np.array([[_smallest_sets(cell) for cell in layer] for layer in self.sign * self.effects.mean])
        names = ("sufficient", "necessary")
        return {
            name: {"bits": pack(found[:, :, at, 0]), "count": pack(found[:, :, at, 1])} for at, name in enumerate(names)
        }

    def _shapley(self) -> dict[str, Any] | None:
        """Shapley values with intervals over prompts: exact, or from sampled orders, where either is known."""
        if self.lattice:
            named = self._exact_shapley()
        else:
            statistics = sampled(self.run, self.settings)
            if statistics is None:
                return None
            ordered = ("shapley", *("shapley_low", "shapley_high")[:: self.sign])  # turned over, the ends change places
            named = [self.sign * statistics[name].transpose("checkpoint", "layer", "head").values for name in ordered]
        value, low, high = (pack(hundredths(np.asarray(values))) for values in named)
        return {"value": value, "low": low, "high": high, "exact": self.lattice}

    def _exact_shapley(self) -> list[Float[np.ndarray, "checkpoint layer head"]]:
        parts = []
        for towards in effects_by_checkpoint(self.run, self.settings.direction):
            by_trial = np.stack([shapley.shapley(self.sign * layer[self.rows]) for layer in towards])
            parts.append(np.stack([by_trial.mean(-1), *interval(by_trial)]))
        return list(np.stack(parts, axis=1))


def _spread(effects: Effects) -> dict[str, Any]:
    """Intervals by what compresses best: width, and how far their middle is from the mean, doubled."""
    low, mean, high = (hundredths(values) for values in (effects.low, effects.mean, effects.high))
    return {"width": pack(high - low), "lean": pack(high + low - 2 * mean), "ratio": None, "rows": None}


def _coarse_spread(effects: Effects) -> dict[str, Any]:
    """How far the ends of intervals are from the mean, in powers of a ratio: the lower end, and the upper beside it."""
    below, above = (powers(np.abs(end - effects.mean)) for end in (effects.low, effects.high))
    return {"width": pack(below), "lean": pack(above - below), "ratio": RATIO, "rows": None}


def _smallest_sets(mean: Float[np.ndarray, " subset"]) -> list[list[int]]:
    """(bits, count) of the smallest sufficient and the smallest necessary set, as in `head_subset_statistics`."""
    whole = mean[-1] if mean[-1] >= CLEAR_OF_ZERO else np.inf
    sufficient = shapley.smallest_sufficient(mean, SHARE * whole)
    necessary = shapley.smallest_necessary(mean, (1 - SHARE) * whole if np.isfinite(whole) else -np.inf)
    return [
        [shapley.index_of(found.heads) if found.size >= 0 else -1, found.count] for found in (sufficient, necessary)
    ]


def _nearest(mask: Bool[np.ndarray, "subset head"], most: int) -> Int[np.ndarray, " row"]:
    """At most so many rows, in their order: sets of few heads and of all but few before others, even and odd kept."""
    if len(mask) <= most:
        return np.arange(len(mask))
    size, even = mask.sum(1), np.arange(mask.shape[1]) % 2 == 0
    distance = np.minimum(size, mask.shape[1] - size)
    distance = np.where((mask == even).all(1) | (mask == ~even).all(1), 0, distance)
    return np.sort(np.argsort(distance, kind="stable")[:most])
