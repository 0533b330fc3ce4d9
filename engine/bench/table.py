"""The tables of scripts/bench.py: the same work by every tool in turn, one table for each kind of work."""

import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from ..runtime.errors import UserError
from ..runtime.format import format_bytes
from .contestants import OURS, Contestant, Timing, Tool, Workload, fastest
from .end_to_end import SUBSETS, CommandRun, pace, run_command
from .overhead import Overhead, overheads
from .random_models import SHAPES, write_series
from .scaling import WeakScaling, growths, weak_scaling

PATCHES = ("parity", "each", "splits", "lattice")
WORKLOADS = (*PATCHES, "capture", "loading", "generation", "study", "growth", "overhead", "workers")
"""Everything that can be timed: the words of `--workloads`."""


REPEATS = 5
"""Of each workload, of which the fastest counts."""


@dataclass(frozen=True)
class Bench:
    """What is timed: tools, model and work."""

    shape: str
    checkpoint: Path
    series: Path
    scripts: Path
    contestants: Mapping[str, Contestant]
    sample: int
    """Patched conditions that a peer is timed on; 0 is all."""

    trials: int
    device: str
    repeats: int = REPEATS

    def tables(self, words: Sequence[str]) -> Iterator[str]:
        """A table per workload, each as soon as every tool has finished it."""
        for word in words:
            yield "\n".join(self._tables()[word]())

    def _tables(self) -> dict[str, Callable[[], Iterator[str]]]:
        return {
            **{word: lambda word=word: self._patch(word) for word in PATCHES},  # type: ignore[misc]
            "capture": lambda: self._each("capture of all prompts", Contestant.capture),
            "loading": lambda: self._each("loading a checkpoint", Contestant.load),
            "generation": self._generation,
            "study": self._study,
            "growth": self._growth,
            "overhead": self._overhead,
            "workers": self._workers,
        }

    def _patch(self, word: str) -> Iterator[str]:
        work = patch_workloads(self.shape)[word]
        peers = word != "lattice"  # they would take a quarter of an hour
        timed = {name: contestant for name, contestant in self.contestants.items() if peers or contestant.tool.is_ours}
        yield f"{work.name}: {len(work.conditions(SHAPES[self.shape][2])):,} conditions x {self.trials} trials"
        yield _compared(in_turn(timed, lambda contestant: contestant.patch(work, self.sample), self.repeats))

    def _each(self, title: str, work: Callable[[Contestant], Timing]) -> Iterator[str]:
        yield title
        yield _compared(in_turn(self.contestants, work, self.repeats))

    def _generation(self) -> Iterator[str]:
        yield "the published study's 45 generations of 20 tokens (differences are between token numbers)"
        timed = {
            name: contestant for name, contestant in self.contestants.items() if contestant.tool.name in (OURS, "hooks")
        }
        yield _compared(in_turn(timed, Contestant.generate, self.repeats))

    def _study(self) -> Iterator[str]:
        write_series(self.shape, self.series)
        title = f"eleven checkpoints in float16 files, {' '.join(SUBSETS)} at all layers, whole commands"
        yield f"{title} (files in the page cache)"
        with TemporaryDirectory(dir=self.series.parent) as scratch:
            store = Path(scratch) / "study.zarr"
            cache = run_command(
                self.scripts / "cache.py", "--model", self.series, "--store", store, "--trials", self.trials,
                "--device", self.device,
            )  # fmt: skip
            patch = run_command(self.scripts / "patch.py", store, "--subsets", *SUBSETS, "--device", self.device)
        both = CommandRun(cache.seconds + patch.seconds, cache.cpu + patch.cpu, max(cache.peak, patch.peak))
        commands = {"cache.py": cache, "patch.py": patch, "both": both}
        table = {
            name: {"seconds": f"{run.seconds:.1f}", "peak memory": format_bytes(run.peak)}
            for name, run in commands.items()
        }
        yield pd.DataFrame.from_dict(table, orient="index").to_string()
        if torch.device(self.device).type == "cpu":
            yield self._parts()

    def _parts(self) -> str:
        """Where the time of a checkpoint goes."""
        series = pace(self.series, 11, self.trials, self.device)
        each, reading, products = (
            seconds / series.n_checkpoints for seconds in (series.seconds, series.reading, series.products)
        )
        return (
            f"of a checkpoint's {each:.2f} s reading files takes {reading:.2f} s and linear layers {products:.2f} s; "
            f"{series.rest:.0%} is neither"
        )

    def _growth(self) -> Iterator[str]:
        write_series(self.shape, self.series)
        yield "growth of headlapse: seconds at each size, the exponent fitted to them, peak memory"
        tool = Tool(OURS, "float32")
        for growth in growths(self.shape, self.checkpoint, self.series, tool, self.device):
            seconds = ", ".join(f"{size}: {took:.3g}" for size, took in zip(growth.sizes, growth.seconds, strict=True))
            peaks = ", ".join(format_bytes(peak) for peak in growth.peaks)
            yield f"{growth.what}: {seconds}; exponent {growth.exponent:.2f}; {peaks}"

    def _overhead(self) -> Iterator[str]:
        yield "overhead of headlapse: processor time of a checkpoint of two tiny layers; what start-up takes is apart"
        self.series.parent.mkdir(parents=True, exist_ok=True)
        for overhead in overheads(self.scripts, self.series.parent):
            yield overhead_line(overhead)

    def _workers(self) -> Iterator[str]:
        write_series(self.shape, self.series)
        yield "weak scaling of headlapse: one process and several, of one thread each, with as many checkpoints each"
        yield scaling_line(weak_scaling(self.shape, self.scripts, self.series))


