"""Hugging Face's hub through its own client: what a repository holds, and downloads into the client's cache.

The client reads HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE.  Its errors become a `UserError` of one line.
"""

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..runtime.errors import UserError
from ..runtime.format import format_bytes
from ..runtime.shortage import shortage_of
from .files import CONFIG, sha256
from .hashing import require_content
from .hub_answers import DistrustedAnswer, guard_client, is_commit, require_revision

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_SLACK = 16_000_000
"""Bytes beyond what is announced, for what the client counts in one piece."""

_RUN_AGAIN = "run it again, files that are complete are kept"


class Unreachable(UserError):
    """The hub gave no usable answer; the client's cache may still have the files."""


class NoRevision(LookupError):
    """The repository exists, the revision does not."""


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says about one file."""

    size: int | None
    """Bytes."""

    blob: str | None
    """Its name in the client's cache: the sha256 of a large (LFS) file, the git hash of a small one."""

    sha256: str | None
    """Known of large files only."""

    def __post_init__(self) -> None:
        """Raises `TypeError` for what is neither: the client passes on whatever the hub says."""
        for value, kind in ((self.size, int), (self.blob, str), (self.sha256, str)):
            if not isinstance(value, kind | None):
                raise TypeError(f"{value!r} is no {kind.__name__}")


@dataclass(frozen=True)
class Revision:
    """One revision of a repository, as the hub describes it."""

    repo: str

    name: str
    """A branch, a tag or a commit."""

    commit: str
    files: Mapping[str, RemoteFile]
    """By their names in the subfolder."""

    subfolder: str = ""
    """Where in the repository the files are; empty for all of it."""

    def path(self, name: str) -> str:
        """A file's name in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def __str__(self) -> str:
        return f"{self.path('').rstrip('/') + ' of ' if self.subfolder else ''}{self.repo} revision {self.name}"


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the client's cache."""

    directory: Path
    commit: str


