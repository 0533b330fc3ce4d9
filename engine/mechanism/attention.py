"""Where every head looks from the read position: its query is asked again, its keys are those of the store."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checkpoints.attention_hook import AttentionMode
from ..replay.layers import FixedZ, LayerRunner

TO = ("first", "previous", "itself", "digits")
"""Shares of a head's attention that are kept: to the prompt's first token, to the one before the read position, to the
read position itself, to all tokens that hold a digit.  They may overlap, and need not sum to one."""


@dataclass(frozen=True)
class _Asking(AttentionMode):
    """An attention mode that keeps the query of the read position, and gives a fixed z."""

    giving: FixedZ
    heard: list[tuple[Tensor, float]] = field(default_factory=list)

    @property
    def longest(self) -> int:
        return self.giving.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.heard.append((query[:, :, 0], scaling))
        return self.giving(layer, query, key, value, scaling)


def attention(runner: LayerRunner, layer: int) -> Float[Tensor, "trial head position"]:
    """The target run's attention from its read position; zero at positions past it.

    The layer's own way from the residual stream to the query is run again for that one position, rotation included.
    """
    inputs = runner.inputs
    asking = _Asking(FixedZ(inputs.patched("z", layer, inputs.target)[:, None], inputs.longest))
    runner.through(layer, inputs.patched("resid_pre", layer, inputs.target)[:, None], asking)
    [(query, scaling)] = asking.heard
    return attend_from(query, inputs.run("key", layer, inputs.target), inputs.positions[inputs.target, :, 0], scaling)


def attend_from(
    query: Float[Tensor, "trial head head_dim"],
    key: Float[Tensor, "trial position kv_head head_dim"],
    read: Int[Tensor, " trial"],
    scaling: float,
) -> Float[Tensor, "trial head position"]:
    """Softmax, in float32 at least, of one query a trial over the keys up to its own position."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[2], dim=2)
    scores = torch.einsum("thd,tphd->thp", query.to(dtype), key.to(dtype)) * scaling
    ahead = torch.arange(key.shape[1], device=key.device) > read[:, None]
    return scores.masked_fill(ahead[:, None], -torch.inf).softmax(-1)


def shares(
    pattern: Float[Tensor, "trial head position"], read: Int[Tensor, " trial"], digits: Bool[Tensor, "trial position"]
) -> Float[Tensor, "trial head to"]:
    """How much of each head's attention goes `TO` what.  A prompt of one token has no previous one: share zero."""
    position = torch.arange(pattern.shape[2], device=pattern.device).expand(len(read), -1)
    at = read[:, None]
    chosen = torch.stack([position == 0, position == at - 1, position == at, digits & (position <= at)], dim=-1)
    return torch.einsum("thp,tpo->tho", pattern, chosen.to(pattern.dtype))
