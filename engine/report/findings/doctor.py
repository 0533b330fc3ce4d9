"""What `headlapse doctor` found, a line each: what was seen, in what, and what to do.  Pure."""

from collections.abc import Collection, Sequence
from pathlib import Path

from ...checkpoints.weight_findings import (
    HardlyMoves,
    MainDiffers,
    NotFinite,
    NotTheLast,
    SameTensors,
    SameWeights,
    WeightFinding,
)
from ...runtime.format import ABSENT, format_bytes, format_count, format_names, format_ranges
from ...store import health
from ...store.health import Amount, Damage, Unequal, Unmarked, Unread

MOST_LABELS = 12
"""So many labels are named; of more, the first ones and how many are left out."""

_ONE_OF_THEM = "at most one of them is what its name says"


def store_line(finding: health.Finding) -> str:
    """What is wrong with the chunks of a store."""
    match finding:
        case Damage(place, reason, label, dim, rows):
            where = ", ".join(part for part in (label, _rows(dim, rows)) if part)
            return f"{place}{f' ({where})' if where else ''} is damaged: {reason}"
        case Unread(group):
            return f"{group}: nothing else of it could be checked; restore it from a copy, or make it anew"
        case Unmarked(group, label):
            return f"{group}: {label} has a record and no completion mark; the command that writes it does so again"
        case Unequal(group, label, target, dim, rows, difference, bound):
            where = ", ".join(part for part in (label, _rows(dim, rows)) if part)
            size = ABSENT if difference != difference else f"{difference:.2g}"
            return (
                f"{group} ({where}): patching nothing is not the {target} run: {size} nats apart, where rounding "
                f"explains {bound:.2g}; replace the run with --overwrite"
            )


def repair_line(damaged: Collection[Path], store: Path) -> str:
    """What to do about damaged chunks."""
    names = format_names(sorted(str(path.relative_to(store.parent)) for path in damaged), MOST_LABELS)
    return f"restore what is damaged in {names} from a copy, or make it again with --overwrite"


def format_note(group: Path) -> str:
    return f"{group} has format 1, which has no checksums: a changed bit cannot be told there, only what is unreadable"


def leftover_line(path: Path, is_removed: bool) -> str:
    return f"{path} was left by a killed process; {'removed' if is_removed else '--fix removes it'}"


def leftovers_unknown_line(store: Path, reason: str) -> str:
    return f"what killed processes left beside {store} was not looked for: {reason}"


def known_line(concern: str) -> str:
    return f"known: {concern}"


def weights_line(finding: WeightFinding) -> str:
    """What cannot be true of checkpoints, or should be known of them."""
    match finding:
        case SameWeights(labels, sha256, shards, is_final):
            what = f"the same {format_names(shards, 3)}" if shards else "the same weights"
            whose = ", the final checkpoint's" if is_final else ""
            return f"{_labels(labels)} serve {what} (sha256 {sha256[:12]}{whose}): {_ONE_OF_THEM}"
        case NotTheLast(label):
            return f"main serves other files than {label}, the step it is meant to be"
        case SameTensors(labels, names, n_tensors, is_final):
            what = "all matrices" if len(names) == n_tensors else f"{len(names)} of {n_tensors} matrices"
            whose = ", the final checkpoint's" if is_final else ""
            return f"{_labels(labels)} hold the same {what} ({format_names(names, 2)}{whose}): {_ONE_OF_THEM}"
        case HardlyMoves(interval, times_less):
            return (
                f"weights hardly move from {interval.before} to {interval.after}: by {interval.change:.2g} of their "
                f"norm, {times_less:,.0f} times less than before and after"
            )
        case NotFinite(label, names):
            return f"{label} has weights that are infinite or no numbers, in {format_names(names, 3)}"
        case MainDiffers(label, change, _):
            return f"main differs from {label}, the last step, by {change:.2g} of its norm"


def missing_weights_line(label: str) -> str:
    return f"{label} holds no weights; leave it out"


def changed_files_line(label: str, place: Path, names: Sequence[str]) -> str:
    return (
        f"{label}: {format_names(names, 3)} in {place} is not what was cached (another sha256); put back what was, or "
        "cache it again with --overwrite"
    )


def absent_files_line(label: str, location: str) -> str:
    return f"{label}: its weights are no longer at {location}; put them back, or the store cannot be patched again"


def absent_files_note(labels: Sequence[str]) -> str:
    return f"the weights of {_labels(labels)} are not on disk and were not compared; patching fetches them again"


def unanswered_line(label: str, reason: str) -> str:
    return f"{label} could not be asked for: {reason}"


def healthy_line(store: Path, amount: Amount, n_runs: int, n_compared: int) -> str:
    """What was checked, where nothing is wrong."""
    runs = f"{format_count(n_runs, 'patched run')}, {format_bytes(amount.n_bytes)} compared with their checksums"
    return f"{store} is healthy: {runs}; weights of {format_count(n_compared, 'checkpoint')} compared"


def unhealthy_line(subject: str, n_problems: int) -> str:
    return f"{subject}: {format_count(n_problems, 'problem')}"


def served_line(repo: str, n_revisions: int) -> str:
    return f"{repo}: nothing that cannot be true in {format_count(n_revisions, 'revision')}"


def _rows(dim: str, rows: tuple[int, ...]) -> str:
    return f"{dim}{'s' if len(rows) > 1 else ''} {format_ranges(rows)}" if rows else ""


def _labels(labels: Sequence[str]) -> str:
    return format_names(labels, MOST_LABELS)