def scaling_line(scaling: WeakScaling) -> str:
    """Checkpoints per minute alone and together, their processor time, and how many times more that is."""
    each = ", ".join(
        f"local:{workers} {60 * workers * scaling.n_checkpoints / run.seconds:.2f} a minute"
        f" ({run.cpu / workers / scaling.n_checkpoints:.1f} s of processor time each)"
        for workers, run in ((1, scaling.alone), (scaling.n_workers, scaling.together))
    )
    return f"checkpoints patched: {each}: {scaling.gain:.2f} x (load before: {scaling.load:.1f})"


def overhead_line(overhead: Overhead) -> str:
    """A command's processor time: each checkpoint's, start-up, and all of it at each size."""
    sizes = (f"{size}: {run.cpu:.1f} s" for size, run in zip(overhead.sizes, overhead.runs, strict=True))
    each = f"{1000 * overhead.each:.0f} ms a checkpoint, {overhead.start_up:.1f} s to start"
    return f"{overhead.command}: {each} ({', '.join(sizes)})"


def in_turn(
    contestants: Mapping[str, Contestant],
    work: Callable[[Contestant], Timing],
    repeats: int = REPEATS,
    limit: float = 240.0,
) -> dict[str, Timing]:
    """The fastest repeat of each contestant; no round of all of them begins after `limit` seconds.

    They take turns, so that whatever else the machine does meanwhile slows all of them alike.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - began > limit:
            break
        for name, contestant in contestants.items():
            timings[name].append(work(contestant))
    return {name: fastest(repeated) for name, repeated in timings.items()}


def patch_workloads(shape: str) -> dict[str, Workload]:
    """Patched runs, by their word of `--workloads`."""
    n_layers = SHAPES[shape][0]
    every, middle = tuple(range(n_layers)), (n_layers // 2,)
    return {
        "parity": Workload("even and odd, every layer", every, ("even", "odd")),
        "each": Workload("each head, every layer", every, ("each",)),
        "splits": Workload("all balanced splits, one layer", middle, ("balanced",)),
        "lattice": Workload("all subsets, one layer", middle, ("lattice",)),
    }


def choose_workloads(words: Sequence[str], shape: str) -> list[str]:
    """The workloads of `words`, or all that the shape allows.

    Raises `UserError` for an unknown word, and for a workload that would never finish.
    """
    if unknown := [word for word in words if word not in WORKLOADS]:
        raise UserError(f"--workloads {unknown[0]}: not a workload; there are {', '.join(WORKLOADS)}")
    tries_all = SHAPES[shape][2] <= 16
    if words and not tries_all and {"splits", "lattice"} & set(words):
        raise UserError(
            f"--workloads splits lattice: {shape} has {SHAPES[shape][2]} heads, too many to try every subset"
        )
    return list(words) or [word for word in WORKLOADS if tries_all or word not in ("splits", "lattice")]


def machine(device: str) -> str:
    """Hardware and versions, to stand beside every number."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return f"{name}, torch {torch.__version__}, transformers {version('transformers')}"


def _compared(timings: Mapping[str, Timing]) -> str:
    """A row per tool.  Speed is relative to the fastest peer; differences are from the first peer."""
    peers = {name: timing for name, timing in timings.items() if not name.startswith(OURS)}
    best = min((timing.seconds for timing in peers.values()), default=None)
    like = next((timing for timing in peers.values() if timing.values is not None), None)
    table = {name: _row(timing, best, like) for name, timing in timings.items()}
    return pd.DataFrame.from_dict(table, orient="index").fillna("").to_string()


def _row(timing: Timing, best: float | None, like: Timing | None) -> dict[str, str]:
    row = {"seconds": f"{timing.seconds:.3f}", "of": f"{timing.repeats} repeats"}
    if best:
        row["faster than the best peer"] = f"{best / timing.seconds:.2f} x"
    if timing.flops:
        row["GFLOP/s"] = f"{timing.flops / timing.seconds / 1e9:.0f}"
    if timing.share:
        row["matrix products alone"] = f"{timing.share:.0%}"
    if timing.every > 1:
        row["timed"] = f"1 in {timing.every}"
    row["peak memory"] = format_bytes(timing.peak)
    if timing.values is not None and like is not None:
        row["largest difference"] = f"{np.abs(timing.values[:: like.every // timing.every] - like.values).max():.1e}"
    return row


def _processor() -> str:
    """The processor's name and how many threads torch uses."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
