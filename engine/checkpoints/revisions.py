"""The language of `--checkpoints`: labels, globs, steps, ranges and sets, selected from what a model has."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..runtime.errors import NothingThereError, UserError
from ..runtime.format import format_names, shorten
from .training_place import MAIN, UNKNOWN, Place, rank_of, read_amount, read_place, training_order

STUDY = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 80000, 100000, 120000, 143000)
"""Steps of the published study's checkpoints; it took the last one from `main`."""

PYTHIA = (0, *(2**k for k in range(10)), *range(1000, 143001, 1000))
"""Steps of every Pythia model's revisions `step{N}`; `main` is meant to equal the last."""

LONGEST_LABEL = 200
"""Characters of a checkpoint's label; longer words are refused."""

_LONGEST_LIST = 12


@dataclass(frozen=True)
class RevisionIndex:
    """The checkpoints that one model name stands for."""

    model: str

    listing: Callable[[], Mapping[str, Place]]
    """Label -> place in training of every checkpoint; may use the network."""

    default: str
    """The word that stands for no word at all."""

    trusts: Callable[[str], bool] = lambda _label: False
    """Whether a label is accepted without being listed, to be looked up when it is fetched."""


def select(index: RevisionIndex, word: str) -> Mapping[str, Place]:
    """Label -> place of what one word of `--checkpoints` names.  Raises `UserError` for what the index lacks."""
    if len(word) > LONGEST_LABEL:
        raise UserError(f"--checkpoints {shorten(word, 40)}: {len(word):,} characters are no label, step or range")
    if word in _SETS:
        return _SETS[word](index)
    if ".." in word:
        return _range(index, word)
    if any(character in word for character in "*?["):
        return _glob(index, word)
    if (amount := read_amount(word)) is not None and word not in (places := index.listing()):
        return _amount(index, word, amount, places)
    if index.trusts(word):
        return {word: read_place(word)}
    places = index.listing()
    if word not in places:
        raise unknown(word, index.model, places)
    return {word: places[word]}


def unknown(word: str, model: str, places: Mapping[str, Place]) -> NothingThereError:
    """The error for a checkpoint that is not among those of `places`; it names the nearest steps or spellings."""
    wanted = read_amount(word) or read_place(word)
    steps = {label: place.step for label, place in places.items() if wanted.stage in ("", place.stage)}
    known = set(steps.values()) - {UNKNOWN}
    if wanted.step >= 0 and known:
        below = max((step for step in known if step <= wanted.step), default=None)
        above = min((step for step in known if step >= wanted.step), default=None)
        near = [label for label, step in steps.items() if step in (below, above)]
    else:
        near = difflib.get_close_matches(word, places, n=3, cutoff=0.5) or training_order(places)[:3]
    in_order = training_order({label: places[label] for label in near})
    return NothingThereError(
        f"--checkpoints {word}: not among the {len(places)} checkpoints of {model}; "
        f"near it are {', '.join(in_order) or 'none'}; write labels, a range A..B, study, log or all"
    )


def has_come_to(word: str, label: str, place: Place) -> bool:
    """Whether a checkpoint is the one that a word names (a label, a step, tokens), or comes after it in the training.

    A word without a stage speaks of every stage.
    """
    end = read_amount(word) or read_place(word)
    end = end if end.stage else replace(end, stage=place.stage)
    return word == label or (end.is_known and (_is_at(end, place) or _is_before(end, place)))


def _all(index: RevisionIndex) -> Mapping[str, Place]:
    """Everything, without `main` where it is one of the others."""
    places = dict(index.listing())
    main = places.pop(MAIN, None)
    if main is None or (main.is_known and any(place.step == main.step for place in places.values())):
        return places
    return {**places, MAIN: main}


def _placed(index: RevisionIndex) -> dict[str, Place]:
    return {label: place for label, place in _all(index).items() if place.is_known}


def _log(index: RevisionIndex) -> Mapping[str, Place]:
    """Steps 0, 1, 2, 4 ... 512, 1000, 2000, 4000 ... of every stage as far as they exist, its first and its last."""
    places = {label: place for label, place in _placed(index).items() if place.step >= 0}
    if not places:
        raise UserError(f"--checkpoints log: no checkpoint of {index.model} has a step number; {_contents(index)}")
    steps: dict[str, list[int]] = {}
    for place in places.values():
        steps.setdefault(place.stage, []).append(place.step)
    return {
        label: place
        for label, place in places.items()
        if place.step in (min(steps[place.stage]), max(steps[place.stage])) or _is_log(place.step)
    }


def _is_log(step: int) -> bool:
    thousands, rest = divmod(step, 1000)
    power = step if step <= 512 else thousands
    return (step <= 512 or rest == 0) and power & (power - 1) == 0


