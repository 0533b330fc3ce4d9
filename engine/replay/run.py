"""Patch every checkpoint of a store: the same sites and subsets at each, replayed from the cache and verified."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ...kernels.attend import twin_for
from ..capture.run import Outcome
from ..checkpoints.files import vocabulary_file
from ..checkpoints.model import Loaded, Skeleton, Wardrobe, load_tokenizer, prefetch
from ..checkpoints.resolve import Checkpoint, Files, fetch
from ..runtime.resources import Machine, matmul_rate, told_time
from ..store.store import PatchedRun, Store, StoredActivations
from ..study.prompts import Alignment, Trials, align
from ..study.study import MEASURES, Arithmetic, Measure, Refusal, tolerance
from ..study.subsets import Subsets, parse_layers, parse_subsets
from .patch_inputs import Direction, Site
from .patched_generation import answers, refuse_too_many
from .reference import choose_pairs, choose_trials, hooked_logit_diff, require_exact
from .replay import replay, runs_at_once
from .vocabulary_measures import Further, Vocabulary, by_hook, known_tokens

HELD = 2**28
"""Bytes of results that are held before they are written, unless a single site needs more."""

PAIRS = 2
"""(layer, subset) pairs verified at every checkpoint against full hooked forwards."""

VERIFIED = 4
"""Trials, at most, on which they are."""


SUBSETS = ("even", "odd", "all", "each")
LAYERS = ("all",)
"""What is patched when the user does not say."""


@dataclass(frozen=True)
class Sweep:
    """One patch, asked of every checkpoint of a store."""

    subsets: tuple[str, ...] = SUBSETS
    """Words of the subset language."""

    layers: tuple[str, ...] = LAYERS
    joint: bool = False
    """Patch all the layers at once, with the same heads, instead of one after another."""

    positions: str = "last"
    direction: Direction = "denoise"
    dtype: Arithmetic | None = None
    """Arithmetic of the replay; None is the store's."""

    measures: tuple[Measure, ...] = ()
    """What is kept beside the logit difference."""
    generate: int = 0
    """Greedy tokens to generate from every patched run; none by default."""


def name_of(asked: Sweep) -> str:
    """What the run is called when the user does not say."""
    words = [asked.direction, asked.positions.replace(":", ""), joined(asked.subsets)]
    if asked.layers != LAYERS:
        words.append("layers" + "+".join(asked.layers))
    words += ["joint"] if asked.joint else []
    words += [f"generate{asked.generate}"] if asked.generate else []
    words += [asked.dtype] if asked.dtype else []
    words += ["+".join(_in_order(asked.measures))] if asked.measures else []
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
class Plan:
    """A sweep, spelled out for one store."""

    settings: dict[str, Any]
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


def spell_out(sweep: Sweep, store: Store) -> Plan:
    """Sites, subsets and positions of a sweep over `store`.  Raises `Refusal` for what the store cannot answer."""
    if "resid_pre" not in store.kinds():
        raise Refusal(
            f"{store.path} was cached with --sites z and cannot be patched; cache again with --sites all --overwrite"
        )
    layers = parse_layers(sweep.layers, store.layers)
    sites = (tuple(layers),) if sweep.joint else tuple((layer,) for layer in layers)
    trials = store.trials()
    subsets = parse_subsets(sweep.subsets, store.n_heads, estimate=functools.partial(_estimate, store, layers))
    refuse_too_many(sweep.generate, len(sites), len(subsets), trials.n_trials)
    dtype: Arithmetic = sweep.dtype or store.study["dtype"]
    settings: dict[str, Any] = {
        "protocol": "corrected", "direction": sweep.direction, "positions": sweep.positions, "layers": layers,
        "joint": sweep.joint, "subsets": list(sweep.subsets), "dtype": dtype,
    }  # fmt: skip
    measures = _in_order(sweep.measures)
    if measures:  # runs from before there were any have no such setting
        settings["measures"] = list[str](measures)
    settings |= {"generate": sweep.generate} if sweep.generate else {}
    if "sequence" in measures and trials.continuation is None:
        raise Refusal(
            f"--measures sequence: {store.path} was cached before whole answers were kept; cache again with --overwrite"
        )
    how = (sites, sweep.direction, dtype, measures, sweep.generate)
    return Plan(settings, trials, align(trials, sweep.positions), subsets, *how)


