"""Configs that no model has: refused by arithmetic, before anything of that size is built or allocated."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..runtime.errors import UserError
from ..runtime.format import format_bytes, shorten
from .files import Files

MOST_LAYERS = MOST_HEADS = 1024
"""As the command line has them: no model has more."""

LARGEST_SIZE = 2**27
"""Of any width, vocabulary or context."""

_COUNTS = re.compile(r"(^|_)(layers?|heads?|blocks?)$")
_EXPERTS, MOST_EXPERTS = re.compile("(^|_)experts$"), 2**14
"""Fields by which a constructor loops, whatever the model calls them."""

_SIZES = {
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_attention_heads", "n_heads", "n_head"),
    *("num_key_value_heads", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim"),
    *("head_dim", "vocab_size", "max_position_embeddings", "n_positions"),
}
"""Fields that are positive whole numbers in every model that has them."""


def refuse_impossible_numbers(path: Path, fields: dict[str, Any]) -> None:
    """Raise `UserError` for a number in the config at `path` that no model has."""
    for name, value in _leaves(fields):
        if problem := _problem(name, value):
            written = shorten(str(value), 40)
            raise UserError(f"{path}: {name} is {written}, {problem}; correct it, or fetch or copy it again")


def refuse_implausible(files: Files, config: PreTrainedConfig, itemsize: int, memory: int) -> None:
    """Raise `UserError` for a config whose model is larger than its weight files can hold, or than `memory` (bytes).

    From the shapes alone: a lower bound on the number of parameters, each of at least one byte in the files and of
    `itemsize` bytes here.
    """
    least = _least_parameters(config)
    on_disk = sum(path.stat().st_size for path in files.weights)
    asked = f"{files.config} describes a model of at least {least:,} parameters"
    if least > on_disk:
        raise UserError(
            f"{asked}, the weight files beside it have {format_bytes(on_disk)}; they do not belong together"
        )
    if least * itemsize > memory:
        raise UserError(
            f"{asked}, {format_bytes(least * itemsize)} of weights; the {format_bytes(memory)} allowed do not hold "
            "them: give more --memory, or a smaller --dtype"
        )


def _leaves(fields: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every number or text of a config with the name of its field, also in parts such as `text_config`."""
    if isinstance(fields, dict) and depth < 8:
        for key, value in fields.items():
            yield from _leaves(value, str(key), depth + 1)
    elif isinstance(fields, list) and depth < 8:
        for value in fields:
            yield from _leaves(value, name, depth + 1)
    else:
        yield name, fields


def _problem(name: str, value: Any) -> str | None:
    if isinstance(value, float) and math.isnan(value):
        return "which is no number"
    if name in _SIZES and value is not None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "where a model has a whole number"
        if value < 1:
            return "where a model has at least 1"
        if value > LARGEST_SIZE:
            return f"no model has more than {LARGEST_SIZE:,}"
    if isinstance(value, int):
        if _COUNTS.search(name) and value > MOST_LAYERS:
            return f"no model has more than {MOST_LAYERS:,}"
        if _EXPERTS.search(name) and value > MOST_EXPERTS:
            return f"no model has more than {MOST_EXPERTS:,}"
    return None


def _least_parameters(config: PreTrainedConfig) -> int:
    """Fewer than any model of these shapes has: one embedding, W_O of every layer, and one matrix of every MLP.

    A field that the config lacks, or that differs from layer to layer, counts as nothing.
    """
    width, heads, layers = (_size(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    z = heads * _size(config, "v_head_dim", "head_dim") or width
    embedding = _size(config, "vocab_size") * _size(config, "word_embed_proj_dim", "hidden_size")
    return embedding + layers * width * (z + _size(config, "intermediate_size", "ffn_dim"))


def _size(config: PreTrainedConfig, *names: str) -> int:
    """The first of the fields that is a positive whole number; 0 where none is."""
    for name in names:
        try:
            value = getattr(config, name, None)
        # Configs whose layers differ raise an error of their own for a field that has no single value.
        except Exception:
            continue
        if isinstance(value, int) and value > 0:
            return value
    return 0
