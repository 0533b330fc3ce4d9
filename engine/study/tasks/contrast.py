"""The unit of every task: a clean and a corrupt prompt, a right and a wrong answer."""

from dataclasses import dataclass
from typing import Any

FIELDS = ("clean", "corrupt", "answer", "wrong")
FORM = '{"clean": "...", "corrupt": "...", "answer": "...", "wrong": "..."}'

Tokenizer = Any
"""A fast tokenizer of transformers, whose import takes seconds: it is passed in as a value."""


@dataclass(frozen=True)
class Contrast:
    """Two prompts and two answers: the clean prompt calls for the right answer, the corrupt one for the wrong answer,
    or makes it likely."""

    clean: str
    corrupt: str

    answer: str
    """The right continuation of the clean prompt; both answers are appended verbatim to both prompts."""

    wrong: str
    """The continuation that the corrupt prompt calls for, or the mistake that it is expected to cause."""

    source: str
    """Where it comes from: `decimal`, `line 3 of my.jsonl`."""

    repeats: int = 1
    """How many of the drawn contrasts have these tokens; they are computed once and counted once."""
