"""The store: what a study kept of every checkpoint, and every patched run derived from it.

The README specifies the layout.  A checkpoint counts once its `complete` mark is written, last; whatever was
interrupted before that is written again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
import zarr
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..runtime.errors import UserError
from ..study.patch_settings import PatchSettings
from ..study.prompts import Trials
from ..study.study import RUNS, Measure
from ..study.tasks.contrast import Contrast
from . import zarr_group
from .activations import Capture
from .inventory import patch_paths, require_store
from .zarr_group import CheckpointArrays, CheckpointRow

FORMAT = 1
"""Version of the layout; a reader refuses another."""

ANSWERS = ("right", "wrong")
"""Order of the `answer` axis."""

DIMS = {
    "z": ("head", "head_dim"),
    "key": ("kv_head", "head_dim"),
    "value": ("kv_head", "head_dim"),
    "resid_pre": ("d_model",),
}
"""Trailing dims of every captured kind, after (checkpoint, layer, run, trial, position)."""


class Store(CheckpointArrays):
    """An open store.  Raises `UserError` where there is none, or one of another format."""

    def __init__(self, path: Path) -> None:
        require_store(path)
        super().__init__(path)
        found = self.attrs.get("headlapse_format")
        if found != FORMAT:
            raise UserError(
                f"{path} has store format {found}, this headlapse reads {FORMAT}; make it anew with --overwrite"
            )

    @property
    def study(self) -> dict[str, Any]:
        return dict(self.attrs["study"])

    @property
    def layers(self) -> list[int]:
        """Layers that are kept, ascending; the model's last is always among them."""
        return [int(layer) for layer in self.values("layer")]

    @property
    def n_heads(self) -> int:
        return int(self.array("z").shape[5])

    def kinds(self) -> list[str]:
        """Which of z, key, value and resid_pre are kept."""
        return [kind for kind in DIMS if kind in self.group]

    def trials(self) -> Trials:
        """The tokenized prompts, as they were run."""
        contrasts = tuple(Contrast(**fields) for fields in self.attrs["contrasts"])
        tokens, length, answers = (self.values(name) for name in ("tokens", "length", "answer_tokens"))
        text = np.array(self.values("token_text").tolist(), dtype=str)
        rest = self.values("continuation") if "continuation" in self.group else None
        return Trials(tokens, length, answers, text, contrasts, notes=(), continuation=rest)

    def provenance(self, label: str) -> dict[str, Any]:
        """Where a finished checkpoint's weights came from: location, commit, sha256 per file."""
        return dict(self.attrs["checkpoints"][label])

    def answer_logits(self, index: int) -> Float[np.ndarray, "run trial answer"]:
        return np.asarray(self.array("answer_logits")[index])

    def activations(self, index: int) -> "StoredActivations":
        """One checkpoint's captured tensors; each is read from disk once, when first asked for."""
        return StoredActivations(self, index)

    def write(self, label: str, captured: Capture, provenance: Mapping[str, Any]) -> None:
        """Write one checkpoint, its completion mark last.  Raises `UserError` when its shapes are not the store's."""
        self._refuse_misfit(label, captured)
        index = self.index(label)
        for kind in self.kinds():
            kept = torch.stack([captured.read(kind, layer) for layer in self.layers])
            self.array(kind)[index] = to_numpy(kept)
        self.array("answer_logits")[index] = captured.answer_logits.numpy()
        self.group.attrs["checkpoints"] = {**self.attrs["checkpoints"], label: dict(provenance)}
        self.array("complete")[index] = True

    def _refuse_misfit(self, label: str, captured: Capture) -> None:
        n_layers = self.layers[-1] + 1
        for kind in self.kinds():
            found = [len(captured.kept[kind]), *captured.read(kind, 0).shape]
            held = [n_layers, *self.array(kind).shape[2:]]
            if found != held:
                raise UserError(
                    f"{kind} of {label} has shape {found} (layer, run, trial, position, ...), {self.path} has {held}; "
                    "a checkpoint of another shape belongs in another --store"
                )

    def patch_names(self, protocol: str | None = None) -> list[str]:
        """Names of the patched runs, the last written to last; all of them, or those of one protocol."""
        paths = patch_paths(self.path)
        if protocol is not None:
            paths = [path for path in paths if zarr_group.attributes(path)["patch"].get("protocol") == protocol]
        return [path.name for path in paths]

    def patch(self, name: str) -> "PatchedRun":
        """A patched run.  Raises `UserError` where there is none of that name."""
        if name not in self.patch_names():
            held = ", ".join(self.patch_names()) or "none"
            raise UserError(f"{self.path} has no patched run {name}; it has {held}; make one with: headlapse patch")
        return PatchedRun(self.path / "patches" / name)

    def patch_dataset(self, name: str) -> xr.Dataset:
        """A patched run, lazily, with labelled dimensions."""
        return self.patch(name).dataset()

    def open_patch(
        self,
        name: str,
        settings: PatchSettings,
        layers: Sequence[int],
        labels: Sequence[str],
        mask: Bool[np.ndarray, "subset head"],
        measures: Sequence[Measure] = (),
        n_tokens: int = 0,
    ) -> "PatchedRun":
        """The patched run `name`, made where it is not there, grown where the store has grown since.

        `measures` are kept beside the logit difference; with `n_tokens` so is a text of at most so many tokens.
        Raises `UserError` when it is there with other settings, spelling out the difference.
        """
        sizes = (self.rows(), layers, labels, mask, self.array("tokens").shape[1], measures, n_tokens)
        path = self._ready(name, settings, lambda partial: _make_patch(partial, settings, *sizes))
        return self._grown(PatchedRun(path))

    def open_texts(
        self,
        name: str,
        settings: PatchSettings,
        layers: Sequence[int],
        labels: Sequence[str],
        mask: Bool[np.ndarray, "subset head"],
        n_tokens: int,
    ) -> "TextRun":
        """The patched run `name` whose results are texts of at most `n_tokens` tokens; otherwise as `open_patch`."""
        sizes = (self.rows(), layers, labels, mask, self.array("tokens").shape[1], n_tokens)
        path = self._ready(name, settings, lambda partial: _make_texts(partial, settings, *sizes))
        return self._grown(TextRun(path))

    def _ready(self, name: str, settings: PatchSettings, make: Callable[[Path], None]) -> Path:
        """Where a patched run is, made where it is not there; refused where it is there with other settings."""
        path = self.path / "patches" / name
        if not path.exists():
            self.group.require_group("patches")
            with zarr_group.atomic_write(path) as partial:
                make(partial)
        mend = "give this run another --name, or replace it with --overwrite"
        zarr_group.refuse_difference(path, zarr_group.attributes(path)["patch"], settings.to_attributes(), mend)
        return path

    def _grown(self, run: "Run") -> "Run":
        run.add(self.rows())
        return run


