"""Laws of the statistics: what is planted is found, what is not is found as often as chance has it."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from headlapse.engine.report.findings.parity import parity_finding
from headlapse.engine.statistics.multiple_testing import CORRECTIONS, NAMES, adjust
from headlapse.engine.statistics.permutation import (
    find_equal_splits,
    halves_and_complements,
    parity,
    permutation_p_value,
)
from headlapse.engine.study.subsets import parse_subsets

SPLITS = {4: ("balanced",), 5: ("size:2", "size:3"), 6: ("balanced",), 8: ("balanced",)}


def run_of(effects: np.ndarray, words: tuple[str, ...] | None = None, noise: float = 0.0) -> xr.Dataset:
    """A run in which every patched head adds its own effect (checkpoint, layer, head), the same for all four prompts
    but for `noise`."""
    n_checkpoints, n_layers, n_heads = effects.shape
    subsets = parse_subsets(words or ("even", "odd", *SPLITS[n_heads]), n_heads)
    logit_diff = np.einsum("clh,sh->cls", effects, subsets.mask)[..., None].repeat(4, -1)
    logit_diff += noise * np.random.default_rng(1).standard_normal(logit_diff.shape)
    return xr.Dataset(
        {"logit_diff": (("checkpoint", "layer", "subset", "trial"), logit_diff.astype(np.float32))},
        attrs={"patch": {"subsets": list(words or ())}},
        coords={
            "checkpoint": [f"step{n}" for n in range(n_checkpoints)],
            "step": ("checkpoint", np.arange(n_checkpoints)),
            "complete": ("checkpoint", [True] * n_checkpoints),
            "layer": np.arange(n_layers),
            "subset": list(subsets.labels),
            "mask": (("subset", "head"), subsets.mask),
        },
    )


def test_a_permutation_p_value_is_twice_the_smaller_tail() -> None:
    null = np.array([-3.0, -1.0, 1.0, 3.0])
    assert [permutation_p_value(value, null) for value in null] == [0.5, 1.0, 1.0, 0.5]
    lopsided = np.array([0.0, 1.0, 2.0, 10.0, 20.0])
    assert permutation_p_value(20.0, lopsided) == pytest.approx(0.4) and permutation_p_value(2.0, lopsided) == 1.0
    assert permutation_p_value(0.0, np.zeros(6)) == 1.0


def test_it_is_scipys_permutation_test_where_that_lists_every_labelling() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        first, second = draw.standard_normal((2, 4))
        found = stats.permutation_test(
            (first, second), lambda a, b: a.sum() - b.sum(), permutation_type="independent", n_resamples=np.inf
        )
        assert permutation_p_value(first.sum() - second.sum(), found.null_distribution) == pytest.approx(found.pvalue)


@pytest.mark.parametrize("n_heads", [4, 5, 8])
def test_every_half_is_paired_with_its_complement(n_heads: int) -> None:
    mask = parse_subsets(("each", *SPLITS[n_heads]), n_heads).mask
    rows = halves_and_complements(mask)
    assert rows is not None
    halves, rests = (mask[row] for row in rows)
    assert (halves ^ rests).all() and len({half.tobytes() for half in halves}) == len(halves)


def test_without_every_equal_split_there_is_no_p() -> None:
    assert halves_and_complements(parse_subsets(("even", "odd", "each", "all"), 8).mask) is None
    assert halves_and_complements(parse_subsets(("balanced",), 5).mask) is None, "the larger halves are not there"
    assert halves_and_complements(parse_subsets(("balanced",), 8).mask[1:]) is None
    assert parity(run_of(np.ones((1, 1, 8)), ("even", "odd"))) is None


@pytest.mark.parametrize("n_heads", [5, 6, 8])
def test_where_only_even_heads_carry_the_answer_no_other_split_gives_more(n_heads: int) -> None:
    effects = np.where(np.arange(n_heads) % 2 == 0, 1.0, 0.0)[None, None]
    frame = parity(run_of(effects))
    assert frame is not None
    n = {5: 10, 6: 20, 8: 70}[n_heads]
    assert frame["p"].item() == pytest.approx(2 / n)
    assert frame["difference"].item() == pytest.approx(-(-n_heads // 2))


def test_odd_heads_are_found_as_well_and_permuted_heads_are_not() -> None:
    effects = np.array([0.0, 1, 0, 1, 0, 1, 0, 1])
    found, moved = (parity(run_of(one[None, None])) for one in (effects, np.sort(effects)))
    assert found is not None and moved is not None
    assert found["p"].item() == pytest.approx(2 / 70) and found["difference"].item() == pytest.approx(-4)
    assert moved["p"].item() == 1 and moved["difference"].item() == pytest.approx(0)


def test_even_and_odd_heads_alone_have_a_p_value_among_the_subsets_of_their_size() -> None:
    """Heads 0, 2, 4 add 1, 2, 3 and the others 0, 0, -9: even gives the most of 20 threes, odd the least."""
    frame = parity(run_of(np.array([1.0, 0, 2, 0, 3, -9])[None, None]))
    assert frame is not None and frame["p_even"].item() == frame["p_odd"].item() == pytest.approx(2 / 20)
    cancelling = parity(run_of(np.array([5.0, 9, 0, 0, 0, 0])[None, None]))
    assert cancelling is not None, "9 is head 1's; without it 10 of 20 give 5 less than nine"
    # Threes give 14, 9, 5 or 0: 4, 6, 6 and 4 of them.  Even gives 5, odd 9.
    assert cancelling["p_even"].item() == pytest.approx(1.0) and cancelling["p_odd"].item() == pytest.approx(1.0)
    for n_heads, sizes in ((5, (3, 2)), (6, (3, 3))):
        effects = np.random.default_rng(n_heads).standard_normal(n_heads)
        found = parity(run_of(effects[None, None]))
        assert found is not None
        for name, size, first in (("p_even", sizes[0], 0), ("p_odd", sizes[1], 1)):
            sums = np.array([effects[list(heads)].sum() for heads in combinations(range(n_heads), size)])
            assert found[name].item() == pytest.approx(permutation_p_value(effects[first::2].sum(), sums))


def test_what_differs_by_rounding_alone_is_not_significant() -> None:
    frame = parity(run_of(1e-7 * np.random.default_rng(6).standard_normal((1, 1, 8))))
    assert frame is not None and (frame[["p", "p_even", "p_odd"]] == 1).all(axis=None)


@pytest.mark.parametrize("n_heads", [8, 9])
def test_among_n_random_splits_p_is_phipson_and_smyths(n_heads: int) -> None:
    """(k + 1) / (N + 1) by its definition; where halves are unequal, twice that of the smaller tail."""
    effects = np.random.default_rng(n_heads + 200).standard_normal(n_heads)
    frame = parity(run_of(effects[None, None], ("splits:19",)))
    assert frame is not None
    strength, *others = (2.0 * parse_subsets(("splits:19",), n_heads).mask[::2] - 1) @ effects
    others, n = np.array(others), 19
    assert strength == pytest.approx(effects[::2].sum() - effects[1::2].sum()) and len(others) == n
    if n_heads % 2 == 0:
        expected = ((np.abs(others) >= abs(strength)).sum() + 1) / (n + 1)
        error = np.sqrt(expected * (1 - expected) / (n + 1))
    else:
        tail = (min((others >= strength).sum(), (others <= strength).sum()) + 1) / (n + 1)
        assert tail != 0.2, "there an error with four times the tail would be the same"
        expected, error = 2 * tail, 2 * np.sqrt(tail * (1 - tail) / (n + 1))
    assert expected < 1
    assert frame["p"].item() == pytest.approx(expected) and frame["p_error"].item() == pytest.approx(error)


def test_as_many_sampled_splits_as_there_are_give_the_exact_p() -> None:
    effects = np.random.default_rng(7).standard_normal((1, 3, 8))
    exact, sampled = (parity(run_of(effects, words)) for words in (("balanced",), ("splits:99",)))
    assert exact is not None and sampled is not None
    pd.testing.assert_frame_equal(exact, sampled)
    assert (sampled["p_error"] == 0).all()


def test_a_sampled_p_is_within_its_error_of_the_exact_one() -> None:
    """Of 200 layers the standardised differences have mean 0 and spread 1 (less where p is tied), at four errors."""
    effects = np.random.default_rng(8).standard_normal((1, 200, 12))
    exact, sampled = (parity(run_of(effects, words)) for words in (("balanced",), ("splits:99",)))
    assert exact is not None and sampled is not None
    inner = exact["p"].between(0.1, 0.9)
    off = ((sampled["p"] - exact["p"]) / sampled["p_error"])[inner]
    assert 0.6 < off.std() < 1.2, "one sample serves all layers, whose differences are not independent"
    assert off.abs().max() < 4


@pytest.mark.slow
def test_sampled_p_are_uniform_where_heads_are_alike() -> None:
    """1,000 null layers of 12 heads, each with 39 splits of its own draw: p is one of 1/40 ... 1, within four
    standard errors."""
    effects = np.random.default_rng(9).standard_normal((1000, 12))
    found = []
    for seed, heads in enumerate(effects):
        null = (2.0 * parse_subsets(("splits:39",), 12, seed).mask - 1) @ heads
        found.append(permutation_p_value(null[0], null))
    for k in (1, 2, 10, 20):
        level = k / 40
        share, error = np.mean(np.array(found) <= level + 1e-9), np.sqrt(level * (1 - level) / len(found))
        assert abs(share - level) <= 4 * error


def test_halves_that_somebody_chose_are_no_sample() -> None:
    chosen = ("even", "odd", "0,1,2,3", "4,5,6,7", "0,1,4,5", "2,3,6,7")
    assert parity(run_of(np.ones((1, 1, 8)), chosen)) is None
    ones, word = np.ones((1, 1, 8)), "splits:9"
    drawn, mixed = (find_equal_splits(run_of(ones, (*words, word))) for words in (chosen[:2], chosen))
    assert drawn is not None and mixed is not None
    assert mixed.sampled and mixed.n_splits == drawn.n_splits == 10


def test_thirty_two_heads_are_tested_against_a_sample() -> None:
    effects = np.where(np.arange(32) % 2 == 0, 1.0, 0.0)[None, None]
    text = str(parity_finding(run_of(effects, ("splits:199",))))
    assert "0.005 ± 0.005" in text and "199 random ones" in text and "601,080,390 equal splits of 32 heads" in text


def test_the_table_names_its_correction() -> None:
    run = run_of(np.random.default_rng(10).standard_normal((2, 2, 8)))
    frames = {name: parity(run, name) for name in CORRECTIONS}
    for name, frame in frames.items():
        assert frame is not None and NAMES[name] in str(parity_finding(run, name))
        np.testing.assert_array_equal(frame["p_adjusted"], adjust(frame["p"].to_numpy(), name))


@pytest.mark.slow
def test_where_heads_are_alike_p_is_uniform() -> None:
    """Of 3,000 null layers as many are at most k * 2/70 as that says, within four standard errors."""
    effects = np.random.default_rng(2).standard_normal((30, 100, 8))
    frame = parity(run_of(effects))
    assert frame is not None
    for k in (1, 2, 7, 17):
        level = 2 * k / 70
        share, error = (frame["p"] <= level + 1e-9).mean(), np.sqrt(level * (1 - level) / len(frame))
        assert abs(share - level) <= 4 * error


def test_a_planted_layer_survives_the_adjustment_and_null_ones_seldom_do() -> None:
    effects = np.random.default_rng(3).standard_normal((1, 1, 12))
    planted = np.where(np.arange(12) % 2 == 0, 5.0, 0.0)[None, None] + 0.1 * effects
    both = parity(run_of(np.concatenate([effects, planted], axis=1), ("balanced",)))
    assert both is not None
    assert both["p"].iloc[1] == pytest.approx(2 / 924)
    np.testing.assert_allclose(both["p_adjusted"].iloc[1], min(2 * 2 / 924, both["p"].iloc[0]))


def test_the_table_has_a_row_a_checkpoint_the_layer_least_given_by_chance_and_says_how_many_there_were() -> None:
    effects = np.random.default_rng(5).standard_normal((2, 3, 8))
    effects[1, 2] = [3, 0, 3, 0, 3, 0, 3, 0]
    text = str(parity_finding(run_of(effects, noise=0.1)))
    rows = [line.split() for line in text.splitlines() if line.startswith("step")]
    assert [row[0] for row in rows] == ["step0", "step1"] and rows[1][1] == "2" and rows[1][-5] == "0.029"
    assert "all 70 equal splits of 8 heads" in text and "6 layers and checkpoints" in text


def test_what_was_not_run_is_named_with_what_runs_it() -> None:
    assert "70 equal splits of 8 heads exist; --subsets balanced" in str(
        parity_finding(run_of(np.ones((1, 1, 8)), ("even",)))
    )
    assert "--subsets size:2 size:3" in str(parity_finding(run_of(np.ones((1, 1, 5)), ("even",))))