def look_up(repo: str, name: str, subfolder: str = "") -> Revision:
    """Ask the hub what a revision, or one folder of it, holds, in one request.

    Raises `NoRevision`, `Unreachable`, or `UserError` when the repository is missing or closed to the user.
    """
    from huggingface_hub import HfApi, constants

    require_revision(name)
    with _explaining(repo, name):
        info = HfApi().model_info(repo, revision=name, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        inside = f"{subfolder}/" if subfolder else ""
        files = {
            sibling.rfilename.removeprefix(inside): RemoteFile(
                size=sibling.size,
                blob=sibling.lfs.sha256 if sibling.lfs else sibling.blob_id,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
            )
            for sibling in info.siblings or ()
            if sibling.rfilename.startswith(inside)
        }
        return Revision(repo, name, str(info.sha), files, subfolder)


def folders(repo: str, name: str) -> list[str]:
    """The folders of a revision that hold a checkpoint's configuration, as far as they are here where the hub gives no
    answer.  Raises as `look_up` does, but for a revision that is not there, which is a `UserError`."""
    try:
        names: Iterable[str] = look_up(repo, name).files
    except NoRevision:
        raise UserError(f"--revision {name}: {repo} has no such branch, tag or commit") from None
    except Unreachable:
        snapshot = cached(repo, name)
        if snapshot is None:
            raise
        names = (path.relative_to(snapshot.directory).as_posix() for path in snapshot.directory.rglob(CONFIG))
    return sorted(name.removesuffix(f"/{CONFIG}") for name in names if name.endswith(f"/{CONFIG}"))


def repositories(owner: str, start: str) -> list[str]:
    """Ids of an owner's models whose names begin so.  Raises as `look_up` does."""
    from huggingface_hub import HfApi

    with _explaining(owner):
        names = [str(model.id) for model in HfApi().list_models(author=owner, search=start or None)]
    return sorted(name for name in names if name.startswith(f"{owner}/{start}"))


def revisions(repo: str) -> list[str]:
    """Every branch and tag.  Raises as `look_up` does."""
    from huggingface_hub import HfApi

    with _explaining(repo):
        refs = HfApi().list_repo_refs(repo)
        names = list(dict.fromkeys(str(ref.name) for ref in [*refs.branches, *refs.tags]))
    for name in names:
        require_revision(name)
    return names


def cached(repo: str, name: str, subfolder: str = "") -> Snapshot | None:
    """A revision, or a folder of one, in the client's cache, complete or not; None where it has none.  Uses no
    network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    require_revision(name)
    try:
        # Without patterns the client would refuse a folder that lacks files which we never download.
        folder = snapshot_download(repo, revision=name, allow_patterns=["config.json"], local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    directory = Path(folder, subfolder)
    # Whatever the cache has noted of the name: a commit's folder is called after it.
    return Snapshot(directory, Path(folder).name) if is_commit(Path(folder).name) and directory.is_dir() else None


def download(revision: Revision, names: Collection[str]) -> Path:
    """Download the named files of a revision into the client's cache, and return their folder.

    What is in the cache already is not downloaded again.  Raises `UserError` when the download breaks off, the disk is
    full, or a file is not what the hub says: by its size, and the small ones beside the weights by their hash, too.
    """
    from huggingface_hub import snapshot_download

    repo, name = revision.repo, revision.name
    announced = _require_room(revision, names)
    with _explaining(repo, name, downloading=True), _one_bar(announced) as bar:
        # By name, not by commit: the client then records in its cache which commit the name stands for, and finds the
        # name again without a network.
        paths = sorted(map(revision.path, names))
        folder = Path(snapshot_download(repo, revision=name, allow_patterns=paths, tqdm_class=bar))
    if folder.name != revision.commit:
        raise UserError(f"{repo} revision {name} was moved to another commit while it was fetched; run it again")
    directory = folder / revision.subfolder
    for file in names:
        remote, path = revision.files[file], directory / file
        _require_size(path, remote.size)
        # Weights take long to hash: that is done while they are read.
        if remote.blob and not file.endswith(_WEIGHT_SUFFIXES):
            require_content(path, remote.blob, sha256(path))
    return directory


def _require_room(revision: Revision, names: Collection[str]) -> int:
    """The bytes that are announced of the files that are not here yet.

    Raises `UserError` where the disk has no room for them, or where the hub does not say how large a file is.
    """
    sizes = missing(revision, names)
    if unknown := [blob for blob, size in sizes.items() if size is None or size < 0]:
        raise UserError(f"{revision}: the hub does not say how large {unknown[0]} is")
    announced = sum(size or 0 for size in sizes.values())
    cache = hub_cache()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
    if announced > free:
        raise UserError(
            f"{revision} takes {format_bytes(announced)}, {format_bytes(free)} are free "
            f"in {cache}; make room, or set HF_HOME to a larger disk"
        )
    return announced


def missing(revision: Revision, names: Collection[str]) -> dict[str, int | None]:
    """Blob -> bytes of the named files that are not in the client's cache yet; None where the size is not known."""
    from huggingface_hub import try_to_load_from_cache

    folder = _blobs_of(revision.repo)
    absent: dict[str, int | None] = {}
    for name in names:
        file = revision.files[name]
        in_cache = try_to_load_from_cache(revision.repo, revision.path(name), revision=revision.commit)
        if not isinstance(in_cache, str) and not (file.blob and (folder / file.blob).exists()):
            absent[file.blob or f"{revision.commit}/{revision.path(name)}"] = file.size
    return absent


def blobs(revision: Revision, names: Collection[str]) -> set[Path]:
    """Where the client's cache keeps the named files, or will; of those whose place the hub tells."""
    folder = _blobs_of(revision.repo)
    return {folder / blob for name in names if (blob := revision.files[name].blob)}


def remove_blob(blob: Path) -> None:
    """Remove a file from the client's cache, under every name that it has there."""
    for link in (blob.parent.parent / "snapshots").rglob("*"):
        if _blob(link) == blob:
            link.unlink(missing_ok=True)
    for place in (blob, *blob.parent.glob(f"{blob.name}.*.incomplete"), blob.with_name(f"{blob.name}.incomplete")):
        place.unlink(missing_ok=True)


def hub_cache() -> Path:
    """The folder of the client's cache, there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


def _blobs_of(repo: str) -> Path:
    """The folder of a repository's files in the client's cache, which are named by their hashes."""
    from huggingface_hub.file_download import repo_folder_name

    return hub_cache() / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"


def digest_of_blob(path: Path) -> str | None:
    """What a file in the cache was published as, which is its blob's name: the sha256 of a large file, git's hash of a
    small one; None where the blob's name is neither."""
    # Follow one link only: a further one leads to a store whose names are other hashes.
    blob = _blob(path)
    return blob.name if blob != path and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name) else None


def _blob(path: Path) -> Path:
    """Where the cache keeps a file's bytes."""
    if not path.is_symlink():
        return path
    blob = path.parent / os.readlink(path)
    return Path(os.path.normpath(blob)) if blob.parent.name == "blobs" else path


def _require_size(path: Path, size: int | None) -> None:
    if not path.is_file():
        raise UserError(f"{path.name} did not arrive at {path.parent}; {_RUN_AGAIN}")
    n_bytes = path.stat().st_size
    if size is not None and n_bytes != size:
        raise UserError(f"{path.name} has {n_bytes} bytes, the hub says {size}; delete {_blob(path)} and run it again")


