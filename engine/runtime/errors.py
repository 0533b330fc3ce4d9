"""The errors that end a command with one line in place of a traceback, and what others come to in one line."""

import errno
import re

_LONGEST = 2000
"""Characters of a message: whatever a file, a hub or an option holds, it fills no screen."""

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters and line ends: names that a stranger chose move no cursor and add no line."""


def printable(text: str) -> str:
    """`text` on one line, of bounded length."""
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(ValueError):
    """The user's input or files do not allow what was asked.

    The message is one line: what was asked, what was found and what to do.  Control characters in it are written as
    escapes, and of a very long one the middle is left out.  `table` may show the rows in question beneath it.
    """

    def __init__(self, message: object, table: str = "") -> None:
        super().__init__(message, table)
        self.message, self.table = printable(str(message)), table

    def __str__(self) -> str:
        return f"{self.message}\n{self.table}" if self.table else self.message


class NothingThereError(UserError):
    """What was asked for is not there, and may yet come."""


def first_clause(error: UserError) -> str:
    """What was asked and found, without what to do about it, where there is nothing to do but wait."""
    return error.message.partition("; ")[0]


class DamageError(UserError):
    """A file of a store is not as it was written: a checksum differs, or something is missing."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message
        """What is wrong, without the place and the remedy."""


class VerificationError(RuntimeError):
    """Replay and a full hooked forward differ by more than the tolerance: the numbers must not be used."""


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)


def unwritable(error: OSError) -> str | None:
    """What to do about a full disk or a place that cannot be written to; None for anything else."""
    if error.errno not in _DISK_FULL + _NOT_WRITABLE:
        return None
    path = f" {error.filename}" if error.filename else ""
    full = error.errno in _DISK_FULL
    remedy = "make room and run it again; finished work is kept" if full else "choose another place"
    return f"cannot write{path}: {error.strerror}; {remedy}"
