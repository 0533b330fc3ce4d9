"""Attribution patching: the effect of patching every head, estimated from one gradient.

(z_source - z_target) · d(logit difference)/dz in the target run, at the patched position: the first-order term of the
patch's effect (Nanda 2023, Attribution Patching: Activation Patching At Industrial Scale; Syed et al. 2023,
arXiv:2310.10348).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoints.attention_hook import AttentionMode
from ..replay.layers import LayerRunner
from ..replay.patch_inputs import PatchInputs
from .attention import attend_from


@dataclass(frozen=True)
class _Pushed(AttentionMode):
    """An attention mode of the target run at its read position, with a push on every layer's z to differentiate by."""

    inputs: PatchInputs
    push: dict[int, Float[Tensor, "trial one head head_dim"]]

    @property
    def longest(self) -> int:
        return self.inputs.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        inputs = self.inputs
        read = inputs.positions[inputs.target, :, 0]
        everything = []
        for kind, own in (("key", key), ("value", value)):
            stored = inputs.run(kind, layer, inputs.target)
            at_read = torch.arange(stored.shape[1], device=stored.device) == read[:, None]
            everything.append(torch.where(at_read[..., None, None], own.transpose(1, 2), stored))
        keys, values = everything
        pattern = attend_from(query[:, :, 0], keys, read, scaling).to(query.dtype)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
        return torch.einsum("thp,tphv->thv", pattern, values)[:, None] + self.push[layer]


def gradient(runner: LayerRunner, layers: range) -> Float[Tensor, "layer trial head head_dim"]:
    """Of the target run's logit difference by every head's z at the read position; nats per unit.

    `layers` go up to the last.  Only the read position is run, forwards and back: what comes before it does not change.
    """
    inputs = runner.inputs
    resid = inputs.patched("resid_pre", layers[0], inputs.target)[:, None]
    with torch.enable_grad():
        like = inputs.patched("z", layers[0], inputs.target)
        push = {layer: torch.zeros_like(like, requires_grad=True) for layer in layers}
        for layer in layers:
            resid = runner.through(layer, resid, _Pushed(inputs, push))
        found = torch.autograd.grad(runner.logit_diff(resid).sum(), list(push.values()))
    return torch.stack(found)[:, :, 0].float()


def estimated_effect(runner: LayerRunner, layers: range) -> Float[Tensor, "layer head trial"]:
    """How far patching each head by itself would move the logit difference, to first order, in nats."""
    inputs = runner.inputs
    target, source = (
        torch.stack([inputs.patched("z", layer, run)[:, 0] for layer in layers]).float()
        for run in (inputs.target, inputs.source)
    )
    return (gradient(runner, layers) * (source - target)).sum(-1).transpose(1, 2)
