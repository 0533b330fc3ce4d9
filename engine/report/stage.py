"""What the page carries for its stage: the numbers of a store's patched runs, made small enough for one file.

Means and intervals are those of the tables, rounded to hundredths of a nat.  The effect of the page's run is always
there; what else there is room for, is, and what is left out is named in `notes`.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from markupsafe import Markup

from ..measures.logit_diff import CLEAR_OF_ZERO, NAMED, effects_by_checkpoint
from ..mechanism.role_summary import in_role
from ..mechanism.store import MechanismRun, mechanism_path
from ..runtime.errors import UserError
from ..statistics import shapley
from ..statistics.bootstrap import LEVEL
from ..statistics.head_effects import head_effects, rank_heads, telling_checkpoint
from ..statistics.head_subsets import SHARE, all_subset_rows, sampled
from ..statistics.means import interval
from ..store.disk import is_group
from ..store.store import Store
from ..store.zarr_group import dims_of
from ..study.prompts import Trials
from .packing import MISSING, hundredths, pack, size_of
from .plot_style import axis_name, place_steps, step_labels
from .result import Result, ranges, read_result

MOST_EFFECTS = 700_000
"""Effects of one run that are carried, as means over prompts: all subsets of 12 layers of 12 heads at 11 checkpoints
are 540,672.  Of more the subsets nearest to no head and to all heads are."""

MOST_TEXT = 2_100_000
"""Characters that numbers take in all, with intervals of every subset."""

DETAIL_TEXT = 850_000
"""Characters up to which there is room for details: single prompts, other measures, other runs."""

DETAIL_EFFECTS = 4_000_000
"""Effects of single prompts above which none is tried: they could not fit."""

MOST_PROMPTS = 200
"""Prompts whose tokens are carried."""


def stage_payload(store: Store, result: Result) -> dict[str, Any]:
    """What `stage.js` shows: the runs of the corrected protocol, that of the page first, prompts and mechanism."""
    first = _Run(store, result)
    payload: dict[str, Any] = {
        "store": str(store.path),
        "model": Path(store.study["model"]).name,
        "task": Path(str(store.study["task"])).name,
        "level": round(100 * LEVEL),
        "missing": MISSING,
        "start": first.start(),
        "prompts": _prompts(store.trials()),
        "mechanism": None,
        "runs": [first.carried(0)],
        "notes": [],
    }
    if mechanism := _mechanism(store):
        _add_if_it_fits(payload, "mechanism", mechanism, "what heads attend to, and their roles")
    for name in reversed(store.patch_names("corrected")):
        if name != result.name:
            _add_run(payload, store, name)
    return payload


def as_json(payload: dict[str, Any]) -> Markup:
    """The text of a `script` element: names in it, whatever they are, cannot end the element."""
    text = json.dumps(payload, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def stage_html(store: Store, result: Result) -> tuple[Markup, Markup]:
    """The stage's place in the page, hidden until its script has run, and what the page ends in: numbers and script."""
    if not can_be_staged(store, result.name):
        return Markup(""), Markup("")
    return embedded("stage", source("stage.css"), source("stage.js"), "mount", stage_payload(store, result))


def embedded(looks: str, style: str, script: str, begin: str, payload: dict[str, Any]) -> tuple[Markup, Markup]:
    """A place of the class `looks`, and what a page ends in: the numbers, and the script, whose function `begin` is
    called with both."""
    place = Markup(f'<style>{style}</style>\n<section class="{looks}" id="stage" hidden></section>')
    numbers = 'JSON.parse(document.getElementById("stage-numbers").textContent)'
    return place, Markup(
        f'<script type="application/json" id="stage-numbers">{as_json(payload)}</script>\n'
        f'<script type="module">\n{script}\n{begin}(document.getElementById("stage"), {numbers});\n</script>'
    )


