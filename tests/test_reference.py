"""Laws of the reference itself, two models worked out by hand, and of the models that tests run on."""

from dataclasses import replace
from math import log, sqrt
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, PreTrainedConfig, PreTrainedModel

from headlapse.engine.study.prompts import draw_trials
from tests.models import (
    FORMS,
    LEARNED_POSITIONS,
    MAIN,
    MORE,
    N_HEADS,
    N_LAYERS,
    SHARD_BYTES,
    Form,
    Lengths,
    clean_to_clean,
    legacy_buffers,
    random_subsets,
    random_trials,
    save,
    swapped,
    tiny,
    tiny_tokenizer,
    trials_of,
)
from tests.reference import (
    CLEAN,
    CORRUPT,
    Direction,
    aligned,
    answer_logits,
    logit_diff,
    logit_diffs,
    prompt,
    run_logit_diff,
    source_z,
)

SUPPORTED = [*MAIN, *MORE]
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
ROUNDING = 1e-5
"""Of a logit difference of order 1 in float32: products differ in their last bits with batch and place in memory."""


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


def heads_of(model: PreTrainedModel) -> range:
    return range(model.config.num_attention_heads)


# By hand
#
# The residual stream is (a, -a, b, -b), so the final norm only divides by its root mean square sqrt((a^2 + b^2) / 2),
# and right - wrong = a - (-a) becomes 2a / sqrt((a^2 + b^2) / 2).  All embeddings are of +1 and -1, which norms leave
# alone; epsilon is 0 and the MLP adds nothing.  Head 0 averages a over the prompt and adds it to a, head 1 does the
# same with b.

RIGHT, WRONG = 4, 5


