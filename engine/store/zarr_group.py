"""zarr v3 groups along a checkpoint axis: made whole or not at all, grown at the end, marked complete last."""

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
            raise UserError(f"{path} cannot be read as a zarr store: {' '.join(str(error).split())}") from error

    @property
    def attrs(self) -> dict[str, Any]:
        return dict(self.group.attrs)

    def array(self, name: str) -> zarr.Array[Any]:
        found = self.group[name]
        assert isinstance(found, zarr.Array)
        return found

    def values(self, name: str) -> np.ndarray:
        """A whole small array."""
        return np.asarray(self.array(name)[...])

    def dataset(self) -> xr.Dataset:
        """Every array, lazily, with labelled dimensions.  Raises `UserError` for a group cut off while growing."""
        n = len(self.rows())
        if any(self.array(name).shape[0] != n for name in self._on_checkpoint_axis()):
            raise UserError(f"{self.path} was cut off while checkpoints were added; run that command again")
        return xr.open_zarr(self.path, consolidated=False, mask_and_scale=False)

    def rows(self) -> list[CheckpointRow]:
        """Every checkpoint on the axis, complete or not, in the order of the axis."""
        return [
            CheckpointRow(str(label), int(step))
            for label, step in zip(self.values("checkpoint"), self.values("step"), strict=False)
        ]

    def complete(self) -> dict[str, int]:
        """Label -> index of every finished checkpoint, in order of training; an unknown step (-1) comes last."""
        marks = self.values("complete")
        done = [(row.step < 0, row.step, index, row.label) for index, row in enumerate(self.rows()) if marks[index]]
        return {label: index for _, _, index, label in sorted(done)}

    def index(self, label: str) -> int:
        return [row.label for row in self.rows()].index(label)

    def add(self, rows: Sequence[CheckpointRow]) -> None:
        """Put checkpoints that are not there yet at the end of the axis, incomplete.

        Raises `UserError` when a label is there with another step.
        """
        held = self.rows()
        steps = {row.label: row.step for row in held}
        new = [row for row in rows if row not in held]
        if clash := [row for row in new if row.label in steps]:
            label, step = clash[0].label, clash[0].step
            raise UserError(
                f"{self.path} holds {label} as step {steps[label]}, now it is step {step}; use another --store"
            )
        everything = [*held, *new]
        # `checkpoint` grows last: readers go by its length, and a growth that was interrupted is simply done again.
        for name in sorted(self._on_checkpoint_axis(), key="checkpoint".__eq__):
            array = self.array(name)
            array.resize((len(everything), *array.shape[1:]))
            if name == "step":
                array[:] = np.array([row.step for row in everything])
            if name == "checkpoint":
                array[:] = np.array([row.label for row in everything], dtype=object)

    def _on_checkpoint_axis(self) -> list[str]:
        return [name for name, array in self.group.arrays() if dims_of(array)[:1] == ("checkpoint",)]


def dims_of(array: Any) -> tuple[str, ...]:
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
    """A small array, written at once."""
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
    """An array to be written checkpoint by checkpoint; NaN, False, 0 or "" where nothing is yet, or `fill`.

    Uncompressed: activations hardly shrink, and reading is then as fast as the disk.
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
    return {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # headlapse itself, where it runs from a clone
        return "not installed"


def refuse_difference(where: Path, held: Mapping[str, Any], asked: Mapping[str, Any], mend: str) -> None:
    """Raise `UserError` naming every field in which `asked` differs from what `held` says."""
    keys = [key for key in {**held, **asked} if held.get(key) != asked.get(key)]
    if keys:
        told = "; ".join(f"{key} is {_short(held.get(key))} there, {_short(asked.get(key))} asked" for key in keys)
        raise UserError(f"{where} answers another question: {told}; {mend}")


def is_group(path: Path) -> bool:
    """Whether `path` is a zarr group that appeared whole."""
    return not path.name.startswith(".") and (path / "zarr.json").is_file()


def attributes(path: Path) -> dict[str, Any]:
    """A group's attributes without opening it; empty where there is none."""
    try:
        found = json.loads((path / "zarr.json").read_text()).get("attributes", {})
    except (OSError, ValueError):
        return {}
    return dict(found)


def last_write_ns(path: Path) -> int:
    """When a group was made or a checkpoint of it completed, whichever was later, in nanoseconds."""
    marks = [path / "zarr.json", path / "complete" / "c"]
    return max(mark.stat().st_mtime_ns for mark in marks if mark.exists())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A directory to write into that takes the name `path` once the body is through."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    remove(path)
    os.replace(partial, path)


def refuse_foreign(path: Path) -> None:
    """Raise `UserError` where `path` cannot be a store's place: it is something else, or hidden, or has no name."""
    if not path.name or path.name.startswith("."):
        raise UserError(f"--store {path}: give a store's own folder, with a name that does not start with a dot")
    if path.exists() and not is_group(path):
        raise UserError(f"{path} is there, is no store and is left alone; choose another --store")


def remove(path: Path) -> None:
    """Delete a store or group.  Raises `UserError` for a directory that is none."""
    refuse_foreign(path)
    if not path.exists():
        return
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other writers for the length of the body; a killed holder lets go by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {path}; wait for it, or use another --store") from None
        yield


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
