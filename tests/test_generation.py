"""Laws of generation: a batch of patched prompts gives token for token what transformers' own generate gives alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headlapse.engine.checkpoints.fetch import fetch
from headlapse.engine.checkpoints.loader import ModelLoader, open_resident_model
from headlapse.engine.checkpoints.model import ResidentModel
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.replay.greedy_decoding import (
    GeneratedTexts,
    SlicePatch,
    _rounding_bound,
    generate_distinct,
    generate_slice_patched,
    padded,
    reference_generate,
)
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.resources import Machine
from tests.models import D_MODEL, N_HEADS, VOCAB, save, tiny, tiny_tokenizer
from tests.reference import OUTPUT_PROJECTION
from tests.test_capture import dressed

pytestmark = pytest.mark.thorough

NAMES = ("neox-parallel", "neox-sequential", "gpt2", "llama-gqa")
N_TOKENS = 8
EVEN = tuple(head % 2 == 0 for head in range(N_HEADS))
ODD = tuple(not even for even in EVEN)
NONE, ALL = (False,) * N_HEADS, (True,) * N_HEADS


def prompts(n: int, seed: int = 0) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of which some share their corrupt length, and some clean prompts are the longer ones."""
    rng = np.random.default_rng(seed)
    lengths = [(4 + 3 * (i % 4), 6 + 2 * (i % 3)) for i in range(n)]
    return [tuple(tuple(rng.integers(1, VOCAB, k).tolist()) for k in pair) for pair in lengths]  # type: ignore[misc]


def slice_patches(n: int = 6, seed: int = 0) -> list[SlicePatch]:
    rng = np.random.default_rng(seed)
    choices = (NONE, EVEN, ODD, ALL, tuple((rng.random(N_HEADS) < 0.5).tolist()))
    return [
        SlicePatch(clean, corrupt, layer, slices)
        for clean, corrupt in prompts(n, seed)
        for layer in (0, 2)
        for slices in choices
    ]


def in_precision(model: PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, ResidentModel]:
    """A stock model with transformers' default attention, and a resident in the same weights."""
    resident = dressed(model, dtype)
    model = model.to(dtype)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return model, resident


def reference(model: PreTrainedModel, patch: SlicePatch, n_tokens: int = N_TOKENS) -> list[int]:
    """The study's procedure, spelled out: a hook on the attention module that overwrites slices of what it returns."""
    module = model.get_submodule(OUTPUT_PROJECTION[model.config.model_type].format(patch.layer).rpartition(".")[0])
    with hooked(module) as saved:
        model(torch.tensor([patch.clean]))
    width = D_MODEL // N_HEADS
    slices = [head for head, is_copied in enumerate(patch.slices) if is_copied]
    with hooked(module, saved[0], [c for head in slices for c in range(head * width, (head + 1) * width)]):
        generate_stock: Any = model.generate
        texts = generate_stock(
            torch.tensor([patch.corrupt]), attention_mask=torch.ones(1, len(patch.corrupt), dtype=torch.long),
            max_new_tokens=n_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return texts[0, len(patch.corrupt) :].tolist()


@contextmanager
def hooked(
    module: nn.Module, source: Tensor | None = None, coordinates: Sequence[int] | None = None
) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        seen.append(first)
        if source is not None and coordinates:
            for position in range(min(first.shape[1], source.shape[1])):
                for coordinate in coordinates:
                    first[0, position, coordinate] = source[0, position, coordinate]
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
@pytest.mark.slow
def test_a_batch_gives_the_texts_of_stock_generate(name: str, dtype: torch.dtype) -> None:
    model, resident = in_precision(tiny(name), dtype)
    patches = slice_patches(3)
    texts = generate_slice_patched(resident, patches, N_TOKENS, batch_size=7)
    assert texts.tokens == [reference(model, patch) for patch in patches]
    assert texts.n_near < len(patches) / (10 if dtype == torch.float32 else 2), "the batch decides nearly all of them"
    changed = [a != b for a, b in zip(texts.tokens[0::5], texts.tokens[3::5], strict=True)]
    assert any(changed), "overwriting all slices changes some text"


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_packages_reference_is_the_one_spelled_out_here(name: str) -> None:
    model, resident = in_precision(tiny(name), torch.float32)
    for patch in slice_patches(2, seed=1)[:6]:
        assert reference_generate(resident, patch, N_TOKENS) == reference(model, patch)


@pytest.mark.slow
@torch.inference_mode()
def test_a_text_ends_with_the_token_that_ends_texts() -> None:
    plain = generate_slice_patched(
        dressed(tiny("neox-parallel", eos_token_id=None)), slice_patches(3), N_TOKENS, batch_size=100
    ).tokens
    stop = plain[0][3]
    model, resident = in_precision(tiny("neox-parallel", eos_token_id=stop), torch.float32)
    texts = generate_slice_patched(resident, slice_patches(3), N_TOKENS, batch_size=100).tokens
    assert texts[0] == plain[0][: plain[0].index(stop) + 1]
    assert texts == [row[: row.index(stop) + 1] if stop in row else row for row in plain]
    assert texts == [reference(model, patch) for patch in slice_patches(3)]


@pytest.mark.slow
@torch.inference_mode()
def test_of_the_checkpoints_own_settings_for_texts_only_the_end_tokens_count(tmp_path: Path) -> None:
    """The file beside the weights wins over the config; what makes a text other than plainly greedy is left aside."""
    model = tiny("neox-parallel", eos_token_id=None)
    plain = generate_slice_patched(dressed(model), slice_patches(3), N_TOKENS, batch_size=100).tokens
    ends = plain[0][2:4]
    save(model, tmp_path / "own", tokenizer=tiny_tokenizer())
    own = tmp_path / "own" / "generation_config.json"
    own.write_text(json.dumps({"eos_token_id": ends, "repetition_penalty": 5.0, "num_beams": 3, "do_sample": True}))
    [checkpoint] = resolve(str(tmp_path / "own"), [], tmp_path)
    files = fetch(checkpoint, tmp_path)
    resident, _ = ModelLoader("float32", Machine()).load_weights((files, None))
    texts = generate_slice_patched(resident, slice_patches(3), N_TOKENS, batch_size=100).tokens
    assert texts == [_until(row, ends) for row in plain] and texts != plain
    assert texts[:5] == [reference_generate(resident, patch, N_TOKENS) for patch in slice_patches(3)[:5]]
    own.write_text('{"eos_token_id": ')
    with pytest.raises(UserError, match=r"generation_config.json: it cannot be read .* fetch it again, or remove it"):
        open_resident_model(files, "float32", "cpu", resident)


def _until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((index + 1 for index, token in enumerate(row) if token in ends), len(row))]


