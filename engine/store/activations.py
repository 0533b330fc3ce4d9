"""What is captured of a checkpoint: plain tensors by kind and layer."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

KINDS = ("z", "key", "value", "resid_pre")
"""What is captured of every layer; all but `z` serve replay alone."""


NUMPY_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
"""The study's dtype -> what zarr stores: it lacks bfloat16, of which the raw 16 bits are kept."""


@runtime_checkable
class Activations(Protocol):
    """Captured tensors of one checkpoint, from memory or from a store."""

    def read(self, kind: str, layer: int) -> Tensor:
        """(run, trial, position, ...), as in `Capture`."""
        ...


@dataclass(frozen=True)
class Capture:
    """What is kept of one forward over all prompts of a checkpoint, on the CPU."""

    tensors: dict[str, list[Tensor]]
    """Kind -> one tensor for each layer: `z` (run, trial, position, head, head_dim), `key` and `value` (run, trial,
    position, kv_head, head_dim), `resid_pre` (run, trial, position, d_model)."""

    answer_logits: Float[Tensor, "run trial answer"]
    """Logits of the first differing tokens of the right and the wrong answer."""

    def read(self, kind: str, layer: int) -> Tensor:
        """As `Activations.read`."""
        return self.tensors[kind][layer]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """As numpy; bfloat16, which zarr lacks, as its raw 16 bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor that `to_numpy` was given, whose dtype was `dtype`."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
