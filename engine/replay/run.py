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
from ..checkpoints.files import vocabulary_file
from ..checkpoints.model import ModelLoader, ResidentModel, load_tokenizer
from ..runtime.errors import UserError
from ..runtime.format import format_time
from ..runtime.outcome import Outcome
from ..runtime.resources import Machine, matmul_rate
from ..store.store import PatchedRun, Store, StoredActivations
from ..study.alignment import Alignment, align
from ..study.patch_settings import Direction, PatchRequest, PatchSettings
from ..study.prompts import Trials
from ..study.study import MEASURES, Arithmetic, Measure, tolerance
from ..study.subsets import Subsets, parse_layers, parse_subsets
from .cached_checkpoints import LoadedCheckpoint, load_each
from .patch_inputs import Site
from .patched_generation import answers, refuse_too_many
from .reference import choose_pairs, choose_trials, hooked_logit_diff, require_exact
from .replay import replay, runs_at_once
from .vocabulary_measures import Vocabulary, VocabularyMeasures, hooked_measures, known_tokens

HELD = 2**28
"""Bytes of results that are held before they are written, unless a single site needs more."""

PAIRS = 2
"""(layer, subset) pairs verified at every checkpoint against full hooked forwards."""

VERIFIED = 4
"""Trials, at most, on which they are."""


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
    """Words of the subset language as part of a file name."""
    return "+".join(words).replace(":", "").replace(",", ".")


