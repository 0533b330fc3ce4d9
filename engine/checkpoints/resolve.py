"""Where checkpoints come from: a name becomes labels with their steps, and a label becomes files on disk.

A name is `demo` (trained here), a local directory or a hub id; which of them matters to no other room.
"""

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from . import files, hub
from .revisions import PYTHIA, RevisionIndex, select, step_of, unknown

logger = logging.getLogger(__name__)

DEMO = "demo"

_PYTHIA_NAME = re.compile(r"EleutherAI/pythia-[0-9.]+[mb](-deduped)?(-(data-|weight-)?seed[0-9]+)?")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_FOLDER = re.compile(r"step|checkpoint-")
_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a model, at hand or not."""

    label: str
    """A hub revision or the name of a folder."""

    step: int
    """Training step; -1 where it is not known."""

    model: str
    """What was asked for: `demo`, a hub id or a directory."""

    location: str
    """The hub id, or the checkpoint's own directory."""

    commit: str | None = None
    """The commit to hold on to; None takes what the label stands for now, and outside the hub."""


@dataclass(frozen=True)
class Files:
    """A checkpoint on disk."""

    directory: Path
    weights: tuple[Path, ...]
    config: Path

    sha256: dict[str, str]
    """Weight file name -> hex digest."""

    commit: str | None
    """Where the files came from; None outside the hub."""


@dataclass(frozen=True)
class Availability:
    """What it takes to have one checkpoint on disk."""

    checkpoint: Checkpoint

    n_bytes: int | None = None
    """Bytes of its weights; None while that is not known."""

    to_fetch: int | None = 0
    """Bytes still to be fetched, None where not known; files shared with an earlier checkpoint are counted there."""

    problem: str | None = None
    """Why it cannot be had."""

    @property
    def on_disk(self) -> bool:
        return self.n_bytes is not None and self.to_fetch == 0 and self.problem is None


def resolve(model: str, wanted: Sequence[str], cache: Path) -> list[Checkpoint]:
    """The wanted checkpoints, ascending by step, unknown steps last.

    `wanted` are labels, steps, ranges `A..B` and the sets `study`, `log` and `all`; none at all is the model's
    sensible default.  The network is asked only for what cannot be known without it.
    Raises `UserError` for what the model does not have.
    """
    shelf, place = _shelf(model, cache)
    steps: dict[str, int] = {}
    for item in wanted or (shelf.default,):
        steps |= select(shelf, item)
    order = sorted(steps, key=lambda label: (steps[label] < 0, steps[label], label == "main", label))
    return [Checkpoint(label, steps[label], model, str(place / label) if place else model) for label in order]


def fetch(checkpoint: Checkpoint, cache: Path, recorded: Mapping[str, Any] | None = None) -> Files:
    """The checkpoint's files, complete and hashed; what is not on disk is trained or downloaded.

    Files that still have the size and the time of their last change that were `recorded` are not hashed again.
    Raises `UserError` when they cannot be had.
    """
    if checkpoint.model != DEMO and not os.path.isabs(checkpoint.location):
        return _from_hub(checkpoint)
    directory = _grown(checkpoint, cache) if checkpoint.model == DEMO else Path(checkpoint.location)
    return _on_disk(directory, told=_unchanged(directory, recorded))


def plan(checkpoints: Sequence[Checkpoint], cache: Path) -> list[Availability]:
    """What `fetch` would have to bring, checkpoint by checkpoint; those on the hub come back pinned to their commit.

    Raises `UserError` when none of them can be had.
    """
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        needs = list(pool.map(functools.partial(_need, cache=cache), checkpoints))
    supplies, counted = [], set[str]()
    for need in needs:
        sizes = [size for blob, size in need.missing.items() if blob not in counted]
        counted |= need.missing.keys()
        supplies.append(replace(need.supply, to_fetch=_sum(sizes)))
    if supplies and all(supply.problem for supply in supplies):
        raise UserError(supplies[0].problem)
    return supplies


