"""How one checkpoint of a series ended."""

import logging
from dataclasses import dataclass

from .errors import UserError, VerificationError, printable, unwritable
from .format import one_line
from .shortage import shortage_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How one checkpoint of a series ended."""

    label: str

    problem: str | None = None
    """Why it failed, in one line; None where it succeeded."""

    notes: tuple[str, ...] = ()
    """Remarks for the user, where it succeeded too."""

    by_input: bool = True
    """Whether a problem lies with what the user gave, and not with the machine, or with headlapse."""


def failed(label: str, error: Exception, notes: tuple[str, ...] = ()) -> Outcome:
    """The outcome of a checkpoint that ended in an exception, whatever it is: the other checkpoints go on."""
    logger.debug("%s", label, exc_info=error)
    return Outcome(label, describe(error).removeprefix(f"{label}: "), notes, by_input=isinstance(error, UserError))


def describe(error: Exception) -> str:
    """An exception in one line: what happened, and what to do where that is known."""
    if isinstance(error, UserError | VerificationError):
        return str(error)
    if shortage := shortage_of(error):
        return printable(shortage)
    if isinstance(error, OSError):
        return printable(unwritable(error) or f"{error.filename or 'a file'} cannot be used: {one_line(error)}")
    return f"{type(error).__name__}: {one_line(error)}"