def _estimate(store: Store, layers: Sequence[int], n_subsets: int) -> str:
    """About how long so many subsets at each layer would take, at 24 d_model^2 operations a row and later layer."""
    d_model, n_trials = store.array("resid_pre").shape[-1], store.array("tokens").shape[1]
    passed = sum(store.layers[-1] - layer for layer in layers)
    flops = 24 * d_model**2 * n_subsets * n_trials * passed * len(store.complete())
    return f"they would take about {told_time(flops / matmul_rate('cpu', torch.float32))} on this machine's processor; "


def open_run(store: Store, plan: Plan, name: str, device: str) -> PatchedRun:
    """The patched run `name` of the store, made where it is not there."""
    first_layers = [site[0] for site in plan.sites]
    labels, mask = plan.subsets.labels, plan.subsets.mask
    run = store.open_patch(name, plan.settings, first_layers, labels, mask, plan.measures, plan.n_tokens)
    run.group.attrs.update(device=device, kernels=twin_for(torch.device(device)))
    return run


def patch_series(
    store: Store,
    plan: Plan,
    run: PatchedRun,
    missing: Sequence[str],
    cache: Path,
    machine: Machine,
    done: Callable[[int], object],
) -> Iterator[Outcome]:
    """Replay the plan at every missing checkpoint and verify a few patched runs of each.

    `done` hears how many patched runs were finished.  Weights that cannot be had are an `Outcome` with a problem;
    replay that differs from stock transformers raises `Inexact`.
    """
    first_layer = min(site[0] for site in plan.sites)
    for label, worn in each_worn(store, missing, cache, Wardrobe(plan.dtype, machine), first_layer):
        if isinstance(worn, Refusal):
            yield Outcome(label, str(worn))
            continue
        assert worn.activations is not None
        further = _further(plan, worn) if plan.measures else None
        _patch(store, plan, run, label, worn, worn.activations, done, further)
        yield Outcome(label)


@dataclass(frozen=True)
class Worn:
    """A checkpoint of a store, ready to compute with."""

    skeleton: Skeleton
    files: Files
    activations: StoredActivations | None

    memory: int
    """Bytes left beside the weights."""


def each_worn(
    store: Store, labels: Sequence[str], cache: Path, wardrobe: Wardrobe, first_layer: int | None
) -> Iterator[tuple[str, Worn | Refusal]]:
    """The skeleton in each checkpoint's weights, one after another, or why they cannot be had.

    The next one is read ahead; its activations from `first_layer` on, too, unless that is None.
    """
    indices = store.complete()

    def load(label: str) -> tuple[Loaded, StoredActivations | None]:
        files = fetch(_recorded(store, label), cache, store.provenance(label))
        _refuse_other_weights(store, label, files)
        activations = None if first_layer is None else store.activations(indices[label])
        if activations is not None and first_layer is not None:
            activations.read_all(first_layer)
        return wardrobe.ahead(files), activations

    for label, loaded in prefetch(labels, load):
        try:
            if isinstance(loaded, Exception):
                raise loaded
            weights, activations = loaded
            skeleton, memory = wardrobe.wear(weights)
        except Refusal as refusal:
            yield label, refusal
            continue
        yield label, Worn(skeleton, weights[0], activations, memory)


def _patch(
    store: Store,
    plan: Plan,
    run: PatchedRun,
    label: str,
    worn: Worn,
    activations: StoredActivations,
    done: Callable[[int], object],
    further: Further | None,
) -> None:
    """Replay one checkpoint, as many sites at a time as find room, and write it; with texts where they are asked."""
    skeleton = worn.skeleton
    runs = runs_at_once(skeleton, plan.alignment.valid.size, worn.memory)
    replayed = functools.partial(
        replay, skeleton, activations, plan.trials, plan.alignment, plan.direction, mask=plan.subsets.mask, done=done
    )
    allowed = tolerance(plan.dtype, store.study["dtype"])
    pairs = choose_pairs(label, plan.sites, len(plan.subsets), PAIRS)
    difference, checks = 0.0, dict[str, float](dict.fromkeys(plan.measures, 0.0))
    for first, sites in _blocks(plan):
        values = further.patched(sites, plan.subsets.mask, done) if further else {}
        logit_diff = values.pop("logit_diff") if further else replayed(sites=sites, runs=runs)
        if chosen := [(site - first, subset) for site, subset in pairs if first <= site < first + len(sites)]:
            # numpy's maximum keeps NaN, Python's max does not
            difference = float(np.maximum(difference, _difference(skeleton, plan, label, sites, chosen, logit_diff)))
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
        run.write_answers(label, answers(skeleton, load_tokenizer(worn.files.config.parent), *given, label))
    run.finish(label, answer_logits, difference)