class StoredActivations:
    """One checkpoint of a store as tensors (run, trial, position, ...)."""

    def __init__(self, store: Store, index: int) -> None:
        self._store, self._index, self._dtype = store, index, store.study["dtype"]
        self._place = {layer: place for place, layer in enumerate(store.layers)}
        self._read: dict[tuple[str, int], Tensor] = {}

    def read_all(self, first: int) -> None:
        """Read every kind from layer `first` on, which takes less time at once than bit by bit."""
        place = self._place[first]
        for kind in self._store.kinds():
            raw = np.asarray(self._store.array(kind)[self._index, place:])
            for layer, one in zip(self._store.layers[place:], raw, strict=True):
                self._read[kind, layer] = to_tensor(one, self._dtype)

    def read(self, kind: str, layer: int) -> Tensor:
        if (kind, layer) not in self._read:
            raw = np.asarray(self._store.array(kind)[self._index, self._place[layer]])
            self._read[kind, layer] = to_tensor(raw, self._dtype)
        return self._read[kind, layer]


@dataclass(frozen=True)
class Answers:
    """The texts of one checkpoint's patched runs."""

    text: Shaped[np.ndarray, "layer subset trial"]
    token: Int[np.ndarray, "layer subset trial token"]
    """What was generated; -1 after the end."""

    success: Bool[np.ndarray, "layer subset trial"]

    plain_text: Shaped[np.ndarray, "run trial"]
    """Of the unpatched runs."""

    plain_success: Bool[np.ndarray, "run trial"]

    n_near: int
    """Texts with two next tokens as good as equal, which were generated by definition."""


class AnyRun(CheckpointArrays):
    """The results of one patch, checkpoint by checkpoint."""

    @property
    def settings(self) -> PatchSettings:
        return PatchSettings.from_attributes(self.attrs["patch"])


