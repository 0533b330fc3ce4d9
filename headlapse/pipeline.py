"""What the commands do: open the store, plan, take the lock, loop over checkpoints.  Prints no result.

The command line and the Python face are both thin over these functions.  Each refuses what is wrong before it imports
torch, which takes seconds; all raise `UserError` in one line, and `VerificationError` where replay is not exact.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from .engine.checkpoints.resolve import Checkpoint, resolve
from .engine.checkpoints.revisions import RevisionIndex, select
from .engine.runtime.outcome import Outcome
from .engine.runtime.progress import Progress, progress
from .engine.runtime.quiet import quiet_libraries
from .engine.store import inventory, zarr_group
from .engine.store.zarr_group import CheckpointArrays
from .engine.study.patch_settings import PatchSettings
from .options import CacheOptions, MechanismOptions, PatchOptions, ReportOptions

if TYPE_CHECKING:
    from .engine.store.store import Store


@dataclass(frozen=True)
class Work:
    """What a command did, and on what."""

    store: Path
    n_asked: int
    """Checkpoints asked for."""

    n_missing: int
    """Of these, the ones that were not there when the command began."""

    problems: dict[str, str]
    """Label -> why a checkpoint could not be finished."""

    n_complete: int
    """Checkpoints that are finished now, of all there are."""

    seconds: float
    device: str
    dtype: str
    peak_memory: int
    """Bytes."""

    @property
    def n_finished(self) -> int:
        """Checkpoints that this command finished."""
        return self.n_missing - len(self.problems)


@dataclass(frozen=True)
class CacheWork(Work):
    """What `cache` did."""

    n_prompts: int
    warnings: tuple[str, ...]
    """What a reader should know before believing the numbers."""


@dataclass(frozen=True)
class PatchWork(Work):
    """What `patch` did."""

    name: str
    n_runs: int
    """Patched runs that this command computed."""

    @property
    def path(self) -> Path:
        """The patched run's group."""
        return run_path(self.store, self.name)


def describe_cache(options: CacheOptions, folder: Path) -> str:
    """What `cache` would fetch and store, and about how long it would take, as text."""
    checkpoints = _checkpoints(options, folder)
    from .engine.capture import estimate
    from .engine.runtime.resources import Machine

    with quiet_libraries():
        device = Machine.from_options(options.device, options.memory).device
        return estimate.describe(options.study, checkpoints, folder, cache_path(options, folder), device)


def cache(options: CacheOptions, folder: Path) -> CacheWork:
    """Capture the checkpoints that the store lacks.  Raises `UserError` where none can be had."""
    checkpoints = _checkpoints(options, folder)
    study, path = options.study, cache_path(options, folder)
    from .engine.capture import run
    from .engine.runtime.resources import Machine, peak_memory
    from .engine.store.store import Store, duplicate_weights

    with quiet_libraries():
        machine = Machine.from_options(options.device, options.memory)
        missing: Sequence[Checkpoint] = run.pending(study, checkpoints, path, options.overwrite)
        problems: dict[str, str] = {}
        started = time.perf_counter()
        if missing:
            with zarr_group.locked(path), progress("cache", "checkpoint", len(missing)) as bar:
                missing = run.pending(study, checkpoints, path, options.overwrite)
                started = time.perf_counter()
                outcomes = run.cache_series(study, missing, path, folder, machine, options.overwrite)
                problems = _follow(outcomes, bar, bar.update)
        seconds = time.perf_counter() - started
        store = Store(path) if inventory.is_store(path) else None
        if store and missing:
            _record(store, problems)
        return CacheWork(
            store=path,
            n_asked=len(checkpoints),
            n_missing=len(missing),
            problems=problems,
            n_complete=len(store.complete()) if store else 0,
            seconds=seconds,
            device=machine.device,
            dtype=study.dtype,
            peak_memory=peak_memory(machine.device),
            n_prompts=store.array("length").size if store else 0,
            warnings=tuple(duplicate_weights(store)) if store and missing else (),
        )


def patch(options: PatchOptions, folder: Path) -> PatchWork:
    """Patch the checkpoints of a store that the run lacks."""
    options.refuse_impossible()
    path = store_path(options.store, folder)
    requested = select_checkpoints(path, options.checkpoints)
    from .engine.replay.protocols import protocol_named
    from .engine.runtime.resources import Machine, peak_memory
    from .engine.store.store import Store

    protocol = protocol_named(options.protocol)
    request = options.request(protocol.default)
    with quiet_libraries():
        store = Store(path)
        plan = protocol.make_plan(request, store)
        name = options.name or protocol.name_of(request)
        machine = Machine.from_options(options.device, options.memory, plan.dtype)
        with zarr_group.locked(path):
            if options.overwrite:
                zarr_group.remove(run_path(path, name))
            run = protocol.open_run(store, plan, name, machine.device)
            complete = run.complete()
            missing = [label for label in requested if label not in complete]
            started = time.perf_counter()
            with progress("patch", "run", plan.n_runs * len(missing)) as bar:
                outcomes = protocol.patch_series(store, plan, run, missing, folder, machine, bar.update)
                problems = _follow(outcomes, bar)
            seconds = time.perf_counter() - started
        return PatchWork(
            store=path,
            n_asked=len(requested),
            n_missing=len(missing),
            problems=problems,
            n_complete=len(run.complete()),
            seconds=seconds,
            device=machine.device,
            dtype=plan.dtype,
            peak_memory=peak_memory(machine.device),
            name=name,
            n_runs=plan.n_runs * (len(missing) - len(problems)),
        )


