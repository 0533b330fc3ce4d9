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

    name: str = ""
    """What a file of the numbers is called; nothing where there are none."""

    numbers: pd.DataFrame | None = None
    """In full precision, for every checkpoint and layer."""

    def __str__(self) -> str:
        """As the terminal shows it: the table, then the notes."""
        table = [] if self.table is None else [self.table.to_string()]
        return "\n".join([*table, *self.notes])
