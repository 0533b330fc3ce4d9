"""The machine that computes: its device, what a command may take of its memory, what it took, and how fast it is."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from accelerate.utils import find_executable_batch_size

from .errors import UserError
from .format import parse_bytes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Machine:
    """Where to compute, and in how much memory."""

    device: str = "cpu"

    memory: int = 2**33
    """Bytes that weights and what is computed with them may take together."""

    @classmethod
    def from_options(cls, device: str | None, memory: str | None = None, dtype: str = "float32") -> "Machine":
        """The machine a user asks for, or the default.  Raises `UserError` when it is not to be had."""
        checked = _checked(device)
        if dtype == "tf32" and torch.device(checked).type != "cuda":
            raise UserError(f"--dtype tf32: {checked} does not compute in it, only CUDA devices do; use float32")
        return cls(checked, parse_bytes(memory) if memory else most_of_memory(checked))

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return torch.device(self.device).type


def as_many_as_fit(run: Callable[[int], Result], most: int) -> Result:
    """`run` with a batch of `most`, or of fewer where the device's memory does not hold them."""
    try:
        return run(most)
    except torch.OutOfMemoryError:
        # Only now: every try of accelerate's search collects garbage first, which takes longer than a small forward.
        # Whatever the failed try still held is let go with its exception.
        pass
    found: Result = find_executable_batch_size(run, starting_batch_size=max(1, most // 2))()
    return found


def allow_tf32(allowed: bool) -> None:
    """Whether matrix products of float32 may round to TF32 on CUDA devices, from now on."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def most_of_memory(device: str) -> int:
    """Bytes: three quarters of what the machine or the device has.

    Not of what is free just now: the same command then cuts its work up, and rounds, in the same way every time.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * 3 // 4
    return psutil.virtual_memory().total * 3 // 4


def peak_memory(device: str) -> int:
    """The most bytes this process has held, on the device where there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one matrix product of a forward's size, measured now."""
    left, right = (torch.ones(size, 1024, device=device, dtype=dtype) for size in (512, 1024))
    for _ in range(3):
        started = time.perf_counter()
        float((left @ right)[0, 0])
        seconds = time.perf_counter() - started
    return 2 * 512 * 1024 * 1024 / seconds


def _checked(name: str | None) -> str:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"--device {name}: torch cannot compute there ({reason}); use cpu") from error
    return str(device)
