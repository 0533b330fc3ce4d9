"""Laws of the joint test: relabelling heads is indexing, exact at its level, and finds what goes through all layers."""

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

import headlapse
from headlapse.engine.statistics.joint import SplitDifferences, joint_test
from headlapse.engine.statistics.permutation import EqualSplits, find_equal_splits, joint_parity, parity
from headlapse.engine.study.subsets import (
    count_equal_splits,
    count_subsets,
    doubling_splits,
    is_symmetric,
    parse_subsets,
)
from headlapse.pipeline import open_run
from tests.models import save, tiny, tiny_tokenizer
from tests.simulating import unchecked
from tests.test_splits import run_of

N_LAYERS, N_CHECKPOINTS, N_HEADS = 4, 15, 8
EVEN = np.arange(N_HEADS) % 2 == 0
DEFAULT = ("even", "odd", "all", "each", "splits")


def splits_of(words: tuple[str, ...], n_heads: int = N_HEADS) -> EqualSplits:
    splits = find_equal_splits(run_of(np.zeros((1, 1, n_heads)), words))
    assert splits is not None
    return splits


def p_of(heads: np.ndarray, splits: EqualSplits, noise: float = 0.0) -> float:
    """Of heads (checkpoint, layer, head) that add up."""
    nats = heads @ (2.0 * splits.mask - 1).T
    differences = SplitDifferences(nats, np.full(nats.shape[:2], noise**2), splits.even, splits.swaps)
    return joint_test(differences, np.flatnonzero(splits.mask[:, 0])).p


def random_series(rng: np.random.Generator, dominant: bool = False) -> np.ndarray:
    """Heads of random effects that start at random checkpoints and stay, each in its layer."""
    effects = rng.standard_normal((N_LAYERS, N_HEADS))
    if dominant:
        effects[np.arange(N_LAYERS), rng.integers(N_HEADS, size=N_LAYERS)] += 5
    begun = np.arange(N_CHECKPOINTS)[:, None, None] >= rng.integers(N_CHECKPOINTS, size=(N_LAYERS, N_HEADS))
    return np.asarray(effects * begun + 0.02 * rng.standard_normal(begun.shape))


def test_it_is_every_split_and_every_swap_by_hand() -> None:
    """Two layers, two checkpoints, four heads: three splits, of which the second layer's halves are swapped or not."""
    heads = np.random.default_rng(0).standard_normal((2, 2, 4))
    splits = splits_of(("balanced",), 4)
    run = run_of(heads, ("even", "odd", "balanced"))
    found = joint_parity(run)
    assert found is not None and found.exact and found.n_labellings == 6 and found.least == 1 / 6
    by_split = {half: 2.0 * np.isin(np.arange(4), half) - 1 for half in combinations(range(4), 2) if 0 in half}
    nats = {half: heads @ sides for half, sides in by_split.items()}
    size = np.sqrt(np.mean([value**2 for value in nats.values()], axis=0) + 0.05**2)
    signed, unsigned = {}, {}
    for half, swap in product(nats, (1, -1)):
        cells = nats[half] / size
        signed[half, swap] = np.abs(cells @ [1, swap]).max()
        unsigned[half, swap] = np.abs(cells).max()
    at_hand = ((0, 2), 1)
    share = {name: np.mean([x >= values[at_hand] - 1e-5 for x in values.values()])
             for name, values in (("signed", signed), ("unsigned", unsigned))}  # fmt: skip
    assert (found.p_signed, found.p_unsigned) == (pytest.approx(share["signed"]), pytest.approx(share["unsigned"]))
    assert splits.n_splits == 3 and splits.swaps


