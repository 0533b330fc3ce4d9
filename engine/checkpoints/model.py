"""One resident model per architecture: weights are swapped into it, and parts of it can be run by themselves."""

import copy
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..runtime.errors import UserError
from ..runtime.format import format_bytes, format_count
from ..runtime.resources import default_memory
from .architecture import Architecture, inspect_architecture
from .attention_hook import IMPLEMENTATION

_MASK_BUFFERS = re.compile(r"\.(attention|attn)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Constant tables that old .bin files hold beside the weights.  Ignored only where the model has no such parameter."""

_ALIASES = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
"""GPT-NeoX's unembedding: its name in old files and in newer versions of transformers, in both directions."""

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a decoder layer, without the residual stream."""


class ResidentModel:
    """A model that stays in memory while one checkpoint's weights after another are loaded into it.

    Between checkpoints only parameters change.  Raises `UserError` for an architecture that cannot be patched.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
        config = copy.deepcopy(config)  # choosing an attention implementation writes into it
        self.architecture: Architecture = inspect_architecture(config)
        self.dtype = dtype
        self.device = device
        self.config_fields = _config_fields(config)
        self.heads_add_up: dict[int, bool] = {}
        """Layer -> whether its attention output is a sum over heads, as far as replay has tested it."""

        allowed = default_memory("cpu")
        if (n_bytes := self.architecture.buffer_bytes) > allowed:
            raise UserError(
                f"{self.architecture.name} as configured computes {format_bytes(n_bytes)} of masks and tables, three "
                f"quarters of this machine's memory are {format_bytes(allowed)}; is max_position_embeddings right?"
            )
        auto: Any = AutoModelForCausalLM  # untyped in transformers
        # Buffers (rotary frequencies) are computed; parameters are never allocated, they come with the weights.
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(
                config, dtype=torch.float32, attn_implementation=IMPLEMENTATION, trust_remote_code=False
            )
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._places = {name: _place(model, name) for name in self._shapes}
        """Tensor -> the module that holds it, and its name there."""

        self._tied = _tied_names(model)

    def fits(self, config: PreTrainedConfig) -> bool:
        """Whether `config` describes the same architecture with the same settings."""
        return _config_fields(config) == self.config_fields

    def canonical(self, name: str) -> str:
        """The model's own name of a tensor: some files leave out the base model's prefix, or use an older name."""
        prefix = self.model.base_model_prefix
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."), _ALIASES.get(name, name)):
            if candidate in self._shapes:
                return candidate
        return name

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Use `weights`, tensors by name, from now on.

        Raises `UserError` naming keys that are missing, unknown or of another shape; nothing has changed then.
        """
        named = {self.canonical(name): tensor for name, tensor in weights.items()}
        unknown = sorted(name for name in named if name not in self._shapes)
        unknown = [name for name in unknown if not _MASK_BUFFERS.search(name)]
        missing = sorted(name for name in self._shapes if name not in named and name not in self._tied)
        misshapen = sorted(n for n, t in named.items() if n in self._shapes and tuple(t.shape) != self._shapes[n])
        model = self.architecture.name
        if misshapen:
            name = misshapen[0]
            raise UserError(
                f"{name} has shape {list(named[name].shape)}, {model} as configured needs {list(self._shapes[name])} "
                f"({format_count(len(misshapen), 'key')} misshapen); config.json and weights do not belong together"
            )
        if missing or unknown:
            raise UserError(f"the weights do not fit {model}: {_keys('missing', missing)}{_keys('unknown', unknown)}")
        for target, source in self._tied.items():
            if target in named and source in named and not torch.equal(named[target], named[source]):
                raise UserError(
                    f"{model} is configured to tie {target} to {source}, but the file holds two different tensors"
                )
        for name in filter(self._shapes.__contains__, named):
            self._assign(name, named[name])
        self.model.tie_weights()

    def _assign(self, name: str, tensor: Tensor) -> None:
        """As `load_state_dict` with `assign`, without asking again for names and shapes, which are compared already."""
        module, leaf = self._places[name]
        is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

    def layer_modules(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return [self.model.get_submodule(path) for path in self.architecture.layers]

    def output_projections(self, layers: Iterable[int]) -> dict[int, nn.Module]:
        """W_O of each of the layers, whose input is z."""
        return {layer: self.model.get_submodule(self.architecture.out_proj[layer]) for layer in layers}

    @contextmanager
    def stock(self, attention: Literal["eager", "default"] = "eager") -> Iterator[PreTrainedModel]:
        """The model with transformers' own attention in place of ours: `eager`, or what it would use by default."""
        fused = attention == "default" and self.model._supports_sdpa
        self.model.set_attn_implementation("sdpa" if fused else "eager")
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(IMPLEMENTATION)

    def layer_calls(self, position_ids: Int[Tensor, "batch row"]) -> list[LayerCall]:
        """The arguments that the model passes to each layer besides the residual stream, for rows at `position_ids`."""
        calls: list[LayerCall] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append((args[1:], kwargs))
            return self._as_layer_output(hidden)

        # Nothing is computed from the rows' values.  An embedding can be narrower than the residual stream.
        zero = torch.zeros((), device=self.device, dtype=self.dtype)
        with self._replaced_layers(record):
            self.model.base_model(
                inputs_embeds=zero.expand(*position_ids.shape, self.architecture.d_embedding),
                position_ids=position_ids,
                use_cache=False,
            )
        return calls

    def answer_logits(
        self, resid: Float[Tensor, "batch row d_model"], answer_tokens: Int[Tensor, "batch answer"]
    ) -> Float[Tensor, "batch row answer"]:
        """The answers' logits of residual streams after the last layer."""
        with self.answering(answer_tokens):
            return self.logits(resid)

    def logits(self, resid: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch row token"]:
        """The logits of residual streams after the last layer, with all that the model does to them (norm, scaling)."""
        batch, n_rows, _ = resid.shape
        embeddings = resid.new_zeros(()).expand(batch, n_rows, self.architecture.d_embedding)
        positions = torch.zeros(batch, n_rows, dtype=torch.long, device=resid.device)
        output = self._as_layer_output(resid)
        # Every layer returns `resid`, so that only what follows the last one is computed from it.
        with self._replaced_layers(lambda *_, **__: output):
            logits: Tensor = self.model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits
        return logits

    def before_unembedding(self, resid: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch row d_unembedded"]:
        """The unembedding's input, of residual streams after the last layer: mostly the normed residual stream."""
        inputs: list[Tensor] = []
        with self.answering(torch.zeros(len(resid), 1, dtype=torch.long, device=self.device)):
            # The stand-in for the unembedding is dropped at the end of the block, and this hook with it.
            _unembedding(self.model).register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
            self.logits(resid)
        return inputs[0]

    def _as_layer_output(self, resid: Tensor) -> Any:
        return (resid,) if self.architecture.layer_returns_tuple else resid

    @contextmanager
    def _replaced_layers(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Every layer runs `forward` in place of its own while the body runs."""
        with ExitStack() as stack:
            for module in self.layer_modules():
                module.forward = forward
                stack.callback(module.__dict__.pop, "forward")  # uncovers the method of its class again
            yield

    @contextmanager
    def answering(
        self, answer_tokens: Int[Tensor, "batch answer"], read: Int[Tensor, "batch read"] | None = None
    ) -> Iterator[None]:
        """Forward passes return only the answers' logits (batch, read, answer), at the positions `read` or everywhere.

        The answers' rows of the unembedding are multiplied in place of the whole vocabulary.  What the model does to
        its logits afterwards (scaling, capping) still happens.
        """
        model: Any = self.model  # transformers leaves these methods untyped
        unembedding = _unembedding(self.model)
        model.set_output_embeddings(_AnswerRows(unembedding, answer_tokens, read))
        try:
            yield
        finally:
            model.set_output_embeddings(unembedding)


class _AnswerRows(nn.Module):
    """The answers' rows of the unembedding, at the positions that are read."""

    def __init__(self, unembedding: nn.Module, answer_tokens: Tensor, read: Tensor | None) -> None:
        super().__init__()
        weight, bias = unembedding.weight, getattr(unembedding, "bias", None)
        assert isinstance(weight, Tensor)
        self.rows = weight[answer_tokens]
        self.bias = None if bias is None else bias[answer_tokens]
        self.read = read

    def forward(self, resid: Tensor) -> Tensor:
        read = resid if self.read is None else resid.take_along_dim(self.read[..., None], dim=1)
        logits = read @ self.rows.transpose(1, 2)
        return logits if self.bias is None else logits + self.bias[:, None]


def _config_fields(config: PreTrainedConfig) -> str:
    """Everything in a config that decides what the model computes, as JSON."""
    irrelevant = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
    fields = {name: value for name, value in config.to_dict().items() if name not in irrelevant}
    return json.dumps(fields, sort_keys=True, default=str)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _unembedding(model: Any) -> nn.Module:
    module: nn.Module = model.get_output_embeddings()
    return module


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the one whose storage it shares, for those that may therefore be absent from the files."""
    return dict(getattr(model, "all_tied_weights_keys", {}))


def _keys(kind: str, names: Collection[str]) -> str:
    """`2 keys missing (a, b) `; nothing where there are none."""
    if not names:
        return ""
    shown = ", ".join(list(names)[:3]) + ", ..." * (len(names) > 3)
    return f"{format_count(len(names), 'key')} {kind} ({shown}) "
