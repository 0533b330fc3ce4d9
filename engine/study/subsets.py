"""Head subsets as boolean rows, and the language of `--subsets` that names them."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool

from ..runtime.errors import UserError
from ..runtime.format import parse_whole

LANGUAGE = (
    "even, odd, none, all, each, but, balanced, lattice, size:K, random:N, splits, splits:N, orders:N, or heads such "
    "as 0,2,4"
)

LARGEST_SWEEP = 2**22
"""More subsets than this are refused: at a million patched runs a minute they would still take hours."""


@dataclass(frozen=True)
class Subsets:
    """Distinct subsets of one layer's heads, in the order of the words that name them."""

    labels: tuple[str, ...]
    """`none`, `all`, `even`, `odd`, or the heads: `0,2,4`."""

    mask: Bool[np.ndarray, "subset head"]
    """True where a head is patched."""

    def __len__(self) -> int:
        return len(self.labels)


def parse_subsets(
    words: Sequence[str],
    n_heads: int,
    seed: int = 0,
    estimate: Callable[[int], str] = lambda _n: "",
    n_groups: int = 1,
) -> Subsets:
    """The subsets that `words` name, each once; `seed` decides the random ones.

    `n_groups` is the number of key/value groups of consecutive heads within and between which heads can be exchanged
    (`is_symmetric`); random equal splits are drawn from those that exchanging heads makes of even against odd.

    Raises `UserError` for a word outside the language, and for more than `LARGEST_SWEEP` subsets; the message contains
    `estimate` of their number, how long they would take.
    """
    n_subsets = sum(count_subsets(word, n_heads, n_groups) for word in words)
    if n_subsets > LARGEST_SWEEP:
        raise UserError(
            f"--subsets {' '.join(words)}: {n_subsets:,} subsets of {n_heads} heads is more than {LARGEST_SWEEP:,}; "
            f"{estimate(n_subsets)}take balanced, size:K or a sample such as random:100000"
        )
    rows: dict[frozenset[int], None] = {}
    for word in words:
        rows.update(dict.fromkeys(_subsets_of(word, n_heads, seed, n_groups)))
    mask = np.zeros((len(rows), n_heads), dtype=bool)
    for row, heads in enumerate(rows):
        mask[row, list(heads)] = True
    return Subsets(labels=tuple(label_of(heads, n_heads) for heads in rows), mask=mask)


def label_of(heads: Iterable[int], n_heads: int) -> str:
    """A subset's name: `none`, `all`, `even`, `odd`, or its heads."""
    heads = frozenset(heads)
    named = {
        frozenset[int](): "none",
        frozenset(range(n_heads)): "all",
        frozenset(range(0, n_heads, 2)): "even",
        frozenset(range(1, n_heads, 2)): "odd",
    }
    plain = ",".join(map(str, sorted(heads)))
    # Of one or two heads `even` is a single head, and its number says more.
    return named.get(heads, plain) if n_heads > 2 or len(heads) != 1 else plain


