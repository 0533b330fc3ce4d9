"""What the commands do: open the store, plan, take the lock, loop over checkpoints.  Prints no result.

The command line and the Python face are both thin over these functions.  Each refuses what is wrong before it imports
torch, which takes seconds; all raise `UserError` in one line, and `VerificationError` where replay is not exact.
"""

import functools
import importlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .engine.capture.identity import store_name
from .engine.checkpoints import availability, known_problems
from .engine.checkpoints.resolve import Checkpoint, named, resolve, there_by_now
from .engine.checkpoints.revisions import RevisionIndex, select
from .engine.runtime.errors import UserError
from .engine.runtime.importing import importing
from .engine.runtime.outcome import Outcome
from .engine.runtime.progress import Progress, progress
from .engine.runtime.quiet import quiet_libraries
from .engine.store import inventory
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.store.disk import put_in_place, recover, refuse_foreign, sweep
from .engine.store.inventory import is_store
from .engine.store.locks import claimed, layout_lock
from .engine.store.zarr_group import package_versions
from .engine.study.patch_settings import PatchSettings
from .jobs import Gathered, run_jobs
from .options import LIST, CacheOptions, MechanismOptions, PatchOptions, ReportOptions, Sharable
from .workers import in_processes

if TYPE_CHECKING:
    import xarray as xr

    from .engine.checkpoints.availability import Availability
    from .engine.store.store import Store

logger = logging.getLogger(__name__)


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

    by_input: bool
    """Whether all problems lie with what the user gave, not with the machine."""

    kept_old: bool
    """Whether what was to be replaced is still there, since its replacement is not whole yet."""

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
class PatchWork(Work):
    """What `patch` did."""

    name: str
    n_runs: int
    """Patched runs that this command computed."""

    @property
    def path(self) -> Path:
        """The patched run's group."""
        return run_path(self.store, self.name)


@dataclass(frozen=True)
class CacheWork(Work):
    """What `cache` did."""

    n_prompts: int
    warnings: tuple[str, ...] = ()
    """What a reader should know before believing the numbers."""

    then: tuple[Work, ...] = ()
    """What was done with the checkpoints then, a command each."""


AnyWork = TypeVar("AnyWork", bound=Work)


def joined(first: AnyWork, second: AnyWork) -> AnyWork:
    """What a command did on some checkpoints and then on others."""
    both = replace(
        second,
        n_missing=first.n_missing + second.n_missing,
        problems=first.problems | second.problems,
        by_input=first.by_input and second.by_input,
        seconds=first.seconds + second.seconds,
        peak_memory=max(first.peak_memory, second.peak_memory),
    )
    if isinstance(first, PatchWork) and isinstance(both, PatchWork):
        return replace(both, n_asked=first.n_asked + second.n_asked, n_runs=first.n_runs + both.n_runs)
    if isinstance(first, CacheWork) and isinstance(both, CacheWork):
        then = tuple(map(joined, first.then, both.then)) if first.then and both.then else first.then or both.then
        return replace(both, then=then)
    return replace(both, n_asked=first.n_asked + second.n_asked)


def describe_cache(options: CacheOptions, folder: Path) -> str:
    """What `cache` would fetch and store, and about how long it would take, as text."""
    checkpoints = _checkpoints(options, folder)
    from .engine.capture import estimate
    from .engine.runtime.resources import Machine

    with quiet_libraries():
        device = Machine.from_options(options.device, options.memory).device
        return estimate.describe(
            options.study, checkpoints, folder, cache_path(options, folder), device, options.keep_weights
        )


def list_checkpoints(options: CacheOptions, folder: Path) -> "list[Availability]":
    """What there is of a model, with sizes, in order of training, whether or not it is one training.

    Raises `UserError` where there is no such model.
    """
    options.refuse_impossible()
    words = [word for word in options.checkpoints if word != LIST]
    found = named(options.model, words or ("all",), folder, options.revision, options.subfolder, options.tokenizer)
    with quiet_libraries():
        return availability.plan(found, folder)


def cache(options: CacheOptions, folder: Path) -> CacheWork:
    """Capture the checkpoints that the store lacks, and do with them what is to be done then.

    Raises `UserError` where none can be had.
    """
    checkpoints = _checkpoints(options, folder)
    refuse_foreign(cache_path(options, folder))
    with in_processes("cache", options, folder), importing():
        importlib.import_module(".engine.capture.run", __package__)
    if options.keep_weights is not None:
        from .streaming import stream

        work = stream(options, folder, checkpoints)
    else:
        work = capture(options, folder, checkpoints)
        work = replace(work, then=then(options, folder)) if options.then and work.n_complete else work
    return replace(work, warnings=weight_warnings(work.store)) if work.n_missing else work


