"""Laws of roles: every score against its definition on stock models with eager attention, and what its null is for."""

import functools
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from headlapse.engine.capture.forward import capture
from headlapse.engine.mechanism.answer_attention import CLEAN, CORRUPT, Mentions
from headlapse.engine.mechanism.head_writing import HeadWriter, among_top, embedded, in_prompts
from headlapse.engine.mechanism.ov_copying import OVCopying
from headlapse.engine.mechanism.repeated_tokens import Sequences, draw_sequences, repetition_scores, uniform_previous
from headlapse.engine.mechanism.role_summary import (
    causal_heads,
    heads_in_role,
    in_role,
    loss_bump,
    role_shares,
    roles_frame,
)
from headlapse.engine.mechanism.role_tests import paired_p_values, shuffled_p_values
from headlapse.engine.mechanism.roles import RoleInputs, RoleScores, score_roles
from headlapse.engine.mechanism.successor import (
    ORDERS,
    Succession,
    SuccessorScores,
    shuffled_words,
    succession,
    successor_score,
)
from headlapse.engine.replay.layers import LayerRunner
from headlapse.engine.replay.patch_inputs import PatchInputs
from headlapse.engine.replay.vocabulary_measures import Vocabulary
from headlapse.engine.report.findings.roles import role_lines, roles_finding
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.study.alignment import align
from headlapse.engine.study.mechanism_settings import MechanismSettings
from headlapse.engine.study.prompts import Trials
from headlapse.engine.study.role_settings import MARGIN, N_SEQUENCES, ROLES, SHUFFLES
from tests import reference
from tests.models import CONTEXT, D_MODEL, MAIN, N_HEADS, N_LAYERS, VOCAB, tiny, tiny_tokenizer, trials_of
from tests.simulating import unchecked
from tests.test_capture import dressed
from tests.test_mechanism import BLOCK, FINAL_NORM, output_matrix

pytestmark = pytest.mark.thorough

KNOWN = np.arange(VOCAB - 4)
"""The last rows of the embedding belong to no token."""

MEMORY = 2**28
LAYERS = range(N_LAYERS)
NORM = {"gpt_neox": "input_layernorm", "gpt2": "ln_1", "llama": "input_layernorm"}
IOI = trials_of(
    clean=[[5, 11, 6, 12, 7, 12, 8, 9], [5, 13, 6, 14, 8, 7, 14, 9, 10], [16, 6, 15, 6, 15, 9]],
    corrupt=[[5, 11, 6, 12, 7, 11, 8, 9], [5, 13, 6, 14, 8, 7, 13, 9, 10], [16, 6, 15, 6, 16, 9]],
    answers=[[11, 12], [13, 14], [16, 15]],
)
"""Prompts as those of the IOI task: the clean one names the wrong answer twice, the corrupt one the right answer."""


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """A model that no test changes."""
    return tiny(name)


def sequences(start_token: int | None = 0, context: int = CONTEXT) -> Sequences:
    drawn = draw_sequences(KNOWN, [0], start_token, context)
    assert drawn is not None
    return drawn


# --- random tokens, repeated ---


def test_sequences_repeat_random_tokens_and_controls_do_not() -> None:
    drawn = sequences()
    assert drawn.repeated.shape == drawn.control.shape == (N_SEQUENCES, 1 + 2 * drawn.half) and drawn.half == 21
    first, again, other = drawn.repeated[:, 1:22], drawn.repeated[:, 22:], drawn.control[:, 22:]
    assert np.array_equal(first, again) and np.array_equal(first, drawn.control[:, 1:22])
    for row, further in zip(first, other, strict=True):
        assert len({*row, *further}) == 2 * drawn.half and not {*row, *further} & {0, *range(VOCAB - 4, VOCAB)}
    assert np.array_equal(sequences().repeated, drawn.repeated), "the same seed draws the same"
    assert sequences(None, 20).repeated.shape[1] == 20 and sequences(None, 20).start == 0


def test_a_context_or_a_vocabulary_too_short_has_no_sequences() -> None:
    assert draw_sequences(KNOWN, [], None, 7) is None and draw_sequences(np.arange(7), [], None, 64) is None


