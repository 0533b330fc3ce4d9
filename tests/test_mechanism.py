"""Laws of the mechanism: every quantity against its definition on stock models, prompt by prompt, with no padding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from headlapse.engine.capture import capture
from headlapse.engine.ground import Direction, Ground
from headlapse.engine.mechanism.attention import TO, attention, shares
from headlapse.engine.mechanism.attribution import Attribution, attribute
from headlapse.engine.mechanism.circuits import Circuit, circuits
from headlapse.engine.mechanism.gradient import estimated_effect, gradient
from headlapse.engine.steps import Steps
from headlapse.engine.study import Refusal
from headlapse.engine.tasks import Trials, align
from tests import reference
from tests.models import D_MODEL, MAIN, N_HEADS, N_LAYERS, random_trials, tiny
from tests.test_capture import dressed

TRIALS = random_trials(n_trials=3)
LAYERS = range(N_LAYERS)
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
TARGET = {"denoise": reference.CORRUPT, "noise": reference.CLEAN}
FINAL_NORM = {"gpt_neox": "gpt_neox.final_layer_norm", "gpt2": "transformer.ln_f", "llama": "model.norm"}
BLOCK = {"gpt_neox": "gpt_neox.layers.{}", "gpt2": "transformer.h.{}", "llama": "model.layers.{}"}


def steps_of(model: PreTrainedModel, direction: Direction, dtype: torch.dtype = torch.float32) -> Steps:
    skeleton = dressed(model, dtype)
    held = capture(skeleton, TRIALS, 2**30)
    return Steps(skeleton, Ground.lay(skeleton, held, TRIALS, align(TRIALS, "last"), direction))


# --- direct logit attribution ---


@contextmanager
def last_rows(model: PreTrainedModel, path: str, of_input: bool) -> Iterator[list[Tensor]]:
    """What enters or leaves a module at the last position while the body runs."""
    rows: list[Tensor] = []
    if of_input:
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs: rows.append((args or tuple(kwargs.values()))[0][0, -1]), with_kwargs=True
        )
    else:
        handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, output: rows.append(output[0, -1]))
    try:
        yield rows
    finally:
        handle.remove()


def output_matrix(model: PreTrainedModel, layer: int) -> Tensor:
    """W_O as (head, head_dim, d_model), by the names of the modules."""
    project = model.get_submodule(reference.OUTPUT_PROJECTION[model.config.model_type].format(layer))
    weight = project.weight if model.config.model_type == "gpt2" else project.weight.T
    return weight.reshape(N_HEADS, -1, D_MODEL)


def output_bias(model: PreTrainedModel, layer: int) -> Tensor:
    project = model.get_submodule(reference.OUTPUT_PROJECTION[model.config.model_type].format(layer))
    return torch.zeros(D_MODEL) if project.bias is None else project.bias


def frozen_norm(model: PreTrainedModel, resid: Tensor) -> Callable[[Tensor], Tensor]:
    """The final norm's linear part with its scale at what it is for `resid`."""
    norm = model.get_submodule(FINAL_NORM[model.config.model_type])
    if model.config.model_type == "llama":
        scale = ((resid**2).mean() + norm.variance_epsilon).sqrt()
        return lambda x: norm.weight * x / scale
    scale = (((resid - resid.mean()) ** 2).mean() + norm.eps).sqrt()
    return lambda x: norm.weight * (x - x.mean()) / scale


def slow_attribution(model: PreTrainedModel, run: int, trial: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Heads, MLPs with the biases of W_O, embedding and the final norm's bias, each by its definition."""
    kind = model.config.model_type
    tokens = reference.prompt(TRIALS, run, trial)
    z = reference.source_z(model, tokens)
    mlps = []
    with last_rows(model, FINAL_NORM[kind], True) as final, last_rows(model, BLOCK[kind].format(0), True) as entered:
        watched = [last_rows(model, f"{BLOCK[kind].format(layer)}.mlp", False) for layer in LAYERS]
        with watched[0] as first, watched[1] as second, watched[2] as third:
            reference.last_logits(model, tokens[None])
        mlps = [first[0], second[0], third[0]]
    right, wrong = TRIALS.answer_tokens[trial]
    rows = model.get_output_embeddings().weight
    direction, norm = rows[right] - rows[wrong], frozen_norm(model, final[0])
    heads = np.zeros((N_LAYERS, N_HEADS))
    rest = np.zeros(N_LAYERS)
    for layer in LAYERS:
        for head in range(N_HEADS):
            written = z[layer][-1, head] @ output_matrix(model, layer)[head]
            heads[layer, head] = norm(written) @ direction
        rest[layer] = norm(mlps[layer] + output_bias(model, layer)) @ direction
    bias = getattr(model.get_submodule(FINAL_NORM[kind]), "bias", None)
    return heads, rest, float(norm(entered[0]) @ direction), 0.0 if bias is None else float(bias @ direction)


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", MAIN)
def test_attribution_is_z_through_w_o_the_frozen_norm_and_the_answers_rows(name: str, direction: Direction) -> None:
    model = tiny(name)
    found = attribute(steps_of(model, direction), LAYERS)
    for trial in range(TRIALS.n_trials):
        heads, rest, start, constant = slow_attribution(model, TARGET[direction], trial)
        np.testing.assert_allclose(found.heads[:, :, trial], heads, atol=2e-5)
        np.testing.assert_allclose(found.rest[:, trial], rest, atol=2e-5)
        assert float(found.start[trial]) == pytest.approx(start, abs=2e-5)
        assert float(found.constant[trial]) == pytest.approx(constant, abs=2e-5)
    assert found.heads.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [*MAIN, "phi", "olmo", "qwen2", "qwen3", "opt"])