def cache_arrived(options: CacheOptions, folder: Path, arrived: Sequence[Checkpoint]) -> CacheWork:
    """Capture some checkpoints of a training that goes on, and do with these what is to be done then."""
    if options.keep_weights is not None:
        from .streaming import stream

        return stream(options, folder, arrived)
    work = capture(options, folder, arrived)
    return replace(work, then=then(options, folder, [each.label for each in arrived]))


def then(options: CacheOptions, folder: Path, labels: Sequence[str] | None = None) -> tuple[Work, ...]:
    """Do what is to be done with checkpoints once they are captured: those with these labels, as far as they are, or
    all that were asked for."""
    path = cache_path(options, folder)
    complete = CheckpointArrays(path).complete() if is_store(path) else {}
    here = [label for label in (complete if labels is None else labels) if label in complete]
    done: list[Work] = []
    for command in options.then if here else ():
        on_these = replace(command, store=path, checkpoints=tuple(here))
        done.append(patch(on_these, folder) if isinstance(on_these, PatchOptions) else mechanism(on_these, folder))
    return tuple(done)


def then_groups(options: CacheOptions, path: Path) -> list[Path]:
    """What is written of the store then."""
    return [
        run_path(path, _name_of(command)) if isinstance(command, PatchOptions) else path / "mechanism"
        for command in options.then
    ]


def capture(
    options: CacheOptions, folder: Path, checkpoints: Sequence[Checkpoint], only: Sequence[str] | None = None
) -> CacheWork:
    """Capture those of the checkpoints that the store lacks, or of these the ones with the labels in `only`."""
    study, path = options.study, cache_path(options, folder)
    with importing():
        from .engine.capture import run
        from .engine.runtime.resources import Machine
        from .engine.store.store import Store

    with quiet_libraries():
        machine = Machine() if options.on_cluster else Machine.from_options(options.device, options.memory)
        recover(path)
        site = run.building_site(study, path, options.overwrite)
        by_label = {checkpoint.label: checkpoint for checkpoint in checkpoints}

        def still_missing() -> list[str]:
            lacking = {checkpoint.label for checkpoint in run.pending(study, checkpoints, site)}
            wanted = options.share(list(by_label)) if only is None else only
            return [label for label in wanted if label in lacking]

        labels = still_missing()
        known_problems.warn([by_label[label] for label in labels])
        series = Series(path, "cache", labels, machine.device, _jobs("cache", options, folder, path))
        with series.begun(still_missing) as mine, progress("cache", "checkpoint", len(mine)) as bar:
            todo = [by_label[label] for label in mine]
            series.follow(run.cache_series(study, todo, site, folder, machine, checkpoints), bar, bar.update)
        is_whole = is_store(site) and not run.pending(study, checkpoints, site)
        if is_whole and site != path:
            put_in_place(path, path)
        store = Store(path) if is_store(path) else None
        return CacheWork(
            **series.work(len(checkpoints), study.dtype),
            store=path,
            n_complete=len(store.complete()) if store else 0,
            kept_old=site != path and site.exists(),
            n_prompts=store.array("length").size if store else 0,
        )


def weight_warnings(path: Path) -> tuple[str, ...]:
    """What the weights of a store's checkpoints say against it, where there is one."""
    from .engine.store.store import Store, duplicate_weights

    return tuple(duplicate_weights(Store(path))) if is_store(path) else ()


def patch(options: PatchOptions, folder: Path) -> PatchWork:
    """Patch the checkpoints of a store that the run lacks."""
    options.refuse_impossible()
    path = store_path(options.store, folder)
    requested = select_checkpoints(path, options.checkpoints)
    with in_processes("patch", options, folder), importing():
        from .engine.replay.protocols import protocol_named
        from .engine.runtime.resources import Machine
        from .engine.store.store import Store

    jobs = _jobs("patch", options, folder, path)
    protocol, name = protocol_named(options.protocol), _name_of(options)
    with quiet_libraries():
        store = Store(path, options.weights)
        plan = protocol.make_plan(options.request(protocol.default), store)
        options.reading.prompts(store.trials().n_trials)
        machine = Machine() if jobs else Machine.from_options(options.device, options.memory, plan.dtype)
        run = protocol.open_run(store, plan, name, options.overwrite)
        missing = _missing(options.share(requested), run)
        say_other_versions(store)
        series = Series(path, f"patches.{run.path.name}", missing, machine.device, jobs)
        still_missing = functools.partial(_missing, missing, run)
        with series.begun(still_missing) as mine, progress("patch", "run", plan.n_runs * len(mine)) as bar:
            series.follow(protocol.patch_series(store, plan, run, mine, folder, machine, bar.update), bar)
        return PatchWork(
            **series.work(len(requested), plan.dtype),
            **_finished(run, run_path(path, name), path, requested),
            store=path,
            name=name,
            n_runs=plan.n_runs * (len(series.missing) - len(series.outcomes)),
        )


