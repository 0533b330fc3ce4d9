"""What a checkpoint costs beside its computation: whole commands over series of checkpoints that compute next to
nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .end_to_end import CommandRun, run_command
from .random_models import write_tiny

SIZES = (40, 77, 154)
"""Checkpoints of the series; Pythia's whole one has 154."""


@dataclass(frozen=True)
class Overhead:
    """A command over series of ascending length."""

    command: str
    sizes: tuple[int, ...]
    runs: tuple[CommandRun, ...]

    @property
    def each(self) -> float:
        """Seconds of processor time that one checkpoint more takes: the slope of a straight line through the sizes."""
        return float(self._line()[0])

    @property
    def start_up(self) -> float:
        """Seconds of processor time that no checkpoint takes: imports, most of all."""
        return float(self._line()[1])

    def _line(self) -> np.ndarray:
        return np.polyfit(self.sizes, [run.cpu for run in self.runs], 1)


def overheads(scripts: Path, scratch: Path, sizes: Sequence[int] = SIZES) -> tuple[Overhead, Overhead]:
    """`cache` of five prompt pairs, and `patch` of each head, over the first tiny checkpoints of a series; nothing of
    it is kept."""
    runs: dict[str, list[CommandRun]] = {"cache": [], "patch": []}
    for size in sizes:
        with TemporaryDirectory(dir=scratch) as place:
            series, store = Path(place) / "series", Path(place) / "overhead.zarr"
            for seed in range(size):
                write_tiny(series / f"step{1000 * seed}", seed)
            words = ("--model", series, "--store", store, "--trials", 5, "--device", "cpu")
            runs["cache"].append(run_command(scripts / "cache.py", *words))
            runs["patch"].append(run_command(scripts / "patch.py", store, "--subsets", "each", "--device", "cpu"))
    cache, patch = (Overhead(command, tuple(sizes), tuple(each)) for command, each in runs.items())
    return cache, patch
