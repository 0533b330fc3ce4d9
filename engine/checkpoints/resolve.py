"""From a model name to its checkpoints: labels with their places in training.

A name is `demo` or `demo-seed2` (trained on the spot), a local directory or a hub id; no other stage has to know which.
"""

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import UserError
from . import files, hub
from .revisions import PYTHIA, RevisionIndex, select
from .training_place import MAIN, UNKNOWN, Place, read_place, refuse_unordered, training_order

DEMO = "demo"
_DEMO_SEED = re.compile(rf"{DEMO}(-seed([1-9][0-9]{{0,8}}))?")

PYTHIA_TOKENS_PER_STEP = 2_097_152
"""1,024 sequences of 2,048 tokens, in every size (Biderman et al. 2023, arXiv:2304.01373)."""

_PYTHIA_NAME = re.compile(r"EleutherAI/pythia-[0-9.]+[mb](-deduped)?(-(data-|weight-)?seed[0-9]+)?")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_CHECKPOINT_FOLDER = re.compile(r"step|checkpoint-")
"""Folders that are checkpoints even without a number, such as `checkpoint-final`."""

FOLDERS = "step*/, checkpoint-*/, ckpt_*/, global_step*/, iter_*/, epoch_*/, stage1-step*/"
"""What folders of checkpoints are called, for errors."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a model, on disk or not."""

    label: str
    """A hub revision or the name of a folder."""

    step: int
    """Training step from the start of its stage; -1 where it is not known."""

    model: str
    """As the user wrote it: `demo`, a hub id or a directory."""

    location: str
    """The hub id, or the checkpoint's own directory."""

    commit: str | None = None
    """The commit to keep to.  None takes what the label stands for now, and is the value outside the hub."""

    stage: str = ""
    """Of its training, as its name has it; empty where it has none."""

    tokens_seen: int = UNKNOWN
    """Since the start of its stage; -1 where not known."""

    @property
    def place(self) -> Place:
        """When in training it was saved; the seed as its label says."""
        return Place(self.stage, self.step, self.tokens_seen, read_place(self.label).seed)


def demo_seed(model: str) -> int | None:
    """The seed of the embedded series that a name stands for: `demo` is 0, `demo-seed2` is 2; None for other models."""
    match = _DEMO_SEED.fullmatch(model)
    return int(match[2] or 0) if match else None


def tokens_per_step(model: str) -> int | None:
    """Tokens that the model saw in each step of its training; None where that is not known."""
    return PYTHIA_TOKENS_PER_STEP if _PYTHIA_NAME.fullmatch(model) else None


def resolve(model: str, words: Sequence[str], cache: Path) -> list[Checkpoint]:
    """The checkpoints of one training of `model` that `words` name, in order, those without a place in it last.

    `words` are labels, globs, steps, tokens, ranges `A..B` and the sets `study`, `log` and `all`; without any, the
    model's default.  The network is used only for what cannot be known without it.  The embedded series lies in the
    folder `cache`.
    Raises `UserError` for a model or a checkpoint that does not exist, and for checkpoints that have no one order.
    """
    checkpoints = named(model, words, cache)
    places = {each.label: each.place for each in checkpoints}
    refuse_unordered(places, f"--checkpoints {' '.join(words)}" if words else f"--model {model}")
    return checkpoints


def named(model: str, words: Sequence[str], cache: Path) -> list[Checkpoint]:
    """As `resolve`, whether or not what is named is of one training."""
    index, parent = _index(model, cache)
    chosen: dict[str, Place] = {}
    for word in words or (index.default,):
        chosen |= select(index, word)
    places = {label: chosen[label] for label in training_order(chosen)}
    return [
        Checkpoint(label, at.step, model, str(parent / label) if parent else model, None, at.stage, at.tokens)
        for label, at in places.items()
    ]


def published(repo: str) -> dict[str, Place]:
    """Every branch and tag of a hub repository, with its place in training.  Asks the hub.

    `main` has the last step where it is known to be meant for it, in Pythia's repositories.
    """
    places = {name: read_place(name) for name in hub.revisions(repo)}
    if MAIN in places and _PYTHIA_NAME.fullmatch(repo):
        places[MAIN] = _of_pythia(PYTHIA[-1])
    return places


def _of_pythia(step: int) -> Place:
    return Place(step=step, tokens=step * PYTHIA_TOKENS_PER_STEP)


def _index(model: str, cache: Path) -> tuple[RevisionIndex, Path | None]:
    """The checkpoints that the name stands for, and the directory that holds them; None for the hub."""
    path = os.path.expanduser(model)
    if demo_seed(model) is not None:
        return RevisionIndex(model, _demo_places, "all"), (cache / model).resolve()
    if os.path.isdir(path):
        return _local_index(model, Path(path).resolve())
    if os.path.exists(path):
        raise UserError(f"--model {model} is a file; give the directory that holds {files.CONFIG} and the weights")
    # `cache/demo` looks like a hub id, but can only be meant as a path.
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).parent.absolute() == cache.absolute():
        raise UserError(f"--model {model}: there is no such directory; give one, a hub id (owner/name) or {DEMO}")
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"--model {model!r} is neither a directory here nor a hub id (owner/name)")
    if _PYTHIA_NAME.fullmatch(model):
        known = {f"step{step}": _of_pythia(step) for step in PYTHIA} | {MAIN: _of_pythia(PYTHIA[-1])}
        # Other labels may be revisions too, such as a commit or a branch that was added later; `step1500` is none.
        return RevisionIndex(
            model, lambda: known, "study", lambda label: label not in ("", MAIN) and not read_place(label).is_known
        ), None
    list_revisions = functools.cache(lambda: _read_places(hub.revisions(model)))
    return RevisionIndex(model, list_revisions, MAIN, bool), None


def _read_places(labels: Iterable[str]) -> dict[str, Place]:
    return {label: read_place(label) for label in labels}


def _local_index(model: str, directory: Path) -> tuple[RevisionIndex, Path]:
    """The series in a directory, or else its single checkpoint.

    The series goes first: a trainer leaves its last weights above the folders of its checkpoints.
    """
    is_one = (directory / files.CONFIG).is_file() and any((directory / form).is_file() for form in files.WEIGHTS)
    folders = sorted(path.name for path in directory.iterdir() if _is_of_series(path, is_one))
    if folders:
        places = _read_places(folders)
        return RevisionIndex(model, lambda: places, "all"), directory
    if is_one:
        return RevisionIndex(model, lambda: _read_places([directory.name]), "all"), directory.parent
    raise UserError(
        f"--model {model} is no checkpoint ({files.CONFIG} and weights: {files.WEIGHT_FORMS}) and has no folders of "
        f"checkpoints in it ({FOLDERS}); {files.contents(directory)}"
    )


def _is_of_series(path: Path, beside_weights: bool) -> bool:
    """Whether a path is a checkpoint's folder, by its name; beside weights also by its content, for trainers keep
    states of their own there, such as DeepSpeed's `global_step500`."""
    if _CHECKPOINT_FOLDER.match(path.name):
        return path.is_dir()
    if read_place(path.name).step < 0 or not path.is_dir():
        return False
    return not beside_weights or (path / files.CONFIG).is_file()


def _demo_places() -> Mapping[str, Place]:
    from .demo import STEPS

    return _read_places(f"step{step}" for step in STEPS)
