"""Laws of the rates: nothing is restored that did not fail, and numbers worked by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from headlapse.engine.report.findings.rates import rates_finding
from headlapse.engine.statistics.means import interval
from headlapse.engine.statistics.rates import rates, share
from headlapse.engine.study.patch_settings import PatchSettings

DENOISE, NOISE = PatchSettings(direction="denoise", layers=(0, 1)), PatchSettings(direction="noise", layers=(0, 1))


def some_run() -> xr.Dataset:
    """Four prompts.  At step10 corrupt fails the first three, at step20 none; step30 is unfinished."""
    nan = np.nan
    logit_diff = [
        # even restores the first two and breaks the last, odd restores the third alone, all restores everything.
        [[[1.0, 2, -1, -1], [-1, -2, 3, 4], [2, 2, 2, 2]], [[-1.0, -2, -3, 4]] * 3],
        [[[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, 1, 1]], [[1.0, 1, 1, 1]] * 3],
        [[[nan] * 4] * 3] * 2,
    ]
    return xr.Dataset(
        {
            "logit_diff": (("checkpoint", "layer", "subset", "trial"), np.array(logit_diff, dtype=np.float32)),
            "clean_logit_diff": (("checkpoint", "trial"), [[3.0, 2, 1, -4], [1.2, 1.2, 1.2, 1.2], [nan] * 4]),
            "corrupt_logit_diff": (("checkpoint", "trial"), [[-1.0, -2, -3, 4], [1.0, 1, 1, 1], [nan] * 4]),
        },
        coords={
            "checkpoint": ["step10", "step20", "step30"],
            "step": ("checkpoint", [10, 20, 30]),
            "complete": ("checkpoint", [True, True, False]),
            "layer": [0, 1],
            "subset": ["even", "odd", "all"],
        },
    )


def random_run(seed: int, n_trials: int = 9) -> xr.Dataset:
    run, draw = some_run().isel(trial=[0] * n_trials), np.random.default_rng(seed)
    drawn = {name: (run[name].dims, draw.standard_normal(run[name].shape)) for name in run.data_vars}
    return run.assign(drawn)


def test_rates_worked_by_hand() -> None:
    frame = rates(some_run(), "denoise").loc["step10"].loc[0]
    counts = frame[["n", "failing", "restored", "broken"]].values.tolist()
    assert counts == [[4, 3, 2, 1], [4, 3, 1, 0], [4, 3, 3, 0]]
    np.testing.assert_allclose(frame["restore_rate"], [2 / 3, 1 / 3, 1])
    np.testing.assert_allclose(frame["break_rate"], [1, 0, 0])
    # Gaps of 4, 4, 4 and -8 nats, of which even closes 2, 4, 2 and -5.
    assert frame.loc["even", "recovery"] == pytest.approx((2 / 4 + 4 / 4 + 2 / 4 + 5 / 8) / 4)


def test_where_nothing_is_patched_nothing_is_restored_or_broken() -> None:
    frame = rates(some_run(), "denoise").loc["step10"].loc[1]
    assert (frame[["restored", "broken", "recovery"]] == 0).all(axis=None) and (frame["failing"] == 3).all()


def test_without_a_failing_prompt_there_is_no_restore_rate_however_many_succeed() -> None:
    """The published study's 100 % at step32000 and step64000, where nothing was wrong before the patch."""
    frame = rates(some_run(), "denoise").loc["step20"]
    assert (frame["failing"] == 0).all() and (frame["restored"] == 0).all()
    assert frame[["restore_rate", "restore_rate_low", "restore_rate_high"]].isna().all(axis=None)
    assert frame.loc[(0, "odd"), "break_rate"] == 0.25


def test_a_gap_near_zero_recovers_nothing_and_is_counted_out() -> None:
    frame = rates(some_run(), "denoise")
    assert (frame.loc["step10", "n_clear"] == 4).all() and (frame.loc["step20", "n_clear"] == 0).all()
    assert frame.loc["step20", ["recovery", "recovery_low", "recovery_high"]].isna().all(axis=None)


def test_only_prompts_whose_gap_is_clear_enter_the_mean_and_its_interval() -> None:
    run = some_run()
    run["clean_logit_diff"][0, :2] = run.corrupt_logit_diff[0, :2] + 0.4
    cell = rates(run, "denoise").loc[("step10", 0, "even")]
    kept = np.array([2 / 4, 5 / 8])
    low, high = interval(kept[None])
    assert cell["n_clear"] == 2 and cell["recovery"] == pytest.approx(kept.mean())
    assert (cell["recovery_low"], cell["recovery_high"]) == (pytest.approx(low.item()), pytest.approx(high.item()))