def source(name: str) -> str:
    """A file beside this module, as it goes into a page."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    assert "</s" not in text and "<!--" not in text, f"{name} would end its element"
    return text


def _add_if_it_fits(payload: dict[str, Any], name: str, value: Any, words: str) -> None:
    if size_of([payload, value]) <= DETAIL_TEXT:
        payload[name] = value
    else:
        payload["notes"].append(f"no room on this page for {words}")


def _add_run(payload: dict[str, Any], store: Store, name: str) -> None:
    """Another run of the store, where there is room; else a note."""
    taken = size_of(payload)
    if not can_be_staged(store, name):
        payload["notes"].append(f"the run {name} is not on this page: it has more than layers and subsets of heads")
        return
    if store.patch(name).array("logit_diff").size > DETAIL_EFFECTS or taken > DETAIL_TEXT:
        payload["notes"].append(f"no room on this page for the run {name}")
        return
    try:
        run = _Run(store, read_result(store, name)).carried(taken)
    except UserError as problem:
        payload["notes"].append(str(problem))
        return
    if taken + size_of(run) > DETAIL_TEXT:
        payload["notes"].append(f"no room on this page for the run {name}")
    else:
        payload["runs"].append(run)


def can_be_staged(store: Store, name: str) -> bool:
    """Whether a run has one effect for each checkpoint, layer, subset and prompt."""
    return dims_of(store.patch(name).array("logit_diff")) == ("checkpoint", "layer", "subset", "trial")


@dataclass(frozen=True)
class _Effects:
    """Means over prompts of one run, for the subsets that are carried.  Patched minus unpatched target run."""

    mean: Float[np.ndarray, "checkpoint layer subset"]
    low: Float[np.ndarray, "checkpoint layer subset"]
    high: Float[np.ndarray, "checkpoint layer subset"]

    by_prompt: Float[np.ndarray, "checkpoint layer trial subset"] | None
    """None where these are too many."""


class _Run:
    """One patched run on its way into the page."""

    def __init__(self, store: Store, result: Result) -> None:
        self.store, self.result, self.settings = store, result, result.settings
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
        self.effects = self._read()

    def _read(self) -> _Effects:
        shape = [self.run.sizes[dim] for dim in ("checkpoint", "layer", "trial")]
        keeps_prompts = np.prod(shape) * len(self.rows) <= DETAIL_EFFECTS
        means, lows, highs, prompts = (list[np.ndarray]() for _ in range(4))
        for towards in effects_by_checkpoint(self.run, self.settings.direction):
            effect = self.sign * towards[:, self.rows]
            low, high = interval(effect)
            for values, of in ((means, effect.mean(-1)), (lows, low), (highs, high)):
                values.append(of)
            if keeps_prompts:
                prompts.append(effect.transpose(0, 2, 1))
        return _Effects(np.array(means), np.array(lows), np.array(highs), np.array(prompts) if prompts else None)

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

    @functools.cached_property
    def single(self) -> pd.DataFrame:
        """Each head alone, as in the tables."""
        return head_effects(self.run, self.settings)

    def carried(self, taken: int) -> dict[str, Any]:
        """Everything that there is room for beside `taken` characters."""
        result, run = self.result, self.run
        n_heads, n_trials = self.mask.shape[1], run.sizes["trial"]
        x, is_log = place_steps(result.positions)
        carried: dict[str, Any] = {
            "name": result.name, "direction": self.settings.direction, "source": result.source,
            "target": result.target, "positions": self.settings.positions, "joint": self.settings.joint,
            "n_heads": n_heads, "n_trials": n_trials, "n_subsets": run.sizes["subset"],
            "subsets": list(self.settings.subsets), "dtype": self.settings.dtype,
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
            "unpatched": {name: pack(hundredths(self._unpatched(name).mean(-1))) for name in ("clean", "corrupt")},
            "mean": pack(hundredths(self.effects.mean), self.lattice),
            "fine": pack(self._fine()),
            "spread": None, "by_prompt": None, "success": None, "recovery": None,
            "significant": self._significant(), "starts": self._starts(),
            "sufficient": None, "necessary": None, "shapley": self._shapley(),
            "notes": list(self._notes()),
        }  # fmt: skip
        if self.lattice:
            carried |= self._smallest()
        self._add_spread(carried, taken)
        for name, words in (("success", "success rates"), ("recovery", "normalised recovery")):
            self._add(carried, taken, name, getattr(self, f"_{name}")(), words)
        self._add(carried, taken, "by_prompt", self._by_prompt(), "the effect on each prompt")
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

    def _add(self, carried: dict[str, Any], taken: int, name: str, value: Any, words: str) -> None:
        if value is not None and taken + size_of([carried, value]) <= DETAIL_TEXT:
            carried[name] = value
        elif value is not None or self.effects.by_prompt is None:
            carried["notes"].append(f"no room on this page for {words}")

    def _add_spread(self, carried: dict[str, Any], taken: int) -> None:
        """Intervals of all subsets that are carried, where there is room; else of single heads and the like."""
        if self.run.sizes["trial"] < 2:
            return
        spread = self._spread(np.arange(len(self.rows)), self.lattice)
        if taken + size_of([carried, spread]) > MOST_TEXT:
            sizes, n = self.mask.sum(1), self.mask.shape[1]
            few = np.flatnonzero((sizes <= 1) | (sizes >= n - 1) | self._is_named())
            spread = self._spread(few, False) | {"rows": few.tolist()}
            carried["notes"].append(
                "no room on this page for the intervals of all subsets: single heads, all but one, even, odd, all and "
                "none have theirs"
            )
        carried["spread"] = spread

    def _is_named(self) -> Bool[np.ndarray, " subset"]:
        labels = self.run.subset.values[self.rows]
        return np.isin(labels.astype(str), ("none", *NAMED))

    def _spread(self, rows: Int[np.ndarray, " row"], lattice: bool) -> dict[str, Any]:
        """Intervals by what compresses best: width, and how far their middle is from the mean, doubled."""
        low, mean, high = (
            hundredths(values[..., rows]) for values in (self.effects.low, self.effects.mean, self.effects.high)
        )
        return {"width": pack(high - low), "lean": pack(high + low - 2 * mean), "rows": None}

    def _unpatched(self, name: str) -> Float[np.ndarray, "checkpoint trial"]:
        values: Float[np.ndarray, "checkpoint trial"] = self.run[f"{name}_logit_diff"].values.astype(float)
        return values

    def _patched(self) -> Float[np.ndarray, "checkpoint layer trial subset"] | None:
        """Logit differences of the patched runs, prompt by prompt; None where these are too many."""
        if self.effects.by_prompt is None:
            return None
        patched: Float[np.ndarray, "checkpoint layer trial subset"] = (
            self.run.logit_diff.values[:, :, self.rows].transpose(0, 1, 3, 2).astype(float)
        )
        return patched

    def _by_prompt(self) -> dict[str, Any] | None:
        """Effects prompt by prompt, and the unpatched logit differences."""
        if self.effects.by_prompt is None:
            return None
        unpatched = {name: pack(hundredths(self._unpatched(name))) for name in ("clean", "corrupt")}
        return {"effect": pack(hundredths(self.effects.by_prompt), self.lattice), **unpatched}

    def _success(self) -> dict[str, Any] | None:
        """How many prompts that the target run fails a patch restores, and how many others it breaks."""
        patched = self._patched()
        if patched is None:
            return None
        right, target = patched > 0, self._unpatched(self.result.target)[:, None, :, None] > 0
        restored, broken = (right & ~target).sum(2), (~right & target).sum(2)
        return {
            "restored": pack(restored), "broken": pack(broken),
            "right": pack((self._unpatched(self.result.target) > 0).sum(1)),
        }  # fmt: skip

    def _recovery(self) -> dict[str, Any] | None:
        """Mean normalised recovery over the prompts whose gap is clear of zero, with intervals; in percent of it."""
        if self.effects.by_prompt is None:
            return None
        gap = self._unpatched(self.result.source) - self._unpatched(self.result.target)
        clear = np.abs(gap) >= CLEAR_OF_ZERO
        shape = self.effects.mean.shape
        mean, low, high = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
        for at in np.flatnonzero(clear.any(1)):
            share = self.effects.by_prompt[at][:, clear[at]] / gap[at, clear[at]][None, :, None]
            mean[at] = share.mean(1)
            low[at], high[at] = interval(share.transpose(0, 2, 1))
        if not clear.any():
            return {"n_clear": clear.sum(1).tolist(), "mean": None, "low": None, "high": None}
        packed = {"mean": pack(hundredths(mean)), "low": pack(hundredths(low)), "high": pack(hundredths(high))}
        return {"n_clear": clear.sum(1).tolist(), **packed}

    def _fine(self) -> Int[np.ndarray, "checkpoint layer head"]:
        """Each head alone in ten-thousandths of a nat, so that sums of them are right to two decimals; zero for heads
        that were not patched alone."""
        fine = np.zeros((*self.effects.mean.shape[:2], self.mask.shape[1]), dtype=np.int64)
        for row in np.flatnonzero(self.mask.sum(1) == 1):
            fine[..., self.mask[row].argmax()] = np.rint(self.effects.mean[..., row] * 10_000)
        return fine

    def _significant(self) -> dict[str, Any] | None:
        """Whether the effect of each head alone is (adjusted over all heads and checkpoints); None where unknown."""
        single = self.single
        if single.empty or single["p_adjusted"].isna().any():
            return None
        heads = single.index.unique("head").tolist()
        is_so = (single["p_adjusted"] <= 1 - LEVEL).to_numpy().reshape((*self.effects.mean.shape[:2], len(heads)))
        return {"heads": heads, "is": pack(is_so.astype(np.int64))}

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


def _prompts(trials: Trials) -> dict[str, Any]:
    """Tokens of both prompts of each pair, and the answers."""
    shown = min(trials.n_trials, MOST_PROMPTS)
    tokens = [
        [[str(token) for token in trials.token_text[run, trial, : trials.length[run, trial]]] for run in range(2)]
        for trial in range(shown)
    ]
    answers = [[contrast.answer, contrast.wrong] for contrast in trials.contrasts[:shown]]
    return {"n": trials.n_trials, "tokens": tokens, "answers": answers}


def _mechanism(store: Store) -> dict[str, Any] | None:
    """What heads attend to from the read position, and their roles, where `headlapse mechanism` measured either."""
    if not is_group(mechanism_path(store)):
        return None
    run = MechanismRun(mechanism_path(store)).load()
    complete = run.isel(checkpoint=np.flatnonzero(run.complete.values))
    if not complete.sizes["checkpoint"] or not {"attention", "role_score"} & set(complete):
        return None
    found: dict[str, Any] = {
        "checkpoints": [str(label) for label in complete.checkpoint.values],
        "layers": [int(layer) for layer in complete.layer.values],
    }
    if "attention" in complete:
        shares = complete.attention.transpose("checkpoint", "layer", "head", "run", "trial", "to").values.astype(float)
        by_prompt = shares.size <= DETAIL_EFFECTS // 8
        found["attention"] = {
            "to": [str(to) for to in complete.to.values],
            "mean": pack(hundredths(shares.mean(4))),
            "by_prompt": pack(hundredths(shares[:, :, :, 0])) if by_prompt else None,
        }
    if "role_score" in complete:
        dims = ("checkpoint", "layer", "head", "role")
        found["roles"] = {
            "names": [str(role) for role in complete.role.values],
            "score": pack(hundredths(complete.role_score.transpose(*dims).values.astype(float))),
            "null": pack(hundredths(complete.role_null.transpose(*dims).values.astype(float))),
            "has": pack(in_role(complete).transpose(*dims).values.astype(np.int64)),
        }
    return found