def mechanism(options: MechanismOptions, folder: Path) -> Work:
    """Measure what heads do, and how their weights change, at the checkpoints of a store."""
    options.refuse_impossible()
    path = store_path(options.store, folder)
    select_checkpoints(path, options.checkpoints)
    from .engine.mechanism import run as mechanism_run
    from .engine.mechanism import store as mechanism_store
    from .engine.runtime.resources import Machine, peak_memory
    from .engine.store.store import Store

    with quiet_libraries():
        store = Store(path)
        plan = mechanism_run.make_plan(store, options.parts, options.direction, options.dtype)
        wanted = mechanism_run.wanted(store, options.checkpoints)
        machine = Machine.from_options(options.device, options.memory, plan.dtype)
        with zarr_group.locked(path):
            if options.overwrite:
                zarr_group.remove(mechanism_store.mechanism_path(store))
            run = mechanism_store.open_mechanism(store, plan.settings)
            missing = {label: wanted[label] for label in run.missing(wanted)}
            started = time.perf_counter()
            with progress("mechanism", "checkpoint", len(missing)) as bar:
                outcomes = mechanism_run.measure_series(store, plan, run, missing, folder, machine, bar.update)
                problems = _follow(outcomes, bar)
            seconds = time.perf_counter() - started
        return Work(
            store=path,
            n_asked=len(wanted),
            n_missing=len(missing),
            problems=problems,
            n_complete=len(run.complete()),
            seconds=seconds,
            device=machine.device,
            dtype=plan.dtype,
            peak_memory=peak_memory(machine.device),
        )


def report(options: ReportOptions, folder: Path) -> Path:
    """Write the page of a patched run, with its figures and tables; where the page is."""
    path = store_path(options.store, folder)
    from .engine.report import page
    from .engine.store.store import Store

    with quiet_libraries():
        return page.write_report(Store(path.absolute()), options.out or report_folder(path.absolute()), options.name)


def cache_path(options: CacheOptions, folder: Path) -> Path:
    """Where `cache` keeps its store."""
    from .engine.capture.run import store_name

    return options.store or folder / store_name(options.study)


def store_path(store: Path | None, folder: Path) -> Path:
    """The store that is named, or the newest.  Raises `UserError` where there is none."""
    if store is None:
        return inventory.find_store(folder)
    inventory.require_store(store)
    return store


def run_path(store: Path, name: str) -> Path:
    """Where a store keeps a patched run."""
    return store / "patches" / name


def report_folder(store: Path) -> Path:
    """Where the page of a store goes by default."""
    return store.with_name(f"{store.name.removesuffix('.zarr')}-report")


def open_run(store: Path, name: str) -> tuple[xr.Dataset, PatchSettings]:
    """A patched run, lazily with labelled dimensions, and its settings; torch is not needed."""
    group = CheckpointArrays(run_path(store, name))
    return group.dataset(), PatchSettings.from_attributes(group.attrs["patch"])


def select_checkpoints(store: Path, words: Sequence[str]) -> list[str]:
    """Labels of a store's finished checkpoints that words of `--checkpoints` name, in order of training.

    Raises `UserError` for what the store does not hold.
    """
    arrays = CheckpointArrays(store)
    complete = list(arrays.complete())
    steps = {row.label: row.step for row in arrays.rows() if row.label in complete}
    index = RevisionIndex(str(store), lambda: steps, "all")
    chosen = {label for word in words for label in select(index, word)}
    return [label for label in complete if label in chosen]


def _checkpoints(options: CacheOptions, folder: Path) -> list[Checkpoint]:
    options.refuse_impossible()
    return resolve(options.model, options.checkpoints, folder)


def _record(store: "Store", problems: dict[str, str]) -> None:
    """Keep why checkpoints are missing, for `headlapse info`; of those that are there by now no more is said."""
    recorded, complete = store.attrs.get("problems", {}), store.complete()
    known = {label: text for label, text in {**recorded, **problems}.items() if label not in complete}
    if known != recorded:
        store.group.attrs["problems"] = known


def _follow(
    outcomes: Iterable[Outcome], bar: Progress, completed: Callable[[int], object] = lambda _n: None
) -> dict[str, str]:
    """Go through a series, with notes as they come; why checkpoints could not be finished, by label."""
    problems = {}
    for outcome in outcomes:
        completed(1)
        for note in outcome.notes:
            bar.write(f"note: {note}")
        if outcome.problem:
            problems[outcome.label] = outcome.problem
    return problems
