"""Which process writes what: one lock for a store's layout, held briefly, and one for each checkpoint of a group.

Locks are hidden files beside the store, found by the store's real path, so that two names of one store share them.
They are filelock's: flock where the file system has it, else a marker with its owner's process number; a killed
process's lock is free at once, or taken over.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..runtime.errors import UserError
from ..runtime.file_lock import hold

PATIENCE = 60.0
"""Seconds to wait for another process that lays out a store; it takes milliseconds."""

_LAYOUT = "layout"
_A_MOMENT = 0.2
"""Seconds to wait for a lock that a sweep may hold for a moment."""


@contextmanager
def layout_lock(store: Path) -> Iterator[None]:
    """Keep other processes from creating, growing, replacing or removing `store` while the body runs.

    Raises `UserError` where another process does not let go of it.
    """
    with ExitStack() as stack:
        if not _acquire(stack, store, _LAYOUT, PATIENCE):
            raise UserError(f"another process is changing {store} and has not finished; run this again when it has")
        yield


@contextmanager
def claimed(store: Path, group: str, labels: Sequence[str]) -> Iterator[list[str]]:
    """Those of the checkpoints `labels` of a group that no other process is writing; nobody else can while the body
    runs."""
    with ExitStack() as stack:
        yield [label for label in labels if _acquire(stack, store, f"{group}.{label}", _A_MOMENT)]


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Hold everything of a store.  Raises `UserError` where another process is writing any of it."""
    with layout_lock(store), ExitStack() as stack:
        for file in _files(store):
            if not file.name.endswith(f"@{_LAYOUT}.lock") and not hold(stack, file, 0):
                raise UserError(f"another process is writing {store}; wait for it, or use another --store")
        yield


def remove_stale(store: Path) -> list[str]:
    """Remove lock files that killed processes left; their names."""
    removed = []
    for file in _files(store):
        with ExitStack() as stack:
            if not file.name.endswith(f"@{_LAYOUT}.lock") and hold(stack, file, 0):
                removed.append(file.name)
    return removed


def unheld(store: Path) -> list[Path]:
    """Lock files that killed processes left, which stay.  Raises `UserError` where another process is writing."""
    from filelock import FileLock, Timeout

    files = [file for file in _files(store) if not file.name.endswith(f"@{_LAYOUT}.lock")]
    for file in files:
        lock = FileLock(file, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is writing {store}; wait for it, and run this again") from None
        lock.release()
    return files


def _files(store: Path) -> list[Path]:
    prefix = _prefix(store)
    return sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}*.lock"))


def _prefix(store: Path) -> Path:
    real = Path(os.path.realpath(store))
    return real.with_name(f".{real.name}@")


def _acquire(stack: ExitStack, store: Path, key: str, patience: float) -> bool:
    name = re.sub(r"[^\w.+=-]", "_", key)[:80]
    if name != key:  # two labels may look the same with their odd characters gone
        name += "-" + hashlib.sha256(key.encode()).hexdigest()[:8]
    prefix = _prefix(store)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    return hold(stack, prefix.with_name(f"{prefix.name}{name}.lock"), patience)
