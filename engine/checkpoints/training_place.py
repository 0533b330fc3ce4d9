"""When in its training a checkpoint was saved, as far as its name says, and the one order of such places.

Names are those of published series (OLMo, SmolLM, Crystal, TinyLlama, MultiBERTs and others); a training has stages
one after another, each of which counts its steps and tokens from its own start.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..runtime.errors import UserError

Kind = TypeVar("Kind", int, str)

UNKNOWN = -1
"""The step, tokens or seed of a name that has none."""

MAIN = "main"
"""The revision that is meant to be the final checkpoint."""

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_DIGITS = r"[0-9]{1,18}"
_DECIMAL = rf"{_DIGITS}(?:\.[0-9]{{1,9}})?"

AMOUNT = rf"{_DECIMAL}[kmbt]?"
"""A number of steps or tokens as names have it: `1000`, `100k`, `16.78B`."""

_END = "(?![0-9A-Za-z])"

_STEP = re.compile(
    rf"(?:step|checkpoint|ckpt|iter(?:ation)?)[-_]?(?:({_DECIMAL})([km]){_END}|({_DIGITS})(?![0-9]))", re.IGNORECASE
)
_EPOCH = re.compile(rf"(?<![a-z])epoch[-_]?()()({_DIGITS})(?![0-9])", re.IGNORECASE)
_TOKENS = re.compile(rf"tokens?[-_]?({_DECIMAL})([kmbt]?){_END}", re.IGNORECASE)
_TOKENS_AFTER_STEP = re.compile(rf"[-_]({_DECIMAL})([mbt])$", re.IGNORECASE)
_TOKENS_ALONE = re.compile(rf"(?:.*/)?({_DECIMAL})([MBT])")
_STEPS_ALONE = re.compile(rf"({_DIGITS})(k?)", re.IGNORECASE)
_SEED = re.compile(r"seed[-_]?([0-9]{1,9})", re.IGNORECASE)

_NUMBERED = re.compile(r"(?<![a-z])(?:stage|phase)[-_]?([0-9]{1,4})(?![0-9])", re.IGNORECASE)
_LONGER_CONTEXT = re.compile(r"(?<![a-z])lc[-_]([0-9]{1,6})k", re.IGNORECASE)
_UNRANKED = re.compile(r"(?<![a-z])(?:extension|anneal(?:ing)?|cooldown|decay|mid[-_]?train(?:ing)?)", re.IGNORECASE)
"""Stages whose names do not say which comes first."""

_LARGEST = 2**63 - 1
"""Steps and tokens are stored as integers of 64 bits."""


@dataclass(frozen=True)
class Place:
    """When in its training a checkpoint was saved."""

    stage: str = ""
    """As the name has it, such as `stage1` or `stage2-ingredient1`; empty where it has none."""

    step: int = UNKNOWN
    """Training steps from the start of the stage, or epochs where the name counts those; -1 where not known."""

    tokens: int = UNKNOWN
    """Tokens seen from the start of the stage; -1 where not known."""

    seed: int = UNKNOWN
    """Of the training run; -1 where the name has none."""

    @property
    def is_known(self) -> bool:
        return self.step >= 0 or self.tokens >= 0

    @property
    def amount(self) -> int:
        """How far into its stage: steps, or tokens where the steps are not known; -1 where neither is."""
        return self.step if self.step >= 0 else self.tokens


def read_place(name: str) -> Place:
    """`stage2-ingredient1-step1000-tokens5B` -> that stage, step 1,000 and 5 billion tokens.

    `main`, `kestrel` and whatever has neither step nor tokens has no place, whatever else it has.
    """
    step = _STEP.search(name) or _EPOCH.search(name)
    tokens = _TOKENS.search(name) or (_TOKENS_AFTER_STEP.search(name) if step else _TOKENS_ALONE.fullmatch(name))
    seed = _SEED.search(name)
    place = Place(
        step=_number(step[1] or step[3], step[2] or "") if step else UNKNOWN,
        tokens=_number(tokens[1], tokens[2]) if tokens else UNKNOWN,
        seed=int(seed[1]) if seed else UNKNOWN,
    )
    markers = [match.start() for match in (step, tokens) if match]
    return replace(place, stage=_stage(name, min(markers))) if place.is_known else Place(seed=place.seed)


def place_at(label: str, step: int) -> Place:
    """The place of a label whose step is known, from elsewhere where the name does not say."""
    return replace(read_place(label), step=step)


def read_amount(word: str) -> Place | None:
    """A number for itself: `1000` and `100k` are steps, `2B`, `16.78B` and `3T` tokens; None for any other word."""
    if match := _STEPS_ALONE.fullmatch(word):
        return Place(step=_number(match[1], match[2]))
    if match := _TOKENS_ALONE.fullmatch(word):
        return Place(tokens=_number(match[1], match[2]))
    return None


def _stage(name: str, end: int) -> str:
    """The stage that a name has before its step and tokens, which begin at `end`."""
    for pattern in (_NUMBERED, _LONGER_CONTEXT, _UNRANKED):
        if match := pattern.search(name, 0, end):
            # `global_step1000` and the like: what belongs to the word for a step is no part of the stage.
            return name[match.start() : end].removesuffix("global_").rstrip("-_/.")
    return ""


def number_of(amount: str) -> int:
    """What an amount stands for, in steps or tokens; -1 where it is too large to be stored."""
    digits = amount.rstrip("kmbtKMBT")
    return _number(digits, amount[len(digits) :])


def _number(digits: str, suffix: str) -> int:
    """An amount with its suffix k, M, B or T; -1 where it is too large to be stored."""
    whole, _, decimals = digits.partition(".")
    size = _SIZES[suffix.lower()]
    number = int(whole) * size + (int(decimals) * size // 10 ** len(decimals) if decimals else 0)
    return number if number <= _LARGEST else UNKNOWN


def rank_of(stage: str) -> tuple[int, int] | None:
    """Where a stage comes among the stages of a training: numbered ones by their number, and after them longer contexts
    (`lc-4k-to-32k`) by the length they start from.  None where its name does not say."""
    for kind, pattern in enumerate((_NUMBERED, _LONGER_CONTEXT)):
        if match := pattern.match(stage):
            return kind, int(match[1])
    return None


def short_stage(stage: str) -> str:
    """`stage2` of `stage2-ingredient1`: what tells the stages of one training apart."""
    match = _NUMBERED.match(stage) or _LONGER_CONTEXT.match(stage)
    return match[0] if match else stage


def training_order(places: Mapping[str, Place]) -> list[str]:
    """The labels in order of training: by stage, then step, or tokens where there is no step; those without a place
    last.  `main` comes after a label of the same place."""

    def key(label: str) -> tuple[object, ...]:
        place = places[label]
        rank = rank_of(place.stage) or ((2, 0) if place.stage else (-1, 0))
        return not place.is_known, *rank, place.stage, place.amount, label == MAIN, label

    return sorted(places, key=key)


def positions(places: Sequence[Place]) -> list[int]:
    """How far into the whole training each place is, in steps, or in tokens where no step is known: -1 where unknown.

    Steps are counted on over stages: those of a stage before are the steps of its last checkpoint among `places`.  So
    without stages a position is the step itself.  Unknown are also stages that cannot be ordered: branches beside each
    other, and those whose rank is not known where there are others.
    """
    in_steps = any(place.step >= 0 for place in places)
    amounts = [place.step if in_steps else place.tokens for place in places]
    last: dict[str, int] = {}
    for place, amount in zip(places, amounts, strict=True):
        if amount >= 0:
            last[place.stage] = max(amount, last.get(place.stage, 0))
    starts = _starts(last)
    return [
        starts[place.stage] + amount if amount >= 0 and place.stage in starts else UNKNOWN
        for place, amount in zip(places, amounts, strict=True)
    ]


def _starts(last: Mapping[str, int]) -> dict[str, int]:
    """Stage -> position of its start, of stages that can be ordered, from the last amount of each."""
    if len(last) == 1:
        return dict.fromkeys(last, 0)
    by_rank: dict[tuple[int, int], list[str]] = {}
    for stage in last:
        if (rank := rank_of(stage)) is not None:
            by_rank.setdefault(rank, []).append(stage)
    starts, start = {}, 0
    for _, stages in sorted(by_rank.items()):
        if len(stages) == 1:
            starts[stages[0]] = start
        start += max(last[stage] for stage in stages)
    return starts


def refuse_unordered(places: Mapping[str, Place], what: str) -> None:
    """Raise `UserError` where the labels are not of one training, or are two at the same place of it."""
    if problem := disorder(places):
        raise UserError(f"{what}: {problem}")


def disorder(places: Mapping[str, Place]) -> str:
    """Why labels are not of one training, or are two at the same place of it, and which to choose; empty where they are
    in order.

    `main` may be another name of any, and a label without a place has none to be told from.
    """
    known = {label: places[label] for label in training_order(places) if places[label].is_known and label != MAIN}
    return _seeds(known) or _branches(known) or _kinds(known) or _units(known) or _twice(known)


def _seeds(places: Mapping[str, Place]) -> str:
    first = _first_of_each(places, lambda _, place: place.seed)
    if len(first) < 2:
        return ""
    return f"{_and(first.values())} are of different seeds, which are different trainings; choose those of one seed"


def _branches(places: Mapping[str, Place]) -> str:
    """Stages of the same rank, and the words that choose one of them."""
    by_rank: dict[tuple[int, int], list[str]] = {}
    for stage in sorted({place.stage for place in places.values()}):
        if (rank := rank_of(stage)) is not None:
            by_rank.setdefault(rank, []).append(stage)
    beside = next((stages for _, stages in sorted(by_rank.items()) if len(stages) > 1), None)
    if beside is None:
        return ""
    words = " ".join(f"'{_glob(stages[0], places)}'" for _, stages in sorted(by_rank.items()))
    return f"{_and(beside)} are branches beside each other, not one training; choose one of them, as {words} does"


def _glob(stage: str, places: Mapping[str, Place]) -> str:
    """A word of `--checkpoints` for all labels of a stage."""
    label = next(label for label, place in places.items() if place.stage == stage)
    return f"{label[: label.index(stage) + len(stage) + 1]}*"


def _kinds(places: Mapping[str, Place]) -> str:
    """Stages whose names do not tell which comes first."""
    first = _first_of_each(places, lambda _, place: place.stage)
    if len(first) < 2 or all(rank_of(stage) is not None for stage in first):
        return ""
    return f"nothing tells which of {_and(first.values())} comes first, by stage; choose those of one kind"


def _units(places: Mapping[str, Place]) -> str:
    first = _first_of_each(places, _unit)
    if len(first) < 2:
        return ""
    return f"{_and(first.values())} count {_and(first)}, which cannot be ordered; choose those of one kind"


def _unit(label: str, place: Place) -> str:
    if place.step < 0:
        return "tokens"
    return "epochs" if _EPOCH.search(label) and not _STEP.search(label) else "steps"


def _twice(places: Mapping[str, Place]) -> str:
    by_place: dict[tuple[str, int], str] = {}
    for label, place in places.items():
        if (other := by_place.setdefault((place.stage, place.amount), label)) != label:
            return f"{other} and {label} are the same place in training; choose one of them"
    return ""


def _first_of_each(places: Mapping[str, Place], of: Callable[[str, Place], Kind]) -> dict[Kind, str]:
    """What `of` gives -> the first label for which it does."""
    first: dict[Kind, str] = {}
    for label, place in places.items():
        first.setdefault(of(label, place), label)
    return first


def _and(names: Collection[str]) -> str:
    """`a, b and c`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
