"""The built-in tasks, each a seeded generator of contrasts.  To add one, write the generator and name it in `TASKS`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .agreement import agreement
from .contrast import Contrast, Tokenizer
from .decimals import decimal, decimal_digits, decimal_format, decimal_order, decimal_whole, published
from .greater_than import greater_than
from .induction import induction
from .ioi import ioi
from .pronouns import pronouns

SEED = 0
"""Fixed, so that a task gives every user the same prompts."""


@dataclass(frozen=True)
class Task:
    """A source of contrasts for any tokenizer."""

    contrasts: Callable[[int, Tokenizer], Iterator[Contrast]]
    """From a seed and the tokenizer, for tasks whose words depend on it.  May end early or never."""

    asks: str
    """What it asks, in a few words, for `--help`."""

    replaces: bool = False
    """Whether the corrupt prompt is the clean one with words replaced or exchanged.  Only contrasts are then drawn
    whose tokens correspond one by one, so that `--positions all` has a meaning."""


TASKS = {
    "decimal": Task(decimal, "9.8 or 9.11? asked plainly (clean), and as Q: ... A: (corrupt)"),
    "decimal-order": Task(decimal_order, "asked plainly; the larger one is named last (clean) or first", replaces=True),
    "decimal-digits": Task(decimal_digits, "decimal with 1 to 3 fractional digits"),
    "decimal-whole": Task(decimal_whole, "decimal with integer parts of 2 to 4 digits"),
    "decimal-format": Task(decimal_format, "decimal in other words, plain and as a conversation"),
    "ioi": Task(ioi, "When Mary and John went to the store, John gave a book to ... Mary or John?", replaces=True),
    "greater-than": Task(greater_than, "The war lasted from the year 1732 to ... 1752 or 1712?", replaces=True),
    "agreement": Task(agreement, "The pilots near the car ... are or is?", replaces=True),
    "pronouns": Task(pronouns, "So Sarah is a really great friend, isn't ... she or he?", replaces=True),
    "induction": Task(induction, "random words, then the same again: what comes next?", replaces=True),
    "published": Task(published, "the study's own pair, over and over"),
}
