"""Laws of the subset and layer languages."""

import math

import numpy as np
import pytest
from scipy import stats

from headlapse.engine.runtime.errors import UserError
from headlapse.engine.study.subsets import (
    count_equal_splits,
    count_subsets,
    draw_orders,
    label_of,
    parse_layers,
    parse_subsets,
)

HEADS = 12


@pytest.mark.parametrize(
    ("word", "count"),
    [("even", 1), ("odd", 1), ("none", 1), ("all", 1), ("each", 12), ("but", 12), ("balanced", 924), ("lattice", 4096),
     ("size:3", math.comb(12, 3)), ("random:100", 100), ("random:5000", 4096), ("halvings:100", 202),
     ("halvings:5000", 924), ("0,2,4", 1)],
)  # fmt: skip
def test_every_word_names_as_many_distinct_subsets_as_it_says(word: str, count: int) -> None:
    subsets = parse_subsets([word], HEADS)
    assert count_subsets(word, HEADS) == count == len(subsets) == len(np.unique(subsets.mask, axis=0))
    assert len(set(subsets.labels)) == count


def test_labels_are_words_for_four_sets_and_heads_for_every_other() -> None:
    assert parse_subsets(["none", "all", "even", "odd", "0,2,4", "4,2,0"], HEADS).labels == (
        "none", "all", "even", "odd", "0,2,4",
    )  # fmt: skip


def test_a_label_reads_back_as_its_own_row() -> None:
    lattice = parse_subsets(["lattice"], 6)
    for label, row in zip(lattice.labels, lattice.mask, strict=True):
        assert (parse_subsets([label], 6).mask[0] == row).all()


def test_a_single_head_keeps_its_number_where_it_is_also_the_even_one() -> None:
    assert parse_subsets(["each"], 2).labels == ("0", "1")
    assert label_of([0, 2], 3) == "even"


def test_the_even_split_stands_in_the_lattice_under_its_own_name() -> None:
    lattice = parse_subsets(["lattice"], HEADS)
    even = lattice.mask[lattice.labels.index("even")]
    assert even.tolist() == [head % 2 == 0 for head in range(HEADS)]


def test_balanced_splits_are_halves() -> None:
    assert (parse_subsets(["balanced"], HEADS).mask.sum(1) == 6).all()


@pytest.mark.parametrize(("n_heads", "n", "halvings"), [(1, 9, 1), (2, 9, 1), (5, 4, 10), (5, 99, 10), (6, 99, 10),
                                                         (8, 30, 35), (33, 50, 1_166_803_110)])  # fmt: skip
def test_sampled_halvings_are_even_and_odd_and_n_distinct_others_each_followed_by_what_it_leaves(
    n_heads: int, n: int, halvings: int
) -> None:
    mask = parse_subsets([f"halvings:{n}"], n_heads).mask
    halves, rests = mask[::2], mask[1::2]
    assert (halves[0] == (np.arange(n_heads) % 2 == 0)).all()
    assert count_equal_splits(n_heads) == halvings and len(halves) == min(n + 1, halvings)
    assert (halves ^ rests).all() and (halves.sum(1) == n_heads - n_heads // 2).all()
    assert len({row.tobytes() for row in mask}) == len(mask)


@pytest.mark.parametrize("n", [3, 20])
def test_every_other_halving_is_sampled_as_often_as_any(n: int) -> None:
    """Of 34 others of 8 heads, over 400 seeds: the listed and the drawn samples, by chi-squared at one in 10,000."""
    drawn = [mask.tobytes() for seed in range(400) for mask in parse_subsets([f"halvings:{n}"], 8, seed).mask[2::2]]
    counts = np.unique(drawn, return_counts=True)[1]
    expected = 400 * n / 34
    # Without replacement the counts vary less, by the finite population correction.
    spread = ((counts - expected) ** 2).sum() / (expected * (1 - n / 34) * 34 / 33)
    assert len(counts) == 34 and stats.chi2.sf(spread, 33) > 1e-4


def test_random_subsets_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    first, again, other = (parse_subsets(["random:50"], 40, seed).labels for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    "word",
    ["evens", "0,12", "-1", "size:13", "size:", "random:0", "random:x", "halvings:0", "lattice:3", "", "0,,1"],
)
def test_a_word_outside_the_language_is_refused_by_name(word: str) -> None:
    with pytest.raises(UserError, match="--subsets"):
        parse_subsets([word], HEADS)


def test_a_lattice_that_would_never_finish_is_refused_with_its_count() -> None:
    with pytest.raises(UserError, match="4,294,967,296 subsets"):
        parse_subsets(["lattice"], 32)
    with pytest.raises(UserError, match="a long time"):
        parse_subsets(["lattice"], 32, estimate=lambda n: f"{n} take a long time")


def test_layers_are_named_singly_by_range_or_all_together() -> None:
    held = list(range(12))
    assert parse_layers(["4-6", "11", "5"], held) == [4, 5, 6, 11]
    assert parse_layers(["all"], held) == held


@pytest.mark.parametrize("word", ["12", "3-14", "a", "6-4", "-3", "4-", ""])
def test_layers_that_are_not_there_are_refused(word: str) -> None:
    with pytest.raises(UserError):
        parse_layers([word], list(range(12)))


def test_orders_come_with_their_reverses_and_name_every_beginning() -> None:
    orders = draw_orders(3, 5)
    assert len(orders) == 6 and all(sorted(order) == list(range(5)) for order in orders)
    assert all(way == order[::-1] for order, way in zip(orders[::2], orders[1::2], strict=True))
    named = {frozenset(order[:k]) for order in orders for k in range(6)}
    mask = parse_subsets(("orders:3",), 5).mask
    assert {frozenset(np.flatnonzero(row).tolist()) for row in mask} == named
    assert draw_orders(5, 5)[:6] == orders, "more orders begin with the same ones"
