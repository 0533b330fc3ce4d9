"""Which of two decimal numbers is bigger: 9.8 or 9.11?"""

import random
from collections.abc import Iterator
from itertools import repeat

from headlapse.engine.contrasts.contrast import Contrast


def decimal(seed: int) -> Iterator[Contrast]:
    """Pairs like 9.8 and 9.11, ordered one way as numbers and the other way as versions; 6480 distinct ones.

    9.8 and 9.11 come first, the rest shuffled; the larger number is named first in every other pair.
    """
    pairs = [
        (f"{whole}.{tenths}", f"{whole}.{first}{second}")
        for whole in range(1, 21)
        for tenths in range(2, 10)
        for first in range(1, tenths)
        for second in range(1, 10)  # not 0: 9.10 would be 9.1 with a digit that says nothing
    ]
    random.Random(seed).shuffle(pairs)
    pairs.sort(key=lambda pair: pair != ("9.8", "9.11"))
    for number, (larger, smaller) in enumerate(pairs):
        named = (larger, smaller) if number % 2 == 0 else (smaller, larger)
        question = "Which is bigger: {} or {}?".format(*named)
        yield Contrast(f"{question}\nAnswer:", f"Q: {question}\nA:", f" {larger}", f" {smaller}", "decimal")


def published(_seed: int) -> Iterator[Contrast]:
    """The prompt pair of the published study, which asked it over and over."""
    question = "Which is bigger: 9.8 or 9.11?"
    return repeat(Contrast(question, f"Q: {question}\nA:", " 9.8", " 9.11", "published"))
