"""zarr v3 groups along a checkpoint axis: created as a whole or not at all, extended at the end, marked complete last.

Knows nothing of models or studies.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from ..runtime.errors import UserError
from ..runtime.format import one_line, shorten

_PACKAGES = ("headlapse", "torch", "transformers", "zarr", "numpy")


@dataclass(frozen=True)
class CheckpointRow:
    """One place on the checkpoint axis."""

    label: str
    step: int


class CheckpointArrays:
    """An open group whose arrays share a `checkpoint` axis, with its `step` and its `complete` marks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.group = zarr.open_group(path, mode="r+")
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read as a zarr store: {one_line(error)}") from error

    @property
    def attrs(self) -> dict[str, Any]:
        """A copy of the group's attributes."""
        return dict(self.group.attrs)

    def array(self, name: str) -> zarr.Array[Any]:
        """The array of that name, on disk."""
        array = self.group[name]
        assert isinstance(array, zarr.Array)
        return array

    def values(self, name: str) -> np.ndarray:
        """A whole array in memory; for small ones."""
        return np.asarray(self.array(name)[...])

    def dataset(self) -> xr.Dataset:
        """Every array, lazily, with labelled dimensions.

        Raises `UserError` for a group that was cut off while checkpoints were added.
        """
        n = len(self.rows())
        if any(self.array(name).shape[0] != n for name in self._on_checkpoint_axis()):
            raise UserError(f"{self.path} was cut off while checkpoints were added; run that command again")
        dataset: xr.Dataset = xr.open_zarr(self.path, consolidated=False, mask_and_scale=False)
        return dataset

    def rows(self) -> list[CheckpointRow]:
        """Every checkpoint of the axis, complete or not, in its order."""
        return [
            CheckpointRow(str(label), int(step))
            # Not strict: while an extension is cut off, `step` is longer than `checkpoint`.
            for label, step in zip(self.values("checkpoint"), self.values("step"), strict=False)
        ]

    def complete(self) -> dict[str, int]:
        """Label -> index of every complete checkpoint, in order of training; an unknown step (-1) comes last."""
        marks = self.values("complete")
        complete = [(row.step < 0, row.step, i, row.label) for i, row in enumerate(self.rows()) if marks[i]]
        return {label: index for _, _, index, label in sorted(complete)}

    def index(self, label: str) -> int:
        """Where a checkpoint is on the axis."""
        return [row.label for row in self.rows()].index(label)

    def add(self, rows: Sequence[CheckpointRow]) -> None:
        """Add the checkpoints that are not on the axis yet at its end, incomplete.

        Raises `UserError` when a label is on the axis with another step.
        """
        present = self.rows()
        steps = {row.label: row.step for row in present}
        new = [row for row in rows if row not in present]
        if clash := [row for row in new if row.label in steps]:
            label, step = clash[0].label, clash[0].step
            raise UserError(
                f"{self.path} holds {label} as step {steps[label]}, now it is step {step}; use another --store"
            )
        every_row = [*present, *new]
        # `checkpoint` is extended last: readers go by its length, and an extension that was cut off is repeated.
        for name in sorted(self._on_checkpoint_axis(), key="checkpoint".__eq__):
            array = self.array(name)
            array.resize((len(every_row), *array.shape[1:]))
            if name == "step":
                array[:] = np.array([row.step for row in every_row])
            if name == "checkpoint":
                array[:] = np.array([row.label for row in every_row], dtype=object)

    def _on_checkpoint_axis(self) -> list[str]:
        return [name for name, array in self.group.arrays() if dims_of(array)[:1] == ("checkpoint",)]


def dims_of(array: Any) -> tuple[str, ...]:
    """The names of an array's dimensions."""
    return tuple(array.metadata.dimension_names)


