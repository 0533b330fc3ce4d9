"""How time scales with the work: measured at doubling sizes, with the exponent fitted to them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..checkpoints.revisions import STUDY
from .contestants import Contestant, Timing, Tool, Workload, fastest
from .end_to_end import CommandRun, pace, run_command
from .random_models import SHAPES, some_trials

REPEATS = 2
"""Timings of each size, of which the fastest counts."""


@dataclass(frozen=True)
class Growth:
    """Time and memory at ascending sizes of one kind of work."""

    what: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    peaks: tuple[int, ...]
    """Bytes."""

    @property
    def exponent(self) -> float:
        """Slope of a straight line through the logarithms: 1 is linear."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.seconds), 1)[0])


@dataclass(frozen=True)
class WeakScaling:
    """`patch` by one process, and by several of one thread each that have as many times more checkpoints to do."""

    n_workers: int
    n_checkpoints: int
    """Of each process."""

    alone: CommandRun
    together: CommandRun
    load: float
    """Processes that waited for a core of this machine just before, on average over a minute."""

    @property
    def gain(self) -> float:
        """How many times more checkpoints a minute are done together than alone: as many as processes, at best."""
        return self.n_workers * self.alone.seconds / self.together.seconds


def weak_scaling(shape: str, scripts: Path, series: Path, n_workers: int = 2, n_checkpoints: int = 5) -> WeakScaling:
    """Whole commands over the first checkpoints of a series, start-up included: 256 subsets of each layer, or as many
    as there are, keep one core busy for ten seconds a checkpoint and more."""
    subsets = f"random:{min(2 ** SHAPES[shape][2], 256)}"
    with TemporaryDirectory(dir=series.parent) as place:
        store = Path(place) / "scaling.zarr"
        steps = [f"step{step}" for step in STUDY[: n_workers * n_checkpoints]]
        run_command(scripts / "cache.py", "--model", series, "--store", store, "--checkpoints", *steps)
        load = os.getloadavg()[0]

        def patch(n: int) -> CommandRun:
            words = ("--subsets", subsets, "--layers", "all", "--name", f"by-{n}", "--workers", f"local:{n}")
            chosen = ("--checkpoints", *steps[: n * n_checkpoints])
            return run_command(scripts / "patch.py", store, *words, *chosen, n_threads=1)

        return WeakScaling(n_workers, n_checkpoints, patch(1), patch(n_workers), load)


def growths(shape: str, checkpoint: Path, series: Path, tool: Tool, device: str) -> Iterator[Growth]:
    """Scaling with subsets, trials, layers after the patch, and checkpoints; one after another."""
    n_layers, _, n_heads = SHAPES[shape]
    middle, n_subsets = n_layers // 2, min(2**n_heads, 4096)

    def timed(n_trials: int, *works: Workload) -> list[Timing]:
        contestant = Contestant(tool, checkpoint, some_trials(n_trials, 12, 17), device)
        timings = [fastest([contestant.patch(work) for _ in range(REPEATS)]) for work in works]
        contestant.close()
        return timings

    def random(n: int, layer: int) -> Workload:
        return Workload("", (layer,), (f"random:{n}",))

    subsets = tuple(n_subsets >> n for n in (4, 3, 2, 1, 0))
    yield _grown("subsets of a layer", subsets, timed(15, *(random(n, middle) for n in subsets)))

    trials = (15, 30, 60, 120)
    timings = [timed(n, random(n_subsets // 16, middle))[0] for n in trials]
    yield _grown(f"trials, {n_subsets // 16} subsets each", trials, timings)

    passed = tuple(n for n in (1, 2, 4, 8, 16) if n < n_layers)
    layers = [random(n_subsets // 4, n_layers - 1 - n) for n in passed]
    yield _grown("layers after the patch", passed, timed(15, *layers))

    checkpoints = (1, 2, 4, 8)
    paces = [pace(series, n, 15, device) for n in checkpoints]
    yield Growth(
        "checkpoints, captured and patched",
        checkpoints,
        tuple(series.seconds for series in paces),
        tuple(series.peak for series in paces),
    )


def _grown(what: str, sizes: Sequence[int], timings: Sequence[Timing]) -> Growth:
    seconds, peaks = (tuple(getattr(timing, name) for timing in timings) for name in ("seconds", "peak"))
    return Growth(what, tuple(sizes), seconds, peaks)
