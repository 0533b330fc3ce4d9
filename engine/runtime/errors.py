"""The errors that end a command with one line in place of a traceback, and what others come to in one line."""

import errno


class UserError(ValueError):
    """The user's input or files do not allow what was asked.

    The message is one line: what was asked, what was found and what to do.
    """


class DamageError(UserError):
    """A file of a store is not as it was written: a checksum differs, or something is missing."""


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
