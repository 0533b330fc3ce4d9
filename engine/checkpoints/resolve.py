"""From a model name to its checkpoints: labels with their steps.

A name is `demo` or `demo-seed2` (trained on the spot), a local directory or a hub id; no other stage has to know which.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import UserError
from . import files, hub
from .revisions import PYTHIA, RevisionIndex, select, step_of

DEMO = "demo"
_DEMO_SEED = re.compile(rf"{DEMO}(-seed([1-9][0-9]{{0,8}}))?")

PYTHIA_TOKENS_PER_STEP = 2_097_152
"""1,024 sequences of 2,048 tokens, in every size (Biderman et al. 2023, arXiv:2304.01373)."""

_PYTHIA_NAME = re.compile(r"EleutherAI/pythia-[0-9.]+[mb](-deduped)?(-(data-|weight-)?seed[0-9]+)?")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_CHECKPOINT_FOLDER = re.compile(r"step|checkpoint-")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a model, on disk or not."""

    label: str
    """A hub revision or the name of a folder."""

    step: int
    """Training step; -1 where it is not known."""

    model: str
    """As the user wrote it: `demo`, a hub id or a directory."""

    location: str
    """The hub id, or the checkpoint's own directory."""

    commit: str | None = None
    """The commit to keep to.  None takes what the label stands for now, and is the value outside the hub."""


def demo_seed(model: str) -> int | None:
    """The seed of the embedded series that a name stands for: `demo` is 0, `demo-seed2` is 2; None for other models."""
    match = _DEMO_SEED.fullmatch(model)
    return int(match[2] or 0) if match else None


def tokens_per_step(model: str) -> int | None:
    """Tokens that the model saw in each step of its training; None where that is not known."""
    return PYTHIA_TOKENS_PER_STEP if _PYTHIA_NAME.fullmatch(model) else None


def resolve(model: str, words: Sequence[str], cache: Path) -> list[Checkpoint]:
    """The checkpoints of `model` that `words` name, ascending by step, unknown steps last.

    `words` are labels, steps, ranges `A..B` and the sets `study`, `log` and `all`; without any, the model's default.
    The network is used only for what cannot be known without it.  The embedded series lies in the folder `cache`.
    Raises `UserError` for a model or a checkpoint that does not exist.
    """
    index, parent = _index(model, cache)
    steps: dict[str, int] = {}
    for word in words or (index.default,):
        steps |= select(index, word)
    order = sorted(steps, key=lambda label: (steps[label] < 0, steps[label], label == "main", label))
    return [Checkpoint(label, steps[label], model, str(parent / label) if parent else model) for label in order]


def published(repo: str) -> dict[str, int]:
    """Every branch and tag of a hub repository, with its step; -1 where it has none.  Asks the hub.

    `main` has the last step where it is known to be meant for it, in Pythia's repositories.
    """
    steps = {name: step_of(name) for name in hub.revisions(repo)}
    if "main" in steps and _PYTHIA_NAME.fullmatch(repo):
        steps["main"] = PYTHIA[-1]
    return steps


def _index(model: str, cache: Path) -> tuple[RevisionIndex, Path | None]:
    """The checkpoints that the name stands for, and the directory that holds them; None for the hub."""
    path = os.path.expanduser(model)
    if demo_seed(model) is not None:
        return RevisionIndex(model, _demo_steps, "all"), (cache / model).resolve()
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
        known = {f"step{step}": step for step in PYTHIA} | {"main": PYTHIA[-1]}
        # Other labels may be revisions too, such as a commit or a branch that was added later; `step1500` is none.
        return RevisionIndex(
            model, lambda: known, "study", lambda label: label not in ("", "main") and step_of(label) < 0
        ), None
    list_revisions = functools.cache(lambda: {name: step_of(name) for name in hub.revisions(model)})
    return RevisionIndex(model, list_revisions, "main", bool), None


def _local_index(model: str, directory: Path) -> tuple[RevisionIndex, Path]:
    """The series in a directory, or else its single checkpoint.

    The series goes first: a trainer leaves its last weights above the folders of its checkpoints.
    """
    folders = sorted(path.name for path in directory.iterdir() if _CHECKPOINT_FOLDER.match(path.name) and path.is_dir())
    if folders:
        steps = {name: step_of(name) for name in folders}
        return RevisionIndex(model, lambda: steps, "all"), directory
    if (directory / files.CONFIG).is_file() and any((directory / form).is_file() for form in files.WEIGHTS):
        return RevisionIndex(model, lambda: {directory.name: step_of(directory.name)}, "all"), directory.parent
    raise UserError(
        f"--model {model} is no checkpoint ({files.CONFIG} and weights: {files.WEIGHT_FORMS}) and has no step*/ or "
        f"checkpoint-*/ in it; {files.contents(directory)}"
    )


def _demo_steps() -> Mapping[str, int]:
    from .demo import STEPS

    return {f"step{step}": step for step in STEPS}