def _further(plan: Plan, worn: "Worn") -> Further:
    assert worn.activations is not None
    tokenizer = load_tokenizer(vocabulary_file(worn.files.directory).parent)
    given = (plan.trials, plan.alignment, plan.direction, plan.measures)
    return Further.prepare(worn.skeleton, worn.activations, *given, known_tokens(tokenizer), worn.memory)


def _blocks(plan: Plan) -> Iterator[tuple[int, tuple[Site, ...]]]:
    """Sites whose results are held at once, each block with the index of its first."""
    per_site = (1 + len(plan.measures)) * len(plan.subsets) * plan.trials.n_trials * np.dtype(np.float32).itemsize
    size = max(1, HELD // per_site)
    for first in range(0, len(plan.sites), size):
        yield first, plan.sites[first : first + size]


def _difference(
    skeleton: Skeleton,
    plan: Plan,
    label: str,
    sites: Sequence[Site],
    pairs: Sequence[tuple[int, int]],
    logit_diff: Float[np.ndarray, "site subset trial"],
) -> float:
    """Largest difference between replay and full hooked forwards over a few pairs and trials, in nats."""
    some = choose_trials(label, plan.trials.n_trials, VERIFIED)
    patches = [(sites[site], plan.subsets.mask[subset]) for site, subset in pairs]
    expected = hooked_logit_diff(skeleton, plan.trials.only(some), plan.alignment.only(some), plan.direction, patches)
    replayed = np.stack([logit_diff[site, subset, some] for site, subset in pairs])
    return float(np.abs(replayed - expected).max())  # numpy's max keeps NaN


def _further_differences(
    vocabulary: Vocabulary,
    plan: Plan,
    label: str,
    sites: Sequence[Site],
    pairs: Sequence[tuple[int, int]],
    values: Mapping[str, Float[np.ndarray, "site subset trial"]],
    allowed: float,
) -> dict[str, float]:
    """The same of every further measure, in its own unit.  Raises `Inexact` for more than rounding explains."""
    some = choose_trials(label, plan.trials.n_trials, VERIFIED)
    patches = [(sites[site], plan.subsets.mask[subset]) for site, subset in pairs]
    trials, alignment = plan.trials.only(some), plan.alignment.only(some)
    expected = by_hook(vocabulary, trials, alignment, plan.direction, patches, plan.measures, allowed)
    differences: dict[str, float] = {}
    for name in plan.measures:
        replayed = np.stack([values[name][site, subset, some] for site, subset in pairs])
        off = np.abs(replayed - expected.values[name])
        worst = np.unravel_index((off - expected.allowed[name]).argmax(), off.shape)  # a NaN before all
        require_exact(float(off[worst]), float(expected.allowed[name][worst]), f"{label}, {name}")
        differences[name] = float(off.max())
    return differences


def _recorded(store: Store, label: str) -> Checkpoint:
    """The checkpoint as the store remembers it, pinned to its commit."""
    fields = {k: v for k, v in store.provenance(label).items() if k not in ("sha256", "stamps")}
    return Checkpoint(**fields)


def _refuse_other_weights(store: Store, label: str, files: Files) -> None:
    held = store.provenance(label)["sha256"]
    if files.sha256 != held:
        raise Refusal(
            f"the weights in {files.directory} are not those that were cached (sha256 {_digests(files.sha256)} now, "
            f"{_digests(held)} then); put them back, or cache again with --overwrite"
        )


def _digests(sha256: dict[str, str]) -> str:
    return ", ".join(digest[:12] for digest in sorted(sha256.values()))
