"""The two errors that end a command with one line in place of a traceback."""


class UserError(ValueError):
    """The user's input or files do not allow what was asked.

    The message is one line: what was asked, what was found and what to do.
    """


class VerificationError(RuntimeError):
    """Replay and a full hooked forward differ by more than the tolerance: the numbers must not be used."""