def shortened(name: str) -> str:
    """Long lists of subsets would not fit into a file name; what is cut off still tells runs apart."""
    return name if len(name) <= 100 else f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _in_order(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """Each once, however they were asked for."""
    return tuple(name for name in MEASURES if name in measures)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, spelled out for one store."""

    settings: PatchSettings
    trials: Trials
    alignment: Alignment
    subsets: Subsets
    sites: tuple[Site, ...]
    direction: Direction
    dtype: Arithmetic
    measures: tuple[Measure, ...] = ()

    n_tokens: int = 0
    """To generate from every patched run."""

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
    subsets = parse_subsets(request.subsets, store.n_heads, estimate=functools.partial(_estimate, store, layers))
    refuse_too_many(request.generate, len(sites), len(subsets), trials.n_trials)
    dtype: Arithmetic = request.dtype or store.study["dtype"]
    measures = _in_order(request.measures)
    settings = PatchSettings(
        "corrected", request.direction, request.positions, tuple(layers), request.joint, request.subsets, dtype,
        measures, request.generate,
    )  # fmt: skip
    if "sequence" in measures and trials.continuation is None:
        raise UserError(
            f"--measures sequence: {store.path} was cached before whole answers were kept; cache again with --overwrite"
        )
    how = (sites, request.direction, dtype, measures, request.generate)
    return SweepPlan(settings, trials, align(trials, request.positions), subsets, *how)


def _estimate(store: Store, layers: Sequence[int], n_subsets: int) -> str:
    """About how long so many subsets at each layer would take, at 24 d_model^2 operations a row and later layer."""
    d_model, n_trials = store.array("resid_pre").shape[-1], store.array("tokens").shape[1]
    passed = sum(store.layers[-1] - layer for layer in layers)
    flops = 24 * d_model**2 * n_subsets * n_trials * passed * len(store.complete())
    return (
        f"they would take about {format_time(flops / matmul_rate('cpu', torch.float32))} on this machine's processor; "
    )


def open_run(store: Store, plan: SweepPlan, name: str, device: str) -> PatchedRun:
    """The patched run `name` of the store, made where it is not there."""
    first_layers = [site[0] for site in plan.sites]
    labels, mask = plan.subsets.labels, plan.subsets.mask
    run = store.open_patch(name, plan.settings, first_layers, labels, mask, plan.measures, plan.n_tokens)
    run.group.attrs.update(device=device, kernels=kernel_for(torch.device(device)))
    return run


def patch_series(
    store: Store,
    plan: SweepPlan,
    run: PatchedRun,
    missing: Sequence[str],
    cache: Path,
    machine: Machine,
    done: Callable[[int], object],
) -> Iterator[Outcome]:
    """Replay the plan at every missing checkpoint and verify a few patched runs of each.

    `done` hears how many patched runs were finished.  Weights that cannot be had are an `Outcome` with a problem;
    replay that differs from stock transformers raises `VerificationError`.
    """
    first_layer = min(site[0] for site in plan.sites)
    for label, checkpoint in load_each(store, missing, cache, ModelLoader(plan.dtype, machine), first_layer):
        if isinstance(checkpoint, UserError):
            yield Outcome(label, str(checkpoint))
            continue
        assert checkpoint.activations is not None
        further = _further(plan, checkpoint) if plan.measures else None
        _patch(store, plan, run, label, checkpoint, checkpoint.activations, done, further)
        yield Outcome(label)


def _patch(
    store: Store,
    plan: SweepPlan,
    run: PatchedRun,
    label: str,
    checkpoint: LoadedCheckpoint,
    activations: StoredActivations,
    done: Callable[[int], object],
    further: VocabularyMeasures | None,
) -> None:
    """Replay one checkpoint, as many sites at a time as find room, and write it; with texts where they are asked."""
    resident = checkpoint.resident
    runs = runs_at_once(resident, plan.alignment.valid.size, checkpoint.memory)
    replayed = functools.partial(
        replay, resident, activations, plan.trials, plan.alignment, plan.direction, mask=plan.subsets.mask, done=done
    )
    allowed = tolerance(plan.dtype, store.study["dtype"])
    pairs = choose_pairs(label, plan.sites, len(plan.subsets), PAIRS)
    difference, checks = 0.0, dict[str, float](dict.fromkeys(plan.measures, 0.0))
    for first, sites in _blocks(plan):
        values = further.patched(sites, plan.subsets.mask, done) if further else {}
        logit_diff = values.pop("logit_diff") if further else replayed(sites=sites, runs=runs)
        if chosen := [(site - first, subset) for site, subset in pairs if first <= site < first + len(sites)]:
            # numpy's maximum keeps NaN, Python's max does not
            difference = float(np.maximum(difference, _difference(resident, plan, label, sites, chosen, logit_diff)))
            require_exact(difference, allowed, label)
            if further:
                found = _further_differences(further.vocabulary, plan, label, sites, chosen, values, allowed)
                checks = {name: float(np.maximum(checks[name], found[name])) for name in checks}
        run.write_layers(label, first, logit_diff, **values)
    answer_logits = store.answer_logits(store.index(label))
    if further:
        unpatched = further.unpatched()
        captured = answer_logits[..., 0] - answer_logits[..., 1]
        require_exact(float(np.abs(unpatched.pop("logit_diff") - captured).max()), allowed, f"{label}, unpatched")
        run.write_further(label, unpatched, checks)
    if plan.n_tokens:
        given = (plan.trials, plan.alignment, plan.direction, plan.sites, plan.subsets.mask, plan.n_tokens)
        run.write_answers(label, answers(resident, load_tokenizer(checkpoint.files.config.parent), *given, label))
    run.finish(label, answer_logits, difference)


def _further(plan: SweepPlan, checkpoint: "LoadedCheckpoint") -> VocabularyMeasures:
    assert checkpoint.activations is not None
    tokenizer = load_tokenizer(vocabulary_file(checkpoint.files.directory).parent)
    given = (plan.trials, plan.alignment, plan.direction, plan.measures)
    return VocabularyMeasures.prepare(
        checkpoint.resident, checkpoint.activations, *given, known_tokens(tokenizer), checkpoint.memory
    )


def _blocks(plan: SweepPlan) -> Iterator[tuple[int, tuple[Site, ...]]]:
    """Sites whose results are held at once, each block with the index of its first."""
    per_site = (1 + len(plan.measures)) * len(plan.subsets) * plan.trials.n_trials * np.dtype(np.float32).itemsize
    size = max(1, HELD // per_site)
    for first in range(0, len(plan.sites), size):
        yield first, plan.sites[first : first + size]


def _difference(
    resident: ResidentModel,
    plan: SweepPlan,
    label: str,
    sites: Sequence[Site],
    pairs: Sequence[tuple[int, int]],
    logit_diff: Float[np.ndarray, "site subset trial"],
) -> float:
    """Largest difference between replay and full hooked forwards over a few pairs and trials, in nats."""
    some = choose_trials(label, plan.trials.n_trials, VERIFIED)
    patches = [(sites[site], plan.subsets.mask[subset]) for site, subset in pairs]
    expected = hooked_logit_diff(resident, plan.trials.only(some), plan.alignment.only(some), plan.direction, patches)
    replayed = np.stack([logit_diff[site, subset, some] for site, subset in pairs])
    return float(np.abs(replayed - expected).max())  # numpy's max keeps NaN


def _further_differences(
    vocabulary: Vocabulary,
    plan: SweepPlan,
    label: str,
    sites: Sequence[Site],
    pairs: Sequence[tuple[int, int]],
    values: Mapping[str, Float[np.ndarray, "site subset trial"]],
    allowed: float,
) -> dict[str, float]:
    """The same for every other measure, in its own unit.  Raises `VerificationError` beyond what rounding explains."""
    some = choose_trials(label, plan.trials.n_trials, VERIFIED)
    patches = [(sites[site], plan.subsets.mask[subset]) for site, subset in pairs]
    trials, alignment = plan.trials.only(some), plan.alignment.only(some)
    expected = hooked_measures(vocabulary, trials, alignment, plan.direction, patches, plan.measures, allowed)
    differences: dict[str, float] = {}
    for name in plan.measures:
        replayed = np.stack([values[name][site, subset, some] for site, subset in pairs])
        off = np.abs(replayed - expected.values[name])
        worst = np.unravel_index((off - expected.allowed[name]).argmax(), off.shape)  # a NaN before all
        require_exact(float(off[worst]), float(expected.allowed[name][worst]), f"{label}, {name}")
        differences[name] = float(off.max())
    return differences
