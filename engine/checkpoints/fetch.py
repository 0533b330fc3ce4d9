"""From a checkpoint to its files on disk, complete and being hashed; what is not on disk is downloaded or trained."""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.file_lock import hold
from ..runtime.format import format_names
from . import files, hub
from .files import Files
from .hashing import Hashing, require_content
from .resolve import Checkpoint
from .revisions import unknown
from .series import demo_seed
from .training_place import MAIN, read_place

logger = logging.getLogger(__name__)


def fetch(checkpoint: Checkpoint, cache: Path, recorded: Mapping[str, Any] | None = None) -> Files:
    """The checkpoint's files, complete; their hashes are being computed, on threads of their own.

    `recorded` is the provenance in a store: files whose size and time of last change are still the same are not
    hashed again.  The embedded series is trained in the folder `cache`.
    Raises `UserError` when the files cannot be had.
    """
    is_demo = demo_seed(checkpoint.model) is not None
    if not is_demo and checkpoint.is_remote:
        found = _from_hub(checkpoint, recorded)
    else:
        directory = _trained(checkpoint, cache) if is_demo else Path(checkpoint.location)
        found = _from_directory(directory, recorded=recorded)
    return replace(found, tokenizer=_tokenizer(checkpoint.tokenizer)) if checkpoint.tokenizer else found


def bring(checkpoint: Checkpoint, cache: Path, announce: Callable[[set[Path]], None]) -> None:
    """Have the checkpoint's files on disk, without reading them.

    `announce` is told before anything large is downloaded where the client's cache keeps the weights, or will; nothing
    outside the hub, and where the hub gives no answer.
    Raises `UserError` as `fetch` does.
    """
    if demo_seed(checkpoint.model) is not None:
        _trained(checkpoint, cache)
    elif checkpoint.is_remote:
        revision = find_revision(checkpoint.location, checkpoint.revision_name, checkpoint.subfolder)
        if isinstance(revision, hub.Revision):
            announce(hub.blobs(revision, _weights_of(revision)))
            _download(revision)


def on_disk(checkpoint: Checkpoint, cache: Path) -> Files | None:
    """The checkpoint's files as they lie on disk, hashed anew; None where they are not there.  Fetches nothing.

    Raises `UserError` for files that are there and are not whole, or cannot be read.
    """
    is_demo = demo_seed(checkpoint.model) is not None
    if is_demo or not checkpoint.is_remote:
        directory = cache / checkpoint.model / checkpoint.label if is_demo else Path(checkpoint.location)
        return _from_directory(directory) if directory.is_dir() else None
    snapshot = _whole(checkpoint, checkpoint.revision_name)
    return _from_directory(snapshot.directory, snapshot.commit) if snapshot else None


@dataclass(frozen=True)
class Description:
    """What a checkpoint is, without its weights."""

    directory: Path
    """With its configuration."""

    tokenizer: Path
    """The directory of its tokenizer."""


def description(checkpoint: Checkpoint, cache: Path) -> Description | None:
    """The checkpoint's configuration and tokenizer, fetched without its weights.

    None for the embedded series while it is not trained.  Raises `UserError` when they cannot be had.
    """
    directory = Path(checkpoint.location)
    if demo_seed(checkpoint.model) is not None or not checkpoint.is_remote:
        if not directory.is_dir():
            return None
        files.config_file(directory)
    else:
        directory = _beside_weights(checkpoint.location, checkpoint.revision_name, checkpoint.subfolder)
    own = _tokenizer(checkpoint.tokenizer) if checkpoint.tokenizer else directory
    return Description(directory, files.vocabulary_file(own).parent)


def find_revision(repo: str, name: str, subfolder: str = "") -> hub.Revision | hub.Snapshot:
    """What the hub says of a checkpoint, or what the client's cache has of it where the hub gives no answer.

    Raises `UserError` when there is neither.
    """
    try:
        return hub.look_up(repo, name, subfolder)
    except hub.NoRevision:
        raise unknown(name, repo, {label: read_place(label) for label in hub.revisions(repo)}) from None
    except hub.Unreachable as error:
        snapshot = hub.cached(repo, name, subfolder)
        if snapshot is None:
            raise
        logger.warning("%s; %s %s is read from the cache", error, repo, name)
        return snapshot


@functools.cache
def _tokenizer(name: str) -> Path:
    """The directory of a tokenizer that checkpoints do not bring: a directory, or the default branch of a hub id."""
    return Path(name) if os.path.isabs(name) else _beside_weights(name, MAIN)


def _beside_weights(repo: str, name: str, subfolder: str = "") -> Path:
    """The folder of a revision's configuration and tokenizer, downloaded where they were not yet."""
    revision = find_revision(repo, name, subfolder)
    if isinstance(revision, hub.Snapshot):
        return revision.directory
    return hub.download(revision, files_beside_weights(revision))


