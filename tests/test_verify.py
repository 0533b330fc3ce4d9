"""Laws of the backstop: it agrees with replay where replay is right, and it is loud where it is not."""

import numpy as np
import pytest
import torch

from headlapse.engine.capture.forward import capture
from headlapse.engine.replay.reference import choose_pairs, hooked_logit_diff, require_exact
from headlapse.engine.replay.replay import replay
from headlapse.engine.runtime.errors import VerificationError
from headlapse.engine.store.patched_run import new_seed
from headlapse.engine.study.alignment import align
from headlapse.engine.study.study import tolerance
from tests.models import MAIN, random_subsets, random_trials, tiny
from tests.test_capture import dressed


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("site", [(1,), (0, 2)])
def test_a_full_hooked_forward_agrees_with_replay(name: str, site: tuple[int, ...]) -> None:
    resident, trials = dressed(tiny(name)), random_trials()
    mask, alignment = random_subsets(5, 8), align(trials, "end:2")
    patched = replay(resident, capture(resident, trials, 2**30), trials, alignment, "denoise", [site], mask)
    expected = hooked_logit_diff(resident, trials, alignment, "denoise", [(site, heads) for heads in mask])
    assert np.abs(patched[0] - expected).max() <= 1e-4


def test_weights_that_changed_since_the_capture_are_noticed() -> None:
    resident, trials = dressed(tiny("neox-parallel")), random_trials()
    captured = capture(resident, trials, 2**30)
    resident.load_weights(tiny("neox-parallel", seed=9).state_dict())
    mask, alignment = random_subsets(2, 8), align(trials, "last")
    patched = replay(resident, captured, trials, alignment, "denoise", [(1,)], mask)[0, 0]
    expected = hooked_logit_diff(resident, trials, alignment, "denoise", [((1,), mask[0])])[0]
    with pytest.raises(VerificationError, match="not those that were cached"):
        require_exact(float(np.abs(patched - expected).max()), tolerance("float32"), "step1")


def test_a_nan_is_never_taken_for_exact() -> None:
    with pytest.raises(VerificationError):
        require_exact(float("nan"), 1e-4, "step1")
    require_exact(1e-5, 1e-4, "step1")


def test_the_tolerance_grows_with_the_coarsest_rounding_only() -> None:
    assert tolerance("float32") == tolerance("float32", "float32") == 1e-4
    assert tolerance("float32", "float16") == tolerance("float16") == pytest.approx(1e-4 * 2**13)
    assert tolerance("bfloat16", "float32") == pytest.approx(1e-4 * 2**16)


def test_the_pairs_are_random_over_checkpoints_and_the_same_for_the_same_checkpoint() -> None:
    sites = [(layer,) for layer in range(12)]
    assert choose_pairs("step1", sites, 4096, 2, 7) == choose_pairs("step1", sites, 4096, 2, 7)
    assert len({tuple(choose_pairs(f"step{i}", sites, 4096, 2, 7)) for i in range(20)}) == 20
    assert len({tuple(choose_pairs("step1", sites, 4096, 2, seed)) for seed in range(20)}) == 20
    assert new_seed() != new_seed(), "other runs are verified in every run that is made"
    assert choose_pairs("step1", sites[:1], 1, 2, 7) == [(0, 0)]


def test_stock_attention_is_gone_after_the_check() -> None:
    resident, trials = dressed(tiny("neox-parallel")), random_trials()
    hooked_logit_diff(resident, trials, align(trials, "last"), "noise", [((0,), np.ones(8, dtype=bool))])
    captured = capture(resident, trials, 2**30)
    assert torch.isfinite(captured.answer_logits).all()
