"""What makes two studies the same, and what the store of one is called; no torch."""

import os
from pathlib import Path
from typing import Any

from ..checkpoints.series import demo_seed, is_path
from ..checkpoints.template import without_fields
from ..study.prompts import DEFAULT_TRIALS, task_digest
from ..study.study import Study
from ..study.tasks.registry import TASKS


def identity(study: Study) -> dict[str, Any]:
    """The fields that make two studies the same, as JSON: a store keeps them and compares them."""
    trials = study.trials or (DEFAULT_TRIALS if study.task in TASKS else None)
    task = study.task if study.task in TASKS else Path(study.task).name
    fields = {"model": _from_anywhere(study.model), "task": task, "task_digest": task_digest(study.task)}
    settings = {"trials": trials, "sites": list(study.sites), "dtype": study.dtype}
    tokenizer = study.tokenizer and _from_anywhere(study.tokenizer)
    given = {"revision": study.revision, "subfolder": study.subfolder, "tokenizer": tokenizer}
    return fields | settings | {name: value for name, value in given.items() if value}  # which older stores do not have


def store_name(study: Study) -> str:
    """The default name of a study's store: `pythia-160m-decimal.zarr`; templates without their fields."""
    model = _from_anywhere(study.model)
    folders = model.split("/")[-2 if "{" in model and os.path.isabs(model) else -1 :]
    name = "-".join(filter(None, map(without_fields, [*folders, study.revision or "", study.subfolder or ""])))
    task = study.task if study.task in TASKS else Path(study.task).stem
    return f"{name}-{task}.zarr"


def _from_anywhere(name: str) -> str:
    """A hub id as it is, a path from the root."""
    if demo_seed(name) is not None or not is_path(name):
        return name
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.isdir(path) else os.path.abspath(path)
