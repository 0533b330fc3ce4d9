"""The chunks of one checkpoint, read and written as zarr lays them out, without its event loop.

A checkpoint has a dozen small arrays; handing each to zarr takes a hundred times as long as its file.  zarr's own way
is the definition: a test compares the bytes.  What is laid out otherwise (format 1) is left to zarr.

Formats: zarr v3's regular chunk grid with the codecs `bytes` (little-endian) or `vlen-utf8`, then `crc32c`; sharded,
`sharding_indexed` with its index at the end (https://zarr-specs.readthedocs.io/en/latest/v3/codecs).
"""

import os
import sys
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c
import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    import zarr

_CRC: list[dict[str, Any]] = [{"name": "crc32c"}]
_LITTLE = [{"name": "bytes", "configuration": {"endian": "little"}}, *_CRC]
_CODECS = {
    "text": [{"name": "vlen-utf8", "configuration": {}}, *_CRC],
    "numbers": _LITTLE,
    "bytes": [{"name": "bytes"}, *_CRC],
}
"""By what an array holds; `bytes` are numbers of one byte."""

_ABSENT = 2**64 - 1
"""In the index of a shard: a chunk that holds the fill value alone."""

Part = bytes | UInt8[np.ndarray, " byte"]


class ChunkFiles:
    """The files of an array whose first axis has a chunk, or a shard, for each checkpoint."""

    def __init__(self, folder: Path, array: "zarr.Array[Any]", is_text: bool) -> None:
        self._folder, self._is_text, self._is_sharded = folder, is_text, array.shards is not None
        self._fill, self._dtype = array.fill_value, np.dtype(object) if is_text else array.dtype
        self._shape = tuple(array.shape[1:])
        """Of one checkpoint's values."""

        self._by_row = array.ndim > 1 and array.chunks[1] == 1
        """Whether each index of their first axis is a chunk."""

        self._chunk = self._shape[1:] if self._by_row else self._shape

    @classmethod
    def of(cls, folder: Path, array: "zarr.Array[Any]") -> "ChunkFiles | None":
        """Of an array whose chunks lie in `folder`; None where it is laid out in another way than ours."""
        metadata: Any = array.metadata  # zarr types the content of codecs as any JSON
        codecs = _plain(metadata.codecs)
        if array.shards is not None:
            [sharding] = (codec["configuration"] for codec in codecs)
            if sharding["index_location"] != "end" or _plain(sharding["index_codecs"]) != _LITTLE:
                return None
            codecs = _plain(sharding["codecs"])
        kind = next((kind for kind, ours in _CODECS.items() if codecs == ours), None)
        by_row = array.ndim > 1 and array.chunks[1] == 1
        chunks = (1, 1, *array.shape[2:]) if by_row else (1, *array.shape[1:])
        shards = (1, *array.shape[1:]) if by_row and kind != "text" else None
        is_ours = kind and array.chunks == chunks and array.shards in (None, shards) and 0 not in array.shape[1:]
        is_float = array.dtype.kind == "f"
        if not is_ours or sys.byteorder != "little" or (is_float and not np.isnan(array.fill_value)):
            return None
        return cls(folder, array, kind == "text")

    def read(self, index: int, rows: slice = slice(None)) -> np.ndarray:
        """A checkpoint's values; where each index of their first axis is a chunk, those of the `rows`.

        Raises `ValueError` for a file that is not as it was written.
        """
        places = range(self._shape[0])[rows] if self._by_row else range(1)
        values = np.full((len(places), *self._chunk), self._fill, dtype=self._dtype)
        if self._is_sharded:
            self._read_shard(self._path(index), places, values)
        else:
            for row, place in enumerate(places):
                self._read_chunk(self._path(index, place), values[row : row + 1])
        return values if self._by_row else values[0, ...]

    def read_all(self, n_checkpoints: int) -> np.ndarray:
        """The values of the first checkpoints, one after another.  Raises as `read`."""
        values = np.empty((n_checkpoints, *self._shape), dtype=self._dtype)
        for index in range(n_checkpoints):
            values[index, ...] = self.read(index)
        return values

    def write(self, index: int, values: np.ndarray, first: int = 0) -> None:
        """Write a checkpoint's values, or some of them, from the index `first` of their first axis on; of a shard all.

        As zarr does, a chunk that holds the fill value alone has no file.
        """
        if self._is_sharded:
            assert values.shape == self._shape, "a shard is written at once"
            _replace(self._path(index), self._shard(values))
        else:
            rows = values if self._by_row else values[None]
            for row in range(len(rows)):
                _replace(self._path(index, first + row), self._encoded(rows[row : row + 1]))

    def _path(self, index: int, place: int = 0) -> str:
        inner = (place, *(0 for _ in self._shape[1:])) if self._shape else ()
        return "/".join([os.fspath(self._folder), str(index), *map(str, inner)])

    def _read_chunk(self, path: str, values: np.ndarray) -> None:
        """Fill `values` with what a file holds; they stay as they are where there is none."""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return
        data = _checked(content)
        decoded = np.array(_texts(data), dtype=object) if self._is_text else np.frombuffer(data, dtype=self._dtype)
        values[...] = decoded.reshape(values.shape)

    def _read_shard(self, path: str, places: Sequence[int], values: np.ndarray) -> None:
        try:
            file = open(path, "rb")  # noqa: SIM115  # closed below
        except (FileNotFoundError, NotADirectoryError):
            return
        with file:
            entries = self._index_of(file)
            for place, row in zip(places, values, strict=True):
                offset, n_bytes = entries[place]
                if offset == n_bytes == _ABSENT:
                    continue
                if n_bytes != row.nbytes + 4:
                    raise ValueError(f"chunk {place} has {n_bytes} bytes, where {row.nbytes + 4} belong")
                file.seek(offset)
                if file.readinto(_bytes_of(row).data) != row.nbytes or file.read(4) != _crc(_bytes_of(row)):
                    raise ValueError(f"chunk {place} does not match its checksum")

    def _index_of(self, file: BinaryIO) -> list[list[int]]:
        """Offset and length in bytes of each chunk of a shard."""
        size, n_bytes = file.seek(0, os.SEEK_END), 16 * self._shape[0] + 4
        if size < n_bytes:
            raise ValueError(f"it has {size} bytes, its index alone {n_bytes}")
        file.seek(size - n_bytes)
        index: list[list[int]] = np.frombuffer(_checked(file.read()), dtype="<u8").reshape(-1, 2).tolist()
        return index

    def _encoded(self, values: np.ndarray) -> list[Part]:
        """What a chunk's file holds; nothing where that is the fill value alone."""
        if np.isnan(values).all() if values.dtype.kind == "f" else (values == self._fill).all():
            return []
        data = _encoded_texts(values.reshape(-1).tolist()) if self._is_text else _bytes_of(np.ascontiguousarray(values))
        return [data, _crc(data)]

    def _shard(self, values: np.ndarray) -> list[Part]:
        parts: list[Part] = []
        index, offset = np.full((len(values), 2), _ABSENT, dtype="<u8"), 0
        for place, row in enumerate(values):
            if encoded := self._encoded(row):
                n_bytes = sum(map(len, encoded))
                index[place], offset = (offset, n_bytes), offset + n_bytes
                parts += encoded
        return [*parts, index.tobytes(), _crc(index.tobytes())] if parts else []


