"""One layer at a time: the patched positions of many runs, side by side, through a layer of the resident."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...kernels.attend import attend_shared_prefix
from ...kernels.mix import mix_heads
from ..checkpoints.attention_hook import AttentionMode, attending
from ..checkpoints.model import ResidentModel
from .patch_inputs import PatchInputs

Resid = Float[Tensor, "trial run patched d_model"]


class LayerRunner:
    """Runs the resident's layers, one at a time, on one checkpoint's inputs.

    What the model hands its layers besides the residual stream (rotary angles, say) is recorded once, for `max_runs`
    runs; fewer runs get as much of it as they have rows.
    """

    def __init__(self, resident: ResidentModel, inputs: PatchInputs, max_runs: int = 1) -> None:
        self.resident, self.inputs = resident, inputs
        self._modules = resident.layer_modules()
        positions = inputs.positions[inputs.target].repeat(1, max_runs)
        self._calls, self._n_rows = resident.layer_calls(positions), positions.shape[1]

    def through(self, layer: int, resid_pre: Resid, mode: AttentionMode) -> Resid:
        """The residual stream after `layer`, whose attention is computed by `mode`."""
        rows = resid_pre.flatten(1, 2)
        args, kwargs = self._first(rows.shape[1], self._calls[layer])
        with attending(mode):
            output = self._modules[layer](rows, *args, **kwargs)
        resid_post: Tensor = output[0] if isinstance(output, tuple) else output
        return torch.unflatten(resid_post, 1, resid_pre.shape[1:3])

    def logit_diff(self, resid: Resid) -> Float[Tensor, "run trial"]:
        """Right minus wrong, in nats, from the residual stream after the last layer."""
        right, wrong = self.resident.answer_logits(self.read(resid), self.inputs.answers).float().unbind(-1)
        return (right - wrong).T

    def read(self, resid: Resid, ahead: int = 0) -> Float[Tensor, "trial run d_model"]:
        """The residual stream at the position that is read, or at `ahead` positions after it."""
        if resid.shape[2] == 1:
            return resid[:, :, 0]
        trial = torch.arange(len(resid), device=resid.device)
        return resid[trial, :, self.inputs.read + ahead]

    def _first(self, n_rows: int, argument: Any) -> Any:
        """The first `n_rows` of every tensor that has as many rows as were recorded: (batch, row, ...) or (row)."""
        if isinstance(argument, dict):
            return {name: self._first(n_rows, value) for name, value in argument.items()}
        if isinstance(argument, tuple):
            return tuple(self._first(n_rows, value) for value in argument)
        if not isinstance(argument, Tensor) or not argument.ndim:
            return argument
        axis = min(1, argument.ndim - 1)
        return argument.narrow(axis, 0, n_rows) if argument.shape[axis] == self._n_rows else argument


@dataclass(frozen=True)
class FixedZ:
    """An attention mode whose heads output a fixed z."""

    z: Float[Tensor, "trial run patched head head_dim"]
    longest: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return self.z.flatten(1, 2)


@dataclass(frozen=True)
class SharedPrefixAttention:
    """An attention mode in which every run attends to the target run's prefix and to itself."""

    inputs: PatchInputs
    patched: Bool[Tensor, "run head"] | None
    """The heads that take their z from the source run, where the layer is patched in any run."""

    @property
    def longest(self) -> int:
        return self.inputs.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        inputs, n_patched = self.inputs, self.inputs.positions.shape[2]
        query, key, value = (torch.unflatten(x, 2, (-1, n_patched)) for x in (query, key, value))
        source = None if self.patched is None else inputs.patched("z", layer, inputs.source)
        z = attend_shared_prefix(
            query,
            key,
            value,
            inputs.prefix("key", layer),
            inputs.prefix("value", layer),
            inputs.prefix_length,
            scaling,
            source if inputs.all_valid else None,
            self.patched if inputs.all_valid else None,
        )
        if source is not None and self.patched is not None and not inputs.all_valid:
            z = torch.where(inputs.valid[:, None, :, None, None], mix_heads(z, source, self.patched), z)
        return z.flatten(1, 2)