def start(path: Path, rows: Sequence[CheckpointRow]) -> zarr.Group:
    """A new group with nothing but its checkpoint axis."""
    group = zarr.open_group(path, mode="w")
    put_axis(group, "checkpoint", [row.label for row in rows])
    put(group, "step", np.array([row.step for row in rows]), ("checkpoint",))
    put_empty(group, "complete", (len(rows),), (1,), bool, ("checkpoint",))
    return group


def put_axis(group: zarr.Group, name: str, values: Sequence[str] | np.ndarray) -> None:
    """A coordinate: the values of one dimension."""
    array = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    put(group, name, array, (name,))


def put(group: zarr.Group, name: str, values: np.ndarray, dims: tuple[str, ...]) -> None:
    """An array in one chunk, written at once; for small ones."""
    dtype: Any = str if values.dtype.kind in "OU" else values.dtype
    chunks = tuple(max(1, n) for n in values.shape)
    array = group.create_array(name, shape=values.shape, dtype=dtype, dimension_names=dims, chunks=chunks)
    array[...] = values.astype(object) if values.dtype.kind == "U" else values


def put_empty(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    dims: tuple[str, ...],
    shards: tuple[int, ...] | None = None,
    fill: Any = None,
) -> None:
    """An array to be written checkpoint by checkpoint; until then NaN, False, 0 or "", or `fill`.

    Uncompressed: activations hardly shrink, and are then read as fast as the disk allows.
    """
    if fill is None:
        fill = {"f": float("nan"), "U": ""}.get(np.dtype(dtype).kind, 0)
    group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype=dtype,
        dimension_names=dims,
        fill_value=fill,
        compressors=None,
    )


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    return {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # headlapse itself, where it runs from a clone
        return "not installed"


def refuse_difference(path: Path, stored: Mapping[str, Any], requested: Mapping[str, Any], remedy: str) -> None:
    """Raise `UserError` naming every field in which the `requested` settings differ from the `stored` ones."""
    keys = [key for key in {**stored, **requested} if stored.get(key) != requested.get(key)]
    if keys:
        differences = (f"{key} is {_json(stored.get(key))} there, {_json(requested.get(key))} asked" for key in keys)
        raise UserError(f"{path} has other settings: {'; '.join(differences)}; {remedy}")


def is_group(path: Path) -> bool:
    """Whether `path` is a zarr group that was created completely."""
    return not path.name.startswith(".") and (path / "zarr.json").is_file()


def attributes(path: Path) -> dict[str, Any]:
    """A group's attributes, without opening it; empty where there is no group."""
    try:
        values = json.loads((path / "zarr.json").read_text()).get("attributes", {})
    except (OSError, ValueError):
        return {}
    return dict(values)


def last_write_ns(path: Path) -> int:
    """When a group was created or a checkpoint of it completed, whichever was later, in nanoseconds."""
    marks = [path / "zarr.json", path / "complete" / "c"]
    return max(mark.stat().st_mtime_ns for mark in marks if mark.exists())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A directory to write into, which is renamed to `path` once the body has ended without an error."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    remove(path)
    os.replace(partial, path)


def refuse_foreign(path: Path) -> None:
    """Raise `UserError` where `path` is something other than a store, hidden, or has no name."""
    if not path.name or path.name.startswith("."):
        raise UserError(f"--store {path}: give a store's own folder, with a name that does not start with a dot")
    if path.exists() and not is_group(path):
        raise UserError(f"{path} is there, is no store and is left alone; choose another --store")


def remove(path: Path) -> None:
    """Delete a store or group.  Raises `UserError` for anything else."""
    refuse_foreign(path)
    if not path.exists():
        return
    # Renamed first: if deleting is interrupted, no half of a store is left under its name.
    deleted = path.with_name(f".{path.name}.gone")
    shutil.rmtree(deleted, ignore_errors=True)
    path.rename(deleted)
    shutil.rmtree(deleted)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path` while the body runs; the system releases a killed process's lock.

    Raises `UserError` where another one is writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {path}; wait for it, or use another --store") from None
        yield


def _json(value: Any) -> str:
    return shorten(json.dumps(value), 60)
