"""Memory: what a command may take, and the most that it took."""

import re
import resource
import sys

import psutil
import torch

from headlapse.engine.study import Refusal

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_memory(text: str) -> int:
    """Bytes of `8GB`, `500MB`, `1.5G`.  Raises `Refusal` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise Refusal(f"--memory {text}: not an amount of memory; write 8GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def memory_budget(device: str, asked: str | None = None) -> int:
    """Bytes that a command may take on `device`: what was asked, or half of what the machine or the device has.

    Half of what it has, not of what is free: the same command then cuts its work up in the same way every time.
    """
    if asked is not None:
        return parse_memory(asked)
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return psutil.virtual_memory().total // 2


def peak_memory(device: str) -> int:
    """The most bytes this process has held, on the device where there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
