"""Patched runs from the cache: only the patched positions of the layers after the patch are computed again.

A patch at layer L changes nothing before L and, under causal attention, nothing before the first patched position.
The unpatched prefix's keys and values and the residual stream entering L are known from the capture, so the patched
positions of all subsets run side by side along the query axis.  Where a layer's MLP does not see its attention
(parallel residual), a patch at it is a sum of head differences and the layer itself is not run either.

This is exact activation patching (Vig et al. 2020, arXiv:2004.12265; Heimersheim and Nanda 2024, arXiv:2404.15255)
at the price of a few wide matrix products.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headlapse.engine.activations import Activations
from headlapse.engine.checkpoints import Skeleton
from headlapse.engine.passes import Direction, Ground, Replaying, Site, run_on
from headlapse.engine.sums import Sums, sums_of
from headlapse.engine.tasks import Alignment, Trials
from headlapse.kernels.mix import mix_deltas

ROWS = {"cpu": 2048, "cuda": 65_536}
"""Rows (trials x subsets x positions) of one pass, by kind of device: wide enough for speed, small enough to hold."""


@torch.inference_mode()
def replay(
    skeleton: Skeleton,
    activations: Activations,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
    done: Callable[[int], object] = lambda _runs: None,
    rows: int | None = None,
) -> Float[np.ndarray, "site subset trial"]:
    """Logit difference (right minus wrong, in nats) of every patched run.

    The heads of each subset take their z from the source run, at the aligned positions of every layer of the site;
    the target run is otherwise left alone.  `done` hears how many patched runs each pass finished.
    """
    ground = Ground.lay(skeleton, activations, trials, alignment, direction)
    n_trials, n_patched = alignment.valid.shape
    rows = rows or ROWS.get(torch.device(skeleton.device).type, ROWS["cpu"])
    per_pass = max(1, rows // (n_trials * n_patched))
    subsets = torch.from_numpy(mask).to(skeleton.device)
    result = torch.empty(len(sites), len(mask), n_trials)
    for site, row in zip(sites, result, strict=True):
        sums = sums_of(skeleton, ground, site[0])
        for chunk, part in zip(subsets.split(per_pass), row.split(per_pass), strict=True):
            part.copy_(_patched_logit_diff(skeleton, ground, site, chunk, sums))
            done(part.numel())
    return result.numpy()


def _patched_logit_diff(
    skeleton: Skeleton, ground: Ground, site: Site, subsets: Bool[Tensor, "subset head"], sums: Sums | None
) -> Float[Tensor, "subset trial"]:
    first, n_subsets = site[0], len(subsets)
    if sums is None:
        start, resid_pre = first, ground.patched("resid_pre", first, ground.target)[:, None]
        resid_pre = resid_pre.expand(-1, n_subsets, -1, -1)
    else:
        start, resid_pre = first + 1, sums.unpatched[:, None] + mix_deltas(sums.deltas, subsets)
    logits = run_on(skeleton, ground, Replaying(ground, site, subsets), start, resid_pre)
    right, wrong = logits.float().unbind(-1)
    return (right - wrong).T.cpu()