def test_adjusted_p_of_a_cell_are_the_share_of_splits_with_a_larger_one_anywhere() -> None:
    heads = np.random.default_rng(1).standard_normal((3, 2, 6))
    run = run_of(heads, ("balanced",))
    frame, splits = parity(run), find_equal_splits(run)
    assert frame is not None and splits is not None
    nats = heads @ (2.0 * splits.mask - 1).T
    size = np.abs(nats) / np.sqrt((nats**2).mean(-1, keepdims=True) + 0.05**2)
    largest = size.max((0, 1))
    expected = [(largest >= value - 1e-5).mean() for value in size[..., splits.even].ravel()]
    np.testing.assert_allclose(frame["p_joint"], expected)
    assert (frame["p_joint"] >= frame["p"] - 1e-9).all(), "never less than a cell's own"


def test_what_is_next_to_nothing_or_noise_over_prompts_counts_for_less() -> None:
    nats = np.array([[1.0, -1.0, 0.0, 0.0]])
    clear, noisy, tiny = (
        SplitDifferences(nats * scale, np.array([noise]), 0, True).standardised()[0, 0]
        for scale, noise in ((1.0, 0.0), (1.0, 1.0), (0.01, 0.0))
    )
    assert clear == pytest.approx(np.sqrt(1 / 0.5025)) and noisy < clear / 1.5 and tiny < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("words", [("balanced",), ("splits",)], ids=str)
def test_models_without_parity_are_rejected_in_four_to_six_percent(words: tuple[str, ...]) -> None:
    """Models of random heads that start at random, at 5 %.  The standard error of 4,000 models is 0.34 points; 48
    relabellings of the default run attain 2/48 = 4.2 %."""
    rng, splits = np.random.default_rng(2), splits_of(words)
    with unchecked():
        found = np.array([p_of(random_series(rng), splits) for _ in range(4000)])
    level = np.floor(0.05 * 48) / 48 if words == ("splits",) else 0.05
    error = np.sqrt(level * (1 - level) / len(found))
    assert abs((found <= 0.05).mean() - level) <= 3 * error and 0.035 < (found <= 0.05).mean() < 0.06


@pytest.mark.slow
def test_dominant_heads_make_no_parity() -> None:
    """2,000 models with one dominant head a layer: at most 5 %, within three standard errors (1.5 points)."""
    rng, splits = np.random.default_rng(3), splits_of(("balanced",))
    with unchecked():
        found = np.array([p_of(random_series(rng, dominant=True), splits) for _ in range(2000)])
    assert (found <= 0.05).mean() <= 0.05 + 0.015


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_perfect_even_effect_in_every_layer_from_mid_training_is_found_by_the_default_run(noise: float) -> None:
    """1,000 models of 4 layers, 8 heads and 15 checkpoints; `noise` is what heads differ by otherwise, beside 1 nat."""
    rng, splits = np.random.default_rng(4), splits_of(DEFAULT)
    started = np.arange(N_CHECKPOINTS)[:, None, None] >= N_CHECKPOINTS // 2
    with unchecked():
        found = [
            p_of(EVEN * started + noise * rng.standard_normal((N_CHECKPOINTS, N_LAYERS, N_HEADS)), splits, noise / 4)
            for _ in range(1000)
        ]
    assert np.mean(np.array(found) <= 0.05) >= 0.99


def test_a_pattern_in_one_layer_of_eight_heads_is_found_among_all_splits_and_not_among_a_few() -> None:
    heads = np.zeros((N_CHECKPOINTS, N_LAYERS, N_HEADS))
    heads[8:, 1] = EVEN
    assert p_of(heads, splits_of(("balanced",))) <= 0.05 < p_of(heads, splits_of(DEFAULT))


def test_many_layers_are_sampled_and_the_one_at_hand_counts() -> None:
    heads = np.tile(1.0 * (np.arange(12) % 2 == 0), (2, 16, 1))
    splits = splits_of(("splits",), 12)
    nats = heads @ (2.0 * splits.mask - 1).T
    once = np.flatnonzero(splits.mask[:, 0])
    found = joint_test(SplitDifferences(nats, np.zeros((2, 16)), splits.even, splits.swaps), once)
    assert not found.exact and found.n_labellings == 10_000 and found.p < 0.003


