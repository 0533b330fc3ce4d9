"""The series of checkpoints that a model's name stands for, and where each of them lies.

In the wild a checkpoint is a branch or a tag of a hub repository, a folder in one, a repository of its own, or a folder
on disk; where names are not enough to tell, templates say which.
"""

import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import NothingThereError, UserError
from ..runtime.format import format_names
from . import files, hub
from .revisions import PYTHIA, RevisionIndex
from .template import Template
from .training_place import MAIN, Place, read_place

DEMO = "demo"
_DEMO_SEED = re.compile(rf"{DEMO}(-seed([1-9][0-9]{{0,8}}))?")

PYTHIA_TOKENS_PER_STEP = 2_097_152
"""1,024 sequences of 2,048 tokens, in every size (Biderman et al. 2023, arXiv:2304.01373)."""

_PYTHIA_NAME = re.compile(r"EleutherAI/pythia-[0-9.]+[mb](-deduped)?(-(data-|weight-)?seed[0-9]+)?")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_CHECKPOINT_FOLDER = re.compile(r"step|checkpoint-")
"""Folders that are checkpoints even without a number, such as `checkpoint-final`."""

_UNFINISHED = re.compile(r"\.|tmp[-_]|.*[._-](tmp|temp|partial|incomplete)$")
"""Names that a folder has only while it is being written; it gets its own when it is whole."""

FOLDERS = "step*/, checkpoint-*/, ckpt_*/, global_step*/, iter_*/, epoch_*/, stage1-step*/"
"""What folders of checkpoints are called, for errors."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a checkpoint lies."""

    location: str
    """The hub id, or the checkpoint's own directory."""

    revision: str | None = None
    """What the hub calls it; None where that is the label, and outside the hub."""

    subfolder: str = ""


@dataclass(frozen=True)
class Series:
    """The checkpoints of a model."""

    index: RevisionIndex
    whereabouts: Callable[[str], Whereabouts]
    """Of the checkpoint with a label."""


def demo_seed(model: str) -> int | None:
    """The seed of the embedded series that a name stands for: `demo` is 0, `demo-seed2` is 2; None for other models."""
    match = _DEMO_SEED.fullmatch(model)
    return int(match[2] or 0) if match else None


def is_pythia(model: str) -> bool:
    """Whether this is a model of the Pythia suite, whose checkpoints are known without asking."""
    return bool(_PYTHIA_NAME.fullmatch(model))


def published(repo: str) -> dict[str, Place]:
    """Every branch and tag of a hub repository, with its place in training.  Asks the hub.

    `main` has the last step where it is known to be meant for it, in Pythia's repositories.
    """
    places = _read_places(hub.revisions(repo))
    if MAIN in places and is_pythia(repo):
        places[MAIN] = _of_pythia(PYTHIA[-1])
    return places


def find_series(model: str, cache: Path, revision: str | None = None, subfolder: str | None = None) -> Series:
    """The checkpoints that a name, or one template, stands for.  The embedded series lies in the folder `cache`.

    Raises `UserError` where there is no such model, or nothing that the template fits.
    """
    templates = {
        "--model": Template(model, "--model"),
        "--revision": Template(revision or MAIN, "--revision"),
        "--subfolder": Template((subfolder or "").strip("/"), "--subfolder"),
    }
    varying = [option for option, template in templates.items() if not template.is_fixed]
    if len(varying) > 1:
        raise UserError(f"{varying[0]} and {varying[1]} both have fields or *; write out one of them")
    if demo_seed(model) is not None:
        if revision or subfolder:
            raise UserError(f"--model {model}: the embedded series has neither --revision nor --subfolder")
        directory = (cache / model).resolve()
        return Series(RevisionIndex(model, _demo_places, "all"), lambda label: Whereabouts(str(directory / label)))
    if _is_local(model, templates["--model"], cache):
        if revision:
            raise UserError(f"--revision {revision}: {model} is a directory, which has none; leave it out")
        return _on_disk(model, templates["--model"], templates["--subfolder"])
    return _on_hub(model, templates, revision)


def is_path(model: str) -> bool:
    """Whether a name, or a template, stands for a place on disk, there or not."""
    path = os.path.expanduser(model)
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1 or os.path.exists(path):
        return True
    # Of a template what varies is in the last folder: `runs/iter_{step}`.
    return "{" in model and os.path.isdir(os.path.dirname(path) or ".")


def _is_local(model: str, template: Template, cache: Path) -> bool:
    """Whether a name stands for directories.  Raises `UserError` for a path where there is none, and for a file."""
    # `cache/demo` looks like a hub id, but can only be meant as a path.
    if not is_path(model) and Path(model).parent.absolute() != cache.absolute():
        return False
    path = os.path.expanduser(model)
    if template.is_fixed and os.path.isfile(path):
        raise UserError(f"--model {model} is a file; give the directory that holds {files.CONFIG} and the weights")
    if template.is_fixed and not os.path.isdir(path):
        raise NothingThereError(
            f"--model {model}: there is no such directory; give one, a hub id (owner/name) or {DEMO}"
        )
    return True


def _on_disk(model: str, template: Template, subfolder: Template) -> Series:
    if not template.is_fixed:
        return _folders(model, template, subfolder.text)
    if not subfolder.is_fixed:
        return _folders(model, Template(f"{model.rstrip('/')}/{subfolder.text}", subfolder.option), "")
    index, parent = _local_index(model, Path(model).expanduser().resolve(), subfolder.text)
    return Series(index, lambda label: Whereabouts(str(parent / label / subfolder.text)))