@pytest.mark.slow
@torch.inference_mode()
def test_near_tied_tokens_are_left_to_the_reference() -> None:
    """Two unembedding rows made equal: argmax takes the first in the batch as alone, and every such text is counted."""
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB // 2 :] = model.get_output_embeddings().weight[: VOCAB // 2]
    stock, resident = in_precision(model, torch.float32)
    patches = slice_patches(2)
    texts = generate_slice_patched(resident, patches, N_TOKENS, batch_size=100)
    assert texts.n_near == len(patches)
    assert texts.tokens == [reference(stock, patch) for patch in patches]


@pytest.mark.slow
@torch.inference_mode()
def test_how_many_go_side_by_side_changes_nothing() -> None:
    resident = dressed(tiny("gpt2"))
    patches = slice_patches(3)
    alone = generate_slice_patched(resident, patches, N_TOKENS, batch_size=1)
    assert generate_slice_patched(resident, patches, N_TOKENS, batch_size=1000).tokens == alone.tokens


def test_equal_prompts_are_generated_once_as_many_side_by_side_as_the_kind_of_device_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident, seen = dressed(tiny("gpt2")), list[tuple[int, int]]()

    def spelled(distinct: list[str], batch_size: int) -> GeneratedTexts:
        seen.append((len(distinct), batch_size))
        return GeneratedTexts([[ord(letter) for letter in prompt] for prompt in distinct], n_near=1)

    found = generate_distinct(resident, ["b", "a", "b", "ab"], spelled)
    assert found == GeneratedTexts([[98], [97], [98], [97, 98]], n_near=1)
    many = [str(number) for number in range(2000)]
    generate_distinct(resident, many, spelled)
    for device in ("cuda", "meta"):
        monkeypatch.setattr(resident, "device", device)
        generate_distinct(resident, many, spelled)
    assert seen == [(3, 3), (2000, 64), (2000, 512), (2000, 64)], "another kind of device is taken for a processor"


def test_texts_of_different_lengths_are_padded_with_what_is_no_token() -> None:
    assert padded([[5, 6, 7], [], [8]], 4).tolist() == [[5, 6, 7, -1], [-1] * 4, [8, -1, -1, -1]]


def test_how_close_two_tokens_may_be_goes_by_the_largest_logit_of_their_own_text() -> None:
    resident = dressed(tiny("gpt2"))
    one_rounding = torch.finfo(torch.float32).eps
    bound = _rounding_bound(resident, torch.tensor([[100.0, 3, -4], [1, 3, -4]]))
    assert bound.tolist() == pytest.approx([64 * 100 * one_rounding, 64 * 4 * one_rounding])


@torch.inference_mode()
def test_generation_leaves_no_hook_behind() -> None:
    resident = dressed(tiny("neox-sequential"))
    generate_slice_patched(resident, slice_patches(2), 3, batch_size=4)
    reference_generate(resident, slice_patches(1)[1], 3)
    assert not any(module._forward_hooks for module in resident.model.modules())
