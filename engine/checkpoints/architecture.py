"""What a model is made of, found by a dry run without weights in place of a table of module names per architecture."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..runtime.errors import UserError
from ..runtime.format import one_line
from .attention_hook import IMPLEMENTATION, attending, causal_attention
from .files import CONFIG, read_object
from .hooks import hook_inputs, hook_outputs
from .plausible import refuse_impossible_numbers

_PROBE_TOKENS = 2

_MOST_INSPECTED = 32
"""Architectures that are remembered in one process."""


@dataclass(frozen=True)
class Architecture:
    """Shapes of one architecture, and the modules where it is read and patched."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int

    d_embedding: int
    """Width of a token's embedding; d_model in most models."""

    head_dim: int
    """Width of one head's query and key."""

    value_dim: int
    """Width of one head's value, and so of its z."""

    layers: tuple[str, ...]
    """Module path of every decoder layer."""

    out_proj: tuple[str, ...]
    """Module path of every layer's output projection W_O, whose input is z."""

    layer_returns_tuple: bool
    """Whether decoder layers return `(resid_post, ...)` rather than `resid_post`."""

    context: int
    """Longest prompt, in tokens."""

    n_parameters: int

    n_vocabulary: int = 0
    """Rows of the embedding: every token is below it."""

    buffer_bytes: int = 0
    """What the model computes once and keeps beside its parameters, such as masks and rotary tables."""

    def layer_of(self, parameter: str) -> int | None:
        """The layer that a parameter belongs to; None outside the layers."""
        for layer, path in enumerate(self.layers):
            if parameter.startswith(path + "."):
                return layer
        return None


def read_config(directory: Path) -> PreTrainedConfig:
    """The checkpoint's own config.

    Raises `UserError` when transformers does not know the model, and for numbers that no model has.  Python code that
    the directory brings along is never run.
    """
    path = directory / CONFIG
    fields = read_object(path)
    refuse_impossible_numbers(path, fields)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # the constructor of whichever class the file names, on whatever values it holds
        own_code = "; its auto_map names Python code, which is never run" if "auto_map" in fields else ""
        reason = f"{one_line(error, 300)}" if "trust_remote_code" not in str(error) else "unknown model type"
        raise UserError(f"{path} is no config of a model transformers knows: {reason}{own_code}") from error
    return config


def inspect_architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture that `config` describes.  Raises `UserError` for one that cannot be patched.

    The model is built without weights, on torch's meta device, and two tokens are run through it: once for all configs
    of the same content.
    """
    fields = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    key = type(config), json.dumps(fields, sort_keys=True, default=str)
    if key not in _inspected:
        if len(_inspected) >= _MOST_INSPECTED:
            del _inspected[next(iter(_inspected))]
        _inspected[key] = _inspect(config)
    return _inspected[key]


def _inspect(config: PreTrainedConfig) -> Architecture:
    model = _without_weights(copy.deepcopy(config))  # choosing an attention implementation writes into it
    name = type(model).__name__
    dry_run = _DryRun()
    try:
        with torch.no_grad(), attending(dry_run), dry_run.watching(model):
            model(torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta"), use_cache=False)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # the model's own code, on whatever values its config holds
        raise UserError(
            f"{name} cannot be run through transformers' attention interface: {_said(error)}; not supported"
        ) from error
    return dry_run.architecture(model, config)


_inspected: dict[tuple[type[PreTrainedConfig], str], Architecture] = {}
"""What was found of a config, by its content, the oldest first."""


class _DryRun:
    """An attention mode that records which layers attend, with which shapes, and which module receives z."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int, int]] = {}
        """Layer -> n_heads, n_kv_heads, head_dim, value_dim."""

        self.out_proj: dict[int, str] = {}
        self.returns_tuple: dict[str, bool] = {}
        self.longest = _PROBE_TOKENS
        self._pending: int | None = None
        """The layer that has attended and whose output projection has not run yet."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.shapes[layer] = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        self._pending = layer
        return causal_attention(query, key, value, scaling)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Record the first module with weights that runs after each attention, and which modules return tuples."""

        modules = dict(model.named_modules())
        weighted = {
            path: module for path, module in modules.items() if next(module.parameters(recurse=False), None) is not None
        }

        def before(path: str, _inputs: tuple[Any, ...]) -> None:
            if self._pending is not None:
                self.out_proj[self._pending], self._pending = path, None

        def after(path: str, output: Any) -> None:
            self.returns_tuple[path] = isinstance(output, tuple)

        with hook_inputs(weighted, before), hook_outputs(modules, after):
            yield

    def architecture(self, model: PreTrainedModel, config: PreTrainedConfig) -> Architecture:
        """What was recorded.  Raises `UserError` unless all layers attended, all with the same shapes."""
        name, n_layers = type(model).__name__, int(config.num_hidden_layers)
        if sorted(self.shapes) != list(range(n_layers)) or len(set(self.shapes.values())) != 1:
            raise UserError(
                f"{name} has {n_layers} layers, of which {len(self.shapes)} attend through transformers' attention "
                "interface with equal shapes; headlapse needs all of them and does not support this model"
            )
        n_heads, n_kv_heads, head_dim, value_dim = self.shapes[0]
        embedding = model.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        layers = tuple(_layer_path(self.out_proj[layer], layer) for layer in range(n_layers))
        return Architecture(
            name=name,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_model=int(config.hidden_size),
            d_embedding=int(embedding.weight.shape[1]),
            head_dim=head_dim,
            value_dim=value_dim,
            layers=layers,
            out_proj=tuple(self.out_proj[layer] for layer in range(n_layers)),
            layer_returns_tuple=self.returns_tuple[layers[0]],
            context=int(config.max_position_embeddings),
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            n_vocabulary=int(embedding.weight.shape[0]),
            buffer_bytes=sum(buffer.numel() * buffer.itemsize for buffer in model.buffers()),
        )


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    try:
        # Random numbers for no memory at all cost torch a second, most of it for sympy.
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = auto.from_config(
                config, attn_implementation=IMPLEMENTATION, trust_remote_code=False
            ).eval()
    except MemoryError:
        raise
    except Exception as error:  # the model's own code, on whatever values its config holds
        raise UserError(
            f"model type {config.model_type!r} cannot be built on transformers' attention interface "
            f"({_said(error)}); not supported"
        ) from error
    return model


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"


def _layer_path(module_path: str, layer: int) -> str:
    """`gpt_neox.layers.3` of `gpt_neox.layers.3.attention.dense`."""
    parts = module_path.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1])
