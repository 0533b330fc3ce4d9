"""Groups as folders on a disk: written whole or not at all, made durable, replaced and removed without leaving halves.

What stands beside a store under a name that starts with a dot is on its way in or out, or a lock; `sweep` removes what
a killed process left there.
"""

import glob
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..runtime.durable import rename, sync
from ..runtime.errors import UserError
from .locks import alone, layout_lock, remove_stale, unheld

_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{32}\.partial$")
"""How zarr names a file until it is written: the name of a patched run may end in `.partial` too."""


def is_group(path: Path) -> bool:
    """Whether `path` is a zarr group that was created completely."""
    return (path / "zarr.json").is_file()


def last_write_ns(path: Path) -> int:
    """When a group was created or a checkpoint of it completed, whichever was later, in nanoseconds."""
    marks = [path / "zarr.json", path / "complete" / "c"]
    return max((mark.stat().st_mtime_ns for mark in marks if mark.exists()), default=0)


@contextmanager
def atomic_write(path: Path, store: Path) -> Iterator[Path]:
    """A folder to write a new group of `store` into; it is renamed to `path` once the body has ended without an error.

    The layout lock has to be held.  Readers of the store do not see the folder: it lies beside the store.  What is left
    of it after an error is removed, what a kill leaves is removed the next time.
    """
    partial = _beside(store, f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    rename(partial, path)


def replacement_of(path: Path) -> Path:
    """Where the group that is to replace the one at `path` is built."""
    return path.with_name(f".{path.name}.new")


def put_in_place(path: Path, store: Path) -> None:
    """Replace the group at `path` by the one that was built to replace it, unless another process already has."""
    with layout_lock(store):
        if not replacement_of(path).exists():
            return
        old = _old(path)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        rename(replacement_of(path), path)
        shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Finish a replacement that was cut off between its two renames."""
    if not path.exists() and _old(path).exists() and is_group(replacement_of(path)):
        replacement_of(path).rename(path)


def sweep(store: Path) -> list[str]:
    """Finish or remove what killed processes left beside a store and in its metadata; names of what was there.

    The layout lock has to be held: nothing of this is in use then.
    """
    groups = _groups(store)
    for group in groups:
        recover(group)
    return [path.name for path in _delete(_left_by(store, groups))] + remove_stale(store)


def leftovers(store: Path) -> list[Path]:
    """Everything that killed processes left beside a store and in it, the files of their locks too.

    Raises `UserError` where another process is writing: what it is at would look the same.
    """
    with layout_lock(store):
        return [*unheld(store), *_left_by(store, _groups(store)), *_half_written(store)]


def remove_leftovers(store: Path) -> list[Path]:
    """Finish or remove all of `leftovers`; what was removed.  Raises as it does."""
    locks = unheld(store)
    with alone(store):  # which removes the files of locks when it ends
        groups = _groups(store)
        for group in groups:
            recover(group)
        return locks + _delete([*_left_by(store, groups), *_half_written(store)])


def _groups(store: Path) -> list[Path]:
    """A store and the groups in it, those too that have been renamed on the way to being replaced."""
    patches = store / "patches"
    return [store, store / "mechanism", *patches.glob("*"), *map(_replaced, patches.glob(".*"))]


def _left_by(store: Path, groups: Sequence[Path]) -> list[Path]:
    """What a killed change of a store's layout leaves."""
    beside = [Path(path) for path in glob.glob(glob.escape(str(_beside(store, ""))) + "*.partial")]
    renamed = [path for group in groups for path in (_old(group), _removed(group)) if path.exists()]
    metadata = [path for group in groups for path in [*group.glob("zarr.*.partial"), *group.glob("*/zarr.*.partial")]]
    return list(dict.fromkeys(beside + renamed + metadata))


def _half_written(store: Path) -> list[Path]:
    """Chunks that zarr had not renamed yet when it was killed."""
    halves = (path for path in sorted(store.rglob("*.partial")) if _HALF_WRITTEN.search(path.name) and path.is_file())
    return [path for path in halves if not path.name.startswith("zarr.")]


def _delete(paths: Sequence[Path]) -> list[Path]:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return list(paths)


def refuse_foreign(path: Path) -> None:
    """Raise `UserError` where `path` is something other than a store, hidden, or has no name."""
    if not path.name or path.name.startswith("."):
        raise UserError(f"--store {path}: give a store's own folder, with a name that does not start with a dot")
    if path.exists() and not is_group(path):
        raise UserError(f"{path} is there, is no store and is left alone; choose another --store")


def remove(path: Path) -> None:
    """Delete a store or group.  Raises `UserError` for anything else."""
    if path.exists() and not is_group(path):
        raise UserError(f"{path} is there, is no store and is left alone")
    shutil.rmtree(replacement_of(path), ignore_errors=True)
    if not path.exists():
        return
    # Renamed first: if deleting is interrupted, no half of a store is left under its name.
    shutil.rmtree(_removed(path), ignore_errors=True)
    path.rename(_removed(path))
    shutil.rmtree(_removed(path))


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _removed(path: Path) -> Path:
    return path.with_name(f".{path.name}.gone")


def _replaced(hidden: Path) -> Path:
    """The group that a hidden folder beside it belongs to."""
    return hidden.with_name(hidden.name.removeprefix(".").rpartition(".")[0] or hidden.name)


def _beside(store: Path, name: str) -> Path:
    return store.with_name(f".{store.name}.{name}")
