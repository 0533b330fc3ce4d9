"""Cache a checkpoint series: load each checkpoint's weights into one resident model and capture its activations."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoints.files import sha256, stamp, vocabulary_file
from ..checkpoints.model import Loaded, ModelLoader, load_tokenizer
from ..checkpoints.prefetch import prefetch
from ..checkpoints.resolve import DEMO, Checkpoint, Files, fetch
from ..runtime.errors import UserError
from ..runtime.outcome import Outcome
from ..runtime.resources import Machine
from ..store.activations import KINDS
from ..store.store import Store, create_store
from ..store.zarr_group import CheckpointRow, refuse_difference, refuse_foreign
from ..study.prompts import DEFAULT_TRIALS, Trials, check_task, draw_trials, same_tokens, task_digest
from ..study.study import Study
from ..study.subsets import parse_layers
from ..study.tasks.registry import TASKS
from .forward import capture


def identity(study: Study) -> dict[str, Any]:
    """What makes two studies the same question: what a store holds and compares."""
    trials = study.trials or (DEFAULT_TRIALS if study.task in TASKS else None)
    model = str(Path(study.model).expanduser().resolve()) if _is_directory(study.model) else study.model
    task = study.task if study.task in TASKS else Path(study.task).name
    fields = {"model": model, "task": task, "task_digest": task_digest(study.task), "trials": trials}
    return {**fields, "sites": list(study.sites), "dtype": study.dtype}


def store_name(study: Study) -> str:
    """`pythia-160m-decimal.zarr`"""
    model = Path(study.model).expanduser().resolve().name if _is_directory(study.model) else study.model.split("/")[-1]
    task = study.task if study.task in TASKS else Path(study.task).stem
    return f"{model}-{task}.zarr"


def pending(study: Study, checkpoints: Sequence[Checkpoint], path: Path, overwrite: bool = False) -> list[Checkpoint]:
    """The checkpoints that the store at `path` lacks.  Raises `UserError` when it answers another question."""
    refuse_foreign(path)
    if overwrite or not path.exists():
        return list(checkpoints)
    store = Store(path)
    refuse_difference(path, store.study, identity(study), "choose another --store, or replace it with --overwrite")
    done = store.complete()
    return [checkpoint for checkpoint in checkpoints if checkpoint.label not in done]


def cache_series(
    study: Study, missing: Sequence[Checkpoint], path: Path, cache: Path, machine: Machine, overwrite: bool = False
) -> Iterator[Outcome]:
    """Capture every missing checkpoint into the store at `path`, which is made by the first that succeeds.

    Only then does it take the place of one that is to be overwritten.  A checkpoint that cannot be had is an
    `Outcome` with a problem, and the others go on.
    Raises `UserError` for a task that is none, before anything is fetched, or that the tokenizer cannot ask.
    """
    check_task(study.task)

    loader = ModelLoader(study.dtype, machine)
    recorder = _Recorder(study, missing, path, loader, overwrite)

    def captures() -> Iterator[tuple[Outcome, Callable[[], None]]]:
        for checkpoint, loaded in prefetch(missing, lambda checkpoint: loader.prefetch(fetch(checkpoint, cache))):
            try:
                if isinstance(loaded, Exception):
                    raise loaded
                notes, write = recorder.record(checkpoint, loaded)
                yield Outcome(checkpoint.label, notes=notes), write
            except UserError as refusal:
                if recorder.is_asking:
                    raise
                yield Outcome(checkpoint.label, str(refusal)), lambda: None

    return _behind(captures())


def _behind(jobs: Iterable[tuple[Outcome, Callable[[], None]]]) -> Iterator[Outcome]:
    """Do each job while the next one is made, and hand its outcome on when it is done."""
    waiting: tuple[Outcome, Future[None]] | None = None
    with ThreadPoolExecutor(1, "write") as pool:
        for outcome, work in jobs:
            if waiting is not None:
                yield _done(*waiting)
            waiting = outcome, pool.submit(work)
        if waiting is not None:
            yield _done(*waiting)


def _done(outcome: Outcome, job: Future[None]) -> Outcome:
    try:
        job.result()
    except UserError as refusal:
        return replace(outcome, problem=str(refusal))
    return outcome


class _Recorder:
    """Owns the store while a series goes through."""

    def __init__(
        self, study: Study, missing: Sequence[Checkpoint], path: Path, loader: ModelLoader, overwrite: bool
    ) -> None:
        self.study, self.path, self.loader = study, path, loader
        self.rows = [CheckpointRow(checkpoint.label, checkpoint.step) for checkpoint in missing]
        self.store = Store(path) if path.exists() and not overwrite else None
        self.trials = self.store.trials() if self.store else None
        self.vocabularies: set[str] = set()
        self.is_asking = False
        """While the task meets its first tokenizer: what is wrong then is wrong for every checkpoint."""
        if self.store:
            self.store.add(self.rows)

    def record(self, checkpoint: Checkpoint, loaded: Loaded) -> tuple[tuple[str, ...], Callable[[], None]]:
        """Capture one checkpoint; what the user should hear about the prompts, and what writes it."""
        files, _ = loaded
        resident, memory = self.loader.load_weights(loaded)
        trials, notes = self._ask(files, resident.architecture.context)
        captured = capture(resident, trials, memory)
        if self.store is None:
            layers, kinds = kept_layers(self.study, resident.architecture.n_layers)
            self.store = create_store(self.path, identity(self.study), self.rows, layers, kinds, trials, captured)
        provenance = _provenance(checkpoint, files)
        return notes, functools.partial(self.store.write, checkpoint.label, captured, provenance)

    def _ask(self, files: Files, context: int) -> tuple[Trials, tuple[str, ...]]:
        """The prompts as tokens.  Raises `UserError` when this checkpoint's tokenizer cuts them otherwise."""
        vocabulary = vocabulary_file(files.directory)
        digest = sha256(vocabulary)
        if self.trials is not None and digest in self.vocabularies:
            return self.trials, ()
        self.is_asking = first = self.trials is None
        drawn = draw_trials(self.study.task, self.study.trials, load_tokenizer(vocabulary.parent), context)
        self.is_asking = False
        if self.trials is not None and not same_tokens(drawn, self.trials):
            raise UserError(
                f"{vocabulary} cuts the prompts into other tokens than the store holds; use another --store"
            )
        self.trials = self.trials or drawn
        self.vocabularies.add(digest)
        return self.trials, drawn.notes if first else ()


def kept_layers(study: Study, n_layers: int) -> tuple[list[int], tuple[str, ...]]:
    """Layers and kinds a store keeps: from the first layer to be patched on, since replay needs every later one."""
    everything = list(range(n_layers))
    if study.sites == ("z",):
        return everything, ("z",)
    return everything[parse_layers(study.sites, everything, "--sites")[0] :], KINDS


def _is_directory(model: str) -> bool:
    """As in `checkpoints.resolve`: the embedded series takes precedence over a folder of its name."""
    return model != DEMO and Path(model).expanduser().is_dir()


def _provenance(checkpoint: Checkpoint, files: Files) -> dict[str, Any]:
    """Enough to find these very weights again, and to know them."""
    stamps = {path.name: stamp(path) for path in files.weights}
    return {**asdict(checkpoint), "commit": files.commit, "sha256": files.sha256, "stamps": stamps}
