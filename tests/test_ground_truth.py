"""What is planted is found, where it was planted and as large; what is not there is found as often as chance has it.

The planted model (`engine/checkpoints/planted.py`): each even head of layer 1 writes 1/4 nat per unit that the digit is
above five.  Digits are 1, 2 and 3 above five in the clean prompts and as far below in the corrupt ones, so that by hand
  clean and corrupt logit difference   6 heads x 1/4 x (1, 2, 3) = 1.5, 3, 4.5 nats, and -1.5, -3, -4.5
  a patched even head                  1/4 x 2 x (1, 2, 3) = 0.5, 1, 1.5 nats more, 1 on average
  a patched odd head                   nothing
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from transformers import GPTNeoXConfig

from headlapse.engine.capture.forward import capture
from headlapse.engine.capture.run import cache_series
from headlapse.engine.checkpoints.model import ResidentModel
from headlapse.engine.checkpoints.planted import LAYER, N_HEADS, N_LAYERS, PAIRS, planted, task, tokenizer
from headlapse.engine.checkpoints.renumbered import renumber_heads
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.measures.logit_diff import finished
from headlapse.engine.replay.replay import replay
from headlapse.engine.replay.run import make_plan, open_run, patch_series
from headlapse.engine.report.findings.hypotheses import hypotheses_table
from headlapse.engine.report.findings.verdict import format_estimate, verdict
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.statistics.head_effects import head_effects
from headlapse.engine.statistics.head_subsets import head_subset_statistics
from headlapse.engine.statistics.hypotheses import hypotheses
from headlapse.engine.statistics.joint import ROUNDING
from headlapse.engine.statistics.onset import onsets
from headlapse.engine.statistics.permutation import parity, permutation_p_value
from headlapse.engine.statistics.rates import rates
from headlapse.engine.store.store import Store
from headlapse.engine.study.alignment import align
from headlapse.engine.study.patch_settings import PatchRequest, PatchSettings
from headlapse.engine.study.prompts import Trials, draw_trials
from headlapse.engine.study.study import Study
from headlapse.engine.study.subsets import parse_subsets
from tests.models import SHAPE, random_trials, randomised, redrawn, save
from tests.simulating import unchecked
from tests.test_scripts import run

BY_PROMPT = np.array([1.0, 2.0, 3.0])
CARRY, NOISE = 0.25, 0.02
CLOSE = {"rtol": 0, "atol": 1e-5}
LEAST_P = 2 / 924

STEPS, ONSET, RAMP = (0, 100, 200, 300, 400, 500, 600, 700, 800), 300, 200
"""The heads carry nothing up to the onset, and everything after the ramp."""


def cached_and_patched(
    model: Path,
    directory: Path,
    words: Sequence[str] = ("balanced", "each", "all"),
    layers: Sequence[str] = ("all",),
    pairs: Sequence[tuple[int, int]] = PAIRS,
) -> xr.Dataset:
    """The patched runs of a model's directory, through the whole corridor."""
    study = Study(str(model), str(task(directory / "digits.jsonl", pairs)))
    path = directory / "s.zarr"
    outcomes = list(cache_series(study, resolve(study.model, (), directory), path, directory, Machine()))
    store = Store(path)
    plan = make_plan(PatchRequest(tuple(words), tuple(layers)), store)
    patch = open_run(store, plan, "r")
    outcomes += patch_series(store, plan, patch, list(store.complete()), directory, Machine(), lambda _n: None)
    assert all(outcome.problem is None for outcome in outcomes)
    return finished(patch.dataset()).load()


