"""`headlapse doctor`: whether a store is what was written, and whether checkpoints can be what their names say."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine.checkpoints import known_problems, same_weights
from .engine.checkpoints.resolve import Checkpoint, named
from .engine.checkpoints.series import demo_seed
from .engine.checkpoints.weight_findings import (
    MainDiffers,
    NamedWeights,
    NotTheLast,
    SameTensors,
    SameWeights,
    WeightFinding,
)
from .engine.report.findings import doctor as say
from .engine.runtime.errors import UserError
from .engine.runtime.progress import progress
from .engine.runtime.quiet import quiet_libraries
from .engine.store import health
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.store.disk import leftovers, remove_leftovers
from .engine.store.inventory import patch_paths
from .engine.study.study import Arithmetic
from .options import DoctorOptions
from .pipeline import store_path

if TYPE_CHECKING:
    from .engine.checkpoints.weight_changes import OnDisk


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found."""

    subject: str
    """The store, or the model."""

    problems: tuple[str, ...] = ()
    """What is wrong, a line each; empty where nothing is."""

    notes: tuple[str, ...] = ()
    """What could not be checked, and what is no mistake but should be known."""

    removed: tuple[str, ...] = ()
    """What killed processes had left and was removed."""

    summary: str = ""
    """What was checked, in a line."""


@dataclass
class _Lines:
    """A diagnosis while it is made."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_weights(self, findings: Sequence[WeightFinding]) -> None:
        for finding in findings:
            is_note = isinstance(finding, NotTheLast) or (isinstance(finding, MainDiffers) and not finding.is_same_step)
            (self.notes if is_note else self.problems).append(say.weights_line(finding))


def diagnose(options: DoctorOptions, folder: Path) -> Diagnosis:
    """Look at a store, or at what is served of a model.  Raises `UserError` where there is neither."""
    options.refuse_impossible()
    with quiet_libraries():
        if options.model is not None:
            return _diagnose_model(options.model, folder)
        return _diagnose_store(store_path(options.store, folder), options, folder)


def _diagnose_store(path: Path, options: DoctorOptions, folder: Path) -> Diagnosis:
    lines, amount = _Lines(), health.Amount()
    removed = _look_for_leftovers(path, options.fix, lines)
    _check_groups(path, lines, amount)
    n_compared, store = 0, health.readable(path, path)
    if store is not None:
        _check_identities(path, store.attrs["study"]["dtype"], lines)
        n_compared = _check_weights(store, options.weights, folder, lines)
    summary = (
        say.unhealthy_line(str(path), len(lines.problems))
        if lines.problems
        else say.healthy_line(path, amount, len(patch_paths(path)), n_compared)
    )
    return Diagnosis(str(path), tuple(lines.problems), tuple(lines.notes), tuple(removed), summary)


def _look_for_leftovers(path: Path, fix: bool, lines: _Lines) -> list[str]:
    """List or remove what killed processes left; the lines of what was removed."""
    try:
        found = remove_leftovers(path) if fix else leftovers(path)
    except (UserError, OSError) as error:  # another process is writing, or nothing may be written here
        if fix:
            raise
        lines.notes.append(say.leftovers_unknown_line(path, str(error)))
        return []
    texts = [say.leftover_line(left, fix) for left in found]
    if fix:
        return texts
    lines.problems += texts
    return []


def _check_groups(path: Path, lines: _Lines, amount: health.Amount) -> None:
    """Every chunk of the store, its mechanism and its patched runs, against its checksums."""
    groups = health.groups_of(path)
    damaged: list[Path] = []
    with progress("doctor: chunks", "checkpoint", health.n_checkpoints(groups, path)) as bar:
        for group in groups:
            findings = list(health.check_group(group, path, amount, bar.update))
            damaged += [group] if any(isinstance(finding, health.Damage) for finding in findings) else []
            lines.problems += map(say.store_line, findings)
            arrays = health.readable(group, path)
            if arrays is not None and not arrays.is_sealed:
                lines.notes.append(say.format_note(group))
    if damaged:
        lines.notes.append(say.repair_line(damaged, path))


def _check_identities(path: Path, dtype: Arithmetic, lines: _Lines) -> None:
    """That patching nothing changes nothing, in every patched run that has it."""
    for run in patch_paths(path):
        lines.problems += map(say.store_line, health.check_identities(run, path, dtype))


def _check_weights(store: CheckpointArrays, weights: Path | None, folder: Path, lines: _Lines) -> int:
    """Provenance against files, and the weights of checkpoints against each other; how many were read."""
    from .engine.store.store import located

    recorded = {label: located(provenance, weights) for label, provenance in health.provenances(store).items()}
    steps = {row.label: row.step for row in store.rows()}
    by_file = same_weights.compare(
        NamedWeights(label, steps[label], provenance["sha256"]) for label, provenance in recorded.items()
    )
    lines.add_weights(by_file)
    at_hand: list[OnDisk] = []
    absent: list[str] = []
    with progress("doctor: files", "checkpoint", len(recorded)) as bar:
        for label, provenance in recorded.items():
            found = _files(label, steps[label], provenance, folder, lines)
            if found is not None:
                at_hand.append(found)
            elif _can_be_fetched(provenance):
                absent.append(label)
            bar.update(1)
    if absent:
        lines.notes.append(say.absent_files_note(absent))
    _compare_tensors(at_hand, by_file, lines)
    return len(at_hand)


def _can_be_fetched(provenance: Mapping[str, Any]) -> bool:
    return demo_seed(provenance["model"]) is not None or not Path(provenance["location"]).is_absolute()


def _files(label: str, step: int, provenance: Mapping[str, Any], folder: Path, lines: _Lines) -> "OnDisk | None":
    """A checkpoint's files, where they are on disk and what was cached; else why not is said."""
    from .engine.checkpoints.fetch import on_disk
    from .engine.checkpoints.weight_changes import OnDisk

    try:
        files = on_disk(Checkpoint.recorded(provenance), folder)
        sha256 = files.sha256 if files is not None else {}
    except UserError as error:
        lines.problems.append(f"{label}: {error}")
        return None
    if files is None:
        if not _can_be_fetched(provenance):
            lines.problems.append(say.absent_files_line(label, provenance["location"]))
        return None
    cached = provenance["sha256"]
    changed = sorted(name for name in {**cached, **sha256} if cached.get(name) != sha256.get(name))
    if changed:
        lines.problems.append(say.changed_files_line(label, files.directory, changed))
        return None
    return OnDisk(label, step, files)


