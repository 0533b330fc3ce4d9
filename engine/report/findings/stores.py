"""What stores hold, as people read it: the list of `headlapse ls` and the page of `headlapse info`.  Pure."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ...runtime.format import format_bytes, format_count
from ...store.inventory import ArraySummary, RunSummary, StoreSummary

MOST_LABELS = 6
"""So many labels are written out; of more, the first and the last."""


def store_list(stores: Sequence[StoreSummary], now: datetime) -> list[str]:
    """A line a store: where, model, task, checkpoints, patched runs, size, when it was written to last."""
    cells = [_cells(store, now) for store in stores]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def store_page(store: StoreSummary, arrays: Sequence[ArraySummary]) -> list[str]:
    """What one store holds, a subject a line or more."""
    study = store.study
    subjects: list[tuple[str, list[str]]] = [
        ("model", [str(study["model"])]),
        ("task", [f"{study['task']}, {format_count(store.n_trials, 'prompt pair')}"]),
        ("kept", [f"sites {' '.join(study['sites'])} in {study['dtype']}, {format_bytes(store.n_bytes)} on disk"]),
        ("complete", [f"{_of(store)} checkpoints: {_labels(store.complete)}"]),
        ("missing", list(_missing(store))),
        ("runs", _aligned([_run(run) for run in store.runs])),
        ("mechanism", [" ".join(_run(store.mechanism)[1:])] if store.mechanism else []),
        ("arrays", _aligned([_array(array) for array in arrays if len(array.dims) > 1])),
        ("versions", [", ".join(f"{name} {version}" for name, version in store.versions.items())]),
        ("format", [str(store.format)]),
    ]
    lines = [str(store.path)]
    for subject, texts in subjects:
        lines += [f"  {subject if first else '':<11}{text}" for first, text in _with_first(texts)]
    return lines


def _cells(store: StoreSummary, now: datetime) -> tuple[str, ...]:
    written = datetime.fromtimestamp(store.last_write_ns / 1e9)
    problems = f"{format_count(len(store.missing), 'checkpoint')} missing: headlapse info {store.path}" * bool(
        store.missing
    )
    return (
        str(store.path),
        Path(store.study["model"]).name,
        str(store.study["task"]),
        f"{_of(store)} checkpoints",
        format_count(len(store.runs), "run"),
        format_bytes(store.n_bytes),
        _when(written, now),
        problems,
    )


def _when(written: datetime, now: datetime) -> str:
    if written.date() == now.date():
        return f"today {written:%H:%M}"
    return f"{written:%Y-%m-%d}"


def _of(store: StoreSummary) -> str:
    n = len(store.complete)
    return f"{n} of {n + len(store.missing)}"


def _labels(labels: Sequence[str]) -> str:
    if len(labels) <= MOST_LABELS:
        return ", ".join(labels) or "none"
    return f"{labels[0]}, {labels[1]}, ... {labels[-1]}"


def _missing(store: StoreSummary) -> Iterator[str]:
    """The labels of every problem that was recorded, then the rest."""
    for problem in dict.fromkeys(store.problems.values()):
        yield f"{', '.join(label for label in store.missing if store.problems.get(label) == problem)}: {problem}"
    rest = [label for label in store.missing if label not in store.problems]
    if rest:
        yield f"{_labels(rest)}: not captured yet; the same headlapse cache command goes on"


def _run(run: RunSummary) -> tuple[str, ...]:
    return run.name, f"{run.n_complete} of {run.n_checkpoints}", _settings(run.settings)


def _settings(settings: Mapping[str, Any]) -> str:
    """`subsets even odd, layers 0 1`: what differs from nothing, in the words of the options."""

    def word(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    shown = {name: value for name, value in settings.items() if value not in (False, [], "", 0, None)}
    return ", ".join(name if value is True else f"{name} {word(value)}" for name, value in shown.items())


def _array(array: ArraySummary) -> tuple[str, ...]:
    dims = ", ".join(f"{dim} {size}" for dim, size in zip(array.dims, array.shape, strict=True))
    return array.name, "string" if "String" in array.dtype else array.dtype, format_bytes(array.n_bytes), f"({dims})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _with_first(texts: Sequence[str]) -> Iterator[tuple[bool, str]]:
    for index, text in enumerate(texts):
        yield index == 0, text
