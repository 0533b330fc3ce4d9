"""Weights as they are read from a checkpoint's files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime.errors import UserError
from ..study.study import DTYPES, Arithmetic
from .resolve import Files

TORCH_DTYPES: dict[Arithmetic, torch.dtype] = {dtype: getattr(torch, dtype) for dtype in DTYPES}
TORCH_DTYPES["tf32"] = torch.float32

Weights = dict[str, Tensor]


def read_weights(files: Files, dtype: torch.dtype, device: str, buffers: dict[str, Tensor] | None = None) -> Weights:
    """Every tensor by name, cast to `dtype` on `device`; memory-mapped where nothing has to change.

    What is cast or moved goes into `buffers` of an earlier reading where they fit, and is left there.
    Raises `UserError` for a file that is cut off or is no weight file.
    """
    buffers = {} if buffers is None else buffers
    weights: Weights = {}
    for path in files.weights:
        for name, tensor in _tensors(path):
            target = dtype if tensor.is_floating_point() else tensor.dtype
            if tensor.dtype != target or tensor.device != torch.device(device):
                kept = buffers.get(name)
                if kept is None or kept.shape != tensor.shape or kept.dtype != target:
                    kept = buffers[name] = torch.empty_like(tensor, dtype=target, device=device)
                tensor = kept.copy_(tensor)
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
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is cut off or no weight file ({reason}); delete it and fetch it again") from error
    except Exception as error:
        # pickle's own errors share no base class but Exception.
        if type(error).__module__ not in ("_pickle", "pickle"):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds more than tensors and is not unpickled ({reason})") from error
