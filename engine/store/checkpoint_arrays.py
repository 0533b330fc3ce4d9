"""A group along a checkpoint axis: laid out at once, written checkpoint by checkpoint, compared with its checksums.

Any number of processes write different checkpoints of one group at once, while others read it.  Knows nothing of models
or studies.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from ..checkpoints.training_place import positions, read_place, refuse_unordered
from ..runtime.durable import sync, sync_all
from ..runtime.errors import DamageError, UserError
from ..runtime.format import format_names, one_line
from . import integrity
from .chunk_files import ChunkFiles
from .integrity import AXIS, SEAL, damaged
from .locks import layout_lock
from .small_files import SmallFiles
from .zarr_group import (
    ALONG_AXIS,
    CHECKSUMMED,
    EVERY_CHUNK,
    CheckpointRow,
    axis_dtype,
    axis_values,
    dims_of,
    package_versions,
    write_attributes,
)

if TYPE_CHECKING:
    import xarray as xr


class CheckpointArrays:
    """An open group whose arrays share a `checkpoint` axis, with its `step`, `complete` marks and `record`s.

    What is read is compared with its checksums.  Raises `UserError` where there is no group, `DamageError` where it is
    not as it was written.
    """

    def __init__(self, path: Path, store: Path | None = None) -> None:
        self.path = path
        self._store = store or path
        """The store that the group belongs to, whose layout lock it takes."""

        self._partials: dict[int, list[Path]] | None = None
        self._open()

    def _open(self) -> None:
        self._attributes = integrity.verified_attributes(self.path)
        try:
            self.group = zarr.open_group(SmallFiles(self.path), mode="r+")
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path} cannot be read as a zarr store: {one_line(error)}") from error
        self._fixed: dict[str, np.ndarray] = {}
        """Values that never change, as far as they have been read."""

        names = self._attributes[SEAL]["metadata"] if self.is_sealed else self.group.array_keys()
        # Opened when they are asked for: of dozens most commands need a few, and zarr takes a millisecond for each.
        self._arrays: dict[str, zarr.Array[Any] | None] = dict.fromkeys(names)
        self._chunks: dict[str, ChunkFiles | None] = {}
        self._rows = self._read_rows()
        self._index = {row.label: index for index, row in enumerate(self._rows)}

    @property
    def attrs(self) -> dict[str, Any]:
        """A copy of the group's attributes, as they were when it was opened."""
        return dict(self._attributes)

    @property
    def is_sealed(self) -> bool:
        """Whether the group carries checksums; groups of format 1 do not, and are only read."""
        return SEAL in self._attributes

    def array(self, name: str) -> zarr.Array[Any]:
        """The array of that name, on disk."""
        array = self._arrays[name]
        if array is None:
            opened = self.group[name]
            assert isinstance(opened, zarr.Array)
            array = self._arrays[name] = opened
        return array

    def _chunk_files(self, name: str) -> ChunkFiles | None:
        """The array's files, where it is laid out in our way."""
        if name not in self._chunks:
            array = self.array(name)
            self._chunks[name] = ChunkFiles.of(self.path / name / "c", array) if array.ndim else None
        return self._chunks[name]

    @property
    def array_names(self) -> list[str]:
        """Names of all arrays."""
        return list(self._arrays)

    def values(self, name: str) -> np.ndarray:
        """A whole array in memory, along the checkpoint axis as far as it is laid out; for small ones."""
        if name in self._fixed:
            return self._fixed[name]
        values = self._read(name)
        expected = self._attributes.get(SEAL, {}).get("values", {})
        if name in expected and integrity.checksum(values) != expected[name]:
            raise damaged(self.path / name, "its values do not match their checksum")
        if not self._has_axis(name):
            self._fixed[name] = values
        return values

    def rows(self) -> list[CheckpointRow]:
        """Every checkpoint of the axis, complete or not, in its order."""
        return list(self._rows)

    def complete(self) -> dict[str, int]:
        """Label -> index of every complete checkpoint, in order of training; those of unknown place come last."""
        marks = self.values("complete")
        at = positions([row.place for row in self._rows])
        complete = [(at[i] < 0, at[i], i, row.label) for i, row in enumerate(self._rows) if marks[i]]
        return {label: index for _, _, index, label in sorted(complete)}

    def index(self, label: str) -> int:
        """Where a checkpoint is on the axis."""
        return self._index[label]

    def record(self, label: str) -> dict[str, Any]:
        """What was recorded of a complete checkpoint: `provenance`, `versions`, checksums and more.

        Raises `DamageError` where there is none, or another's.
        """
        if not self.is_sealed:
            return {"label": label, "provenance": self._attributes.get("checkpoints", {}).get(label, {})}
        return self._parse_record(label, self._read("record", self.index(label)).item())

    def _parse_record(self, label: str, text: str) -> dict[str, Any]:
        record = json.loads(text) if text else {}
        if record.get("label") != label:
            raise damaged(self._place("record", label), f"it is not the record of {label}")
        return dict(record)

    def read(
        self,
        name: str,
        label: str,
        first: int = 0,
        count: int | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """A complete checkpoint's values of one array: all, or `count` from the index `first` of its next axis on.

        Where each index of that axis has a chunk of its own, only those are read.  `record` spares reading it again.
        Raises `DamageError` where the values are not what was written.
        """
        rows = slice(first, None if count is None else first + count)
        values = self._read(name, self.index(label), rows)
        record = self.record(label) if record is None else record
        self._compare(name, label, values, rows if self.has_chunk_a_row(name) else slice(None), record)
        return values if self.has_chunk_a_row(name) or values.ndim == 0 else values[rows]

    def has_values(self, name: str, label: str) -> bool:
        """Whether anything has been written of a checkpoint's values of one array."""
        return _within(self.path / name / "c", self.index(label)).exists()

    def stored(self, name: str, label: str) -> np.ndarray:
        """A checkpoint's values of one array, complete or not, compared with nothing but zarr's own checksums."""
        return self._read(name, self.index(label))

    def put(self, name: str, index: int, values: np.ndarray, first: int = 0) -> None:
        """Write a checkpoint's values of one array, or some of them, from the index `first` of their first axis on."""
        chunks, array = self._chunk_files(name), self.array(name)
        if chunks is not None and (array.shards is None or values.shape == array.shape[1:]):
            chunks.write(index, values, first)
        elif self.has_chunk_a_row(name):
            array[index, first : first + len(values)] = values
        else:
            array[index] = values

    def _compare(self, name: str, label: str, values: np.ndarray, rows: slice, record: Mapping[str, Any]) -> None:
        if not self.is_sealed:
            return
        expected = record["crc32c"].get(name)
        if expected is None or integrity.checksums(values, self.has_chunk_a_row(name)) != expected[rows]:
            raise damaged(self._place(name, label), "its values do not match their checksums, or are missing")

    def records(self) -> dict[str, dict[str, Any]]:
        """The record of every complete checkpoint, by label; empty in groups of format 1."""
        if not self.is_sealed:
            return {}
        texts = self.values("record")
        return {label: self._parse_record(label, texts[index]) for label, index in self.complete().items()}

    def load(self) -> "xr.Dataset":
        """Every array in memory, with labelled dimensions; for results, which are small beside activations.

        Every complete checkpoint is compared with its checksums; one that is being written counts as incomplete.
        """
        import xarray as xr  # with pandas; start-up counts

        records = self.records()
        variables = {name: (dims_of(self.array(name)), self.values(name)) for name in self._arrays}
        if self.is_sealed:
            whole = [label for label, record in records.items() if self._is_whole(label, record, variables)]
            marks = np.array([row.label in whole for row in self._rows], dtype=bool)
            variables["complete"] = ((AXIS,), marks)
        return self._labelled(xr.Dataset({name: variables[name] for name in variables}))

    def _is_whole(self, label: str, record: Mapping[str, Any], variables: Mapping[str, Any]) -> bool:
        """Whether what was read of a checkpoint is what its record says; not so while it is being written anew."""
        try:
            for name in record["crc32c"]:
                values = np.asarray(variables[name][1][self.index(label)])
                self._compare(name, label, values, slice(None), record)
        except DamageError:
            if label in self.complete() and self.record(label) == record:
                raise
            return False
        return True

    def _labelled(self, dataset: "xr.Dataset") -> "xr.Dataset":
        dataset = dataset.drop_vars("record", errors="ignore")
        absent = {name: values for name, values in axis_values(self._rows).items() if name not in dataset}
        dataset = dataset.assign_coords({name: (AXIS, values) for name, values in absent.items()})
        dataset = dataset.set_coords([name for name in self._attributes["coordinates"].split() if name in dataset])
        dataset.attrs = {name: value for name, value in self._attributes.items() if name not in (SEAL, "coordinates")}
        return dataset

    def dataset(self) -> "xr.Dataset":
        """Every array, lazily, with labelled dimensions.  zarr compares each chunk with its own checksum on reading.

        Raises `UserError` while checkpoints are being added, or where that was cut off.
        """
        import xarray as xr

        lengths = {self.array(name).shape[0] for name in self._arrays if self._has_axis(name)}
        if len(lengths) > 1:
            raise UserError(f"{self.path} was cut off while checkpoints were added; run that command again")
        dataset: xr.Dataset = xr.open_zarr(self.path, consolidated=False, mask_and_scale=False)
        return self._labelled(dataset.isel({AXIS: slice(len(self._rows))}))

    def add(self, rows: Sequence[CheckpointRow]) -> None:
        """Lay out room for the checkpoints that are not on the axis yet, at its end, incomplete.

        Raises `UserError` when a label is on the axis with another step, when old and new ones have no one order, or
        the group is of format 1.
        """
        if all(self._has(row) for row in rows):
            return
        with layout_lock(self._store):
            self._open()  # another process may have grown it
            new = [row for row in rows if not self._has(row)]
            for row in new:
                if row.label in self._index:
                    there = self._rows[self._index[row.label]]
                    raise UserError(
                        f"{self.path} holds {row.label} as step {there.step}, now it is step {row.step}; "
                        "use another --store"
                    )
            if new:
                places = {row.label: row.place for row in [*self._rows, *new]}
                refuse_unordered(places, f"{self.path} cannot take {format_names([row.label for row in new])}")
                self._grow([*self._rows, *new])
        self._open()

    def _has(self, row: CheckpointRow) -> bool:
        """Whether the label is on the axis at the same step of the same stage; not all groups know the tokens."""
        there = self._rows[self._index[row.label]] if row.label in self._index else None
        return there is not None and (there.stage, there.step) == (row.stage, row.step)

    def _grow(self, rows: Sequence[CheckpointRow]) -> None:
        """Room for `rows`.  Readers go by the seal, which is written last: until then nothing has changed for them."""
        self._refuse_old()
        for name in self._arrays:
            if self._has_axis(name) and name not in ALONG_AXIS:
                self.array(name).resize((len(rows), *self.array(name).shape[1:]))
        along = {name: values for name, values in axis_values(rows).items() if name in self._arrays}
        for name, values in reversed(along.items()):
            self._extend_axis(name, values)
        for name in self._arrays:
            sync(self.path / name / "zarr.json")
        for name in along:
            sync(self.path / name / "c")
        fixed = {name: self.values(name) for name in self._arrays if not self._has_axis(name)}
        write_attributes(self.group, self.path, self._attributes, {**fixed, **along}, len(rows))

    def _extend_axis(self, name: str, values: np.ndarray) -> None:
        """Write the values, and then the length: a kill in between leaves no empty label."""
        beside = self._store.with_name(f".{self._store.name}.{name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        array = self.array(name)
        twin = zarr.create_array(
            beside, shape=values.shape, chunks=array.chunks, dtype=axis_dtype(values), fill_value=array.fill_value,
            compressors=CHECKSUMMED, config=EVERY_CHUNK,
        )  # fmt: skip
        twin[:] = values
        for chunk in sorted((beside / "c").iterdir()):
            sync(chunk)
            os.replace(chunk, self.path / name / "c" / chunk.name)
        shutil.rmtree(beside)
        array.resize(values.shape)

    def writer(self, label: str) -> "CheckpointWriter":
        """Begin to write one checkpoint, which counts as incomplete until it is finished.

        Raises `UserError` for a group of format 1.
        """
        self._refuse_old()
        return CheckpointWriter(self, label)

    def partials(self) -> dict[int, list[Path]]:
        """Index of a checkpoint -> files that killed processes left half written, as of the first time it is asked."""
        if self._partials is None:
            self._partials = {}
            for name in self._arrays:
                for path in (self.path / name / "c").glob("**/*.partial"):
                    place = path.relative_to(self.path / name / "c").parts[0].partition(".")[0]
                    self._partials.setdefault(int(place), []).append(path)
        return self._partials

    def _refuse_old(self) -> None:
        if not self.is_sealed:
            raise UserError(
                f"{self.path} has store format 1, which this headlapse reads and does not add to; "
                "use another --store or --name, or replace it with --overwrite"
            )

    def _read(self, name: str, index: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        """An array, as far as its checkpoint axis is laid out, or one checkpoint's values of it: all, or only the
        `rows` where each of them is a chunk."""
        try:
            values = self._read_all(name) if index is None else self._read_one(name, index, rows)
            # Strings as Python's: numpy's own, which are new, make older versions of pandas and xarray crash.
            return values.astype(object) if values.dtype.kind == "T" else values
        except KeyError:
            raise damaged(self.path / name, "the array is missing") from None
        except Exception as error:  # zarr and its codecs raise many kinds for bytes that are not what they wrote
            raise damaged(self.path / name, one_line(error)) from error

    def _read_all(self, name: str) -> np.ndarray:
        array, chunks = self.array(name), self._chunk_files(name)
        if not self._has_axis(name):
            return np.asarray(array[...])
        n_checkpoints = self._n_checkpoints(array.shape[0])
        if chunks is None:
            return np.asarray(array[:n_checkpoints])
        return chunks.read_all(n_checkpoints)

    def _read_one(self, name: str, index: int, rows: slice) -> np.ndarray:
        if (chunks := self._chunk_files(name)) is not None:
            return chunks.read(index, rows)
        return np.asarray(self.array(name)[(index, rows) if self.has_chunk_a_row(name) else index])

    def _read_rows(self) -> list[CheckpointRow]:
        labels, steps = map(str, self.values(AXIS)), map(int, self.values("step"))
        if "stage" not in self._arrays:
            return [CheckpointRow(*row, read_place(row[0]).stage) for row in zip(labels, steps, strict=False)]
        stages, tokens = map(str, self.values("stage")), map(int, self.values("tokens_seen"))
        return [CheckpointRow(*row) for row in zip(labels, steps, stages, tokens, strict=False)]

    def _n_checkpoints(self, length: int) -> int:
        return int(self._attributes[SEAL]["checkpoints"]) if self.is_sealed else length

    def _has_axis(self, name: str) -> bool:
        return dims_of(self.array(name))[:1] == (AXIS,)

    def has_chunk_a_row(self, name: str) -> bool:
        """Whether each index along the first axis of a checkpoint's values is a chunk, with a checksum of its own."""
        array = self.array(name)
        return array.ndim > 1 and array.chunks[1] == 1

    def _place(self, name: str, label: str) -> str:
        return f"{self.path / name / 'c' / str(self.index(label))} ({label})"


class CheckpointWriter:
    """Writes one checkpoint of a group: its arrays in any order and parts, then its record and mark."""

    def __init__(self, arrays: CheckpointArrays, label: str) -> None:
        self._arrays, self._label, self._index = arrays, label, arrays.index(label)
        self._checksums: dict[str, dict[int, int]] = {}
        for partial in arrays.partials().get(self._index, ()):
            partial.unlink(missing_ok=True)
        if arrays.has_values("complete", label):
            arrays.put("complete", self._index, np.array(False))

    def put(self, name: str, values: Any, first: int = 0) -> None:
        """Write an array's values, or some of them, from the index `first` of its next axis on."""
        array = self._arrays.array(name)
        values = np.asarray(values, dtype=object if isinstance(values, str) else None)
        by_row = self._arrays.has_chunk_a_row(name)
        stored = values if values.dtype.kind in "OUT" else values.astype(array.dtype, copy=False)
        self._arrays.put(name, self._index, stored.astype(object) if stored.dtype.kind == "U" else stored, first)
        kept = self._checksums.setdefault(name, {})
        kept |= {first + row: crc for row, crc in enumerate(integrity.checksums(stored, by_row))}

    def finish(self, **fields: Any) -> None:
        """Make what was written last, then write the record, with `fields` in it, and the mark.

        After a power cut the mark is there only if everything else is.
        """
        arrays = self._arrays
        sync_all(_within(arrays.path / name / "c", self._index) for name in self._checksums)
        crc32c = {name: [kept[row] for row in sorted(kept)] for name, kept in self._checksums.items()}
        record = {"label": self._label, **fields, "versions": package_versions(), "crc32c": crc32c}
        last = {"record": np.array(json.dumps(record), dtype=object), "complete": np.array(True)}
        for name, value in last.items():
            arrays.put(name, self._index, value)
            sync(_within(arrays.path / name / "c", self._index))


def _within(chunks: Path, index: int) -> Path:
    """The file or folder of one checkpoint among an array's chunks."""
    return chunks / str(index)
