"""Laws of the statistics: what is planted is found, what is not is found as often as chance has it."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from headlapse.engine.statistics.intervals import interval
from headlapse.engine.statistics.splits import format_parity, half_and_rest, parity, place
from headlapse.engine.subsets import parse_subsets

HALVINGS = {4: ("balanced",), 5: ("size:2", "size:3"), 6: ("balanced",), 8: ("balanced",)}


def run_of(effects: np.ndarray, words: tuple[str, ...] | None = None, noise: float = 0.0) -> xr.Dataset:
    """A run in which every patched head adds its own effect (checkpoint, layer, head), the same for all four prompts
    but for `noise`."""
    n_checkpoints, n_layers, n_heads = effects.shape
    subsets = parse_subsets(words or ("even", "odd", *HALVINGS[n_heads]), n_heads)
    logit_diff = np.einsum("clh,sh->cls", effects, subsets.mask)[..., None].repeat(4, -1)
    logit_diff += noise * np.random.default_rng(1).standard_normal(logit_diff.shape)
    return xr.Dataset(
        {"logit_diff": (("checkpoint", "layer", "subset", "trial"), logit_diff.astype(np.float32))},
        coords={
            "checkpoint": [f"step{n}" for n in range(n_checkpoints)],
            "step": ("checkpoint", np.arange(n_checkpoints)),
            "complete": ("checkpoint", [True] * n_checkpoints),
            "layer": np.arange(n_layers),
            "subset": list(subsets.labels),
            "mask": (("subset", "head"), subsets.mask),
        },
    )


def test_a_place_is_twice_the_smaller_tail() -> None:
    null = np.array([-3.0, -1.0, 1.0, 3.0])
    assert [place(value, null) for value in null] == [0.5, 1.0, 1.0, 0.5]
    lopsided = np.array([0.0, 1.0, 2.0, 10.0, 20.0])
    assert place(20.0, lopsided) == pytest.approx(0.4) and place(2.0, lopsided) == 1.0
    assert place(0.0, np.zeros(6)) == 1.0


def test_a_place_is_scipys_permutation_test_where_that_lists_every_labelling() -> None:
    draw = np.random.default_rng(0)
    for _ in range(5):
        first, second = draw.standard_normal((2, 4))
        found = stats.permutation_test(
            (first, second), lambda a, b: a.sum() - b.sum(), permutation_type="independent", n_resamples=np.inf
        )
        assert place(first.sum() - second.sum(), found.null_distribution) == pytest.approx(found.pvalue)


@pytest.mark.parametrize("n_heads", [4, 5, 8])
def test_every_half_is_paired_with_what_it_leaves(n_heads: int) -> None:
    mask = parse_subsets(("each", *HALVINGS[n_heads]), n_heads).mask
    rows = half_and_rest(mask)
    assert rows is not None
    halves, rests = (mask[row] for row in rows)
    assert (halves ^ rests).all() and len({half.tobytes() for half in halves}) == len(halves)


def test_without_every_halving_there_is_no_place() -> None:
    assert half_and_rest(parse_subsets(("even", "odd", "each", "all"), 8).mask) is None
    assert half_and_rest(parse_subsets(("balanced",), 5).mask) is None, "the larger halves are not there"
    assert half_and_rest(parse_subsets(("balanced",), 8).mask[1:]) is None
    assert parity(run_of(np.ones((1, 1, 8)), ("even", "odd"))) is None


@pytest.mark.parametrize("n_heads", [5, 6, 8])
def test_where_only_even_heads_carry_the_answer_no_other_halving_gives_more(n_heads: int) -> None:
    effects = np.where(np.arange(n_heads) % 2 == 0, 1.0, 0.0)[None, None]
    frame = parity(run_of(effects))
    assert frame is not None
    n = {5: 10, 6: 20, 8: 70}[n_heads]
    assert frame["p"].item() == pytest.approx(2 / n)
    assert frame["strength"].item() == pytest.approx(-(-n_heads // 2))


def test_odd_heads_are_found_as_well_and_permuted_heads_are_not() -> None:
    effects = np.array([0.0, 1, 0, 1, 0, 1, 0, 1])
    found, moved = (parity(run_of(one[None, None])) for one in (effects, np.sort(effects)))
    assert found is not None and moved is not None
    assert found["p"].item() == pytest.approx(2 / 70) and found["strength"].item() == pytest.approx(-4)
    assert moved["p"].item() == 1 and moved["strength"].item() == pytest.approx(0)


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


def test_the_interval_is_students_for_many_prompts_and_nothing_for_one() -> None:
    values = np.random.default_rng(4).standard_normal((3, 400)) + 2
    low, high = interval(values)
    expected = stats.t.interval(0.95, 399, values.mean(-1), stats.sem(values, axis=-1))
    np.testing.assert_allclose([low, high], expected, atol=0.01)
    low, high = interval(values[:, :1])
    assert np.isnan(low).all() and np.isnan(high).all()


def test_the_table_has_a_row_a_checkpoint_the_layer_least_given_by_chance_and_says_how_many_there_were() -> None:
    effects = np.random.default_rng(5).standard_normal((2, 3, 8))
    effects[1, 2] = [3, 0, 3, 0, 3, 0, 3, 0]
    text = format_parity(run_of(effects, noise=0.1))
    rows = [line.split() for line in text.splitlines() if line.startswith("step")]
    assert [row[0] for row in rows] == ["step0", "step1"] and rows[1][1] == "2" and rows[1][-2] == "0.029"
    assert "all 70 halvings of 8 heads" in text and "6 layers and checkpoints" in text


def test_what_was_not_run_is_named_with_what_runs_it() -> None:
    assert "70 halvings of 8 heads exist; --subsets balanced" in format_parity(run_of(np.ones((1, 1, 8)), ("even",)))
    assert "--subsets size:2 size:3" in format_parity(run_of(np.ones((1, 1, 5)), ("even",)))
