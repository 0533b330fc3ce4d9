"""Where every head attends from the read position.

The query of that one position is computed again from the stored residual stream; the keys are read from the store.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checkpoints.attention_hook import AttentionMode
from ..replay.layers import FixedZ, LayerRunner

ATTENDED_TO = ("first", "previous", "itself", "digits")
"""Labels of the axis `to`: the prompt's first token, the token before the read position, the read position itself, all
tokens that hold a digit.  These overlap, so a head's shares need not sum to one."""


@dataclass(frozen=True)
class _QueryRecorder(AttentionMode):
    """An attention mode that records the query of the read position and returns a fixed z."""

    fixed_z: FixedZ
    recorded: list[tuple[Tensor, float]] = field(default_factory=list)
    """(query, scaling) of each layer that attended: the query is (trial, head, head_dim)."""

    @property
    def longest(self) -> int:
        return self.fixed_z.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.recorded.append((query[:, :, 0], scaling))
        return self.fixed_z(layer, query, key, value, scaling)


def attention(runner: LayerRunner, layer: int) -> Float[Tensor, "trial head position"]:
    """The target run's attention weights from its read position; zero at later positions.

    `runner` has one patched position a trial, the read one.  The model's own layer maps the stored residual stream to
    the query, so that norms, biases and rotary embeddings are the model's.
    """
    inputs = runner.inputs
    recorder = _QueryRecorder(FixedZ(inputs.patched("z", layer, inputs.target)[:, None], inputs.longest))
    runner.through(layer, inputs.patched("resid_pre", layer, inputs.target)[:, None], recorder)
    [(query, scaling)] = recorder.recorded
    return attend_from(query, inputs.run("key", layer, inputs.target), inputs.positions[inputs.target, :, 0], scaling)


def attend_from(
    query: Float[Tensor, "trial head head_dim"],
    key: Float[Tensor, "trial position kv_head head_dim"],
    read: Int[Tensor, " trial"],
    scaling: float,
) -> Float[Tensor, "trial head position"]:
    """Attention weights of one query a trial over the keys up to position `read`; zero at later positions.

    The softmax is taken in float32, or in float64 for float64 queries.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[2], dim=2)
    scores = torch.einsum("thd,tphd->thp", query.to(dtype), key.to(dtype)) * scaling
    is_later = torch.arange(key.shape[1], device=key.device) > read[:, None]
    return scores.masked_fill(is_later[:, None], -torch.inf).softmax(-1)


def shares(
    pattern: Float[Tensor, "trial head position"], read: Int[Tensor, " trial"], digits: Bool[Tensor, "trial position"]
) -> Float[Tensor, "trial head to"]:
    """Share (0 to 1) of each head's attention on each of `ATTENDED_TO`.

    `read` is the position that `pattern` attends from, `digits` marks the tokens that hold a digit.  A prompt of one
    token has no previous token: that share is zero.
    """
    position = torch.arange(pattern.shape[2], device=pattern.device).expand(len(read), -1)
    read = read[:, None]
    attended = torch.stack([position == 0, position == read - 1, position == read, digits & (position <= read)], dim=-1)
    return torch.einsum("thp,tpo->tho", pattern, attended.to(pattern.dtype))
