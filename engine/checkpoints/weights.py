"""Read weights from a checkpoint's files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime.errors import UserError
from ..runtime.format import one_line
from ..study.study import DTYPES, Arithmetic
from .files import Files

TORCH_DTYPES: dict[Arithmetic, torch.dtype] = {dtype: getattr(torch, dtype) for dtype in DTYPES}
TORCH_DTYPES["tf32"] = torch.float32

Weights = dict[str, Tensor]
"""Tensors by their names in the files."""


def read_weights(files: Files, dtype: torch.dtype, device: str, buffers: dict[str, Tensor] | None = None) -> Weights:
    """Every tensor by name on `device`, floating-point ones cast to `dtype`; memory-mapped where neither changes them.

    What is cast or moved is written into `buffers`, by name: tensors of an earlier call are overwritten where dtype and
    shape agree, so that a series allocates its memory once.
    Raises `UserError` for a file that is cut off or is no weight file.
    """
    buffers = {} if buffers is None else buffers
    weights: Weights = {}
    for path in files.weights:
        for name, tensor in _tensors(path):
            target = dtype if tensor.is_floating_point() else tensor.dtype
            if tensor.dtype != target or tensor.device != torch.device(device):
                buffer = buffers.get(name)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != target:
                    buffer = buffers[name] = torch.empty_like(tensor, dtype=target, device=device)
                tensor = buffer.copy_(tensor)
            weights[name] = tensor
    return weights


def weight_bytes(files: Files, dtype: torch.dtype) -> int:
    """Bytes that the weights take in memory as `dtype`.  Raises `UserError` for a file that is cut off."""
    tensors = (tensor for path in files.weights for _, tensor in _tensors(path))
    return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is cut off or no weight file ({one_line(error)}); delete it and fetch it again"
        ) from error
    except Exception as error:
        # pickle's own errors share no base class but Exception.
        if type(error).__module__ not in ("_pickle", "pickle"):
            raise
        raise UserError(f"{path} holds more than tensors and is not unpickled ({one_line(error)})") from error
