"""Laws of the measures beside the logit difference: read off a replay, they are those of a hooked forward."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.special import log_softmax, rel_entr
from scipy.stats import rankdata
from transformers import PreTrainedModel

from headlapse.engine.capture.forward import capture
from headlapse.engine.checkpoints.model import ResidentModel
from headlapse.engine.replay import run as sweeps
from headlapse.engine.replay import vocabulary_measures as room
from headlapse.engine.replay.replay import Site, replay
from headlapse.engine.replay.vocabulary_measures import (
    Vocabulary,
    VocabularyMeasures,
    hooked_measures,
    kl,
    log_probability,
    rank,
)
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.store.store import Store
from headlapse.engine.study.alignment import align
from headlapse.engine.study.answers import continued, lengthened
from headlapse.engine.study.patch_settings import PatchRequest
from headlapse.engine.study.prompts import Trials
from headlapse.engine.study.study import MEASURES
from tests.models import MAIN, N_LAYERS, VOCAB, Lengths, random_subsets, random_trials, save, tiny, tiny_tokenizer
from tests.reference import CLEAN, CORRUPT, Direction, aligned, before_output_projection, prompt, source_z
from tests.test_scripts import run

pytestmark = pytest.mark.thorough

KNOWN = np.setdiff1d(np.arange(VOCAB - 5), [7])
"""Tokens of a tokenizer with a hole, in a model with rows to spare."""

DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
LAYOUTS: tuple[tuple[str, Lengths], ...] = (("last", "unequal"), ("end:3", "unequal"), ("all", "paired"))
SITES: tuple[Site, ...] = ((1,), (0, 2))
EXACT = 1e-4


def trials_with_answers(lengths: Lengths = "unequal", seed: int = 0) -> Trials:
    """Right answers of 1, 3 and 2 tokens, wrong ones of 2, 1 and 1, all of them known."""
    trials = random_trials(3, seed, lengths)
    rng = np.random.default_rng(seed)
    first = np.stack([rng.choice(KNOWN, 2, replace=False) for _ in range(3)])
    continuation = np.full((3, 2, 3), -1)
    for trial, lengths_there in enumerate([(1, 2), (3, 1), (2, 1)]):
        for which, n in enumerate(lengths_there):
            continuation[trial, which, :n] = [first[trial, which], *rng.choice(KNOWN, n - 1)]
    return replace(trials, answer_tokens=first, continuation=continuation)


@cache
def dressed(name: str) -> tuple[PreTrainedModel, ResidentModel]:
    model = tiny(name)
    resident = ResidentModel(model.config, torch.float32, "cpu")
    resident.load_weights(model.state_dict())
    return model, resident


def prepared(
    name: str,
    trials: Trials,
    positions: str = "last",
    direction: Direction = "denoise",
    measures: Sequence[str] = MEASURES,
    known: np.ndarray = KNOWN,
    memory: int = 2**30,
) -> VocabularyMeasures:
    _, resident = dressed(name)
    kept = capture(resident, trials, 2**30)
    alignment = align(trials, positions)
    return VocabularyMeasures.prepare(resident, kept, trials, alignment, direction, measures, known, memory)


# The definition: one trial and one condition at a time, a stock model with plain hooks, everything in float64


def log_probs(
    model: PreTrainedModel,
    trials: Trials,
    trial: int,
    direction: Direction,
    positions: str,
    site: Site,
    heads: np.ndarray,
    told: Sequence[int] = (),
) -> np.ndarray:
    """Log-probabilities of the known tokens, NaN for others, after patched prompt and told tokens: (row, vocab)."""
    source, target = (CLEAN, CORRUPT) if direction == "denoise" else (CORRUPT, CLEAN)
    z = source_z(model, prompt(trials, source, trial))
    pairs = aligned(positions, int(trials.length[source, trial]), int(trials.length[target, trial]))

    def write(layer: int):
        def hook(found: torch.Tensor) -> torch.Tensor:
            changed = found.clone()
            for there, here in pairs:
                for head in np.flatnonzero(heads):
                    changed[0, here, head] = z[layer][there, head]
            return changed

        return hook

    tokens = torch.cat([prompt(trials, target, trial), torch.tensor(list(told), dtype=torch.long)])
    with torch.no_grad(), before_output_projection(model, {layer: write(layer) for layer in site}):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, int(trials.length[target, trial]) - 1 :]
    found = np.full(logits.shape, np.nan)
    found[:, KNOWN] = log_softmax(logits.double().numpy()[:, KNOWN], axis=-1)
    return found


def defined(
    model: PreTrainedModel,
    trials: Trials,
    trial: int,
    direction: Direction,
    positions: str,
    site: Site,
    heads: np.ndarray,
) -> dict[str, float]:
    given = (direction, positions, site, heads)
    found = log_probs(model, trials, trial, *given)[0]
    into_clean: Direction = "noise"
    clean = log_probs(model, trials, trial, into_clean, positions, site, np.zeros_like(heads))[0]
    right, wrong = trials.answer_tokens[trial]
    assert trials.continuation is not None
    scores = []
    for padded in trials.continuation[trial]:
        tokens = [int(token) for token in padded if token >= 0]
        rows = log_probs(model, trials, trial, *given, told=tokens[:-1])
        scores.append(sum(rows[place, token] for place, token in enumerate(tokens)))
    place = rankdata(-found[KNOWN])[right == KNOWN].item() - 1
    return {
        "logit_diff": found[right] - found[wrong],
        "probability": np.exp(found[right]),
        "rank": place,
        "kl": rel_entr(np.exp(clean[KNOWN]), np.exp(found[KNOWN])).sum(),
        "sequence": scores[0] - scores[1],
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("positions", "lengths"), LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
def test_measures_of_patched_and_unpatched_runs_are_those_of_one_hooked_forward_each(
    name: str, positions: str, lengths: Lengths, direction: Direction
) -> None:
    model, _ = dressed(name)
    trials, mask = trials_with_answers(lengths), random_subsets(3, 8)[1:2]
    vocabulary_measures = prepared(name, trials, positions, direction)
    found, plain = vocabulary_measures.patched(SITES, mask), vocabulary_measures.unpatched()
    assert list(found) == ["logit_diff", *MEASURES] == list(plain)
    largest = dict.fromkeys(found, 0.0)
    for trial in range(trials.n_trials):
        pairs = [
            ({name: values[place, 0, trial] for name, values in found.items()}, (direction, positions, site, mask[0]))
            for place, site in enumerate(SITES)
        ]
        target, way = ((CORRUPT, "denoise"), (CLEAN, "noise"))[trial % 2]
        nothing = (way, positions, (0,), np.zeros(8, dtype=bool))
        pairs.append(({name: values[target, trial] for name, values in plain.items()}, nothing))
        for here, given in pairs:
            for measure, value in defined(model, trials, trial, *given).items():
                largest[measure] = np.maximum(largest[measure], abs(here[measure] - value))  # keeps NaN
    print(f"{name} {positions} {direction}: { ({measure: f'{value:.1e}' for measure, value in largest.items()}) }")
    assert np.max(list(largest.values())) <= EXACT


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_patching_no_head_is_the_unpatched_target_run(direction: Direction) -> None:
    vocabulary_measures = prepared("neox-parallel", trials_with_answers(), "end:3", direction)
    found = vocabulary_measures.patched([(1,)], np.zeros((1, 8), dtype=bool))
    target = CORRUPT if direction == "denoise" else CLEAN
    for name, values in vocabulary_measures.unpatched().items():
        np.testing.assert_allclose(found[name][0, 0], values[target], rtol=0, atol=EXACT)


def test_the_clean_run_does_not_diverge_from_itself_and_the_corrupt_one_does() -> None:
    plain = prepared("llama-gqa", trials_with_answers()).unpatched()["kl"]
    assert (plain[CLEAN] == 0).all() and (plain[CORRUPT] > 0.01).all()


def test_the_logit_difference_is_that_of_replay() -> None:
    _, resident = dressed("gpt2")
    trials, mask = trials_with_answers(), random_subsets(9, 8)
    found = prepared("gpt2", trials).patched(SITES, mask)["logit_diff"]
    kept = capture(resident, trials, 2**30)
    assert (found == replay(resident, kept, trials, align(trials, "last"), "denoise", SITES, mask)).all()


def test_answers_of_one_token_score_as_the_logit_difference() -> None:
    trials = trials_with_answers()
    short = replace(trials, continuation=trials.answer_tokens[..., None])
    vocabulary_measures = prepared("neox-parallel", short, measures=["sequence"])
    for found in (vocabulary_measures.patched([(1,)], random_subsets(5, 8)), vocabulary_measures.unpatched()):
        assert list(found) == ["logit_diff", "sequence"]
        assert (found["sequence"] == found["logit_diff"]).all()


def test_rows_of_no_token_change_nothing_however_large_their_logits() -> None:
    model, unlike = tiny("neox-parallel"), tiny("neox-parallel")
    unknown = np.setdiff1d(np.arange(VOCAB), KNOWN)
    with torch.no_grad():
        unlike.get_output_embeddings().weight[unknown] = 100 * torch.randn(len(unknown), 64)
    trials, mask, found = trials_with_answers(), random_subsets(5, 8), []
    for one in (model, unlike):
        resident = ResidentModel(one.config, torch.float32, "cpu")
        resident.load_weights(one.state_dict())
        kept, alignment = capture(resident, trials, 2**30), align(trials, "last")
        vocabulary_measures = VocabularyMeasures.prepare(resident, kept, trials, alignment, "denoise", MEASURES, KNOWN)
        found.append(vocabulary_measures.patched([(1,)], mask))
    for name, values in found[0].items():
        np.testing.assert_allclose(values, found[1][name], rtol=0, atol=1e-5)


def test_blocks_of_any_size_give_the_same_numbers() -> None:
    trials, mask = trials_with_answers(), random_subsets(4, 8)
    whole = prepared("neox-sequential", trials)
    expected = whole.patched(SITES, mask)
    for block_rows in (2, 7):
        parts = replace(whole, vocabulary=replace(whole.vocabulary, block_rows=block_rows))
        for name, values in parts.patched(SITES, mask).items():
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5)


def test_a_block_is_as_large_as_memory_allows() -> None:
    _, resident = dressed("gpt2")
    per_row = VOCAB * 16
    assert Vocabulary.prepare(resident, KNOWN, 4 * 10 * per_row).block_rows == 10
    assert Vocabulary.prepare(resident, KNOWN, 1).block_rows == 1
    assert Vocabulary.prepare(resident, KNOWN, 2**50).block_rows == room.BLOCK["cpu"] // per_row


def test_progress_counts_a_run_once_though_its_answers_are_scored_besides() -> None:
    heard: list[int] = []
    prepared("gpt2", trials_with_answers()).patched(SITES, random_subsets(5, 8), heard.append)
    assert sum(heard) == len(SITES) * 5 * 3


# The definitions, by hand and by scipy


def test_measures_worked_by_hand() -> None:
    logits = torch.log(torch.tensor([[1.0, 2, 4, 1], [2, 2, 2, 2]]))
    token = torch.tensor([1, 0])
    assert log_probability(logits, token).exp().tolist() == pytest.approx([0.25, 0.25])
    assert rank(logits, token).tolist() == [1, 1.5]
    clean, patched = logits.log_softmax(-1)
    by_hand = (np.log(1 / 2) + 2 * np.log(1) + 4 * np.log(2) + np.log(1 / 2)) / 8
    assert kl(clean, patched).item() == pytest.approx(by_hand)


def test_tied_tokens_share_the_mean_of_their_ranks() -> None:
    logits = torch.randint(0, 4, (50, 20), generator=torch.Generator().manual_seed(0)).float()
    token = torch.arange(50) % 20
    expected = rankdata(-logits.numpy(), axis=1)[np.arange(50), token.numpy()] - 1
    assert rank(logits, token).tolist() == expected.tolist()


def test_rank_and_divergence_are_not_fooled_by_a_nan() -> None:
    logits = torch.tensor([[0.0, torch.nan, 1.0]])
    assert kl(logits.log_softmax(-1), torch.zeros(1, 3).log_softmax(-1)).isnan().all()
    assert log_probability(logits, torch.tensor([0])).isnan().all()


# Answers behind prompts


def test_all_but_the_last_token_of_an_answer_is_appended() -> None:
    trials = trials_with_answers()
    assert trials.continuation is not None
    longer = continued(trials, 0, 64)
    assert (longer.length - trials.length).tolist() == [[0, 2, 1]] * 2
    for direction in range(2):
        kept = longer.tokens[direction, 1, : longer.length[direction, 1]].tolist()
        assert kept == [*prompt(trials, direction, 1).tolist(), *trials.continuation[1, 0, :2].tolist()]
    with pytest.raises(UserError, match=r"sequence: prompt and answer take \d+ tokens, the model's context is 9"):
        continued(trials, 0, 9)


def test_positions_behind_the_prompt_are_not_patched() -> None:
    trials = trials_with_answers("paired")
    for positions in ("end:2", "all"):
        alignment = align(trials, positions)
        longer = lengthened(alignment, 2, 99)
        assert longer.valid.sum() == alignment.valid.sum() and longer.valid.shape[1] == alignment.valid.shape[1] + 2
        assert (np.diff(longer.positions) == 1).all()
        trial = np.arange(3)
        assert (longer.positions[0, trial, longer.read + 1] == trials.length[0]).all()


# The self-check


@pytest.mark.parametrize("measure", MEASURES)
def test_a_hooked_forward_says_the_same_and_what_rounding_may_do(measure: str) -> None:
    trials, mask, alignment = trials_with_answers(), random_subsets(5, 8), align(trials_with_answers(), "end:2")
    vocabulary_measures = prepared("llama-gqa", trials, "end:2", measures=[measure])
    patches = [(site, heads) for site in SITES for heads in mask]
    hooked = hooked_measures(vocabulary_measures.vocabulary, trials, alignment, "denoise", patches, [measure], 1e-4)
    found = vocabulary_measures.patched(SITES, mask)[measure].reshape(-1, 3)
    assert list(hooked.values) == [measure]
    assert (np.abs(found - hooked.values[measure]) <= hooked.allowed[measure]).all()
    assert (hooked.allowed[measure] < 0.1).mean() > 0.9


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(("step0", "step10")):
        save(tiny("neox-parallel", seed), directory / label, tokenizer=tiny_tokenizer())
    return directory


@pytest.fixture
def cached(model: Path, tmp_path: Path) -> Path:
    assert run("cache", "--model", model, "--trials", 3, cache=tmp_path).returncode == 0
    [path] = tmp_path.glob("*.zarr")
    return path


ASKED = ("--subsets", "even", "odd", "all", "--name", "r", "--measures")


@pytest.mark.slow
def test_the_command_keeps_shows_and_checks_every_measure(cached: Path) -> None:
    done = run("patch", "--verbose", *ASKED, *MEASURES, cache=cached.parent)
    assert done.returncode == 0, done.stderr
    kept = xr.open_zarr(cached, group="patches/r", consolidated=False)
    for name in MEASURES:
        assert kept[name].dims == ("checkpoint", "layer", "subset", "trial") and kept[name].dtype == "float32"
        assert kept[name].shape == (2, N_LAYERS, 3, 3) and kept[name].notnull().all()
        for direction in ("clean", "corrupt"):
            assert kept[f"{direction}_{name}"].dims == ("checkpoint", "trial")
            assert kept[f"{direction}_{name}"].notnull().all()
        assert (kept[f"self_check_{name}"] <= 1e-3).all()
        assert f"\n{name}" in done.stdout and f"{name} {float(kept[f'self_check_{name}'].max()):.1e}" in done.stdout
    assert ((kept.probability >= 0) & (kept.probability <= 1)).all() and (kept.clean_kl == 0).all()
    assert kept["rank"].max() < len(tiny_tokenizer())
    again = run("patch", *ASKED, *reversed(MEASURES), cache=cached.parent)
    assert again.returncode == 0 and "nothing to do" in again.stdout


@pytest.mark.slow
def test_a_run_of_the_same_name_with_other_measures_is_refused_until_it_is_overwritten(cached: Path) -> None:
    assert run("patch", *ASKED[:-1], cache=cached.parent).returncode == 0
    refused = run("patch", *ASKED, "kl", cache=cached.parent)
    assert refused.returncode == 2 and 'measures is null there, ["kl"] asked' in refused.stderr
    assert run("patch", *ASKED, "kl", "--overwrite", cache=cached.parent).returncode == 0
    kept = xr.open_zarr(cached, group="patches/r", consolidated=False)
    assert "kl" in kept and "rank" not in kept


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked, seen = sweeps.hooked_measures, []

    def off(*given: object) -> room.Hooked:
        seen.append(given)
        found = hooked(*given)  # type: ignore[arg-type]
        return replace(found, values={name: values + (len(seen) == 2) for name, values in found.values.items()})

    monkeypatch.setattr(sweeps, "hooked_measures", off)
    failed = run("patch", *ASKED, "kl", cache=cached.parent)
    assert failed.returncode == 1 and "step10, kl: replay differs" in failed.stderr
    kept = xr.open_zarr(cached, group="patches/r", consolidated=False)
    before = kept.kl.values[0].copy()
    assert kept.complete.values.tolist() == [True, False]
    assert run("patch", *ASKED, "kl", cache=cached.parent).returncode == 0 and len(seen) == 3
    kept = xr.open_zarr(cached, group="patches/r", consolidated=False)
    assert kept.complete.values.all() and (kept.kl.values[0] == before).all()


@pytest.mark.slow
def test_a_store_without_whole_answers_refuses_to_score_them(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only stores of format 1 are so old."""
    kept = [name for name in Store(cached).array_names if "continuation" not in name]
    monkeypatch.setattr(Store, "array_names", kept)
    refused = run("patch", *ASKED, "sequence", cache=cached.parent)
    assert refused.returncode == 2 and "cached before whole answers were kept; cache again" in refused.stderr
    assert run("patch", *ASKED, "kl", cache=cached.parent).returncode == 0


def test_the_published_protocol_scores_texts(cached: Path) -> None:
    refused = run("patch", "--protocol", "published", "--layers", "1", "--measures", "kl", cache=cached.parent)
    assert refused.returncode == 2 and "leave --measures out" in refused.stderr


def test_measures_belong_to_the_name_of_a_run() -> None:
    names = {sweeps.name_of(PatchRequest(measures=measures)) for measures in ((), ("kl",), ("kl", "rank"), ("rank",))}
    assert len(names) == 4
    assert sweeps.name_of(PatchRequest(measures=("kl", "rank"))) == sweeps.name_of(
        PatchRequest(measures=("rank", "kl", "kl"))
    )
