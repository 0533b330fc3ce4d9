"""Laws of the hook: plain causal attention, a mode for the length of a block, refusal of what is not plain."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from headlapse.engine.checkpoints.attention_hook import IMPLEMENTATION, attending, causal_attention, refuse_unknown
from headlapse.engine.runtime.errors import UserError

LONGEST = 5
SOME_TENSOR = torch.zeros(1)


class SelfAttention(nn.Module):
    """What transformers calls our function with, as far as it is looked at."""

    layer_idx = 3

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@dataclass
class Recording:
    """A mode that notes which layer attended, with which scaling, and gives back the query as z."""

    longest: int = LONGEST
    heard: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.heard.append((layer, scaling))
        return query.transpose(1, 2)


def some_qkv(n_kv_heads: int = 2, n_heads: int = 4, n_positions: int = LONGEST) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, heads, n_positions, 7) for heads in (n_heads, n_kv_heads, n_kv_heads)]
    query, key, value = (torch.randn(shape, generator=draw) for shape in shapes)
    return query, key, value


def attend(module: nn.Module | None = None, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """One layer attends as a model makes it attend: through the function that transformers knows by name."""
    function = AttentionInterface()[IMPLEMENTATION]
    z, weights = function(module or SelfAttention(), *some_qkv(), mask, **{"scaling": 0.5} | kwargs)
    assert weights is None
    return z


@pytest.mark.parametrize("n_kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("n_positions", [1, 5])
def test_causal_attention_is_a_softmax_over_each_querys_past(n_kv_heads: int, n_positions: int) -> None:
    query, key, value = some_qkv(n_kv_heads, n_heads=6, n_positions=n_positions)
    z = causal_attention(query, key, value, 0.3)
    assert z.shape == (3, n_positions, 6, 7)
    for batch, head, position in product(range(3), range(6), range(n_positions)):
        kv = head // (6 // n_kv_heads)
        past = range(position + 1)
        weights = [torch.exp(0.3 * query[batch, head, position] @ key[batch, kv, i]) for i in past]
        expected = sum(weights[i] * value[batch, kv, i] for i in past) / sum(weights)
        torch.testing.assert_close(z[batch, position, head], expected, atol=1e-5, rtol=0)


def test_the_mode_hears_of_layer_and_scaling_and_its_z_is_what_the_model_gets() -> None:
    mode = Recording()
    with attending(mode):
        z = attend(scaling=0.25)
    assert mode.heard == [(3, 0.25)]
    assert torch.equal(z, some_qkv()[0].transpose(1, 2))


def test_without_a_mode_nothing_attends() -> None:
    with pytest.raises(LookupError, match="headlapse_attention_mode"):
        attend()


def test_the_mode_ends_with_its_block_after_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="in the block"), attending(Recording()):
        raise RuntimeError("in the block")
    with pytest.raises(LookupError):
        attend()


def test_an_inner_mode_gives_way_to_the_outer_one() -> None:
    outer, inner = Recording(), Recording()
    with attending(outer):
        with attending(inner):
            attend()
        with pytest.raises(RuntimeError), attending(inner):
            raise RuntimeError
        attend()
    assert len(outer.heard) == len(inner.heard) == 1


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"mask": torch.zeros(3, 1, LONGEST, LONGEST)}, "builds its own attention mask"),
        ({"softcap": 50.0}, r"softcap 50\.0"),
        ({"sliding_window": 4}, "window of 4 tokens, the prompts have 5; shorten them"),
        ({"is_causal": False}, "attends in both directions"),
        ({"module": SelfAttention(is_causal=False)}, "attends in both directions"),
        ({"scaling": None}, "does not say how it scales"),
        ({"s_aux": SOME_TENSOR}, "passes s_aux to its attention"),
        ({"position_bias": SOME_TENSOR, "head_mask": SOME_TENSOR}, "passes position_bias, head_mask to its attention"),
    ],
)
def test_what_plain_attention_gets_wrong_is_refused_by_name_and_attends_not(
    asked: dict[str, Any], complaint: str
) -> None:
    mode = Recording()
    with attending(mode), pytest.raises(UserError, match=f"^SelfAttention .*{complaint}") as refused:
        attend(**asked)
    assert "\n" not in str(refused.value)
    assert not mode.heard


@pytest.mark.parametrize(
    "asked",
    [
        {"softcap": None, "sliding_window": None, "is_causal": None},
        {"is_causal": True, "module": SelfAttention(is_causal=True)},
        {"sliding_window": LONGEST},
        {"position_ids": SOME_TENSOR, "cache_position": SOME_TENSOR, "position_embeddings": (SOME_TENSOR, SOME_TENSOR)},
        {"use_cache": False, "output_attentions": False, "return_dict": True, "num_items_in_batch": SOME_TENSOR},
        {"s_aux": None, "note": "no tensor"},
        {"dropout": 0.0},
    ],
)
def test_what_says_nothing_about_the_scores_passes(asked: dict[str, Any]) -> None:
    mode = Recording()
    with attending(mode):
        attend(**asked)
    assert mode.heard == [(3, 0.5)]


def test_a_window_is_judged_by_the_longest_prompt() -> None:
    given = SelfAttention(), None
    refuse_unknown(*given, longest=7, scaling=0.5, kwargs={"sliding_window": 7})
    with pytest.raises(UserError, match="window of 7 tokens, the prompts have 8"):
        refuse_unknown(*given, longest=8, scaling=0.5, kwargs={"sliding_window": 7})


def test_dropout_is_no_way_to_patch() -> None:
    with attending(Recording()), pytest.raises(AssertionError, match="eval mode"):
        attend(dropout=0.1)
