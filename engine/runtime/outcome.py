"""How one checkpoint of a series ended."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How one checkpoint of a series ended."""

    label: str

    problem: str | None = None
    """Why it failed, in one line; None where it succeeded."""

    notes: tuple[str, ...] = ()
    """Remarks for the user, where it succeeded too."""