def count_subsets(word: str, n_heads: int, n_groups: int = 1) -> int:
    """How many subsets a word names, without listing them.  Raises `UserError` for a word outside the language."""
    match word.partition(":"):
        case ("even" | "odd" | "none" | "all", "", ""):
            return 1
        case ("each" | "but", "", ""):
            return n_heads
        case ("balanced", "", ""):
            return math.comb(n_heads, n_heads // 2)
        case ("lattice", "", ""):
            return 1 << n_heads
        case ("size", ":", k):
            return math.comb(n_heads, _whole(word, k, low=0, high=n_heads))
        case ("random", ":", n):
            return min(_whole(word, n, low=1), 1 << n_heads)
        case ("splits", "", ""):
            return 2 * min(doubling_splits(n_heads) + 1, count_equal_splits(n_heads, n_groups))
        case ("splits" | "halvings", ":", n):
            return 2 * min(_whole(word, n, low=1) + 1, count_equal_splits(n_heads, n_groups))
        case ("orders", ":", n):
            return min(2 * _whole(word, n, low=1) * (n_heads + 1), 1 << n_heads)
        case _:
            _heads(word, n_heads)
            return 1


def count_equal_splits(n_heads: int, n_groups: int = 1) -> int:
    """Ways to split the heads into two halves (of an odd number of heads one half is larger by one) that exchanging
    heads makes of even against odd."""
    return count_halves(n_heads, n_groups) // (1 if n_heads % 2 else 2)


def count_halves(n_heads: int, n_groups: int = 1) -> int:
    """Sets of heads that exchanging heads makes of the even ones, the orbit of the symmetry group."""
    width = n_heads // n_groups
    n_fuller = n_groups - n_groups // 2 if width % 2 else n_groups  # groups that begin with an even head
    return int(math.comb(n_groups, n_fuller) * math.comb(width, width - width // 2) ** n_groups)


def is_symmetric(mask: Bool[np.ndarray, "subset head"], n_groups: int) -> Bool[np.ndarray, " subset"]:
    """Which subsets exchanging heads makes of the even ones.

    Heads that share keys and values are alike only among themselves, and a group only as a whole with another: what can
    be exchanged are heads within a group, and groups.  So as many heads as of the even ones lie in the groups, in
    whatever order of groups.  One group stands for plain attention, where every head has keys and values of its own and
    all can be exchanged.
    """
    even = np.arange(mask.shape[1]) % 2 == 0
    counts = np.sort(mask.reshape(len(mask), n_groups, -1).sum(-1), axis=1)
    symmetric: Bool[np.ndarray, " subset"] = (counts == np.sort(even.reshape(n_groups, -1).sum(-1))).all(1)
    return symmetric


def doubling_splits(n_heads: int) -> int:
    """How many random equal splits beside even against odd, each with its complement, at most double the patched runs
    of `even odd all each`: the `N` of a plain `splits`."""
    return (n_heads + 3) // 2


def _subsets_of(word: str, n_heads: int, seed: int, n_groups: int) -> Iterator[frozenset[int]]:
    every_head = frozenset(range(n_heads))
    name, _, number = word.partition(":")
    match name:
        case "none":
            yield frozenset()
        case "all":
            yield every_head
        case "even" | "odd":
            yield frozenset(range(name == "odd", n_heads, 2))
        case "each":
            yield from (frozenset({head}) for head in range(n_heads))
        case "but":
            yield from (every_head - {head} for head in range(n_heads))
        case "balanced":
            yield from map(frozenset, combinations(range(n_heads), n_heads // 2))
        case "lattice":
            yield from (_from_bits(bits, n_heads) for bits in range(2**n_heads))
        case "size":
            yield from map(frozenset, combinations(range(n_heads), int(number)))
        case "random":
            yield from _sample(count_subsets(word, n_heads), n_heads, seed)
        case "splits" | "halvings":  # `halvings` is the first name of `splits`
            for half in _sample_splits(count_subsets(word, n_heads, n_groups) // 2, n_heads, seed, n_groups):
                yield from (half, every_head - half)
        case "orders":
            for order in draw_orders(int(number), n_heads, seed):
                yield from (frozenset(order[:k]) for k in range(n_heads + 1))
        case _:
            yield _heads(word, n_heads)


def _sample(n: int, n_heads: int, seed: int) -> Iterator[frozenset[int]]:
    """`n` distinct subsets, uniform over all of them."""
    draw = random.Random(seed)
    if n > 2 ** (n_heads - 1):
        # More than half of them: drawing again after every repeat would take ever longer.
        yield from (_from_bits(bits, n_heads) for bits in draw.sample(range(2**n_heads), n))
        return
    seen: set[int] = set()
    while len(seen) < n:
        bits = draw.getrandbits(n_heads)
        if bits not in seen:
            seen.add(bits)
            yield _from_bits(bits, n_heads)


def _sample_splits(n: int, n_heads: int, seed: int, n_groups: int) -> Iterator[frozenset[int]]:
    """Even against odd heads and `n - 1` random others: distinct equal splits, uniform over the others.

    Each by its larger half, or by the one with head 0.
    """
    draw = random.Random(seed)
    size = n_heads - n_heads // 2
    even = frozenset(range(0, n_heads, 2))
    yield even
    if n_groups == 1 and n > count_equal_splits(n_heads) // 2:
        halves = (frozenset(heads) for heads in combinations(range(n_heads), size) if n_heads % 2 or 0 in heads)
        yield from draw.sample([half for half in halves if half != even], n - 1)
        return
    seen = {even}
    while len(seen) < n:
        half = frozenset(draw.sample(range(n_heads), size)) if n_groups == 1 else _exchanged(draw, n_heads, n_groups)
        if n_heads % 2 == 0 and 0 not in half:
            half = frozenset(range(n_heads)) - half  # the half with head 0 stands for both
        if half not in seen:
            seen.add(half)
            yield half


def _exchanged(draw: random.Random, n_heads: int, n_groups: int) -> frozenset[int]:
    """The even heads after a random exchange of groups, and of heads within each."""
    width, heads = n_heads // n_groups, list[int]()
    for place, group in enumerate(draw.sample(range(n_groups), n_groups)):
        n_even = sum(head % 2 == 0 for head in range(group * width, (group + 1) * width))
        heads += [place * width + head for head in draw.sample(range(width), n_even)]
    return frozenset(heads)


def draw_orders(n: int, n_heads: int, seed: int = 0) -> list[tuple[int, ...]]:
    """`n` random orders of the heads, each followed by its reverse.

    A head joins early in the one and late in the other, which reduces the variance of a sampled Shapley value
    (antithetic orders: Mitchell et al. 2022, arXiv:2104.12199).
    """
    draw = random.Random(seed)
    orders = [tuple(draw.sample(range(n_heads), n_heads)) for _ in range(n)]
    return [direction for order in orders for direction in (order, order[::-1])]


def _from_bits(bits: int, n_heads: int) -> frozenset[int]:
    return frozenset(head for head in range(n_heads) if bits >> head & 1)


def _heads(word: str, n_heads: int) -> frozenset[int]:
    heads = [parse_whole(part) for part in word.split(",")]
    if None in heads:
        raise UserError(f"--subsets {word}: not a subset; write {LANGUAGE}")
    subset = frozenset(head for head in heads if head is not None)
    if not all(head < n_heads for head in subset):
        raise UserError(f"--subsets {word}: this model's heads are 0 to {n_heads - 1}")
    return subset


def _whole(word: str, number: str, low: int, high: int | None = None) -> int:
    value = parse_whole(number)
    if value is None or value < low or (high is not None and value > high):
        bound = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise UserError(f"--subsets {word}: needs a whole number {bound} after the colon")
    return value


def parse_layers(
    words: Sequence[str], available: Sequence[int], flag: str = "--layers", noun: str = "layer"
) -> list[int]:
    """The layers that `words` (`all`, `6`, `4-8`) name, ascending.

    Raises `UserError`, naming the option `flag`, for a word that is no layer or range, and for a layer that is not
    `available`; `noun` is what is numbered, where it is not layers.
    """
    layers: set[int] = set()
    for word in words:
        beginning, dash, end = word.partition("-")
        first, last = parse_whole(beginning), parse_whole(end if dash else beginning)
        if word == "all":
            layers.update(available)
        elif first is not None and last is not None:
            # At most one layer too many is listed, however far the range goes: it is refused below.
            layers.update(range(first, min(last, max(first, available[-1] + 1)) + 1))
        else:
            raise UserError(f"{flag} {word}: not a {noun}; write all, a {noun} such as 6, or a range such as 4-8")
    if absent := sorted(layers - set(available)):
        raise UserError(f"{flag}: {noun} {absent[0]} is not there; the {noun}s are {available[0]} to {available[-1]}")
    if not layers:
        raise UserError(f"{flag} {' '.join(words)} names no {noun}; ranges ascend, such as 4-8")
    return sorted(layers)
