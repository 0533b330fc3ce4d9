"""Laws of the shortcut: it is taken under parallel residual and nowhere else, and changes no number."""

import numpy as np
import pytest
import torch

from headlapse.engine.capture.forward import capture
from headlapse.engine.checkpoints.hooks import replace_outputs
from headlapse.engine.replay import replay as room
from headlapse.engine.replay.additive_layers import additive_layer
from headlapse.engine.replay.layers import LayerRunner
from headlapse.engine.replay.patch_inputs import PatchInputs
from headlapse.engine.replay.replay import replay
from headlapse.engine.study.alignment import align
from tests.models import MAIN, MORE, N_LAYERS, random_subsets, random_trials, tiny
from tests.test_capture import dressed

PARALLEL = {"neox-parallel", "phi", "cohere"}


@pytest.mark.parametrize("name", [*MAIN, *MORE])
def test_heads_add_up_under_parallel_residual_and_nowhere_else(name: str) -> None:
    resident, trials = dressed(tiny(name)), random_trials()
    inputs = PatchInputs.from_capture(
        resident, capture(resident, trials, 2**30), trials, align(trials, "end:2"), "denoise"
    )
    runner = LayerRunner(resident, inputs)
    with torch.inference_mode():
        is_additive = [additive_layer(runner, layer) is not None for layer in range(N_LAYERS)]
    assert is_additive == [name in PARALLEL] * N_LAYERS


@pytest.mark.parametrize(("factor", "adds_up"), [(1.0, True), (1.03, False), (0.97, False), (1.2, False)])
def test_heads_do_not_add_up_where_a_few_percent_come_between_them_and_the_residual_stream(
    factor: float, adds_up: bool
) -> None:
    """As in architectures that scale each branch: what W_O projects is not what arrives."""
    resident, trials = dressed(tiny("neox-parallel")), random_trials()
    captured = capture(resident, trials, 2**30)
    inputs = PatchInputs.from_capture(resident, captured, trials, align(trials, "last"), "denoise")
    with torch.inference_mode(), replace_outputs(resident.output_projections([1]), lambda _, out: factor * out):
        assert (additive_layer(LayerRunner(resident, inputs), 1) is not None) == adds_up


@pytest.mark.parametrize("name", sorted(PARALLEL))
@pytest.mark.parametrize("site", [(0,), (2,), (0, 2)])
def test_the_shortcut_changes_no_number(monkeypatch: pytest.MonkeyPatch, name: str, site: tuple[int, ...]) -> None:
    resident, trials = dressed(tiny(name)), random_trials()
    given = (resident, capture(resident, trials, 2**30), trials, align(trials, "end:3"), "noise", [site])
    short = replay(*given, random_subsets(20, 8))
    monkeypatch.setattr(room, "additive_layer", lambda *_: None)
    long = replay(*given, random_subsets(20, 8))
    assert np.abs(short - long).max() <= 2e-5
    assert np.abs(long).max() > 0.1
