"""Laws of the mechanism: every quantity against its definition on stock models, prompt by prompt, with no padding."""

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.stats import pearsonr
from torch import Tensor
from transformers import PreTrainedModel

from headlapse.engine.capture.forward import capture
from headlapse.engine.capture.run import cache_series
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.mechanism.attention import ATTENDED_TO, attention, shares
from headlapse.engine.mechanism.attribution_patching import estimated_effect, gradient
from headlapse.engine.mechanism.circuits import Circuit, circuits
from headlapse.engine.mechanism.direct_logit_attribution import attribute
from headlapse.engine.mechanism.run import Values, make_plan, measure_series, wanted
from headlapse.engine.mechanism.store import MechanismRun, mechanism_path, open_mechanism
from headlapse.engine.mechanism.summary import approximation
from headlapse.engine.replay.layers import LayerRunner
from headlapse.engine.replay.patch_inputs import Direction, PatchInputs
from headlapse.engine.report.findings.mechanism import mechanism_summary, mechanism_text
from headlapse.engine.report.findings.roles import role_lines
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.store import Store
from headlapse.engine.study.alignment import align
from headlapse.engine.study.mechanism_settings import PARTS, MechanismSettings
from headlapse.engine.study.role_settings import ROLES
from headlapse.engine.study.study import Study
from tests import reference
from tests.models import D_MODEL, MAIN, N_HEADS, N_LAYERS, random_trials, save, tiny, tiny_tokenizer
from tests.test_capture import dressed
from tests.test_scripts import messages, run
from tests.test_store import replace_values

pytestmark = pytest.mark.thorough

TRIALS = random_trials(n_trials=3)
LAYERS = range(N_LAYERS)
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
TARGET = {"denoise": reference.CORRUPT, "noise": reference.CLEAN}
FINAL_NORM = {"gpt_neox": "gpt_neox.final_layer_norm", "gpt2": "transformer.ln_f", "llama": "model.norm"}
BLOCK = {"gpt_neox": "gpt_neox.layers.{}", "gpt2": "transformer.h.{}", "llama": "model.layers.{}"}


@functools.cache
def model_of(name: str, seed: int = 0) -> PreTrainedModel:
    """A model that no test changes."""
    return tiny(name, seed)


@functools.cache
def runner_of(model: PreTrainedModel, direction: Direction, dtype: torch.dtype = torch.float32) -> LayerRunner:
    resident = dressed(model, dtype)
    activations = capture(resident, TRIALS, 2**30)
    return LayerRunner(
        resident, PatchInputs.from_capture(resident, activations, TRIALS, align(TRIALS, "last"), direction)
    )


# --- direct logit attribution ---


@contextmanager
def last_rows(model: PreTrainedModel, path: str, of_input: bool) -> Iterator[list[Tensor]]:
    """What enters or leaves a module at the last position while the body runs."""
    seen: list[Tensor] = []
    if of_input:
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append((args or tuple(kwargs.values()))[0][0, -1]), with_kwargs=True
        )
    else:
        handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, output: seen.append(output[0, -1]))
    try:
        yield seen
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
    unembedding = model.get_output_embeddings().weight
    direction, norm = unembedding[right] - unembedding[wrong], frozen_norm(model, final[0])
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
    model = model_of(name)
    attribution = attribute(runner_of(model, direction), LAYERS)
    for trial in range(TRIALS.n_trials):
        heads, rest, start, constant = slow_attribution(model, TARGET[direction], trial)
        np.testing.assert_allclose(attribution.heads[:, :, trial], heads, atol=2e-5)
        np.testing.assert_allclose(attribution.rest[:, trial], rest, atol=2e-5)
        assert float(attribution.start[trial]) == pytest.approx(start, abs=2e-5)
        assert float(attribution.constant[trial]) == pytest.approx(constant, abs=2e-5)
    assert attribution.heads.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "direction"),
    [*product(MAIN, DIRECTIONS), ("phi", "noise"), ("olmo", "denoise"), ("qwen3", "noise"), ("opt", "denoise")],
)
def test_heads_and_everything_else_sum_to_the_logit_difference(name: str, direction: Direction) -> None:
    model = model_of(name)
    expected = reference.run_logit_diff(model, TRIALS)[TARGET[direction]]
    for layers in (LAYERS, range(1, N_LAYERS)):
        attribution = attribute(runner_of(model, direction), layers)
        np.testing.assert_allclose(attribution.total(), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("olmo2", "Olmo2.* scales or norms what its heads write"),
        ("granite", "Granite.* scales or caps its logits"),
        ("cohere", "Cohere.* scales or caps its logits"),
        ("gemma2-capped-logits", "Gemma2.* scales or caps its logits"),
        ("granite-plain-logits", "Granite.* scales or norms what its heads write"),
        ("opt-350m", "OPT.* projects its residual stream"),
    ],
)
def test_logits_that_are_no_plain_product_are_refused_by_name(name: str, why: str) -> None:
    model = tiny("granite", logits_scaling=1.0) if name == "granite-plain-logits" else model_of(name)
    with pytest.raises(UserError, match=why):
        attribute(runner_of(model, "denoise"), LAYERS)


