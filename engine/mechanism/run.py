"""The mechanism at every checkpoint of a store: weights are read again, no prompt is.

Attribution, attention and patching are computed from the stored activations; only the read position is run.  Roles are
scored on random tokens and single words besides.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoints.loader import ModelLoader
from ..checkpoints.model import ResidentModel
from ..checkpoints.tokenizer import load_tokenizer
from ..replay.cached_checkpoints import LoadedCheckpoint, each_outcome, load_each
from ..replay.layers import LayerRunner
from ..replay.patch_inputs import PatchInputs
from ..replay.replay import replay, runs_at_once
from ..runtime.errors import UserError, VerificationError
from ..runtime.outcome import Outcome
from ..runtime.resources import Machine
from ..store.activations import Activations
from ..store.store import Store
from ..study.alignment import align
from ..study.mechanism_settings import PARTS, MechanismSettings
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from ..study.study import RUNS, Arithmetic, tolerance
from .attention import attention, shares
from .attribution_patching import estimated_effect
from .circuits import CIRCUITS, Circuit, circuits
from .direct_logit_attribution import attribute
from .roles import RoleInputs, RoleScores, score_roles
from .store import NEIGHBOURS, MechanismRun

Values = dict[str, np.ndarray]
"""Array name -> one checkpoint's values."""

Circuits = Mapping[int, tuple[Circuit, Circuit]]
"""Layer -> (QK, OV)."""

Wanted = Mapping[str, Mapping[str, str]]
"""Label -> the labels of its neighbours, `previous` and `last`, in order of training."""

_DIRECTION_INTO: dict[str, Direction] = {"clean": "noise", "corrupt": "denoise"}
"""The direction of a patch whose target is the clean or the corrupt run."""


@dataclass(frozen=True)
class MechanismPlan:
    """What is measured at every checkpoint of one store."""

    settings: MechanismSettings
    trials: Trials

    layers: range
    """The layers in the store, up to the model's last."""

    @property
    def dtype(self) -> Arithmetic:
        """Arithmetic of everything that is computed."""
        return self.settings.dtype

    @property
    def reads_activations(self) -> bool:
        """Whether anything besides weights is needed."""
        return self.settings.parts != ("weights",)


def make_plan(
    store: Store,
    parts: Sequence[str] = PARTS,
    direction: Direction = "denoise",
    dtype: Arithmetic | None = None,
) -> MechanismPlan:
    """The plan for `parts`; `dtype` None is the store's.  Raises `UserError` where the store holds too little."""
    if "resid_pre" not in store.kinds():
        raise UserError(
            f"{store.path} was cached with --sites z, which holds no residual stream; cache again with --sites all "
            "--overwrite"
        )
    layers = range(store.layers[0], store.layers[-1] + 1)
    settings = MechanismSettings.of_parts(parts, direction, dtype or store.study["dtype"])
    return MechanismPlan(settings, store.trials(), layers)


