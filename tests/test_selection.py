"""Laws of selection: what is chosen on prompts is not inflated by being estimated on the same ones."""

import numpy as np
import pytest

from headlapse.engine.report.findings.verdict import verdict
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.statistics.means import interval
from headlapse.engine.statistics.selection import halves, held_out
from headlapse.engine.study.reading import Reading
from tests.simulating import unchecked
from tests.test_verdict import STUDY, line_about, planted_run


def test_halves_are_halves_and_the_same_ones_for_every_run() -> None:
    for n in (4, 5, 15, 30):
        assert halves(n).sum() == n // 2 and (halves(n) == halves(n)).all()


def test_each_prompt_is_measured_at_the_layer_that_the_other_half_chose() -> None:
    first = halves(6)
    effects = np.array([np.where(first, 5.0, 1.0), np.where(first, 0.0, 2.0)]) + np.arange(6) / 10
    found = held_out(effects)
    assert found is not None and found.layers == (0, 1) and not found.agrees
    np.testing.assert_allclose(found.nats, np.where(first, effects[1], effects[0]))
    assert found.effect == pytest.approx(np.where(first, 0.0, 1.0).mean() + 0.25)
    np.testing.assert_allclose([found.low, found.high], [bound[0] for bound in interval(found.nats[None])])
    assert held_out(effects[:, :3]) is None


def test_where_the_halves_agree_it_is_the_mean_of_all_prompts_there() -> None:
    effects = np.random.default_rng(0).standard_normal((4, 15)) + np.array([[0.0], [5.0], [0.0], [0.0]])
    found = held_out(effects)
    assert found is not None and found.layers == (1, 1) and found.agrees
    assert found.effect == pytest.approx(effects[1].mean())


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_held_out_estimates_are_unbiased_where_the_largest_one_is_inflated(spread: float) -> None:
    """5,000 models of 12 layers, 15 prompts: the mean error against the true effects of the chosen layers is zero
    within four standard errors (0.02 nats); choosing and estimating on all prompts flatters by 0.3 nats."""
    rng, errors, inflated = np.random.default_rng(1), [], []
    with unchecked():
        for _ in range(5000):
            true = spread * rng.standard_normal(12)
            effects = true[:, None] + rng.standard_normal((12, 15))
            found = held_out(effects)
            assert found is not None
            first, second = found.layers
            share = halves(15).mean()
            errors.append(found.effect - (true[second] * share + true[first] * (1 - share)))
            best = int(effects.mean(1).argmax())
            inflated.append(effects[best].mean() - true[best])
    assert abs(np.mean(errors)) <= 4 * np.std(errors) / np.sqrt(5000) and np.std(errors) / np.sqrt(5000) < 0.006
    assert np.mean(inflated) > 0.25


# --- in the verdict ---


def test_prompts_are_named_by_numbers_and_never_in_both() -> None:
    assert Reading().prompts(15) is None
    assert Reading(select_on=("0-3", "5")).prompts(8) == ([0, 1, 2, 3, 5], [4, 6, 7])
    assert Reading(test_on=("6-7",)).prompts(8) == ([0, 1, 2, 3, 4, 5], [6, 7])
    for reading, message in (
        (Reading(select_on=("0-3",), test_on=("3-7",)), "share prompt 3"),
        (Reading(select_on=("0-7",)), "leave no prompt"),
        (Reading(select_on=("9",)), "prompt 9 is not there"),
        (Reading(select_on=("x",)), "--select-on x: not a prompt"),
    ):
        with pytest.raises(UserError, match=message):
            reading.prompts(8)


def test_winners_are_marked_unless_other_prompts_chose_them() -> None:
    run, settings = planted_run({(1, 5): 3.0, (2, 3): 1.5, (1, 0): -2.0, (0, 2): 1.0})
    assert "inflated" in line_about(verdict(run, settings, STUDY), "heads")
    chosen = verdict(run, settings, STUDY, reading=Reading(select_on=("0-6",)))
    assert "8 of 15 prompt pairs" in chosen[0] and len(chosen) <= 12 and max(map(len, chosen)) <= 100
    assert "chosen on others" in line_about(chosen, "heads") and "inflated" not in " ".join(chosen)
    assert [line.split()[0] for line in chosen if line.startswith("  L")] == ["L1.H5", "L1.H0", "L2.H3"]


def test_where_halves_choose_different_layers_that_is_said_with_the_held_out_effect() -> None:
    lines = []
    for seed in range(10):
        run, settings = planted_run({(1, 5): 1.0, (2, 3): 1.0}, seed=seed)
        lines += [line for line in verdict(run, settings, STUDY) if line.startswith("layer ")]
    apart = [line for line in lines if "halves" in line]
    assert 0 < len(apart) < 10 and all("choose layers" in line and "nats" in line for line in apart)
