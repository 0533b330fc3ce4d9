"""Patched runs in a store: logit differences, further measures and texts, checkpoint by checkpoint.

The names and dimensions of the arrays are specified in docs/store.md.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool, Float, Int, Shaped

from ..runtime.errors import UserError
from ..study.patch_settings import PatchSettings
from ..study.primary import Primary
from ..study.study import RUNS, Measure
from . import zarr_group
from .checkpoint_arrays import CheckpointArrays, CheckpointWriter
from .zarr_group import CheckpointRow


@dataclass(frozen=True)
class RunAxes:
    """The axes of a patched run's arrays."""

    checkpoints: Sequence[CheckpointRow]
    layers: Sequence[int]

    subsets: Sequence[str]
    """Labels: `even`, `none`, `0,2,4`."""

    mask: Bool[np.ndarray, "subset head"]
    """True where a head is patched."""

    n_trials: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of (checkpoint, layer, subset, trial)."""
        return len(self.checkpoints), len(self.layers), len(self.subsets), self.n_trials


@dataclass(frozen=True)
class Answers:
    """The texts generated from one checkpoint's patched runs."""

    text: Shaped[np.ndarray, "layer subset trial"]

    token: Int[np.ndarray, "layer subset trial token"]
    """Generated tokens; -1 after the end of a text."""

    success: Bool[np.ndarray, "layer subset trial"]

    plain_text: Shaped[np.ndarray, "run trial"]
    """Of the unpatched runs."""

    plain_success: Bool[np.ndarray, "run trial"]

    n_near: int
    """Texts with near-tied next tokens, which were therefore generated again by full hooked forwards."""


class AnyRun(CheckpointArrays):
    """The results of one patch, checkpoint by checkpoint."""

    @property
    def settings(self) -> PatchSettings:
        return PatchSettings.from_attributes(self.attrs["patch"])

    @property
    def seed(self) -> int:
        """Of the random runs that are verified against stock transformers; another one for every run that is made."""
        return int(self.attrs.get("self_check_seed", 0))

    def devices(self) -> list[str]:
        """Where its checkpoints were computed."""
        records = self.records().values()
        return sorted({record["device"] for record in records} or {self.attrs.get("device", "")} - {""})


class PatchedRun(AnyRun):
    """Logit differences, and further measures and texts where they were asked for."""

    def refuse_other_primary(self, primary: Sequence[Primary]) -> None:
        """Raise `UserError` where other hypotheses than these, or none, were written when the run was created."""
        written = self.attrs.get("primary", {}).get("tests", [])
        if primary and written != [str(one) for one in primary]:
            raise UserError(
                f"--primary {' '.join(map(str, primary))}: the run {self.path.name} is there already, "
                f"{'with ' + ' '.join(written) if written else 'without any'}; what is primary is named before "
                "anything is patched: give this run another --name"
            )

    def write(self, label: str) -> "PatchWriter":
        """Begin to write one checkpoint."""
        return PatchWriter(self.writer(label))


@dataclass(frozen=True)
class PatchWriter:
    """Writes one checkpoint of a `PatchedRun`."""

    writer: CheckpointWriter

    def put_layers(
        self,
        first: int,
        logit_diff: Float[np.ndarray, "layer subset trial"],
        **further: Float[np.ndarray, "layer subset trial"],
    ) -> None:
        """The patched runs from the `first` layer of the run on; `further` measures by name."""
        for name, values in {"logit_diff": logit_diff, **further}.items():
            self.writer.put(name, values, first)

    def put_measures(
        self, unpatched: Mapping[str, Float[np.ndarray, "run trial"]], self_check: Mapping[str, float]
    ) -> None:
        """The further measures of the unpatched runs, and the largest difference that the self-check saw, both by
        measure."""
        for name, values in unpatched.items():
            for run in RUNS:
                self.writer.put(f"{run}_{name}", values[RUNS.index(run)])
        for name, difference in self_check.items():
            self.writer.put(f"self_check_{name}", np.float32(difference))

    def put_answers(self, answers: Answers) -> None:
        """The texts."""
        for name in ("text", "token", "success"):
            self.writer.put(name, getattr(answers, name))
        for number, run in enumerate(RUNS):
            self.writer.put(f"{run}_text", answers.plain_text[number])
            self.writer.put(f"{run}_success", answers.plain_success[number])
        self.writer.put("n_near", np.int32(answers.n_near))

    def finish(
        self,
        answer_logits: Float[np.ndarray, "run trial answer"],
        self_check: float,
        self_check_bound: float,
        **fields: Any,
    ) -> None:
        """The unpatched logit differences, the largest difference of the self-check and what it may be at most (nats),
        then the record, with `fields` in it."""
        logit_diff = answer_logits[..., 0] - answer_logits[..., 1]
        for run in RUNS:
            self.writer.put(f"{run}_logit_diff", logit_diff[RUNS.index(run)])
        self.writer.put("self_check", np.float32(self_check))
        self.writer.put("self_check_bound", np.float32(self_check_bound))
        self.writer.finish(**fields)