def _study(index: RevisionIndex) -> Mapping[str, Place]:
    """The published steps, of the first stage where there are several."""
    places = _placed(index)
    first = min((rank for place in places.values() if (rank := rank_of(place.stage))), default=None)
    of_stage = {label: place for label, place in places.items() if rank_of(place.stage) == first}
    by_step = {place.step: label for label, place in sorted(of_stage.items(), reverse=True)}
    listing = index.listing()
    if MAIN in listing and listing[MAIN].step == STUDY[-1]:
        by_step[STUDY[-1]] = MAIN
    if absent := [step for step in STUDY if step not in by_step]:
        raise UserError(
            f"--checkpoints study: {index.model} lacks {len(absent)} of the {len(STUDY)} published steps, "
            f"the first is {absent[0]}; {_contents(index)}; write labels, a range A..B, log or all"
        )
    return {by_step[step]: listing[by_step[step]] for step in STUDY}


_SETS: dict[str, Callable[[RevisionIndex], Mapping[str, Place]]] = {"study": _study, "log": _log, "all": _all}


def _range(index: RevisionIndex, word: str) -> Mapping[str, Place]:
    """What lies between two places of one training, both included; no checkpoint need be at either."""
    ends = [_end(index, end) for end in word.split("..")]
    if len(ends) != 2 or not all(end.is_known for end in ends):
        raise UserError(f"--checkpoints {word}: a range has a known step at both ends, e.g. step1000..step8000")
    places = _placed(index)
    first, last = _in_stages(ends[0], ends[1], word, index.model, places)
    if _is_before(last, first):
        raise UserError(f"--checkpoints {word} ends before it begins; write the smaller step first")
    selected = {
        label: place
        for label, place in places.items()
        if (_is_before(first, place) or _is_at(first, place)) and (_is_before(place, last) or _is_at(last, place))
    }
    if not selected:
        raise unknown(word, index.model, places)
    return selected


def _end(index: RevisionIndex, end: str) -> Place:
    """The place of one end of a range."""
    if (amount := read_amount(end)) is not None:
        return amount
    # No label begins with a dot: a third dot is a slip.
    if not end or end.startswith("."):
        return Place()
    place = read_place(end)
    return place if place.is_known else index.listing().get(end, place)


def _in_stages(first: Place, last: Place, word: str, model: str, places: Mapping[str, Place]) -> tuple[Place, Place]:
    """Both ends of a range with their stage: where one names none that of the other, or the only one there is.

    Raises `UserError` where that leaves a choice.
    """
    stages = list(dict.fromkeys(places[label].stage for label in training_order(places)))
    if not first.stage and not last.stage and len(stages) > 1:
        raise UserError(
            f"--checkpoints {word}: {model} has the stages {format_names([stage or 'none' for stage in stages])}; name "
            f"one at an end, e.g. {stages[-1]}-step1000..8000"
        )
    stage = first.stage or last.stage or (stages[0] if stages else "")
    return replace(first, stage=first.stage or stage), replace(last, stage=last.stage or stage)


def _is_before(one: Place, other: Place) -> bool:
    """Whether one place comes before another of the same training, whichever of steps and tokens both have."""
    if one.stage != other.stage:
        ranks = rank_of(one.stage), rank_of(other.stage)
        return ranks[0] is not None and ranks[1] is not None and ranks[0] < ranks[1]
    if one.step >= 0 and other.step >= 0:
        return one.step < other.step
    return 0 <= one.tokens < other.tokens


def _is_at(end: Place, place: Place) -> bool:
    if end.stage != place.stage:
        return False
    if end.step >= 0 and place.step >= 0:
        return end.step == place.step
    return end.tokens == place.tokens >= 0


def _glob(index: RevisionIndex, word: str) -> Mapping[str, Place]:
    """Labels that a pattern with `*`, `?` or `[...]` fits."""
    places = index.listing()
    selected = {label: place for label, place in places.items() if fnmatchcase(label, word)}
    if not selected:
        raise unknown(word, index.model, places)
    return selected


def _amount(index: RevisionIndex, word: str, amount: Place, places: Mapping[str, Place]) -> Mapping[str, Place]:
    """The checkpoint at a step, or after so many tokens."""
    placed = _placed(index)
    selected = {label: place for label, place in placed.items() if _is_at(replace(amount, stage=place.stage), place)}
    if not selected:
        raise unknown(word, index.model, placed)
    if len(selected) > 1:
        labels = ", ".join(selected)
        raise UserError(f"--checkpoints {word}: {index.model} has {labels} at that step; write one of them")
    return selected


def _contents(index: RevisionIndex) -> str:
    labels = training_order(index.listing())
    if len(labels) <= _LONGEST_LIST:
        return f"it has {', '.join(labels)}"
    return f"it has {len(labels)}, {labels[0]} to {labels[-1]}"