def description(checkpoint: Checkpoint, cache: Path) -> Path | None:
    """A directory with the checkpoint's configuration and tokenizer, fetched without its weights.

    None for the embedded series while it is not trained.  Raises `UserError` when they cannot be had.
    """
    if checkpoint.model == DEMO or os.path.isabs(checkpoint.location):
        directory = Path(checkpoint.location)
        return files.config_file(directory).parent if directory.is_dir() else None
    found = _find(checkpoint)
    return found if isinstance(found, Path) else hub.download(found, _beside(found))


def _shelf(model: str, cache: Path) -> tuple[RevisionIndex, Path | None]:
    """What the name stands for, and the directory that holds it; None for the hub."""
    path = os.path.expanduser(model)
    if model == DEMO:
        return RevisionIndex(model, _demo_steps, "all"), (cache / DEMO).resolve()
    if os.path.isdir(path):
        return _local_shelf(model, Path(path).resolve())
    if os.path.exists(path):
        raise UserError(f"--model {model} is a file; give the directory that holds {files.CONFIG} and the weights")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).parent.absolute() == cache.absolute():
        raise UserError(f"--model {model}: there is no such directory; give one, a hub id (owner/name) or {DEMO}")
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"--model {model!r} is neither a directory here nor a hub id (owner/name)")
    if _PYTHIA_NAME.fullmatch(model):
        known = {f"step{step}": step for step in PYTHIA} | {"main": PYTHIA[-1]}
        # Other names are revisions all the same: a commit, a branch added later.
        return RevisionIndex(
            model, lambda: known, "study", lambda label: label not in ("", "main") and step_of(label) < 0
        ), None
    ask = functools.cache(lambda: {name: step_of(name) for name in hub.revisions(model)})
    return RevisionIndex(model, ask, "main", bool), None


def _local_shelf(model: str, directory: Path) -> tuple[RevisionIndex, Path]:
    """A series where there is one: a trainer leaves its last weights above its checkpoints."""
    folders = sorted(path.name for path in directory.iterdir() if _FOLDER.match(path.name) and path.is_dir())
    if folders:
        held = {name: step_of(name) for name in folders}
        return RevisionIndex(model, lambda: held, "all"), directory
    if (directory / files.CONFIG).is_file() and any((directory / form).is_file() for form in files.WEIGHTS):
        return RevisionIndex(model, lambda: {directory.name: step_of(directory.name)}, "all"), directory.parent
    raise UserError(
        f"--model {model} is no checkpoint ({files.CONFIG} and weights: {files.FORMS_TOLD}) and has no step*/ or "
        f"checkpoint-*/ in it; {files.contents(directory)}"
    )


def _demo_steps() -> Mapping[str, int]:
    from .demo import STEPS

    return {f"step{step}": step for step in STEPS}


def _grown(checkpoint: Checkpoint, cache: Path) -> Path:
    from .demo import train

    # Even where this step is there: training that was interrupted goes on before anything is handed out.
    train(cache / DEMO)
    return cache / DEMO / checkpoint.label


def _on_disk(directory: Path, commit: str | None = None, told: Mapping[str, str | None] | None = None) -> Files:
    """The files in a directory; digests that were not `told` are computed."""
    try:
        config, weights = files.config_file(directory), files.weight_files(directory)
        sha256 = {path.name: (told or {}).get(path.name) or files.sha256(path) for path in weights}
    except OSError as error:
        raise UserError(
            f"{error.filename or directory} cannot be read: {error.strerror}; mend and run again"
        ) from error
    return Files(directory, weights, config, sha256, commit)


def _unchanged(directory: Path, recorded: Mapping[str, Any] | None) -> dict[str, str]:
    """Recorded digests of the weight files that have not been touched since."""
    if recorded is None or not directory.is_dir():
        return {}
    stamps = recorded.get("stamps", {})
    same = {path.name for path in files.weight_files(directory) if files.stamp(path) == stamps.get(path.name)}
    return {name: digest for name, digest in recorded["sha256"].items() if name in same}


