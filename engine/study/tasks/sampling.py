"""Random combinations of words."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

MOST = 20_000
"""Contrasts that a generator makes before it ends."""


def combinations(seed: int, *pools: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """One of each pool, in random order and never the same twice; at most `MOST` of them."""
    n_combinations = math.prod(map(len, pools))
    for place in random.Random(seed).sample(range(n_combinations), min(n_combinations, MOST)):
        chosen = []
        for pool in pools:
            place, index = divmod(place, len(pool))
            chosen.append(pool[index])
        yield tuple(chosen)
