"""zarr v3 groups with a checkpoint axis: how they are laid out, and the checksums that each chunk carries."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ..checkpoints.training_place import UNKNOWN, Place, read_place
from ..runtime.durable import sync
from ..runtime.errors import UserError
from ..runtime.format import shorten
from . import integrity
from .integrity import AXIS, SEAL
from .small_files import SmallFiles

_PACKAGES = ("headlapse", "torch", "transformers", "zarr", "numpy")

_AXIS_CHUNK = 256
"""Labels, steps and so on in one file of the axis."""

ALONG_AXIS = (AXIS, "step", "stage", "tokens_seen")
"""Arrays that say what each place on the axis is.  Groups made before stages were known lack the last two."""

CHECKSUMMED = (Crc32cCodec(),)
"""No compression: activations hardly shrink, and are then read as fast as the disk allows."""


@dataclass(frozen=True)
class CheckpointRow:
    """One place on the checkpoint axis."""

    label: str

    step: int
    """Of training, from the start of its stage; -1 where not known."""

    stage: str = ""
    tokens_seen: int = UNKNOWN
    """Since the start of its stage; -1 where not known."""

    @property
    def place(self) -> Place:
        return Place(self.stage, self.step, self.tokens_seen, read_place(self.label).seed)


EVERY_CHUNK: Any = {"write_empty_chunks": True}
"""zarr's setting for the arrays along the axis: a chunk of nothing but zeros or empty words is a file as well, so that
each can be moved into its place."""


def write_attributes(
    group: zarr.Group, path: Path, attributes: Mapping[str, Any], fixed: Mapping[str, np.ndarray], n_checkpoints: int
) -> None:
    """Write a group's attributes with their seal, at one stroke."""
    plain = json.loads(json.dumps(dict(attributes)))
    sealed = integrity.seal(path, plain, fixed, n_checkpoints)
    group.attrs.put({**plain, SEAL: sealed})
    sync(path / "zarr.json")


def finish_group(group: zarr.Group, path: Path, rows: Sequence[CheckpointRow], attributes: Mapping[str, Any]) -> None:
    """The last step of creating a group: its attributes and its seal."""
    arrays = dict(group.arrays())
    fixed = {name: np.asarray(array[...]) for name, array in arrays.items() if dims_of(array)[:1] != (AXIS,)}
    coordinates = f"{' '.join(ALONG_AXIS[1:])} complete record {attributes['coordinates']}"
    attributes = {**attributes, "coordinates": coordinates}  # xarray takes the rest for data
    write_attributes(group, path, attributes, {**fixed, **axis_values(rows)}, len(rows))


def axis_values(rows: Sequence[CheckpointRow]) -> dict[str, np.ndarray]:
    """The arrays of the checkpoint axis, as `ALONG_AXIS` names them."""
    values = {
        AXIS: np.array([row.label for row in rows], dtype=object),
        "step": np.array([row.step for row in rows], dtype="int64"),
        "stage": np.array([row.stage for row in rows], dtype=object),
        "tokens_seen": np.array([row.tokens_seen for row in rows], dtype="int64"),
    }
    assert tuple(values) == ALONG_AXIS
    return values


def axis_dtype(values: np.ndarray) -> Any:
    """What zarr is to store values as."""
    return str if values.dtype.kind in "OUT" else values.dtype


def dims_of(array: Any) -> tuple[str, ...]:
    """The names of an array's dimensions."""
    return tuple(array.metadata.dimension_names)


def start(path: Path, rows: Sequence[CheckpointRow]) -> zarr.Group:
    """A new group with nothing but its checkpoint axis; `finish_group` ends what this begins."""
    group = zarr.open_group(SmallFiles(path), mode="w")
    for name, values in axis_values(rows).items():
        array = group.create_array(
            name, shape=values.shape, chunks=(_AXIS_CHUNK,), dtype=axis_dtype(values), dimension_names=(AXIS,),
            compressors=CHECKSUMMED, config=EVERY_CHUNK,
        )  # fmt: skip
        array[:] = values
    put_empty(group, "complete", (len(rows),), (1,), bool, (AXIS,))
    put_empty(group, "record", (len(rows),), (1,), str, (AXIS,))
    return group


def put_axis(group: zarr.Group, name: str, values: Sequence[str] | np.ndarray) -> None:
    """A coordinate: the values of one dimension."""
    array = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    put(group, name, array, (name,))


def put(group: zarr.Group, name: str, values: np.ndarray, dims: tuple[str, ...]) -> None:
    """An array in one chunk, written at once; for small ones."""
    chunks = tuple(max(1, n) for n in values.shape)
    array = group.create_array(
        name, shape=values.shape, dtype=axis_dtype(values), dimension_names=dims, chunks=chunks,
        compressors=CHECKSUMMED,
    )  # fmt: skip
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
    """An array to be written checkpoint by checkpoint; until then NaN, False, 0 or "", or `fill`."""
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
        compressors=CHECKSUMMED,
    )


@functools.cache
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


def _json(value: Any) -> str:
    return shorten(json.dumps(value), 60)
