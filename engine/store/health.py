"""Everything that is wrong with what a store holds: every chunk, mark and identity, not only the first that differs.

Findings are numbers and names; `report.findings.doctor` has the sentences.  No torch.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ..runtime.errors import DamageError, UserError
from ..runtime.format import format_count
from ..study.patch_settings import PatchSettings
from ..study.study import RUNS, Arithmetic, tolerance
from . import integrity
from .checkpoint_arrays import CheckpointArrays
from .disk import is_group
from .integrity import AXIS
from .inventory import visible
from .zarr_group import ALONG_AXIS, dims_of

_ALWAYS_WRITTEN = ("z", "key", "value", "resid_pre", "answer_logits", "logit_diff")
"""Arrays of which a complete checkpoint has every chunk; of others zarr leaves out chunks that hold one value only."""


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written."""

    place: Path
    """A file, or the folder of an array or group."""

    reason: str

    label: str = ""
    """The checkpoint that has it; empty where it concerns all."""

    dim: str = ""
    """What `rows` count: `layer`, mostly."""

    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unread:
    """A group in which nothing else could be checked, since its metadata are damaged."""

    group: Path


@dataclass(frozen=True)
class Unmarked:
    """A checkpoint of which everything is there but the mark that it is complete."""

    group: Path
    label: str


@dataclass(frozen=True)
class Unequal:
    """A patched run in which patching nothing is not the unpatched target run."""

    group: Path
    label: str
    target: str
    """Which unpatched run it should be: clean or corrupt."""

    dim: str
    rows: tuple[int, ...]
    """The layers concerned; none where a subset spans all layers."""

    difference: float
    """The largest, in nats; NaN where a value is missing."""

    bound: float
    """What rounding explains, in nats."""


Finding = Damage | Unread | Unmarked | Unequal


@dataclass
class Amount:
    """How much was compared."""

    n_bytes: int = 0
    """Of values in memory."""


def groups_of(store: Path) -> list[Path]:
    """The store, its mechanism and its patched runs, those too that have lost their metadata."""
    inside = [store / "mechanism", *sorted(visible(store / "patches"))]
    return [store, *(path for path in inside if path.is_dir())]


def check_group(group: Path, store: Path, amount: Amount, advance: Callable[[int], object]) -> Iterator[Finding]:
    """What is wrong with one group of a store; `advance` is called with 1 after each checkpoint of its axis."""
    arrays, damages = _open(group, store)
    yield from damages
    if arrays is None:
        yield Unread(group)
        return
    yield from _check_fixed(arrays, amount)
    marks = yield from _check_marks(arrays)
    for label, is_complete in marks.items():
        if is_complete:
            yield from _check_checkpoint(arrays, label, amount)
        elif is_complete is not None and _has_record(arrays, label):
            yield Unmarked(group, label)
        advance(1)


def check_identities(run: Path, store: Path, dtype: Arithmetic) -> Iterator[Unequal]:
    """Where patching nothing is not the unpatched target run, at the complete checkpoints of a patched run.

    `dtype` is the store's.  Checkpoints that are damaged are left out: `check_group` names them.
    """
    arrays, _ = _open(run, store)
    if arrays is None or not {"mask", "logit_diff"} <= set(arrays.array_names):
        return
    try:
        mask, labels = arrays.values("mask"), list(arrays.complete())
    except DamageError:
        return
    empty = np.flatnonzero(~mask.reshape(len(mask), -1).any(axis=1))
    settings = PatchSettings.from_attributes(arrays.attrs["patch"])
    target = RUNS[1] if settings.direction == "denoise" else RUNS[0]
    for label in labels if len(empty) else ():
        try:
            values, unpatched = arrays.read("logit_diff", label), arrays.read(f"{target}_logit_diff", label)
            bound = _bound(arrays, label, tolerance(settings.dtype, dtype))
        except DamageError:
            continue
        yield from _compare(arrays, label, target, np.take(values, empty, _subset_axis(arrays)), unpatched, bound)


def readable(group: Path, store: Path) -> CheckpointArrays | None:
    """A group of a store, open; None where its metadata are damaged, which `check_group` says."""
    return _open(group, store)[0]


def n_checkpoints(groups: Sequence[Path], store: Path) -> int:
    """Places on the checkpoint axes of all groups that can be opened."""
    return sum(len(arrays.rows()) for group in groups if (arrays := readable(group, store)) is not None)


def provenances(store: CheckpointArrays) -> dict[str, dict[str, Any]]:
    """Where the weights of complete checkpoints came from, by label, as far as it can be read."""
    recorded = {}
    for row in store.rows():
        try:
            if store.stored("complete", row.label):
                recorded[row.label] = dict(store.record(row.label)["provenance"])
        except DamageError:  # `check_group` names it
            continue
    return {label: provenance for label, provenance in recorded.items() if "sha256" in provenance}


def _open(group: Path, store: Path) -> tuple[CheckpointArrays | None, list[Damage]]:
    """The open group, or why it cannot be opened."""
    if not is_group(group):
        return None, [Damage(group / "zarr.json", "it is missing")]
    try:
        if errors := integrity.metadata_damages(group):
            return None, [_damage(group, error) for error in errors]
        return CheckpointArrays(group, store), []
    except DamageError as error:
        return None, [_damage(group, error)]
    except (UserError, KeyError, TypeError) as error:  # format 1 has no seal: zarr reads whatever is there
        return None, [Damage(group, f"it cannot be opened ({error})")]


def _damage(group: Path, error: DamageError) -> Damage:
    place = str(error).partition(" is damaged: ")[0]
    return Damage(Path(place) if place else group, error.reason)


