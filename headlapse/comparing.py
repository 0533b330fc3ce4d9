"""Several stores as training runs to compare: which belong together, and whether they were asked the same."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from .engine.checkpoints.resolve import tokens_per_step
from .engine.measures.logit_diff import finished
from .engine.measures.training import positions_of
from .engine.report.findings.comparison import comparison_lines, comparison_table
from .engine.runtime.errors import UserError
from .engine.statistics import comparison
from .engine.store import inventory
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.store.disk import is_group
from .engine.study.patch_settings import PatchSettings
from .engine.study.role_settings import ROLES
from .face import Lines
from .options import CompareOptions
from .pipeline import open_run
from .results import study_of

_SEED = re.compile(r"[-_]?seed[-_]?[0-9]+", re.IGNORECASE)

ALIKE = ("protocol", "direction", "positions", "joint")
"""Settings of a patched run that have to be the same for its numbers to be compared."""


@dataclass(frozen=True)
class Comparison:
    """Training runs side by side."""

    numbers: comparison.Comparison
    stores: tuple[Path, ...]
    runs: tuple[str, ...]
    """The patched run of each store."""

    roles: Mapping[str, Mapping[str, list[str]]]
    """Training run → role → the heads that have it where it is compared; only of runs whose mechanism was measured."""

    @property
    def table(self) -> pd.DataFrame:
        """A row a training run: effects, onsets, the heads with the largest effects, even against odd."""
        return self.numbers.table

    @property
    def summary(self) -> pd.DataFrame:
        """A row a group of seeds and quantity: mean with its 95 % interval over seeds."""
        return self.numbers.summary

    @property
    def timeline(self) -> pd.DataFrame:
        """A row a training run and checkpoint."""
        return self.numbers.timeline

    def verdict(self) -> Lines:
        """The lines that `headlapse compare` prints."""
        return Lines(comparison_lines(self.numbers, self.roles))

    @cached_property
    def tables(self) -> Lines:
        """What `headlapse compare --verbose` prints besides."""
        return Lines(comparison_table(self.numbers).to_string().splitlines())

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page and its numbers as CSV into the folder `out`; where the page is."""
        from .engine.report.comparison_page import write_comparison

        folder = self.stores[0].absolute().parent / "comparison-report" if out is None else Path(out)
        return write_comparison(
            self.numbers, self.roles, dict(zip(self.numbers.table.index, self.stores, strict=True)), folder
        )

    def _repr_html_(self) -> str:
        return self.verdict()._repr_html_()


def compare_stores(options: CompareOptions) -> Comparison:
    """Compare the training runs of several stores.

    Raises `UserError` for a store that is not patched, runs that were patched otherwise, and the same training run
    twice.
    """
    options.refuse_impossible()
    for store in options.stores:
        inventory.require_store(store)
    runs = [_run_of(store, options.name) for store in options.stores]
    names, studies = _names(options.stores), [study_of(store) for store in options.stores]
    opened = [_opened(*which) for which in zip(names, options.stores, runs, studies, strict=True)]
    _refuse_unlike(opened, options.stores, studies)
    numbers = comparison.compare(opened)
    by_name = {name: _roles(store, numbers.at[name]) for name, store in zip(names, options.stores, strict=True)}
    roles = {name: roles for name, roles in by_name.items() if roles is not None}
    return Comparison(numbers, tuple(options.stores), tuple(runs), roles)


def _roles(store: Path, checkpoint: str) -> dict[str, list[str]] | None:
    """The heads that have each role at a checkpoint; None where roles were not measured there."""
    if not is_group(store / "mechanism"):
        return None
    from .engine.mechanism.role_summary import heads_in_role

    measured = CheckpointArrays(store / "mechanism", store)
    if checkpoint not in measured.complete() or "role_score" not in (run := measured.load()):
        return None
    return {role: [f"L{layer}.H{head}" for layer, head in heads_in_role(run, role, checkpoint)] for role in ROLES}


def _run_of(store: Path, name: str | None) -> str:
    """The patched run of that name, or the newest by the corrected protocol that has a finished checkpoint."""
    paths = inventory.patch_paths(store)
    if name is not None:
        if name not in [path.name for path in paths]:
            there = ", ".join(path.name for path in paths) or "none"
            raise UserError(f"--name {name}: {store} has no such patched run; it has {there}")
        return name
    for path in reversed(paths):
        group = CheckpointArrays(path, store)
        if group.complete() and PatchSettings.from_attributes(group.attrs["patch"]).protocol == "corrected":
            return path.name
    raise UserError(f"{store} has no patched run with a finished checkpoint; make one with: headlapse patch {store}")


def _names(stores: Sequence[Path]) -> list[str]:
    """What to call the training runs: their stores' names, or paths where two have one name."""
    stems = [store.name.removesuffix(".zarr") for store in stores]
    return [stem if stems.count(stem) == 1 else str(store) for stem, store in zip(stems, stores, strict=True)]


def _opened(name: str, store: Path, run: str, study: Mapping[str, Any]) -> comparison.TrainingRun:
    dataset, settings = open_run(store, run)
    if settings.protocol == "published":
        raise UserError(f"{run} of {store} was made by the published protocol, which has no effects of heads")
    if not (positions_of(finished(dataset)) >= 0).any():
        raise UserError(f"{run} of {store} has no finished checkpoint with a known step; nothing places it in training")
    model, task = str(study["model"]), Path(study["task"]).name
    if "tokens_seen" not in dataset.coords and (per_step := tokens_per_step(model)):  # an older store
        dataset = dataset.assign_coords(tokens_seen=dataset.step * per_step)
    group = f"{_SEED.sub('', Path(model).name)} on {task}"
    return comparison.TrainingRun(name, group, dataset, settings)


def _refuse_unlike(
    runs: Sequence[comparison.TrainingRun], stores: Sequence[Path], studies: Sequence[Mapping[str, Any]]
) -> None:
    first = runs[0].settings
    for run, store in zip(runs[1:], stores[1:], strict=True):
        for name in ALIKE:
            if getattr(run.settings, name) != getattr(first, name):
                values = f"{getattr(first, name)} in {stores[0]}, {getattr(run.settings, name)} in {store}"
                raise UserError(f"{name} differs: {values}; patch them alike, and choose with --name")
    seen: dict[tuple[str, str], Path] = {}
    asked: dict[str, tuple[str, Path]] = {}
    for run, store, study in zip(runs, stores, studies, strict=True):
        key, prompts = (
            (str(study["model"]), run.group),
            f"{study['trials']} prompt pairs of {study['task_digest'][:12]}",
        )
        if key in seen:
            raise UserError(f"{store} and {seen[key]} are of one training run, {key[0]}; name each once")
        seen[key] = store
        if asked.setdefault(run.group, (prompts, store))[0] != prompts:
            were, other = asked[run.group]
            raise UserError(f"{store} has {prompts}, {other} {were}: seeds are compared on the same prompts")
