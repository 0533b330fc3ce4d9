"""Patch every checkpoint of a store: the same sites and subsets at each, replayed from the cache and verified."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from ...kernels.attend import kernel_for
from ..checkpoints.loader import ModelLoader
from ..checkpoints.tokenizer import load_tokenizer
from ..runtime.errors import UserError
from ..runtime.format import format_time
from ..runtime.outcome import Outcome
from ..runtime.resources import Machine, matmul_rate
from ..store.patched_run import Answers, PatchedRun
from ..store.store import Store, StoredActivations
from ..study.alignment import Alignment, align
from ..study.patch_settings import Direction, PatchRequest, PatchSettings
from ..study.primary import Primary, parse_primary, refuse_untestable
from ..study.prompts import Trials
from ..study.study import MEASURES, Arithmetic, Measure
from ..study.subsets import Subsets, parse_layers, parse_subsets
from .cached_checkpoints import LoadedCheckpoint, each_outcome, load_each
from .patch_inputs import Site, source_and_target
from .patched_generation import answers, refuse_too_many
from .reference import choose_pairs, choose_trials, hooked_logit_diff, require_exact
from .replay import replay, runs_at_once
from .rounding import RoundingError
from .vocabulary_measures import Hooked, VocabularyMeasures, hooked_measures, known_tokens

BLOCK_BYTES = 2**28
"""Bytes of results that are computed before they are written, unless a single site needs more."""

VERIFIED_PAIRS = 2
"""(site, subset) pairs verified at every checkpoint against full hooked forwards."""

VERIFIED_TRIALS = 4
"""Trials, at most, on which they are verified."""


def name_of(request: PatchRequest) -> str:
    """What the run is called when the user does not say."""
    words = [request.direction, request.positions.replace(":", ""), joined(request.subsets)]
    if request.layers != PatchRequest.layers:
        words.append("layers" + "+".join(request.layers))
    words += ["joint"] if request.joint else []
    words += [f"generate{request.generate}"] if request.generate else []
    words += [request.dtype] if request.dtype else []
    words += ["+".join(_in_order(request.measures))] if request.measures else []
    return shortened("-".join(words))


def joined(words: Sequence[str]) -> str:
    """Words of the subset language as part of a run's name."""
    return "+".join(words).replace(":", "").replace(",", ".")


