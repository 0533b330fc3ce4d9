"""Layers whose heads add up: under parallel residual a patch only adds its heads' differences to what leaves the layer.

Whether they do is found by trying, once per layer of a skeleton, and not from a table of architectures.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headlapse.engine.checkpoints import Skeleton
from headlapse.engine.passes import Ground, run_on


@dataclass(frozen=True)
class Sums:
    """A layer whose heads add up: patching it only adds the patched heads' differences to what leaves it."""

    unpatched: Float[Tensor, "trial patched d_model"]
    """The target run's residual stream after the layer."""

    deltas: Float[Tensor, "trial patched head d_model"]
    """(z_source - z_target) W_O, head by head."""


def sums_of(skeleton: Skeleton, ground: Ground, layer: int) -> Sums | None:
    """The layer's sums where its heads add up, None where they do not."""
    if layer not in skeleton.heads_add_up:
        skeleton.heads_add_up[layer] = not _is_seen(skeleton, ground, layer) and _adds_up(skeleton, ground, layer)
    if not skeleton.heads_add_up[layer]:
        return None
    target, source = (ground.patched("z", layer, run) for run in (ground.target, ground.source))
    each = torch.eye(target.shape[2], device=target.device, dtype=target.dtype)[:, :, None]
    deltas = _projected(skeleton, layer, (source - target)[:, :, None] * each)
    return Sums(_layer_output(skeleton, ground, layer, target), deltas)


def _adds_up(skeleton: Skeleton, ground: Ground, layer: int) -> bool:
    """Whether a push on z arrives in the residual stream as W_O leaves it, without another factor, say."""
    z = ground.patched("z", layer, ground.target)
    push = torch.ones_like(z) * z.std()
    before, after = (_layer_output(skeleton, ground, layer, given) for given in (z, z + push))
    expected = _projected(skeleton, layer, push)
    rounding = 32 * torch.finfo(before.dtype).eps * before.abs().max()
    return bool((after - before - expected).abs().max() <= rounding + 0.01 * expected.abs().max())


def _is_seen(skeleton: Skeleton, ground: Ground, layer: int) -> bool:
    """Whether any weight of the layer but W_O works on what attention gave: told by NaN, which nothing sheds."""
    saw: list[bool] = []

    def look(_module: nn.Module, args: tuple[object, ...]) -> None:
        saw.append(any(isinstance(value, Tensor) and bool(value.isnan().any()) for value in args))

    project = skeleton.model.get_submodule(skeleton.anatomy.out_proj[layer])
    with ExitStack() as stack:
        for module in skeleton.layer_modules()[layer].modules():
            if module is not project and next(module.parameters(recurse=False), None) is not None:
                stack.callback(module.register_forward_pre_hook(look).remove)
        z = ground.patched("z", layer, ground.target)
        _layer_output(skeleton, ground, layer, torch.full_like(z, torch.nan))
    assert saw, "a layer has weights besides W_O"
    return any(saw)


def _layer_output(skeleton: Skeleton, ground: Ground, layer: int, z: Tensor) -> Float[Tensor, "trial patched d_model"]:
    """What leaves `layer` when its heads give z (trial, patched, head, head_dim) at the patched positions."""
    out: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        out.append(output[0] if isinstance(output, tuple) else output)

    handle = skeleton.layer_modules()[layer].register_forward_hook(keep)
    try:
        resid_pre = ground.patched("resid_pre", layer, ground.target)[:, None]
        run_on(skeleton, ground, _Giving(z, ground.longest), layer, resid_pre, stop=layer + 1)
    finally:
        handle.remove()
    return out[0]


@dataclass(frozen=True)
class _Giving:
    """An attention mode whose heads give a fixed z."""

    z: Float[Tensor, "trial patched head head_dim"]
    longest: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return self.z


def _projected(skeleton: Skeleton, layer: int, z: Tensor) -> Tensor:
    """z (..., head, head_dim) through W_O without its bias: (..., d_model)."""
    project = skeleton.model.get_submodule(skeleton.anatomy.out_proj[layer])
    flat = z.flatten(-2)
    projected: Tensor = project(flat) - project(torch.zeros_like(flat))
    return projected
