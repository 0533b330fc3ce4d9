"""The hook: one attention function, registered with transformers' attention interface, computes z of every layer.

What it does is set by a *mode* for the length of a `with` block: capture, replay or a dry run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ..runtime.errors import UserError

IMPLEMENTATION = "headlapse"
"""The name under which transformers knows our function.  We register no mask function with it, so that models build no
mask."""


@runtime_checkable
class AttentionMode(Protocol):
    """What happens when a layer attends: called with its queries, keys and values, returns its z."""

    @property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens; a sliding window must not be shorter."""
        ...

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "batch head query head_dim"],
        key: Float[Tensor, "batch kv_head key head_dim"],
        value: Float[Tensor, "batch kv_head key head_dim"],
        scaling: float,
    ) -> Float[Tensor, "batch query head head_dim"]: ...


_mode: ContextVar[AttentionMode] = ContextVar("headlapse_attention_mode")

_HARMLESS = {
    "position_ids", "cache_position", "position_embeddings", "use_cache", "layer_past", "past_key_values",
    "output_attentions", "output_hidden_states", "return_dict", "is_causal", "sliding_window", "num_items_in_batch",
}  # fmt: skip
"""Keyword arguments that do not change the attention scores, or that `refuse_unknown` checks by their value."""


@contextmanager
def attending(mode: AttentionMode) -> Iterator[None]:
    """Models with our attention implementation attend by `mode` while the body runs."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def causal_attention(
    query: Float[Tensor, "batch head query head_dim"],
    key: Float[Tensor, "batch kv_head query head_dim"],
    value: Float[Tensor, "batch kv_head query head_dim"],
    scaling: float,
) -> Float[Tensor, "batch query head head_dim"]:
    """Plain causal attention.  Right-padding needs no mask, because real tokens do not attend to what follows them."""
    grouped = query.shape[1] != key.shape[1]
    z = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return z.transpose(1, 2)


def refuse_unknown(
    module: nn.Module, attention_mask: Any, longest: int, scaling: float | None, kwargs: dict[str, Any]
) -> None:
    """Raise `UserError` where the model's attention is anything but plain causal attention."""
    name = type(module).__name__
    window = kwargs.get("sliding_window")
    if attention_mask is not None:
        raise UserError(
            f"{name} builds its own attention mask, which headlapse cannot reproduce; this model is not supported"
        )
    if kwargs.get("softcap") is not None:
        raise UserError(f"{name} caps its attention scores (softcap {kwargs['softcap']}); this model is not supported")
    if window is not None and window < longest:
        raise UserError(
            f"{name} attends through a sliding window of {window} tokens, the prompts have {longest}; shorten them"
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UserError(f"{name} attends in both directions; only causal models can be patched from a cache")
    if scaling is None:
        raise UserError(f"{name} does not say how it scales its scores; this model is not supported")
    unknown = [key for key, value in kwargs.items() if key not in _HARMLESS and isinstance(value, Tensor)]
    if unknown:
        raise UserError(
            f"{name} passes {', '.join(unknown)} to its attention, which headlapse does not know; not supported"
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer."""
    mode = _mode.get()
    refuse_unknown(module, attention_mask, mode.longest, scaling, kwargs)
    assert scaling is not None
    assert dropout == 0.0, "models are run in eval mode"
    layer: Any = module.layer_idx  # torch types every attribute of a module as Tensor or Module
    return mode(int(layer), query, key, value, scaling), None


AttentionInterface.register(IMPLEMENTATION, _attend)
