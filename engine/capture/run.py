"""Capture a series of checkpoints into a store, through one resident model."""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.architecture import Architecture
from ..checkpoints.fetch import fetch, prepare
from ..checkpoints.files import Files, sha256, stamp
from ..checkpoints.loader import Loaded, ModelLoader
from ..checkpoints.prefetch import prefetch
from ..checkpoints.resolve import Checkpoint
from ..checkpoints.tokenizer import load_tokenizer
from ..runtime.errors import UserError
from ..runtime.format import one_line
from ..runtime.outcome import Outcome, failed
from ..runtime.resources import Machine
from ..store.activations import KINDS, Capture
from ..store.disk import replacement_of
from ..store.inventory import is_store
from ..store.locks import layout_lock
from ..store.store import Store, create_store
from ..store.zarr_group import CheckpointRow, refuse_difference
from ..study.prompts import Trials, check_task, draw_trials, same_tokens
from ..study.study import Study
from ..study.subsets import parse_layers
from .forward import capture
from .identity import identity


def building_site(study: Study, path: Path, overwrite: bool) -> Path:
    """Where the store is written: at its `path`, or beside the one that it is to replace once it is whole.

    What was begun there and has other settings is removed.
    """
    if not (overwrite and path.exists()):
        return path
    site = replacement_of(path)
    if is_store(site) and Store(site).study != identity(study):
        shutil.rmtree(site)
    return site


def pending(study: Study, checkpoints: Sequence[Checkpoint], path: Path) -> list[Checkpoint]:
    """The checkpoints that the store at `path` lacks.  Raises `UserError` when the store is of another study."""
    if not path.exists():
        return list(checkpoints)
    store = Store(path)
    refuse_difference(path, store.study, identity(study), "choose another --store, or replace it with --overwrite")
    complete = store.complete()
    return [checkpoint for checkpoint in checkpoints if checkpoint.label not in complete]


def cache_series(
    study: Study,
    missing: Sequence[Checkpoint],
    path: Path,
    cache: Path,
    machine: Machine,
    axis: Sequence[Checkpoint] = (),
) -> Iterator[Outcome]:
    """Capture every missing checkpoint into the store at `path`; yields an `Outcome` for each.

    The store is laid out with room for all of `axis`, or else for what is missing, before the first capture.  A
    checkpoint that fails, for whatever reason, is an `Outcome` with a problem, and the others continue.
    Raises `UserError` for a task that does not exist, before anything is fetched, or whose prompts the tokenizer cannot
    take.
    """
    check_task(study.task)
    prepare(missing, cache)
    loader = ModelLoader(study.dtype, machine)
    recorder = _Recorder(study, axis or missing, path, loader)

    def captures() -> Iterator[tuple[Outcome, Callable[[], None]]]:
        for checkpoint, loaded in prefetch(missing, lambda checkpoint: loader.prefetch(fetch(checkpoint, cache))):
            try:
                if isinstance(loaded, Exception):
                    raise loaded
                notes, write = recorder.record(checkpoint, loaded)
                yield Outcome(checkpoint.label, notes=notes), write
            except Exception as error:  # whatever is wrong with one checkpoint, the others go on
                if recorder.task_failed:
                    raise
                yield failed(checkpoint.label, error), lambda: None

    return map(recorder.keep_problem, _write_behind(captures()))


def _write_behind(jobs: Iterable[tuple[Outcome, Callable[[], None]]]) -> Iterator[Outcome]:
    """Do each job in a thread while the next one is being made; yields its outcome when it is finished.

    One job waits at most, so that at most two captures are in memory.
    """
    waiting: tuple[Outcome, Future[None]] | None = None
    with ThreadPoolExecutor(1, "write") as pool:
        for outcome, write in jobs:
            if waiting is not None:
                yield _finish(*waiting)
            waiting = outcome, pool.submit(write)
        if waiting is not None:
            yield _finish(*waiting)


def _finish(outcome: Outcome, writing: Future[None]) -> Outcome:
    try:
        writing.result()
    except Exception as error:  # of the disk, most likely
        return failed(outcome.label, error, outcome.notes)
    return outcome


