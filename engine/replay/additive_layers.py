"""Layers whose heads add up: under parallel residual a patch only adds its heads' differences to what leaves the layer.

Whether they do is found by trying, once per layer of a resident, and not from a table of architectures.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...kernels.mix import head_deltas
from ..checkpoints.model import ResidentModel
from .layers import FixedZ, LayerRunner


@dataclass(frozen=True)
class AdditiveLayer:
    """A layer whose heads add up: patching it only adds the patched heads' differences to what leaves it."""

    unpatched: Float[Tensor, "trial patched d_model"]
    """The target run's residual stream after the layer."""

    deltas: Float[Tensor, "trial patched head d_model"]
    """(z_source - z_target) W_O, head by head."""


def additive_layer(runner: LayerRunner, layer: int) -> AdditiveLayer | None:
    """The layer's sums where its heads add up, None where they do not."""
    resident, inputs = runner.resident, runner.inputs
    if layer not in resident.heads_add_up:
        resident.heads_add_up[layer] = not _is_seen(runner, layer) and _adds_up(runner, layer)
    if not resident.heads_add_up[layer]:
        return None
    target, source = inputs.patched("z", layer, inputs.target), inputs.source_z(layer)
    if layer + 1 < resident.architecture.n_layers:
        unpatched = inputs.patched("resid_pre", layer + 1, inputs.target)
    else:
        unpatched = layer_output(runner, layer, target)
    return AdditiveLayer(unpatched, head_deltas(source, target, output_weight(resident, layer)))


def output_weight(resident: ResidentModel, layer: int) -> Float[Tensor, "head head_dim d_model"]:
    """W_O, head by head, whatever way round the model's own module keeps it."""
    project: Any = resident.model.get_submodule(resident.architecture.out_proj[layer])
    weight: Tensor
    if isinstance(project, nn.Linear):
        weight = project.weight.T
    else:
        units = torch.eye(resident.architecture.n_heads * resident.architecture.value_dim).to(project.weight)
        weight = project(units) - project(torch.zeros_like(units[:1]))
    return weight.unflatten(0, (resident.architecture.n_heads, -1))


def _adds_up(runner: LayerRunner, layer: int) -> bool:
    """Whether a push on z arrives in the residual stream as W_O leaves it, without another factor, say."""
    z = runner.inputs.patched("z", layer, runner.inputs.target)
    push = torch.ones_like(z) * z.std()
    before, after = (layer_output(runner, layer, given) for given in (z, z + push))
    expected = push.flatten(-2) @ output_weight(runner.resident, layer).flatten(0, 1)
    rounding = 32 * torch.finfo(before.dtype).eps * before.abs().max()
    return bool((after - before - expected).abs().max() <= rounding + 0.01 * expected.abs().max())


def _is_seen(runner: LayerRunner, layer: int) -> bool:
    """Whether any weight of the layer but W_O works on what attention gave: told by NaN, which nothing sheds."""
    saw: list[bool] = []

    def look(_module: nn.Module, args: tuple[object, ...]) -> None:
        saw.append(any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in args))

    resident = runner.resident
    project = resident.model.get_submodule(resident.architecture.out_proj[layer])
    with ExitStack() as stack:
        for module in resident.layer_modules()[layer].modules():
            if module is not project and next(module.parameters(recurse=False), None) is not None:
                stack.callback(module.register_forward_pre_hook(look).remove)
        z = runner.inputs.patched("z", layer, runner.inputs.target)
        layer_output(runner, layer, torch.full_like(z, torch.nan))
    assert saw, "a layer has weights besides W_O"
    return any(saw)


def layer_output(
    runner: LayerRunner, layer: int, z: Float[Tensor, "trial patched head head_dim"]
) -> Float[Tensor, "trial patched d_model"]:
    """What leaves `layer` in the target run when its heads give `z`."""
    resid_pre = runner.inputs.patched("resid_pre", layer, runner.inputs.target)
    return runner.through(layer, resid_pre[:, None], FixedZ(z[:, None], runner.inputs.longest))[:, 0]
