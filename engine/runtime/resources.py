"""The machine: its device, how much of its memory a command may use and did use, and how fast it multiplies."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils import find_executable_batch_size

from .allotment import memory as allotted_memory
from .errors import UserError
from .format import parse_bytes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Machine:
    """Where to compute, and in how much memory."""

    device: str = "cpu"

    memory: int = 2**33
    """Bytes that weights and intermediate results may take together."""

    @classmethod
    def from_options(cls, device: str | None, memory: str | None = None, dtype: str = "float32") -> "Machine":
        """The machine that `--device` and `--memory` name, or the default: the GPU where there is one.

        Raises `UserError` for a device that torch cannot use, a dtype that the device cannot compute in, or an amount
        of memory that cannot be read.
        """
        usable = _usable_device(device)
        if dtype == "tf32" and torch.device(usable).type != "cuda":
            raise UserError(f"--dtype tf32: {usable} does not compute in it, only CUDA devices do; use float32")
        return cls(usable, parse_bytes(memory) if memory else default_memory(usable))

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return torch.device(self.device).type


def as_many_as_fit(run: Callable[[int], Result], largest: int) -> Result:
    """`run` called with the batch size `largest`, or a smaller one where the device runs out of memory."""
    try:
        return run(largest)
    except torch.OutOfMemoryError:
        # accelerate's search comes second: each of its attempts collects garbage first, which takes longer than a
        # small forward.  It starts outside this block because the exception keeps the failed attempt's tensors alive.
        pass
    result: Result = find_executable_batch_size(run, starting_batch_size=max(1, largest // 2))()
    return result


def allow_tf32(allowed: bool) -> None:
    """Whether matrix products of float32 may round to TF32 on CUDA devices, from now on."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def default_memory(device: str) -> int:
    """Three quarters of the memory of the device, or of what this process may use of the machine's, in bytes.

    Of all of it, not of what is free at the moment: the same command then splits its work into the same batches, and
    so rounds the same way, every time.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * 3 // 4
    return allotted_memory() * 3 // 4


def peak_memory(device: str) -> int:
    """The largest number of bytes that this process has used so far, on the GPU where `device` is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes on Linux


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one matrix product of a forward's size, measured now."""
    left, right = (torch.ones(size, 1024, device=device, dtype=dtype) for size in (512, 1024))
    for _ in range(3):  # the last one counts: the first ones load libraries and raise the clock
        started = time.perf_counter()
        float((left @ right)[0, 0])  # reading a value waits for the GPU
        seconds = time.perf_counter() - started
    return 2 * 512 * 1024 * 1024 / seconds


def _usable_device(name: str | None) -> str:
    """The device, once a tensor has been there and back: having a name does not mean that torch was built for it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"--device {name}: torch cannot compute there ({reason}); use cpu") from error
    return str(device)
