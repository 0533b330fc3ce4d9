"""Layers whose heads add up: under parallel residual a patch only adds its heads' differences to what leaves the layer.

Whether they do is found by trying, once per layer of a skeleton, and not from a table of architectures.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...kernels.mix import head_deltas
from ..checkpoints.model import Skeleton
from .layers import Giving, Steps


@dataclass(frozen=True)
class Sums:
    """A layer whose heads add up: patching it only adds the patched heads' differences to what leaves it."""

    unpatched: Float[Tensor, "trial patched d_model"]
    """The target run's residual stream after the layer."""

    deltas: Float[Tensor, "trial patched head d_model"]
    """(z_source - z_target) W_O, head by head."""


def sums_of(steps: Steps, layer: int) -> Sums | None:
    """The layer's sums where its heads add up, None where they do not."""
    skeleton, ground = steps.skeleton, steps.ground
    if layer not in skeleton.heads_add_up:
        skeleton.heads_add_up[layer] = not _is_seen(steps, layer) and _adds_up(steps, layer)
    if not skeleton.heads_add_up[layer]:
        return None
    target, source = ground.patched("z", layer, ground.target), ground.source_z(layer)
    if layer + 1 < skeleton.anatomy.n_layers:
        unpatched = ground.patched("resid_pre", layer + 1, ground.target)
    else:
        unpatched = layer_output(steps, layer, target)
    return Sums(unpatched, head_deltas(source, target, output_weight(skeleton, layer)))


def output_weight(skeleton: Skeleton, layer: int) -> Float[Tensor, "head head_dim d_model"]:
    """W_O, head by head, whatever way round the model's own module keeps it."""
    project: Any = skeleton.model.get_submodule(skeleton.anatomy.out_proj[layer])
    weight: Tensor
    if isinstance(project, nn.Linear):
        weight = project.weight.T
    else:
        units = torch.eye(skeleton.anatomy.n_heads * skeleton.anatomy.value_dim).to(project.weight)
        weight = project(units) - project(torch.zeros_like(units[:1]))
    return weight.unflatten(0, (skeleton.anatomy.n_heads, -1))


def _adds_up(steps: Steps, layer: int) -> bool:
    """Whether a push on z arrives in the residual stream as W_O leaves it, without another factor, say."""
    z = steps.ground.patched("z", layer, steps.ground.target)
    push = torch.ones_like(z) * z.std()
    before, after = (layer_output(steps, layer, given) for given in (z, z + push))
    expected = push.flatten(-2) @ output_weight(steps.skeleton, layer).flatten(0, 1)
    rounding = 32 * torch.finfo(before.dtype).eps * before.abs().max()
    return bool((after - before - expected).abs().max() <= rounding + 0.01 * expected.abs().max())


def _is_seen(steps: Steps, layer: int) -> bool:
    """Whether any weight of the layer but W_O works on what attention gave: told by NaN, which nothing sheds."""
    saw: list[bool] = []

    def look(_module: nn.Module, args: tuple[object, ...]) -> None:
        saw.append(any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in args))

    skeleton = steps.skeleton
    project = skeleton.model.get_submodule(skeleton.anatomy.out_proj[layer])
    with ExitStack() as stack:
        for module in skeleton.layer_modules()[layer].modules():
            if module is not project and next(module.parameters(recurse=False), None) is not None:
                stack.callback(module.register_forward_pre_hook(look).remove)
        z = steps.ground.patched("z", layer, steps.ground.target)
        layer_output(steps, layer, torch.full_like(z, torch.nan))
    assert saw, "a layer has weights besides W_O"
    return any(saw)


def layer_output(
    steps: Steps, layer: int, z: Float[Tensor, "trial patched head head_dim"]
) -> Float[Tensor, "trial patched d_model"]:
    """What leaves `layer` in the target run when its heads give `z`."""
    resid_pre = steps.ground.patched("resid_pre", layer, steps.ground.target)
    return steps.through(layer, resid_pre[:, None], Giving(z[:, None], steps.ground.longest))[:, 0]