def _from_hub(checkpoint: Checkpoint) -> Files:
    repo, commit = checkpoint.location, checkpoint.commit
    # A commit never changes: once it is here whole, there is nothing to ask.
    if commit and (directory := hub.cached(repo, commit)) and files.is_whole(directory):
        return _in_hub_cache(directory)
    revision = _find(checkpoint)
    if isinstance(revision, Path):
        return _in_hub_cache(revision)
    form = _form(revision)
    weights = [form]
    if files.is_index(form):
        weights += files.shards(hub.download(revision, weights) / form)
        if absent := [file for file in weights if file not in revision.files]:
            raise UserError(
                f"{repo} revision {revision.name} is incomplete on the hub: {form} names {absent[0]}, "
                "which is not there; leave it out"
            )
    directory = hub.download(revision, {*weights, *_beside(revision)})
    return _on_disk(directory, revision.commit, {file: revision.files[file].sha256 for file in weights})


def _in_hub_cache(directory: Path) -> Files:
    told = {path.name: hub.sha256_of_blob(path) for path in directory.iterdir()}
    return _on_disk(directory, directory.name, told)


def _find(checkpoint: Checkpoint) -> hub.Revision | Path:
    """What the hub tells of a checkpoint, or its folder in the cache where the hub tells nothing."""
    repo, name = checkpoint.location, checkpoint.commit or checkpoint.label
    try:
        return hub.look_up(repo, name)
    except hub.NoRevision:
        raise unknown(name, repo, hub.revisions(repo)) from None
    except hub.Unreachable as unreachable:
        directory = hub.cached(repo, name)
        if directory is None:
            raise
        logger.warning("%s; %s %s is read from the cache", unreachable, repo, name)
        return directory


def _form(revision: hub.Revision) -> str:
    """The form of weights to take.  Raises `UserError` when the revision is no checkpoint."""
    where, found = f"{revision.repo} revision {revision.name}", files.some(sorted(revision.files))
    if files.CONFIG not in revision.files:
        raise UserError(f"{where} is no checkpoint: no {files.CONFIG} in it; found there: {found}")
    form = files.best_form(revision.files)
    if form is None:
        raise UserError(f"{where} holds no weights ({files.FORMS_TOLD}); found there: {found}")
    return form


def _beside(revision: hub.Revision) -> list[str]:
    return [name for name in files.BESIDE_WEIGHTS if name in revision.files]


@dataclass(frozen=True)
class _Need:
    supply: Availability
    missing: Mapping[str, int | None] = field(default_factory=dict)
    """Bytes of every blob that is not on disk."""


def _need(checkpoint: Checkpoint, cache: Path) -> _Need:
    try:
        if checkpoint.model == DEMO:
            directory = cache / DEMO / checkpoint.label
            return _Need(Availability(checkpoint, files.n_bytes(directory) if directory.is_dir() else None))
        if os.path.isabs(checkpoint.location):
            directory = files.config_file(Path(checkpoint.location)).parent
            return _Need(Availability(checkpoint, files.n_bytes(directory)))
        return _hub_need(checkpoint)
    except UserError as refusal:
        return _Need(Availability(checkpoint, problem=str(refusal)))


def _hub_need(checkpoint: Checkpoint) -> _Need:
    revision = _find(checkpoint)
    if isinstance(revision, Path):
        return _Need(Availability(replace(checkpoint, commit=revision.name), files.n_bytes(revision)))
    form = _form(revision)
    weights = [form]
    if files.is_index(form):
        # Finding by their names: a plan fetches nothing, the index neither.
        weights += [file for file in revision.files if files.looks_like_shard(file, form)]
    n_bytes = _sum([revision.files[file].size for file in weights])
    missing = hub.missing(revision, {*weights, *_beside(revision)})
    return _Need(Availability(replace(checkpoint, commit=revision.commit), n_bytes), missing)


def _sum(sizes: Sequence[int | None]) -> int | None:
    """Their sum, unless one of them is not known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None
