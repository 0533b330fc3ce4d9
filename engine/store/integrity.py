"""Checksums of a group: taken when it is written, compared when it is read.

Every chunk carries zarr's crc32c, which shows that its bytes are those that were written there.  What it cannot show is
kept by this module: that no chunk is missing or lies in another's place, and that the JSON around the chunks is as it
was written.  A group's *seal* (its attribute `integrity`) covers its attributes, the metadata of its arrays and the
values that never change; a checkpoint's *record* (one entry of the array `record`) covers that checkpoint's values.

Checksum: CRC-32C (Castagnoli), as zarr's own.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ..runtime.errors import DamageError
from ..runtime.format import one_line

SEAL = "integrity"
"""The attribute that holds the seal."""

AXIS = "checkpoint"
"""The dimension that grows: its length is no part of the sealed metadata."""


def checksum(values: np.ndarray) -> int:
    """CRC-32C of an array's bytes in C order; of strings, of their JSON."""
    if values.dtype.kind in "OUT":  # T is numpy's StringDType
        return checksum_of_json(values.tolist())
    flat = np.ascontiguousarray(values).reshape(-1)
    return int(google_crc32c.value(flat.view(np.uint8)))


def checksum_of_json(value: Any) -> int:
    """CRC-32C of a value as JSON with sorted keys."""
    return int(google_crc32c.value(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()))


def checksums(values: np.ndarray, by_row: bool) -> list[int]:
    """Of each entry along the first axis, or of all of it."""
    return [checksum(np.asarray(row)) for row in values] if by_row else [checksum(values)]


def seal(
    path: Path, attributes: Mapping[str, Any], fixed: Mapping[str, np.ndarray], n_checkpoints: int
) -> dict[str, Any]:
    """The seal of a group at `path`: of its `attributes`, of its arrays' metadata and of the values in `fixed`.

    `fixed` holds the arrays without a checkpoint axis and, up to `n_checkpoints`, the labels and steps on that axis.
    """
    covered = {name: value for name, value in attributes.items() if name != SEAL}
    content = {
        "attributes": {name: checksum_of_json(value) for name, value in covered.items()},
        "metadata": {name: checksum_of_json(metadata) for name, metadata in _metadata(path).items()},
        "values": {name: checksum(values) for name, values in sorted(fixed.items())},
        "checkpoints": n_checkpoints,
    }
    return {**content, "crc32c": checksum_of_json(content)}


def verified_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the group at `path`, as they were written; those of groups older than seals are only read.

    Raises `DamageError` where the attributes or the metadata of an array are not what was sealed.
    """
    attributes = _attributes(path)
    for damage in _mismatches(path, attributes, _seal_of(path, attributes)):
        raise damage
    return attributes


def metadata_damages(path: Path) -> list[DamageError]:
    """All that is wrong with the attributes and the metadata of the group at `path`, not only the first."""
    try:
        attributes = _attributes(path)
        sealed = _seal_of(path, attributes)
    except DamageError as damage:
        return [damage]
    return list(_mismatches(path, attributes, sealed))


def _attributes(path: Path) -> dict[str, Any]:
    document = read_json(path / "zarr.json")
    attributes = document.get("attributes")
    if not isinstance(attributes, dict) or document.get("node_type") != "group" or document.get("zarr_format") != 3:
        raise damaged(path / "zarr.json", "it is not the metadata of a zarr group")
    return attributes


def _seal_of(path: Path, attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    """A group's seal, whole; None in format 1."""
    sealed = attributes.get(SEAL)
    if sealed is None and not (path / "record").is_dir():
        return None
    if not isinstance(sealed, dict):
        raise damaged(path / "zarr.json", "its checksums are missing")
    content = {name: value for name, value in sealed.items() if name != "crc32c"}
    if checksum_of_json(content) != sealed.get("crc32c"):
        raise damaged(path / "zarr.json", "its checksums do not match")
    return sealed


def _mismatches(path: Path, attributes: Mapping[str, Any], sealed: Mapping[str, Any] | None) -> Iterator[DamageError]:
    if sealed is None:
        return
    for name, expected in sealed["attributes"].items():
        if name not in attributes or checksum_of_json(attributes[name]) != expected:
            yield damaged(path / "zarr.json", f"the attribute {name} does not match its checksum")
    for name, expected in sealed["metadata"].items():
        file = path / name / "zarr.json"
        try:
            metadata = read_json(file)
        except DamageError as damage:
            yield damage
            continue
        is_short = _grows(metadata) and metadata["shape"][0] < sealed["checkpoints"]
        if checksum_of_json(_without_length(metadata)) != expected or is_short:
            yield damaged(file, "it does not match its checksum")


def _metadata(path: Path) -> dict[str, Any]:
    """Array name -> its metadata, less the length of its checkpoint axis."""
    found = {}
    for file in sorted(path.glob("*/zarr.json")):
        metadata = read_json(file)
        if metadata.get("node_type") != "group":
            found[file.parent.name] = _without_length(metadata)
    return found


def _without_length(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if not _grows(metadata):
        return dict(metadata)
    return {**metadata, "shape": metadata["shape"][1:]}


def _grows(metadata: Mapping[str, Any]) -> bool:
    dims, shape = metadata.get("dimension_names"), metadata.get("shape")
    if not (isinstance(dims, list) and isinstance(shape, list)):
        return False
    return dims[:1] == [AXIS] and len(shape) == len(dims) and isinstance(shape[0], int)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.  Raises `DamageError` where the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, one_line(error)) from error
    if not isinstance(content, dict):
        raise damaged(path, "it is no JSON object")
    return content


def damaged(place: Path | str, reason: str) -> DamageError:
    """The error for something that is not as it was written."""
    message = f"{place} is damaged: {reason}; restore it from a copy, or make it again with --overwrite"
    return DamageError(message, reason)
