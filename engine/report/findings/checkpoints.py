"""Which checkpoints a model has, as people read it: `headlapse cache --checkpoints list`.  Pure."""

from collections.abc import Sequence

from ...checkpoints.availability import Availability
from ...checkpoints.training_place import UNKNOWN, disorder
from ...runtime.format import format_bytes, format_count


def checkpoint_list(model: str, found: Sequence[Availability]) -> list[str]:
    """What there is in one line, why it is not one training where it is not, then a line a checkpoint."""
    checkpoints = [each.checkpoint for each in found]
    lines = [f"{model}: {_extent([each.label for each in checkpoints])}{_sizes(found)}"]
    if problem := disorder({each.label: each.place for each in checkpoints}):
        lines.append(f"not one training: {problem}")
    rows = [("checkpoint", "stage", "step", "tokens", "weights", ""), *map(_row, found)]
    shown = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    lines += [
        "  ".join(
            cell.rjust(width) if column[0] in ("step", "tokens", "weights") else cell.ljust(width)
            for column, cell, width in zip(shown, row, widths, strict=True)
        ).rstrip()
        for row in zip(*shown, strict=True)
    ]
    return lines


def _extent(labels: Sequence[str]) -> str:
    ends = f", {labels[0]} to {labels[-1]}" if len(labels) > 1 else f", {labels[0]}" if labels else ""
    return f"{format_count(len(labels), 'checkpoint')}{ends}"


def _sizes(found: Sequence[Availability]) -> str:
    known = [each.n_bytes for each in found if each.n_bytes is not None]
    if not known:
        return ""
    to_fetch = sum(each.to_fetch or 0 for each in found)
    unknown = len(found) - len(known)
    return (
        f"; weights {format_bytes(sum(known))}, {format_bytes(to_fetch)} to fetch"
        + f", {format_count(unknown, 'checkpoint')} of unknown size" * (unknown > 0)
    )


def _row(each: Availability) -> tuple[str, ...]:
    checkpoint = each.checkpoint
    size = format_bytes(each.n_bytes) if each.n_bytes is not None else "?"
    state = f"error: {each.problem}" if each.problem else "here" if each.on_disk else ""
    return checkpoint.label, checkpoint.stage, _number(checkpoint.step), _tokens(checkpoint.tokens_seen), size, state


def _number(value: int) -> str:
    return f"{value:,}" if value != UNKNOWN else ""


def _tokens(value: int) -> str:
    """`2.1B` of 2,097,152,000."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return _number(value)
