"""A checkpoint series through one resident skeleton: cached once, then patched from the cache."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headlapse.engine.activations import KINDS, Capture
from headlapse.engine.arrays import Row, refuse_difference
from headlapse.engine.capture import capture, memory_budget
from headlapse.engine.checkpoints import TORCH_DTYPES, Skeleton, load_tokenizer, open_skeleton, prefetch, read_weights
from headlapse.engine.sources import DEMO, Checkpoint, Files, fetch
from headlapse.engine.store import Store, create_store
from headlapse.engine.study import Refusal, Study
from headlapse.engine.subsets import parse_layers
from headlapse.engine.tasks import DEFAULT_TRIALS, TASKS, Trials, draw_trials, task_digest


@dataclass(frozen=True)
class Outcome:
    """What became of one checkpoint."""

    label: str

    problem: str | None = None
    """Why it could not be done; None when it was."""

    notes: tuple[str, ...] = ()
    """What the user should hear besides."""


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(name: str | None) -> str:
    """The device asked for, or the default.  Raises `Refusal` when it is not to be had."""
    try:
        device = torch.device(name or default_device())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {name}: {str(error).splitlines()[0]}; use cpu") from error
    return str(device)


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


def pending(study: Study, checkpoints: Sequence[Checkpoint], path: Path) -> list[Checkpoint]:
    """The checkpoints that the store at `path` lacks.  Raises `Refusal` when it answers another question."""
    if not path.exists():
        return list(checkpoints)
    store = Store(path)
    refuse_difference(path, store.study, identity(study), "choose another --store, or replace it with --overwrite")
    done = store.complete()
    return [checkpoint for checkpoint in checkpoints if checkpoint.label not in done]


def cache_series(
    study: Study, missing: Sequence[Checkpoint], path: Path, cache: Path, device: str
) -> Iterator[Outcome]:
    """Capture every missing checkpoint into the store at `path`, which is made by the first that succeeds.

    A checkpoint that cannot be read is an `Outcome` with a problem, and the others go on; a task that cannot be
    asked raises `Refusal`.
    """
    dtype = TORCH_DTYPES[study.dtype]

    def load(checkpoint: Checkpoint) -> tuple[Files, dict[str, Tensor]]:
        files = fetch(checkpoint, cache)
        return files, read_weights(files, dtype, device)

    rows = [Row(checkpoint.label, checkpoint.step) for checkpoint in missing]
    store = Store(path) if path.exists() else None
    trials = store.trials() if store else None
    if store:
        store.add(rows)
    skeleton: Skeleton | None = None
    for checkpoint, loaded in prefetch(missing, load):
        notes: tuple[str, ...] = ()
        try:
            files, weights = _loaded(loaded)
            skeleton = open_skeleton(files, study.dtype, device, skeleton)
            skeleton.wear(weights)
        except Refusal as refusal:
            yield Outcome(checkpoint.label, str(refusal))
            continue
        if trials is None:
            trials = draw_trials(study.task, study.trials, load_tokenizer(files.directory), skeleton.anatomy.context)
            notes = trials.notes
        try:
            captured = capture(skeleton, trials, memory_budget(device))
            if store is None:
                store = _make(path, study, rows, skeleton, trials, captured)
            store.write(checkpoint.label, captured, _provenance(checkpoint, files))
        except Refusal as refusal:
            yield Outcome(checkpoint.label, str(refusal), notes)
            continue
        yield Outcome(checkpoint.label, notes=notes)


def kept_layers(study: Study, n_layers: int) -> tuple[list[int], tuple[str, ...]]:
    """Layers and kinds a store keeps: from the first layer to be patched on, since replay needs every later one."""
    everything = list(range(n_layers))
    if study.sites == ("z",):
        return everything, ("z",)
    return everything[parse_layers(study.sites, everything)[0] :], KINDS


def _is_directory(model: str) -> bool:
    """As in `sources`: the embedded series goes before a folder of its name."""
    return model != DEMO and Path(model).expanduser().is_dir()


def _loaded(loaded: tuple[Files, dict[str, Tensor]] | Refusal | OSError) -> tuple[Files, dict[str, Tensor]]:
    if isinstance(loaded, Exception):
        raise loaded
    return loaded


def _make(
    path: Path, study: Study, rows: Sequence[Row], skeleton: Skeleton, trials: Trials, captured: Capture
) -> Store:
    layers, kinds = kept_layers(study, skeleton.anatomy.n_layers)
    return create_store(path, identity(study), rows, layers, kinds, trials, captured)


def _provenance(checkpoint: Checkpoint, files: Files) -> dict[str, Any]:
    """Enough to find these very weights again, and to know them."""
    return {**asdict(checkpoint), "commit": files.commit, "sha256": files.sha256}
