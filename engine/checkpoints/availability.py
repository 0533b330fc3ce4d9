"""What it would take to have checkpoints on disk: bytes to download, or why one cannot be had.  Downloads nothing."""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..runtime.errors import UserError
from . import files, hub
from .fetch import files_beside_weights, find_revision, weight_form
from .resolve import Checkpoint
from .series import demo_seed

_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class Availability:
    """What it takes to have one checkpoint on disk."""

    checkpoint: Checkpoint

    n_bytes: int | None = None
    """Bytes of its weights; None where they are not known."""

    to_fetch: int | None = 0
    """Bytes still to be downloaded; None where they are not known.  A file that an earlier checkpoint of the list
    shares is counted with that one."""

    problem: str | None = None
    """Why the checkpoint cannot be had."""

    lacks_files: bool = False
    """Whether any of its files is still to be downloaded, with whichever checkpoint it is counted."""

    @property
    def on_disk(self) -> bool:
        return self.n_bytes is not None and not self.lacks_files and self.problem is None


def plan(checkpoints: Sequence[Checkpoint], cache: Path) -> list[Availability]:
    """What `fetch` would have to download, checkpoint by checkpoint; those on the hub come back with their commit.

    Raises `UserError` when none of them can be had.
    """
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        needs = list(pool.map(functools.partial(_need, cache=cache), checkpoints))
    availabilities: list[Availability] = []
    counted: set[str] = set()
    for need in needs:
        sizes = [size for blob, size in need.missing.items() if blob not in counted]
        counted |= need.missing.keys()
        availabilities.append(replace(need.availability, to_fetch=_sum(sizes), lacks_files=bool(need.missing)))
    if availabilities and all(each.problem for each in availabilities):
        raise UserError(availabilities[0].problem)
    return availabilities


@dataclass(frozen=True)
class _Need:
    availability: Availability

    missing: Mapping[str, int | None] = field(default_factory=dict)
    """Bytes of every blob that is not on disk.  Blobs are what checkpoints share: files of the same content."""


def _need(checkpoint: Checkpoint, cache: Path) -> _Need:
    try:
        if demo_seed(checkpoint.model) is not None:
            directory = cache / checkpoint.model / checkpoint.label
            return _Need(Availability(checkpoint, files.n_bytes(directory) if directory.is_dir() else None))
        if not checkpoint.is_remote:
            directory = files.config_file(Path(checkpoint.location)).parent
            return _Need(Availability(checkpoint, files.n_bytes(directory)))
        return _hub_need(checkpoint)
    except UserError as error:
        return _Need(Availability(checkpoint, problem=str(error)))


def _hub_need(checkpoint: Checkpoint) -> _Need:
    revision = find_revision(checkpoint.location, checkpoint.revision_name, checkpoint.subfolder)
    if isinstance(revision, hub.Snapshot):
        known = replace(checkpoint, commit=revision.commit)
        return _Need(Availability(known, files.n_bytes(revision.directory)))
    form = weight_form(revision)
    weights = [form]
    if files.is_index(form):
        # Shards are recognised by their names: the index, which lists them, would have to be downloaded first.
        weights += [file for file in revision.files if files.looks_like_shard(file, form)]
    n_bytes = _sum([revision.files[file].size for file in weights])
    missing = hub.missing(revision, {*weights, *files_beside_weights(revision)})
    return _Need(Availability(replace(checkpoint, commit=revision.commit), n_bytes), missing)


def _sum(sizes: Sequence[int | None]) -> int | None:
    """Their sum; None where one of them is not known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None
