"""Two prompts and the two answers between which they choose: what every task is made of."""

from dataclasses import dataclass
from typing import Any

FIELDS = ("clean", "corrupt", "answer", "wrong")
FORM = '{"clean": "...", "corrupt": "...", "answer": "...", "wrong": "..."}'

Tokenizer = Any
"""A fast tokenizer of transformers, whose import takes seconds: it is passed in as a value."""


@dataclass(frozen=True)
class Contrast:
    """Two prompts and two answers: clean calls for the right one, corrupt calls for the wrong one or induces it."""

    clean: str
    corrupt: str

    answer: str
    """The right continuation of the clean prompt, appended verbatim to both and judged on both."""

    wrong: str
    """What the corrupt prompt calls for in its place, or is expected to go wrong with."""

    source: str
    """Where it comes from: `decimal`, `line 3 of my.jsonl`."""

    repeats: int = 1
    """How many identical trials were asked for; they are computed once and counted once."""