def _compare_tensors(at_hand: "Sequence[OnDisk]", by_file: Sequence[WeightFinding], lines: _Lines) -> None:
    """Say what tensors tell, but for what the hashes of their files say already."""
    from .engine.checkpoints.weight_changes import compare_tensors

    said = [set(finding.labels) for finding in by_file if isinstance(finding, SameWeights)]
    with progress("doctor: weights", "checkpoint", len(at_hand)) as bar:
        try:
            findings = compare_tensors(at_hand, bar.update)
        except UserError as error:
            lines.problems.append(str(error))
            return
    lines.add_weights(
        [
            finding
            for finding in findings
            if not (isinstance(finding, SameTensors) and any(set(finding.labels) <= each for each in said))
        ]
    )


def _diagnose_model(model: str, folder: Path) -> Diagnosis:
    if demo_seed(model) is not None or Path(model).expanduser().is_dir():
        return _diagnose_folder(model, folder)
    return _diagnose_hub(model)


def _diagnose_hub(repo: str) -> Diagnosis:
    """What a repository on the hub serves, by the hashes that the hub knows; nothing is downloaded."""
    from .engine.checkpoints.hub_check import ask

    lines = _Lines()
    with ExitStack() as stack:

        def begin(n: int) -> Callable[[int], object]:
            return stack.enter_context(progress("doctor", "revision", n)).update

        served = ask(repo, begin)
    lines.add_weights(same_weights.compare(served.weights))
    lines.problems += map(say.missing_weights_line, served.without_weights)
    lines.notes += [say.unanswered_line(label, reason) for label, reason in served.unanswered.items()]
    labels = [*(each.label for each in served.weights), *served.without_weights]
    lines.notes += [say.known_line(str(concern)) for concern in known_problems.concerns(repo, labels)]
    return _of_model(repo, lines, len(labels))


def _diagnose_folder(model: str, folder: Path) -> Diagnosis:
    """The checkpoints of a directory: their files and their tensors."""
    from .engine.checkpoints.fetch import on_disk
    from .engine.checkpoints.weight_changes import OnDisk

    lines = _Lines()
    at_hand, weights = [], []
    for checkpoint in named(model, ("all",), folder):
        try:
            files = on_disk(checkpoint, folder)
            if files is not None:
                weights.append(NamedWeights(checkpoint.label, checkpoint.step, files.sha256))
                at_hand.append(OnDisk(checkpoint.label, checkpoint.step, files))
        except UserError as error:
            lines.problems.append(f"{checkpoint.label}: {error}")
    if not at_hand and not lines.problems:
        raise UserError(f"--model {model}: none of its checkpoints is on disk; headlapse cache makes them")
    by_file = same_weights.compare(weights)
    lines.add_weights(by_file)
    _compare_tensors(at_hand, by_file, lines)
    return _of_model(model, lines, len(at_hand))


def _of_model(model: str, lines: _Lines, n_revisions: int) -> Diagnosis:
    n_problems = len(lines.problems)
    summary = say.unhealthy_line(model, n_problems) if n_problems else say.served_line(model, n_revisions)
    return Diagnosis(model, tuple(lines.problems), tuple(lines.notes), summary=summary)
