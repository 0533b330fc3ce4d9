"""What is captured of a checkpoint: plain tensors by kind and layer."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

KINDS = ("z", "key", "value", "resid_pre")
"""What is captured of every layer; all but `z` serve replay alone."""


@runtime_checkable
class Activations(Protocol):
    """Captured tensors of one checkpoint, by kind and layer: (run, trial, position, ...)."""

    def read(self, kind: str, layer: int) -> Tensor: ...


@dataclass(frozen=True)
class Capture:
    """Everything one forward over all prompts of a checkpoint left behind, on the CPU."""

    kept: dict[str, list[Tensor]]
    """Kind -> one tensor a layer: `z` (run, trial, position, head, head_dim), `key` and `value` (run, trial,
    position, kv_head, head_dim), `resid_pre` (run, trial, position, d_model)."""

    answer_logits: Float[Tensor, "run trial answer"]
    """Logits of the right and the wrong answer at the branching token."""

    def read(self, kind: str, layer: int) -> Tensor:
        return self.kept[kind][layer]