def slow_repetition(
    model: PreTrainedModel, drawn: Sequences, tokens: Tensor
) -> tuple[Mapping[str, np.ndarray], float, float]:
    """Attention on the token before, on the same and on the next one of the first half, query by query; losses."""
    output = model(tokens[None], output_attentions=True, use_cache=False)
    scores = {name: np.zeros((N_LAYERS, N_HEADS)) for name in ("previous", "duplicate", "induction")}
    for layer, head in np.ndindex(N_LAYERS, N_HEADS):
        weights = output.attentions[layer][0, head].double().numpy()
        first, second = drawn.start, drawn.start + drawn.half
        before = [weights[at, at - 1] for at in range(2, len(tokens))]
        same = [weights[second + i, first + i] for i in range(drawn.half) if first + i > 0]
        after = [weights[second + i, first + i + 1] for i in range(drawn.half)]
        for name, values in (("previous", before), ("duplicate", same), ("induction", after)):
            scores[name][layer, head] = np.mean(values)
    logits = output.logits[0].double().index_fill(-1, torch.arange(len(KNOWN), VOCAB), -torch.inf)
    loss = [-float(logits[at - 1].log_softmax(-1)[tokens[at]]) for at in range(1, len(tokens))]
    start, half = drawn.start, drawn.half
    of_first = [loss[at - 1] for at in range(max(start, 1), start + half)]
    of_second = [loss[at - 1] for at in range(start + half + 1, start + 2 * half)]
    return scores, float(np.mean(of_first)), float(np.mean(of_second))


@torch.no_grad()
@pytest.mark.parametrize("start_token", [0, None])
@pytest.mark.parametrize("name", [*MAIN, "qwen3", "phi", "granite", "gpt2-scaled-by-layer"])
def test_repetition_scores_are_those_of_stock_attention(name: str, start_token: int | None) -> None:
    """The largest difference over all architectures is printed: `pytest -s`."""
    model, drawn = model_of(name), sequences(start_token)
    resident = dressed(model)
    both = repetition_scores(resident, drawn, Vocabulary.prepare(resident, KNOWN, MEMORY), MEMORY)
    largest = 0.0
    for fast, tokens in zip(both, (drawn.repeated, drawn.control), strict=True):
        for index in (0, N_SEQUENCES - 1):
            slow, first, second = slow_repetition(model, drawn, torch.from_numpy(tokens[index]))
            for field, expected in slow.items():
                largest = max(largest, float(np.abs(getattr(fast, field)[..., index].numpy() - expected).max()))
            assert float(fast.loss_first[index]) == pytest.approx(first, abs=1e-5)
            assert float(fast.loss_second[index]) == pytest.approx(second, abs=1e-5)
    print(f"{name}: attention roles differ by at most {largest:.1e}")
    assert largest < 1e-6


@torch.no_grad()
def test_little_memory_gives_what_plenty_gives() -> None:
    resident, drawn = dressed(model_of("gpt2")), sequences()
    vocabulary = Vocabulary.prepare(resident, KNOWN, MEMORY)
    plenty, little = (repetition_scores(resident, drawn, vocabulary, memory)[0] for memory in (MEMORY, 1))
    np.testing.assert_allclose(plenty.induction, little.induction, atol=1e-6)


@torch.no_grad()
def test_a_model_that_attends_evenly_has_the_null_as_its_score_and_no_role() -> None:
    model = tiny("llama-gqa")
    for block in model.model.layers:
        block.self_attn.q_proj.weight.zero_()
    drawn, resident = sequences(), dressed(model)
    repeated, control = repetition_scores(resident, drawn, Vocabulary.prepare(resident, KNOWN, MEMORY), MEMORY)
    np.testing.assert_allclose(repeated.previous, uniform_previous(drawn), atol=1e-6)
    np.testing.assert_allclose(repeated.induction, control.induction, atol=1e-6)
    assert paired_p_values((repeated.induction - control.induction).double().numpy()).min() > 0.05


# --- OV circuits ---