def _check_fixed(arrays: CheckpointArrays, amount: Amount) -> Iterator[Damage]:
    """The arrays without a checkpoint axis."""
    for name in arrays.array_names:
        if dims_of(arrays.array(name))[:1] != (AXIS,):
            try:
                amount.n_bytes += arrays.values(name).nbytes
            except DamageError as error:
                yield Damage(arrays.path / name, error.reason)


def _check_marks(arrays: CheckpointArrays) -> Generator[Damage, None, dict[str, bool | None]]:
    """Label -> whether it is complete; None where that cannot be read."""
    marks: dict[str, bool | None] = {}
    for row in arrays.rows():
        try:
            marks[row.label] = bool(arrays.stored("complete", row.label))
        except DamageError as error:
            marks[row.label] = None
            yield Damage(arrays.path / "complete", error.reason, row.label)
    return marks


def _has_record(arrays: CheckpointArrays, label: str) -> bool:
    """Whether a checkpoint that is not complete was written up to its record, the last but one step."""
    if not arrays.is_sealed:
        return False
    try:
        arrays.record(label)
    except DamageError:  # there is none, or it was being written: nothing was promised yet
        return False
    return True


def _check_checkpoint(arrays: CheckpointArrays, label: str, amount: Amount) -> Iterator[Damage]:
    try:
        record = arrays.record(label)
    except DamageError as error:
        yield Damage(arrays.path / "record", error.reason, label)
        return
    damages: list[Damage] = []
    for name in arrays.array_names:
        if dims_of(arrays.array(name))[:1] == (AXIS,) and name not in (*ALONG_AXIS, "complete", "record"):
            damages += _check_array(arrays, name, label, record, amount)
    if damages and not _is_written_anew(arrays, label, record):
        yield from damages


def _is_written_anew(arrays: CheckpointArrays, label: str, record: Mapping[str, Any]) -> bool:
    """Whether another process has begun to write the checkpoint since its record was read."""
    try:
        return not arrays.stored("complete", label) or arrays.record(label) != record
    except DamageError:
        return False


def _check_array(
    arrays: CheckpointArrays, name: str, label: str, record: Mapping[str, Any], amount: Amount
) -> Iterator[Damage]:
    path = arrays.path / name
    if not arrays.is_sealed and name in _ALWAYS_WRITTEN and (n_missing := _missing_files(arrays, name, label)):
        yield Damage(path, f"{format_count(n_missing, 'chunk')} missing", label)
    try:
        if name in record.get("crc32c", {}):
            values = arrays.read(name, label, record=record)
        else:
            values = arrays.stored(name, label)
        amount.n_bytes += values.nbytes
    except DamageError as error:
        yield from _damaged_rows(arrays, name, label, record, error)


def _missing_files(arrays: CheckpointArrays, name: str, label: str) -> int:
    """Files that a checkpoint should have of an array and has not: zarr reads them as if they held nothing."""
    array, place = arrays.array(name), arrays.path / name / "c" / str(arrays.index(label))
    sizes = zip(array.shape[1:], (array.shards or array.chunks)[1:], strict=True)
    n_files = place.is_file() + sum(path.is_file() and path.suffix != ".partial" for path in place.rglob("*"))
    return max(0, math.prod(math.ceil(length / size) for length, size in sizes) - n_files)


def _damaged_rows(
    arrays: CheckpointArrays, name: str, label: str, record: Mapping[str, Any], error: DamageError
) -> Iterator[Damage]:
    """The damage, for each reason with the rows that have it where rows have checksums of their own."""
    by_reason: dict[str, list[int]] = {}
    n_rows = len(record.get("crc32c", {}).get(name, ()))
    array = arrays.array(name)
    for row in range(n_rows if arrays.has_chunk_a_row(name) else 0):
        try:
            arrays.read(name, label, row, 1, record)
        except DamageError as damage:
            by_reason.setdefault(damage.reason, []).append(row)
    for reason, rows in by_reason.items():
        yield Damage(arrays.path / name, reason, label, *_named(arrays, array, rows))
    if not by_reason:
        yield Damage(arrays.path / name, error.reason, label)


def _named(arrays: CheckpointArrays, array: "zarr.Array[Any]", rows: list[int]) -> tuple[str, tuple[int, ...]]:
    """What rows of an array are: numbers of layers, or places along another dimension."""
    dim = dims_of(array)[1]
    if dim == "layer" and "layer" in arrays.array_names:
        layers = arrays.values("layer")
        return dim, tuple(int(layers[row]) for row in rows)
    return dim, tuple(rows)


def _bound(arrays: CheckpointArrays, label: str, default: float) -> float:
    """What the run's own self-check allowed, in nats; `default` in runs from before it was measured."""
    if "self_check_bound" not in arrays.array_names:
        return default
    measured = float(arrays.read("self_check_bound", label))
    return measured if np.isfinite(measured) else default


def _subset_axis(arrays: CheckpointArrays) -> int:
    return dims_of(arrays.array("logit_diff")).index("subset") - 1


def _compare(
    arrays: CheckpointArrays, label: str, target: str, values: np.ndarray, unpatched: np.ndarray, bound: float
) -> Iterator[Unequal]:
    differences = np.abs(values.astype(float) - unpatched)
    array = arrays.array("logit_diff")
    if "layer" in dims_of(array):
        by_row = differences.reshape(len(differences), -1).max(axis=1)
        rows = [int(row) for row in np.flatnonzero(~(by_row <= bound))]  # NaN is no less than anything
        named = _named(arrays, array, rows)
    else:
        rows, named = [0] if not differences.max() <= bound else [], ("", ())
    if rows:
        yield Unequal(arrays.path, label, target, *named, float(differences.max()), bound)