def _name_of(options: PatchOptions) -> str:
    """What the run is called in the store."""
    with importing():
        from .engine.replay.protocols import protocol_named

    protocol = protocol_named(options.protocol)
    return options.name or protocol.name_of(options.request(protocol.default))


def mechanism(options: MechanismOptions, folder: Path) -> Work:
    """Measure what heads do, and how their weights change, at the checkpoints of a store."""
    options.refuse_impossible()
    path = store_path(options.store, folder)
    requested = select_checkpoints(path, options.checkpoints)
    with in_processes("mechanism", options, folder), importing():
        from .engine.mechanism import run as mechanism_run
        from .engine.mechanism import store as mechanism_store
        from .engine.runtime.resources import Machine
        from .engine.store.store import Store

    jobs = _jobs("mechanism", options, folder, path)
    with quiet_libraries():
        store = Store(path, options.weights)
        plan = mechanism_run.make_plan(store, options.parts, options.direction, options.dtype)
        wanted = mechanism_run.wanted(store, requested)
        machine = Machine() if jobs else Machine.from_options(options.device, options.memory, plan.dtype)
        run = mechanism_store.open_mechanism(store, plan.settings, options.overwrite)
        missing = options.share(run.missing(wanted))
        say_other_versions(store)
        series = Series(path, run.path.name, missing, machine.device, jobs)
        with series.begun(lambda: run.missing(wanted)) as mine:
            todo = {label: wanted[label] for label in mine}
            with progress("mechanism", "checkpoint", len(mine)) as bar:
                series.follow(mechanism_run.measure_series(store, plan, run, todo, folder, machine, bar.update), bar)
        return Work(
            **series.work(len(requested), plan.dtype),
            **_finished(run, mechanism_store.mechanism_path(store), path, requested),
            store=path,
        )


Jobs = Callable[[Sequence[str]], Gathered]
"""Has jobs do the checkpoints of these labels."""


class Series:
    """A command's way through checkpoints: which it may write, how each ended, how long it took."""

    def __init__(
        self, store: Path, group: str, missing: Sequence[str], device: str, jobs: "Jobs | None" = None
    ) -> None:
        self.store, self.group, self.missing, self.device, self.jobs = store, group, list(missing), device, jobs
        self.outcomes: dict[str, Outcome] = {}
        """Label -> how a checkpoint ended that could not be finished."""

        self.peak_memory: int | None = None
        """Bytes, where the work was not done in this process."""

        self._started = time.perf_counter()

    @contextmanager
    def begun(self, still_missing: Callable[[], list[str]]) -> Iterator[list[str]]:
        """The missing checkpoints that no other process is writing, nor has finished meanwhile, to be written here."""
        if not self.missing:
            yield []
            return
        if self.jobs is not None:
            self._hand_out(self.jobs, still_missing)
            yield []
            return
        with layout_lock(self.store):
            sweep(self.store)
        with claimed(self.store, self.group, self.missing) as mine:
            left = still_missing()
            self.missing = [label for label in self.missing if label in left]
            for label in self.missing:
                if label not in mine:
                    problem = f"another process is writing it into {self.store}; run this again when it has ended"
                    self.outcomes[label] = Outcome(label, problem, by_input=False)
            self._started = time.perf_counter()
            yield [label for label in self.missing if label in mine]

    def _hand_out(self, jobs: "Jobs", still_missing: Callable[[], list[str]]) -> None:
        """Have jobs of a cluster do it all; what they leave undone is not done here, where there may be no GPU."""
        gathered = jobs(self.missing)
        self.outcomes = {label: gathered.reasons[label] for label in still_missing() if label in gathered.reasons}
        self.device, self.peak_memory = gathered.device, gathered.peak_memory

    def follow(
        self, outcomes: Iterable[Outcome], bar: Progress, completed: Callable[[int], object] = lambda _n: None
    ) -> None:
        """Go through the outcomes, with notes as they come."""
        for outcome in outcomes:
            completed(1)
            for note in outcome.notes:
                bar.write(f"note: {note}")
            if outcome.problem:
                self.outcomes[outcome.label] = outcome

    def work(self, n_asked: int, dtype: str) -> dict[str, Any]:
        """The fields of `Work` that every command shares."""
        from .engine.runtime.resources import peak_memory

        peak = peak_memory(self.device) if self.peak_memory is None else self.peak_memory
        return {
            "n_asked": n_asked,
            "n_missing": len(self.missing),
            "problems": {label: str(outcome.problem) for label, outcome in self.outcomes.items()},
            "by_input": all(outcome.by_input for outcome in self.outcomes.values()),
            "seconds": time.perf_counter() - self._started,
            "device": self.device,
            "dtype": dtype,
            "peak_memory": peak,
        }


