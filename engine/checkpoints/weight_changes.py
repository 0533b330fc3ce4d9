"""How weights change from one checkpoint to the next, tensor by tensor; two checkpoints are open at a time.

Tells checkpoints that hold another's tensors under another name or in other files, and weights that hardly move where
those around them do.  Findings are numbers; `report.findings.doctor` has the sentences.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .files import Files
from .same_weights import last_labels
from .training_place import MAIN, Place, place_at, rank_of, training_order
from .weight_findings import (
    HardlyMoves,
    Interval,
    MainDiffers,
    NamedWeights,
    NotFinite,
    SameTensors,
    WeightFinding,
)
from .weights import tensors_of

STILL = 30.0
"""Weights hardly move where they change so many times less than intervals before and after let expect.

A schedule of learning rates changes them by factors of up to ten between neighbours, and in one direction; a checkpoint
that was saved again, in another precision or after a resume that failed, moves thousands of times less.
"""

_AROUND = 2
"""Intervals on either side of one that it is compared with."""

_BLOCK = 1 << 24
"""Numbers of a tensor that are compared at a time."""


@dataclass(frozen=True)
class OnDisk:
    """A checkpoint whose files are at hand."""

    label: str

    step: int
    """-1 where it is not known."""

    files: Files

    @property
    def place(self) -> Place:
        return place_at(self.label, self.step)


@dataclass
class _Series:
    """What is kept of the checkpoints that were read."""

    digests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Label -> tensor -> hash of its bytes; matrices only, since gains and biases may well stay as they began."""

    intervals: list[Interval] = field(default_factory=list)
    not_finite: list[NotFinite] = field(default_factory=list)


def compare_tensors(checkpoints: Sequence[OnDisk], advance: Callable[[int], object]) -> list[WeightFinding]:
    """What cannot be true of a series, as its tensors tell; `advance` is called with 1 after each checkpoint.

    Raises `UserError` for a file that is no weight file.
    """
    with_step = {each.label: each for each in checkpoints if each.step >= 0 and each.label != MAIN}
    order = training_order({label: each.place for label, each in with_step.items()})
    stepped = [with_step[label] for label in order]
    others = sorted((each for each in checkpoints if each not in stepped), key=lambda each: each.label != MAIN)
    series = _Series()
    for before, after in zip([None, *stepped], [*stepped, *others], strict=False):
        _read(series, before, after)
        advance(1)
    for each in others[1:]:
        _read(series, None, each)
        advance(1)
    final = last_labels(NamedWeights(each.label, each.step, {}) for each in checkpoints)
    to_main = [interval for interval in series.intervals if interval.after == MAIN]
    moving = [interval for interval in series.intervals if interval.n_steps > 0 and interval not in to_main]
    places = {each.label: each.place for each in checkpoints}
    return [
        *series.not_finite,
        *_same_tensors(series.digests, places, final),
        *_hardly_moving(moving),
        *(MainDiffers(each.before, each.change, each.n_steps == 0) for each in to_main if each.change > 0),
    ]


def _read(series: _Series, before: OnDisk | None, after: OnDisk) -> None:
    """Add one checkpoint to the series, and how it differs from the one before."""
    tensors = dict(tensors_of(after.files))
    previous = dict(tensors_of(before.files)) if before is not None else {}
    moved = total = 0.0
    digests: dict[str, bytes] = {}
    not_finite = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            digests[name] = _digest(tensor)
        if not _is_finite(tensor):
            not_finite.append(name)
        if name in previous and previous[name].shape == tensor.shape:
            moved, total = moved + _squares(tensor, previous[name]), total + _squares(previous[name])
    series.digests[after.label] = digests
    if not_finite:
        series.not_finite.append(NotFinite(after.label, tuple(not_finite)))
    if before is not None:
        change = math.sqrt(moved / total) if total > 0 else math.nan
        series.intervals.append(Interval(before.label, after.label, _steps_between(before, after), change))


def _steps_between(before: OnDisk, after: OnDisk) -> int:
    """Steps from one checkpoint to the next, of another stage those since its start; -1 where they do not follow one
    another."""
    stages = before.place.stage, after.place.stage
    if stages[0] == stages[1]:
        return after.step - before.step
    earlier, later = map(rank_of, stages)
    return after.step if earlier is not None and later is not None and earlier < later else -1


def _squares(tensor: Tensor, other: Tensor | None = None) -> float:
    """The sum of squares of a tensor, or of its difference from another, a block at a time."""
    total = 0.0
    flat, flat_other = tensor.reshape(-1), None if other is None else other.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK].float()
        if flat_other is not None:
            block = block - flat_other[start : start + _BLOCK].float()
        total += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    return total


def _is_finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return all(bool(torch.isfinite(flat[at : at + _BLOCK]).all()) for at in range(0, len(flat), _BLOCK))


def _digest(tensor: Tensor) -> bytes:
    hashed = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    hashed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.digest()


def _same_tensors(
    digests: dict[str, dict[str, bytes]], places: dict[str, Place], final: set[str]
) -> Iterator[SameTensors]:
    """Groups of checkpoints that share all their matrices, or some that are not the same everywhere."""
    whole: dict[frozenset[tuple[str, bytes]], list[str]] = {}
    by_tensor: dict[tuple[str, bytes], list[str]] = {}
    varying = _varying(digests.values())
    for label, tensors in digests.items():
        whole.setdefault(frozenset(tensors.items()), []).append(label)
        for name in varying & tensors.keys():
            by_tensor.setdefault((name, tensors[name]), []).append(label)
    groups = {tuple(labels): sorted(name for name, _ in tensors) for tensors, labels in whole.items()}
    for (name, _), labels in sorted(by_tensor.items()):
        if not any(set(labels) <= set(group) for group in groups if len(groups[group]) == len(digests[labels[0]])):
            groups.setdefault(tuple(labels), []).append(name)
    for group, names in groups.items():
        stepped = {
            (places[label].stage, places[label].step) for label in group if places[label].step >= 0 and label != MAIN
        }
        is_main_elsewhere = MAIN in group and bool(stepped) and not final & set(group)
        if len(stepped) > 1 or is_main_elsewhere:
            is_final = bool(final & set(group)) or MAIN in group
            yield SameTensors(group, tuple(names), len(digests[group[0]]), is_final)


def _varying(digests: Iterable[dict[str, bytes]]) -> set[str]:
    """Tensors that are not the same in every checkpoint: those that are were not trained."""
    values: dict[str, set[bytes]] = {}
    for tensors in digests:
        for name, digest in tensors.items():
            values.setdefault(name, set()).add(digest)
    return {name for name, distinct in values.items() if len(distinct) > 1}


def _hardly_moving(intervals: Sequence[Interval]) -> Iterator[HardlyMoves]:
    """Intervals with far less change than those before and those after let expect.

    Both, since change grows in a warm-up and shrinks as the learning rate does; so nothing is said of the first and the
    last interval.  None counts that is zero: those are equal weights.
    """
    moving = [interval for interval in intervals if interval.change > 0]
    for place in range(1, len(moving) - 1):
        interval = moving[place]
        sides = moving[max(0, place - _AROUND) : place], moving[place + 1 : place + 1 + _AROUND]
        expected = min(statistics.median(_expected(other, interval) for other in side) for side in sides)
        if expected / interval.change > STILL:
            yield HardlyMoves(interval, expected / interval.change)


def _expected(other: Interval, interval: Interval) -> float:
    """The least that an interval should change, by another one: as much, or less in proportion where it is shorter."""
    return other.change * min(1.0, interval.n_steps / other.n_steps)
