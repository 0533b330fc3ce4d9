"""Patched runs from the cache: only the patched positions of the layers from the patch on are computed again.

A patch at layer L changes nothing before L and, under causal attention, nothing before the first patched position.
The unpatched prefix's keys and values and the residual stream entering L are known from the capture, so the patched
positions of all subsets run side by side along the query axis: exact activation patching (Vig et al. 2020,
arXiv:2004.12265; Heimersheim and Nanda 2024, arXiv:2404.15255), at the price of a few wide matrix products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    field = _Field.lay(skeleton, activations, trials, alignment, direction)
    n_trials, n_patched = alignment.valid.shape
    per_pass = max(1, rows // (n_trials * n_patched))
    subsets = torch.from_numpy(mask).to(skeleton.device)
    result = torch.empty(len(sites), len(mask), n_trials)
    for site, row in zip(sites, result, strict=True):
        for chunk, part in zip(subsets.split(per_pass), row.split(per_pass), strict=True):
            part.copy_(_patched_logit_diff(skeleton, field, site, chunk))
            done(part.numel())
    return result.numpy()


@dataclass(frozen=True)
class _Field:
    """One checkpoint's runs, read as source and target, on the device that computes."""

    activations: Activations
    source: int
    target: int
    device: str
    dtype: torch.dtype

    positions: Int[Tensor, "run trial patched"]
    read: Int[Tensor, "trial"]
    answers: Int[Tensor, "trial answer"]

    @classmethod
    def lay(
        cls, skeleton: Skeleton, activations: Activations, trials: Trials, alignment: Alignment, direction: Direction
    ) -> "_Field":
        source, target = source_and_target(direction)
        tensors = (alignment.positions, alignment.read, trials.answer_tokens)
        positions, read, answers = (torch.from_numpy(x).to(skeleton.device) for x in tensors)
        return cls(activations, source, target, skeleton.device, skeleton.dtype, positions, read, answers)

    def run(self, kind: str, layer: int, run: int) -> Tensor:
        """(trial, position, ...)"""
        return self.activations.read(kind, layer)[run].to(device=self.device, dtype=self.dtype)

    def patched(self, kind: str, layer: int, run: int) -> Tensor:
        """The aligned positions alone: (trial, patched, ...)."""
        trial = torch.arange(len(self.read), device=self.device)[:, None]
        return self.run(kind, layer, run)[trial, self.positions[run]]

    def prefix(self, kind: str, layer: int) -> Tensor:
        """Keys or values of the target run before any patched position: (trial, kv_head, prefix, head_dim)."""
        longest = int(self.positions[self.target, :, 0].max())
        return self.run(kind, layer, self.target)[:, :longest].transpose(1, 2)


class _Replaying:
    """An attention mode that patches z at the site and lets later layers attend to the target run's prefix."""

    def __init__(self, field: _Field, site: Site, subsets: Bool[Tensor, "subset head"]) -> None:
        self.field, self.site, self.subsets = field, site, subsets
        self.longest = int(field.positions.max()) + 1

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        field, n_subsets = self.field, len(self.subsets)
        if layer == self.site[0]:
            # Nothing upstream has changed: the target's own z is the captured one.
            z = field.patched("z", layer, field.target)[:, None]
        else:
            query, key, value = (x.unflatten(2, (n_subsets, -1)) for x in (query, key, value))
            z = attend_shared_prefix(
                query,
                key,
                value,
                field.prefix("key", layer),
                field.prefix("value", layer),
                field.positions[field.target, :, 0],
                scaling,
            )
        if layer in self.site:
            z = mix_heads(z, field.patched("z", layer, field.source), self.subsets)
        return z.flatten(1, 2)


@torch.inference_mode()
def _patched_logit_diff(
    skeleton: Skeleton, field: _Field, site: Site, subsets: Bool[Tensor, "subset head"]
) -> Float[Tensor, "subset trial"]:
    n_subsets, n_patched = len(subsets), field.positions.shape[2]
    resid_pre = field.patched("resid_pre", site[0], field.target).repeat(1, n_subsets, 1)
    position_ids = field.positions[field.target].repeat(1, n_subsets)
    # Embeddings are never looked at, and can be narrower than the residual stream.
    nothing = resid_pre.new_zeros(*resid_pre.shape[:2], skeleton.anatomy.d_embedding)
    read = torch.arange(n_subsets, device=field.device) * n_patched + field.read[:, None]
    with (
        attending(_Replaying(field, site, subsets)),
        skeleton.starting_at(site[0], resid_pre),
        skeleton.answering(field.answers, read),
    ):
        logits = skeleton.model(inputs_embeds=nothing, position_ids=position_ids, use_cache=False).logits
    right, wrong = logits.float().unbind(-1)
    return (right - wrong).T.cpu()