def test_heads_and_everything_else_sum_to_the_logit_difference(name: str, direction: Direction) -> None:
    model = tiny(name)
    expected = reference.run_logit_diff(model, TRIALS)[TARGET[direction]]
    for layers in (LAYERS, range(1, N_LAYERS)):
        found = attribute(steps_of(model, direction), layers)
        np.testing.assert_allclose(found.total(), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("olmo2", "Olmo2.* scales or norms what its heads write"),
        ("granite", "Granite.* scales or caps its logits"),
        ("cohere", "Cohere.* scales or caps its logits"),
        ("gemma2-capped-logits", "Gemma2.* scales or caps its logits"),
        ("opt-350m", "OPT.* projects its residual stream"),
    ],
)
def test_what_is_no_plain_product_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(Refusal, match=why):
        attribute(steps_of(tiny(name), "denoise"), LAYERS)


# --- attention ---


def stock_attention(model: PreTrainedModel, run: int, trial: int, layer: int) -> Tensor:
    """(head, position) from the last position."""
    tokens = reference.prompt(TRIALS, run, trial)
    patterns = model(tokens[None], output_attentions=True, use_cache=False).attentions
    return patterns[layer][0, :, -1]


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [*MAIN, "qwen3", "gpt2-scaled-by-layer", "granite", "phi"])
def test_attention_from_the_read_position_is_that_of_the_stock_model(name: str, direction: Direction) -> None:
    model = tiny(name)
    steps = steps_of(model, direction)
    for layer in LAYERS:
        found = attention(steps, layer)
        for trial in range(TRIALS.n_trials):
            expected = stock_attention(model, TARGET[direction], trial, layer)
            length = expected.shape[1]
            np.testing.assert_allclose(found[trial, :, :length], expected, atol=1e-5)
            assert not found[trial, :, length:].any(), "nothing ahead is seen"


def test_shares_are_sums_of_a_literal_pattern() -> None:
    pattern = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.0]], [[0.6, 0.4, 0.0, 0.0, 0.0]]])
    digits = torch.tensor([[True, False, True, False, True], [False, True, True, False, False]])
    found = shares(pattern, torch.tensor([3, 1]), digits)
    assert TO == ("first", "previous", "itself", "digits")
    np.testing.assert_allclose(found[:, 0], [[0.1, 0.3, 0.4, 0.4], [0.6, 0.6, 0.4, 0.4]], atol=1e-6)


def test_a_prompt_of_one_token_has_no_previous_one() -> None:
    found = shares(torch.tensor([[[1.0, 0.0]]]), torch.tensor([0]), torch.tensor([[False, False]]))
    assert found[0, 0].tolist() == [1, 0, 1, 0]


# --- weights ---


