"""Laws of replay: a patched run from the cache equals its definition in reference.py."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from headlapse.engine.capture.forward import capture
from headlapse.engine.checkpoints.attention_hook import AttentionMode
from headlapse.engine.checkpoints.model import ResidentModel
from headlapse.engine.replay.layers import LayerRunner
from headlapse.engine.replay.replay import BATCH_ROWS, Site, replay, run_batches, runs_at_once
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.store.activations import Capture
from headlapse.engine.study.alignment import align
from headlapse.engine.study.prompts import Trials
from tests.models import (
    D_MODEL,
    LEARNED_POSITIONS,
    MAIN,
    MORE,
    N_LAYERS,
    Lengths,
    all_subsets,
    clean_to_clean,
    random_subsets,
    random_trials,
    swapped,
    tiny,
    trials_of,
)
from tests.reference import CLEAN, CORRUPT, Direction, logit_diff, logit_diffs, run_logit_diff

EXACT = 1e-4
"""Largest difference allowed between replay and a full hooked forward, in nats."""

MEMORY = 2**30

DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
LAYOUTS: tuple[tuple[str, Lengths], ...] = (("last", "unequal"), ("end:3", "unequal"), ("all", "paired"))
"""Positions, and the lengths they allow."""

SINGLE: tuple[Site, ...] = tuple((layer,) for layer in range(N_LAYERS))
JOINT: tuple[Site, ...] = ((0, 2), (0, 1, 2))


Pair = tuple[PreTrainedModel, ResidentModel]
"""A stock model, and a resident with its weights."""


def loaded(model: PreTrainedModel) -> Pair:
    resident = ResidentModel(model.config, torch.float32, "cpu")
    resident.load_weights(model.state_dict())
    return model, resident


@cache
def pair(name: str) -> Pair:
    return loaded(tiny(name))


def replayed(
    resident: ResidentModel,
    trials: Trials,
    positions: str,
    direction: Direction,
    sites: Sequence[Site],
    mask: np.ndarray,
    activations: Capture | None = None,
) -> np.ndarray:
    captured = activations or capture(resident, trials, MEMORY)
    return replay(resident, captured, trials, align(trials, positions), direction, sites, mask)


def largest_difference(
    both: Pair, trials: Trials, positions: str, direction: Direction, sites: Sequence[Site], mask: np.ndarray
) -> float:
    """The largest difference between replay and the definition, in nats."""
    model, resident = both
    found = replayed(resident, trials, positions, direction, sites, mask)
    expected = np.stack([logit_diffs(model, trials, positions, site, mask, direction) for site in sites])
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


# Against the definition


@pytest.mark.parametrize("sites", [SINGLE, JOINT], ids=["single", "joint"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("positions", "lengths"), LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
def test_replay_equals_a_full_hooked_forward_for_200_random_subsets(
    name: str, positions: str, lengths: Lengths, direction: Direction, sites: Sequence[Site]
) -> None:
    _, resident = pair(name)
    mask = random_subsets(200, resident.architecture.n_heads)
    difference = largest_difference(pair(name), random_trials(lengths=lengths), positions, direction, sites, mask)
    print(f"{name} {positions} {direction}: {difference:.1e}")
    assert len(mask) == 200 and difference <= EXACT


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("positions", "lengths"), LAYOUTS)
@pytest.mark.parametrize("name", MORE)
def test_replay_equals_a_full_hooked_forward_for_other_architectures(
    name: str, positions: str, lengths: Lengths, direction: Direction
) -> None:
    _, resident = pair(name)
    mask = random_subsets(12, resident.architecture.n_heads)
    trials = random_trials(2, lengths=lengths)
    difference = largest_difference(pair(name), trials, positions, direction, (*SINGLE, *JOINT), mask)
    print(f"{name} {positions} {direction}: {difference:.1e}")
    assert difference <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_replay_equals_the_definition_one_run_at_a_time(name: str) -> None:
    """The tests above run the definition's subsets as one batch; here it stands alone."""
    model, resident = pair(name)
    mask = random_subsets(4, resident.architecture.n_heads, seed=1)
    for positions, lengths in LAYOUTS:
        trials = random_trials(seed=1, lengths=lengths)
        for direction in DIRECTIONS:
            found = replayed(resident, trials, positions, direction, [(1,), (0, 2)], mask)
            for row, site in enumerate([(1,), (0, 2)]):
                expected = [
                    logit_diff(model, trials, positions, site, np.flatnonzero(heads), direction) for heads in mask
                ]
                np.testing.assert_allclose(found[row], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_replay_is_exact_when_the_patch_covers_a_whole_short_prompt(name: str) -> None:
    """No prefix is left whose keys and values are known, neither in the source nor in the target run."""
    clean, corrupt = [[2, 3, 4, 5, 6, 7], [8, 9, 10]], [[11, 12, 13], [14, 15, 16, 17]]
    trials = trials_of(clean, corrupt, answers=[(20, 21), (22, 23)])
    mask = random_subsets(20, 8)
    for direction in DIRECTIONS:
        assert largest_difference(pair(name), trials, "end:3", direction, (*SINGLE, *JOINT), mask) <= EXACT


@pytest.mark.parametrize("name", MAIN)
def test_replay_is_exact_for_prompts_of_a_single_token(name: str) -> None:
    trials = trials_of([[2], [3, 4, 5]], [[6, 7], [8]], answers=[(20, 21), (22, 23)])
    mask = random_subsets(20, 8)
    for direction in DIRECTIONS:
        assert largest_difference(pair(name), trials, "last", direction, (*SINGLE, *JOINT), mask) <= EXACT
    trials = trials_of([[2], [3, 4, 5]], [[6], [8, 9, 10]], answers=[(20, 21), (22, 23)])
    assert largest_difference(pair(name), trials, "all", "denoise", (*SINGLE, *JOINT), mask) <= EXACT


def test_a_sliding_window_just_as_long_as_the_longest_prompt_is_exact_and_a_shorter_one_refused() -> None:
    trials, mask = random_trials(), random_subsets(20, 8)
    longest = int(trials.length.max())
    exact = loaded(tiny("mistral-wide-window", sliding_window=longest))
    assert largest_difference(exact, trials, "end:3", "denoise", (*SINGLE, *JOINT), mask) <= EXACT
    _, short = loaded(tiny("mistral-wide-window", sliding_window=longest - 1))
    with pytest.raises(UserError, match=f"window of {longest - 1}"):
        capture(short, trials, MEMORY)


# Laws


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", MAIN)
def test_patching_no_head_is_the_target_run(name: str, direction: Direction) -> None:
    model, resident = pair(name)
    for positions, lengths in LAYOUTS:
        trials = random_trials(lengths=lengths)
        target = run_logit_diff(model, trials)[CORRUPT if direction == "denoise" else CLEAN]
        found = replayed(resident, trials, positions, direction, (*SINGLE, *JOINT), all_subsets(8)[:1])
        np.testing.assert_allclose(found, np.broadcast_to(target, found.shape), rtol=0, atol=EXACT)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", MAIN)
def test_patching_every_head_of_every_layer_is_the_source_run_where_the_last_tokens_are_the_same(
    name: str, direction: Direction
) -> None:
    """And their places too, where positions are learned and added to the residual stream."""
    model, resident = pair(name)
    trials = random_trials(lengths="paired" if name in LEARNED_POSITIONS else "unequal", shared_end=1)
    source = run_logit_diff(model, trials)[CLEAN if direction == "denoise" else CORRUPT]
    found = replayed(resident, trials, "last", direction, [tuple(range(N_LAYERS))], all_subsets(8)[-1:])
    np.testing.assert_allclose(found[0, 0], source, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_a_clean_to_clean_patch_changes_nothing(name: str) -> None:
    model, resident = pair(name)
    trials = clean_to_clean(random_trials())
    clean = run_logit_diff(model, trials)[CLEAN]
    for positions in ("last", "end:3", "all"):
        found = replayed(resident, trials, positions, "denoise", (*SINGLE, *JOINT), random_subsets(20, 8))
        np.testing.assert_allclose(found, np.broadcast_to(clean, found.shape), rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_noise_is_denoise_with_the_runs_swapped(name: str) -> None:
    _, resident = pair(name)
    trials, mask = random_trials(), random_subsets(20, 8)
    noised = replayed(resident, trials, "end:3", "noise", (*SINGLE, *JOINT), mask)
    denoised = replayed(resident, swapped(trials), "end:3", "denoise", (*SINGLE, *JOINT), mask)
    np.testing.assert_allclose(noised, denoised, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", MAIN)
def test_a_run_does_not_depend_on_what_runs_beside_it(name: str) -> None:
    """Whatever the split into passes, and with other subsets, sites and trials left out."""
    _, resident = pair(name)
    trials, mask = random_trials(), random_subsets(30, 8)
    captured, alignment = capture(resident, trials, MEMORY), align(trials, "end:3")
    together = replay(resident, captured, trials, alignment, "denoise", (*SINGLE, *JOINT), mask)
    for runs in (1, 11):
        split = replay(resident, captured, trials, alignment, "denoise", (*SINGLE, *JOINT), mask, runs=runs)
        np.testing.assert_allclose(split, together, rtol=0, atol=EXACT)
    alone = replay(resident, captured, trials, alignment, "denoise", JOINT[1:], mask[7:8])
    np.testing.assert_allclose(alone[0, 0], together[N_LAYERS + 1, 7], rtol=0, atol=EXACT)


def test_replay_is_the_same_bit_for_bit_again_and_leaves_the_skeleton_as_it_was() -> None:
    for name in MAIN:
        model, resident = pair(name)
        trials, mask = random_trials(), random_subsets(30, 8)
        captured = capture(resident, trials, MEMORY)
        first, again = (
            replayed(resident, trials, "last", "noise", (*SINGLE, *JOINT), mask, captured) for _ in range(2)
        )
        np.testing.assert_array_equal(first, again)
        worn = dict(resident.model.named_parameters())
        assert all(torch.equal(worn[key], value) for key, value in model.named_parameters())
        tokens = torch.from_numpy(trials.tokens[0])
        with torch.no_grad(), resident.stock() as stock:
            torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_replay_reports_every_patched_run_once() -> None:
    _, resident = pair("gpt2")
    trials, mask = random_trials(), random_subsets(30, 8)
    captured, completed = capture(resident, trials, MEMORY), list[int]()
    alignment = align(trials, "last")
    found = replay(resident, captured, trials, alignment, "denoise", SINGLE, mask, progress=completed.append, runs=3)
    assert len(completed) > 1 and sum(completed) == found.size


@pytest.mark.slow
def test_replay_goes_on_with_fewer_runs_where_memory_fails_and_reports_each_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, resident = pair("neox-parallel")
    trials, mask = random_trials(), random_subsets(30, 8)
    captured, completed = capture(resident, trials, MEMORY), list[int]()
    alignment, through = align(trials, "last"), LayerRunner.through
    expected = replay(resident, captured, trials, alignment, "denoise", SINGLE, mask)

    def narrow(self: LayerRunner, layer: int, resid_pre: torch.Tensor, mode: AttentionMode) -> torch.Tensor:
        # At every size a first batch is through by then, whatever the step from one size to the next.
        if sum(completed) and layer == N_LAYERS - 1 and resid_pre.shape[1] > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return through(self, layer, resid_pre, mode)

    monkeypatch.setattr(LayerRunner, "through", narrow)
    found = replay(resident, captured, trials, alignment, "denoise", SINGLE, mask, progress=completed.append, runs=40)
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)
    assert sum(completed) == found.size and min(completed) < 0


# Batches


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("joint", [False, True])
def test_batches_hold_every_run_once_in_equal_parts_and_early_layers_first(seed: int, joint: bool) -> None:
    draw = np.random.default_rng(seed)
    sites = [(int(layer),) for layer in draw.permutation(9)[: draw.integers(1, 9)]]
    if joint:
        sites = [tuple(sorted(draw.permutation(9)[: draw.integers(1, 5)].tolist())) for _ in sites]
    n_subsets, most = int(draw.integers(1, 40)), int(draw.integers(1, 60))
    found = list(run_batches(sites, n_subsets, most))
    runs = [(group.index, subset) for batch in found for group in batch for subset in range(group.first, group.last)]
    assert sorted(runs) == [(site, subset) for site in range(len(sites)) for subset in range(n_subsets)]
    sizes = [sum(group.n_runs for group in batch) for batch in found]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 <= min(sizes)
    assert len(sizes) == -(-len(runs) // most)
    groups = [group for batch in found for group in batch]
    assert all(group.n_runs > 0 and group.site == sites[group.index] for group in groups)
    layers = [group.site[0] for group in groups]
    assert layers == sorted(layers)


def test_memory_bounds_how_many_runs_go_together() -> None:
    _, resident = pair("neox-parallel")
    most = runs_at_once(resident, rows_per_run=3)
    few = [runs_at_once(resident, 3, memory) for memory in (0, 10**4, 10**5, 10**6, 10**12)]
    assert few[0] == 1 and few == sorted(few) and few[-1] == most and 1 < few[-3] < most


def test_runs_go_together_as_rows_of_a_batch_and_of_memory_allow() -> None:
    _, single = pair("neox-parallel")
    half = ResidentModel(tiny("neox-parallel").config, torch.bfloat16, "cpu")
    for rows_per_run in (1, 3, 100, BATCH_ROWS["cpu"], 10**6):
        most = runs_at_once(single, rows_per_run)
        assert most == max(1, BATCH_ROWS["cpu"] // rows_per_run)
        for memory in (10**4, 10**5, 10**6, 10**7):
            runs = runs_at_once(single, rows_per_run, memory)
            assert runs == runs_at_once(half, rows_per_run, memory // 2), "numbers half as wide, twice as many rows"
            assert runs == 1 or (runs <= most and runs * rows_per_run * D_MODEL * 4 < memory)


@pytest.mark.parametrize(("positions", "lengths"), LAYOUTS)
@pytest.mark.parametrize("name", ["neox-parallel", "neox-sequential"])
def test_little_memory_gives_what_plenty_gives(name: str, positions: str, lengths: Lengths) -> None:
    _, resident = pair(name)
    trials, mask, sites = random_trials(lengths=lengths), random_subsets(30, 8), (*SINGLE, *JOINT)
    captured, alignment = capture(resident, trials, MEMORY), align(trials, positions)
    results, n_batches = [], []
    for memory in (0, 500_000, 2**40):
        runs, completed = runs_at_once(resident, alignment.valid.size, memory), list[int]()
        results.append(
            replay(resident, captured, trials, alignment, "denoise", sites, mask, progress=completed.append, runs=runs)
        )
        n_batches.append(sum(n > 0 for n in completed))
    assert n_batches[0] == len(sites) * len(mask) > n_batches[1] > n_batches[2]
    for found in results[:2]:
        np.testing.assert_allclose(found, results[2], rtol=0, atol=1e-5)
