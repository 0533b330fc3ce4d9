"""What of this machine a process may use: cores, memory and GPUs of its job or container, found without torch."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from .format import parse_whole

_QUOTAS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
"""Where a container finds the CPU time it may take in each period: control groups of version 2, then of version 1."""

_DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/kfd", "/dev/dxg")
"""Without any of these no GPU can be computed on: NVIDIA's driver, that of its boards, AMD's, and Windows' for both."""


def n_cores() -> int:
    """Cores that this process may keep busy: by affinity, of them what a container's quota or SLURM's job leaves."""
    bounds = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if in_job := parse_whole(os.environ.get("SLURM_CPUS_ON_NODE", "")):
        bounds.append(in_job)
    for files in _QUOTAS:
        words = " ".join(Path(file).read_text() for file in files if os.path.exists(file)).split()
        if len(words) == 2 and (quota := parse_whole(words[0])) and (period := parse_whole(words[1])):
            bounds.append(-(-quota // period))
            break
    return max(1, min(bounds))


def memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or what SLURM gave its job."""
    total: int = psutil.virtual_memory().total
    megabytes = parse_whole(os.environ.get("SLURM_MEM_PER_NODE", ""))
    if per_core := parse_whole(os.environ.get("SLURM_MEM_PER_CPU", "")):
        megabytes = per_core * n_cores()
    return min(total, megabytes * 2**20) if megabytes else total


def gpus(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The GPUs that a process started here sees, each as `CUDA_VISIBLE_DEVICES` would name it alone.

    Those that the variable names already, be they numbers, GPUs or MIG slices by their id; else all that nvidia-smi
    lists, by their ids: its numbers need not be CUDA's.  None where there is only a driver: torch can tell.
    """
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return _named(visible)
    if shutil.which("nvidia-smi") is not None:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        return _listed(listed.stdout) if listed.returncode == 0 else []
    return None if any(map(os.path.exists, _DRIVERS)) else []


def _named(visible: str) -> list[str]:
    """CUDA ends the list at the first word that names no device, such as -1."""
    names: list[str] = []
    for word in map(str.strip, visible.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", word):
            break
        names.append(word)
    return names


def _listed(text: str) -> list[str]:
    """Ids in the answer of `nvidia-smi --list-gpus`; of a GPU that is divided, those of its slices, listed below it."""
    names: list[str] = []
    for name in re.findall(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", text):
        if name.startswith("MIG") and names and names[-1].startswith("GPU"):
            names.pop()
        names.append(name)
    return names