def shortened(name: str) -> str:
    """A name that fits into a file name: long ones are cut off, and a hash of all of it tells them apart."""
    return name if len(name) <= 100 else f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _in_order(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """Each measure once, in the order of `MEASURES`."""
    return tuple(name for name in MEASURES if name in measures)


@dataclass(frozen=True)
class SweepPlan:
    """A request worked out for one store."""

    settings: PatchSettings
    trials: Trials
    alignment: Alignment
    subsets: Subsets
    sites: tuple[Site, ...]
    direction: Direction
    dtype: Arithmetic
    measures: tuple[Measure, ...] = ()

    n_tokens: int = 0
    """Greedy tokens to generate from every patched run."""

    primary: tuple[Primary, ...] = ()
    """Written into the run before anything is patched."""

    @property
    def n_runs(self) -> int:
        """Patched runs at one checkpoint."""
        return len(self.sites) * len(self.subsets) * self.trials.n_trials


def make_plan(request: PatchRequest, store: Store) -> SweepPlan:
    """Sites, subsets and positions of a request over `store`.  Raises `UserError` for what the store cannot answer."""
    if "resid_pre" not in store.kinds():
        raise UserError(
            f"{store.path} was cached with --sites z and cannot be patched; cache again with --sites all --overwrite"
        )
    layers = parse_layers(request.layers, store.layers)
    sites = (tuple(layers),) if request.joint else tuple((layer,) for layer in layers)
    trials = store.trials()
    estimate = functools.partial(_estimate, store, layers)
    subsets = parse_subsets(request.subsets, store.n_heads, estimate=estimate, n_groups=store.n_groups)
    refuse_too_many(request.generate, len(sites), len(subsets), trials.n_trials)
    dtype: Arithmetic = request.dtype or store.study["dtype"]
    measures = _in_order(request.measures)
    settings = PatchSettings(
        "corrected", request.direction, request.positions, tuple(layers), request.joint, request.subsets, dtype,
        measures, request.generate, n_groups=store.n_groups,
    )  # fmt: skip
    if "sequence" in measures and trials.continuation is None:
        raise UserError(
            f"--measures sequence: {store.path} was cached before whole answers were kept; cache again with --overwrite"
        )
    alignment = align(trials, request.positions)
    primary = parse_primary(request.primary)
    if primary and request.joint:
        raise UserError("--primary names single layers, and --joint patches several at once; leave one of them out")
    refuse_untestable(primary, layers, subsets, [row.label for row in store.rows()], store.n_groups)
    return SweepPlan(
        settings, trials, alignment, subsets, sites, request.direction, dtype, measures, request.generate, primary
    )


def _estimate(store: Store, layers: Sequence[int], n_subsets: int) -> str:
    """About how long so many subsets at each layer would take, at 24 d_model^2 operations a row and later layer."""
    d_model, n_trials = store.array("resid_pre").shape[-1], store.array("tokens").shape[1]
    n_later_layers = sum(store.layers[-1] - layer for layer in layers)
    flops = 24 * d_model**2 * n_subsets * n_trials * n_later_layers * len(store.complete())
    return (
        f"they would take about {format_time(flops / matmul_rate('cpu', torch.float32))} on this machine's processor; "
    )


def open_run(store: Store, plan: SweepPlan, name: str, overwrite: bool = False) -> PatchedRun:
    """The patched run `name` of the store, made where it is not there; with `overwrite`, what is to replace it."""
    first_layers = [site[0] for site in plan.sites]
    labels, mask = plan.subsets.labels, plan.subsets.mask
    return store.open_patch(
        name, plan.settings, first_layers, labels, mask, plan.measures, plan.n_tokens, overwrite, plan.primary
    )


def patch_series(
    store: Store,
    plan: SweepPlan,
    run: PatchedRun,
    missing: Sequence[str],
    cache: Path,
    machine: Machine,
    progress: Callable[[int], object],
) -> Iterator[Outcome]:
    """Replay the plan at every missing checkpoint, verify a few patched runs of each, and write them.

    `progress` is called with the number of patched runs that each batch completed.  A checkpoint whose weights cannot
    be had, or whose replay differs from stock transformers, is an `Outcome` with a problem.
    """

    rounding = RoundingError(plan.dtype, store.study["dtype"])

    def patch(label: str, checkpoint: LoadedCheckpoint) -> None:
        _patch(_CheckpointPatch.prepare(plan, label, checkpoint, run.seed, rounding), run, machine, progress)

    first_layer = min(site[0] for site in plan.sites)
    yield from each_outcome(load_each(store, missing, cache, ModelLoader(plan.dtype, machine), first_layer), patch)


@dataclass(frozen=True)
class _CheckpointPatch:
    """All that patching one checkpoint needs."""

    plan: SweepPlan
    label: str
    checkpoint: LoadedCheckpoint
    activations: StoredActivations

    vocabulary_measures: VocabularyMeasures | None
    """None where only the logit difference is wanted."""

    answer_logits: Float[np.ndarray, "run trial answer"]
    """Of the unpatched runs, as captured."""

    seed: int
    """Of the patched runs that are verified."""

    allowed: float
    """Largest difference of a logit difference that rounding explains, in nats."""

    @classmethod
    def prepare(
        cls, plan: SweepPlan, label: str, checkpoint: LoadedCheckpoint, seed: int, rounding: RoundingError
    ) -> "_CheckpointPatch":
        assert checkpoint.activations is not None, "read with the weights"
        measures = _vocabulary_measures(plan, checkpoint, checkpoint.activations) if plan.measures else None
        answer_logits = checkpoint.activations.answer_logits()
        pairs = choose_pairs(label, plan.sites, len(plan.subsets), VERIFIED_PAIRS, seed)
        patches = [(plan.sites[site], plan.subsets.mask[subset]) for site, subset in pairs]
        nothing = (plan.sites[0], np.zeros_like(plan.subsets.mask[0]))
        chosen = choose_trials(label, plan.trials.n_trials, VERIFIED_TRIALS, seed)
        runs = (plan.trials.only(chosen), plan.alignment.only(chosen), plan.direction, [*patches, nothing])
        allowed = rounding.allowed(checkpoint.resident, *runs)
        return cls(plan, label, checkpoint, checkpoint.activations, measures, answer_logits, seed, allowed)

    @property
    def target_logit_diff(self) -> Float[np.ndarray, " trial"]:
        """Of the unpatched run that is patched, as captured."""
        right, wrong = np.moveaxis(self.answer_logits[source_and_target(self.plan.direction)[1]], -1, 0)
        return np.asarray(right - wrong)


@dataclass(frozen=True)
class _Block:
    """Sites that are replayed, verified and written together."""

    first: int
    """Index of the first of them among the plan's sites."""

    sites: tuple[Site, ...]

    pairs: tuple[tuple[int, int], ...]
    """(site, subset) indices to verify, the site's counted within the block."""


Values = Mapping[str, Float[np.ndarray, "site subset trial"]]
"""Results of a block's patched runs, by measure; `logit_diff` is always there."""


def _patch(patch: _CheckpointPatch, run: PatchedRun, machine: Machine, progress: Callable[[int], object]) -> None:
    """Replay, verify and write one checkpoint, a block of sites at a time; its completion mark comes last."""
    writer = run.write(patch.label)
    self_check = dict.fromkeys(("logit_diff", *patch.plan.measures), 0.0)
    for block in _blocks(patch.plan, patch.label, patch.seed):
        values, unpatched = _replay(patch, block, progress)
        differences = [_verify_unpatched(patch, unpatched), _verify(patch, block, values)]
        for name, difference in (pair for each in differences for pair in each.items()):
            self_check[name] = float(np.maximum(self_check[name], difference))  # keeps NaN, Python's max does not
        writer.put_layers(block.first, **values)
    largest_difference = self_check.pop("logit_diff")
    if patch.vocabulary_measures is not None:
        writer.put_measures(_unpatched(patch, patch.vocabulary_measures), self_check)
    if patch.plan.n_tokens:
        writer.put_answers(_generate_answers(patch))
    kernels = kernel_for(torch.device(machine.device))
    writer.finish(patch.answer_logits, largest_difference, patch.allowed, device=machine.device, kernels=kernels)


def _replay(
    patch: _CheckpointPatch, block: _Block, progress: Callable[[int], object]
) -> tuple[Values, Float[np.ndarray, "site trial"]]:
    """Every measure of the block's patched runs, and the logit differences of replay where nothing is patched."""
    plan = patch.plan
    mask = np.concatenate([plan.subsets.mask, np.zeros_like(plan.subsets.mask[:1])])
    counted = _at_most(len(block.sites) * len(plan.subsets) * plan.trials.n_trials, progress)
    if patch.vocabulary_measures is not None:
        values = dict(patch.vocabulary_measures.patched(block.sites, mask, counted))
    else:
        resident = patch.checkpoint.resident
        runs = runs_at_once(resident, plan.alignment.valid.size, patch.checkpoint.memory)
        inputs = (resident, patch.activations, plan.trials, plan.alignment, plan.direction)
        values = {"logit_diff": replay(*inputs, sites=block.sites, mask=mask, progress=counted, runs=runs)}
    return {name: results[:, :-1] for name, results in values.items()}, values["logit_diff"][:, -1]


def _at_most(total: int, progress: Callable[[int], object]) -> Callable[[int], object]:
    """`progress`, called for no more than `total` runs: what the self-check adds was not asked for."""
    left = total

    def count(n_runs: int) -> None:
        nonlocal left
        counted, left = min(n_runs, left), left - min(n_runs, left)
        progress(counted)

    return count


def _verify_unpatched(patch: _CheckpointPatch, unpatched: Float[np.ndarray, "site trial"]) -> dict[str, float]:
    """Largest difference between replay that patches nothing and the captured target run.

    Raises `VerificationError` beyond what rounding explains: weights and activations do not belong together.
    """
    difference = float(np.abs(unpatched - patch.target_logit_diff).max())
    require_exact(difference, patch.allowed, f"{patch.label}, nothing patched")
    return {"logit_diff": difference}


def _verify(patch: _CheckpointPatch, block: _Block, values: Values) -> dict[str, float]:
    """Largest differences between replay and full hooked forwards over a few patched runs, by measure, in its unit.

    Empty where none of the block's runs is to be verified.  Raises `VerificationError` beyond what rounding explains.
    """
    if not block.pairs:
        return {}
    plan, label, allowed = patch.plan, patch.label, patch.allowed
    chosen = choose_trials(label, plan.trials.n_trials, VERIFIED_TRIALS, patch.seed)
    replayed = {
        name: np.stack([results[site, subset, chosen] for site, subset in block.pairs])
        for name, results in values.items()
    }
    patches = [(block.sites[site], plan.subsets.mask[subset]) for site, subset in block.pairs]
    runs = (plan.trials.only(chosen), plan.alignment.only(chosen), plan.direction, patches)
    expected = hooked_logit_diff(patch.checkpoint.resident, *runs)
    differences = {"logit_diff": float(np.abs(replayed["logit_diff"] - expected).max())}  # numpy's max keeps NaN
    require_exact(differences["logit_diff"], allowed, label)
    if patch.vocabulary_measures is not None:
        hooked = hooked_measures(patch.vocabulary_measures.vocabulary, *runs, plan.measures, allowed)
        differences |= {name: _require_measure(name, replayed[name], hooked, label) for name in plan.measures}
    return differences


def _require_measure(name: str, replayed: Float[np.ndarray, "patch trial"], hooked: Hooked, label: str) -> float:
    """Largest difference of one measure.  Raises `VerificationError` where any is larger than it may be."""
    difference = np.abs(replayed - hooked.values[name])
    worst = np.unravel_index((difference - hooked.allowed[name]).argmax(), difference.shape)  # a NaN before all
    require_exact(float(difference[worst]), float(hooked.allowed[name][worst]), f"{label}, {name}")
    return float(difference.max())


def _unpatched(patch: _CheckpointPatch, measures: VocabularyMeasures) -> Mapping[str, Float[np.ndarray, "run trial"]]:
    """The measures of the unpatched runs.

    Raises `VerificationError` where their logit difference is not the captured one.
    """
    unpatched = measures.unpatched()
    captured = patch.answer_logits[..., 0] - patch.answer_logits[..., 1]
    difference = float(np.abs(unpatched.pop("logit_diff") - captured).max())
    require_exact(difference, patch.allowed, f"{patch.label}, unpatched")
    return unpatched


def _generate_answers(patch: _CheckpointPatch) -> Answers:
    plan, checkpoint = patch.plan, patch.checkpoint
    tokenizer = load_tokenizer(checkpoint.files.vocabulary.parent)
    runs = (plan.trials, plan.alignment, plan.direction, plan.sites, plan.subsets.mask)
    return answers(checkpoint.resident, tokenizer, *runs, plan.n_tokens, patch.label)


def _vocabulary_measures(
    plan: SweepPlan, checkpoint: LoadedCheckpoint, activations: StoredActivations
) -> VocabularyMeasures:
    tokenizer = load_tokenizer(checkpoint.files.vocabulary.parent)
    runs = (plan.trials, plan.alignment, plan.direction)
    return VocabularyMeasures.prepare(
        checkpoint.resident, activations, *runs, plan.measures, known_tokens(tokenizer), checkpoint.memory
    )


def _blocks(plan: SweepPlan, label: str, seed: int) -> Iterator[_Block]:
    """All sites in order, as many at a time as `BLOCK_BYTES` of results allow."""
    pairs = choose_pairs(label, plan.sites, len(plan.subsets), VERIFIED_PAIRS, seed)
    per_site = (1 + len(plan.measures)) * len(plan.subsets) * plan.trials.n_trials * np.dtype(np.float32).itemsize
    size = max(1, BLOCK_BYTES // per_site)
    for first in range(0, len(plan.sites), size):
        sites = plan.sites[first : first + size]
        inside = tuple((site - first, subset) for site, subset in pairs if first <= site < first + len(sites))
        yield _Block(first, sites, inside)
