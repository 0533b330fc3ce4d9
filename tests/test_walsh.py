"""Laws of the transforms over all subsets of the heads: they are the sums and minima they stand for."""

import numpy as np
import pytest
from scipy.linalg import hadamard

from headlapse.kernels.walsh import subset_minima, subset_sums, walsh_hadamard


def values(n_heads: int) -> np.ndarray:
    return np.random.default_rng(n_heads).standard_normal((2**n_heads, 3))


@pytest.mark.parametrize("n_heads", [0, 1, 3, 8])
def test_the_walsh_transform_is_the_product_with_hadamards_matrix(n_heads: int) -> None:
    v = values(n_heads)
    matrix = hadamard(2**n_heads)
    assert np.allclose(walsh_hadamard(v), matrix @ v, atol=1e-12)


def test_the_walsh_transform_twice_is_the_number_of_subsets_times_the_values() -> None:
    v = values(10)
    assert np.allclose(walsh_hadamard(walsh_hadamard(v)), 2**10 * v, atol=1e-9)


@pytest.mark.parametrize("n_heads", [1, 4, 6])
def test_sums_and_minima_run_over_the_subsets_of_each_subset(n_heads: int) -> None:
    v = values(n_heads)
    for s in range(2**n_heads):
        below = [t for t in range(2**n_heads) if t & s == t]
        assert np.allclose(subset_sums(v)[s], v[below].sum(0), atol=1e-12)
        assert np.array_equal(subset_minima(v)[s], v[below].min(0))
