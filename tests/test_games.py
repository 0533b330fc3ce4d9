"""Laws of heads as players: values are their definitions, and hand-worked games come out as they must."""

from itertools import combinations, permutations
from math import factorial

import numpy as np
import pytest

from headlapse.engine.statistics.shapley import (
    Smallest,
    banzhaf,
    banzhaf_interactions,
    index_of,
    members,
    sampled_shapley,
    shapley,
    shapley_interactions,
    sizes,
    smallest_necessary,
    smallest_sufficient,
)


def game(n_heads: int, n_trials: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2**n_heads, n_trials))


def bits(*heads: int) -> int:
    return index_of(heads)


def test_shapley_values_of_eight_heads_are_the_mean_over_all_their_orders() -> None:
    v = game(8, 1)[:, 0]
    total, n_orders = np.zeros(8), 0
    for order in permutations(range(8)):
        before = 0
        for head in order:
            total[head] += v[before | 1 << head] - v[before]
            before |= 1 << head
        n_orders += 1
    assert n_orders == factorial(8)
    assert np.abs(shapley(v) - total / n_orders).max() < 1e-6


@pytest.mark.parametrize("n_heads", [1, 2, 5, 12])
def test_shapley_values_sum_to_what_all_heads_do(n_heads: int) -> None:
    v = game(n_heads)
    assert np.abs(shapley(v).sum(0) - (v[-1] - v[0])).max() < 1e-9


@pytest.mark.parametrize("n_heads", [2, 3, 6])
def test_banzhaf_values_and_interactions_are_their_definitions(n_heads: int) -> None:
    v = game(n_heads)
    for i in range(n_heads):
        without = [s for s in range(2**n_heads) if not s & bits(i)]
        expected = np.mean([v[s | bits(i)] - v[s] for s in without], axis=0)
        assert np.allclose(banzhaf(v)[i], expected)
        for j in range(i):
            rest = [s for s in without if not s & bits(j)]
            more = np.array([v[s | bits(i, j)] - v[s | bits(i)] - v[s | bits(j)] + v[s] for s in rest])
            assert np.allclose(banzhaf_interactions(v)[i, j], more.mean(0))
            weight = [
                factorial(bin(s).count("1")) * factorial(n_heads - bin(s).count("1") - 2) / factorial(n_heads - 1)
                for s in rest
            ]
            assert sum(weight) == pytest.approx(1)
            assert np.allclose(shapley_interactions(v)[i, j], weight @ more)
            assert np.allclose(shapley_interactions(v)[j, i], shapley_interactions(v)[i, j])
    assert not np.diagonal(shapley_interactions(v)).any() and not np.diagonal(banzhaf_interactions(v)).any()


def test_heads_that_add_up_are_worth_what_they_add_and_do_not_interact() -> None:
    effects = np.array([1.0, -2.0, 0.0, 5.0])
    v = members(4) @ effects
    assert np.allclose(shapley(v), effects) and np.allclose(banzhaf(v), effects)
    assert np.allclose(shapley_interactions(v), 0) and np.allclose(banzhaf_interactions(v), 0)


def test_the_glove_game_has_its_known_values() -> None:
    """Heads 0 and 1 hold a left glove, head 2 a right one; a pair is worth 1: (1/6, 1/6, 4/6)."""
    v = np.array([float(bool(s & bits(2)) and bool(s & bits(0, 1))) for s in range(8)])
    assert np.allclose(shapley(v), [1 / 6, 1 / 6, 4 / 6])
    assert np.allclose(banzhaf(v), [1 / 4, 1 / 4, 3 / 4])
    assert smallest_sufficient(v, 1.0).size == 2 and smallest_sufficient(v, 1.0).count == 2
    assert smallest_necessary(v, 0.0) == Smallest(size=1, count=1, heads=(2,))


def test_renaming_heads_renames_their_values() -> None:
    v, renamed = game(5), np.array([3, 0, 4, 1, 2])
    moved = np.empty_like(v)
    for s in range(32):
        moved[sum(1 << renamed[h] for h in range(5) if s >> h & 1)] = v[s]
    assert np.allclose(shapley(moved)[renamed], shapley(v))
    assert np.allclose(shapley_interactions(moved)[np.ix_(renamed, renamed)], shapley_interactions(v))


def test_the_smallest_sets_are_found_by_hand() -> None:
    """All three of heads 1, 2 and 4 are needed for anything."""
    v = np.array([float(s & bits(1, 2, 4) == bits(1, 2, 4)) for s in range(32)])
    assert smallest_sufficient(v, 0.8) == Smallest(size=3, count=1, heads=(1, 2, 4))
    assert smallest_necessary(v, 0.2).size == 1 and smallest_necessary(v, 0.2).count == 3
    assert smallest_sufficient(v, 1.5) == Smallest(size=-1, count=0, heads=())


def test_the_smallest_sets_are_those_of_a_search_through_all() -> None:
    v = game(6, 1, seed=3)[:, 0] + sizes(6)
    for goal in (0.5, 3.0, 4.5):
        sufficient = [s for k in range(7) for s in combinations(range(6), k) if v[bits(*s)] >= goal]
        found = smallest_sufficient(v, goal)
        least = len(sufficient[0])
        assert found.size == least and found.count == sum(len(s) == least for s in sufficient)
        assert v[bits(*found.heads)] == max(v[bits(*s)] for s in sufficient if len(s) == least)
        necessary = [s for k in range(7) for s in combinations(range(6), k) if v[~bits(*s)] <= goal]
        found = smallest_necessary(v, goal)
        least = len(necessary[0])
        assert found.size == least and found.count == sum(len(s) == least for s in necessary)
        assert v[~bits(*found.heads)] == min(v[~bits(*s)] for s in necessary if len(s) == least)


def test_sampled_values_come_within_their_error_of_the_exact_ones() -> None:
    v, draw = game(8, 1)[:, 0], np.random.default_rng(5)
    misses = []
    for _ in range(40):
        half = np.array([draw.permutation(8) for _ in range(50)])
        orders = np.stack([half, half[:, ::-1]], axis=1).reshape(-1, 8)
        begun = np.concatenate([np.zeros((100, 1), int), np.cumsum(1 << orders, axis=1)], axis=1)
        estimate, error = sampled_shapley(v[begun], orders)
        assert np.isclose(estimate.sum(), v[-1] - v[0]), "every order ends with all heads"
        misses.append(np.abs(estimate - shapley(v)) / error)
    assert 0.85 < (np.array(misses) < 1.96).mean() <= 1


def test_a_single_pair_of_orders_knows_no_error() -> None:
    orders = np.array([[0, 1], [1, 0]])
    estimate, error = sampled_shapley(np.array([[0.0, 1.0, 3.0], [0.0, 1.5, 3.0]]), orders)
    assert estimate.tolist() == [1.25, 1.75] and np.isnan(error).all()


def test_the_error_of_sampled_values_is_worked_by_hand_from_two_pairs_of_orders() -> None:
    """Head 0 adds 1 and 3 in the first pair of orders (2 on average), 5 and 7 in the second (6); the standard error of
    their mean, 4, is |6 - 2| / sqrt(2) (the standard deviation of two) / sqrt(2) = 2."""
    orders = np.array([[0, 1], [1, 0], [0, 1], [1, 0]])
    worth = np.array([[0.0, 1, 1], [0, 0, 3], [0, 5, 5], [0, 0, 7]])
    value, error = sampled_shapley(worth, orders)
    assert value.tolist() == [4, 0] and error == pytest.approx([2, 0])
