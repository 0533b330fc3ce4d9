"""Patched runs from the cache: only the patched positions of the layers after the patch are computed again.

A patch at layer L changes nothing before L and, under causal attention, nothing before the first patched position.
The unpatched prefix's keys and values and the residual stream around L are known from the capture, so the patched
positions of all runs stand side by side along the query axis.  They go through the later layers in *waves*: runs that
are patched at other layers join on the way, and a layer's weights serve all of them in the same matrix products.
Where a layer's MLP does not see its attention (parallel residual), a patch at it is a sum of head differences and the
layer itself is not run again.

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

ROWS = {"cpu": 1024, "cuda": 65_536}
"""Rows (trials x runs x positions) of one wave, by kind of device: wide enough for speed, small enough to hold."""

WIDEST = 32
"""A generous estimate of what a layer holds of a row at once, in widths of the residual stream."""


Reading = Callable[[LayerRunner, Resid], Float[Tensor, "reading run trial"]]
"""Numbers that are read off residual streams that left the last layer."""


@torch.inference_mode()
def replay(
    resident: ResidentModel,
    activations: Activations,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
    done: Callable[[int], object] = lambda _runs: None,
    runs: int | None = None,
) -> Float[np.ndarray, "site subset trial"]:
    """Logit difference (right minus wrong, in nats) of every patched run.

    The heads of each subset take their z from the source run, at the aligned positions of every layer of the site;
    the target run is otherwise left alone.  `done` hears how many patched runs each wave of at
    most `runs` finished.
    """
    inputs = PatchInputs.from_capture(resident, activations, trials, alignment, direction)
    return replay_reading(
        resident, inputs, sites, mask, lambda runner, resid: runner.logit_diff(resid)[None], done, runs
    )[0]


@torch.inference_mode()
def replay_reading(
    resident: ResidentModel,
    inputs: PatchInputs,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
    reading: Reading,
    done: Callable[[int], object] = lambda _runs: None,
    runs: int | None = None,
    n_readings: int = 1,
) -> Float[np.ndarray, "reading site subset trial"]:
    """Whatever `reading` makes of every patched run, in `n_readings` numbers each; otherwise as `replay`."""
    _, n_trials, n_patched = inputs.positions.shape
    subsets = torch.from_numpy(mask).to(resident.device)
    result = torch.empty(n_readings, len(sites), len(mask), n_trials, device=resident.device)
    n_done = 0

    def run(most: int) -> None:
        nonlocal n_done
        done(-n_done)  # none, unless memory did not hold the waves that were tried before
        n_done = 0
        replaying = _Replay(LayerRunner(resident, inputs, most), subsets)
        for wave in waves(sites, len(mask), most):
            read = reading(replaying.runner, replaying.resid(wave)).split([group.n_runs for group in wave], dim=1)
            for group, part in zip(wave, read, strict=True):
                result[:, group.index, group.first : group.last] = part
            finished = sum(group.n_runs for group in wave) * n_trials
            n_done += finished
            done(finished)

    as_many_as_fit(run, min(runs or runs_at_once(resident, n_trials * n_patched), len(sites) * len(mask)))
    return result.cpu().numpy()


def runs_at_once(resident: ResidentModel, rows_per_run: int, memory: int = 2**40) -> int:
    """Runs (of all trials) that go through the layers together, within `memory` (bytes)."""
    body = resident.architecture
    kind = torch.device(resident.device).type
    bytes_per_row = WIDEST * max(body.d_model, body.n_heads * body.head_dim) * resident.dtype.itemsize
    rows = min(ROWS.get(kind, ROWS["cpu"]), memory // bytes_per_row)
    return max(1, rows // rows_per_run)


@dataclass(frozen=True)
class Group:
    """Runs of one site that stand side by side in a wave: the subsets from `first` to before `last`."""

    index: int
    """Of the site."""

    site: Site
    first: int
    last: int

    @property
    def n_runs(self) -> int:
        return self.last - self.first


def waves(sites: Sequence[Site], n_subsets: int, most: int) -> Iterator[list[Group]]:
    """Every (site, subset) once, in waves of equal size and of at most `most` runs; early layers go first."""
    order = sorted(range(len(sites)), key=lambda index: sites[index][0])
    n_runs = len(sites) * n_subsets
    n_waves = -(-n_runs // most)
    for wave in range(n_waves):
        first, last = n_runs * wave // n_waves, n_runs * (wave + 1) // n_waves
        yield [
            Group(
                order[place],
                sites[order[place]],
                max(first - place * n_subsets, 0),
                min(last - place * n_subsets, n_subsets),
            )
            for place in range(first // n_subsets, -(-last // n_subsets))
        ]


class _Replay:
    """One checkpoint's patched runs of the given subsets, wave by wave."""

    def __init__(self, runner: LayerRunner, subsets: Bool[Tensor, "subset head"]) -> None:
        self.runner, self.inputs, self.subsets = runner, runner.inputs, subsets
        self.n_layers = runner.resident.architecture.n_layers
        self._sums: dict[int, AdditiveLayer | None] = {}

    def resid(self, wave: Sequence[Group]) -> Resid:
        """What leaves the last layer, of the wave's groups one after another."""
        running: list[Group] = []
        resid: Resid | None = None
        for layer in range(wave[0].site[0], self.n_layers):
            if resid is not None:
                resid = self.runner.through(
                    layer, resid, SharedPrefixAttention(self.inputs, self._patched(running, layer))
                )
            starting = [group for group in wave if group.site[0] == layer]
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
        if layer not in self._sums:
            self._sums[layer] = additive_layer(self.runner, layer)
        sums = self._sums[layer]
        if sums is not None:
            return add_deltas(sums.unpatched, sums.deltas, heads)
        # Nothing upstream has changed: the target's own z is the captured one.
        z = mix_heads(inputs.patched("z", layer, inputs.target)[:, None], inputs.source_z(layer), heads)
        resid_pre = inputs.patched("resid_pre", layer, inputs.target)[:, None].expand(-1, group.n_runs, -1, -1)
        return self.runner.through(layer, resid_pre, FixedZ(z, inputs.longest))
