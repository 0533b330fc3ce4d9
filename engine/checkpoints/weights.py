"""Read weights from a checkpoint's files."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..runtime.errors import UserError
from ..runtime.format import format_bytes, one_line
from ..runtime.shortage import shortage_of
from ..study.study import DTYPES, Arithmetic
from .files import Files

TORCH_DTYPES: dict[Arithmetic, torch.dtype] = {dtype: getattr(torch, dtype) for dtype in DTYPES}
TORCH_DTYPES["tf32"] = torch.float32

_LONGEST_HEADER = 32_000_000
"""Bytes; a tensor takes about a hundred."""

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


def most_bytes(files: Files, dtype: torch.dtype) -> float:
    """What `weight_bytes` is at most, from the sizes of the files alone: a number takes a byte there or more.

    Infinite for a pickle, whose tensors may share their bytes.
    """
    if any(path.suffix != ".safetensors" for path in files.weights):
        return math.inf
    return dtype.itemsize * sum(path.stat().st_size for path in files.weights)


def bytes_of(weights: Weights) -> int:
    """Bytes that the weights take as they are."""
    return sum(tensor.numel() * tensor.itemsize for tensor in weights.values())


def tensors_of(files: Files) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, as it lies in the files and memory-mapped.  Raises `UserError` as `read_weights`."""
    for path in files.weights:
        yield from _tensors(path)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if path.suffix == ".safetensors":
            _refuse_long_header(path)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    yield name, file.get_tensor(name)
        else:
            for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
                _refuse_strange(path, name, tensor)
                yield name, tensor
    except (UserError, MemoryError):
        raise
    # Whatever the bytes are, safetensors, zipfile and unpickling read them, and raise anything: pickle's own errors
    # share no base class but Exception, and a damaged pickle calls tensors' constructors with whatever it holds.
    except Exception as error:
        if shortage_of(error):
            raise
        if type(error).__module__ in ("_pickle", "pickle"):
            raise UserError(f"{path} holds more than tensors and is not unpickled ({one_line(error)})") from error
        said = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path} is cut off or no weight file ({said}); delete it and fetch it again") from error


def _refuse_strange(path: Path, name: object, tensor: object) -> None:
    """Raise `UserError` unless this is a named plain tensor of no more bytes than its file has."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise UserError(f"{path} holds {name!r}, which is no plain tensor; only files of plain tensors are read")
    if tensor.numel() * tensor.itemsize > path.stat().st_size:
        raise UserError(
            f"{path} is {format_bytes(path.stat().st_size)} and holds {name} of shape {list(tensor.shape)}, which "
            "takes more; delete it and fetch it again"
        )


def _refuse_long_header(path: Path) -> None:
    """Raise `UserError` for a header of safetensors that would take more memory to parse than any model's does."""
    with open(path, "rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
    if n_bytes > _LONGEST_HEADER:
        raise UserError(
            f"{path} is cut off or no weight file (a header of {n_bytes:,} bytes); delete it and fetch it again"
        )
