"""The mechanism at every checkpoint of a store: no prompt is run again, weights are read once more."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.model import ModelLoader, ResidentModel
from ..checkpoints.revisions import RevisionIndex, select
from ..replay.cached_checkpoints import LoadedCheckpoint, load_each
from ..replay.layers import LayerRunner
from ..replay.patch_inputs import PatchInputs
from ..replay.replay import replay, runs_at_once
from ..runtime.errors import UserError, VerificationError
from ..runtime.outcome import Outcome
from ..runtime.resources import Machine
from ..store.activations import Activations
from ..store.store import Store
from ..study.alignment import align
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from ..study.study import RUNS, Arithmetic, tolerance
from .attention import attention, shares
from .attribution_patching import estimated_effect
from .circuits import CIRCUITS, Circuit, circuits
from .direct_logit_attribution import attribute
from .store import NEIGHBOURS, PARTS, MechanismRun

Values = dict[str, np.ndarray]
Circuits = Mapping[int, tuple[Circuit, Circuit]]


@dataclass(frozen=True)
class MechanismPlan:
    """What is asked of every checkpoint of one store."""

    settings: dict[str, Any]
    trials: Trials

    layers: range
    """Those kept, up to the model's last."""

    parts: tuple[str, ...]

    direction: Direction
    """Of attribution patching."""

    dtype: Arithmetic

    @property
    def reads_runs(self) -> bool:
        """Whether anything but weights is looked at."""
        return self.parts != ("weights",)


def make_plan(
    store: Store,
    parts: Sequence[str] = PARTS,
    direction: Direction = "denoise",
    dtype: Arithmetic | None = None,
) -> MechanismPlan:
    """Raises `UserError` for what the store cannot answer."""
    if "resid_pre" not in store.kinds():
        raise UserError(
            f"{store.path} was cached with --sites z, which holds no residual stream; cache again with --sites all "
            "--overwrite"
        )
    ordered = tuple(part for part in PARTS if part in parts)
    layers = range(store.layers[0], store.layers[-1] + 1)
    arithmetic: Arithmetic = dtype or store.study["dtype"]
    settings = {"parts": list(ordered), "direction": direction, "positions": "last", "dtype": arithmetic}
    return MechanismPlan(settings, store.trials(), layers, ordered, direction, arithmetic)


def wanted(store: Store, asked: Sequence[str] = ("all",)) -> dict[str, dict[str, str]]:
    """The finished checkpoints that words of `--checkpoints` name, in order of training, each with its neighbours.

    Raises `UserError` for what the store does not hold.
    """
    labels = list(store.complete())
    steps = {row.label: row.step for row in store.rows() if row.label in labels}
    shelf = RevisionIndex(str(store.path), lambda: steps, "all")
    chosen = {label for word in asked for label in select(shelf, word)}
    neighbours = {
        label: {"previous": labels[index - 1] if index else "", "last": labels[-1]}
        for index, label in enumerate(labels)
    }
    return {label: neighbours[label] for label in labels if label in chosen}


def measure_series(
    store: Store,
    plan: MechanismPlan,
    run: MechanismRun,
    missing: Mapping[str, Mapping[str, str]],
    cache: Path,
    machine: Machine,
    done: Callable[[int], object],
) -> Iterator[Outcome]:
    """Measure every missing checkpoint; `done` hears of each.

    Weights that cannot be had, also those that were only to be compared with, are an `Outcome` with a problem; what
    would be compared with them is NaN, and done again the next time.  Raises `VerificationError` where the shares of a
    logit difference do not sum to it.
    """
    compared = _Compared(plan.layers)
    visits = _visits(missing) if "weights" in plan.parts else [(label, True) for label in missing]
    loader = ModelLoader(plan.dtype, machine)
    first_layer = plan.layers[0] if plan.reads_runs else None
    checkpoints = load_each(store, [label for label, _ in visits], cache, loader, first_layer)
    for (label, is_measured), (_, checkpoint) in zip(visits, checkpoints, strict=True):
        if isinstance(checkpoint, UserError):
            yield Outcome(label, str(checkpoint))
            continue
        if "weights" in plan.parts:
            compared.hold(label, checkpoint.resident)
        if is_measured:
            values: Values = _of_runs(store, plan, label, checkpoint) if plan.reads_runs else {}
            neighbours: dict[str, str] = {}
            if "weights" in plan.parts:
                weights, neighbours = compared.with_neighbours(label, missing[label])
                values |= weights
            run.write(label, values, neighbours)
            done(1)
            yield Outcome(label)
        compared.forget(label, missing)


def _visits(missing: Mapping[str, Mapping[str, str]]) -> list[tuple[str, bool]]:
    """Checkpoints in the order in which their weights are needed, and whether each is measured then.

    The last one comes first, since all are compared with it.
    """
    last = {one["last"] for one in missing.values()}
    visits = [(label, False) for label in last - set(list(missing)[:1])]
    before = ""
    for label, neighbours in missing.items():
        if neighbours["previous"] not in ("", before):
            visits.append((neighbours["previous"], False))
        visits.append((label, True))
        before = label
    return visits


