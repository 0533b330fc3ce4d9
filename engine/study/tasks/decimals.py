"""Which of two decimal numbers is bigger: 9.8 or 9.11?

The pair is that of the published study; the variants are those that it recommends to try next.  In every pair the
larger number is the smaller one if both are read as version numbers, where 9.11 comes after 9.8.
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
"""First fractional digits.  The larger number has the larger one: digit by digit the answers differ there first."""

TAILS = {
    0: [""],
    1: [f"{last}" for last in range(1, 10)],  # no trailing 0: 9.10 equals 9.1
    2: [f"{middle}{last}" for middle in range(10) for last in range(1, 10)],
}
"""What follows the first fractional digit, by its number of digits."""

Pair = tuple[str, str]
"""The larger number and the smaller one, which has more digits."""


def decimal(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """6480 distinct pairs such as 9.8 and 9.11, which come first; the rest is shuffled."""
    pairs = [
        (f"{whole}.{tenths}", f"{whole}.{first}{second}")
        for whole in range(1, 21)
        for tenths, first in LEADS
        for second in TAILS[1]
    ]
    random.Random(seed).shuffle(pairs)
    pairs.sort(key=lambda pair: pair != ("9.8", "9.11"))
    return _contrasts(pairs, repeat((PLAIN, CHAT)), "decimal")


def decimal_order(seed: int, tokenizer: Tokenizer) -> Iterator[Contrast]:
    """The pairs of `decimal` in plain form: the larger number is named last when clean and first when corrupt.

    Both prompts have the same tokens in different order.  A model that repeats the number named last is right on the
    clean prompt and wrong on the corrupt one.
    """
    for pair in decimal(seed, tokenizer):
        larger, smaller = pair.answer.strip(), pair.wrong.strip()
        clean, corrupt = PLAIN.format(smaller, larger), PLAIN.format(larger, smaller)
        yield Contrast(clean, corrupt, pair.answer, pair.wrong, "decimal-order")


def decimal_digits(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`decimal` with one fractional digit against two, one against three and two against three, in turn."""
    kinds = [_pairs(seed, range(1, 21), *digits) for digits in ((1, 2), (1, 3), (2, 3))]
    return _contrasts(_in_turn(*kinds), repeat((PLAIN, CHAT)), "decimal-digits")


def decimal_whole(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`decimal` with integer parts of two digits (from 21, where `decimal` ends), three and four, in turn."""
    kinds = [_pairs(seed, wholes, 1, 2) for wholes in (range(21, 100), range(100, 1000), range(1000, 10_000))]
    return _contrasts(_in_turn(*kinds), repeat((PLAIN, CHAT)), "decimal-whole")


def decimal_format(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`decimal` in other words: one of three plain forms when clean, of three forms of a conversation when corrupt."""
    forms = [form for form, *_ in combinations(seed, [(a, b) for a in OTHER_PLAIN for b in OTHER_CHAT])]
    return _contrasts(_pairs(seed, range(1, 21), 1, 2), chain.from_iterable(repeat(forms)), "decimal-format")


def published(_seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """The one prompt pair of the published study, over and over."""
    question = "Which is bigger: 9.8 or 9.11?"
    return repeat(Contrast(question, f"Q: {question}\nA:", " 9.8", " 9.11", "published"))


def _pairs(seed: int, wholes: range, larger_digits: int, smaller_digits: int) -> Iterator[Pair]:
    """Shuffled pairs with so many fractional digits."""
    pools = (wholes, LEADS, TAILS[larger_digits - 1], TAILS[smaller_digits - 1])
    for whole, (larger, smaller), larger_tail, smaller_tail in combinations(seed, *pools):
        yield f"{whole}.{larger}{larger_tail}", f"{whole}.{smaller}{smaller_tail}"


def _in_turn(*kinds: Iterator[Pair]) -> Iterator[Pair]:
    return chain.from_iterable(zip(*kinds, strict=False))


def _contrasts(pairs: Iterable[Pair], forms: Iterable[tuple[str, str]], source: str) -> Iterator[Contrast]:
    """Each pair in the next clean and corrupt form; the larger number is named first in every other pair."""
    for number, ((larger, smaller), (plain, chat)) in enumerate(zip(pairs, forms, strict=False)):
        named = (larger, smaller) if number % 2 == 0 else (smaller, larger)
        yield Contrast(plain.format(*named), chat.format(*named), f" {larger}", f" {smaller}", source)
