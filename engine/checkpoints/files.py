"""A checkpoint's files in Hugging Face's layout: which there are, whether they are complete, their hashes.

No tensor is read.  Whatever is wrong with the files is a `UserError` of one line.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.format import format_bytes, format_names, one_line, parse_json, shorten
from .hashing import Hashing

CONFIG = "config.json"
GENERATION = "generation_config.json"

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The forms in which weights come, best first; an index names the shards that hold them."""

WEIGHT_FORMS = f"{WEIGHTS[0]} or {WEIGHTS[2]}, whole or in shards"
"""The same in words, for errors."""

VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Without one of these there is no tokenizer."""

BESIDE_WEIGHTS = (
    CONFIG,
    *VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "added_tokens.json",
    GENERATION,
)
"""What is downloaded of a checkpoint besides its weights, as far as it exists."""

LARGEST_JSON = 32_000_000
"""Bytes of a config or an index; the largest known ones have a thousandth of it."""

LARGEST_VOCABULARY = 64_000_000
"""Bytes of one file of a tokenizer; the largest known ones have half of it."""

_PLAIN_NAME = re.compile(r"\w[\w.+ -]{0,199}")

_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024
"""No Git LFS pointer is longer."""


@dataclass(frozen=True)
class Files:
    """A checkpoint on disk."""

    directory: Path
    weights: tuple[Path, ...]
    config: Path

    hashing: Hashing
    """On its way since the files were found."""

    commit: str | None
    """Of the hub's repository; None outside the hub."""

    tokenizer: Path | None = None
    """The directory of its tokenizer, where that lies elsewhere."""

    @property
    def vocabulary(self) -> Path:
        """As `vocabulary_file`; the tokenizer is in its folder."""
        return vocabulary_file(self.tokenizer or self.directory)

    @property
    def sha256(self) -> dict[str, str]:
        """Weight file name -> hex digest; waits until all files are hashed.

        Raises `UserError` for a file that cannot be read or is not what the hub says.
        """
        return self.hashing.results()


def config_file(directory: Path) -> Path:
    """The config of the checkpoint in `directory`.  Raises `UserError` when there is none, or it is not JSON."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint: no {CONFIG} in it; {contents(directory)}")
    read_object(path)
    return path


def vocabulary_file(directory: Path) -> Path:
    """The file that tells one tokenizer from another, in `directory` or above it, where trainers leave it.

    Raises `UserError` when there is none: transformers would silently make an empty tokenizer.
    """
    for place in (directory, directory.parent):
        for name in VOCABULARY:
            if (place / name).is_file():
                return place / name
    raise UserError(f"{directory} holds no tokenizer (no {' or '.join(VOCABULARY)}); put tokenizer.json there")


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files of the best form of weights in `directory`.  Raises `UserError` when there is none, or one of its files
    is missing."""
    form = best_form(tuple(form for form in WEIGHTS if (directory / form).is_file()))
    if form is None:
        raise UserError(f"{directory} holds no weights ({WEIGHT_FORMS}); {contents(directory)}")
    return tuple(_weight_file(directory / name, form) for name in shards(directory / form))


def best_form(names: Collection[str]) -> str | None:
    """The form of weights among `names` that is read; None where there is none."""
    return next((form for form in WEIGHTS if form in names), None)


def is_index(form: str) -> bool:
    return form.endswith(".index.json")


def shards(form: Path) -> list[str]:
    """Names of the files that hold the weights: the shards that an index names, or the one file itself.

    Raises `UserError` when the index is damaged.
    """
    if not is_index(form.name):
        return [form.name]
    names = read_object(form).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{form} has no weight_map that names shards; fetch or copy it again")
    shard_names = sorted({str(name) for name in names.values()})
    # Also no name that the hub's client would read as a pattern, such as `*`.
    if outside := [name for name in shard_names if not _PLAIN_NAME.fullmatch(name)]:
        raise UserError(f"{form} names {shorten(outside[0], 100)}, which is no file beside it; fetch or copy it again")
    return shard_names


def looks_like_shard(name: str, index: str) -> bool:
    """Whether `name` is formed like the name of a shard of `index`: `model-00001-of-00003.safetensors`."""
    stem, suffix = index.removesuffix(".index.json").split(".")
    return fnmatch(name, f"{stem}-*-of-*.{suffix}")


def is_whole(directory: Path, with_tokenizer: bool = True) -> bool:
    """Whether config, weights and, unless it lies elsewhere, a tokenizer are all in `directory`."""
    try:
        config_file(directory), weight_files(directory)
    except UserError:
        return False
    return not with_tokenizer or any((directory / name).is_file() for name in VOCABULARY)


def n_bytes(directory: Path) -> int:
    """Bytes of the weights.  Raises `UserError` as `weight_files` does."""
    return sum(path.stat().st_size for path in weight_files(directory))


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of last change in nanoseconds: a cheap sign of whether a file was changed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def sha256(path: Path) -> str:
    """Of the file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(directory: Path) -> str:
    """What is in `directory`, for the errors of those who expected something else."""
    if not directory.is_dir():
        return "the directory is not there"
    return f"found there: {format_names(sorted(path.name for path in directory.iterdir()))}"


def refuse_large(path: Path, most: int) -> None:
    """Raise `UserError` for a file of more than `most` bytes, before it is read into memory."""
    if (n_bytes := path.stat().st_size) > most:
        raise UserError(
            f"{path} has {format_bytes(n_bytes)}, the most are {format_bytes(most)}; fetch or copy it again"
        )


def _weight_file(path: Path, form: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path.parent} lacks {path.name}, which {form} names; fetch or copy it again")
    if path.stat().st_size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file.  Raises `UserError` for anything else."""
    refuse_large(path, LARGEST_JSON)
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); correct it, or fetch or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; correct it, or fetch or copy it again")
    return content
