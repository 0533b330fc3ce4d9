"""Patch every checkpoint of a store: the same sites and subsets at each, replayed from the cache and verified."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headlapse.engine.checkpoints import TORCH_DTYPES, Skeleton, open_skeleton, prefetch, read_weights
from headlapse.engine.ground import Direction, Site
from headlapse.engine.replay import replay
from headlapse.engine.series import Outcome
from headlapse.engine.sources import Checkpoint, Files, fetch
from headlapse.engine.store import PatchedRun, Store
from headlapse.engine.study import Dtype, Refusal, tolerance
from headlapse.engine.subsets import Subsets, parse_layers, parse_subsets
from headlapse.engine.tasks import Alignment, Trials, align
from headlapse.engine.verify import choose_pairs, hooked_logit_diff, require_exact
from headlapse.kernels.attend import twin_for

PAIRS = 2
"""(layer, subset) pairs verified at every checkpoint against a full hooked forward."""


@dataclass(frozen=True)
class Sweep:
    """One patch, asked of every checkpoint of a store."""

    subsets: tuple[str, ...] = ("even", "odd", "all", "each")
    """Words of the subset language."""

    layers: tuple[str, ...] = ("all",)
    joint: bool = False
    """Patch all the layers at once, with the same heads, instead of one after another."""

    positions: str = "last"
    direction: Direction = "denoise"
    dtype: Dtype | None = None
    """Arithmetic of the replay; None is the store's."""

    def name(self) -> str:
        """What the run is called when the user does not say."""
        subsets = "+".join(self.subsets).replace(":", "").replace(",", ".")
        words = [self.direction, self.positions.replace(":", ""), subsets]
        if self.layers != ("all",):
            words.append("layers" + "+".join(self.layers))
        words += ["joint"] if self.joint else []
        words += [self.dtype] if self.dtype else []
        name = "-".join(words)
        # Long lists of subsets would not fit into a file name; what is cut off still tells runs apart.
        return name if len(name) <= 100 else f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Plan:
    """A sweep, spelled out for one store."""

    settings: dict[str, Any]
    trials: Trials
    alignment: Alignment
    subsets: Subsets
    sites: tuple[Site, ...]
    direction: Direction
    dtype: Dtype

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
    subsets = parse_subsets(sweep.subsets, store.n_heads)
    dtype: Dtype = sweep.dtype or store.study["dtype"]
    settings = {
        "protocol": "corrected", "direction": sweep.direction, "positions": sweep.positions, "layers": layers,
        "joint": sweep.joint, "subsets": list(sweep.subsets), "dtype": dtype,
    }  # fmt: skip
    return Plan(settings, trials, align(trials, sweep.positions), subsets, sites, sweep.direction, dtype)


def open_run(store: Store, plan: Plan, name: str, device: str) -> PatchedRun:
    """The patched run `name` of the store, made where it is not there."""
    first_layers = [site[0] for site in plan.sites]
    run = store.open_patch(name, plan.settings, first_layers, plan.subsets.labels, plan.subsets.mask)
    run.group.attrs.update(device=device, kernels=twin_for(torch.device(device)))
    return run


def patch_series(
    store: Store,
    plan: Plan,
    run: PatchedRun,
    missing: Sequence[str],
    cache: Path,
    device: str,
    done: Callable[[int], object],
) -> Iterator[Outcome]:
    """Replay the plan at every missing checkpoint and verify a few patched runs of each.

    `done` hears how many patched runs were finished.  Weights that cannot be had are an `Outcome` with a problem;
    replay that differs from stock transformers raises `Inexact`.
    """
    indices = store.complete()

    def load(label: str) -> tuple[Files, dict[str, Tensor]]:
        files = fetch(_recorded(store, label), cache)
        _refuse_other_weights(store, label, files)
        return files, read_weights(files, TORCH_DTYPES[plan.dtype], device)

    skeleton: Skeleton | None = None
    for label, loaded in prefetch(missing, load):
        if isinstance(loaded, OSError):
            raise loaded
        if isinstance(loaded, Refusal):
            yield Outcome(label, str(loaded))
            continue
        files, weights = loaded
        skeleton = open_skeleton(files, plan.dtype, device, skeleton)
        skeleton.wear(weights)
        activations = store.activations(indices[label])
        logit_diff = replay(
            skeleton, activations, plan.trials, plan.alignment, plan.direction, plan.sites, plan.subsets.mask, done
        )
        difference = _verified(skeleton, store, plan, label, logit_diff)
        run.write(label, logit_diff, store.answer_logits(indices[label]), difference)
        yield Outcome(label)


def _verified(skeleton: Skeleton, store: Store, plan: Plan, label: str, logit_diff: np.ndarray) -> float:
    """Largest difference between replay and full hooked forwards over a few random pairs, in nats."""
    pairs = choose_pairs(label, plan.sites, len(plan.subsets), PAIRS)
    patches = [(plan.sites[site], plan.subsets.mask[subset]) for site, subset in pairs]
    expected = hooked_logit_diff(skeleton, plan.trials, plan.alignment, plan.direction, patches)
    replayed = np.stack([logit_diff[site, subset] for site, subset in pairs])
    difference = float(np.abs(replayed - expected).max())  # numpy's max keeps NaN
    require_exact(difference, tolerance(plan.dtype, store.study["dtype"]), label)
    return difference


def _recorded(store: Store, label: str) -> Checkpoint:
    """The checkpoint as the store remembers it, pinned to its commit."""
    fields = {k: v for k, v in store.provenance(label).items() if k != "sha256"}
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
