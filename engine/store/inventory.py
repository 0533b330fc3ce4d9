"""Which stores and which patched runs there are, without opening an array; no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from .checkpoint_arrays import CheckpointArrays
from .disk import is_group, recover
from .disk import last_write_ns as group_last_write_ns
from .zarr_group import dims_of

MAKE = "headlapse cache makes one"


@dataclass(frozen=True)
class RunSummary:
    """What a patched run, or the measured mechanism, is and how far it got."""

    name: str
    settings: Mapping[str, Any]
    n_complete: int
    n_checkpoints: int


@dataclass(frozen=True)
class ArraySummary:
    """One array of a store."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    """Of its values, as they are stored: uncompressed."""


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds."""

    path: Path
    study: Mapping[str, Any]
    format: int
    complete: tuple[str, ...]
    """Labels of the finished checkpoints, in order of training."""

    missing: tuple[str, ...]
    """Labels of those that were asked for and are not finished, in the order of the axis."""

    problems: Mapping[str, str]
    """Why missing checkpoints could not be captured, as far as it was recorded."""

    runs: tuple[RunSummary, ...]
    """Patched runs, the one written to last at the end."""

    mechanism: RunSummary | None
    n_trials: int
    n_bytes: int
    """Bytes on disk."""

    last_write_ns: int
    versions: Mapping[str, str]


def is_store(path: Path) -> bool:
    """Whether `path` is a store of any format, damaged or not."""
    recover(path)
    return is_group(path) and any((path / name / "zarr.json").is_file() for name in ("tokens", "z"))


def require_store(path: Path) -> None:
    """Raise `UserError` unless `path` is a store."""
    if not is_store(path):
        there = "is there, but is no store" if path.exists() else "is no store"
        raise UserError(
            f"{path} {there}; {MAKE}, with --store at a place of its own; headlapse ls lists those there are"
        )


def stores_in(folder: Path) -> list[Path]:
    """Every store in a folder, the one written to last at the end."""
    folders = [path for path in visible(folder) if path.is_dir()]
    return sorted(filter(is_store, folders), key=last_write_ns)


def find_store(folder: Path) -> Path:
    """The store in `folder` that was written to last.  Raises `UserError` where there is none."""
    stores = stores_in(folder)
    if not stores:
        raise UserError(f"there is no store under {folder}; {MAKE}")
    return stores[-1]


def patch_paths(store: Path) -> list[Path]:
    """Groups of the patched runs of a store, the one written to last at the end."""
    folder = store / "patches"
    return sorted(filter(is_group, visible(folder)), key=group_last_write_ns)


def visible(folder: Path) -> list[Path]:
    """What is in a folder, but for what is hidden."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def last_write_ns(store: Path) -> int:
    """When a store or one of its patched runs was written to last, in nanoseconds."""
    return max(map(group_last_write_ns, [store, *patch_paths(store)]))


def summarize(path: Path) -> StoreSummary:
    """What the store at `path` holds.  Raises `UserError` where there is none, or it cannot be read."""
    require_store(path)
    arrays = CheckpointArrays(path)
    attributes, complete = arrays.attrs, tuple(arrays.complete())
    mechanism = path / "mechanism"
    return StoreSummary(
        path=path,
        study=attributes["study"],
        format=int(attributes["headlapse_format"]),
        complete=complete,
        missing=tuple(row.label for row in arrays.rows() if row.label not in complete),
        problems=problems_of(arrays),
        runs=tuple(_summarize_run(run, "patch") for run in patch_paths(path)),
        mechanism=_summarize_run(mechanism, "mechanism") if is_group(mechanism) else None,
        n_trials=int(arrays.array("tokens").shape[1]),
        n_bytes=_bytes_on_disk(path),
        last_write_ns=last_write_ns(path),
        versions=dict(attributes.get("versions", {})),
    )


def arrays_of(path: Path) -> list[ArraySummary]:
    """The arrays of a store, the largest first."""
    arrays = [
        ArraySummary(name, dims_of(array), tuple(array.shape), str(array.dtype), int(array.nbytes))
        for name, array in _arrays(CheckpointArrays(path)).items()
    ]
    return sorted(arrays, key=lambda array: (-array.n_bytes, array.name))


def problems_of(arrays: CheckpointArrays) -> dict[str, str]:
    """Label -> why a checkpoint that is missing could not be captured, as far as it was recorded."""
    if "problem" not in arrays.array_names:  # format 1
        return dict(arrays.attrs.get("problems", {}))
    texts, complete = arrays.values("problem"), arrays.complete()
    return {
        row.label: str(text)
        for row, text in zip(arrays.rows(), texts, strict=True)
        if text and row.label not in complete
    }


def _summarize_run(path: Path, kind: str) -> RunSummary:
    arrays = CheckpointArrays(path)
    return RunSummary(path.name, arrays.attrs[kind], len(arrays.complete()), len(arrays.rows()))


def _arrays(arrays: CheckpointArrays) -> dict[str, Any]:
    return {name: arrays.array(name) for name in arrays.array_names}


def _bytes_on_disk(path: Path) -> int:
    return sum(os.path.getsize(Path(folder) / name) for folder, _, names in os.walk(path) for name in names)