def _folders(model: str, template: Template, subfolder: str) -> Series:
    """The directories that a template fits, each a checkpoint."""
    written = Template(os.path.normpath(os.path.expanduser(template.text)), template.option)
    start = Path(os.path.dirname(written.fixed_start))
    pattern = re.sub(r"\{\w+\}", "*", os.path.relpath(written.text, start))
    found: dict[str, tuple[Place, Path]] = {}
    for path in sorted(start.glob(pattern)):
        if path.is_dir() and (place := written.read(str(path))) is not None:
            found[written.short(str(path))] = place, path.resolve()
    if not found:
        raise NothingThereError(f"{template.option} {template.text}: no directory fits it; {files.contents(start)}")
    places = {label: place for label, (place, _) in found.items()}
    return Series(
        RevisionIndex(model, lambda: places, "all"), lambda label: Whereabouts(str(found[label][1] / subfolder))
    )


def _on_hub(model: str, templates: Mapping[str, Template], revision: str | None) -> Series:
    repo, branch, folder = templates["--model"], templates["--revision"], templates["--subfolder"]
    if not repo.is_fixed:
        return _repositories(repo, branch.text, folder.text)
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"--model {model!r} is neither a directory here nor a hub id (owner/name)")
    if not folder.is_fixed:
        return _subfolders(model, branch.text, folder)
    index = _hub_index(model) if revision is None else _of_revision(model, branch)
    return Series(index, lambda _label: Whereabouts(model, None, folder.text))


def _hub_index(model: str) -> RevisionIndex:
    """Every branch and tag; those of Pythia are known without asking."""
    if is_pythia(model):
        known = {f"step{step}": _of_pythia(step) for step in PYTHIA} | {MAIN: _of_pythia(PYTHIA[-1])}
        # Other labels may be revisions too, such as a commit or a branch that was added later; `step1500` is none.
        return RevisionIndex(
            model, lambda: known, "study", lambda label: label not in ("", MAIN) and not read_place(label).is_known
        )
    list_revisions = functools.cache(lambda: _read_places(hub.revisions(model)))
    return RevisionIndex(model, list_revisions, MAIN, bool)


def _of_revision(model: str, template: Template) -> RevisionIndex:
    """The branches and tags that a template fits, or the one revision that it names."""
    if template.is_fixed:
        place = {template.text: read_place(template.text)}
        return RevisionIndex(model, lambda: place, template.text)
    places = _fitting(template, hub.revisions(model), f"branch or tag of {model}")
    return RevisionIndex(model, lambda: places, "all")


def _subfolders(model: str, revision: str, template: Template) -> Series:
    """The folders of one revision that a template fits, each a checkpoint."""
    fitting = _fitting(template, hub.folders(model, revision), f"folder of checkpoints in {model} revision {revision}")
    names = {template.short(name): name for name in fitting}
    places = {label: fitting[name] for label, name in names.items()}
    return Series(RevisionIndex(model, lambda: places, "all"), lambda label: Whereabouts(model, revision, names[label]))


def _repositories(template: Template, revision: str, subfolder: str) -> Series:
    """The repositories that a template fits, each a checkpoint."""
    owner, _, start = template.fixed_start.rpartition("/")
    if not owner:
        raise UserError(f"--model {template.text}: their owner cannot vary; write owner/name-{{step}}")
    fitting = _fitting(template, hub.repositories(owner, start), f"repository of {owner}")
    places = {name.removeprefix(f"{owner}/"): place for name, place in fitting.items()}
    return Series(
        RevisionIndex(template.text, lambda: places, "all"),
        lambda label: Whereabouts(f"{owner}/{label}", revision, subfolder),
    )


def _fitting(template: Template, names: Collection[str], what: str) -> dict[str, Place]:
    """Name -> place in training of those that a template fits.  Raises `UserError` where it fits none."""
    places = {name: place for name in names if (place := template.read(name)) is not None}
    if not places:
        there = format_names(sorted(names)) if names else "none"
        raise NothingThereError(f"{template.option} {template.text}: no {what} fits it; found there: {there}")
    return places


def _of_pythia(step: int) -> Place:
    return Place(step=step, tokens=step * PYTHIA_TOKENS_PER_STEP)


def _read_places(labels: Iterable[str]) -> dict[str, Place]:
    return {label: read_place(label) for label in labels}


def _local_index(model: str, directory: Path, subfolder: str) -> tuple[RevisionIndex, Path]:
    """The series in a directory, or else its single checkpoint, and the directory that holds either.

    The series goes first: a trainer leaves its last weights above the folders of its checkpoints.
    """
    own = directory / subfolder
    is_one = (own / files.CONFIG).is_file() and any((own / form).is_file() for form in files.WEIGHTS)
    folders = sorted(path.name for path in directory.iterdir() if _is_of_series(path, is_one))
    if folders:
        places = _read_places(folders)
        return RevisionIndex(model, lambda: places, "all"), directory
    if is_one:
        return RevisionIndex(model, lambda: _read_places([directory.name]), "all"), directory.parent
    raise NothingThereError(
        f"--model {model} is no checkpoint ({files.CONFIG} and weights: {files.WEIGHT_FORMS}) and has no folders of "
        f"checkpoints in it ({FOLDERS}); {files.contents(directory)}"
    )


def _is_of_series(path: Path, beside_weights: bool) -> bool:
    """Whether a path is a checkpoint's folder, by its name; beside weights also by its content, for trainers keep
    states of their own there, such as DeepSpeed's `global_step500`."""
    if _UNFINISHED.match(path.name):
        return False
    if _CHECKPOINT_FOLDER.match(path.name):
        return path.is_dir()
    if read_place(path.name).step < 0 or not path.is_dir():
        return False
    return not beside_weights or (path / files.CONFIG).is_file()


def _demo_places() -> Mapping[str, Place]:
    from .demo import STEPS

    return _read_places(f"step{step}" for step in STEPS)
