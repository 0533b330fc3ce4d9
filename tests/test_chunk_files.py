"""Laws of our own way to a checkpoint's chunks: zarr, which defines them, writes and reads the same bytes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from headlapse.engine.store.chunk_files import ChunkFiles
from headlapse.engine.store.zarr_group import put_empty

Layout = tuple[tuple[int, ...], tuple[int, ...], Any, bool]
"""Of one checkpoint: shape and chunk, dtype, whether in one shard."""

LAYOUTS: dict[str, Layout] = {
    "shard": ((3, 2, 4), (1, 2, 4), "float32", True),
    "bfloat16": ((3, 2, 4), (1, 2, 4), "uint16", True),
    "one-layer": ((1, 4), (1, 4), "float32", True),
    "layers": ((3, 2, 4), (1, 2, 4), "float32", False),
    "trials": ((5,), (5,), "float32", False),
    "number": ((), (), "float32", False),
    "mark": ((), (), bool, False),
    "marks": ((3, 2), (3, 2), bool, False),
    "count": ((), (), "int32", False),
    "record": ((), (), str, False),
    "texts": ((2, 3), (2, 3), str, False),
}


def created(tmp_path: Path, layout: Layout, name: str) -> "zarr.Array[Any]":
    """An empty array of two checkpoints."""
    shape, chunk, dtype, is_sharded = layout
    group = zarr.open_group(tmp_path, mode="a")
    dims = tuple("abcd"[: 1 + len(shape)])
    put_empty(group, name, (2, *shape), (1, *chunk), dtype, dims, shards=(1, *shape) if is_sharded else None)
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def some(layout: Layout, seed: int) -> np.ndarray:
    """Values of which, where there are rows, the last one is only what an empty array holds."""
    shape, _, dtype, _ = layout
    rng = np.random.default_rng(seed)
    if dtype is str:
        texts = np.array(["", "Zürich", '{"label": "a"}', "日本"], dtype=object)
        return np.array(texts[rng.integers(1, 4, size=shape)], dtype=object).reshape(shape)
    values = np.asarray(rng.integers(1, 200, size=shape)).astype(dtype)
    if shape and shape[0] > 1:
        values[-1] = np.nan if values.dtype.kind == "f" else 0
    return values


def files(array: "zarr.Array[Any]", tmp_path: Path) -> dict[str, bytes]:
    chunks = tmp_path / array.basename / "c"
    return {str(file.relative_to(chunks)): file.read_bytes() for file in chunks.rglob("*") if file.is_file()}


def ours(array: "zarr.Array[Any]", tmp_path: Path) -> ChunkFiles:
    chunks = ChunkFiles.of(tmp_path / array.basename / "c", array)
    assert chunks is not None
    return chunks


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_files_are_those_of_zarr_and_read_back_either_way(tmp_path: Path, layout: Layout) -> None:
    theirs, mine = created(tmp_path, layout, "theirs"), created(tmp_path, layout, "mine")
    empty = ours(mine, tmp_path).read(0)
    np.testing.assert_array_equal(empty, np.asarray(theirs[1]))
    for seed in (1, 2):  # the second time over what is there
        values = some(layout, seed)
        theirs[1] = values
        ours(mine, tmp_path).write(1, values)
        assert files(mine, tmp_path) == files(theirs, tmp_path) != {}
        np.testing.assert_array_equal(ours(theirs, tmp_path).read(1), values)
        np.testing.assert_array_equal(np.asarray(mine[1]), values)
    np.testing.assert_array_equal(ours(mine, tmp_path).read_all(2), np.asarray(theirs[...]))
    theirs[1] = empty
    ours(mine, tmp_path).write(1, empty)
    assert files(mine, tmp_path) == files(theirs, tmp_path) == {}


@pytest.mark.parametrize("name", ["shard", "layers"])
def test_rows_are_read_alone(tmp_path: Path, name: str) -> None:
    chunks, values = ours(created(tmp_path, LAYOUTS[name], "x"), tmp_path), some(LAYOUTS[name], 3)
    chunks.write(0, values)
    np.testing.assert_array_equal(chunks.read(0, slice(1, 3)), values[1:3])


def test_rows_with_files_of_their_own_are_written_one_after_another(tmp_path: Path) -> None:
    array, values = created(tmp_path, LAYOUTS["layers"], "x"), some(LAYOUTS["layers"], 4)
    for row in range(len(values)):
        ours(array, tmp_path).write(0, values[row : row + 1], row)
    np.testing.assert_array_equal(np.asarray(array[0]), values)


@pytest.mark.parametrize("name", ["shard", "bfloat16", "layers", "record", "texts"])
def test_a_changed_byte_and_a_file_that_is_cut_off_are_refused(tmp_path: Path, name: str) -> None:
    array, values = created(tmp_path, LAYOUTS[name], "x"), some(LAYOUTS[name], 5)
    ours(array, tmp_path).write(0, values)
    for path, content in files(array, tmp_path).items():
        file = tmp_path / "x" / "c" / path
        for n in range(len(content)):
            for damaged in (content[:n], content[:n] + bytes([content[n] ^ 4]) + content[n + 1 :]):
                file.write_bytes(damaged)
                with pytest.raises(ValueError, match=r"checksum|bytes"):
                    ours(array, tmp_path).read(0)
        file.write_bytes(content)
    np.testing.assert_array_equal(ours(array, tmp_path).read(0), values)


def test_what_is_laid_out_otherwise_is_left_to_zarr(tmp_path: Path) -> None:
    for settings in (
        {"chunks": (2, 4)},  # two checkpoints in a chunk
        {"chunks": (1, 2)},
        {"chunks": (1, 4), "compressors": None},
        {"chunks": (1, 4), "fill_value": 0.0},
    ):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        array = zarr.create_array(tmp_path / "x", shape=(2, 4), dtype="float32", **{"fill_value": np.nan, **settings})
        assert ChunkFiles.of(tmp_path / "x" / "c", array) is None