class PatchedRun(AnyRun):
    """Results that are logit differences, and further measures where they were asked for."""

    def write_layers(
        self,
        label: str,
        first: int,
        logit_diff: Float[np.ndarray, "layer subset trial"],
        **further: Float[np.ndarray, "layer subset trial"],
    ) -> None:
        """Write one checkpoint's patched runs from the `first` layer of the run on, by measure."""
        for name, values in {"logit_diff": logit_diff, **further}.items():
            self.array(name)[self.index(label), first : first + len(values)] = values

    def write_further(
        self, label: str, unpatched: Mapping[str, Float[np.ndarray, "run trial"]], self_check: Mapping[str, float]
    ) -> None:
        """Write what the further measures say of one checkpoint's unpatched runs, and how exact they are."""
        index = self.index(label)
        for name, values in unpatched.items():
            for run in RUNS:
                self.array(f"{run}_{name}")[index] = values[RUNS.index(run)]
        for name, difference in self_check.items():
            self.array(f"self_check_{name}")[index] = difference

    def write_answers(self, label: str, answers: Answers) -> None:
        """Write one checkpoint's texts."""
        index = self.index(label)
        for name in ("text", "token", "success"):
            self.array(name)[index] = getattr(answers, name)
        for place, run in enumerate(RUNS):
            self.array(f"{run}_text")[index] = answers.plain_text[place]
            self.array(f"{run}_success")[index] = answers.plain_success[place]
        self.array("n_near")[index] = answers.n_near

    def finish(self, label: str, answer_logits: Float[np.ndarray, "run trial answer"], self_check: float) -> None:
        """Write what belongs to one checkpoint's patched runs, the completion mark last."""
        index = self.index(label)
        plain = answer_logits[..., 0] - answer_logits[..., 1]
        self.array("clean_logit_diff")[index] = plain[RUNS.index("clean")]
        self.array("corrupt_logit_diff")[index] = plain[RUNS.index("corrupt")]
        self.array("self_check")[index] = self_check
        self.array("complete")[index] = True


class TextRun(AnyRun):
    """Results that are generated texts."""

    def write_texts(
        self,
        label: str,
        text: Shaped[np.ndarray, "layer subset trial"],
        token: Int[np.ndarray, "layer subset trial token"],
        success: Bool[np.ndarray, "layer subset trial"],
        n_near: int,
    ) -> None:
        """Write one checkpoint's texts, the completion mark last."""
        index = self.index(label)
        self.array("text")[index] = text
        self.array("token")[index] = token
        self.array("success")[index] = success
        self.array("n_near")[index] = n_near
        self.array("complete")[index] = True


Run = TypeVar("Run", bound=AnyRun)


def create_store(
    path: Path,
    study: Mapping[str, Any],
    rows: Sequence[CheckpointRow],
    layers: Sequence[int],
    kinds: Sequence[str],
    trials: Trials,
    captured: Capture,
) -> Store:
    """A new store, shaped by a first capture; it appears at `path` only when whole."""
    with zarr_group.atomic_write(path) as partial:
        group = zarr_group.start(partial, rows)
        zarr_group.put_axis(group, "run", RUNS)
        zarr_group.put_axis(group, "answer", ANSWERS)
        zarr_group.put_axis(group, "layer", np.array(layers))
        zarr_group.put(group, "tokens", trials.tokens, ("run", "trial", "position"))
        zarr_group.put(group, "token_text", trials.token_text, ("run", "trial", "position"))
        zarr_group.put(group, "length", trials.length, ("run", "trial"))
        zarr_group.put(group, "answer_tokens", trials.answer_tokens, ("trial", "answer"))
        if trials.continuation is not None:
            zarr_group.put(group, "continuation", trials.continuation, ("trial", "answer", "token"))
        zarr_group.put(group, "repeats", np.array([contrast.repeats for contrast in trials.contrasts]), ("trial",))
        one = captured.answer_logits.shape
        dims: tuple[str, ...] = ("checkpoint", "run", "trial", "answer")
        zarr_group.put_empty(group, "answer_logits", (len(rows), *one), (1, *one), "float32", dims)
        for kind in kinds:
            like = to_numpy(captured.read(kind, layers[0]))
            shape = (len(rows), len(layers), *like.shape)
            dims = ("checkpoint", "layer", "run", "trial", "position", *DIMS[kind])
            zarr_group.put_empty(group, kind, shape, (1, 1, *like.shape), like.dtype, dims, shards=(1, *shape[1:]))
        group.attrs.update(
            headlapse_format=FORMAT,
            study=dict(study),
            contrasts=[vars(contrast) for contrast in trials.contrasts],
            checkpoints={},
            versions=zarr_group.package_versions(),
            coordinates="step complete length repeats answer_tokens token_text",
        )
    return Store(path)


