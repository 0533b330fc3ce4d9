"""Patched runs from the cache: only the patched positions of the layers from the patch on are computed again.

A patch at layer L changes nothing before L and, under causal attention, nothing before the first patched position.
The unpatched prefix's keys and values and the residual stream entering L are known from the capture, so the patched
positions of all subsets run side by side along the query axis: exact activation patching (Vig et al. 2020,
arXiv:2004.12265; Heimersheim and Nanda 2024, arXiv:2404.15255), at the price of a few wide matrix products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headlapse.engine.activations import Activations
from headlapse.engine.attention import attending
from headlapse.engine.checkpoints import Skeleton
from headlapse.engine.study import RUNS
from headlapse.engine.tasks import Alignment, Trials
from headlapse.kernels.attend import attend_shared_prefix
from headlapse.kernels.mix import mix_heads

Direction = Literal["denoise", "noise"]

Site = tuple[int, ...]
"""Layers patched jointly, with the same heads; most often a single one.  Ascending."""

ROWS = 4096
"""Rows (trials x subsets x positions) of one pass: wide enough for full speed, small enough for any memory."""


def source_and_target(direction: Direction) -> tuple[int, int]:
    """Indices on the `run` axis: `denoise` patches clean values into the corrupt run, `noise` the reverse."""
    clean, corrupt = RUNS.index("clean"), RUNS.index("corrupt")
    return (clean, corrupt) if direction == "denoise" else (corrupt, clean)


def replay(
    skeleton: Skeleton,
    activations: Activations,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
    done: Callable[[int], object] = lambda _runs: None,
    rows: int = ROWS,
) -> Float[np.ndarray, "site subset trial"]:
    """Logit difference (right minus wrong, in nats) of every patched run.

    The heads of each subset take their z from the source run, at the aligned positions of every layer of the site;
    the target run is otherwise left alone.  `done` hears how many patched runs each pass finished.
    """
    ground = _Ground.lay(skeleton, activations, trials, alignment, direction)
    n_trials, n_patched = alignment.valid.shape
    per_pass = max(1, rows // (n_trials * n_patched))
    subsets = torch.from_numpy(mask).to(skeleton.device)
    result = torch.empty(len(sites), len(mask), n_trials)
    for site, row in zip(sites, result, strict=True):
        for chunk, part in zip(subsets.split(per_pass), row.split(per_pass), strict=True):
            part.copy_(_patched_logit_diff(skeleton, ground, site, chunk))
            done(part.numel())
    return result.numpy()


@dataclass(frozen=True)
class _Ground:
    """One checkpoint's runs, read as source and target, on the device that computes."""

    activations: Activations
    source: int
    target: int
    device: str
    dtype: torch.dtype

    positions: Int[Tensor, "run trial patched"]
    read: Int[Tensor, "trial"]
    answers: Int[Tensor, "trial answer"]

    held: dict[tuple[str, int, int | str], Tensor] = field(default_factory=dict)
    """What was read and cut out before: every pass over a site needs the same."""

    @classmethod
    def lay(
        cls, skeleton: Skeleton, activations: Activations, trials: Trials, alignment: Alignment, direction: Direction
    ) -> "_Ground":
        source, target = source_and_target(direction)
        tensors = (alignment.positions, alignment.read, trials.answer_tokens)
        positions, read, answers = (torch.from_numpy(x).to(skeleton.device) for x in tensors)
        return cls(activations, source, target, skeleton.device, skeleton.dtype, positions, read, answers)

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


class _Replaying:
    """An attention mode that patches z at the site and lets later layers attend to the target run's prefix."""

    def __init__(self, ground: _Ground, site: Site, subsets: Bool[Tensor, "subset head"]) -> None:
        self.ground, self.site, self.subsets = ground, site, subsets
        self.longest = int(ground.positions.max()) + 1

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


@torch.inference_mode()
def _patched_logit_diff(
    skeleton: Skeleton, ground: _Ground, site: Site, subsets: Bool[Tensor, "subset head"]
) -> Float[Tensor, "subset trial"]:
    n_subsets, n_patched = len(subsets), ground.positions.shape[2]
    resid_pre = ground.patched("resid_pre", site[0], ground.target).repeat(1, n_subsets, 1)
    position_ids = ground.positions[ground.target].repeat(1, n_subsets)
    # Embeddings are never looked at, and can be narrower than the residual stream.
    nothing = resid_pre.new_zeros(*resid_pre.shape[:2], skeleton.anatomy.d_embedding)
    read = torch.arange(n_subsets, device=ground.device) * n_patched + ground.read[:, None]
    with (
        attending(_Replaying(ground, site, subsets)),
        skeleton.starting_at(site[0], resid_pre),
        skeleton.answering(ground.answers, read),
    ):
        logits = skeleton.model(inputs_embeds=nothing, position_ids=position_ids, use_cache=False).logits
    right, wrong = logits.float().unbind(-1)
    return (right - wrong).T.cpu()
