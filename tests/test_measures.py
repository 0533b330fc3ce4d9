"""Laws of the measures, on numbers worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from headlapse.engine.measures.logit_diff import (
    best_layer,
    effect,
    finished,
    recovered,
    strongest,
    success,
    timeline,
)
from headlapse.engine.report.findings.timeline import format_timeline
from headlapse.engine.study.patch_settings import PatchSettings

SETTINGS = PatchSettings(layers=(0, 1))


def some_run() -> xr.Dataset:
    """Two finished checkpoints (the later one first) and an unfinished one; two layers, three subsets, two trials."""
    nan = np.nan
    logit_diff = [
        [[[1.0, 3.0], [-2.0, -2.0], [4.0, 2.0]], [[-1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]],
        [[[0.0, 0.0]] * 3, [[1.0, -1.0], [-1.0, -1.0], [2.0, 2.0]]],
        [[[nan, nan]] * 3] * 2,
    ]
    return xr.Dataset(
        {
            "logit_diff": (("checkpoint", "layer", "subset", "trial"), logit_diff),
            "clean_logit_diff": (("checkpoint", "trial"), [[5.0, 3.0], [2.0, 4.0], [nan, nan]]),
            "corrupt_logit_diff": (("checkpoint", "trial"), [[-2.0, -4.0], [-1.0, 1.0], [nan, nan]]),
        },
        coords={
            "checkpoint": ["main", "step10", "step20"],
            "step": ("checkpoint", [-1, 10, 20]),
            "complete": ("checkpoint", [True, True, False]),
            "layer": [0, 1],
            "subset": ["even", "odd", "all"],
        },
    )


def test_success_is_a_logit_difference_above_zero_and_nothing_where_nothing_is() -> None:
    values = success(xr.DataArray([-1.0, 0.0, 1e-9, np.nan]))
    np.testing.assert_array_equal(values, [0, 0, 1, np.nan])


def test_recovery_is_the_share_of_the_gap_and_nothing_where_the_gap_is_near_zero() -> None:
    patched, source, target = (xr.DataArray(values) for values in ([1.0, 5.0, 9.0], [3.0, 0.2, 3.0], [-1.0, 0.0, 4.0]))
    np.testing.assert_allclose(recovered(patched, source, target), [0.5, np.nan, -5.0])


def test_a_gap_counts_from_half_a_nat_on_whichever_way_it_goes() -> None:
    source, target = xr.DataArray([0.5, -0.5, 0.49, -0.49, 0.0]), xr.DataArray([0.0] * 5)
    np.testing.assert_allclose(recovered(target + 0.25, source, target), [0.5, -0.5, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(recovered(target + np.nan, source, target), [np.nan] * 5)


def test_none_recovers_nothing_and_the_source_run_everything_in_both_directions() -> None:
    clean, corrupt = xr.DataArray([5.0, 3.0]), xr.DataArray([-2.0, -4.0])
    for source, target in ((clean, corrupt), (corrupt, clean)):
        np.testing.assert_array_equal(recovered(target, source, target), [0, 0])
        np.testing.assert_array_equal(recovered(source, source, target), [1, 1])


def test_checkpoints_come_in_order_of_training_an_unknown_step_last_and_unfinished_ones_not_at_all() -> None:
    assert list(finished(some_run()).checkpoint.values) == ["step10", "main"]


def test_the_effect_is_towards_the_source_run_in_both_directions() -> None:
    run = some_run()
    even = {"checkpoint": "main", "layer": 0, "subset": "even"}
    np.testing.assert_array_equal(effect(run, "denoise").sel(even), [3.0, 7.0])
    np.testing.assert_array_equal(effect(run, "noise").sel(even), [4.0, 0.0])


def test_the_best_layer_is_the_one_of_the_largest_effect_of_all_heads() -> None:
    run = finished(some_run())
    assert best_layer(run, "denoise").values.tolist() == [1, 0]
    assert best_layer(run, "noise").values.tolist() == [0, 1]


def test_without_all_heads_the_strongest_subset_judges() -> None:
    run = finished(some_run()).sel(subset=["odd"])
    assert best_layer(run, "denoise").values.tolist() == [0, 1]


def test_the_timeline_is_read_at_each_rows_best_layer() -> None:
    frame = timeline(some_run(), "denoise")
    assert frame.index.tolist() == ["step10", "main"] and frame.index.name == "checkpoint"
    main = frame.loc["main"]
    assert (main["clean"], main["clean_rate"], main["corrupt"], main["corrupt_rate"]) == (4.0, 1.0, -3.0, 0.0)
    assert (main["even"], main["even_rate"], main["odd"], main["odd_rate"]) == (2.0, 1.0, -2.0, 0.0)
    assert (main["all"], main["even_minus_odd_rate"], main["best_layer"]) == (3.0, 1.0, 0)
    assert frame.loc["step10", "even_rate"] == 0.5 and frame.loc["step10", "best_layer"] == 1


def test_the_table_shows_an_unknown_step_and_how_to_read_it() -> None:
    table = format_timeline(some_run(), SETTINGS)
    row = next(line for line in table.splitlines() if line.startswith("main"))
    assert row.split() == ["main", "?", "+4.00", "100%", "-3.00", "0%", "+2.00", "100%", "-2.00", "0%", "+3.00", "100%",
                           "+1.00", "0"]  # fmt: skip
    assert "2 distinct prompts" in table and "the layer with the largest effect of all heads" in table


def test_a_joint_patch_has_no_best_layer() -> None:
    table = format_timeline(some_run().isel(layer=[0]), replace(SETTINGS, joint=True))
    assert "best layer" not in table and "layers 0, 1 at once" in table


def test_in_noise_the_best_layer_is_the_one_that_falls_most() -> None:
    frame = timeline(some_run(), "noise")
    assert frame["best_layer"].tolist() == [0, 1]
    assert (frame.loc["step10", "all"], frame.loc["main", "all"]) == (0.0, -1.0)


def test_a_single_prompt_is_told_in_the_singular() -> None:
    assert "over 1 distinct prompt;" in format_timeline(some_run().isel(trial=[0]), SETTINGS)
    assert "over 2 distinct prompts;" in format_timeline(some_run(), SETTINGS)


def test_without_even_odd_and_all_the_subset_that_moves_a_row_most_stands_for_them() -> None:
    run = some_run().assign_coords(subset=["0", "1", "0,2"])
    row = next(line for line in format_timeline(run, SETTINGS).splitlines() if line.startswith("main"))
    assert row.split() == ["main", "?", "+4.00", "100%", "-3.00", "0%", "+3.00", "100%", "0,2", "0"]
    assert list(timeline(run, "denoise").columns)[-1] == "best_layer"


def test_the_strongest_subset_of_each_checkpoint_is_worked_by_hand() -> None:
    """Even moves step10's corrupt run by 1 and -1 at layer 0, main's by 3 and 7; odd by less, and so does layer 1."""
    frame = strongest(some_run().sel(subset=["even", "odd"]), "denoise")
    assert frame.to_dict("index") == {
        "step10": {"subset": "even", "mean": 0.0, "rate": 0.0},
        "main": {"subset": "even", "mean": 2.0, "rate": 1.0},
    }


@pytest.mark.parametrize("subsets", [["even"], ["odd", "all"]])
def test_what_was_not_run_is_not_shown(subsets: list[str]) -> None:
    table = format_timeline(some_run().sel(subset=subsets), SETTINGS)
    assert [name for name in ("even", "odd", "all") if name in table.splitlines()[0].split()] == subsets
    assert "even - odd" not in table
