"""Laws of the Triton twin: it is its definition, on the GPU where there is one and interpreted elsewhere."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
import triton

from headlapse.kernels import attend_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

Attend = Callable[..., Tensor]

pytestmark = [pytest.mark.slow] if DEVICE == "cpu" else []
"""Interpreted, it takes seconds a case."""


@pytest.fixture(scope="module")
def attend() -> Iterator[Attend]:
    """The twin; without a GPU in a process of its own, as the whole of triton must be imported to be interpreted."""
    if DEVICE == "cuda":
        yield attend_triton.attend_shared_prefix
        return
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(f"triton {triton.__version__} cannot be interpreted with today's numpy: that takes 3.7")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda *tensors: pool.submit(attend_triton.attend_shared_prefix, *tensors).result()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def scattered(tensor: Tensor) -> Tensor:
    """The same values, laid out in memory the other way round."""
    backwards = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(backwards).contiguous().permute(backwards)


def some_tensors(
    n_kv_heads: int = 2,
    n_subsets: int = 5,
    n_patched: int = 3,
    n_prefix: int = 17,
    widths: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    """Three trials of six heads whose prefixes are full, one shorter and empty; what lies past them is no number."""
    n_trials, n_heads, (d, v) = 3, 6, widths
    query = normal(n_trials, n_heads, n_subsets, n_patched, d, seed=0, dtype=dtype)
    own = (n_trials, n_kv_heads, n_subsets, n_patched)
    key, value = normal(*own, d, seed=1, dtype=dtype), normal(*own, v, seed=2, dtype=dtype)
    before = (n_trials, n_kv_heads, n_prefix)
    prefix_key, prefix_value = normal(*before, d, seed=3, dtype=dtype), normal(*before, v, seed=4, dtype=dtype)
    length = torch.tensor([n_prefix, max(n_prefix - 1, 0), 0], device=DEVICE)
    for trial, n in enumerate(length.tolist()):
        prefix_key[trial, :, n:], prefix_value[trial, :, n:] = torch.nan, torch.nan
    return [query, key, value, prefix_key, prefix_value, length, d**-0.5]


def some_choice(query: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Another run's z, and which heads of each subset take it."""
    n_trials, n_heads, n_subsets, n_patched, _ = query.shape
    source = normal(n_trials, n_patched, n_heads, width, seed=5, dtype=query.dtype)
    return source, normal(n_subsets, n_heads, seed=6) > 0


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    length: Tensor,
    scaling: float,
    source: Tensor | None = None,
    subsets: Tensor | None = None,
) -> Tensor:
    """One head of one patched position of one run at a time, in float64."""
    n_trials, n_heads, n_subsets, n_patched, _ = query.shape
    z = torch.empty(n_trials, n_subsets, n_patched, n_heads, value.shape[-1], dtype=torch.double, device=DEVICE)
    for t, s, p, h in product(range(n_trials), range(n_subsets), range(n_patched), range(n_heads)):
        if source is not None and subsets is not None and subsets[s, h]:
            z[t, s, p, h] = source[t, p, h]
            continue
        kv = h // (n_heads // key.shape[1])
        keys = torch.cat([prefix_key[t, kv, : length[t]], key[t, kv, s, : p + 1]]).double()
        values = torch.cat([prefix_value[t, kv, : length[t]], value[t, kv, s, : p + 1]]).double()
        z[t, s, p, h] = (keys @ query[t, h, s, p].double() * scaling).softmax(0) @ values
    return z


def assert_as_defined(attend: Attend, tensors: list[Any]) -> None:
    z, expected = attend(*tensors), definition(*tensors)
    assert z.dtype == tensors[0].dtype and z.is_contiguous()
    torch.testing.assert_close(z.double(), expected, atol=TOLERANCE[z.dtype], rtol=0)


@pytest.mark.parametrize(
    ("n_kv_heads", "n_subsets", "n_patched", "n_prefix", "widths"),
    [
        (6, 1, 1, 0, (16, 16)),
        (6, 1, 1, 17, (16, 16)),
        (2, 1, 3, 1, (20, 20)),
        (2, 5, 3, 0, (64, 64)),
        (2, 5, 1, 17, (80, 80)),
        (1, 5, 3, 17, (20, 80)),
        (6, 5, 3, 17, (80, 16)),
        (2, 37, 1, 1, (20, 20)),
        (2, 37, 3, 17, (16, 20)),
        (2, 1, 19, 75, (64, 64)),
    ],
)
@pytest.mark.parametrize("choosing", [False, True])
def test_triton_gives_what_the_definition_gives(
    attend: Attend,
    n_kv_heads: int,
    n_subsets: int,
    n_patched: int,
    n_prefix: int,
    widths: tuple[int, int],
    choosing: bool,
) -> None:
    tensors = some_tensors(n_kv_heads, n_subsets, n_patched, n_prefix, widths)
    assert_as_defined(attend, [*tensors, *some_choice(tensors[0], widths[1])] if choosing else tensors)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(16, 16), (20, 80)])
def test_narrow_numbers_differ_from_the_definition_by_their_rounding_alone(
    attend: Attend, dtype: torch.dtype, widths: tuple[int, int]
) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("triton's interpreter multiplies no bfloat16")
    tensors = some_tensors(widths=widths, dtype=dtype)
    assert_as_defined(attend, [*tensors, *some_choice(tensors[0], widths[1])])


def test_how_tensors_lie_in_memory_changes_nothing(attend: Attend) -> None:
    tensors = some_tensors(widths=(20, 16))
    tensors += some_choice(tensors[0], 16)
    moved = [scattered(x) if isinstance(x, Tensor) else x for x in tensors]
    torch.testing.assert_close(attend(*moved), attend(*tensors), atol=1e-6, rtol=0)


def test_keys_shared_by_all_subsets_need_no_copies(attend: Attend) -> None:
    query, key, value, *rest = some_tensors()
    shared = [x[:, :, :1].expand_as(x) for x in (key, value)]
    assert_as_defined(attend, [query, *shared, *rest])


def test_a_run_whose_subset_names_every_head_returns_the_source(attend: Attend) -> None:
    tensors = some_tensors()
    source, subsets = some_choice(tensors[0], 16)
    subsets[2] = True
    assert torch.equal(attend(*tensors, source, subsets)[:, 2], source)


def test_a_run_whose_subset_names_no_head_returns_what_it_would_without_a_source(attend: Attend) -> None:
    tensors = some_tensors()
    source, subsets = some_choice(tensors[0], 16)
    subsets[2] = False
    z = attend(*tensors, source, subsets)
    torch.testing.assert_close(z[:, 2], attend(*tensors)[:, 2], atol=1e-6, rtol=0)


def test_no_score_is_too_large_for_the_softmax(attend: Attend) -> None:
    tensors = some_tensors()
    tensors[-1] = 300.0
    z = attend(*tensors)
    # Where one score towers over the rest, z is that position's value.
    torch.testing.assert_close(z.double(), definition(*tensors), atol=5e-3, rtol=0)