def test_where_halves_are_unequal_nothing_is_swapped() -> None:
    run = run_of(np.random.default_rng(5).standard_normal((2, 3, 5)), ("size:2", "size:3", "even", "odd"))
    found = joint_parity(run)
    assert found is not None and found.n_labellings == 10 and found.exact


# --- the plain word `splits` ---


@pytest.mark.parametrize("n_heads", [3, 4, 8, 9, 12, 32])
def test_the_default_null_at_most_doubles_the_run(n_heads: int) -> None:
    before = len(parse_subsets(DEFAULT[:-1], n_heads))
    after = parse_subsets(DEFAULT, n_heads)
    assert before < len(after) <= 2 * before
    n_splits = min(doubling_splits(n_heads) + 1, count_equal_splits(n_heads))
    assert count_subsets("splits", n_heads) == 2 * n_splits == len(parse_subsets(("splits",), n_heads))
    assert parse_subsets(("splits",), n_heads).labels[:2] == ("even", "odd")


# --- grouped queries ---


@pytest.mark.parametrize(
    ("n_heads", "n_groups", "n_halves"), [(8, 2, 36), (8, 4, 16), (9, 3, 81), (6, 2, 18), (8, 1, 70)]
)
def test_under_grouped_queries_heads_are_exchanged_within_groups_and_groups_as_wholes(
    n_heads: int, n_groups: int, n_halves: int
) -> None:
    """Every exchange of the symmetry group, one by one, makes these halves of the even heads and no other."""
    width = n_heads // n_groups
    rng, even = np.random.default_rng(6), np.arange(n_heads) % 2 == 0
    made = set()
    for _ in range(6000):
        order = np.concatenate([group * width + rng.permutation(width) for group in rng.permutation(n_groups)])
        made.add(even[order].tobytes())
    every = parse_subsets((f"size:{n_heads - n_heads // 2}",), n_heads).mask
    symmetric = every[is_symmetric(every, n_groups)]
    assert {heads.tobytes() for heads in symmetric} == made and len(made) == n_halves
    assert count_equal_splits(n_heads, n_groups) == n_halves // (1 if n_heads % 2 else 2)
    words = (f"size:{n_heads // 2}", f"size:{n_heads - n_heads // 2}")
    run = run_of(np.random.default_rng(7).standard_normal((1, 2, n_heads)), words)
    run.attrs["patch"]["n_groups"] = n_groups
    splits = find_equal_splits(run)
    assert splits is not None and not splits.sampled and len(splits.halves) == n_halves
    assert splits.swaps == (n_heads % 2 == 0)


def test_random_splits_of_grouped_queries_are_drawn_from_the_symmetry_group() -> None:
    subsets = parse_subsets(("splits:7",), 8, n_groups=4)
    assert len(subsets) == 16 and is_symmetric(subsets.mask, 4).all(), "all that there are"
    drawn = parse_subsets(("splits:20",), 12, n_groups=2)
    assert len(drawn) == 42 and is_symmetric(drawn.mask, 2).all() and len(np.unique(drawn.mask, axis=0)) == 42
    run = run_of(np.random.default_rng(8).standard_normal((1, 1, 12)), ("splits:20",))
    assert find_equal_splits(run) is not None
    assert parse_subsets(("splits:9",), 12).labels == parse_subsets(("splits:9",), 12, n_groups=1).labels


@pytest.mark.slow
def test_a_model_of_grouped_queries_is_patched_along_its_symmetry_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    model = tiny("llama-gqa", 0)
    n_heads, n_groups = model.config.num_attention_heads, model.config.num_key_value_heads
    assert 1 < n_groups < n_heads
    save(model, tmp_path / "model" / "step1", tokenizer=tiny_tokenizer())
    run = headlapse.cache(tmp_path / "model", trials=3).patch(layers="0")
    assert run.settings.n_groups == n_groups
    splits = find_equal_splits(open_run(run.store.path, run.name)[0])
    assert splits is not None and is_symmetric(splits.mask, n_groups).all()
    assert splits.n_splits == min(doubling_splits(n_heads) + 1, count_equal_splits(n_heads, n_groups))
