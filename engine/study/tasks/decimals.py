"""Which of two decimal numbers is bigger: 9.8 or 9.11?

The pair is the published study's, the variants are the next steps that it recommends.  Every pair is ordered one way as
numbers and the other way as versions, where 9.11 comes after 9.8.
"""

import random
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

from .contrast import Contrast, Tokenizer
from .sampling import combinations

PLAIN = "Which is bigger: {} or {}?\nAnswer:"
CHAT = "Q: Which is bigger: {} or {}?\nA:"

OTHER_PLAIN = (
    "Which number is larger, {} or {}?\nLarger:",
    "Of the two numbers {} and {}, the larger one is:",
    "Numbers: {}, {}\nMaximum:",
)
OTHER_CHAT = (
    "Question: Which number is larger, {} or {}?\nAnswer:",
    "User: Which is larger, {} or {}?\nAssistant:",
    "Human: Of {} and {}, which is the larger number?\n\nBot:",
)

LEADS = [(larger, smaller) for larger in range(2, 10) for smaller in range(1, larger)]
"""First fractional digits.  The larger number has the larger one, so that digits read one by one branch there."""

TAILS = {
    0: [""],
    1: [f"{last}" for last in range(1, 10)],  # not 0: 9.10 would be 9.1 with a digit that says nothing
    2: [f"{middle}{last}" for middle in range(10) for last in range(1, 10)],
}
"""What follows the first fractional digit, by its number of digits."""

Pair = tuple[str, str]
"""The larger number and the smaller one, which has more digits."""


def decimal(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """Pairs like 9.8 and 9.11; 6480 distinct ones.  9.8 and 9.11 come first, the rest shuffled."""
    pairs = [
        (f"{whole}.{tenths}", f"{whole}.{first}{second}")
        for whole in range(1, 21)
        for tenths, first in LEADS
        for second in TAILS[1]
    ]
    random.Random(seed).shuffle(pairs)
    pairs.sort(key=lambda pair: pair != ("9.8", "9.11"))
    return _asked(pairs, repeat((PLAIN, CHAT)), "decimal")


def decimal_order(seed: int, tokenizer: Tokenizer) -> Iterator[Contrast]:
    """The pairs of `decimal` in its plain form: the larger number is named last when clean and first when corrupt.

    The same tokens in two orders.  Whoever repeats what was named last is right on the one and wrong on the other.
    """
    for pair in decimal(seed, tokenizer):
        larger, smaller = pair.answer.strip(), pair.wrong.strip()
        clean, corrupt = PLAIN.format(smaller, larger), PLAIN.format(larger, smaller)
        yield Contrast(clean, corrupt, pair.answer, pair.wrong, "decimal-order")


def decimal_digits(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`decimal` with one fractional digit against two, one against three and two against three, by turns."""
    kinds = [_pairs(seed, range(1, 21), *digits) for digits in ((1, 2), (1, 3), (2, 3))]
    return _asked(_by_turns(*kinds), repeat((PLAIN, CHAT)), "decimal-digits")


def decimal_whole(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`decimal` with integer parts of two digits (from 21, where it ends), three and four, by turns."""
    kinds = [_pairs(seed, wholes, 1, 2) for wholes in (range(21, 100), range(100, 1000), range(1000, 10_000))]
    return _asked(_by_turns(*kinds), repeat((PLAIN, CHAT)), "decimal-whole")


def decimal_format(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`decimal` asked in other words: three plain forms when clean, three forms of a conversation when corrupt."""
    forms = [form for form, *_ in combinations(seed, [(a, b) for a in OTHER_PLAIN for b in OTHER_CHAT])]
    return _asked(_pairs(seed, range(1, 21), 1, 2), chain.from_iterable(repeat(forms)), "decimal-format")


def published(_seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """The prompt pair of the published study, which asked it over and over."""
    question = "Which is bigger: 9.8 or 9.11?"
    return repeat(Contrast(question, f"Q: {question}\nA:", " 9.8", " 9.11", "published"))


def _pairs(seed: int, wholes: range, larger_digits: int, smaller_digits: int) -> Iterator[Pair]:
    """Shuffled pairs with so many fractional digits."""
    pools = (wholes, LEADS, TAILS[larger_digits - 1], TAILS[smaller_digits - 1])
    for whole, (larger, smaller), larger_tail, smaller_tail in combinations(seed, *pools):
        yield f"{whole}.{larger}{larger_tail}", f"{whole}.{smaller}{smaller_tail}"


def _by_turns(*kinds: Iterator[Pair]) -> Iterator[Pair]:
    return chain.from_iterable(zip(*kinds, strict=False))


def _asked(pairs: Iterable[Pair], forms: Iterable[tuple[str, str]], source: str) -> Iterator[Contrast]:
    """The larger number is named first in every other pair."""
    for number, ((larger, smaller), (plain, chat)) in enumerate(zip(pairs, forms, strict=False)):
        named = (larger, smaller) if number % 2 == 0 else (smaller, larger)
        yield Contrast(plain.format(*named), chat.format(*named), f" {larger}", f" {smaller}", source)
