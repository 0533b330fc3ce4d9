"""A whole study, from files to patched runs: how long it takes, where the time goes, and how much memory it holds."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from ..capture.run import cache_series
from ..checkpoints.fetch import fetch
from ..checkpoints.resolve import Checkpoint, resolve
from ..checkpoints.weights import TORCH_DTYPES, Weights, read_weights
from ..replay.run import make_plan, open_run, patch_series
from ..runtime.errors import UserError
from ..runtime.resources import Machine, peak_memory
from ..store.store import Store
from ..study.patch_settings import PatchRequest
from ..study.study import Study
from .contestants import multiplying

SUBSETS = ("even", "odd", "each")


@dataclass(frozen=True)
class Pace:
    """What capturing and patching so many checkpoints took, start-up aside."""

    n_checkpoints: int
    seconds: float

    reading: float
    """Seconds that hashing and reading the files and the store take alone."""

    products: float
    """Seconds that went into linear layers."""

    peak: int
    """Bytes."""

    @property
    def rest(self) -> float:
        """Share of the time that is neither; what was read while something was computed counts as read."""
        return max(0.0, 1 - (self.reading + self.products) / self.seconds)


@dataclass(frozen=True)
class CommandRun:
    """What a whole command took."""

    seconds: float

    cpu: float
    """Seconds of processor time, of all its threads and processes."""

    peak: int
    """Bytes."""


def pace(directory: Path, n_checkpoints: int, n_trials: int, device: str) -> Pace:
    """Capture and patch the first checkpoints of a series, in a process of its own and a store that is not kept."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_pace, directory, n_checkpoints, n_trials, device).result()


def run_command(script: Path, *arguments: object, n_threads: int | None = None) -> CommandRun:
    """Time and memory of a whole command, its output unseen.  Raises `UserError` when it fails."""
    command = [sys.executable, str(script), *map(str, arguments)]
    started = time.perf_counter()
    env = os.environ if n_threads is None else {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed: {output.strip().splitlines()[-1]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return CommandRun(seconds, usage.ru_utime + usage.ru_stime, peak)


def _pace(directory: Path, n_checkpoints: int, n_trials: int, device: str) -> Pace:
    machine, study = Machine.from_options(device), Study(str(directory), trials=n_trials)
    with TemporaryDirectory(dir=directory.parent) as scratch:
        checkpoints = resolve(study.model, [], Path(scratch))[:n_checkpoints]
        started = time.perf_counter()
        with multiplying() as spent:
            store = _run(study, checkpoints, Path(scratch), machine)
        seconds = time.perf_counter() - started
        peak = peak_memory(device)
        reading = _reading(study, checkpoints, store, Path(scratch), device)
    return Pace(len(checkpoints), seconds, reading, spent.seconds, peak)


def _run(study: Study, checkpoints: Sequence[Checkpoint], scratch: Path, machine: Machine) -> Store:
    path = scratch / "pace.zarr"
    outcomes = list(cache_series(study, checkpoints, path, scratch, machine))
    store = Store(path)
    plan = make_plan(PatchRequest(SUBSETS), store)
    run = open_run(store, plan, "pace")
    labels = [checkpoint.label for checkpoint in checkpoints]
    outcomes += patch_series(store, plan, run, labels, scratch, machine, lambda _runs: None)
    assert not any(outcome.problem for outcome in outcomes)
    return store


def _reading(study: Study, checkpoints: Sequence[Checkpoint], store: Store, scratch: Path, device: str) -> float:
    """Seconds to read once more, with nothing beside it, all that `_run` had to read."""
    started = time.perf_counter()
    buffers: Weights = {}
    for checkpoint in checkpoints:
        read_weights(fetch(checkpoint, scratch), TORCH_DTYPES[study.dtype], device, buffers)
        read_weights(
            fetch(checkpoint, scratch, store.provenance(checkpoint.label)), TORCH_DTYPES[study.dtype], device, buffers
        )
        store.activations(checkpoint.label).read_all(0)
    return time.perf_counter() - started