# --- attention ---


def stock_attention(model: PreTrainedModel, run: int, trial: int, layer: int) -> Tensor:
    """(head, position) from the last position."""
    tokens = reference.prompt(TRIALS, run, trial)
    patterns = model(tokens[None], output_attentions=True, use_cache=False).attentions
    return patterns[layer][0, :, -1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *product(MAIN, DIRECTIONS),
        ("qwen3", "noise"),
        ("gpt2-scaled-by-layer", "denoise"),
        ("granite", "denoise"),
        ("phi", "noise"),
    ],
)
def test_attention_from_the_read_position_is_that_of_the_stock_model(name: str, direction: Direction) -> None:
    model = model_of(name)
    runner = runner_of(model, direction)
    for layer in LAYERS:
        pattern = attention(runner, layer)
        for trial in range(TRIALS.n_trials):
            expected = stock_attention(model, TARGET[direction], trial, layer)
            length = expected.shape[1]
            np.testing.assert_allclose(pattern[trial, :, :length], expected, atol=1e-5)
            assert not pattern[trial, :, length:].any(), "no later position is attended to"


def test_shares_are_sums_of_a_literal_pattern() -> None:
    pattern = torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.0]], [[0.6, 0.4, 0.0, 0.0, 0.0]]])
    digits = torch.tensor([[True, False, True, False, True], [False, True, True, False, False]])
    by_token = shares(pattern, torch.tensor([3, 1]), digits)
    assert ATTENDED_TO == ("first", "previous", "itself", "digits")
    np.testing.assert_allclose(by_token[:, 0], [[0.1, 0.3, 0.4, 0.4], [0.6, 0.6, 0.4, 0.4]], atol=1e-6)


def test_a_prompt_of_one_token_has_no_previous_one() -> None:
    by_token = shares(torch.tensor([[[1.0, 0.0]]]), torch.tensor([0]), torch.tensor([[False, False]]))
    assert by_token[0, 0].tolist() == [1, 0, 1, 0]


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
    model, other = model_of(name, 0), model_of(name, 1)
    of_model, of_other = (circuits(dressed(which), LAYERS) for which in (model, other))
    for layer in LAYERS:
        for kind in range(2):
            now, then = of_model[layer][kind], of_other[layer][kind]
            for head in range(N_HEADS):
                full, full_before = (full_circuits(which, layer, head)[kind] for which in (model, other))
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
    resident = dressed(model)
    by_layer = circuits(resident, LAYERS)
    norm = by_layer[0][1].norm().clone()
    for weight, changed in zip(resident.model.parameters(), other.parameters(), strict=True):
        weight.data.copy_(changed)
    assert torch.equal(by_layer[0][1].norm(), norm)


