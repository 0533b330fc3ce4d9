"""What replay starts from: one checkpoint's captured runs, one as source and the other as target of the patch."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checkpoints.model import ResidentModel
from ..store.activations import Activations
from ..study.alignment import Alignment
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from ..study.study import RUNS

Site = tuple[int, ...]
"""Layers patched jointly, with the same heads; most often a single one.  Ascending."""


def source_and_target(direction: Direction) -> tuple[int, int]:
    """Indices on the `run` axis: `denoise` patches clean values into the corrupt run, `noise` the reverse."""
    clean, corrupt = RUNS.index("clean"), RUNS.index("corrupt")
    return (clean, corrupt) if direction == "denoise" else (corrupt, clean)


@dataclass(frozen=True)
class PatchInputs:
    """One checkpoint's runs as source and target of a patch, on the device that computes."""

    activations: Activations
    source: int
    target: int
    device: str
    dtype: torch.dtype

    longest: int
    """Length of the longest prompt, in tokens."""

    positions: Int[Tensor, "run trial patched"]

    valid: Bool[Tensor, "trial patched"]
    """Which of them are patched; the others keep their own z, whatever the heads."""

    read: Int[Tensor, "trial"]
    """Which of the patched positions is read."""

    answers: Int[Tensor, "trial answer"]

    prefix_length: Int[Tensor, "trial"]
    """Tokens of the target run before any patched position."""

    longest_prefix: int

    all_valid: bool
    """Whether every one of the positions is patched."""

    cache: dict[tuple[str, int, int | str], Tensor] = field(default_factory=dict)
    """What was read and cut out before: every batch needs the same."""

    @classmethod
    def from_capture(
        cls,
        resident: ResidentModel,
        activations: Activations,
        trials: Trials,
        alignment: Alignment,
        direction: Direction,
    ) -> "PatchInputs":
        """The runs of a capture for patching in `direction` at the aligned positions."""
        source, target = source_and_target(direction)
        prefix = alignment.positions[target, :, 0]
        arrays = (alignment.positions, alignment.valid, alignment.read, trials.answer_tokens, prefix)
        positions, valid, read, answers, prefix_length = (torch.from_numpy(x).to(resident.device) for x in arrays)
        return cls(
            activations=activations,
            source=source,
            target=target,
            device=resident.device,
            dtype=resident.dtype,
            longest=int(trials.length.max()),
            positions=positions,
            valid=valid,
            read=read,
            answers=answers,
            prefix_length=prefix_length,
            longest_prefix=int(prefix.max()),
            all_valid=bool(alignment.valid.all()),
        )

    def run(self, kind: str, layer: int, run: int) -> Tensor:
        """One kind of activation of a run: (trial, position, ...)."""
        return self.activations.read(kind, layer)[run].to(device=self.device, dtype=self.dtype)

    def patched(self, kind: str, layer: int, run: int) -> Tensor:
        """The aligned positions alone: (trial, patched, ...)."""
        if (kind, layer, run) not in self.cache:
            trial = torch.arange(len(self.read), device=self.device)[:, None]
            self.cache[kind, layer, run] = self.run(kind, layer, run)[trial, self.positions[run]]
        return self.cache[kind, layer, run]

    def source_z(self, layer: int) -> Float[Tensor, "trial patched head head_dim"]:
        """What goes into patched heads: the source run's z, and at positions that are not patched the target's own."""
        source = self.patched("z", layer, self.source)
        if self.all_valid:
            return source
        return torch.where(self.valid[..., None, None], source, self.patched("z", layer, self.target))

    def prefix(self, kind: str, layer: int) -> Tensor:
        """Keys or values of the target run before any patched position: (trial, kv_head, prefix, head_dim).

        Zero where a trial's prefix is shorter.
        """
        if (kind, layer, "prefix") not in self.cache:
            cut = self.run(kind, layer, self.target)[:, : self.longest_prefix].transpose(1, 2)
            absent = torch.arange(self.longest_prefix, device=self.device) >= self.prefix_length[:, None]
            self.cache[kind, layer, "prefix"] = cut.masked_fill(absent[:, None, :, None], 0).contiguous()
        return self.cache[kind, layer, "prefix"]