def value_matrix(model: PreTrainedModel, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """W_V (d_model, head_dim) and its bias, by the names of the modules."""
    kind, width = model.config.model_type, D_MODEL // N_HEADS
    block = model.get_submodule(BLOCK[kind].format(layer))
    if kind == "gpt_neox":
        both = block.attention.query_key_value
        return both.weight.view(N_HEADS, 3, width, D_MODEL)[head, 2].T, both.bias.view(N_HEADS, 3, width)[head, 2]
    if kind == "gpt2":
        both = block.attn.c_attn
        weight = both.weight.view(D_MODEL, 3, N_HEADS, width)[:, 2, head]
        return weight, both.bias.view(3, N_HEADS, width)[2, head]
    shared = head // (N_HEADS // model.config.num_key_value_heads)
    return block.self_attn.v_proj.weight.view(-1, width, D_MODEL)[shared].T, torch.zeros(width)


def norm_before(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    kind = model.config.model_type
    return model.get_submodule(f"{BLOCK[kind].format(layer)}.{NORM[kind]}")


def slow_written(model: PreTrainedModel, layer: int, head: int, resid: Tensor) -> Tensor:
    """What a head writes if it attends to `resid` alone, module by module."""
    weight, bias = value_matrix(model, layer, head)
    return (norm_before(model, layer)(resid) @ weight + bias) @ output_matrix(model, layer)[head]


def linear_part(norm: torch.nn.Module) -> Tensor:
    """The norm as a matrix, up to the scale: gain after centring, where it centres."""
    centred = torch.eye(D_MODEL, dtype=torch.double)
    if getattr(norm, "bias", None) is not None:
        centred = centred - 1 / D_MODEL
    return centred * norm.weight.double()


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_copying_is_the_share_of_positive_eigenvalues_of_the_full_token_to_token_circuit(name: str) -> None:
    model, kind = model_of(name), model_of(name).config.model_type
    embedding, unembedding = (
        part.weight[KNOWN].double() for part in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    unembedding = unembedding - unembedding.mean(0)
    copying = OVCopying(dressed(model), KNOWN, 0, n_shuffles=2)
    for layer in LAYERS:
        scores = copying.scores(layer)
        for head in (0, N_HEADS - 1):
            circuit = value_matrix(model, layer, head)[0].double() @ output_matrix(model, layer)[head].double()
            into, out = linear_part(norm_before(model, layer)), linear_part(model.get_submodule(FINAL_NORM[kind]))
            full = embedding @ into @ circuit @ out @ unembedding.T  # (token, token)
            eigenvalues = torch.linalg.eigvals(full)
            expected = float(eigenvalues.real.sum() / eigenvalues.abs().sum())
            assert scores[0, head] == pytest.approx(expected, abs=2e-4)
        assert np.abs(scores).max() <= 1 + 1e-6 and not np.allclose(scores[0], scores[1])


@torch.no_grad()
def test_a_head_that_writes_what_it_reads_copies_and_its_negative_does_not() -> None:
    model = tiny("llama-gqa")
    wide = D_MODEL // N_HEADS
    unembedding = model.get_output_embeddings().weight
    unembedding.copy_(model.get_input_embeddings().weight)
    model.model.norm.weight.fill_(1.0)
    block = model.model.layers[1]
    block.input_layernorm.weight.fill_(1.0)
    value = block.self_attn.v_proj.weight.view(-1, wide, D_MODEL)[0]
    output = block.self_attn.o_proj.weight.view(D_MODEL, N_HEADS, wide)
    output[:, 0], output[:, 1] = value.T, -value.T
    copying = OVCopying(dressed(model), KNOWN, 0, SHUFFLES)
    scores = np.stack([copying.scores(layer) for layer in LAYERS], axis=1)
    assert scores[0, 1, 0] > 0.99 and scores[0, 1, 1] < -0.99
    p = shuffled_p_values(scores[0], scores[1:])
    assert p[1, 0] <= 0.05 and p[1, 1] == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "why"), [("olmo", "norms or clips its values"), ("opt-350m", "projects its embeddings")]
)
def test_copying_of_what_is_no_product_of_weights_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        OVCopying(dressed(model_of(name)), KNOWN, 0, 1).scores(0)


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_what_a_head_writes_of_a_word_is_the_stock_modules_product(name: str) -> None:
    """Of words in their prompts, and of single words after the first MLP with silent heads."""
    model = model_of(name)
    resident, tokens = dressed(model), torch.from_numpy(IOI.tokens[CLEAN])
    at = torch.tensor([[0, 3], [1, 1], [2, 0]])
    writer = HeadWriter(resident, in_prompts(resident, tokens, at))
    words = torch.tensor([3, 11, 20])
    alone = HeadWriter(resident, embedded(resident, words))
    stock = model(tokens, output_hidden_states=True).hidden_states
    with reference.before_output_projection(model, {0: torch.zeros_like}):
        silent = model(words[:, None], output_hidden_states=True, use_cache=False).hidden_states
    for layer in LAYERS:
        entered = stock[min(layer, 1)][at[:, 0], at[:, 1]], silent[min(layer, 1)][:, 0]
        for head in range(N_HEADS):
            for fast, resid in zip((writer, alone), entered, strict=True):
                expected = slow_written(model, layer, head, resid)
                np.testing.assert_allclose(fast.written(layer)[head], expected, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_a_word_is_copied_where_it_is_among_the_five_that_are_written_most(name: str) -> None:
    model = model_of(name)
    resident, words = dressed(model), torch.tensor([3, 11, 20, 21])
    writer = HeadWriter(resident, embedded(resident, words))
    final_norm = model.get_submodule(FINAL_NORM[model.config.model_type])
    for layer in LAYERS:
        fast = among_top(writer, layer, words, Vocabulary.prepare(resident, KNOWN, MEMORY))
        for head, row in np.ndindex(N_HEADS, len(words)):
            expected = np.zeros(len(words))
            for sign in (1, -1):
                logits = model.get_output_embeddings()(final_norm(sign * writer.written(layer)[head, row]))[KNOWN]
                most = logits.argsort(descending=True)[:5].tolist()
                expected += [sign * (int(word) in most) for word in words]
            assert np.array_equal(fast[head, row], expected)


# --- successors ---


def test_orders_are_found_among_the_tokens_of_a_tokenizer() -> None:
    words = succession(tiny_tokenizer())
    digits = ORDERS.index(tuple(map(str, range(200))))
    assert [int(order) for order in words.order] == [*[digits - 1] * 2, *[digits] * 10]
    assert len(words.pairs) == 9 and np.array_equal(words.pairs[:, 1] - words.pairs[:, 0], np.ones(9))
    # A and Q are letters too, but not neighbours.
    assert set(words.pairs.ravel()) == set(range(2, 12))


def test_the_successor_score_is_the_share_of_words_whose_next_one_is_written_most() -> None:
    words = Succession(np.arange(5), np.array([0, 0, 0, 1, 1]), np.array([[0, 1], [1, 2], [3, 4]]))
    written = np.array([[1, 2, 0, 4, 3], [1, 0, 1, 3, 4], [0, 1, 2, 3, 4]])
    assert successor_score(written, words).tolist() == [1, 1 / 3, 0]
    relabelled = shuffled_words(words, np.random.default_rng(1))
    assert sorted(relabelled[:3]) == [0, 1, 2] and sorted(relabelled[3:]) == [3, 4]
    assert successor_score(written, words, np.array([1, 0, 2, 4, 3])).tolist() == [1 / 3, 1 / 3, 2 / 3]


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_the_word_written_most_is_that_of_the_stock_modules(name: str) -> None:
    model, words = model_of(name), succession(tiny_tokenizer())
    resident = dressed(model)
    scores = SuccessorScores(resident, words)
    final_norm = model.get_submodule(FINAL_NORM[model.config.model_type])
    with reference.before_output_projection(model, {0: torch.zeros_like}):
        hidden = model(
            torch.from_numpy(words.tokens)[:, None], output_hidden_states=True, use_cache=False
        ).hidden_states
    for layer in LAYERS:
        fast = scores.written_most(layer)
        for head, word in np.ndindex(N_HEADS, len(words.tokens)):
            written = slow_written(model, layer, head, hidden[min(layer, 1)][word, 0])
            logits = model.get_output_embeddings()(final_norm(written)).numpy()
            rivals = np.flatnonzero(words.order == words.order[word])
            assert fast[head, word] == rivals[logits[words.tokens[rivals]].argmax()]


# --- answers in prompts ---


def test_mentions_are_where_a_reader_finds_them() -> None:
    mentions = Mentions.of(IOI)
    assert mentions.answer.tolist() == [[1, 1, 0], [1, 1, 0]] and mentions.wrong.tolist() == [3, 3, 2]
    assert mentions.again.tolist() == [5, 6, 4] and mentions.has_duplicate.all()
    plain = trials_of([[5, 11, 9], [5, 6, 12]], [[5, 12, 9], [5, 6, 9]], [[11, 12], [11, 12]])
    absent = Mentions.of(plain)
    assert absent.answer.tolist() == [[1, -1], [-1, -1]], "the read position itself is no mention"
    assert not absent.has_answer.any() and not absent.has_duplicate.any()


def scored(model: PreTrainedModel, trials: Trials = IOI, dtype: torch.dtype = torch.float32) -> RoleScores:
    resident = dressed(model, dtype)
    activations = capture(resident, trials, MEMORY)
    runners = {
        run: LayerRunner(resident, PatchInputs.from_capture(resident, activations, trials, align(trials, "last"), way))
        for run, way in (("clean", "noise"), ("corrupt", "denoise"))
    }
    with torch.no_grad():
        layers = range(resident.architecture.n_layers)
        return score_roles(RoleInputs(resident, tiny_tokenizer(), trials, runners, layers, MEMORY))


@torch.no_grad()
@pytest.mark.parametrize("name", MAIN)
def test_name_movers_and_s_inhibition_are_scored_by_stock_attention(name: str) -> None:
    model, roles = model_of(name), scored(model_of(name))
    ends = {CLEAN: {}, CORRUPT: {}}
    for run in ends:
        for trial in range(IOI.n_trials):
            tokens = reference.prompt(IOI, run, trial)
            weights = model(tokens[None], output_attentions=True, use_cache=False).attentions
            ends[run][trial] = np.stack([by_layer[0, :, -1].double().numpy() for by_layer in weights])
    answer, first, second = (1, 1, 0), (3, 3, 2), (5, 6, 4)
    to_answer, anyway = (
        np.mean([ends[run][trial][..., at] for trial, at in enumerate(answer)], axis=0) for run in (CLEAN, CORRUPT)
    )
    mover = roles.scored["name mover"]
    np.testing.assert_allclose(mover.score, to_answer * roles.name_copying, atol=1e-5)
    np.testing.assert_allclose(mover.null, anyway * roles.name_copying, atol=1e-5)
    inhibition = roles.scored["S-inhibition"]
    again = [ends[CLEAN][trial][..., at] for trial, at in enumerate(second)]
    others = [
        np.maximum(
            np.maximum(ends[CLEAN][trial][..., first[trial]], ends[CLEAN][trial][..., answer[trial]]),
            1 / IOI.length[CLEAN, trial],
        )
        for trial in range(3)
    ]
    np.testing.assert_allclose(inhibition.score, np.mean(again, axis=0), atol=1e-5)
    np.testing.assert_allclose(inhibition.null, np.mean(others, axis=0), atol=1e-5)
    difference = np.array(again) - others
    p = stats.ttest_1samp(difference, 0, axis=0, alternative="greater").pvalue
    holm = np.minimum(1, p.min() * p.size)
    assert inhibition.p.min() == pytest.approx(holm, rel=1e-3)


def test_what_cannot_be_scored_says_why_and_the_rest_is_there() -> None:
    plain = trials_of([[5, 6, 9], [5, 7, 9]], [[5, 8, 9], [5, 9, 9]], [[11, 12], [11, 12]])
    roles = scored(model_of("olmo"), plain)
    assert set(roles.scored) == {"previous token", "duplicate token", "induction", "successor"}
    assert "do not mention their answers" in roles.problems["name mover"]
    assert "wrong answer twice" in roles.problems["S-inhibition"] and "clips" in roles.problems["copying"]
    arrays = roles.arrays()
    assert np.isnan(arrays["role_score"][..., ROLES.index("copying")]).all()
    assert np.isfinite(arrays["role_score"][..., ROLES.index("induction")]).all()


def test_half_precision_gives_nearly_the_same_scores_and_one_layer_is_enough() -> None:
    """Of bfloat16, the coarsest; which word is written most can change where two are nearly tied."""
    full, half = (scored(tiny("llama-gqa"), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for role in set(ROLES) - {"successor"}:
        np.testing.assert_allclose(half.scored[role].score, full.scored[role].score, atol=0.02)
    single = scored(tiny("llama-gqa", num_hidden_layers=1))
    assert not single.problems and single.name_copying.shape == (1, N_HEADS)


# --- tests of a role ---


def test_p_values_of_no_role_are_too_small_for_any_head_in_one_case_of_twenty() -> None:
    """1,000 checkpoints of 8 heads: simulation error 0.7 %."""
    rng = np.random.default_rng(0)
    with unchecked():
        found = [paired_p_values(rng.normal(size=(2, 4, 10))).min() <= 0.05 for _ in range(1000)]
        shuffled = [
            shuffled_p_values(drawn[0], drawn[1:]).min() <= 0.05
            for drawn in rng.normal(size=(1000, 1 + SHUFFLES, 2, 4))
        ]
    assert 0.03 <= np.mean(found) <= 0.07 and 0.03 <= np.mean(shuffled) <= 0.07


@pytest.mark.slow
def test_random_models_have_roles_no_more_often_than_chance_has_it() -> None:
    """30 models: of roles that go by shuffles, one in twenty may have a head with each."""
    found = dict.fromkeys(ROLES, 0)
    with unchecked():
        for name in ("llama-gqa", "gpt2", "neox-parallel"):
            for seed in range(10):
                roles = scored(tiny(name, seed))
                for role, of_role in roles.scored.items():
                    found[role] += bool(((of_role.p <= 0.05 + 1e-9) & (of_role.score - of_role.null >= MARGIN)).any())
    assert not any(found[role] for role in ("previous token", "duplicate token", "induction", "name mover")), found
    assert all(found[role] <= 4 for role in ("successor", "copying", "S-inhibition")), found


def test_one_unit_tells_nothing_and_shares_that_never_vary_are_no_proof() -> None:
    assert np.isnan(paired_p_values(np.ones((1, 2, 1)))).all()
    assert paired_p_values(np.zeros((1, 2, 5))).min() == 1
    assert paired_p_values(np.full((1, 2, 5), 0.5)).max() < 1e-6


# --- summaries ---


def planted_run() -> xr.Dataset:
    """Three checkpoints, two layers of four heads: L1.H2 gets induction by step20, L0.H1 the previous token by step10
    for a moment."""
    checkpoints, dims = ["step0", "step10", "step20", "step30"], ("checkpoint", "layer", "head", "role")
    score = np.full((4, 2, 4, len(ROLES)), 0.1)
    p = np.ones_like(score)
    score[2:, 1, 2, ROLES.index("induction")] = (0.6, 0.9)
    p[2:, 1, 2, ROLES.index("induction")] = 0.001
    score[1, 0, 1, ROLES.index("previous token")], p[1, 0, 1, ROLES.index("previous token")] = 0.8, 0.001
    # Large without being more than chance, and more than chance without being large.
    score[:, 0, 0, ROLES.index("copying")] = 0.9
    p[:, 0, 0, ROLES.index("duplicate token")] = 0.001
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.1, (4, 2, 4, 6))
    effect[3, 1, 2] += 3
    loss = rng.normal(3, 0.1, (4, 10))
    problem = np.full((4, len(ROLES)), "", dtype=object)
    problem[:, ROLES.index("successor")] = "the tokenizer holds 2 pairs"
    return xr.Dataset(
        {
            "role_score": (dims, score), "role_null": (dims, np.full_like(score, 0.1)), "role_p": (dims, p),
            "effect": (("checkpoint", "layer", "head", "trial"), effect),
            "loss_first": (("checkpoint", "sequence"), np.full_like(loss, 3.0)),
            "loss_second": (("checkpoint", "sequence"), loss - np.array([0, 0, 2, 2.5])[:, None]),
        },
        coords={
            "checkpoint": checkpoints, "step": ("checkpoint", [0, 10, 20, 30]), "layer": [0, 1], "head": range(4),
            "complete": ("checkpoint", [True] * 4), "role": list(ROLES),
            "role_problem": (("checkpoint", "role"), problem),
        },
    )  # fmt: skip


def test_a_role_takes_size_and_more_than_chance_and_starts_where_it_stays() -> None:
    run = planted_run()
    assert in_role(run).sum() == 3
    assert heads_in_role(run, "induction") == [(1, 2)] == heads_in_role(run, "induction", "step20")
    assert heads_in_role(run, "induction", "step10") == [] == heads_in_role(run, "previous token")
    frame = roles_frame(run)
    assert len(frame) == 4 * len(ROLES) * 8
    row = frame.loc[("step30", "induction", 1, 2)]
    assert (row["after"], row["by"], row["has_role"]) == ("step10", "step20", True)
    assert row["score"] == pytest.approx(0.9) and row["null"] == pytest.approx(0.1)
    flickered = frame.loc[("step10", "previous token", 0, 1)]
    assert flickered["has_role"] and pd.isna(flickered["by"]) and pd.isna(flickered["after"])


def test_whether_the_heads_that_matter_are_those_of_a_role() -> None:
    final = planted_run().isel(checkpoint=[-1])
    [top, *others] = causal_heads(final)
    assert (top.layer, top.head, top.roles) == (1, 2, ("induction",)) and not others
    [share] = role_shares(final)
    size = np.abs(final.effect.values.mean(-1))[0]
    assert share.role == "induction" and share.share == pytest.approx(size[1, 2] / size.sum())
    assert share.p == pytest.approx(1 / 4, abs=0.05), "of four heads in a layer one is the largest"


def test_the_loss_bump_is_the_largest_fall_that_sequences_agree_on() -> None:
    bump = loss_bump(planted_run())
    assert bump is not None and (bump.after, bump.by) == ("step10", "step20") and bump.fall == pytest.approx(2, abs=0.2)
    run = planted_run()
    rng = np.random.default_rng(1)
    noise = run.assign(loss_second=(("checkpoint", "sequence"), rng.normal(3, 1, (4, 10))))
    assert loss_bump(noise) is None
    assert loss_bump(run.isel(checkpoint=[0])) is None
    backwards = run.loss_second.isel(checkpoint=slice(None, None, -1)).drop_vars("checkpoint")
    assert loss_bump(run.assign(loss_second=backwards)) is None, "it only rises"


def test_the_lines_name_heads_onset_and_what_is_missing() -> None:
    settings = MechanismSettings.of_parts(["roles", "patching"], "denoise", "float32")
    text = "\n".join(lines := list(role_lines(planted_run(), settings)))
    assert "induction        L1.H2 0.90 from step10-20" in text
    assert "no head          previous token, duplicate token, copying, name mover, S-inhibition" in text
    assert "not scored       successor" in text and "between step10 and step20" in text
    assert re.search(r"^  L1\.H2    \+[23]\.\d\d  induction$", text, re.MULTILINE)
    assert "induction heads: 9" in text and "; others of their layers may have as much (p = 0.2" in text
    assert max(map(len, lines)) <= 100
    finding = roles_finding(planted_run(), settings)
    assert finding.table is not None and list(finding.table.index) == ["L0.H1", "L1.H2"]
    assert finding.table["starts"].tolist() == ["not for two checkpoints running", "step10 to step20"]
    assert max(map(len, str(finding).splitlines())) <= 100
    assert f"{MARGIN:g} above its null" in str(finding) and "successor: the tokenizer holds 2 pairs" in str(finding)
