"""Laws of how heads act together: what is planted at a degree is found there and nowhere else."""

import numpy as np
import pytest
from scipy import stats

from headlapse.engine.report.findings.shares import together_texts
from headlapse.engine.report.findings.verdict import verdict
from headlapse.engine.statistics.head_subsets import DEGREES, energy, energy_interval, strongest_interaction
from headlapse.engine.statistics.permutation import meeting_the_rule
from headlapse.engine.statistics.shapley import members
from tests.simulating import unchecked
from tests.test_verdict import STUDY, line_about, planted_run

N_HEADS = 6
WITHIN = members(N_HEADS)


def by_prompt(values: np.ndarray, n_prompts: int = 12, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scaled = values[:, None] * rng.uniform(0.5, 1.5, n_prompts)
    return np.asarray(scaled + noise * rng.standard_normal((len(values), n_prompts)))


def test_the_energy_of_an_additive_model_is_at_degree_one_and_none_above() -> None:
    values = WITHIN @ np.random.default_rng(0).standard_normal(N_HEADS)
    shares = energy(values)
    assert shares[0] == pytest.approx(1, abs=1e-12) and (np.abs(shares[1:]) < 1e-9).all()
    share, low, high = energy_interval(by_prompt(values))
    assert low[0] == high[0] == pytest.approx(1, abs=1e-9) and (high[1:] < 1e-9).all() and (share[1:] < 1e-9).all()


def test_the_energy_of_two_heads_of_which_exactly_one_must_be_patched_is_at_degree_two() -> None:
    shares = energy(1.0 * (WITHIN[:, 1] ^ WITHIN[:, 4]))
    np.testing.assert_allclose(shares, [0, 1, 0], atol=1e-12)
    three = energy(1.0 * (WITHIN[:, 1] ^ WITHIN[:, 4] ^ WITHIN[:, 0]))
    np.testing.assert_allclose(three, [0, 0, 1], atol=1e-12)
    assert np.isnan(energy(np.ones(2**N_HEADS))).all() and len(DEGREES) == 3


def test_shares_are_those_of_a_regression_on_single_heads_and_pairs() -> None:
    values = np.random.default_rng(1).standard_normal(2**N_HEADS)
    sides = 1.0 - 2.0 * WITHIN
    first, second = np.triu_indices(N_HEADS, 1)
    constant, pairs = np.ones((2**N_HEADS, 1)), sides[:, first] * sides[:, second]
    explained = []
    for columns in ((constant, sides), (constant, sides, pairs)):
        design = np.hstack(columns)
        fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
        explained.append(1 - (values - fitted).var() / values.var())
    np.testing.assert_allclose(energy(values)[:2], [explained[0], explained[1] - explained[0]])


def test_the_interval_of_a_share_is_students_around_the_jackknife() -> None:
    """Worked by hand from four prompts: the shares of the mean with each of them left out."""
    values = by_prompt(np.random.default_rng(3).standard_normal(2**N_HEADS), n_prompts=4, noise=1.0)
    share, low, high = energy_interval(values)
    without = np.array([energy(np.delete(values, left_out, axis=1).mean(1)) for left_out in range(4)])
    reach = stats.t.ppf(0.975, 3) * np.sqrt(3 / 4 * ((without - without.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(low, np.maximum(share - reach, 0), rtol=1e-9)
    np.testing.assert_allclose(high, np.minimum(share + reach, 1), rtol=1e-9)
    assert all(np.isnan(end).all() and end.shape == share.shape for end in energy_interval(values[:, :1])[1:])


@pytest.mark.slow
def test_the_interval_of_a_share_covers_it() -> None:
    """1,000 models of a pair beside single heads, 12 prompts that weigh them differently: 93 % or more within three
    standard errors (2.1 points) of the share of the mean over all prompts."""
    rng, covered = np.random.default_rng(2), 0
    singles, pair = WITHIN @ np.array([1.0, 0.5, 0.3, 0.2, 0.1, 0.8]), 1.5 * (WITHIN[:, 1] & WITHIN[:, 4])
    true = energy(singles + pair)[1]
    with unchecked():
        for _ in range(1000):
            weights = 1 + 0.4 * rng.standard_normal((2, 12))
            _, low, high = energy_interval(singles[:, None] * weights[0] + pair[:, None] * weights[1])
            covered += low[1] <= true <= high[1]
    assert covered / 1000 >= 0.93 - 0.021


def test_heads_that_add_up_are_said_to_and_redundant_ones_are_named() -> None:
    alike = np.maximum(WITHIN[:, 0], WITHIN[:, 5]) * 3.0 + WITHIN @ (0.2 * np.ones(N_HEADS))
    needing = (WITHIN[:, 2] & WITHIN[:, 3]) * 3.0 + WITHIN @ (0.2 * np.ones(N_HEADS))
    assert together_texts(by_prompt(WITHIN @ np.ones(N_HEADS), noise=0.01), 1)[0].startswith("heads act additively")
    assert "L1.H0 and L1.H5 are redundant" in together_texts(by_prompt(alike, noise=0.01), 1)[0]
    assert "L1.H2 and L1.H3 need each other" in together_texts(by_prompt(needing, noise=0.01), 1)[0]
    assert "L1.H0 and L1.H5 are redundant" in together_texts(-by_prompt(alike, noise=0.01), 1)[0], "of harm as well"
    assert not together_texts(np.ones((4, 5)), 1)
    noise = np.random.default_rng(3).standard_normal((2**N_HEADS, 12))
    assert "redundant" not in together_texts(noise, 1)[0] and "need" not in together_texts(noise, 1)[0]


def test_of_no_interaction_a_pair_is_called_sure_in_five_percent_at_most() -> None:
    """300 additive models with noise over prompts: any of 15 pairs, within three standard errors (3.8 points)."""
    singles, sure = WITHIN @ np.ones(N_HEADS), 0
    with unchecked():
        for seed in range(300):
            pair = strongest_interaction(by_prompt(singles, noise=0.5, seed=seed))
            sure += pair is not None and pair.p_adjusted <= 0.05
    assert sure / 300 <= 0.05 + 0.038


def test_the_studys_rule_stands_beside_how_many_of_all_equal_splits_meet_it() -> None:
    """Four heads of which any two repair every prompt and one none: every half and its complement are alike."""
    run, settings = planted_run({(1, 0): 3.0, (1, 1): 3.0}, ("even", "odd", "all", "balanced"))
    met = meeting_the_rule(run, 1)
    assert met is not None
    rate, n_met, n = met
    splits = run.mask.values[run.mask.values.sum(1) == 4]
    both = (splits[:, 0] == splits[:, 1]).sum()
    assert n == 70 and n_met == both == 30 and abs(rate) <= 0.3, "both heads in one half: only that one repairs"
    line = line_about(verdict(run, settings, STUDY), "rule")
    assert "30 of 70 equal splits differ by more than the study's 0.3" in line
    assert meeting_the_rule(planted_run({})[0], 1) is None, "a few splits say little of all"