def _jobs(command: str, options: Sharable, folder: Path, store: Path) -> "Jobs | None":
    """Who does the work where `--workers` names a cluster."""
    return functools.partial(run_jobs, command, options, folder, store) if options.on_cluster else None


def say_other_versions(store: "Store") -> None:
    """Warn, in one line, where other library versions wrote the store: the last bits may differ."""
    now = package_versions()
    then = {name: version for name, version in store.attrs["versions"].items() if now.get(name) != version}
    if then:
        wrote = ", ".join(f"{name} {version}" for name, version in then.items())
        logger.warning("%s was written by %s; now %s", store.path, wrote, ", ".join(f"{n} {now.get(n)}" for n in then))


def _missing(labels: Sequence[str], run: CheckpointArrays) -> list[str]:
    complete = run.complete()
    return [label for label in labels if label not in complete]


def _finished(run: CheckpointArrays, path: Path, store: Path, requested: Sequence[str]) -> dict[str, Any]:
    """Put a group that was built to replace another in its place, once all that was asked for is there."""
    if run.path != path and run.path.exists() and not _missing(requested, run):
        put_in_place(path, store)
    kept_old = run.path != path and run.path.exists()
    return {"n_complete": len(CheckpointArrays(path, store).complete()), "kept_old": kept_old}


def report(options: ReportOptions, folder: Path, reload: float | None = None) -> Path:
    """Write the page of a patched run, with its figures and tables; where the page is.

    It reloads itself after so many seconds without a reader's hand, where `reload` says so.
    """
    path = store_path(options.store, folder)
    with importing():
        from .engine.report import page
        from .engine.store.store import Store

    with quiet_libraries():
        out = options.out or report_folder(path.absolute())
        return page.write_report(Store(path.absolute()), out, options.name, reload)


def cache_path(options: CacheOptions, folder: Path) -> Path:
    """Where `cache` keeps its store."""
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


def open_run(store: Path, name: str) -> "tuple[xr.Dataset, PatchSettings]":
    """A patched run in memory, with labelled dimensions, and its settings; torch is not needed."""
    group = CheckpointArrays(run_path(store, name), store)
    return group.load(), PatchSettings.from_attributes(group.attrs["patch"])


def select_checkpoints(store: Path, words: Sequence[str]) -> list[str]:
    """Labels of a store's finished checkpoints that words of `--checkpoints` name, in order of training.

    Raises `UserError` for what the store does not hold.
    """
    arrays = CheckpointArrays(store)
    complete = list(arrays.complete())
    places = {row.label: row.place for row in arrays.rows() if row.label in complete}
    index = RevisionIndex(str(store), lambda: places, "all")
    chosen = {label for word in words for label in select(index, word)}
    return [label for label in complete if label in chosen]


def arrivals(options: CacheOptions, folder: Path) -> list[Checkpoint]:
    """The checkpoints of a training that goes on which are there by now, half written or whole, in its order.

    Raises `NothingThereError` where it has not begun, and `UserError` for what will never be right.
    """
    places = options.revision, options.subfolder, options.tokenizer
    return there_by_now(options.model, options.checkpoints, folder, *places)


def _checkpoints(options: CacheOptions, folder: Path) -> list[Checkpoint]:
    options.refuse_impossible()
    if options.lists:
        raise UserError("--checkpoints list: nothing can be cached of a list; write labels, a range, a set or all")
    return resolve(options.model, options.checkpoints, folder, options.revision, options.subfolder, options.tokenizer)