class TextRun(AnyRun):
    """Generated texts and nothing else: the published protocol."""

    def write_texts(
        self,
        label: str,
        text: Shaped[np.ndarray, "layer subset trial"],
        token: Int[np.ndarray, "layer subset trial token"],
        success: Bool[np.ndarray, "layer subset trial"],
        n_near: int,
        **fields: Any,
    ) -> None:
        """Write one checkpoint's texts, then its record, with `fields` in it."""
        writer = self.writer(label)
        for name, values in {"text": text, "token": token, "success": success, "n_near": np.int32(n_near)}.items():
            writer.put(name, values)
        writer.finish(**fields)


def create_patched_run(
    path: Path,
    settings: PatchSettings,
    axes: RunAxes,
    measures: Sequence[Measure],
    n_tokens: int,
    primary: Mapping[str, Any] | None = None,
) -> None:
    """A group with room for logit differences, `measures` and, with `n_tokens`, texts of at most so many tokens.

    `primary` is the record of its primary hypotheses (`study.primary.registered`).
    """
    group = _start(path, axes)
    n_checkpoints = len(axes.checkpoints)
    dims = ("checkpoint", "layer", "subset", "trial")
    unpatched = (n_checkpoints, axes.n_trials), (1, axes.n_trials)
    self_checks = ["self_check", "self_check_bound", *(f"self_check_{name}" for name in measures)]
    for name in ("logit_diff", *measures):
        # One chunk a layer: layers are written one after another.
        zarr_group.put_empty(group, name, axes.shape, (1, 1, *axes.shape[2:]), "float32", dims)
        for run in RUNS:
            zarr_group.put_empty(group, f"{run}_{name}", *unpatched, "float32", ("checkpoint", "trial"))
    for name in self_checks:
        zarr_group.put_empty(group, name, (n_checkpoints,), (1,), "float32", ("checkpoint",))
    if n_tokens:
        _put_texts(group, axes.shape, n_tokens)
        for run in RUNS:
            for name, dtype in (("text", str), ("success", bool)):
                zarr_group.put_empty(group, f"{run}_{name}", *unpatched, dtype, ("checkpoint", "trial"))
    _describe(group, path, settings, axes, ["mask", *self_checks, *(["n_near"] if n_tokens else [])], primary)


def create_text_run(path: Path, settings: PatchSettings, axes: RunAxes, n_tokens: int) -> None:
    """A group with room for texts of at most `n_tokens` tokens."""
    group = _start(path, axes)
    _put_texts(group, axes.shape, n_tokens)
    _describe(group, path, settings, axes, ["mask", "n_near"])


def _start(path: Path, axes: RunAxes) -> zarr.Group:
    group = zarr_group.start(path, axes.checkpoints)
    zarr_group.put_axis(group, "layer", np.array(axes.layers))
    zarr_group.put_axis(group, "subset", axes.subsets)
    zarr_group.put(group, "mask", axes.mask, ("subset", "head"))
    return group


def _put_texts(group: zarr.Group, shape: tuple[int, ...], n_tokens: int) -> None:
    """Room for a text, its tokens and its success at every place of (checkpoint, layer, subset, trial)."""
    dims, chunks = ("checkpoint", "layer", "subset", "trial"), (1, *shape[1:])
    for name, dtype in (("text", str), ("success", bool)):
        zarr_group.put_empty(group, name, shape, chunks, dtype, dims)
    zarr_group.put_empty(group, "token", (*shape, n_tokens), (*chunks, n_tokens), "int32", (*dims, "token"), fill=-1)
    zarr_group.put_empty(group, "n_near", shape[:1], (1,), "int32", ("checkpoint",))


def new_seed() -> int:
    """A random seed: another one for every run that is made."""
    return secrets.randbits(32)


def _describe(
    group: zarr.Group,
    path: Path,
    settings: PatchSettings,
    axes: RunAxes,
    coordinates: Sequence[str],
    primary: Mapping[str, Any] | None = None,
) -> None:
    """The attributes.  xarray takes the names in `coordinates` for coordinates, the others for data."""
    attributes = {
        "patch": settings.to_attributes(),
        "self_check_seed": new_seed(),
        "versions": zarr_group.package_versions(),
        "coordinates": " ".join(coordinates),
        **({"primary": dict(primary)} if primary else {}),
    }
    zarr_group.finish_group(group, path, axes.checkpoints, attributes)