@contextmanager
def _explaining(repo: str, name: str | None = None, downloading: bool = False) -> Iterator[None]:
    """Turn the client's errors into one line: what was asked, what was found and what to do."""
    import httpx
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    guard_client()
    what = repo if name is None else f"{repo} revision {name}"
    failure = f"the download of {what} from {hub} broke off" if downloading else f"{hub} cannot be reached for {what}"
    remedy = _RUN_AGAIN if downloading else "check the network and HF_ENDPOINT, and run it again"
    try:
        yield
    except DistrustedAnswer:
        raise
    except errors.RevisionNotFoundError as error:
        if downloading:
            raise UserError(
                f"{what} is gone from {hub} since it was looked up; run it again, or leave it out"
            ) from error
        raise NoRevision(name) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{what} lacks a file that {hub} lists; run it again, or leave it out") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo} is gated: accept its terms at {hub}/{repo}, then let `hf auth login` store your token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repo} is neither a directory here nor a model at {hub} that may be read; "
            "check the name, or run `hf auth login` if it is private"
        ) from error
    except errors.DisabledRepoError as error:
        raise UserError(f"{repo} was disabled at {hub}; ask its authors") from error
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo} is neither a directory here nor a hub id ({_cause(error)}); write owner/name"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _status_error(error.response.status_code, hub, what) from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable(f"{what} is not looked up: HF_HUB_OFFLINE is set; unset it to use the network") from error
    except OSError as error:
        if shortage_of(error):
            raise
        disk_error = _disk_error(error, what, constants.HF_HUB_CACHE)
        raise disk_error or Unreachable(f"{failure} ({_cause(error)}); {remedy}") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, RuntimeError) as error:
        if shortage_of(error):
            raise
        # The client's Xet transfers raise RuntimeError for whatever goes wrong on the way.
        raise Unreachable(f"{failure} ({_cause(error)}); {remedy}") from error
    except MemoryError:
        raise
    except Exception as error:  # the client reads an answer as a hub's, whatever it is: KeyError, TypeError and so on
        raise Unreachable(
            f"{hub} does not answer {what} as a hub does ({_cause(error)}); check HF_ENDPOINT and the network"
        ) from error


def _status_error(status: int, hub: str, what: str) -> UserError:
    """The error for an HTTP status that has no exception of its own in the client."""
    if status in (401, 403):
        return UserError(
            f"{hub} refuses access to {what} (status {status}): private, or the token is not valid; "
            "run `hf auth login` with one that may read it"
        )
    if status == 429:
        return Unreachable(
            f"{hub} answers {what} with status 429, too many requests; wait some minutes, "
            "or run `hf auth login` for a higher limit"
        )
    return Unreachable(f"{hub} answers {what} with status {status}; run it again later, or check HF_ENDPOINT")


def _disk_error(error: OSError, what: str, cache: str) -> UserError | None:
    """The error for a disk that cannot be written to; None where the network failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no room for {what} in {cache}: the disk is full; make room, or set HF_HOME to a larger disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{what} cannot be kept in {cache}: {error.strerror}; set HF_HOME to a place to write to")
    return None


def _cause(error: BaseException) -> str:
    """The first cause in one short line; the client wraps it in paragraphs."""
    while isinstance(error.__cause__, BaseException):
        error = error.__cause__
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


@contextmanager
def _one_bar(announced: int) -> Iterator[Any]:
    """A progress bar class for the client's downloads: one bar of bytes, on a terminal only, removed at the end.

    It ends a download that goes on and on: the client writes whatever comes, and compares sizes afterwards.

    By default the client shows three, leaves them open, and shows one of them even where stderr is no terminal.
    """
    from huggingface_hub import constants

    bars: list[tqdm[Any]] = []

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            shown = str(kwargs.get("desc", "")).startswith("Downloading bytes")
            super().__init__(*args, **{**kwargs, "leave": False, "disable": None if shown else True})
            bars.append(self)
            self.n_arrived = 0.0

        def update(self, n: float | None = 1) -> bool | None:
            self.n_arrived += n or 0
            if self.n_arrived > 2 * announced + _SLACK:  # twice: what broke off may be counted again
                raise DistrustedAnswer(
                    f"{constants.ENDPOINT} announced {format_bytes(announced)} and sends more and more; "
                    "check HF_ENDPOINT and the network"
                )
            return super().update(n)

    try:
        yield Bar
    finally:
        for bar in bars:
            bar.close()