def full_circuits(model: PreTrainedModel, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """W_Q W_K^T and W_V W_O of one head, d_model x d_model, cut out of the modules by their names."""
    kind, width = model.config.model_type, D_MODEL // N_HEADS
    block = model.get_submodule(BLOCK[kind].format(layer))
    if kind == "gpt_neox":
        query, key, value = block.attention.query_key_value.weight.view(N_HEADS, 3, width, D_MODEL)[head].mT
    elif kind == "gpt2":
        query, key, value = block.attn.c_attn.weight.view(D_MODEL, 3, N_HEADS, width)[:, :, head].unbind(1)
    else:
        shared = head // (N_HEADS // model.config.num_key_value_heads)
        query = block.self_attn.q_proj.weight.view(-1, width, D_MODEL)[head].T
        key = block.self_attn.k_proj.weight.view(-1, width, D_MODEL)[shared].T
        value = block.self_attn.v_proj.weight.view(-1, width, D_MODEL)[shared].T
    return (query @ key.T).double(), (value @ output_matrix(model, layer)[head]).double()


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_circuits_are_those_cut_out_of_the_modules_by_name(name: str) -> None:
    model, other = tiny(name, 0), tiny(name, 1)
    found, before = (circuits(dressed(one), LAYERS) for one in (model, other))
    for layer in LAYERS:
        for kind in range(2):
            now, then = found[layer][kind], before[layer][kind]
            for head in range(N_HEADS):
                full, full_before = (full_circuits(one, layer, head)[kind] for one in (model, other))
                np.testing.assert_allclose(now.left[head] @ now.right[head].T, full, atol=1e-4)
                assert float(now.norm()[head]) == pytest.approx(float(full.norm()), rel=1e-5)
                change = (full - full_before).norm() / full_before.norm()
                assert float(now.change(then)[head]) == pytest.approx(float(change), rel=1e-5)
                cosine = (full * full_before).sum() / full.norm() / full_before.norm()
                assert float(now.cosine(then)[head]) == pytest.approx(float(cosine), abs=1e-6)


def test_a_small_change_is_not_lost_in_rounding() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right, push = (torch.randn(1, 20, 4, generator=draw) for _ in range(3))
    before, after = Circuit(left, right), Circuit(left + 1e-5 * push, right)
    exact = ((after.left - left).double() @ right.double().mT).norm() / (left.double() @ right.double().mT).norm()
    assert float(after.change(before)) == pytest.approx(float(exact), rel=1e-9)
    assert float(before.change(before)) == 0 and float(before.cosine(before)) == pytest.approx(1)


def test_circuits_outlive_the_weights_they_were_made_of() -> None:
    model, other = tiny("llama-gqa", 0), tiny("llama-gqa", 1)
    skeleton = dressed(model)
    held = circuits(skeleton, LAYERS)
    kept = held[0][1].norm().clone()
    for weight, changed in zip(skeleton.model.parameters(), other.parameters(), strict=True):
        weight.data.copy_(changed)
    assert torch.equal(held[0][1].norm(), kept)


@pytest.mark.parametrize(("name", "who"), [("qwen3", "Qwen3"), ("olmo", "Olmo")])
def test_queries_that_are_normed_or_clipped_have_no_circuit(name: str, who: str) -> None:
    with pytest.raises(Refusal, match=f"{who}.* norms or clips its queries"):
        circuits(dressed(tiny(name)), LAYERS)


# --- attribution patching ---


def pushed_logit_diff(model: PreTrainedModel, run: int, trial: int, layer: int, push: Tensor) -> Tensor:
    """Of a full stock forward with `push` (head, head_dim) added to z of the last position of a layer."""

    def add(z: Tensor) -> Tensor:
        before, last = z[:, :-1], z[:, -1:]
        return torch.cat([before, last + push], dim=1)

    tokens = reference.prompt(TRIALS, run, trial)
    with reference.before_output_projection(model, {layer: add}):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, -1]
    right, wrong = TRIALS.answer_tokens[trial]
    return logits[right] - logits[wrong]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", MAIN)
def test_the_gradient_is_that_of_a_full_stock_forward(name: str, direction: Direction) -> None:
    model = tiny(name)
    found = gradient(steps_of(model, direction), LAYERS)
    for trial in range(TRIALS.n_trials):
        for layer in LAYERS:
            push = torch.zeros(found.shape[2:], requires_grad=True)
            moved = pushed_logit_diff(model, TARGET[direction], trial, layer, push)
            [expected] = torch.autograd.grad(moved, push)
            np.testing.assert_allclose(found[layer, trial], expected, atol=2e-5)
    assert found.abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_the_gradient_is_the_limit_of_small_pushes_in_float64(name: str) -> None:
    """As small as they can be: stock attention takes its softmax in float32 even then."""
    model = tiny(name).double()
    found = gradient(steps_of(model, "denoise", torch.float64), LAYERS)
    draw = torch.Generator().manual_seed(0)
    for trial in range(TRIALS.n_trials):
        for layer in LAYERS:
            along = torch.randn(found.shape[2:], generator=draw, dtype=torch.float64)
            above, below = (
                pushed_logit_diff(model, reference.CORRUPT, trial, layer, sign * 1e-3 * along) for sign in (1, -1)
            )
            slope = (found[layer, trial].double() * along).sum()
            assert float(slope) == pytest.approx(float(above - below) / 2e-3, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_estimate_is_the_gradient_times_the_difference_of_z(direction: Direction) -> None:
    model = tiny("neox-parallel")
    steps = steps_of(model, direction)
    found, by_z = estimated_effect(steps, LAYERS), gradient(steps, LAYERS)
    for trial in range(TRIALS.n_trials):
        target, source = (
            reference.source_z(model, reference.prompt(TRIALS, run, trial))
            for run in (TARGET[direction], 1 - TARGET[direction])
        )
        for layer in LAYERS:
            expected = (by_z[layer, trial] * (source[layer][-1] - target[layer][-1])).sum(-1)
            np.testing.assert_allclose(found[layer, :, trial], expected, atol=2e-5)
