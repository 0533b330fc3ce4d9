"""Whether a checkpoint that somebody else is writing is all there: by what its files say of themselves, and by time.

No tensor is read.  A file that is cut off anywhere lacks something that it announces: a safetensors file says at its
start how long it is, the zip archive of a `.bin` ends in a record of what is in it, JSON ends in its last bracket.
What cannot be seen so (a file of the right size that is still being filled, a file that nothing announces) is left to
time: nothing in the folder may have changed for a while.
"""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..runtime.errors import UserError, first_clause
from ..runtime.format import format_bytes, parse_json
from . import files

SETTLING = 3.0
"""Seconds for which nothing in a folder may change before it counts as written."""

_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads none that is longer."""

_ZIP, _SHORTEST = b"PK", 4
"""How a `.bin` begins that is a zip archive, as torch has written them since 2020; bytes that tell it from another."""

Snapshot = frozenset[tuple[str, int, int]]
"""Every file in a folder, at any depth: its path, its size in bytes, its time of last change in nanoseconds."""


def lacking(directory: Path, with_tokenizer: bool = True) -> str:
    """What a checkpoint's folder lacks to be whole, in words; empty where nothing is lacking.

    `with_tokenizer` asks for a tokenizer as well, there or in the folder above.
    """
    try:
        files.config_file(directory)
        for path in files.weight_files(directory):
            _refuse_cut(path)
        if with_tokenizer:
            files.vocabulary_file(directory)
        for name in files.BESIDE_WEIGHTS:
            if name.endswith(".json") and (directory / name).is_file():
                _refuse_no_json(directory / name)
    except UserError as error:
        return first_clause(error)
    except OSError as error:  # it is being put there, or taken away
        return f"{error.filename or directory} cannot be read: {error.strerror}"
    return ""


def snapshot(directory: Path) -> Snapshot:
    """What can be seen of a folder without reading a file."""
    found: set[tuple[str, int, int]] = set()
    for place, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(place, name)
            try:
                status = os.stat(path)
            except FileNotFoundError:  # it has just been renamed or removed
                continue
            found.add((os.path.relpath(path, directory), status.st_size, status.st_mtime_ns))
    return frozenset(found)


class Settling:
    """Since when folders have been as they are, as far as they were looked at: their own clocks are not believed.
    `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[Path, tuple[Snapshot, float]] = {}

    def look(self, directory: Path) -> tuple[Snapshot, float]:
        """What is in the folder, and for how many seconds nothing of that has been seen to change: 0 at first sight."""
        seen, now = snapshot(directory), self._clock()
        before, since = self._since.get(directory, (None, now))
        if seen != before:
            since = now
        self._since[directory] = seen, since
        return seen, now - since


def _refuse_cut(path: Path) -> None:
    """Raise `UserError` for weights that are not all there."""
    if path.name.endswith(".safetensors"):
        n_bytes, announced = path.stat().st_size, _announced(path)
        if n_bytes != announced:
            raise UserError(f"{path} has {format_bytes(n_bytes)} of {format_bytes(announced)}")
    elif not _is_whole_archive(path):
        raise UserError(f"{path} has {format_bytes(path.stat().st_size)} and not yet its end")


def _announced(path: Path) -> int:
    """Bytes that a safetensors file has once it is whole.  Raises `UserError` where its header is not all there."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if len(start) == 8 and length <= _LONGEST_HEADER else b""
    if len(start) < 8 or len(header) < length:
        raise UserError(f"{path} has {format_bytes(path.stat().st_size)} and not yet its whole header")
    try:
        tensors = [entry for name, entry in parse_json(header).items() if name != "__metadata__"]
        return 8 + length + max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
    except (ValueError, TypeError, AttributeError, LookupError):
        raise UserError(f"{path} has no header that can be read") from None


def _is_whole_archive(path: Path) -> bool:
    """Whether the record at a zip archive's end is there and fits what stands before it.

    What is no archive, as torch wrote it before 2020, says nothing of its end.
    """
    with open(path, "rb") as file:
        start = file.read(_SHORTEST)
    if len(start) < _SHORTEST or not start.startswith(_ZIP):
        return len(start) == _SHORTEST
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except zipfile.BadZipFile:
        return False


def _refuse_no_json(path: Path) -> None:
    try:
        parse_json(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is not whole JSON yet") from None