class _Recorder:
    """Owns the store while a series is captured."""

    def __init__(self, study: Study, axis: Sequence[Checkpoint], path: Path, loader: ModelLoader) -> None:
        self.study, self.path, self.loader = study, path, loader
        self.rows = [CheckpointRow(each.label, each.step, each.stage, each.tokens_seen) for each in axis]
        self.store = Store(path) if path.exists() else None
        self.trials = self.store.trials() if self.store else None
        self.vocabularies: set[str] = set()
        """Digests of the tokenizers that were compared with the stored tokens."""

        self._problems: dict[str, str] = {}
        """Label -> problem, until there is a store to keep them in."""

        self.task_failed = False
        """Whether the task failed with the first tokenizer, and so would with every checkpoint."""
        if self.store:
            self.store.add(self.rows)

    def record(self, checkpoint: Checkpoint, loaded: Loaded) -> tuple[tuple[str, ...], Callable[[], None]]:
        """Capture one checkpoint; returns notes on the prompts for the user, and the function that writes it."""
        files, _ = loaded
        resident, memory = self.loader.load_weights(loaded)
        trials, notes = self._tokenize(files, resident.architecture.context)
        if self.store is None:
            files.hashing.results()  # weights that are refused leave no store behind
        store = self.store = self.store or self._laid_out(resident.architecture, trials)
        captured = capture(resident, trials, memory)
        refuse_non_finite(captured, trials, checkpoint.label)
        provenance = _provenance(checkpoint, files)

        def write() -> None:
            store.write(checkpoint.label, captured, provenance)

        return notes, write

    def keep_problem(self, outcome: Outcome) -> Outcome:
        """Keep why a checkpoint is missing, for `headlapse info`; with a note where the disk does not take that either.

        What failed before there was a store is kept once there is one.
        """
        if outcome.problem:
            self._problems[outcome.label] = outcome.problem
        try:
            while self.store and self._problems:
                self.store.write_problem(*next(iter(self._problems.items())))
                del self._problems[next(iter(self._problems))]
        except Exception as error:  # a full disk has said so in the outcome; the others go on
            note = f"why {', '.join(self._problems)} failed is not kept in {self.path}: {one_line(error)}"
            self._problems.clear()
            return replace(outcome, notes=(*outcome.notes, note))
        return outcome

    def _laid_out(self, architecture: Architecture, trials: Trials) -> Store:
        """The store with room for every checkpoint: new, or the one that another process has just made."""
        with layout_lock(self.path):
            if not self.path.exists():
                layers, widths = stored_layers(self.study, architecture)
                return create_store(self.path, identity(self.study), self.rows, layers, trials, widths)
        store = Store(self.path)
        refuse_difference(self.path, store.study, identity(self.study), "choose another --store")
        if not same_tokens(store.trials(), trials):
            raise UserError(f"{self.path} was just made with other tokens; use another --store")
        store.add(self.rows)
        return store

    def _tokenize(self, files: Files, context: int) -> tuple[Trials, tuple[str, ...]]:
        """The prompts as tokens, and notes where they are drawn for the first time.

        Raises `UserError` when this checkpoint's tokenizer gives other tokens than the store holds.
        """
        vocabulary = files.vocabulary
        digest = sha256(vocabulary)
        if self.trials is not None and digest in self.vocabularies:
            return self.trials, ()
        self.task_failed = first = self.trials is None  # stays so if one of the next two calls raises
        tokenizer = load_tokenizer(vocabulary.parent)
        drawn = draw_trials(self.study.task, self.study.trials, tokenizer, context)
        self.task_failed = False
        if self.trials is not None and not same_tokens(drawn, self.trials):
            raise UserError(
                f"{vocabulary} splits the prompts into other tokens than the store holds; use another --store"
            )
        self.trials = self.trials or drawn
        self.vocabularies.add(digest)
        return self.trials, drawn.notes if first else ()


def stored_layers(study: Study, architecture: Architecture) -> tuple[list[int], dict[str, tuple[int, ...]]]:
    """The layers that are stored, and the shape at one position of each kind of activation that is.

    From the first layer to be patched on, because replay needs every later one.
    Raises `UserError` for a layer that the model does not have.
    """
    widths: dict[str, tuple[int, ...]] = {
        "z": (architecture.n_heads, architecture.value_dim),
        "key": (architecture.n_kv_heads, architecture.head_dim),
        "value": (architecture.n_kv_heads, architecture.value_dim),
        "resid_pre": (architecture.d_model,),
    }
    layers = list(range(architecture.n_layers))
    if study.sites == ("z",):
        return layers, {"z": widths["z"]}
    first = parse_layers(study.sites, layers, "--sites")[0]
    return layers[first:], {kind: widths[kind] for kind in KINDS}


def refuse_non_finite(captured: Capture, trials: Trials, label: str) -> None:
    """Raise `UserError` naming the first activation that is infinite or not a number, so that its checkpoint is set
    aside.  What stands where prompts are padded does not count."""
    is_token = torch.arange(trials.tokens.shape[-1]) < torch.from_numpy(trials.length)[..., None]
    n_layers = len(captured.tensors["z"])
    for layer, kind in itertools.product(range(n_layers), ("resid_pre", "key", "value", "z")):
        values = captured.read(kind, layer)
        if not torch.isfinite(values).all() and not torch.isfinite(values[is_token]).all():
            raise UserError(_non_finite(f"{kind} of layer {layer}", label))
    if not torch.isfinite(captured.answer_logits).all():
        raise UserError(_non_finite("logits of the answers", label))


def _non_finite(what: str, label: str) -> str:
    return f"the {what} of {label} is not finite: its weights are damaged, or the numbers too large for this --dtype"


def _provenance(checkpoint: Checkpoint, files: Files) -> dict[str, Any]:
    """Enough to find exactly these weights again, and to recognise them."""
    stamps = {path.name: stamp(path) for path in files.weights}
    return {**asdict(checkpoint), "commit": files.commit, "sha256": files.sha256, "stamps": stamps}