def _plain(codecs: Iterable[Any]) -> list[dict[str, Any]]:
    """Codecs as JSON has them, whether zarr says them as objects or as dictionaries."""
    return [codec if isinstance(codec, dict) else codec.to_dict() for codec in codecs]


def _replace(path: str, parts: Sequence[Part]) -> None:
    """Put a file in its place at one stroke, under the names that zarr gives; without parts it is removed."""
    if not parts:
        Path(path).unlink(missing_ok=True)
        return
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(partial, "wb") as file:
            file.writelines(part if isinstance(part, bytes) else part.data for part in parts)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _checked(content: bytes) -> bytes:
    """What stands before a checksum.  Raises `ValueError` where it does not match."""
    data = content[:-4]
    if len(content) < 4 or content[-4:] != _crc(data):
        raise ValueError("it does not match its checksum")
    return data


def _crc(data: Part) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _bytes_of(values: np.ndarray) -> UInt8[np.ndarray, " byte"]:
    return values.reshape(-1).view(np.uint8)


def _encoded_texts(texts: Sequence[str]) -> bytes:
    """How many there are, then each with its length in bytes before it; numbers are little-endian, of four bytes."""
    counted = (len(encoded).to_bytes(4, "little") + encoded for encoded in map(str.encode, texts))
    return len(texts).to_bytes(4, "little") + b"".join(counted)


def _texts(data: bytes) -> list[str]:
    texts, place = [], 4
    for _ in range(int.from_bytes(data[:4], "little")):
        end = place + 4 + int.from_bytes(data[place : place + 4], "little")
        texts.append(data[place + 4 : end].decode())
        place = end
    return texts
