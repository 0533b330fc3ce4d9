"""How time grows with the work: measured at doubling sizes, with the exponent fitted to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .contestants import Contestant, Timing, Tool, Workload, fastest
from .end_to_end import pace
from .random_models import SHAPES, some_trials

GOES = 2


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


def growths(shape: str, checkpoint: Path, series: Path, tool: Tool, device: str) -> Iterator[Growth]:
    """In subsets, trials, layers that are passed, and checkpoints; one after another."""
    n_layers, _, n_heads = SHAPES[shape]
    middle, most = n_layers // 2, min(2**n_heads, 4096)

    def once(n_trials: int, *works: Workload) -> list[Timing]:
        contestant = Contestant(tool, checkpoint, some_trials(n_trials, 12, 17), device)
        timings = [fastest([contestant.patch(work) for _ in range(GOES)]) for work in works]
        contestant.close()
        return timings

    def random(n_subsets: int, layer: int) -> Workload:
        return Workload("", (layer,), (f"random:{n_subsets}",))

    subsets = tuple(most >> n for n in (4, 3, 2, 1, 0))
    yield _grown("subsets of a layer", subsets, once(15, *(random(n, middle) for n in subsets)))

    trials = (15, 30, 60, 120)
    found = [once(n, random(most // 16, middle))[0] for n in trials]
    yield _grown(f"trials, {most // 16} subsets each", trials, found)

    passed = tuple(n for n in (1, 2, 4, 8, 16) if n < n_layers)
    layers = [random(most // 4, n_layers - 1 - n) for n in passed]
    yield _grown("layers after the patch", passed, once(15, *layers))

    checkpoints = (1, 2, 4, 8)
    paces = [pace(series, n, 15, device) for n in checkpoints]
    yield Growth(
        "checkpoints, captured and patched",
        checkpoints,
        tuple(one.seconds for one in paces),
        tuple(one.peak for one in paces),
    )


def _grown(what: str, sizes: Sequence[int], timings: Sequence[Timing]) -> Growth:
    seconds, peaks = (tuple(getattr(one, name) for one in timings) for name in ("seconds", "peak"))
    return Growth(what, tuple(sizes), seconds, peaks)
