"""A checkpoint's files in Hugging Face's layout: which there are, whether they are whole, their hashes.

What is wrong with them is a `UserError` of one line; no tensor is read.
"""

import hashlib
import json
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError

CONFIG = "config.json"
GENERATION = "generation_config.json"

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The forms in which weights come, best first; an index names the shards that hold them."""

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
"""All that is wanted of a checkpoint besides its weights, as far as it is there."""

_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024
"""No Git LFS pointer is longer."""


def config_file(directory: Path) -> Path:
    """The config of the checkpoint in `directory`.  Raises `UserError` when there is none, or it is not JSON."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is no checkpoint: no {CONFIG} in it; {contents(directory)}")
    _read_object(path)
    return path


def vocabulary_file(directory: Path) -> Path:
    """What tells one tokenizer from another; a trainer leaves it above its checkpoints.

    Raises `UserError` when there is none: transformers would make an empty tokenizer without a word.
    """
    for place in (directory, directory.parent):
        for name in VOCABULARY:
            if (place / name).is_file():
                return place / name
    raise UserError(f"{directory} holds no tokenizer (no {' or '.join(VOCABULARY)}); put tokenizer.json there")


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files of the best form of weights in `directory`.  Raises `UserError` when none is there whole."""
    form = best_form(tuple(form for form in WEIGHTS if (directory / form).is_file()))
    if form is None:
        raise UserError(f"{directory} holds no weights ({FORMS_TOLD}); {contents(directory)}")
    return tuple(_weight_file(directory / name, form) for name in shards(directory / form))


FORMS_TOLD = f"{WEIGHTS[0]} or {WEIGHTS[2]}, whole or in shards"


def best_form(names: Collection[str]) -> str | None:
    """Which of the forms of weights among `names` is read."""
    return next((form for form in WEIGHTS if form in names), None)


def is_index(form: str) -> bool:
    return form.endswith(".index.json")


def shards(form: Path) -> list[str]:
    """The files that hold the weights: the shards an index names, or the one file itself.

    Raises `UserError` when the index is broken.
    """
    if not is_index(form.name):
        return [form.name]
    names = _read_object(form).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{form} has no weight_map that names shards; fetch or copy it again")
    found = sorted({str(name) for name in names.values()})
    if odd := [name for name in found if Path(name).name != name]:
        raise UserError(f"{form} names {odd[0]}, which is no file beside it; fetch or copy it again")
    return found


def looks_like_shard(name: str, index: str) -> bool:
    """Whether `name` is what writers of shards call one that belongs to `index`."""
    stem, suffix = index.removesuffix(".index.json").split(".")
    return fnmatch(name, f"{stem}-*-of-*.{suffix}")


def is_whole(directory: Path) -> bool:
    """Whether config, weights and a tokenizer are all there."""
    try:
        config_file(directory), weight_files(directory)
    except UserError:
        return False
    return any((directory / name).is_file() for name in VOCABULARY)


def n_bytes(directory: Path) -> int:
    """Bytes of the weights.  Raises `UserError` as `weight_files` does."""
    return sum(path.stat().st_size for path in weight_files(directory))


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of the last change in nanoseconds: what tells, at no cost, that a file was touched."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(directory: Path) -> str:
    """What a user who expected something else finds there."""
    if not directory.is_dir():
        return "the directory is not there"
    return f"found there: {some(sorted(path.name for path in directory.iterdir()))}"


def some(names: Collection[str]) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(list(names)[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _weight_file(path: Path, form: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path.parent} lacks {path.name}, which {form} names; fetch or copy it again")
    if path.stat().st_size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
        raise UserError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); mend it, or fetch or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; mend it, or fetch or copy it again")
    return content