def wanted(store: Store, labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Finished checkpoints by label, each with its neighbours in order of training."""
    finished = list(store.complete())
    neighbours = {
        label: {"previous": finished[index - 1] if index else "", "last": finished[-1]}
        for index, label in enumerate(finished)
    }
    return {label: neighbours[label] for label in labels}


def measure_series(
    store: Store,
    plan: MechanismPlan,
    run: MechanismRun,
    missing: Wanted,
    cache: Path,
    machine: Machine,
    advance: Callable[[int], object],
) -> Iterator[Outcome]:
    """Measure and write every missing checkpoint; `advance` is called with 1 after each.

    A checkpoint whose weights cannot be read, also one that is only to be compared with, or whose contributions do not
    sum to its logit difference, gives an `Outcome` with a problem.  Comparisons with it are NaN, and are measured again
    the next time.
    """
    compares = "weights" in plan.settings.parts
    comparison = _WeightComparison(plan.layers)
    visits = _visits(missing) if compares else [(label, True) for label in missing]
    loader = ModelLoader(plan.dtype, machine)
    first_layer = plan.layers[0] if plan.reads_activations else None

    tokenizers: list[Any] = []

    def measure(label: str, checkpoint: LoadedCheckpoint) -> None:
        values = _measure_activations(store, plan, label, checkpoint) if plan.reads_activations else {}
        neighbours: dict[str, str] = {}
        fields: dict[str, Any] = {}
        if "roles" in plan.settings.parts:
            # The first checkpoint's serves all: the store's prompts have the same tokens at each.
            tokenizers[:] = tokenizers or [load_tokenizer(checkpoint.files.vocabulary.parent)]
            roles = _roles(plan, checkpoint, tokenizers[0])
            values |= roles.arrays()
            fields["roles"] = dict(roles.drawn)
        if compares:
            weights, neighbours = comparison.with_neighbours(label, missing[label])
            values |= weights
        run.write(label, values, neighbours, **fields)
        advance(1)

    def visit(label: str, checkpoint: LoadedCheckpoint, is_measured: bool) -> None:
        if compares:
            comparison.add(label, checkpoint.resident)
        if is_measured:
            measure(label, checkpoint)
        comparison.drop_all_but(label, missing)

    checkpoints = load_each(store, [label for label, _ in visits], cache, loader, first_layer)
    for (label, is_measured), (_, checkpoint) in zip(visits, checkpoints, strict=True):
        [outcome] = each_outcome([(label, checkpoint)], functools.partial(visit, is_measured=is_measured))
        if outcome.problem or is_measured:
            yield outcome


def _visits(missing: Wanted) -> list[tuple[str, bool]]:
    """The checkpoints in the order in which their weights are needed, and whether each is measured then.

    The final checkpoint comes first, since all are compared with it.
    """
    last = {neighbours["last"] for neighbours in missing.values()}
    visits = [(label, False) for label in last - set(list(missing)[:1])]
    before = ""
    for label, neighbours in missing.items():
        if neighbours["previous"] not in ("", before):
            visits.append((neighbours["previous"], False))
        visits.append((label, True))
        before = label
    return visits


class _WeightComparison:
    """Holds the circuits that later checkpoints are compared with: the final checkpoint's and the one's before."""

    def __init__(self, layers: range) -> None:
        self.layers = layers
        self._circuits: dict[str, Circuits] = {}

    def add(self, label: str, resident: ResidentModel) -> None:
        if label not in self._circuits:
            self._circuits[label] = circuits(resident, self.layers)

    def drop_all_but(self, label: str, missing: Wanted) -> None:
        """Drop the circuits of every checkpoint but `label` and the final one."""
        needed = {label} | {neighbours["last"] for neighbours in missing.values()}
        self._circuits = {name: by_layer for name, by_layer in self._circuits.items() if name in needed}

    def with_neighbours(self, label: str, neighbours: Mapping[str, str]) -> tuple[Values, dict[str, str]]:
        """Norms, changes and cosines, each (circuit, layer, head), and the neighbours that could be compared with.

        NaN where a neighbour could not be read; its label is then empty.
        """
        compared = {name: self._circuits.get(neighbours[name]) for name in NEIGHBOURS}
        previous, last = compared["previous"], compared["last"]
        values = {
            "norm": self._each(lambda circuit, _: circuit.norm(), label, self._circuits[label]),
            "change": self._each(Circuit.change, label, previous),
            "to_previous": self._each(Circuit.cosine, label, previous),
            "to_last": self._each(Circuit.cosine, label, last),
        }
        return values, {name: neighbours[name] if compared[name] is not None else "" for name in NEIGHBOURS}

    def _each(
        self, compare: Callable[[Circuit, Circuit], Tensor], label: str, other: Circuits | None
    ) -> Float[np.ndarray, "circuit layer head"]:
        own = self._circuits[label]
        n_heads = len(own[self.layers[0]][0].left)
        if other is None:
            return np.full((len(CIRCUITS), len(self.layers), n_heads), np.nan, dtype=np.float32)
        by_circuit = [
            torch.stack([compare(own[layer][kind], other[layer][kind]) for layer in self.layers])
            for kind in range(len(CIRCUITS))
        ]
        return torch.stack(by_circuit).float().cpu().numpy()


@torch.no_grad()
def _measure_activations(store: Store, plan: MechanismPlan, label: str, checkpoint: LoadedCheckpoint) -> Values:
    """Every part of one checkpoint that its activations give."""
    assert checkpoint.activations is not None
    values: Values = {}
    runners = _runners(plan, checkpoint)
    if "attribution" in plan.settings.parts:
        values |= _attribution(plan, runners)
        values["self_check"] = _self_check(store, plan, label, values)
    if "attention" in plan.settings.parts:
        values["attention"] = _attention(plan, runners)
    if "patching" in plan.settings.parts:
        target = next(run for run in RUNS if _DIRECTION_INTO[run] == plan.settings.direction)
        values["effect"] = exact_effect(plan, checkpoint.resident, checkpoint.activations, checkpoint.memory)
        values["estimate"] = estimated_effect(runners[target], plan.layers).cpu().numpy()
    return values


def _runners(plan: MechanismPlan, checkpoint: LoadedCheckpoint) -> dict[str, LayerRunner]:
    """By run, at the read position."""
    assert checkpoint.activations is not None
    resident, alignment = checkpoint.resident, align(plan.trials, "last")
    return {
        run: LayerRunner(
            resident,
            PatchInputs.from_capture(resident, checkpoint.activations, plan.trials, alignment, _DIRECTION_INTO[run]),
        )
        for run in RUNS
    }


@torch.no_grad()
def _roles(plan: MechanismPlan, checkpoint: LoadedCheckpoint, tokenizer: Any) -> RoleScores:
    runners = _runners(plan, checkpoint)
    return score_roles(RoleInputs(checkpoint.resident, tokenizer, plan.trials, runners, plan.layers, checkpoint.memory))


def _attribution(plan: MechanismPlan, runners: Mapping[str, LayerRunner]) -> Values:
    attributions = [attribute(runners[run], plan.layers) for run in RUNS]

    def by_run(contributions: list[Tensor]) -> np.ndarray:
        return torch.stack(contributions, dim=-2).cpu().numpy()

    return {
        "attribution": by_run([attribution.heads for attribution in attributions]),
        "attribution_rest": by_run([attribution.rest for attribution in attributions]),
        "attribution_start": by_run([attribution.start for attribution in attributions]),
        "attribution_constant": by_run([attribution.constant for attribution in attributions]),
    }


def _self_check(store: Store, plan: MechanismPlan, label: str, values: Values) -> Float[np.ndarray, ""]:
    """The largest difference between the sum of all contributions and the stored logit difference, in nats.

    Raises `VerificationError` where it is larger than the arithmetic explains.
    """
    logits = store.answer_logits(label)
    total = values["attribution"].sum((0, 1), dtype=np.float64) + values["attribution_rest"].sum(0, dtype=np.float64)
    total += values["attribution_start"] + values["attribution_constant"]
    difference = np.abs(total - (logits[..., 0] - logits[..., 1])).max()
    allowed = tolerance(plan.dtype, store.study["dtype"])
    # Written so that NaN fails too.
    if not difference <= allowed:
        raise VerificationError(
            f"{label}: the contributions of the heads and of all else sum to a logit difference that is "
            f"{difference:.2g} nats off, more than {allowed:.2g}; either the weights are not those that were cached "
            "(cache again with --overwrite) or headlapse does not compute this architecture correctly"
        )
    return np.asarray(difference)


def _attention(plan: MechanismPlan, runners: Mapping[str, LayerRunner]) -> Float[np.ndarray, "layer head run trial to"]:
    """Shares of attention on each of `ATTENDED_TO`."""
    by_run = []
    for index, run in enumerate(RUNS):
        inputs = runners[run].inputs
        has_digit = np.vectorize(lambda text: any(map(str.isdigit, text)), otypes=[bool])
        digits = torch.from_numpy(has_digit(plan.trials.token_text[index])).to(inputs.device)
        read = inputs.positions[inputs.target, :, 0]
        by_layer = [shares(attention(runners[run], layer), read, digits) for layer in plan.layers]
        by_run.append(torch.stack(by_layer).transpose(1, 2))
    return torch.stack(by_run, dim=2).cpu().numpy()


def exact_effect(
    plan: MechanismPlan, resident: ResidentModel, activations: Activations, memory: int
) -> Float[np.ndarray, "layer head trial"]:
    """How far patching each head alone moves the logit difference, by replay, in nats.

    `memory` is what replay may take, in bytes.
    """
    n_heads = resident.architecture.n_heads
    none_and_each = np.eye(n_heads + 1, n_heads, k=-1, dtype=bool)
    logit_diff = replay(
        resident,
        activations,
        plan.trials,
        align(plan.trials, "last"),
        plan.settings.direction,
        sites=[(layer,) for layer in plan.layers],
        mask=none_and_each,
        runs=runs_at_once(resident, plan.trials.n_trials, memory),
    )
    return np.asarray(logit_diff[:, 1:] - logit_diff[:, :1])
