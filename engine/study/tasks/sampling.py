"""Random combinations of words without repetition."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

LIMIT = 20_000
"""Contrasts that a generator makes before it ends."""


def combinations(seed: int, *pools: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """One value of each pool, in random order, no combination twice, at most `LIMIT` of them."""
    n_combinations = math.prod(map(len, pools))
    # A combination is a number in mixed radix, one digit for each pool: nothing is listed in full.
    for number in random.Random(seed).sample(range(n_combinations), min(n_combinations, LIMIT)):
        chosen = []
        for pool in pools:
            number, index = divmod(number, len(pool))
            chosen.append(pool[index])
        yield tuple(chosen)
