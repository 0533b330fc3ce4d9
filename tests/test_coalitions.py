"""Laws of what the lattice tells: planted games are read off a patched run as they were planted."""

import numpy as np
import pytest
import xarray as xr

from headlapse.engine.report.findings.shares import head_subset_findings
from headlapse.engine.statistics.head_subsets import (
    all_subset_rows,
    head_subset_statistics,
    parity_share,
    sampled,
    worst_even,
)
from headlapse.engine.statistics.shapley import members, shapley
from headlapse.engine.study.patch_settings import PatchSettings
from headlapse.engine.study.subsets import parse_subsets
from tests.simulating import unchecked

TARGET, SOURCE = -3.0, 4.0


def run_of(worth: np.ndarray, words: tuple[str, ...] = ("even", "lattice"), noise: float = 0.0) -> xr.Dataset:
    """A run whose subsets (checkpoint, layer, subset) move the corrupt run of four prompts by their worth."""
    n_checkpoints, n_layers, n = worth.shape
    n_heads = n.bit_length() - 1
    subsets = parse_subsets(words, n_heads)
    moved = worth[..., subsets.mask @ (1 << np.arange(n_heads)), None].repeat(4, -1)
    moved = moved + noise * np.random.default_rng(1).standard_normal(moved.shape)
    plain = (("checkpoint", "trial"), np.full((n_checkpoints, 4), TARGET, np.float32))
    return xr.Dataset(
        {
            "logit_diff": (("checkpoint", "layer", "subset", "trial"), (TARGET + moved).astype(np.float32)),
            "corrupt_logit_diff": plain,
            "clean_logit_diff": (plain[0], np.full((n_checkpoints, 4), SOURCE, np.float32)),
        },
        coords={
            "checkpoint": [f"step{c}" for c in range(n_checkpoints)],
            "step": ("checkpoint", np.arange(n_checkpoints)),
            "complete": ("checkpoint", [True] * n_checkpoints),
            "layer": np.arange(n_layers) + 2,
            "subset": list(subsets.labels),
            "mask": (("subset", "head"), subsets.mask),
        },
    )


def settings(*words: str) -> PatchSettings:
    return PatchSettings(subsets=words)


def test_subsets_stand_in_the_order_of_their_bits_however_they_were_asked_for() -> None:
    mask = parse_subsets(("all", "each", "lattice"), 5).mask
    rows = all_subset_rows(mask)
    assert rows is not None and (mask[rows] == members(5)).all()
    assert all_subset_rows(mask[:-1]) is None and all_subset_rows(parse_subsets(("balanced",), 4).mask) is None


def test_planted_heads_are_found_by_checkpoint_and_layer() -> None:
    effects = np.random.default_rng(0).uniform(0.1, 2, (2, 3, 4))
    found = head_subset_statistics(run_of(effects @ members(4).T), "denoise")
    assert found is not None
    assert np.abs(found.shapley.values - effects).max() < 1e-5 and np.abs(found.banzhaf.values - effects).max() < 1e-5
    assert np.abs(found.interaction.values).max() < 1e-5
    assert np.abs(found.shapley.sum("head").values - effects.sum(-1)).max() < 1e-5, "they sum to what all heads do"
    assert found.layer.values.tolist() == [2, 3, 4]
    assert np.allclose(found.curve.sel(quantile=1.0, size=1).values, effects.max(-1), atol=1e-5)
    assert np.allclose(found.curve.isel(size=4).values, effects.sum(-1)[..., None], atol=1e-5)


def test_shapley_values_of_every_prompt_average_to_those_of_the_mean_and_lie_in_their_interval() -> None:
    worth = np.random.default_rng(2).standard_normal((1, 1, 32))
    run = run_of(worth, noise=0.5)
    found = head_subset_statistics(run, "denoise")
    assert found is not None
    rows = all_subset_rows(run.mask.values)
    mean = (run.logit_diff - run.corrupt_logit_diff).mean("trial").values[0, 0, rows]
    assert np.allclose(found.shapley.values[0, 0], shapley(mean.astype(float)), atol=1e-6)
    assert (found.shapley_low < found.shapley).all() and (found.shapley < found.shapley_high).all()


def test_noise_patches_are_worth_what_they_break() -> None:
    run = run_of(np.array([[[0.0, 1.0]]]), words=("lattice",))
    found = head_subset_statistics(run, "noise")
    assert found is not None and found.shapley.item() == pytest.approx(-1.0)


def test_the_smallest_sets_are_named_and_counted() -> None:
    """Heads 0 and 3 are only good together; head 1 does a little."""
    inside = members(4)
    worth = 4.0 * (inside[:, 0] & inside[:, 3]) + 0.4 * inside[:, 1]
    found = head_subset_statistics(run_of(worth[None, None]), "denoise")
    assert found is not None
    one = found.isel(checkpoint=0, layer=0)
    assert (one.sufficient.item(), one.sufficient_count.item(), one.sufficient_set.item()) == (2, 1, "0,3")
    assert (one.necessary.item(), one.necessary_count.item()) == (1, 2)
    assert one.interaction.values[0, 3] == pytest.approx(4.0, abs=1e-5)


def test_no_set_is_sufficient_or_necessary_where_the_effect_of_all_heads_is_near_zero() -> None:
    found = head_subset_statistics(run_of(np.full((1, 1, 16), 0.01) * members(4).sum(1)), "denoise")
    assert found is not None
    assert (found.sufficient.item(), found.necessary.item(), found.sufficient_set.item()) == (-1, -1, "")


