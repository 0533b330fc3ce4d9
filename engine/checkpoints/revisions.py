"""The language of `--checkpoints`: labels, steps, ranges and sets, selected from what a model has."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..runtime.errors import UserError
from ..runtime.format import shorten

STUDY = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 80000, 100000, 120000, 143000)
"""Steps of the published study's checkpoints; it took the last one from `main`."""

PYTHIA = (0, *(2**k for k in range(10)), *range(1000, 143001, 1000))
"""Steps of every Pythia model's revisions `step{N}`; `main` is meant to equal the last."""

UNKNOWN = -1
"""The step of a checkpoint whose name contains none."""

_STEP = re.compile(r"(?:step|checkpoint|ckpt)[-_]?([0-9]{1,18})(?![0-9])", re.IGNORECASE)
"""A step is stored as an integer of 64 bits, which 18 digits fit into."""

_NUMBER = re.compile("[0-9]{1,18}")
LONGEST_LABEL = 200
"""Characters of a checkpoint's label; longer words are refused."""

_LONGEST_LIST = 12


@dataclass(frozen=True)
class RevisionIndex:
    """The checkpoints that one model name stands for."""

    model: str

    listing: Callable[[], Mapping[str, int]]
    """Label -> step of every checkpoint; may use the network."""

    default: str
    """The word that stands for no word at all."""

    trusts: Callable[[str], bool] = lambda _label: False
    """Whether a label is accepted without being listed, to be looked up when it is fetched."""


def select(index: RevisionIndex, word: str) -> Mapping[str, int]:
    """Label -> step of what one word of `--checkpoints` names.  Raises `UserError` for what the index lacks."""
    if len(word) > LONGEST_LABEL:
        raise UserError(f"--checkpoints {shorten(word, 40)}: {len(word):,} characters are no label, step or range")
    if word in _SETS:
        return _SETS[word](index)
    if ".." in word:
        return _range(index, word)
    if _NUMBER.fullmatch(word):
        return _number(index, word)
    if index.trusts(word):
        return {word: step_of(word)}
    steps = index.listing()
    if word not in steps:
        raise unknown(word, index.model, steps)
    return {word: steps[word]}


def step_of(label: str) -> int:
    """`step1000`, `checkpoint-1000`, `stage1-step1000-tokens5B` -> 1000; -1 where there is no step."""
    match = _STEP.search(label)
    return int(match[1]) if match else UNKNOWN


def unknown(word: str, model: str, labels: Collection[str]) -> UserError:
    """The error for a checkpoint that is not among `labels`; it names the nearest steps or spellings."""
    step = int(word) if _NUMBER.fullmatch(word) else step_of(word)
    steps = {step_of(label) for label in labels} - {UNKNOWN}
    if step >= 0 and steps:
        below = max((s for s in steps if s <= step), default=None)
        above = min((s for s in steps if s >= step), default=None)
        near = [label for label in labels if step_of(label) in (below, above)]
    else:
        near = difflib.get_close_matches(word, labels, n=3, cutoff=0.5) or _in_order(labels)[:3]
    return UserError(
        f"--checkpoints {word}: not among the {len(labels)} checkpoints of {model}; "
        f"near it are {', '.join(_in_order(near)) or 'none'}; write labels, a range A..B, study, log or all"
    )


def _all(index: RevisionIndex) -> Mapping[str, int]:
    """Everything, without `main` where it is one of the others."""
    steps = dict(index.listing())
    if (last := steps.get("main", UNKNOWN)) >= 0 and list(steps.values()).count(last) > 1:
        del steps["main"]
    return steps


def _numbered(index: RevisionIndex) -> Mapping[str, int]:
    return {label: step for label, step in _all(index).items() if step >= 0}


def _log(index: RevisionIndex) -> Mapping[str, int]:
    """Steps 0, 1, 2, 4 ... 512, 1000, 2000, 4000 ... as far as they exist, the first and the last."""
    steps = _numbered(index)
    if not steps:
        raise UserError(f"--checkpoints log: no checkpoint of {index.model} has a step number; {_contents(index)}")
    ends = (min(steps.values()), max(steps.values()))
    return {label: step for label, step in steps.items() if step in ends or _is_log(step)}


def _is_log(step: int) -> bool:
    thousands, rest = divmod(step, 1000)
    power = step if step <= 512 else thousands
    return (step <= 512 or rest == 0) and power & (power - 1) == 0


def _study(index: RevisionIndex) -> Mapping[str, int]:
    by_step = {step: label for label, step in sorted(_numbered(index).items(), reverse=True)}
    if index.listing().get("main") == STUDY[-1]:
        by_step[STUDY[-1]] = "main"
    if absent := [step for step in STUDY if step not in by_step]:
        raise UserError(
            f"--checkpoints study: {index.model} lacks {len(absent)} of the {len(STUDY)} published steps, "
            f"the first is {absent[0]}; {_contents(index)}; write labels, a range A..B, log or all"
        )
    return {by_step[step]: step for step in STUDY}


_SETS: dict[str, Callable[[RevisionIndex], Mapping[str, int]]] = {"study": _study, "log": _log, "all": _all}


def _range(index: RevisionIndex, word: str) -> Mapping[str, int]:
    ends = [_end(index, end) for end in word.split("..")]
    if len(ends) != 2 or min(ends) < 0:
        raise UserError(f"--checkpoints {word}: a range has a known step at both ends, e.g. step1000..step8000")
    if ends[0] > ends[1]:
        raise UserError(f"--checkpoints {word} ends before it begins; write the smaller step first")
    steps = _numbered(index)
    selected = {label: step for label, step in steps.items() if ends[0] <= step <= ends[1]}
    if not selected:
        raise unknown(word, index.model, steps)
    return selected


def _end(index: RevisionIndex, end: str) -> int:
    """The step of one end of a range; no checkpoint need have it."""
    if _NUMBER.fullmatch(end):
        return int(end)
    # No label begins with a dot: a third dot is a slip.
    if not end or end.startswith("."):
        return UNKNOWN
    return step_of(end) if step_of(end) >= 0 else index.listing().get(end, UNKNOWN)


def _number(index: RevisionIndex, word: str) -> Mapping[str, int]:
    steps = _numbered(index)
    selected = {label: step for label, step in steps.items() if step == int(word)}
    if not selected:
        raise unknown(word, index.model, steps)
    if len(selected) > 1:
        labels = ", ".join(selected)
        raise UserError(f"--checkpoints {word}: {index.model} has {labels} at that step; write one of them")
    return selected


def _contents(index: RevisionIndex) -> str:
    labels = _in_order(index.listing())
    if len(labels) <= _LONGEST_LIST:
        return f"it has {', '.join(labels)}"
    return f"it has {len(labels)}, {labels[0]} to {labels[-1]}"


def _in_order(labels: Collection[str]) -> list[str]:
    return sorted(labels, key=lambda label: (step_of(label) < 0, step_of(label), label))
