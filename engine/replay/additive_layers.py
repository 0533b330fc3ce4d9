"""Layers whose heads add up: under parallel residual a patch only adds its heads' differences to the layer's output.

Whether they do is found by a test, once per layer of a resident, and not from a table of architectures.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...kernels.mix import head_deltas
from ..checkpoints.hooks import hook_inputs
from ..checkpoints.model import ResidentModel
from .layers import FixedZ, LayerRunner


@dataclass(frozen=True)
class AdditiveLayer:
    """A layer whose heads add up: patching it only adds the patched heads' differences to its output."""

    unpatched: Float[Tensor, "trial patched d_model"]
    """The target run's residual stream after the layer."""

    deltas: Float[Tensor, "trial patched head d_model"]
    """(z_source - z_target) W_O, head by head."""


def additive_layer(runner: LayerRunner, layer: int) -> AdditiveLayer | None:
    """The layer's heads as differences to be added, None where they do not add up."""
    resident, inputs = runner.resident, runner.inputs
    if layer not in resident.heads_add_up:
        resident.heads_add_up[layer] = not _depends_on_attention(runner, layer) and _adds_up(runner, layer)
    if not resident.heads_add_up[layer]:
        return None
    target, source = inputs.patched("z", layer, inputs.target), inputs.source_z(layer)
    if layer + 1 < resident.architecture.n_layers:
        unpatched = inputs.patched("resid_pre", layer + 1, inputs.target)
    else:
        unpatched = layer_output(runner, layer, target)
    return AdditiveLayer(unpatched, head_deltas(source, target, output_weight(resident, layer)))


def output_weight(resident: ResidentModel, layer: int) -> Float[Tensor, "head head_dim d_model"]:
    """W_O, head by head, in whatever layout the model's own module stores it."""
    project: Any = resident.output_projections([layer])[layer]
    weight: Tensor
    if isinstance(project, nn.Linear):
        weight = project.weight.T
    else:
        units = torch.eye(resident.architecture.n_heads * resident.architecture.value_dim).to(project.weight)
        weight = project(units) - project(torch.zeros_like(units[:1]))
    return torch.unflatten(weight, 0, (resident.architecture.n_heads, -1))


def _adds_up(runner: LayerRunner, layer: int) -> bool:
    """Whether a change of z reaches the residual stream just as W_O projects it, without another factor, say.

    Allowed is rounding, and a hundredth of the change: architectures that scale their branches do so by more.
    """
    z = runner.inputs.patched("z", layer, runner.inputs.target)
    push = torch.ones_like(z) * z.std()
    before, after = (layer_output(runner, layer, changed) for changed in (z, z + push))
    expected = push.flatten(-2) @ output_weight(runner.resident, layer).flatten(0, 1)
    rounding = 32 * torch.finfo(before.dtype).eps * before.abs().max()
    return bool((after - before - expected).abs().max() <= rounding + 0.01 * expected.abs().max())


def _depends_on_attention(runner: LayerRunner, layer: int) -> bool:
    """Whether any weight of the layer but W_O is applied to what attention computed.

    Detected by injecting NaN as z, which propagates through every operation.
    """
    saw_nan: list[bool] = []

    def look(_path: str, inputs: tuple[Any, ...]) -> None:
        saw_nan.append(any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in inputs))

    resident = runner.resident
    [project] = resident.output_projections([layer]).values()
    others = {
        path: module
        for path, module in resident.layer_modules()[layer].named_modules()
        if module is not project and next(module.parameters(recurse=False), None) is not None
    }
    with hook_inputs(others, look):
        z = runner.inputs.patched("z", layer, runner.inputs.target)
        layer_output(runner, layer, torch.full_like(z, torch.nan))
    assert saw_nan, "a layer has weights besides W_O"
    return any(saw_nan)


def layer_output(
    runner: LayerRunner, layer: int, z: Float[Tensor, "trial patched head head_dim"]
) -> Float[Tensor, "trial patched d_model"]:
    """The residual stream after `layer` in the target run when its heads output `z`."""
    resid_pre = runner.inputs.patched("resid_pre", layer, runner.inputs.target)
    return runner.through(layer, resid_pre[:, None], FixedZ(z[:, None], runner.inputs.longest))[:, 0]