def test_parity_explains_everything_where_only_even_heads_work_and_is_the_most_extreme_split() -> None:
    inside = members(6)
    worth = inside[:, 0::2].sum(1) * 1.0
    share, p = parity_share(worth)
    by_number = np.array([worth[inside.sum(1) == k].mean() for k in range(7)])[inside.sum(1)]
    assert share == pytest.approx(1 - by_number.var() / worth.var())
    assert p == pytest.approx(2 / 20), "the even heads, and the odd ones, of twenty halves"
    assert worst_even(worth)[0][1:4].tolist() == [1, 2, 3]
    assert worst_even(worth)[1][1:4].tolist() == pytest.approx([1 / 20] * 3), "no other half is as good at its worst"


def test_parity_explains_nothing_where_the_number_of_heads_does() -> None:
    share, p = parity_share(members(6).sum(1) ** 2.0)
    assert share == pytest.approx(0, abs=1e-9) and p == 1
    assert np.isnan(parity_share(np.ones(16))).all()
    worst, p_values = worst_even(members(6).sum(1) * 1.0)
    assert p_values[1:4].tolist() == [1, 1, 1] and np.isnan(worst[4:]).all()


def test_with_odd_numbers_of_heads_even_is_the_larger_half() -> None:
    worth = members(5)[:, 0::2].sum(1) * 1.0
    assert parity_share(worth)[1] == pytest.approx(1 / 10)
    assert worst_even(worth)[1][3] == pytest.approx(1 / 10)


@pytest.mark.thorough
def test_the_p_of_parity_is_uniform_where_heads_are_arbitrary() -> None:
    """500 random games of 6 heads: p takes values i/10, each as often; 5 % is not attainable, 10 % is."""
    draw = np.random.default_rng(3)
    with unchecked():
        p_values = np.array([parity_share(draw.standard_normal(64))[1] for _ in range(500)])
    rejected = (p_values <= 0.1 + 1e-9).mean()
    assert abs(rejected - 0.1) < 3 * np.sqrt(0.1 * 0.9 / 500)


def test_sampled_values_are_close_to_exact_ones_and_say_how_close() -> None:
    worth = np.random.default_rng(4).standard_normal((1, 2, 256))
    words = ("lattice", "orders:200")
    run = run_of(worth, words)
    exact, estimate = head_subset_statistics(run, "denoise"), sampled(run, settings(*words))
    assert exact is not None and estimate is not None
    off = abs(exact.shapley - estimate.shapley) / estimate.shapley_error
    assert float(off.max()) < 4 and 0.01 < float(estimate.shapley_error.mean()) < 0.1
    assert sampled(run, settings("lattice")) is None


def test_orders_alone_are_enough_for_a_sample_of_many_heads() -> None:
    effects = np.random.default_rng(5).uniform(0, 1, 12)
    run = run_of((members(12) @ effects)[None, None], ("orders:5",))
    found = sampled(run, settings("orders:5"))
    assert found is not None and np.allclose(found.shapley.values[0, 0], effects, atol=1e-5)
    assert head_subset_statistics(run, "denoise") is None and run.sizes["subset"] < 2 * 5 * 13


def test_the_table_names_heads_sets_and_what_it_rests_on() -> None:
    inside = members(4)
    worth = 4.0 * (inside[:, 0] & inside[:, 3]) + 0.4 * inside[:, 1]
    shares, *_ = head_subset_findings(run_of(worth[None, None]), settings("lattice"))
    row = str(shares).splitlines()[2]
    assert row.startswith("step0") and "0,3 (1)" in row
    assert "L2.H0 +2.00 ±0.00, L2.H3 +2.00 ±0.00, L2.H1 +0.40 ±0.00" in row
    assert "exact Shapley values" in str(shares)
    (some,) = head_subset_findings(run_of(worth[None, None], ("orders:3",)), settings("orders:3"))
    assert "sampled from random orders" in str(some) and "sufficient" not in str(some)
    assert not list(head_subset_findings(run_of(worth[None, None], ("each",)), settings("each")))


def test_how_many_heads_it_takes_gives_the_smallest_effect_of_any_k_heads_and_any_k_even_heads() -> None:
    """By hand: 0 and 2 are worth 3 each and either is sufficient for both; 1 and 3 are worth 1 each."""
    inside = members(4)
    worth = 3.0 * (inside[:, 0] | inside[:, 2]) + inside[:, 1] + inside[:, 3]
    _, sizes, pairs, _ = head_subset_findings(run_of(worth[None, None]), settings("lattice"))
    assert sizes.table is not None and sizes.numbers is not None and pairs.numbers is not None
    assert sizes.table.loc["smallest"].tolist() == ["+0.00", "+1.00", "+2.00", "+4.00", "+5.00"]
    assert sizes.table.loc["largest"].tolist() == ["+0.00", "+3.00", "+4.00", "+5.00", "+5.00"]
    assert sizes.table.loc["smallest of even"].tolist() == ["-", "+3.00", "+3.00", "-", "-"]
    assert sizes.table.loc["p"].tolist() == ["-", "0.17", "0.83", "-", "-"], "of six halves one, and five, do as well"
    assert len(sizes.numbers) == 5 and sizes.numbers.index.names == ["checkpoint", "layer", "size"]
    assert "layer 2 with the largest Shapley interactions at step0" in str(pairs)
    assert "L2.H0 and L2.H2 -3.00" in str(pairs)
    assert pairs.numbers.interaction["step0", 2, 0, 2] == pytest.approx(-3, abs=1e-6) and len(pairs.numbers) == 6