def by_hand(config: PreTrainedConfig, weights: dict[str, list[tuple[tuple[int, ...], float]]]) -> PreTrainedModel:
    """All weights 0 but the named entries; gains 1; the answers' logits are the first number and the second."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0)
            for index, value in weights.pop(name, []):
                parameter[index] = value
        unembedding = model.get_output_embeddings().weight
        unembedding[RIGHT, 0] = unembedding[WRONG, 1] = 1.0
    assert not weights
    return model.eval()


def row(token: int, *values: float) -> list[tuple[tuple[int, ...], float]]:
    return [((token, column), value) for column, value in enumerate(values)]


def neox_by_hand() -> PreTrainedModel:
    """Queries are 0, so every head looks at all positions alike."""
    config = GPTNeoXConfig(
        vocab_size=6,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        layer_norm_eps=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    fused = "gpt_neox.layers.0.attention.query_key_value.weight"
    dense = "gpt_neox.layers.0.attention.dense.weight"
    return by_hand(
        config,
        {
            "gpt_neox.embed_in.weight": [*row(1, 1, -1, 1, -1), *row(2, -1, 1, -1, 1)],
            # Rows are per head (query, key, value) of 2 each: 4 is head 0's first value, 10 is head 1's.
            fused: [((4, 0), 1.0), ((10, 2), 1.0)],
            # Head 0 times -2 onto a, head 1 times 6 onto b.
            dense: [((0, 0), -2.0), ((1, 0), 2.0), ((2, 2), 6.0), ((3, 2), -6.0)],
        },
    )


@pytest.mark.parametrize(
    ("heads", "denoised", "noised"),
    [
        # Clean is 1 1 with (a, b) = (1, 1) twice: both heads average 1.  Corrupt is 2 1: both average 0.
        ([], 2.0, -0.4),  # (1, 1) / 1 and (-1, 7) / 5
        ([0], -2.0, 0.4),  # (-1, 1) / 1 and (1, 7) / 5
        ([1], 0.4, -2.0),  # (1, 7) / 5 and (-1, 1) / 1
        ([0, 1], -0.4, 2.0),  # (-1, 7) / 5 and (1, 1) / 1
    ],
)
def test_a_neox_with_even_attention_worked_by_hand(heads: list[int], denoised: float, noised: float) -> None:
    trials = trials_of(clean=[[1, 1]], corrupt=[[2, 1]], answers=[(RIGHT, WRONG)])
    for direction, expected in zip(DIRECTIONS, (denoised, noised), strict=True):
        for positions in ("last", "end:2", "all"):  # one layer: what is patched elsewhere is never read
            found = logit_diff(neox_by_hand(), trials, positions, [0], heads, direction)
            assert found == pytest.approx([expected], abs=1e-6)


def gpt2_by_hand() -> PreTrainedModel:
    """A token with a = 1 gets three times the attention of one with a = -1."""
    config = GPT2Config(
        vocab_size=6,
        n_embd=4,
        n_inner=4,
        n_layer=1,
        n_head=2,
        n_positions=8,
        layer_norm_epsilon=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    attention = "transformer.h.0.attn"
    return by_hand(
        config,
        {
            "transformer.wte.weight": [*row(1, 1, -1, -1, 1), *row(2, -1, 1, -1, 1), *row(3, 1, -1, 1, -1)],
            # Columns are queries, keys, values, each of two heads of 2: 4 and 6 are keys, 8 and 10 values.
            f"{attention}.c_attn.weight": [((0, 4), 0.5), ((0, 6), 0.5), ((0, 8), 1.0), ((2, 10), 1.0)],
            f"{attention}.c_attn.bias": [((0,), sqrt(2) * log(3)), ((2,), sqrt(2) * log(3))],
            # Head 0 times 4 onto a, head 1 times 6 onto b.
            f"{attention}.c_proj.weight": [*row(0, 4, -4, 0, 0), *row(2, 0, 0, 6, -6)],
        },
    )


@pytest.mark.parametrize(
    ("heads", "denoised", "noised"),
    [
        # Clean is 1 1 3: a = 1, 1, 1, so even attention; head 0 averages 1, and head 1 the b = -1, -1, 1 to -1/3.
        # Corrupt is 2 3: a = b = -1, 1 with attention 1/4 and 3/4: both average 1/2.
        ([], 6 / sqrt(12.5), 10 / sqrt(13)),  # (1 + 4/2, 1 + 6/2) = (3, 4) and (1 + 4, 1 - 6/3) = (5, -1)
        ([0], 10 / sqrt(20.5), 6 / sqrt(5)),  # (5, 4) and (3, -1)
        ([1], 6 / sqrt(5), 10 / sqrt(20.5)),  # (3, -1) and (5, 4)
        ([0, 1], 10 / sqrt(13), 6 / sqrt(12.5)),  # (5, -1) and (3, 4)
    ],
)
def test_a_gpt2_with_uneven_attention_worked_by_hand(heads: list[int], denoised: float, noised: float) -> None:
    trials = trials_of(clean=[[1, 1, 3]], corrupt=[[2, 3]], answers=[(RIGHT, WRONG)])
    for direction, expected in zip(DIRECTIONS, (denoised, noised), strict=True):
        for positions in ("last", "end:2"):
            found = logit_diff(gpt2_by_hand(), trials, positions, [0], heads, direction)
            assert found == pytest.approx([expected], abs=1e-6)


def test_a_trial_is_read_at_its_own_answers() -> None:
    rows = [[1, 1], [1, 1]]
    trials = trials_of(clean=rows, corrupt=[[2, 1], [2, 1]], answers=[(RIGHT, WRONG), (WRONG, RIGHT)])
    assert logit_diff(neox_by_hand(), trials, "last", [0], [1], "denoise") == pytest.approx([0.4, -0.4], abs=1e-6)
    assert run_logit_diff(neox_by_hand(), trials) == pytest.approx(np.array([[-0.4, 0.4], [2.0, -2.0]]), abs=1e-6)


# Positions


def test_positions_are_paired_from_the_end() -> None:
    assert aligned("last", 3, 5) == [(2, 4)]
    assert aligned("end:1", 3, 5) == [(2, 4)]
    assert aligned("end:3", 3, 5) == [(0, 2), (1, 3), (2, 4)]
    assert aligned("all", 2, 2) == [(0, 0), (1, 1)]


# Laws on random models


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_patching_no_head_is_the_target_run(name: str, direction: Direction) -> None:
    model, trials = tiny(name), random_trials()
    target = run_logit_diff(model, trials)[CORRUPT if direction == "denoise" else CLEAN]
    for positions in ("last", "end:3"):
        found = logit_diff(model, trials, positions, range(N_LAYERS), [], direction)
        assert_same(found, target)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_patching_every_head_of_every_layer_is_the_source_run_where_the_last_tokens_are_the_same(
    name: str, direction: Direction
) -> None:
    """Beyond z, the last position only knows its own token and, with learned positions, its place."""
    model = tiny(name)
    trials = random_trials(lengths="paired" if name in LEARNED_POSITIONS else "unequal", shared_end=1)
    source = run_logit_diff(model, trials)[CLEAN if direction == "denoise" else CORRUPT]
    found = logit_diff(model, trials, "last", range(N_LAYERS), heads_of(model), direction)
    assert_same(found, source)


@pytest.mark.parametrize("name", MAIN)
def test_patching_every_head_of_every_layer_is_not_the_source_run_where_token_or_learned_place_differ(
    name: str,
) -> None:
    model = tiny(name)
    for shared_end in (0, 1) if name in LEARNED_POSITIONS else (0,):
        trials = random_trials(shared_end=shared_end)
        found = logit_diff(model, trials, "last", range(N_LAYERS), heads_of(model), "denoise")
        assert np.abs(found - run_logit_diff(model, trials)[CLEAN]).mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_clean_to_clean_patch_changes_nothing(name: str) -> None:
    model, trials = tiny(name), clean_to_clean(random_trials())
    clean = run_logit_diff(model, trials)[CLEAN]
    for positions in ("last", "end:3", "all"):
        for layers in ([0], [1], range(N_LAYERS)):
            for heads in ([0], [1, 3], heads_of(model)):
                found = logit_diff(model, trials, positions, layers, heads, "denoise")
                assert_same(found, clean)


@pytest.mark.parametrize("name", MAIN)
def test_noise_is_denoise_with_the_runs_swapped(name: str) -> None:
    model, trials = tiny(name), random_trials()
    noised = logit_diff(model, trials, "end:3", [0, 1], [1, 4, 6], "noise")
    assert_same(noised, logit_diff(model, swapped(trials), "end:3", [0, 1], [1, 4, 6], "denoise"))


def test_padding_is_never_read() -> None:
    model, trials = tiny("gpt2"), random_trials()
    padded = np.arange(trials.tokens.shape[-1]) >= trials.length[..., None]
    other = replace(trials, tokens=np.where(padded, 7, trials.tokens))
    assert padded.any()
    assert_same(answer_logits(model, trials), answer_logits(model, other))
    found, again = (logit_diff(model, each, "end:3", [0], [2], "noise") for each in (trials, other))
    assert_same(found, again)


def test_a_patch_in_the_last_layer_adds_what_its_heads_write_to_the_residual_stream() -> None:
    """resid_post = target + sum over patched heads of (z_source - z_target) W_O, with a parallel residual."""
    model, trials, heads = tiny("neox-parallel"), random_trials(n_trials=1), [0, 3, 7]
    z_source, z_target = (source_z(model, prompt(trials, run, 0))[N_LAYERS - 1][-1] for run in (CLEAN, CORRUPT))
    stack: Any = model.get_submodule("gpt_neox")
    resid: list[Tensor] = []
    handle = stack.final_layer_norm.register_forward_pre_hook(lambda _, args: resid.append(args[0]))
    with torch.no_grad():
        with handle:
            model(input_ids=prompt(trials, CORRUPT, 0)[None])
        w_o = stack.layers[-1].attention.dense.weight.unflatten(1, (N_HEADS, -1))
        written = torch.einsum("hd,ohd->o", (z_source - z_target)[heads], w_o[:, heads])
        unembed: Any = model.get_output_embeddings()
        logits = unembed(stack.final_layer_norm(resid[0][0, -1] + written))
    right, wrong = trials.answer_tokens[0]
    found = logit_diff(model, trials, "last", [N_LAYERS - 1], heads, "denoise")
    assert found == pytest.approx([float(logits[right] - logits[wrong])], abs=ROUNDING)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_subsets_in_one_batch_equal_one_at_a_time(name: str, direction: Direction) -> None:
    model = tiny(name)
    mask = random_subsets(4, len(heads_of(model)))
    for positions in ("last", "end:3", "all"):
        trials = random_trials(lengths="paired" if positions == "all" else "unequal")
        for layers in ([0], [1, 2]):
            batched = logit_diffs(model, trials, positions, layers, mask, direction)
            each = [logit_diff(model, trials, positions, layers, np.flatnonzero(row), direction) for row in mask]
            assert_same(batched, np.array(each))


# The models


@pytest.mark.parametrize("name", SUPPORTED)
def test_patches_are_felt(name: str) -> None:
    """Otherwise a wrong patched run could pass for a right one."""
    model, trials = tiny(name), random_trials(6)
    target = run_logit_diff(model, trials)[CORRUPT]
    assert 0.5 < np.abs(target).mean() < 10
    single = np.eye(len(heads_of(model)), dtype=bool)
    for layer in range(N_LAYERS):
        everything, each = (
            logit_diffs(model, trials, "last", [layer], mask, "denoise") for mask in (np.ones_like(single[:1]), single)
        )
        assert np.abs(everything - target).mean() > 0.1
        assert (np.abs(each - target).max(axis=1) > 5e-3).all()


@pytest.mark.parametrize("name", SUPPORTED)
def test_attention_is_far_from_even(name: str) -> None:
    model, tokens = tiny(name), prompt(random_trials(), CLEAN, 0)
    with torch.no_grad():
        attentions = model(input_ids=tokens[None], output_attentions=True).attentions
    largest = torch.stack([weights[0, :, -1].amax(-1) for weights in attentions])
    assert largest.mean() > 1.5 / len(tokens)


def test_a_seed_gives_the_same_model_again_and_another_seed_another() -> None:
    first, again, other = (tiny("llama-gqa", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MAIN)
def test_stock_transformers_reads_back_what_is_saved(name: str, form: Form, tmp_path: Path) -> None:
    model = tiny(name)
    extra = legacy_buffers(model) if name == "neox-parallel" and form.endswith("bin") else None
    save(model, tmp_path, form, tiny_tokenizer(), extra)
    suffix = "bin" if form.endswith("bin") else "safetensors"
    files = [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".safetensors")]
    assert {path.suffix for path in files} == {f".{suffix}"}
    assert (len(files) > 1) == form.startswith("sharded") == (tmp_path / f"{weights_name(suffix)}.index.json").exists()
    assert len(files) == 1 or max(path.stat().st_size for path in files) < 2 * SHARD_BYTES
    read = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    trials = random_trials()
    assert_same(answer_logits(read, trials), answer_logits(model, trials))


def weights_name(suffix: str) -> str:
    return {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[suffix]


def test_the_tokenizer_covers_the_decimal_prompts() -> None:
    tokenizer = tiny_tokenizer()
    words = tokenizer.convert_ids_to_tokens(tokenizer("Q: Which is bigger: 9.8 or 9.11?\nA:")["input_ids"])
    assert words == [*"Q:", "Which", "is", "bigger", *":9.8", "or", *"9.11?\nA:"]
    trials = draw_trials("decimal", 20, tokenizer, 64)
    assert trials.n_trials == 20 and trials.notes == ()


@pytest.mark.parametrize("lengths", get_args(Lengths))
@pytest.mark.parametrize("shared_end", [0, 1, 3])
def test_random_trials_have_the_lengths_and_the_shared_end_asked_for(lengths: Lengths, shared_end: int) -> None:
    trials = random_trials(4, seed=3, lengths=lengths, shared_end=shared_end)
    clean, corrupt = trials.length
    assert len(np.unique(trials.length)) == {"unequal": 8, "paired": 4, "equal": 1}[lengths]
    assert (lengths == "unequal") == (clean != corrupt).any()
    for trial in range(4):
        a, b = prompt(trials, CLEAN, trial), prompt(trials, CORRUPT, trial)
        assert torch.equal(a[len(a) - shared_end :], b[len(b) - shared_end :])
        assert a[-shared_end - 1] != b[-shared_end - 1]
