"""What has to outlive a power cut: files, folders and names that are waited for until they are on the disk."""

import os
from collections.abc import Iterable
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk, under its name."""
    sync_all([path])


def sync_all(paths: Iterable[Path]) -> None:
    """`sync` for several: a folder that holds many of them is waited for once."""
    parents = set()
    for path in map(os.fspath, paths):
        _sync_tree(path)
        parents.add(os.path.dirname(path))
    for parent in sorted(parents):
        if os.path.isdir(parent):
            _fsync(parent)


def _sync_tree(path: str) -> None:
    try:
        entries = os.scandir(path)
    except NotADirectoryError:
        _fsync(path)
        return
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            _sync_tree(entry.path) if entry.is_dir(follow_symlinks=False) else _fsync(entry.path)
    _fsync(path)


def rename(source: Path, path: Path) -> None:
    """Rename a file or folder, which is on the disk already, and wait until its new name is."""
    os.replace(source, path)
    _fsync(path.parent)


def _fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