def duplicate_weights(store: Store) -> list[str]:
    """Warnings about checkpoints of different steps whose weight files are the same, byte for byte."""
    steps = {row.label: row.step for row in store.rows()}
    by_hash: dict[str, list[str]] = {}
    for label in store.complete():
        hashes = store.provenance(label)["sha256"]
        by_hash.setdefault(" ".join(sorted(hashes.values())), []).append(label)
    return [
        f"{', '.join(labels)} serve the same weights (sha256 {digest[:12]}): at most one is what its name says"
        for digest, labels in by_hash.items()
        if len({steps[label] for label in labels}) > 1
    ]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """As numpy; bfloat16, which zarr lacks, as its raw 16 bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor that `to_numpy` was given."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _make_patch(
    path: Path,
    settings: PatchSettings,
    rows: Sequence[CheckpointRow],
    layers: Sequence[int],
    labels: Sequence[str],
    mask: Bool[np.ndarray, "subset head"],
    n_trials: int,
    measures: Sequence[Measure],
    n_tokens: int,
) -> None:
    group = zarr_group.start(path, rows)
    n, one = len(rows), (len(labels), n_trials)
    zarr_group.put_axis(group, "layer", np.array(layers))
    zarr_group.put_axis(group, "subset", labels)
    zarr_group.put(group, "mask", mask, ("subset", "head"))
    dims = ("checkpoint", "layer", "subset", "trial")
    checks = ["self_check", *(f"self_check_{name}" for name in measures)]
    for name in ("logit_diff", *measures):
        zarr_group.put_empty(group, name, (n, len(layers), *one), (1, 1, *one), "float32", dims)
        for run in RUNS:
            zarr_group.put_empty(
                group, f"{run}_{name}", (n, n_trials), (1, n_trials), "float32", ("checkpoint", "trial")
            )
    for name in checks:
        zarr_group.put_empty(group, name, (n,), (1,), "float32", ("checkpoint",))
    if n_tokens:
        _put_texts(group, (n, len(layers), *one), n_tokens)
        for run in RUNS:
            for name, dtype in (("text", str), ("success", bool)):
                zarr_group.put_empty(
                    group, f"{run}_{name}", (n, n_trials), (1, n_trials), dtype, ("checkpoint", "trial")
                )
    coordinates = " ".join(["step", "complete", "mask", *checks, *(["n_near"] if n_tokens else [])])
    group.attrs.update(patch=settings.to_attributes(), versions=zarr_group.package_versions(), coordinates=coordinates)


def _make_texts(
    path: Path,
    settings: PatchSettings,
    rows: Sequence[CheckpointRow],
    layers: Sequence[int],
    labels: Sequence[str],
    mask: Bool[np.ndarray, "subset head"],
    n_trials: int,
    n_tokens: int,
) -> None:
    group = zarr_group.start(path, rows)
    shape = (len(layers), len(labels), n_trials)
    zarr_group.put_axis(group, "layer", np.array(layers))
    zarr_group.put_axis(group, "subset", labels)
    zarr_group.put(group, "mask", mask, ("subset", "head"))
    _put_texts(group, (len(rows), *shape), n_tokens)
    group.attrs.update(
        patch=settings.to_attributes(), versions=zarr_group.package_versions(), coordinates="step complete mask n_near"
    )


def _put_texts(group: zarr.Group, shape: tuple[int, ...], n_tokens: int) -> None:
    """Room for a text, its tokens and its success at every place of (checkpoint, layer, subset, trial)."""
    dims, chunks = ("checkpoint", "layer", "subset", "trial"), (1, *shape[1:])
    for name, dtype in (("text", str), ("success", bool)):
        zarr_group.put_empty(group, name, shape, chunks, dtype, dims)
    zarr_group.put_empty(group, "token", (*shape, n_tokens), (*chunks, n_tokens), "int32", (*dims, "token"), fill=-1)
    zarr_group.put_empty(group, "n_near", shape[:1], (1,), "int32", ("checkpoint",))
