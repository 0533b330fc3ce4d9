"""The little language of `--checkpoints`: labels, steps, ranges and sets, picked from what a model has."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..runtime.errors import UserError

STUDY = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 80000, 100000, 120000, 143000)
"""Steps of the published study's checkpoints; it took the last one from `main`."""

PYTHIA = (0, *(2**k for k in range(10)), *range(1000, 143001, 1000))
"""Steps of every Pythia model's revisions `step{N}`; `main` is meant to equal the last."""

UNKNOWN = -1
"""The step of a checkpoint whose name tells none."""

_STEP = re.compile(r"(?:step|checkpoint|ckpt)[-_]?([0-9]+)", re.IGNORECASE)
_NUMBER = re.compile("[0-9]+")
_FEW = 12


@dataclass(frozen=True)
class RevisionIndex:
    """The checkpoints that one model name stands for."""

    model: str

    listing: Callable[[], Mapping[str, int]]
    """Label -> step of every checkpoint; may have to ask the network."""

    default: str
    """What is taken when nothing is asked for."""

    trusts: Callable[[str], bool] = lambda _label: False
    """Whether a label is taken as it is, unlisted, to be looked for when it is fetched."""


def select(shelf: RevisionIndex, item: str) -> Mapping[str, int]:
    """Label -> step of what one word of `--checkpoints` names.  Raises `UserError` for what is not on the shelf."""
    if item in _SETS:
        return _SETS[item](shelf)
    if ".." in item:
        return _range(shelf, item)
    if _NUMBER.fullmatch(item):
        return _number(shelf, item)
    if shelf.trusts(item):
        return {item: step_of(item)}
    held = shelf.listing()
    if item not in held:
        raise unknown(item, shelf.model, held)
    return {item: held[item]}


def step_of(label: str) -> int:
    """`step1000`, `checkpoint-1000`, `stage1-step1000-tokens5B` -> 1000."""
    found = _STEP.search(label)
    return int(found[1]) if found else UNKNOWN


def unknown(item: str, model: str, held: Collection[str]) -> UserError:
    """What was asked for is not there; the nearest steps or spellings are."""
    asked = int(item) if _NUMBER.fullmatch(item) else step_of(item)
    steps = {step_of(name) for name in held} - {UNKNOWN}
    if asked >= 0 and steps:
        around = (
            max((s for s in steps if s <= asked), default=None),
            min((s for s in steps if s >= asked), default=None),
        )
        near = [name for name in held if step_of(name) in around]
    else:
        near = difflib.get_close_matches(item, held, n=3, cutoff=0.5) or _in_order(held)[:3]
    return UserError(
        f"--checkpoints {item}: not among the {len(held)} checkpoints of {model}; "
        f"near it are {', '.join(_in_order(near)) or 'none'}; write labels, a range A..B, study, log or all"
    )


def _all(shelf: RevisionIndex) -> Mapping[str, int]:
    """Everything, without `main` where it is one of the others."""
    held = dict(shelf.listing())
    if (last := held.get("main", UNKNOWN)) >= 0 and list(held.values()).count(last) > 1:
        del held["main"]
    return held


def _numbered(shelf: RevisionIndex) -> Mapping[str, int]:
    return {label: step for label, step in _all(shelf).items() if step >= 0}


def _log(shelf: RevisionIndex) -> Mapping[str, int]:
    """Steps 0, 1, 2, 4 ... 512, 1000, 2000, 4000 ... as far as they are there, the first and the last."""
    held = _numbered(shelf)
    if not held:
        raise UserError(f"--checkpoints log: no checkpoint of {shelf.model} has a step number; {_listed(shelf)}")
    ends = (min(held.values()), max(held.values()))
    return {label: step for label, step in held.items() if step in ends or _is_log(step)}


def _is_log(step: int) -> bool:
    thousands, rest = divmod(step, 1000)
    power = step if step <= 512 else thousands
    return (step <= 512 or rest == 0) and power & (power - 1) == 0


def _study(shelf: RevisionIndex) -> Mapping[str, int]:
    by_step = {step: label for label, step in sorted(_numbered(shelf).items(), reverse=True)}
    if shelf.listing().get("main") == STUDY[-1]:
        by_step[STUDY[-1]] = "main"
    if absent := [step for step in STUDY if step not in by_step]:
        raise UserError(
            f"--checkpoints study: {shelf.model} lacks {len(absent)} of the {len(STUDY)} published steps, "
            f"the first is {absent[0]}; {_listed(shelf)}; write labels, a range A..B, log or all"
        )
    return {by_step[step]: step for step in STUDY}


_SETS: dict[str, Callable[[RevisionIndex], Mapping[str, int]]] = {"study": _study, "log": _log, "all": _all}


def _range(shelf: RevisionIndex, item: str) -> Mapping[str, int]:
    ends = [_end(shelf, end) for end in item.split("..")]
    if len(ends) != 2 or min(ends) < 0:
        raise UserError(f"--checkpoints {item}: a range has a known step at both ends, e.g. step1000..step8000")
    if ends[0] > ends[1]:
        raise UserError(f"--checkpoints {item} ends before it begins; write the smaller step first")
    held = _numbered(shelf)
    picked = {label: step for label, step in held.items() if ends[0] <= step <= ends[1]}
    if not picked:
        raise unknown(item, shelf.model, held)
    return picked


def _end(shelf: RevisionIndex, end: str) -> int:
    """The step of one end of a range, which need not be there itself."""
    if _NUMBER.fullmatch(end):
        return int(end)
    # No name begins with a dot: a third dot is a slip.
    if not end or end.startswith("."):
        return UNKNOWN
    return step_of(end) if step_of(end) >= 0 else shelf.listing().get(end, UNKNOWN)


def _number(shelf: RevisionIndex, item: str) -> Mapping[str, int]:
    held = _numbered(shelf)
    found = {label: step for label, step in held.items() if step == int(item)}
    if not found:
        raise unknown(item, shelf.model, held)
    if len(found) > 1:
        raise UserError(f"--checkpoints {item}: {shelf.model} has {', '.join(found)} at that step; write one of them")
    return found


def _listed(shelf: RevisionIndex) -> str:
    names = _in_order(shelf.listing())
    return f"it has {', '.join(names)}" if len(names) <= _FEW else f"it has {len(names)}, {names[0]} to {names[-1]}"


def _in_order(names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda name: (step_of(name) < 0, step_of(name), name))
