"""One layer at a time: the patched positions of many runs, side by side, through a layer of the skeleton."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headlapse.engine.attention import AttentionMode, attending
from headlapse.engine.checkpoints import LayerCall, Skeleton
from headlapse.engine.ground import Ground
from headlapse.kernels.attend import attend_shared_prefix

Resid = Float[Tensor, "trial run patched d_model"]


class Steps:
    """The layers of a skeleton on one checkpoint's ground, a step each.

    What the model hands its layers besides the residual stream (rotary angles, say) depends on nothing but the number
    of runs; it is recorded once for each.
    """

    def __init__(self, skeleton: Skeleton, ground: Ground) -> None:
        self.skeleton, self.ground = skeleton, ground
        self._modules = skeleton.layer_modules()
        self._calls: dict[int, list[LayerCall]] = {}

    def through(self, layer: int, resid_pre: Resid, mode: AttentionMode) -> Resid:
        """The residual stream after `layer`, whose attention does as `mode` says."""
        n_runs = resid_pre.shape[1]
        args, kwargs = self._call(n_runs)[layer]
        with attending(mode):
            output = self._modules[layer](resid_pre.flatten(1, 2), *args, **kwargs)
        resid_post: Tensor = output[0] if isinstance(output, tuple) else output
        return resid_post.unflatten(1, (n_runs, -1))

    def answer_logits(self, resid: Resid) -> Float[Tensor, "trial run answer"]:
        """What the model makes of residual streams that left its last layer, at the position that is read."""
        trial = torch.arange(len(resid), device=resid.device)
        read = resid[:, :, 0] if resid.shape[2] == 1 else resid[trial, :, self.ground.read]
        return self.skeleton.answer_logits(read, self.ground.answers)

    def _call(self, n_runs: int) -> list[LayerCall]:
        if n_runs not in self._calls:
            positions = self.ground.positions[self.ground.target]
            self._calls[n_runs] = self.skeleton.layer_calls(positions.repeat(1, n_runs))
        return self._calls[n_runs]


@dataclass(frozen=True)
class Giving:
    """An attention mode whose heads give a fixed z."""

    z: Float[Tensor, "trial run patched head head_dim"]
    longest: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return self.z.flatten(1, 2)


@dataclass(frozen=True)
class Replaying:
    """An attention mode in which every run attends to the target run's prefix and to itself."""

    ground: Ground
    patched: Bool[Tensor, "run head"] | None
    """The heads that take their z from the source run, where the layer is patched in any run."""

    @property
    def longest(self) -> int:
        return self.ground.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ground, n_patched = self.ground, self.ground.positions.shape[2]
        query, key, value = (x.unflatten(2, (-1, n_patched)) for x in (query, key, value))
        z = attend_shared_prefix(
            query,
            key,
            value,
            ground.prefix("key", layer),
            ground.prefix("value", layer),
            ground.prefix_length,
            scaling,
            None if self.patched is None else ground.patched("z", layer, ground.source),
            self.patched,
        )
        return z.flatten(1, 2)
