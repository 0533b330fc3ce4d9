"""Patched runs from the cache: only the patched positions of the layers after the patch are computed again.

A patch at layer L changes nothing before L and, under causal attention, nothing before the first patched position.
The unpatched prefix's keys and values and the residual stream around L are known from the capture, so the patched
positions of all runs stand side by side along the query axis.  They go through the later layers in batches: runs that
are patched at other layers join on the way, and a layer's weights serve all of them in the same matrix products.
Where a layer's MLP does not depend on its attention (parallel residual), a patch at it adds a sum of head differences,
and the layer itself is not run again.

This is exact activation patching (Vig et al. 2020, arXiv:2004.12265; Heimersheim and Nanda 2024, arXiv:2404.15255)
at the price of a few wide matrix products.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...kernels.mix import add_deltas, mix_heads
from ..checkpoints.model import ResidentModel
from ..runtime.resources import as_many_as_fit
from ..store.activations import Activations
from ..study.alignment import Alignment
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from .additive_layers import AdditiveLayer, additive_layer
from .layers import FixedZ, LayerRunner, Resid, SharedPrefixAttention
from .patch_inputs import PatchInputs, Site

BATCH_ROWS = {"cpu": 1024, "cuda": 65_536}
"""Rows (trials x runs x positions) of one batch, by kind of device: wide enough for speed, small enough for memory."""

WIDEST = 32
"""A generous estimate of what a layer needs for one row at a time, in widths of the residual stream."""

Reading = Callable[[LayerRunner, Resid], Float[Tensor, "reading run trial"]]
"""Computes numbers from the residual streams that leave the last layer."""


@torch.inference_mode()
def replay(
    resident: ResidentModel,
    activations: Activations,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
    progress: Callable[[int], object] = lambda _runs: None,
    runs: int | None = None,
) -> Float[np.ndarray, "site subset trial"]:
    """Logit difference (right minus wrong, in nats) of every patched run.

    The heads of each subset take their z from the source run, at the aligned positions of every layer of the site;
    the target run is otherwise left alone.  Batches have at most `runs` patched runs (of all trials).  `progress` is
    called with the number of patched runs that each batch completed; with a negative number where memory did not
    suffice and batches are computed again, smaller.
    """
    inputs = PatchInputs.from_capture(resident, activations, trials, alignment, direction)

    def logit_diff(runner: LayerRunner, resid: Resid) -> Float[Tensor, "reading run trial"]:
        return runner.logit_diff(resid)[None]

    result: Float[np.ndarray, "site subset trial"]
    [result] = replay_reading(resident, inputs, sites, mask, logit_diff, progress, runs)
    return result


@torch.inference_mode()
def replay_reading(
    resident: ResidentModel,
    inputs: PatchInputs,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
    reading: Reading,
    progress: Callable[[int], object] = lambda _runs: None,
    runs: int | None = None,
    n_readings: int = 1,
) -> Float[np.ndarray, "reading site subset trial"]:
    """What `reading` computes of every patched run, `n_readings` numbers each; otherwise as `replay`."""
    _, n_trials, n_patched = inputs.positions.shape
    subsets = torch.from_numpy(mask).to(resident.device)
    result = torch.empty(n_readings, len(sites), len(mask), n_trials, device=resident.device)
    n_completed = 0

    def run(max_runs: int) -> None:
        nonlocal n_completed
        progress(-n_completed)  # zero, unless the batches that were tried before did not fit into memory
        n_completed = 0
        replaying = _BatchReplay(LayerRunner(resident, inputs, max_runs), subsets)
        for batch in run_batches(sites, len(mask), max_runs):
            numbers = reading(replaying.runner, replaying.resid(batch))
            parts = torch.split(numbers, [group.n_runs for group in batch], dim=1)
            for group, part in zip(batch, parts, strict=True):
                result[:, group.index, group.first : group.last] = part
            n_batch = sum(group.n_runs for group in batch) * n_trials
            n_completed += n_batch
            progress(n_batch)

    as_many_as_fit(run, min(runs or runs_at_once(resident, n_trials * n_patched), len(sites) * len(mask)))
    return result.cpu().numpy()


def runs_at_once(resident: ResidentModel, rows_per_run: int, memory: int = 2**40) -> int:
    """Runs (of all trials) that go through the layers together, within `memory` (bytes)."""
    shape = resident.architecture
    kind = torch.device(resident.device).type
    bytes_per_row = WIDEST * max(shape.d_model, shape.n_heads * shape.head_dim) * resident.dtype.itemsize
    rows = min(BATCH_ROWS.get(kind, BATCH_ROWS["cpu"]), memory // bytes_per_row)
    return max(1, rows // rows_per_run)


@dataclass(frozen=True)
class Group:
    """Runs of one site that stand side by side in a batch: the subsets from `first` to before `last`."""

    index: int
    """Of the site."""

    site: Site
    first: int
    last: int

    @property
    def n_runs(self) -> int:
        return self.last - self.first


def run_batches(sites: Sequence[Site], n_subsets: int, max_runs: int) -> Iterator[list[Group]]:
    """Every (site, subset) once, in batches of equal size and of at most `max_runs` runs; early layers go first."""
    order = sorted(range(len(sites)), key=lambda index: sites[index][0])
    n_runs = len(sites) * n_subsets
    n_batches = -(-n_runs // max_runs)
    for batch in range(n_batches):
        first, last = n_runs * batch // n_batches, n_runs * (batch + 1) // n_batches
        yield [
            Group(
                order[place],
                sites[order[place]],
                max(first - place * n_subsets, 0),
                min(last - place * n_subsets, n_subsets),
            )
            for place in range(first // n_subsets, -(-last // n_subsets))
        ]


class _BatchReplay:
    """One checkpoint's patched runs of the given subsets, batch by batch."""

    def __init__(self, runner: LayerRunner, subsets: Bool[Tensor, "subset head"]) -> None:
        self.runner, self.inputs, self.subsets = runner, runner.inputs, subsets
        self.n_layers = runner.resident.architecture.n_layers
        self._additive_layers: dict[int, AdditiveLayer | None] = {}

    def resid(self, batch: Sequence[Group]) -> Resid:
        """The residual stream after the last layer, of the batch's groups one after another."""
        running: list[Group] = []
        resid: Resid | None = None
        for layer in range(batch[0].site[0], self.n_layers):
            if resid is not None:
                resid = self.runner.through(
                    layer, resid, SharedPrefixAttention(self.inputs, self._patched(running, layer))
                )
            starting = [group for group in batch if group.site[0] == layer]
            started = [self._start(group) for group in starting]
            running += starting
            resid = torch.cat(started if resid is None else [resid, *started], dim=1) if started else resid
        assert resid is not None
        return resid

    def _patched(self, running: Sequence[Group], layer: int) -> Bool[Tensor, "run head"] | None:
        """The heads that are patched at a later layer of joint sites."""
        if not any(layer in group.site for group in running):
            return None
        return torch.cat([self._heads(group) & (layer in group.site) for group in running])

    def _heads(self, group: Group) -> Bool[Tensor, "run head"]:
        return self.subsets[group.first : group.last]

    def _start(self, group: Group) -> Resid:
        """The residual stream after the first patched layer."""
        layer, heads, inputs = group.site[0], self._heads(group), self.inputs
        if layer not in self._additive_layers:
            self._additive_layers[layer] = additive_layer(self.runner, layer)
        additive = self._additive_layers[layer]
        if additive is not None:
            return add_deltas(additive.unpatched, additive.deltas, heads)
        # Nothing upstream has changed: the target's own z is the captured one.
        z = mix_heads(inputs.patched("z", layer, inputs.target)[:, None], inputs.source_z(layer), heads)
        resid_pre = inputs.patched("resid_pre", layer, inputs.target)[:, None].expand(-1, group.n_runs, -1, -1)
        return self.runner.through(layer, resid_pre, FixedZ(z, inputs.longest))
