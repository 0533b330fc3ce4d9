"""Laws of the kernels: each is what a loop over its definition gives."""

from itertools import product

import pytest
import torch
from torch import Tensor

from headlapse.kernels.attend import attend_shared_prefix
from headlapse.kernels.mix import add_deltas, head_deltas, mix_heads

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_subsets(n_subsets: int, n_heads: int) -> Tensor:
    return normal(n_subsets, n_heads, seed=9) > 0


@pytest.mark.parametrize("n_targets", [1, 5])
def test_mixing_takes_the_named_heads_from_the_source_and_the_rest_from_the_target(n_targets: int) -> None:
    target, source, subsets = normal(3, n_targets, 2, 7, 4, seed=0), normal(3, 2, 7, 4, seed=1), some_subsets(5, 7)
    mixed = mix_heads(target, source, subsets)
    for t, s, p, h in product(range(3), range(5), range(2), range(7)):
        expected = source[t, p, h] if subsets[s, h] else target[t, s % n_targets, p, h]
        assert torch.equal(mixed[t, s, p, h], expected)


def test_a_heads_delta_is_its_difference_through_its_rows_of_the_output_projection() -> None:
    source, target, weight = normal(3, 2, 7, 4, seed=0), normal(3, 2, 7, 4, seed=1), normal(7, 4, 9, seed=2)
    deltas = head_deltas(source, target, weight)
    assert deltas.shape == (3, 2, 7, 9)
    for t, p, h in product(range(3), range(2), range(7)):
        expected = (source[t, p, h] - target[t, p, h]) @ weight[h]
        torch.testing.assert_close(deltas[t, p, h], expected, atol=1e-5, rtol=0)


def test_deltas_of_the_heads_of_each_subset_are_added_to_the_unpatched_stream() -> None:
    unpatched, deltas, subsets = normal(3, 2, 4, seed=1), normal(3, 2, 7, 4, seed=0), some_subsets(5, 7)
    patched = add_deltas(unpatched, deltas, subsets)
    assert patched.shape == (3, 5, 2, 4)
    for t, s, p in product(range(3), range(5), range(2)):
        expected = unpatched[t, p] + deltas[t, p, subsets[s]].sum(0)
        torch.testing.assert_close(patched[t, s, p], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n_kv_heads", [6, 3, 1])
@pytest.mark.parametrize(("n_prefix", "n_patched"), [(5, 1), (4, 3), (0, 3), (1, 1)])
def test_every_query_attends_to_its_trials_prefix_and_its_own_runs_past(
    dtype: torch.dtype, n_kv_heads: int, n_prefix: int, n_patched: int
) -> None:
    n_trials, n_subsets, n_heads, width, scaling = 3, 4, 6, 8, 0.3
    own = (n_trials, n_kv_heads, n_subsets, n_patched, width)
    query = normal(n_trials, n_heads, n_subsets, n_patched, width, seed=0, dtype=dtype)
    key, value = normal(*own, seed=1, dtype=dtype), normal(*own, seed=2, dtype=dtype)
    before = (n_trials, n_kv_heads, n_prefix, width)
    prefix_key, prefix_value = normal(*before, seed=3, dtype=dtype), normal(*before, seed=4, dtype=dtype)
    length = torch.tensor([n_prefix, max(n_prefix - 1, 0), 0])

    z = attend_shared_prefix(query, key, value, prefix_key, prefix_value, length, scaling)

    assert z.shape == (n_trials, n_subsets, n_patched, n_heads, width) and z.dtype == dtype
    for t, s, p, h in product(range(n_trials), range(n_subsets), range(n_patched), range(n_heads)):
        kv = h // (n_heads // n_kv_heads)
        keys = torch.cat([prefix_key[t, kv, : length[t]], key[t, kv, s, : p + 1]]).double()
        values = torch.cat([prefix_value[t, kv, : length[t]], value[t, kv, s, : p + 1]]).double()
        pattern = (keys @ query[t, h, s, p].double() * scaling).softmax(0)
        torch.testing.assert_close(z[t, s, p, h].double(), pattern @ values, atol=TOLERANCE[dtype], rtol=0)


def scattered(tensor: Tensor) -> Tensor:
    """The same values, laid out in memory the other way round."""
    layout = tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
    assert layout.is_contiguous() is False
    return layout


def test_how_tensors_lie_in_memory_changes_nothing() -> None:
    query, own = normal(3, 6, 4, 2, 8, seed=0), (3, 2, 4, 2, 8)
    tensors = query, normal(*own, seed=1), normal(*own, seed=2), normal(3, 2, 5, 8, seed=3), normal(3, 2, 5, 8, seed=4)
    length = torch.tensor([5, 0, 3])
    found = attend_shared_prefix(*map(scattered, tensors), length, 0.3)
    torch.testing.assert_close(found, attend_shared_prefix(*tensors, length, 0.3), atol=1e-6, rtol=0)

    target, source, subsets = normal(3, 5, 2, 7, 4, seed=0), normal(3, 2, 7, 4, seed=1), some_subsets(5, 7)
    mixed = mix_heads(scattered(target), scattered(source), scattered(subsets))
    assert torch.equal(mixed, mix_heads(target, source, subsets))
    unpatched, weight = normal(3, 2, 9, seed=5), normal(7, 4, 9, seed=6)
    deltas = head_deltas(source, target[:, 0], weight)
    torch.testing.assert_close(
        head_deltas(scattered(source), target[:, 0], scattered(weight)), deltas, atol=1e-6, rtol=0
    )
    summed = add_deltas(scattered(unpatched), scattered(deltas), scattered(subsets))
    torch.testing.assert_close(summed, add_deltas(unpatched, deltas, subsets), atol=1e-6, rtol=0)


def test_the_heads_that_a_subset_names_take_the_sources_z() -> None:
    query, own = normal(3, 6, 4, 2, 8, seed=0), (3, 2, 4, 2, 8)
    tensors = query, normal(*own, seed=1), normal(*own, seed=2), normal(3, 2, 5, 8, seed=3), normal(3, 2, 5, 8, seed=4)
    length, source, subsets = torch.tensor([5, 0, 3]), normal(3, 2, 6, 8, seed=7), some_subsets(4, 6)
    expected = mix_heads(attend_shared_prefix(*tensors, length, 0.3), source, subsets)
    assert torch.equal(attend_shared_prefix(*tensors, length, 0.3, source, subsets), expected)


def test_what_lies_past_a_prefix_does_not_count() -> None:
    query, own, length = normal(3, 6, 4, 2, 8, seed=0), (3, 2, 4, 2, 8), torch.tensor([5, 0, 3])
    key, value = normal(*own, seed=1), normal(*own, seed=2)
    prefix_key, prefix_value = normal(3, 2, 5, 8, seed=3), normal(3, 2, 5, 8, seed=4)
    z = attend_shared_prefix(query, key, value, prefix_key, prefix_value, length, 0.3)
    for trial, n in enumerate(length.tolist()):
        prefix_key[trial, :, n:], prefix_value[trial, :, n:] = 1e4, -1e4
    assert torch.equal(attend_shared_prefix(query, key, value, prefix_key, prefix_value, length, 0.3), z)
