"""The hook: one attention function, registered with transformers' attention interface, sees z of every layer.

What runs inside it is a *mode*, set for the length of a `with` block: capture, replay or a dry run.
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
"""The name under which transformers knows our function.  It has no mask function: models then build no mask."""


@runtime_checkable
class AttentionMode(Protocol):
    """What to do when layer `layer` attends; returns z."""

    @property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens: what a sliding window must not be shorter than."""
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
"""Keyword arguments that say nothing about the scores, or that `refuse_unknown` judges by their value."""


@contextmanager
def attending(mode: AttentionMode) -> Iterator[None]:
    """Models with our attention implementation attend as `mode` says while the body runs."""
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
    """Plain causal attention; right-padding needs no mask, real tokens never look ahead."""
    grouped = query.shape[1] != key.shape[1]
    z = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return z.transpose(1, 2)


def refuse_unknown(
    module: nn.Module, attention_mask: Any, longest: int, scaling: float | None, kwargs: dict[str, Any]
) -> None:
    """Raise `UserError` where the model asks for scores that plain causal attention does not give."""
    who = type(module).__name__
    window = kwargs.get("sliding_window")
    if attention_mask is not None:
        raise UserError(
            f"{who} builds its own attention mask, which headlapse cannot reproduce; this model is not supported"
        )
    if kwargs.get("softcap") is not None:
        raise UserError(f"{who} caps its attention scores (softcap {kwargs['softcap']}); this model is not supported")
    if window is not None and window < longest:
        raise UserError(
            f"{who} attends through a sliding window of {window} tokens, the prompts have {longest}; shorten them"
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UserError(f"{who} attends in both directions; only causal models can be patched from a cache")
    if scaling is None:
        raise UserError(f"{who} does not say how it scales its scores; this model is not supported")
    unknown = [name for name, value in kwargs.items() if name not in _HARMLESS and isinstance(value, Tensor)]
    if unknown:
        raise UserError(
            f"{who} passes {', '.join(unknown)} to its attention, which headlapse does not know; not supported"
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
    """What transformers calls in every layer."""
    mode = _mode.get()
    refuse_unknown(module, attention_mask, mode.longest, scaling, kwargs)
    assert scaling is not None
    assert dropout == 0.0, "models are run in eval mode"
    return mode(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


AttentionInterface.register(IMPLEMENTATION, _attend)
