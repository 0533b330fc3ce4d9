"""How the numbers of a patched run are read.  Nothing of it changes what is patched."""

from dataclasses import dataclass
from typing import Literal

Correction = Literal["bh", "holm"]

MARGIN = 0.5
"""Nats: an effect that is surely smaller is called none."""


@dataclass(frozen=True)
class Reading:
    """What is read from a patched run, and with which error rates."""

    correction: Correction = "bh"
    """Of p-values over layers, heads and checkpoints."""

    margin: float = MARGIN
    """Nats below which an effect counts as none, in tests of equivalence."""


READING = Reading()
"""How numbers are read where nothing else is said."""