def _whole(checkpoint: Checkpoint, revision: str) -> hub.Snapshot | None:
    """A revision in the client's cache with all that is needed of it; None where something is missing."""
    snapshot = hub.cached(checkpoint.location, revision, checkpoint.subfolder)
    return snapshot if snapshot and files.is_whole(snapshot.directory, not checkpoint.tokenizer) else None


def weight_form(revision: hub.Revision) -> str:
    """The form of weights that is read.  Raises `UserError` when the revision is no checkpoint."""
    content = format_names(sorted(revision.files))
    if files.CONFIG not in revision.files:
        raise UserError(f"{revision} is no checkpoint: no {files.CONFIG} in it; found there: {content}")
    form = files.best_form(revision.files)
    if form is None:
        raise UserError(f"{revision} holds no weights ({files.WEIGHT_FORMS}); found there: {content}")
    return form


def files_beside_weights(revision: hub.Revision) -> list[str]:
    """Configuration and tokenizer files of a revision, as far as it has them."""
    return [name for name in files.BESIDE_WEIGHTS if name in revision.files]


def prepare(checkpoints: Sequence[Checkpoint], cache: Path) -> None:
    """Train the embedded series as far as these checkpoints need it, if they are its own.

    Nothing else may go on in the process meanwhile: torch and transformers build models by global settings.
    """
    if checkpoints and demo_seed(checkpoints[0].model) is not None:
        _train(checkpoints[0].model, cache, max(each.step for each in checkpoints))


def _trained(checkpoint: Checkpoint, cache: Path) -> Path:
    """The folder of a checkpoint of the embedded series, trained to its end where this one is not there."""
    from .demo import is_trained

    if not is_trained(cache / checkpoint.model, checkpoint.step):
        _train(checkpoint.model, cache)
    return cache / checkpoint.model / checkpoint.label


def _train(series: str, cache: Path, until: int | None = None) -> None:
    from .demo import SERIES, train

    seed = demo_seed(series)
    assert seed is not None, "only the embedded series is trained"
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # of several processes one trains, the others wait for it
        hold(stack, cache / f".{series}.lock", patience=-1)
        train(cache / series, replace(SERIES, seed=seed), until)


def _from_directory(
    directory: Path,
    commit: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    stated: Mapping[str, str] | None = None,
) -> Files:
    """The files in a directory; digests that are not `recorded` for files as they are now are being computed.

    They are compared with what the hub has `stated` of them.
    """
    try:
        config, weights = files.config_file(directory), files.weight_files(directory)
        known = _unchanged(weights, recorded)
    except OSError as error:
        raise UserError(
            f"{error.filename or directory} cannot be read: {error.strerror}; make it readable and run again"
        ) from error
    return Files(directory, weights, config, Hashing(weights, files.sha256, known, stated), commit)


def _unchanged(weights: Sequence[Path], recorded: Mapping[str, Any] | None) -> dict[str, str]:
    """Recorded digests of the weight files that have not been changed since."""
    if recorded is None:
        return {}
    stamps = recorded.get("stamps", {})
    same = {path.name for path in weights if files.stamp(path) == stamps.get(path.name)}
    return {name: digest for name, digest in recorded["sha256"].items() if name in same}


def _from_hub(checkpoint: Checkpoint, recorded: Mapping[str, Any] | None) -> Files:
    # A commit never changes: where it is complete in the cache, the hub need not be asked.
    if checkpoint.commit and (snapshot := _whole(checkpoint, checkpoint.commit)):
        return _from_hub_cache(snapshot, recorded)
    revision = find_revision(checkpoint.location, checkpoint.revision_name, checkpoint.subfolder)
    if isinstance(revision, hub.Snapshot):
        return _from_hub_cache(revision, recorded)
    directory, weights = _download(revision)
    stated = {file: blob for file in weights if (blob := revision.files[file].blob)}
    return _from_directory(directory, revision.commit, recorded, stated)


def _download(revision: hub.Revision) -> tuple[Path, list[str]]:
    """Download what is needed of a revision; its folder and the names of its weights."""
    weights = _weights_of(revision)
    return hub.download(revision, {*weights, *files_beside_weights(revision)}), weights


def _weights_of(revision: hub.Revision) -> list[str]:
    """Names of a revision's weights, after its index was downloaded where it has one.

    Raises `UserError` where it has none, or not all.
    """
    form = weight_form(revision)
    weights = [form]
    if files.is_index(form):
        weights += files.shards(hub.download(revision, weights) / form)
        if absent := [file for file in weights if file not in revision.files]:
            raise UserError(
                f"{revision} is incomplete on the hub: {form} names {absent[0]}, which is not there; leave it out"
            )
    return weights


def _from_hub_cache(snapshot: hub.Snapshot, recorded: Mapping[str, Any] | None) -> Files:
    directory = snapshot.directory
    stated = {path.name: digest for path in directory.iterdir() if (digest := hub.digest_of_blob(path))}
    for name in stated.keys() & set(files.BESIDE_WEIGHTS):
        require_content(directory / name, stated[name], files.sha256(directory / name))
    return _from_directory(directory, snapshot.commit, recorded, stated)
