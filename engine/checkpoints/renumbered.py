"""A model whose heads have other numbers and which computes the same: a control for claims about head numbers."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..runtime.errors import UserError
from .files import CONFIG

WEIGHTS = "model.safetensors"


def renumber_heads(source: Path, out: Path, layer: int, order: Sequence[int]) -> None:
    """Write the checkpoint in `source` into `out`, one layer's heads renumbered: head i is what was `order[i]`.

    Queries, keys, values and the output projection move together, so that every prompt has the same logits, up to the
    order of a sum.  For GPT-NeoX, whose fused matrix is laid out head by head, [head, (query, key, value), head_dim].
    Raises `UserError` for other architectures and orders.
    """
    config = json.loads((source / CONFIG).read_text())
    if config.get("model_type") != "gpt_neox":
        raise UserError(f"{source} is a {config.get('model_type')}; heads are renumbered in GPT-NeoX models only")
    n_heads = int(config["num_attention_heads"])
    if sorted(order) != list(range(n_heads)):
        raise UserError(f"order {list(order)}: name each of the {n_heads} heads once")
    tensors = load_file(source / WEIGHTS)
    name = f"gpt_neox.layers.{layer}.attention."
    if f"{name}dense.weight" not in tensors:
        raise UserError(f"layer {layer} is not in {source}")
    for part in ("query_key_value.weight", "query_key_value.bias"):
        rows = tensors[name + part]
        tensors[name + part] = rows.reshape(n_heads, -1, *rows.shape[1:])[list(order)].reshape(rows.shape)
    dense = tensors[f"{name}dense.weight"]
    tensors[f"{name}dense.weight"] = dense.reshape(len(dense), n_heads, -1)[:, list(order)].reshape(dense.shape)
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name != WEIGHTS:
            shutil.copy(file, out / file.name)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