@pytest.fixture(scope="module")
def even_run(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """Even heads carry the answer, and nothing else comes near it."""
    directory = tmp_path_factory.mktemp("even")
    return cached_and_patched(save(planted(CARRY), directory / "model", tokenizer=tokenizer()), directory)


def carried_at(step: int) -> float:
    return CARRY * min(max((step - ONSET) / RAMP, 0.0), 1.0)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in which the even heads come to carry the answer, each with a little noise of its own."""
    directory = tmp_path_factory.mktemp("series")
    for seed, step in enumerate(STEPS):
        save(planted(carried_at(step), NOISE, seed), directory / "model" / f"step{step}", tokenizer=tokenizer())
    return directory


@pytest.fixture(scope="module")
def series_run(series: Path) -> xr.Dataset:
    return cached_and_patched(series / "model", series)


def finding(run: xr.Dataset, heads: Iterable[int], layer: int = LAYER) -> tuple[float, float]:
    """What patching `heads` gives beyond patching the others (nats), and its p among all halvings, one by one."""
    mean = run.logit_diff.isel(checkpoint=-1).sel(layer=layer).mean("trial").values.astype(float)
    row_of = {frozenset(np.flatnonzero(row).tolist()): n for n, row in enumerate(run.mask.values)}
    everyone = frozenset(range(N_HEADS))

    def beyond(half: frozenset[int]) -> float:
        return mean[row_of[half]] - mean[row_of[everyone - half]]

    null = np.array([beyond(frozenset(half)) for half in combinations(range(N_HEADS), N_HEADS // 2)])
    difference = beyond(frozenset(heads))
    return difference, (np.abs(null) >= abs(difference) - ROUNDING).mean()


# --- one model ---


def test_the_planted_model_answers_as_worked_by_hand(even_run: xr.Dataset) -> None:
    np.testing.assert_allclose(even_run.clean_logit_diff[0], 1.5 * BY_PROMPT, **CLOSE)
    np.testing.assert_allclose(even_run.corrupt_logit_diff[0], -1.5 * BY_PROMPT, **CLOSE)


def test_every_patched_run_is_the_sum_of_its_even_heads_and_of_nothing_else(even_run: xr.Dataset) -> None:
    n_even = even_run.mask.values[:, ::2].sum(1)
    expected = -1.5 * BY_PROMPT + 0.5 * n_even[:, None] * BY_PROMPT
    np.testing.assert_allclose(even_run.logit_diff[0].sel(layer=LAYER), expected, **CLOSE)
    for layer in {*range(N_LAYERS)} - {LAYER}:
        unmoved = np.broadcast_to(-1.5 * BY_PROMPT, expected.shape)
        np.testing.assert_allclose(even_run.logit_diff[0].sel(layer=layer), unmoved, **CLOSE)


def test_even_against_odd_is_six_nats_and_no_halving_gives_more(even_run: xr.Dataset) -> None:
    frame = parity(even_run)
    assert frame is not None
    found = frame.xs(LAYER, level="layer").iloc[0]
    assert found["difference"] == pytest.approx(6.0, abs=1e-5)
    assert found["p"] == found["p_even"] == found["p_odd"] == pytest.approx(LEAST_P)
    # Prompts give 3, 6 and 9 nats: symmetric, so that the interval is Student's.
    reach = stats.t.isf(0.025, 2) * 3 / np.sqrt(3)
    assert (found["low"], found["high"]) == (pytest.approx(6 - reach, abs=1e-4), pytest.approx(6 + reach, abs=1e-4))
    assert found["p_adjusted"] == pytest.approx(N_LAYERS * LEAST_P)


def test_the_other_layers_show_nothing_not_even_rounding(even_run: xr.Dataset) -> None:
    frame = parity(even_run)
    assert frame is not None
    others = frame.drop(index=LAYER, level="layer")
    assert (others[["p", "p_even", "p_odd"]] == 1).all(axis=None)
    assert others["difference"].abs().max() < 1e-5


def test_even_heads_restore_every_failing_prompt_and_odd_ones_none(even_run: xr.Dataset) -> None:
    frame = rates(even_run, "denoise").xs(LAYER, level="layer").droplevel("checkpoint")
    assert (frame["failing"] == 3).all() and (frame["n_clear"] == 3).all() and (frame["broken"] == 0).all()
    assert frame["restored"].to_dict() == {"even": 3, "odd": 0, "all": 3}
    expected = {"even": 1, "odd": 0, "all": 1}
    for column in ("recovery", "recovery_low", "recovery_high"):
        assert frame[column].to_dict() == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_who_carries_it_by_every_coalition(tmp_path: Path) -> None:
    """Each even head is worth 1 nat (prompts 0.5, 1 and 1.5) and each odd one 0, whoever else is patched.

    80 % of 6 nats takes five even heads, any five of six, and losing five loses as much.  Of the variance over
    coalitions, 6/4, their number of heads explains half: that of even ones given the number is the other half.
    """
    model = save(planted(CARRY), tmp_path / "model", tokenizer=tokenizer())
    found = head_subset_statistics(cached_and_patched(model, tmp_path, ["lattice"], [str(LAYER)]), "denoise")
    assert found is not None
    one, is_even = found.isel(checkpoint=0, layer=0), np.arange(N_HEADS) % 2 == 0
    for name in ("shapley", "banzhaf"):
        np.testing.assert_allclose(one[name], 1.0 * is_even, **CLOSE)
    reach = stats.t.isf(0.025, 2) * 0.5 / np.sqrt(3)
    expected = [(1 - reach) * is_even, (1 + reach) * is_even]
    np.testing.assert_allclose([one.shapley_low, one.shapley_high], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(one.interaction.values[~np.eye(N_HEADS, dtype=bool)], 0, **CLOSE)
    for name in ("sufficient", "necessary"):
        assert (int(one[name]), int(one[f"{name}_count"])) == (5, 6)
    np.testing.assert_allclose(one.worst_even[1:7], range(1, 7), **CLOSE)
    np.testing.assert_allclose(one.worst_even_p[1:7], 1 / 924)
    assert float(one.parity) == pytest.approx(0.5, abs=1e-5) and float(one.parity_p) == pytest.approx(2 / 924)


@pytest.mark.slow
@pytest.mark.parametrize("carriers", [range(1, N_HEADS, 2), (0, 1, 2, 3, 4, 5), (0, 3, 4, 7, 8, 11)])
def test_the_finding_is_where_it_was_planted(carriers: Sequence[int], tmp_path: Path) -> None:
    model = save(planted(CARRY, NOISE, carriers=carriers), tmp_path / "model", tokenizer=tokenizer())
    found, p = finding(cached_and_patched(model, tmp_path), carriers)
    assert found == pytest.approx(6.0, abs=1.0) and p == pytest.approx(LEAST_P)


@pytest.mark.slow
def test_permuting_the_heads_moves_the_finding_to_where_they_went(tmp_path: Path) -> None:
    """What was even is now the first half, of which as many are even as odd."""
    order = (0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11)
    save(planted(CARRY, NOISE), tmp_path / "before" / "m", tokenizer=tokenizer())
    renumber_heads(tmp_path / "before" / "m", tmp_path / "after" / "m", LAYER, order)
    before, after = (cached_and_patched(tmp_path / name / "m", tmp_path / name) for name in ("before", "after"))
    moved_to = tuple(np.flatnonzero(np.array(order) % 2 == 0))
    strength, p = finding(before, range(0, N_HEADS, 2))
    assert p == pytest.approx(LEAST_P) and strength == pytest.approx(6.0, abs=0.5)
    assert finding(after, moved_to) == (pytest.approx(strength, abs=1e-5), pytest.approx(LEAST_P))
    strength, p = finding(after, range(0, N_HEADS, 2))
    frame = parity(after)
    assert frame is not None
    assert abs(strength) < 1 and p > 0.5 and frame["p"].xs(LAYER, level="layer").item() == pytest.approx(p)


# --- a series ---


@pytest.mark.slow
def test_the_strength_of_a_series_is_what_was_planted_at_each_step(series_run: xr.Dataset) -> None:
    frame = parity(series_run)
    assert frame is not None
    strength = frame["difference"].xs(LAYER, level="layer")
    np.testing.assert_allclose(strength, [0, 0, 0, 0, 3, 6, 6, 6, 6], rtol=0, atol=0.5)


@pytest.mark.thorough
def test_even_stands_out_from_the_onset_on_and_not_before_nor_elsewhere(series_run: xr.Dataset) -> None:
    frame = parity(series_run)
    assert frame is not None
    step = frame.index.get_level_values("checkpoint").str.removeprefix("step").astype(int)
    is_planted = (frame.index.get_level_values("layer") == LAYER) & (step > ONSET)
    assert (frame["p"][is_planted] == frame["p"].min()).all() and frame["p"].min() == pytest.approx(LEAST_P)
    assert (frame["p_adjusted"][is_planted] <= 0.05).all() and (frame["p_adjusted"][~is_planted] > 0.05).all()


@pytest.mark.thorough
def test_the_onset_is_dated_within_its_interval(series_run: xr.Dataset) -> None:
    """Even and odd part by 6 (step - 300) / 200 nats, which is past 0.5 from step 317 on.

    (Rates are no ground truth here: before the onset they count the signs of noise.)
    """
    frame = onsets(series_run, "denoise").set_index(["measure", "layer", "unit"])
    found = frame.loc[("even − odd divergence", LAYER, "nats")]
    assert (found["after"], found["by"], found["censored"]) == (300, 400, "")
    assert found["low"] <= 317 <= found["high"] and found["shape"] != "none"
    for layer in {*range(N_LAYERS)} - {LAYER}:
        assert frame.loc[("even − odd divergence", layer, "nats"), "censored"] == "right"


@pytest.mark.thorough
def test_an_onset_outside_the_checkpoints_is_censored(series_run: xr.Dataset) -> None:
    for steps, side in ((range(0, ONSET + 1), "right"), (range(500, 900), "left")):
        frame = onsets(series_run.sel(checkpoint=series_run.step.isin(steps)), "denoise")
        found = frame.set_index(["measure", "layer", "unit"]).loc[("even − odd divergence", LAYER, "nats")]
        assert found["censored"] == side


@pytest.mark.thorough
def test_the_hypotheses_find_the_third_of_the_training_it_was_planted_in(series_run: xr.Dataset) -> None:
    evaluation = hypotheses(series_run, "denoise", LAYER)
    assert evaluation is not None
    frame = hypotheses_table(evaluation)
    verdict = frame["verdict"]
    expected = {"H1 early": "contradicted", "H2 middle": "supported", "H3 late": "contradicted"}
    assert verdict[list(expected)].to_dict() == expected
    assert "p = 0.0022" in frame["evidence"].iloc[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "least", "said"),
    [
        (("--subsets", "balanced", "all"), "0.002", "over all 924 equal splits"),
        (("--subsets", "all", "splits:99"), "0.010", "over 99 random ones"),
    ],
)
def test_the_commands_print_the_finding(
    series: Path, tmp_path: Path, words: Sequence[str], least: str, said: str
) -> None:
    digits = task(tmp_path / "digits.jsonl")
    cached = run("cache", "--model", series / "model", "--checkpoints", "step800", "--task", digits, cache=tmp_path)
    assert cached.returncode == 0, cached.stderr
    done = run("patch", *words, "--correction", "holm", "--verbose", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    _, _, table = done.stdout.partition("p adjusted")
    row = next(line for line in table.splitlines() if line.startswith("step800 ")).split()
    assert row[1] == str(LAYER) and float(row[2]) == pytest.approx(6.0, abs=0.5) and row[6] == least
    assert said in table and "over 3 layers and checkpoints (Holm); 1 of them" in table
    assert next(line for line in table.splitlines() if "3 of 3" in line).split()[5:7] == ["100%", "44..100"]


# --- the answer first ---

MANY_PAIRS = tuple((clean, corrupt) for clean in range(6, 10) for corrupt in range(1, 5))


def test_the_verdict_of_the_default_run_names_the_one_head_that_does_everything(tmp_path: Path) -> None:
    """Four layers; head 5 of layer 1 carries the answer from step 300 on, through caching and patching as they are."""
    for seed, step in enumerate((0, 100, 200, 300, 400)):
        model = planted(0.5 if step >= 300 else 0.0, NOISE, seed, carriers=(5,), n_layers=4)
        save(model, tmp_path / "model" / f"step{step}", tokenizer=tokenizer())
    run = cached_and_patched(tmp_path / "model", tmp_path, PatchRequest().subsets, pairs=MANY_PAIRS)
    settings = PatchSettings.from_attributes(run.attrs["patch"])
    lines = verdict(run, settings, {"model": "planted", "task": "digits"})
    assert len(lines) <= 12 and max(map(len, lines)) <= 100
    row = next(line for line in lines[:5] if line.startswith("  L1.H5"))
    effect = head_effects(run, settings).loc[("step400", 1, 5)]
    # Patched alone it writes 1/2 for each digit that clean and corrupt prompt are apart, 5 on average.
    assert effect["effect"] == pytest.approx(2.5, abs=0.3) and effect["low"] < 2.5 < effect["high"]
    assert format_estimate(effect["effect"], effect["low_joint"], effect["high_joint"]) in row
    assert "from step 200-300" in row and "p < .001" in row
    assert "7 splits are too few: --subsets balanced" in next(line for line in lines if line.startswith("even/odd"))
    assert "stock transformers within" in next(line for line in lines if line.startswith("checked"))


# --- models where nothing is planted, and the power where something is ---

N_NULL, N_PLANTED, EFFECT = 300, 150, 2.0

EVEN = np.arange(N_HEADS) % 2 == 0
HALVES = parse_subsets(("balanced",), N_HEADS).mask
SINGLE = parse_subsets(("each",), N_HEADS).mask


def replayed(
    resident: ResidentModel,
    weights: Mapping[str, torch.Tensor],
    trials: Trials,
    layers: Sequence[int],
    mask: np.ndarray,
) -> np.ndarray:
    """Mean logit difference of every patched run (layer, subset)."""
    resident.load_weights(weights)
    kept = capture(resident, trials, memory=2**30)
    sites = [(layer,) for layer in layers]
    return replay(resident, kept, trials, align(trials, "last"), "denoise", sites, mask).mean(-1, dtype=float)


def place_of_even(mean: np.ndarray) -> float:
    """Of even minus odd among all halvings; `mean` belongs to HALVES, whose complements are its reverse."""
    null = mean - mean[::-1]
    return permutation_p_value(null[np.flatnonzero((HALVES == EVEN).all(1)).item()], null)


@pytest.fixture(scope="module")
def null_p() -> np.ndarray:
    """p of even against odd heads in both layers of `N_NULL` models of random weights, by the real replay."""
    config = GPTNeoXConfig(
        **SHAPE | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": N_HEADS}, intermediate_size=48
    )
    resident, trials, model = ResidentModel(config, torch.float32, "cpu"), random_trials(2), randomised(config)
    with unchecked():
        means = [replayed(resident, redrawn(model, n).state_dict(), trials, (0, 1), HALVES) for n in range(N_NULL)]
        return np.array([[place_of_even(layer) for layer in layers] for layers in means])


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.01, 0.05, 0.10, 0.25, 0.5])
def test_random_models_are_rejected_as_often_as_the_level_says(null_p: np.ndarray, level: float) -> None:
    """At 5 % in 5 % of 600 null layers (300 models), plus or minus the binomial standard error of 0.9 %, three times.

    Twelve heads attain the levels k 2/924; the largest up to 5 % is 46/924 = 4.98 %.  Heads of random weights are
    alike in law, and so whatever their order in one layer says nothing about that in the other: layers are independent.
    """
    attained = np.floor(level / LEAST_P + 1e-9) * LEAST_P
    error = np.sqrt(attained * (1 - attained) / null_p.size)
    assert abs((null_p <= level).mean() - attained) <= 3 * error


@pytest.mark.slow
def test_p_of_random_models_are_uniform_and_unrelated_between_layers(null_p: np.ndarray) -> None:
    """Chi-squared over eleven equal classes (each of 42 attainable values), and Spearman's rank correlation."""
    counts = np.histogram(null_p, bins=np.arange(12) * 42 * LEAST_P + LEAST_P / 2)[0]
    assert counts.sum() == null_p.size and stats.chisquare(counts).pvalue > 0.001
    assert stats.spearmanr(null_p[:, 0], null_p[:, 1]).pvalue > 0.001


@pytest.mark.slow
def test_an_effect_of_two_standard_deviations_is_found_in_nine_models_of_ten(tmp_path: Path) -> None:
    """Power, in 150 planted models: even heads each carry 2 standard deviations of what heads differ by otherwise.

    By Student's t of 6 against 6 heads that is found at 5 % in 88 % of models, and the permutation test attains the
    same power (Hoeffding 1952); here within three binomial standard errors of it (2.7 %).
    """
    trials = draw_trials(str(task(tmp_path / "digits.jsonl")), None, tokenizer(), 16)
    resident = ResidentModel(planted(0.0).config, torch.float32, "cpu")
    noise = 0.1

    def means(carry: float, seed: int, mask: np.ndarray) -> np.ndarray:
        return replayed(resident, planted(carry, noise, seed).state_dict(), trials, (LAYER,), mask)[0]

    with unchecked():
        spreads = [means(0.0, seed, SINGLE).std(ddof=1) for seed in range(60)]
        carry = EFFECT * np.sqrt(np.mean(np.square(spreads))) / 4  # a head writes it 2 x (1, 2, 3) times
        p_values = [place_of_even(means(carry, seed, HALVES)) for seed in range(N_PLANTED)]
    beyond, shift = stats.t.isf(0.025, 10), EFFECT * np.sqrt(6 / 2)
    power = stats.nct.sf(beyond, 10, shift) + stats.nct.cdf(-beyond, 10, shift)
    assert power == pytest.approx(0.88, abs=0.01)
    error = np.sqrt(power * (1 - power) / N_PLANTED)
    assert abs(np.mean(np.array(p_values) <= 0.05) - power) <= 3 * error
