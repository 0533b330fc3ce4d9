"""Laws of capture: one batched forward keeps what one plain forward per prompt would show."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headlapse.engine.capture.forward import capture
from headlapse.engine.checkpoints.model import ResidentModel
from tests.models import MAIN, random_trials, tiny

TRIALS = random_trials(n_trials=4)


def dressed(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> ResidentModel:
    resident = ResidentModel(model.config, dtype, "cpu")
    resident.load_weights({name: weight.to(dtype) for name, weight in model.state_dict().items()})
    return resident


@contextmanager
def inputs_of(model: PreTrainedModel, path: str) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _m, args, kw: seen.append((args or tuple(kw.values()))[0]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", MAIN)
def test_one_padded_batch_keeps_what_each_prompt_alone_shows(name: str) -> None:
    model = tiny(name)
    resident = dressed(model)
    captured = capture(resident, TRIALS, 2**30)
    for run in range(2):
        for trial in range(4):
            n = TRIALS.length[run, trial]
            tokens = torch.from_numpy(TRIALS.tokens[run, trial, :n])[None]
            for layer in range(resident.architecture.n_layers):
                paths = resident.architecture.out_proj[layer], resident.architecture.layers[layer]
                with torch.no_grad(), inputs_of(model, paths[0]) as z, inputs_of(model, paths[1]) as resid:
                    logits = model(tokens).logits[0, -1]
                kept = captured.read("z", layer)[run, trial, :n].flatten(-2)
                torch.testing.assert_close(kept, z[0][0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(
                    captured.read("resid_pre", layer)[run, trial, :n], resid[0][0], atol=1e-5, rtol=1e-5
                )
            expected = logits[torch.from_numpy(TRIALS.answer_tokens[trial])]
            torch.testing.assert_close(captured.answer_logits[run, trial], expected, atol=1e-5, rtol=1e-5)


def test_what_is_kept_has_the_specified_shapes() -> None:
    captured = capture(dressed(tiny("llama-gqa")), TRIALS, 2**30)
    shape = TRIALS.tokens.shape
    assert captured.read("z", 0).shape == (*shape, 8, 8)
    assert captured.read("key", 0).shape == captured.read("value", 2).shape == (*shape, 2, 8)
    assert captured.read("resid_pre", 1).shape == (*shape, 64)


def test_a_batch_split_for_memory_keeps_the_same() -> None:
    resident = dressed(tiny("neox-parallel"))
    whole, split = capture(resident, TRIALS, 2**30), capture(resident, TRIALS, 1)
    for kind in whole.tensors:
        for layer in range(resident.architecture.n_layers):
            torch.testing.assert_close(whole.read(kind, layer), split.read(kind, layer), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.answer_logits, split.answer_logits, atol=1e-5, rtol=1e-5)


def test_the_same_capture_twice_is_the_same_bit_for_bit() -> None:
    resident = dressed(tiny("neox-parallel"))
    first, again = capture(resident, TRIALS, 2**30), capture(resident, TRIALS, 2**30)
    assert all(
        torch.equal(a, b)
        for kind in first.tensors
        for a, b in zip(first.tensors[kind], again.tensors[kind], strict=True)
    )


def test_capture_leaves_the_model_as_it_was() -> None:
    model = tiny("gpt2")
    resident = dressed(model)
    capture(resident, TRIALS, 2**30)
    tokens = torch.from_numpy(TRIALS.tokens[0])
    with torch.no_grad(), resident.stock() as stock:
        torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in resident.model.modules())
