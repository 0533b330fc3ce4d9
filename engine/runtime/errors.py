"""What can go wrong in a way that a user should read about: one line, no traceback."""


class UserError(ValueError):
    """What was asked cannot be done.  The message says what was asked, what was found and what to do."""


class VerificationError(RuntimeError):
    """Replay and a full hooked forward disagree: the numbers must not be used."""
