"""Attribution patching: the effect of patching every head alone, estimated from one gradient.

(z_source - z_target) · d(logit difference)/dz in the target run, at the read position: the first-order term of the
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
class _PerturbedAttention(AttentionMode):
    """An attention mode of the target run at its read position that adds a perturbation to every layer's z."""

    inputs: PatchInputs

    perturbation: dict[int, Float[Tensor, "trial one head head_dim"]]
    """Layer -> zeros to differentiate by."""

    @property
    def longest(self) -> int:
        return self.inputs.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        read = self.inputs.positions[self.inputs.target, :, 0]
        keys = self._with_read_position("key", layer, key)
        values = self._with_read_position("value", layer, value)
        pattern = attend_from(query[:, :, 0], keys, read, scaling).to(query.dtype)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
        return torch.einsum("thp,tphv->thv", pattern, values)[:, None] + self.perturbation[layer]

    def _with_read_position(
        self, kind: str, layer: int, computed: Float[Tensor, "trial kv_head one width"]
    ) -> Float[Tensor, "trial position kv_head width"]:
        """The target run's stored keys or values, with those just computed at the read position.

        The computed ones carry the gradient: a head's z also acts through later layers' keys and values there.
        """
        stored = self.inputs.run(kind, layer, self.inputs.target)
        read = self.inputs.positions[self.inputs.target, :, 0]
        is_read = torch.arange(stored.shape[1], device=stored.device) == read[:, None]
        return torch.where(is_read[..., None, None], computed.transpose(1, 2), stored)


def gradient(runner: LayerRunner, layers: range) -> Float[Tensor, "layer trial head head_dim"]:
    """Gradient of the target run's logit difference with respect to every head's z at the read position.

    In nats per unit of z, float32.  `layers` end with the model's last and have no gap.  Only the read position is run
    forwards and backwards: under causal attention nothing before it depends on it.
    """
    inputs = runner.inputs
    resid = inputs.patched("resid_pre", layers[0], inputs.target)[:, None]
    with torch.enable_grad():
        z = inputs.patched("z", layers[0], inputs.target)
        perturbation = {layer: torch.zeros_like(z, requires_grad=True) for layer in layers}
        for layer in layers:
            resid = runner.through(layer, resid, _PerturbedAttention(inputs, perturbation))
        # Trials do not mix, so the gradient of their sum holds every trial's own.
        gradients = torch.autograd.grad(runner.logit_diff(resid).sum(), list(perturbation.values()))
    return torch.stack(gradients)[:, :, 0].float()


def estimated_effect(runner: LayerRunner, layers: range) -> Float[Tensor, "layer head trial"]:
    """How far patching each head alone would move the logit difference, to first order, in nats.

    `layers` as for `gradient`.
    """
    inputs = runner.inputs
    target, source = (
        torch.stack([inputs.patched("z", layer, run)[:, 0] for layer in layers]).float()
        for run in (inputs.target, inputs.source)
    )
    return (gradient(runner, layers) * (source - target)).sum(-1).transpose(1, 2)
