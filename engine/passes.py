"""One pass: the patched positions of many runs, side by side, through the layers from some layer on."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headlapse.engine.activations import Activations
from headlapse.engine.attention import AttentionMode, attending
from headlapse.engine.checkpoints import Skeleton
from headlapse.engine.study import RUNS
from headlapse.engine.tasks import Alignment, Trials
from headlapse.kernels.attend import attend_shared_prefix
from headlapse.kernels.mix import mix_heads

Direction = Literal["denoise", "noise"]

Site = tuple[int, ...]
"""Layers patched jointly, with the same heads; most often a single one.  Ascending."""


def source_and_target(direction: Direction) -> tuple[int, int]:
    """Indices on the `run` axis: `denoise` patches clean values into the corrupt run, `noise` the reverse."""
    clean, corrupt = RUNS.index("clean"), RUNS.index("corrupt")
    return (clean, corrupt) if direction == "denoise" else (corrupt, clean)


@dataclass(frozen=True)
class Ground:
    """One checkpoint's runs, read as source and target, on the device that computes."""

    activations: Activations
    source: int
    target: int
    device: str
    dtype: torch.dtype

    longest: int
    """Length of the longest prompt, in tokens."""

    positions: Int[Tensor, "run trial patched"]
    read: Int[Tensor, "trial"]
    answers: Int[Tensor, "trial answer"]

    held: dict[tuple[str, int, int | str], Tensor] = field(default_factory=dict)
    """What was read and cut out before: every pass over a site needs the same."""

    @classmethod
    def lay(
        cls, skeleton: Skeleton, activations: Activations, trials: Trials, alignment: Alignment, direction: Direction
    ) -> "Ground":
        source, target = source_and_target(direction)
        tensors = (alignment.positions, alignment.read, trials.answer_tokens)
        positions, read, answers = (torch.from_numpy(x).to(skeleton.device) for x in tensors)
        longest = int(trials.length.max())
        return cls(activations, source, target, skeleton.device, skeleton.dtype, longest, positions, read, answers)

    def run(self, kind: str, layer: int, run: int) -> Tensor:
        """(trial, position, ...)"""
        return self.activations.read(kind, layer)[run].to(device=self.device, dtype=self.dtype)

    def patched(self, kind: str, layer: int, run: int) -> Tensor:
        """The aligned positions alone: (trial, patched, ...)."""
        if (kind, layer, run) not in self.held:
            trial = torch.arange(len(self.read), device=self.device)[:, None]
            self.held[kind, layer, run] = self.run(kind, layer, run)[trial, self.positions[run]]
        return self.held[kind, layer, run]

    def prefix(self, kind: str, layer: int) -> Tensor:
        """Keys or values of the target run before any patched position: (trial, kv_head, prefix, head_dim)."""
        if (kind, layer, "prefix") not in self.held:
            longest = int(self.positions[self.target, :, 0].max())
            cut = self.run(kind, layer, self.target)[:, :longest]
            self.held[kind, layer, "prefix"] = cut.transpose(1, 2).contiguous()
        return self.held[kind, layer, "prefix"]


class Replaying:
    """An attention mode that patches z at the site and lets later layers attend to the target run's prefix."""

    def __init__(self, ground: Ground, site: Site, subsets: Bool[Tensor, "subset head"]) -> None:
        self.ground, self.site, self.subsets = ground, site, subsets
        self.longest = ground.longest

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ground, n_subsets = self.ground, len(self.subsets)
        if layer == self.site[0]:
            # Nothing upstream has changed: the target's own z is the captured one.
            z = ground.patched("z", layer, ground.target)[:, None]
        else:
            query, key, value = (x.unflatten(2, (n_subsets, -1)) for x in (query, key, value))
            z = attend_shared_prefix(
                query,
                key,
                value,
                ground.prefix("key", layer),
                ground.prefix("value", layer),
                ground.positions[ground.target, :, 0],
                scaling,
            )
        if layer in self.site:
            z = mix_heads(z, ground.patched("z", layer, ground.source), self.subsets)
        return z.flatten(1, 2)


def run_on(
    skeleton: Skeleton,
    ground: Ground,
    mode: AttentionMode,
    start: int,
    resid_pre: Float[Tensor, "trial subset patched d_model"],
    stop: int | None = None,
) -> Float[Tensor, "trial subset answer"]:
    """Answer logits of patched residual streams, sent through the layers from `start` to before `stop`."""
    n_subsets, n_patched = resid_pre.shape[1:3]
    rows = resid_pre.flatten(1, 2)
    # Embeddings are never looked at, and can be narrower than the residual stream.
    nothing = rows.new_zeros(*rows.shape[:2], skeleton.anatomy.d_embedding)
    position_ids = ground.positions[ground.target].repeat(1, n_subsets)
    read = torch.arange(n_subsets, device=ground.device) * n_patched + ground.read[:, None]
    with attending(mode), skeleton.running(start, stop, rows), skeleton.answering(ground.answers, read):
        logits: Tensor = skeleton.model(inputs_embeds=nothing, position_ids=position_ids, use_cache=False).logits
    return logits
