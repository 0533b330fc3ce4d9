"""Weights: read from a checkpoint's files, worn by one resident resident, the next read while this one computes."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..runtime.errors import UserError
from ..runtime.format import format_bytes
from ..runtime.resources import Machine, allow_tf32
from ..study.study import Arithmetic
from .architecture import Architecture, inspect_architecture, read_config
from .attention_hook import IMPLEMENTATION
from .files import GENERATION
from .resolve import Files
from .weights import TORCH_DTYPES, Weights, read_weights, weight_bytes

_MASK_BUFFERS = re.compile(r"\.(attention|attn)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Tables that old .bin files carry beside the weights.  Ignored only where the resident has no such parameter."""

_ALIASES = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "embed_out.weight"}
"""GPT-NeoX's unembedding: the name in its files and the one in newer versions of transformers."""

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a decoder layer, without the residual stream."""


class ResidentModel:
    """One resident model; each checkpoint's weights are swapped into it under a strict key check."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
        config = copy.deepcopy(config)  # choosing an attention implementation writes into it
        self.architecture: Architecture = inspect_architecture(config)
        self.dtype = dtype
        self.device = device
        self.config_fields = _identity(config)
        self.heads_add_up: dict[int, bool] = {}
        # Buffers (rotary frequencies) are computed, parameters never allocated: they arrive with the weights.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._tied = _tied_names(model)

    def fits(self, config: PreTrainedConfig) -> bool:
        """Whether `config` describes this very architecture."""
        return _identity(config) == self.config_fields

    def canonical(self, name: str) -> str:
        """The resident's name of a tensor: some files leave the base model's prefix out."""
        prefix = self.model.base_model_prefix
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."), _ALIASES.get(name, name)):
            if candidate in self._shapes:
                return candidate
        return name

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Swap `weights` in.

        Raises `UserError` naming keys that are missing, unknown or of another shape, and changes nothing then.
        """
        named = {self.canonical(name): tensor for name, tensor in weights.items()}
        unknown = sorted(name for name in named if name not in self._shapes)
        unknown = [name for name in unknown if not _MASK_BUFFERS.search(name)]
        missing = sorted(name for name in self._shapes if name not in named and name not in self._tied)
        misshapen = sorted(n for n, t in named.items() if n in self._shapes and tuple(t.shape) != self._shapes[n])
        who = self.architecture.name
        if misshapen:
            name = misshapen[0]
            raise UserError(
                f"{name} has shape {list(named[name].shape)}, {who} as configured needs {list(self._shapes[name])} "
                f"({_count(misshapen)} of another shape); config.json and weights do not belong together"
            )
        if missing or unknown:
            raise UserError(f"the weights do not fit {who}: {_listed('missing', missing)}{_listed('unknown', unknown)}")
        for target, source in self._tied.items():
            if target in named and source in named and not torch.equal(named[target], named[source]):
                raise UserError(
                    f"{who} is configured to tie {target} to {source}, but the file holds two different tensors"
                )
        self.model.load_state_dict({n: t for n, t in named.items() if n in self._shapes}, strict=False, assign=True)
        self.model.tie_weights()

    def layer_modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(path) for path in self.architecture.layers]

    def output_projections(self, layers: Iterable[int]) -> dict[int, nn.Module]:
        """W_O of each of the layers, whose input is z."""
        return {layer: self.model.get_submodule(self.architecture.out_proj[layer]) for layer in layers}

    @contextmanager
    def stock(self, attention: Literal["eager", "default"] = "eager") -> Iterator[PreTrainedModel]:
        """The model with transformers' own attention in place of ours: spelled out, or what it takes by default."""
        fused = attention == "default" and self.model._supports_sdpa
        self.model.set_attn_implementation("sdpa" if fused else "eager")
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(IMPLEMENTATION)

    def layer_calls(self, position_ids: Int[Tensor, "batch row"]) -> list[LayerCall]:
        """What the model hands each of its layers besides the residual stream of rows at `position_ids`."""
        calls: list[LayerCall] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append((args[1:], kwargs))
            return self._as_layer_output(hidden)

        # What the rows hold is never looked at; embeddings can be narrower than the residual stream.
        nothing = torch.zeros((), device=self.device, dtype=self.dtype)
        with self._replaced_layers(record):
            self.model.base_model(
                inputs_embeds=nothing.expand(*position_ids.shape, self.architecture.d_embedding),
                position_ids=position_ids,
                use_cache=False,
            )
        return calls

    def answer_logits(
        self, resid: Float[Tensor, "batch row d_model"], answer_tokens: Int[Tensor, "batch answer"]
    ) -> Float[Tensor, "batch row answer"]:
        """What the model makes of residual streams that left its last layer."""
        with self.answering(answer_tokens):
            return self.logits(resid)

    def logits(self, resid: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch row token"]:
        """The same for the whole vocabulary."""
        batch, n_rows, _ = resid.shape
        nothing = resid.new_zeros(()).expand(batch, n_rows, self.architecture.d_embedding)
        positions = torch.zeros(batch, n_rows, dtype=torch.long, device=resid.device)
        left = self._as_layer_output(resid)
        with self._replaced_layers(lambda *_, **__: left):
            logits: Tensor = self.model(inputs_embeds=nothing, position_ids=positions, use_cache=False).logits
        return logits

    def before_unembedding(self, resid: Float[Tensor, "batch row d_model"]) -> Float[Tensor, "batch row d_unembedded"]:
        """What of residual streams that left the last layer reaches the unembedding: mostly normed."""
        heard: list[Tensor] = []
        with self.answering(torch.zeros(len(resid), 1, dtype=torch.long, device=self.device)):
            # What stands in for the unembedding is dropped at the end, and this hook with it.
            self.model.get_output_embeddings().register_forward_pre_hook(lambda _module, args: heard.append(args[0]))
            self.logits(resid)
        return heard[0]

    def _as_layer_output(self, resid: Tensor) -> Any:
        return (resid,) if self.architecture.layer_returns_tuple else resid

    @contextmanager
    def _replaced_layers(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Every layer does as `forward` says while the body runs."""
        with ExitStack() as stack:
            for module in self.layer_modules():
                module.forward = forward
                stack.callback(module.__dict__.pop, "forward")
            yield

    @contextmanager
    def answering(
        self, answer_tokens: Int[Tensor, "batch answer"], read: Int[Tensor, "batch read"] | None = None
    ) -> Iterator[None]:
        """Forward passes return only the answers' logits (batch, read, answer), at the positions `read` or everywhere.

        Two rows of the unembedding are multiplied instead of the whole vocabulary; what the model does to its
        logits afterwards (scaling, capping) still happens.
        """
        unembed = self.model.get_output_embeddings()
        self.model.set_output_embeddings(_AnswerRows(unembed, answer_tokens, read))
        try:
            yield
        finally:
            self.model.set_output_embeddings(unembed)


class _AnswerRows(nn.Module):
    """The rows of the unembedding that the answers need, at the positions that are read."""

    def __init__(self, unembed: nn.Module, answer_tokens: Tensor, read: Tensor | None) -> None:
        super().__init__()
        weight, bias = unembed.weight, getattr(unembed, "bias", None)
        assert isinstance(weight, Tensor)
        self.rows = weight[answer_tokens]
        self.bias = None if bias is None else bias[answer_tokens]
        self.read = read

    def forward(self, resid: Tensor) -> Tensor:
        picked = resid if self.read is None else resid.take_along_dim(self.read[..., None], dim=1)
        logits = picked @ self.rows.transpose(1, 2)
        return logits if self.bias is None else logits + self.bias[:, None]


Loaded = tuple[Files, Weights | None]
"""A checkpoint's files, and its weights where they could be read ahead."""


class ModelLoader:
    """The resident resident, and the checkpoints that it wears one after another.

    Weights that are cast or moved are read into two sets of buffers in turn, of which one is worn; where memory has no
    room for two, into one.
    """

    def __init__(self, dtype: Arithmetic, machine: Machine) -> None:
        allow_tf32(dtype == "tf32")
        self.dtype, self.machine = dtype, machine
        self._skeleton: ResidentModel | None = None
        self._buffers: tuple[Weights, Weights] = ({}, {})

    def prefetch(self, files: Files) -> Loaded:
        """Read weights while another checkpoint computes, where both find room."""
        if 2 * weight_bytes(files, TORCH_DTYPES[self.dtype]) > self.machine.memory:
            return files, None
        self._buffers = self._buffers[::-1]
        return files, self._read(files)

    def load_weights(self, loaded: Loaded) -> tuple[ResidentModel, int]:
        """The resident in the checkpoint's weights, and the bytes of memory that are left beside them.

        Raises `UserError` where they do not fit into the memory or the architecture.
        """
        files, weights = loaded
        taken = weight_bytes(files, TORCH_DTYPES[self.dtype])
        if taken >= self.machine.memory:
            raise UserError(
                f"the weights take {format_bytes(taken)} in {self.dtype}, the {format_bytes(self.machine.memory)} "
                "allowed do not hold more; give more --memory, or a smaller --dtype"
            )
        self._skeleton = open_resident_model(files, self.dtype, self.machine.device, self._skeleton)
        self._skeleton.load_weights(weights if weights is not None else self._read(files))
        return self._skeleton, self.machine.memory - taken

    def _read(self, files: Files) -> Weights:
        return read_weights(files, TORCH_DTYPES[self.dtype], self.machine.device, self._buffers[0])


def load_tokenizer(directory: Path) -> Any:
    """The checkpoint's own tokenizer.  Raises `UserError` when transformers cannot load it."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {directory} cannot be loaded ({reason}); put another there") from error


def open_resident_model(
    files: Files, dtype: Arithmetic, device: str, current: ResidentModel | None = None
) -> ResidentModel:
    """The resident resident where it fits the checkpoint's config, else a new one."""
    config = read_config(files.config.parent)
    resident = current if current is not None and current.fits(config) else None
    resident = resident or ResidentModel(config, TORCH_DTYPES[dtype], device)
    resident.model.generation_config = _plainly_greedy(files.config.parent, config)
    return resident


def _plainly_greedy(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """How texts are made: of the checkpoint's own settings for that, only the tokens that end a text are heard."""
    ends = config.eos_token_id
    if (directory / GENERATION).is_file():
        try:
            ends = GenerationConfig.from_pretrained(directory).eos_token_id
        except (OSError, ValueError) as error:
            raise UserError(
                f"{directory / GENERATION}: it cannot be read ({error}); fetch it again, or remove it"
            ) from error
    return GenerationConfig(eos_token_id=ends)


def _identity(config: PreTrainedConfig) -> str:
    passing = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in passing}, sort_keys=True, default=str)


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share another's storage, and so may be absent from the files, each with that other."""
    return dict(getattr(model, "all_tied_weights_keys", {}))


def _listed(what: str, names: list[str]) -> str:
    return f"{_count(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) " if names else ""


def _count(names: list[str]) -> str:
    return f"{len(names)} key{'s' if len(names) != 1 else ''}"
