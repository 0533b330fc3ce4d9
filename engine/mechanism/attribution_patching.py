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
from ..replay.layers import Steps
from ..replay.patch_inputs import Ground
from .attention import attend_from


@dataclass(frozen=True)
class _Pushed(AttentionMode):
    """An attention mode of the target run at its read position, with a push on every layer's z to differentiate by."""

    ground: Ground
    push: dict[int, Float[Tensor, "trial one head head_dim"]]

    @property
    def longest(self) -> int:
        return self.ground.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ground = self.ground
        read = ground.positions[ground.target, :, 0]
        everything = []
        for kind, own in (("key", key), ("value", value)):
            stored = ground.run(kind, layer, ground.target)
            at_read = torch.arange(stored.shape[1], device=stored.device) == read[:, None]
            everything.append(torch.where(at_read[..., None, None], own.transpose(1, 2), stored))
        keys, values = everything
        pattern = attend_from(query[:, :, 0], keys, read, scaling).to(query.dtype)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
        return torch.einsum("thp,tphv->thv", pattern, values)[:, None] + self.push[layer]


def gradient(steps: Steps, layers: range) -> Float[Tensor, "layer trial head head_dim"]:
    """Of the target run's logit difference by every head's z at the read position; nats per unit.

    `layers` go up to the last.  Only the read position is run, forwards and back: what comes before it does not change.
    """
    ground = steps.ground
    resid = ground.patched("resid_pre", layers[0], ground.target)[:, None]
    with torch.enable_grad():
        like = ground.patched("z", layers[0], ground.target)
        push = {layer: torch.zeros_like(like, requires_grad=True) for layer in layers}
        for layer in layers:
            resid = steps.through(layer, resid, _Pushed(ground, push))
        found = torch.autograd.grad(steps.logit_diff(resid).sum(), list(push.values()))
    return torch.stack(found)[:, :, 0].float()


def estimated_effect(steps: Steps, layers: range) -> Float[Tensor, "layer head trial"]:
    """How far patching each head by itself would move the logit difference, to first order, in nats."""
    ground = steps.ground
    target, source = (
        torch.stack([ground.patched("z", layer, run)[:, 0] for layer in layers]).float()
        for run in (ground.target, ground.source)
    )
    return (gradient(steps, layers) * (source - target)).sum(-1).transpose(1, 2)
