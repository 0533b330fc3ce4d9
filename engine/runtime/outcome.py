"""What became of one checkpoint of a series."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of one checkpoint."""

    label: str

    problem: str | None = None
    """Why it could not be done; None when it was."""

    notes: tuple[str, ...] = ()
    """What the user should hear besides."""