def test_the_other_direction_asks_what_the_corrupt_run_breaks_and_restores_of_the_clean_one() -> None:
    frame = rates(some_run(), "noise").loc["step10"].loc[0]
    assert frame[["failing", "restored", "broken"]].values.tolist() == [[1, 0, 1], [1, 1, 2], [1, 1, 0]]
    swapped = some_run().rename({"clean_logit_diff": "corrupt_logit_diff", "corrupt_logit_diff": "clean_logit_diff"})
    pd.testing.assert_frame_equal(rates(swapped, "denoise"), rates(some_run(), "noise"))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_cell_is_what_a_loop_over_prompts_counts(direction: str) -> None:
    run = random_run(0)
    frame = rates(run, direction)
    source, target = ("clean", "corrupt") if direction == "denoise" else ("corrupt", "clean")
    for (checkpoint, layer, subset), cell in frame.iterrows():
        patched = run.logit_diff.sel(checkpoint=checkpoint, layer=layer, subset=subset).values
        ends = [run[f"{name}_logit_diff"].sel(checkpoint=checkpoint).values for name in (source, target)]
        outcomes = [(p > 0, t > 0) for p, t in zip(patched, ends[1], strict=True)]
        assert cell["failing"] == sum(not was for _, was in outcomes)
        assert cell["restored"] == outcomes.count((True, False)) and cell["broken"] == outcomes.count((False, True))
        closed = [(p - t) / (s - t) for p, s, t in zip(patched, *ends, strict=True) if abs(s - t) >= 0.5]
        assert cell["n_clear"] == len(closed) and cell["recovery"] == pytest.approx(np.mean(closed))
        low, high = interval(np.array([closed]))
        np.testing.assert_allclose([cell["recovery_low"], cell["recovery_high"]], [*low, *high])


def test_a_shares_interval_is_wilsons_by_its_formula() -> None:
    """(k + z²/2) / (n + z²) plus or minus z sqrt(k (n - k) / n + z²/4) / (n + z²)."""
    z = stats.norm.isf(0.025)
    for k, n in ((0, 1), (1, 1), (2, 3), (10, 15), (15, 15)):
        middle, wide = (k + z**2 / 2) / (n + z**2), z * np.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)
        np.testing.assert_allclose(share(k, n), [k / n, middle - wide, middle + wide], atol=1e-12)
    assert np.isnan(share(0, 0)).all()


def test_the_table_has_the_best_layers_row_and_says_where_there_was_nothing_to_restore() -> None:
    text = str(rates_finding(some_run(), DENOISE))
    lines = text.splitlines()
    assert lines[2].split() == ["step10", "0", "3", "of", "4", "67%", "21..94", "33%", "6..79", "100%", "44..100",
                                "1", "0", "0", "of", "1", "66%", *lines[2].split()[17:]]  # fmt: skip
    assert lines[3].split() == ["step20", "0", "0", "of", "4", "-", "-", "-", "0", "1", "0", "of", "4", "-", "-", "-"]
    assert lines[4] == "no prompt fails unpatched: step20"
    assert "of 4 distinct prompts" in lines[5] and "(0 to 4 of 4)" in lines[5] and "corrupt run fails" in lines[5]
    assert max(map(len, lines[:4])) <= 110


def test_a_joint_patch_has_no_layer_of_its_own() -> None:
    lines = str(rates_finding(some_run().isel(layer=[0]), replace(DENOISE, joint=True))).splitlines()
    assert "layer" not in lines[1] and lines[2].split()[:4] == ["step10", "3", "of", "4"]


def test_in_noise_the_table_leads_with_what_breaks() -> None:
    lines = str(rates_finding(some_run(), NOISE)).splitlines()
    assert lines[0].split() == ["broken", "recovery"] and "clean run fails" in lines[-1]


def test_a_single_prompt_has_no_interval_of_recovery_and_a_wide_one_of_restoring() -> None:
    text = str(rates_finding(some_run().isel(trial=[0], checkpoint=[0]), DENOISE))
    assert text.splitlines()[2].split()[:7] == ["step10", "0", "1", "of", "1", "100%", "21..100"]
    assert "50%" in text.splitlines()[2].split()