@pytest.mark.parametrize(("name", "who"), [("qwen3", "Qwen3"), ("olmo", "Olmo")])
def test_queries_that_are_normed_or_clipped_have_no_circuit(name: str, who: str) -> None:
    with pytest.raises(UserError, match=f"{who}.* norms or clips its queries"):
        circuits(dressed(model_of(name)), LAYERS)


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
    model = model_of(name)
    by_z = gradient(runner_of(model, direction), LAYERS)
    for trial in range(TRIALS.n_trials):
        for layer in LAYERS:
            push = torch.zeros(by_z.shape[2:], requires_grad=True)
            moved = pushed_logit_diff(model, TARGET[direction], trial, layer, push)
            [expected] = torch.autograd.grad(moved, push)
            np.testing.assert_allclose(by_z[layer, trial], expected, atol=2e-5)
    assert by_z.abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_the_gradient_is_the_limit_of_small_pushes_in_float64(name: str) -> None:
    """As small as they can be: stock attention takes its softmax in float32 even then."""
    model = tiny(name).double()
    by_z = gradient(runner_of(model, "denoise", torch.float64), LAYERS)
    draw = torch.Generator().manual_seed(0)
    for trial in range(TRIALS.n_trials):
        for layer in LAYERS:
            along = torch.randn(by_z.shape[2:], generator=draw, dtype=torch.float64)
            above, below = (
                pushed_logit_diff(model, reference.CORRUPT, trial, layer, sign * 1e-3 * along) for sign in (1, -1)
            )
            slope = (by_z[layer, trial].double() * along).sum()
            assert float(slope) == pytest.approx(float(above - below) / 2e-3, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_estimate_is_the_gradient_times_the_difference_of_z(direction: Direction) -> None:
    model = tiny("neox-parallel")
    runner = runner_of(model, direction)
    estimate, by_z = estimated_effect(runner, LAYERS), gradient(runner, LAYERS)
    for trial in range(TRIALS.n_trials):
        target, source = (
            reference.source_z(model, reference.prompt(TRIALS, run, trial))
            for run in (TARGET[direction], 1 - TARGET[direction])
        )
        for layer in LAYERS:
            expected = (by_z[layer, trial] * (source[layer][-1] - target[layer][-1])).sum(-1)
            np.testing.assert_allclose(estimate[layer, :, trial], expected, atol=2e-5)


# --- a series in its store ---

LABELS = ["step0", "step10", "step20"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for seed, label in enumerate(LABELS):
        save(model_of("llama-gqa", seed), directory / label, tokenizer=tiny_tokenizer())
    return directory


def cached(files: Path, path: Path, labels: Sequence[str] = ()) -> Store:
    study = Study(str(files), trials=3)
    list(cache_series(study, resolve(study.model, labels, path.parent), path, path.parent, Machine()))
    return Store(path)


def measured(store: Store, labels: Sequence[str] = ("all",), parts: Sequence[str] = PARTS) -> MechanismRun:
    plan = make_plan(store, parts)
    run = open_mechanism(store, plan.settings)
    selected = wanted(store, list(store.complete()) if labels == ("all",) else labels)
    missing = {label: selected[label] for label in run.missing(selected)}
    outcomes = list(measure_series(store, plan, run, missing, store.path.parent, Machine(), lambda _n: None))
    assert [(outcome.label, outcome.problem) for outcome in outcomes] == [(label, None) for label in missing]
    return run


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Cached and measured; no test writes to it."""
    store = cached(files, tmp_path_factory.mktemp("whole") / "s.zarr")
    measured(store)
    return store


@pytest.fixture
def store(whole: Store, tmp_path: Path) -> Store:
    """Cached, not measured, one's own."""
    shutil.copytree(whole.path, tmp_path / "s.zarr", ignore=shutil.ignore_patterns("mechanism"))
    return Store(tmp_path / "s.zarr")


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints that are measured from here on."""
    labels: list[str] = []
    write = MechanismRun.write

    def note(self: MechanismRun, label: str, values: Values, neighbours: dict[str, str], **fields: Any) -> None:
        labels.append(label)
        write(self, label, values, neighbours, **fields)

    monkeypatch.setattr(MechanismRun, "write", note)
    return labels


def results_of(store: Store) -> xr.Dataset:
    return xr.open_zarr(mechanism_path(store), consolidated=False).drop_vars("record").load()


def test_the_results_open_in_xarray_with_labelled_dimensions(whole: Store) -> None:
    results = results_of(whole)
    dims = {str(name): tuple(map(str, array.dims)) for name, array in results.data_vars.items()}
    assert dims == {
        "attribution": ("checkpoint", "layer", "head", "run", "trial"),
        "attribution_rest": ("checkpoint", "layer", "run", "trial"),
        "attribution_start": ("checkpoint", "run", "trial"),
        "attribution_constant": ("checkpoint", "run", "trial"),
        "self_check": ("checkpoint",),
        "attention": ("checkpoint", "layer", "head", "run", "trial", "to"),
        "norm": ("checkpoint", "circuit", "layer", "head"),
        "change": ("checkpoint", "circuit", "layer", "head"),
        "to_previous": ("checkpoint", "circuit", "layer", "head"),
        "to_last": ("checkpoint", "circuit", "layer", "head"),
        "effect": ("checkpoint", "layer", "head", "trial"),
        "estimate": ("checkpoint", "layer", "head", "trial"),
        "role_score": ("checkpoint", "layer", "head", "role"),
        "role_null": ("checkpoint", "layer", "head", "role"),
        "role_p": ("checkpoint", "layer", "head", "role"),
        "name_copying": ("checkpoint", "layer", "head"),
        "loss_first": ("checkpoint", "sequence"),
        "loss_second": ("checkpoint", "sequence"),
    }
    assert list(results.to.values) == list(ATTENDED_TO) and list(results.circuit.values) == ["QK", "OV"]
    assert results.complete.all() and list(results.checkpoint.values) == LABELS
    assert list(results.previous.values) == ["", "step0", "step10"] and set(results["last"].values) == {"step20"}


@torch.no_grad()
def test_the_results_are_those_of_the_stock_models(whole: Store) -> None:
    results, trials = results_of(whole), whole.trials()
    for seed, label in enumerate(LABELS):
        at_step, model = results.sel(checkpoint=label), model_of("llama-gqa", seed)
        plain = reference.run_logit_diff(model, trials)
        shares_of = at_step.attribution.sum(["layer", "head"]) + at_step.attribution_rest.sum("layer")
        total = shares_of + at_step.attribution_start + at_step.attribution_constant
        np.testing.assert_allclose(total.transpose("run", "trial"), plain, atol=1e-4)
        for side, trial in np.ndindex(2, 3):
            expected = model(reference.prompt(trials, side, trial)[None], output_attentions=True).attentions[1][
                0, :, -1
            ]
            text = trials.token_text[side, trial, : expected.shape[1]]
            digits = torch.tensor([any(c in "0123456789" for c in token) for token in text])
            seen = at_step.attention.isel(layer=1, run=side, trial=trial)
            np.testing.assert_allclose(seen.sel(to="digits"), (expected * digits).sum(1), atol=1e-5)
            np.testing.assert_allclose(seen.sel(to="first"), expected[:, 0], atol=1e-5)
            np.testing.assert_allclose(seen.sel(to="previous"), expected[:, -2], atol=1e-5)
        for layer, head in ((0, 1), (2, 5)):
            patched = reference.logit_diff(model, trials, "last", [layer], [head], "denoise")
            exact = at_step.effect.isel(layer=layer, head=head)
            np.testing.assert_allclose(exact, patched - plain[reference.CORRUPT], atol=1e-4)
            full = full_circuits(model, layer, head)
            for kind in range(2):
                assert float(at_step.norm[kind, layer, head]) == pytest.approx(float(full[kind].norm()), rel=1e-5)
                before = full_circuits(model_of("llama-gqa", max(seed - 1, 0)), layer, head)[kind]
                last = full_circuits(model_of("llama-gqa", 2), layer, head)[kind]
                change = float((full[kind] - before).norm() / before.norm())
                expected_change = np.nan if seed == 0 else change
                np.testing.assert_allclose(at_step.change[kind, layer, head], expected_change, rtol=1e-5)
                cosine = float((full[kind] * last).sum() / full[kind].norm() / last.norm())
                assert float(at_step.to_last[kind, layer, head]) == pytest.approx(cosine, abs=1e-6)


@pytest.mark.slow
def test_only_missing_checkpoints_are_measured_and_they_are_what_they_are_in_one_go(
    store: Store, whole: Store, visited: list[str]
) -> None:
    measured(store, ["step10"])
    assert visited == ["step10"] and list(MechanismRun(mechanism_path(store)).complete()) == ["step10"]
    measured(store)
    assert visited == ["step10", "step0", "step20"]
    measured(store)
    assert len(visited) == 3
    xr.testing.assert_identical(results_of(store).drop_attrs(), results_of(whole).drop_attrs())


def test_what_was_cut_off_is_measured_again(store: Store, monkeypatch: pytest.MonkeyPatch, visited: list[str]) -> None:
    write = MechanismRun.write

    def cut(self: MechanismRun, label: str, values: Values, neighbours: dict[str, str], **fields: Any) -> None:
        if label == "step10":
            raise KeyboardInterrupt
        write(self, label, values, neighbours, **fields)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MechanismRun, "write", cut)
        measured(store, parts=["attention"])
    visited.clear()
    measured(store, parts=["attention"])
    assert visited == ["step10", "step20"] and results_of(store).complete.all()


@pytest.mark.slow
def test_checkpoints_whose_neighbours_changed_are_compared_anew(
    files: Path, tmp_path: Path, whole: Store, visited: list[str]
) -> None:
    store = cached(files, tmp_path / "s.zarr", ["step0", "step10"])
    measured(store, parts=["weights"])
    assert set(results_of(store)["last"].values) == {"step10"}
    measured(cached(files, store.path, LABELS), parts=["weights"])
    assert visited == ["step0", "step10", *LABELS]
    results = results_of(store).drop_attrs()
    xr.testing.assert_identical(results, results_of(whole).drop_attrs()[list(results.data_vars)])


def test_parts_are_measured_alone_and_other_parts_need_overwrite(store: Store, whole: Store) -> None:
    results = measured(store, parts=["attention", "patching"]).load()
    assert set(results.data_vars) == {"attention", "effect", "estimate"}
    assert np.array_equal(results.attention, results_of(whole).attention)
    with pytest.raises(UserError, match=r"parts is .* replace it with --overwrite"):
        measured(store)


@pytest.mark.slow
def test_a_store_of_later_layers_is_measured_from_its_first(files: Path, tmp_path: Path, whole: Store) -> None:
    study = Study(str(files), trials=3, sites=("1",))
    list(cache_series(study, resolve(study.model, [], tmp_path), tmp_path / "s.zarr", tmp_path, Machine()))
    results = measured(Store(tmp_path / "s.zarr")).load()
    assert list(results.layer.values) == [1, 2]
    for name in ("attribution", "attention", "norm", "effect", "estimate"):
        np.testing.assert_allclose(results[name], results_of(whole)[name].sel(layer=[1, 2]), atol=2e-5)


def test_a_store_of_z_alone_is_refused(files: Path, tmp_path: Path) -> None:
    study = Study(str(files), trials=3, sites=("z",))
    list(cache_series(study, resolve(study.model, ["step0"], tmp_path), tmp_path / "z.zarr", tmp_path, Machine()))
    with pytest.raises(UserError, match="cached with --sites z"):
        make_plan(Store(tmp_path / "z.zarr"))


# --- text for people ---


def test_approximation_is_pearsons_correlation_and_the_errors(whole: Store) -> None:
    results = results_of(whole)
    quality = approximation(results)
    for index in range(len(LABELS)):
        at_step = results.isel(checkpoint=index)
        exact, estimate = at_step.effect.values, at_step.estimate.values
        expected = pearsonr(estimate.ravel(), exact.ravel()).statistic
        assert float(quality.of_all_correlation[index]) == pytest.approx(expected, abs=1e-6)
        assert float(quality.of_all_largest_error[index]) == pytest.approx(np.abs(estimate - exact).max())
        for layer in LAYERS:
            expected = pearsonr(estimate[layer].ravel(), exact[layer].ravel()).statistic
            assert float(quality.correlation[index, layer]) == pytest.approx(expected, abs=1e-6)
            assert float(quality.mean_error[index, layer]) == pytest.approx(np.abs(estimate - exact)[layer].mean())


def test_effects_that_do_not_vary_have_no_correlation(whole: Store) -> None:
    quality = approximation(results_of(whole).assign(effect=lambda results: results.effect * 0))
    assert np.isnan(quality.correlation).all() and np.isnan(quality.of_all_correlation).all()


def test_the_row_names_the_head_with_the_largest_attribution_and_the_largest_change(whole: Store) -> None:
    results = results_of(whole)
    at_last = results.sel(checkpoint="step20")
    size = np.abs(at_last.attribution.mean("trial")).max("run").values
    layer, head = np.unravel_index(size.argmax(), size.shape)
    change = at_last.change.values
    circuit, changed_layer, changed_head = np.unravel_index(change.argmax(), change.shape)
    finding = mechanism_text(results, make_plan(whole).settings)
    assert finding.table is not None and isinstance(finding.numbers, pd.DataFrame)
    row = finding.table.loc["step20"]
    assert row["top head"] == f"L{layer}.H{head}"
    assert row["clean"] == f"{float(at_last.attribution[layer, head, 0].mean()):+.2f}"
    assert row["most changed"].startswith(f"L{changed_layer}.H{changed_head} {('QK', 'OV')[circuit]} ")
    assert finding.table.loc["step0", "most changed"] == "–"
    assert max(map(len, str(finding).splitlines())) <= 100
    assert len(finding.numbers) == len(LABELS) * N_LAYERS * N_HEADS
    value = finding.numbers.loc[("step20", layer, head), "attribution_clean"]
    assert float(value) == pytest.approx(float(at_last.attribution[layer, head, 0].mean()))


@pytest.mark.parametrize(
    ("part", "columns"),
    [
        ("attribution", ["top head", "clean", "corrupt"]),
        ("attention", ["attends to"]),
        ("weights", ["most changed", "QK cosine", "OV cosine"]),
        ("patching", ["r", "error", "largest"]),
    ],
)
def test_each_part_has_a_table_of_its_own(whole: Store, part: str, columns: list[str]) -> None:
    finding = mechanism_text(results_of(whole), make_plan(whole, [part]).settings)
    assert finding.table is not None and finding.numbers is not None
    assert list(finding.table.columns) == columns and len(finding.notes) == 1
    assert finding.numbers.notnull().any().all()


@pytest.mark.parametrize("parts", [PARTS, *((part,) for part in PARTS)])
def test_the_summary_is_eight_short_lines_that_name_the_heads(whole: Store, parts: tuple[str, ...]) -> None:
    """And, before them, at most sixteen about roles: `tests/test_roles.py`."""
    results = results_of(whole)
    lines = mechanism_summary(results, make_plan(whole, parts).settings, whole.study)
    if "roles" in parts:
        about_roles = list(role_lines(results, make_plan(whole, parts).settings))
        assert lines[1 : 1 + len(about_roles)] == about_roles and len(about_roles) <= 16
        del lines[1 : 1 + len(about_roles)]
    assert 2 - (parts == ("roles",)) <= len(lines) <= 8 and max(map(len, lines)) <= 100
    assert "at step20, the last of 3 checkpoints" in lines[0]
    text = "\n".join(lines[1:])
    final = results.sel(checkpoint="step20")
    if "attribution" in parts:
        size = np.abs(final.attribution.mean("trial")).max("run").values
        places = np.argsort(-size.ravel())[:3]
        expected = [f"L{layer}.H{head}" for layer, head in zip(*np.unravel_index(places, size.shape), strict=True)]
        assert [line.split()[0] for line in lines[2:5]] == expected
        layer, head = np.unravel_index(size.argmax(), size.shape)
        assert lines[2].split()[1] == f"{float(final.attribution[layer, head, 0].mean()):+.2f}"
    if "attention" in parts:
        assert "attends to" in text
    if "weights" in parts:
        circuit, layer, head = np.unravel_index(final.change.values.argmax(), final.change.shape)
        assert f"since step10: {('QK', 'OV')[circuit]} of L{layer}.H{head}, " in text
    if "patching" in parts:
        effect = final.effect.mean("trial").values
        layer, head = np.unravel_index(np.abs(effect).argmax(), effect.shape)
        r = pearsonr(final.estimate.values.ravel(), final.effect.values.ravel()).statistic
        assert f"r = {r:.2f} with exact effects (denoise), " in text and f"; L{layer}.H{head} " in text
        assert f"exact {effect[layer, head]:+.2f} nats" in text


def test_the_summary_of_nothing_finished_is_empty(whole: Store) -> None:
    unfinished = results_of(whole).assign_coords(complete=("checkpoint", [False] * 3))
    assert mechanism_summary(unfinished, make_plan(whole).settings, whole.study) == []


def test_the_record_of_settings_is_as_older_runs_wrote_it() -> None:
    record = {"parts": ["attribution", "weights"], "direction": "noise", "positions": "last", "dtype": "tf32"}
    settings = MechanismSettings.of_parts(["weights", "attribution"], "noise", "tf32")
    assert settings.to_attributes() == record and list(settings.to_attributes()) == list(record)
    assert MechanismSettings.from_attributes(record) == settings


# --- the command ---


@pytest.mark.slow
def test_the_command_measures_prints_resumes_and_says_what_is_wrong(files: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(files, tmp_path / "own"))
    assert run("cache", "--model", own, "--trials", 3, cache=tmp_path).returncode == 0
    (own / "step10" / "model.safetensors").write_bytes((own / "step20" / "model.safetensors").read_bytes())
    failed = run("mechanism", cache=tmp_path)
    assert failed.returncode == 1
    [line] = messages(failed)
    assert line.startswith("error: step10: ") and "are not those that were cached" in line
    [path] = tmp_path.glob("*.zarr")
    results = results_of(Store(path))
    assert list(results.complete.values) == [True, False, True]
    assert np.isnan(results.change.sel(checkpoint="step20")).all() and results.previous.values[2] == ""
    only_compared = run("mechanism", "--checkpoints", "step20", cache=tmp_path)
    assert only_compared.returncode == 1 and messages(only_compared) == [line], (
        "a comparison that fails is never silent"
    )
    shutil.copy(files / "step10" / "model.safetensors", own / "step10")
    restored = run("mechanism", "--verbose", cache=tmp_path)
    assert restored.returncode == 0, restored.stderr
    assert "2 checkpoints in" in restored.stdout
    assert [row.split()[0] for row in restored.stdout.splitlines()[1:4]] == LABELS
    again = run("mechanism", "--checkpoints", "step0..step10", cache=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = run("mechanism", "--direction", "noise", cache=tmp_path)
    assert other.returncode == 2 and "--overwrite" in messages(other)[0]
    assert run("mechanism", "--direction", "noise", "--overwrite", cache=tmp_path).returncode == 0
    unknown = run("mechanism", "--checkpoints", "step7", cache=tmp_path)
    assert unknown.returncode == 2 and "not among the 3 checkpoints" in messages(unknown)[0]


@pytest.mark.slow
def test_contributions_that_miss_the_stored_logit_difference_fail_and_nothing_is_written(
    whole: Store, tmp_path: Path
) -> None:
    path = shutil.copytree(whole.path, tmp_path / "s.zarr", ignore=shutil.ignore_patterns("mechanism"))
    off = {"step10": np.array([0.1, 0.0])}
    replace_values(Store(path), "answer_logits", lambda values, label: values + off.get(label, 0))
    failed = run("mechanism", path, cache=tmp_path)
    assert failed.returncode == 1 and messages(failed)[0].startswith("error: step10: the contributions of the heads")
    assert list(results_of(Store(path)).complete.values) == [True, False, True]


@pytest.mark.slow
def test_the_report_shows_what_was_measured(files: Path, tmp_path: Path) -> None:
    assert run("cache", "--model", files, "--trials", 3, cache=tmp_path).returncode == 0
    assert run("patch", "--layers", "1", cache=tmp_path).returncode == 0
    assert run("mechanism", "--parts", "attribution", "roles", cache=tmp_path).returncode == 0
    reported = run("report", cache=tmp_path)
    assert reported.returncode == 0, reported.stderr
    page = Path(reported.stdout.strip())
    assert "<h3>Mechanism</h3>" in page.read_text() and len(pd.read_csv(page.parent / "mechanism.csv"))
    assert "<h3>Roles of heads</h3>" in page.read_text() and "score at least 0.3 above its null" in page.read_text()
    assert len(pd.read_csv(page.parent / "roles.csv")) == len(LABELS) * len(ROLES) * N_LAYERS * N_HEADS
