"""A finding as people read it: a table of words, and how to read it."""

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Finding:
    """One finding, for the terminal and for the page."""

    title: str

    table: pd.DataFrame | None
    """Cells as text; None where there is nothing but words."""

    notes: tuple[str, ...]

    name: str
    """In one word: a file of its numbers is called so, and a section of the page asks for it."""

    numbers: pd.DataFrame | None = None
    """In full precision, for every checkpoint and layer; None where there are none."""

    def __str__(self) -> str:
        """As the terminal shows it: the table, then the notes."""
        table = [] if self.table is None else [self.table.to_string()]
        return "\n".join([*table, *self.notes])
