"""Laws of the peers: what scripts/bench.py times against replay does the same work.

The optional tools are held against plain hooks in scripts/bench.py, which prints the largest difference.
"""

import numpy as np
import pytest
import torch
from torch import nn

from headlapse.engine.capture import capture
from headlapse.engine.peers import Hooks, generate_published
from headlapse.engine.tasks import align
from headlapse.engine.verify import hooked_logit_diff
from tests.models import MAIN, N_HEADS, N_LAYERS, random_subsets, random_trials, tiny
from tests.test_capture import dressed


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("together", [1, 4])
def test_plain_hooks_are_the_patched_runs_by_definition(name: str, together: int) -> None:
    model, trials = tiny(name), random_trials()
    conditions = [(layer, heads) for layer in range(N_LAYERS) for heads in random_subsets(3, N_HEADS, seed=layer)]
    found = Hooks(model, together).patch(trials, conditions)
    patches = [((layer,), heads) for layer, heads in conditions]
    expected = hooked_logit_diff(dressed(model), trials, align(trials, "last"), "denoise", patches)
    assert np.abs(found - expected).max() <= 1e-5
    assert np.ptp(expected, axis=0).min() > 1e-2


def test_plain_hooks_capture_what_the_store_holds() -> None:
    model, trials = tiny("neox-parallel"), random_trials()
    captured = capture(dressed(model), trials, 2**30)
    real = torch.from_numpy(np.arange(trials.tokens.shape[-1]) < trials.length[..., None])
    for layer, z in enumerate(Hooks(model).capture(trials)):
        assert (z - captured.read("z", layer))[real].abs().max() <= 1e-5


def test_a_peer_shares_the_weights_and_leaves_the_model_alone() -> None:
    model, trials = tiny("neox-parallel"), random_trials()
    peer = Hooks(model)
    peer.patch(trials, [(0, np.ones(N_HEADS, dtype=bool))])
    assert {p.data_ptr() for p in peer.model.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert not {*peer.model.modules()} & {*model.modules()}
    assert not any(hooks(module) for tree in (model, peer.model) for module in tree.modules())


def test_the_published_procedure_generates_from_a_patched_prompt() -> None:
    model = tiny("neox-parallel", eos_token_id=None)
    clean, corrupt = torch.arange(2, 8), torch.arange(20, 29)
    generations = generate_published(model, clean, corrupt, layer=1, n_trials=2, n_tokens=5)
    assert [[len(tokens) for tokens in trials] for trials in generations] == [[5, 5]] * 3
    assert all(torch.equal(*trials) for trials in generations)
    by_itself = model.generate(corrupt[None], attention_mask=torch.ones(1, 9), max_new_tokens=5, do_sample=False)
    assert torch.equal(generations[0][0], by_itself[0, 9:])
    assert not torch.equal(generations[1][0], generations[0][0])
    assert not any(hooks(module) for module in model.modules())


def hooks(module: nn.Module) -> list[object]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