class _Compared:
    """The circuits that are still to be compared with: those of the last checkpoint and of the one before."""

    def __init__(self, layers: range) -> None:
        self.layers = layers
        self._held: dict[str, Circuits] = {}

    def hold(self, label: str, resident: ResidentModel) -> None:
        if label not in self._held:
            self._held[label] = circuits(resident, self.layers)

    def forget(self, label: str, missing: Mapping[str, Mapping[str, str]]) -> None:
        """Drop all but `label` and the last."""
        last = {one["last"] for one in missing.values()}
        self._held = {held: found for held, found in self._held.items() if held == label or held in last}

    def with_neighbours(self, label: str, neighbours: Mapping[str, str]) -> tuple[Values, dict[str, str]]:
        """Norms, changes and cosines (circuit, layer, head), and which neighbours could be compared with.

        NaN for one that could not be.
        """
        found = {name: self._held.get(neighbours[name]) for name in NEIGHBOURS}
        previous, last = found["previous"], found["last"]
        values = {
            "norm": self._each(lambda one, _: one.norm(), label, self._held[label]),
            "change": self._each(Circuit.change, label, previous),
            "to_previous": self._each(Circuit.cosine, label, previous),
            "to_last": self._each(Circuit.cosine, label, last),
        }
        return values, {name: neighbours[name] if found[name] is not None else "" for name in NEIGHBOURS}

    def _each(self, ask: Callable[[Circuit, Circuit], Tensor], label: str, other: Circuits | None) -> np.ndarray:
        mine = self._held[label]
        n_heads = len(mine[self.layers[0]][0].left)
        if other is None:
            return np.full((len(CIRCUITS), len(self.layers), n_heads), np.nan, dtype=np.float32)
        found = [[ask(mine[layer][kind], other[layer][kind]) for layer in self.layers] for kind in range(len(CIRCUITS))]
        return torch.stack([torch.stack(row) for row in found]).float().cpu().numpy()


@torch.no_grad()
def _of_runs(store: Store, plan: MechanismPlan, label: str, checkpoint: LoadedCheckpoint) -> Values:
    """All that is measured of one checkpoint's runs."""
    assert checkpoint.activations is not None
    values: Values = {}
    alignment = align(plan.trials, "last")
    directions: dict[str, Direction] = {"clean": "noise", "corrupt": "denoise"}
    lay = {
        run: PatchInputs.from_capture(
            checkpoint.resident, checkpoint.activations, plan.trials, alignment, directions[run]
        )
        for run in RUNS
    }
    runners = {run: LayerRunner(checkpoint.resident, inputs) for run, inputs in lay.items()}
    if "attribution" in plan.parts:
        values |= _attribution(plan, runners)
        values["self_check"] = _self_check(store, plan, label, values)
    if "attention" in plan.parts:
        values["attention"] = _attention(plan, runners)
    if "patching" in plan.parts:
        target = next(run for run in RUNS if directions[run] == plan.direction)
        values["effect"] = exact_effect(plan, checkpoint.resident, checkpoint.activations, checkpoint.memory)
        values["estimate"] = estimated_effect(runners[target], plan.layers).cpu().numpy()
    return values


def _attribution(plan: MechanismPlan, runners: Mapping[str, LayerRunner]) -> Values:
    found = [attribute(runners[run], plan.layers) for run in RUNS]

    def by_run(parts: list[Tensor]) -> np.ndarray:
        return torch.stack(parts, dim=-2).cpu().numpy()

    return {
        "attribution": by_run([one.heads for one in found]),
        "attribution_rest": by_run([one.rest for one in found]),
        "attribution_start": by_run([one.start for one in found]),
        "attribution_constant": by_run([one.constant for one in found]),
    }


def _self_check(store: Store, plan: MechanismPlan, label: str, values: Values) -> np.ndarray:
    """The largest difference between the sum of all shares and the stored logit difference, in nats."""
    logits = store.answer_logits(store.index(label))
    total = values["attribution"].sum((0, 1), dtype=np.float64) + values["attribution_rest"].sum(0, dtype=np.float64)
    total += values["attribution_start"] + values["attribution_constant"]
    difference = np.abs(total - (logits[..., 0] - logits[..., 1])).max()
    allowed = tolerance(plan.dtype, store.study["dtype"])
    if not difference <= allowed:
        raise VerificationError(
            f"{label}: the shares of heads and all else sum to a logit difference that is {difference:.2g} off, more "
            f"than {allowed:.2g}; either the weights are not those that were cached (cache again with --overwrite) or "
            "headlapse does not compute this architecture rightly"
        )
    return np.asarray(difference)


def _attention(plan: MechanismPlan, runners: Mapping[str, LayerRunner]) -> np.ndarray:
    """(layer, head, run, trial, to)"""
    found = []
    for index, run in enumerate(RUNS):
        inputs = runners[run].inputs
        has_digit = np.vectorize(lambda text: any(map(str.isdigit, text)), otypes=[bool])
        digits = torch.from_numpy(has_digit(plan.trials.token_text[index])).to(inputs.device)
        read = inputs.positions[inputs.target, :, 0]
        of_layers = [shares(attention(runners[run], layer), read, digits) for layer in plan.layers]
        found.append(torch.stack(of_layers).transpose(1, 2))
    return torch.stack(found, dim=2).cpu().numpy()


def exact_effect(plan: MechanismPlan, resident: ResidentModel, activations: Activations, memory: int) -> np.ndarray:
    """How far patching each head by itself moves the logit difference, replayed: (layer, head, trial), in nats."""
    n_heads = resident.architecture.n_heads
    none_and_each = np.eye(n_heads + 1, n_heads, k=-1, dtype=bool)
    found = replay(
        resident,
        activations,
        plan.trials,
        align(plan.trials, "last"),
        plan.direction,
        sites=[(layer,) for layer in plan.layers],
        mask=none_and_each,
        runs=runs_at_once(resident, plan.trials.n_trials, memory),
    )
    return found[:, 1:] - found[:, :1]
