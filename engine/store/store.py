"""The store: the activations of every checkpoint of a study, and the patched runs derived from them.

docs/store.md specifies the layout.  A checkpoint counts once its `complete` mark is written, last; what was interrupted
before that is written again.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import zarr
from jaxtyping import Bool, Float
from torch import Tensor

from ..runtime.durable import sync
from ..runtime.errors import UserError
from ..runtime.format import one_line
from ..study.patch_settings import PatchSettings
from ..study.primary import Primary, registered
from ..study.prompts import Trials
from ..study.study import RUNS, Measure
from ..study.tasks.contrast import Contrast
from . import zarr_group
from .activations import NUMPY_DTYPES, Capture, to_numpy, to_tensor
from .checkpoint_arrays import CheckpointArrays
from .disk import atomic_write, replacement_of
from .integrity import damaged, verified_attributes
from .inventory import patch_paths, require_store
from .locks import layout_lock
from .patched_run import AnyRun, PatchedRun, RunAxes, TextRun, create_patched_run, create_text_run
from .zarr_group import CheckpointRow

if TYPE_CHECKING:
    import xarray as xr

Run = TypeVar("Run", bound=AnyRun)

FORMAT = 2
"""Version of the layout that is written."""

READABLE = (1, 2)
"""Versions that are read; format 1 has no checksums, and gets no more checkpoints."""

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
    """An open store.  Raises `UserError` where there is none, or one of another format.

    `weights` is where the weights lie now, if no longer where they were: a folder with one for each checkpoint, by its
    label, or that of the only checkpoint.
    """

    def __init__(self, path: Path, weights: Path | None = None) -> None:
        require_store(path)
        super().__init__(path)
        self._weights = weights
        store_format = self.attrs.get("headlapse_format")
        if store_format not in READABLE:
            raise UserError(
                f"{path} has store format {store_format}, this headlapse reads {' and '.join(map(str, READABLE))}; "
                "make it anew with --overwrite"
            )

    @property
    def study(self) -> dict[str, Any]:
        """The fields that identify the study."""
        return dict(self.attrs["study"])

    @property
    def layers(self) -> list[int]:
        """The stored layers, ascending; the model's last one is always among them."""
        return [int(layer) for layer in self.values("layer")]

    @property
    def n_heads(self) -> int:
        return int(self.array("z").shape[5])

    @property
    def n_groups(self) -> int:
        """Groups of heads that share keys and values; 1 where every head has its own, or all share the same."""
        n_kv_heads = int(self.array("key").shape[5]) if "key" in self.array_names else self.n_heads
        return 1 if n_kv_heads == self.n_heads else n_kv_heads

    def kinds(self) -> list[str]:
        """Which of z, key, value and resid_pre are stored."""
        return [kind for kind in DIMS if kind in self.array_names]

    def trials(self) -> Trials:
        """The tokenized prompts, as they were run."""
        contrasts = tuple(Contrast(**fields) for fields in self.attrs["contrasts"])
        tokens, length, answers = (self.values(name) for name in ("tokens", "length", "answer_tokens"))
        text = np.array(self.values("token_text").tolist(), dtype=str)
        continuation = self.values("continuation") if "continuation" in self.array_names else None
        return Trials(tokens, length, answers, text, contrasts, notes=(), continuation=continuation)

    def provenance(self, label: str) -> dict[str, Any]:
        """Where a complete checkpoint's weights came from: location, commit, sha256 of each file."""
        return dict(self.record(label)["provenance"])

    def whereabouts(self, label: str) -> dict[str, Any]:
        """The provenance of a complete checkpoint, with the place where its weights lie now."""
        return self.located(self.provenance(label))

    def located(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's provenance, with the place where its weights lie now."""
        return located(provenance, self._weights)

    def answer_logits(self, label: str) -> Float[np.ndarray, "run trial answer"]:
        """Of the unpatched runs of a complete checkpoint."""
        return self.read("answer_logits", label)

    def activations(self, label: str) -> "StoredActivations":
        """One complete checkpoint's captured tensors; each is read from disk once, when it is first needed."""
        return StoredActivations(self, label)

    def write(self, label: str, captured: Capture, provenance: Mapping[str, Any]) -> None:
        """Write one checkpoint, its completion mark last.  Raises `UserError` for other shapes than the store's."""
        self._check_shapes(label, captured)
        writer = self.writer(label)
        for kind in self.kinds():
            writer.put(kind, to_numpy(torch.stack([captured.read(kind, layer) for layer in self.layers])))
        writer.put("answer_logits", captured.answer_logits.numpy())
        if self.has_values("problem", label):  # left by an attempt that failed
            self.write_problem(label, "")
        writer.finish(provenance=dict(provenance))

    def write_problem(self, label: str, problem: str) -> None:
        """Keep why a checkpoint could not be captured."""
        self.put("problem", self.index(label), np.array(problem, dtype=object))

    def _check_shapes(self, label: str, captured: Capture) -> None:
        n_layers = self.layers[-1] + 1
        for kind in self.kinds():
            shape = [len(captured.tensors[kind]), *captured.read(kind, 0).shape]
            stored_shape = [n_layers, *self.array(kind).shape[2:]]
            if shape != stored_shape:
                raise UserError(
                    f"{kind} of {label} has shape {shape} (layer, run, trial, position, ...), "
                    f"{self.path} has {stored_shape}; "
                    "a checkpoint of another shape belongs in another --store"
                )

    def patch_names(self, protocol: str | None = None) -> list[str]:
        """Names of the patched runs, the last written to last; all of them, or those of one protocol."""
        paths = patch_paths(self.path)
        if protocol is not None:
            paths = [path for path in paths if verified_attributes(path)["patch"].get("protocol") == protocol]
        return [path.name for path in paths]

    def patch(self, name: str) -> PatchedRun:
        """A patched run.  Raises `UserError` where there is none of that name."""
        if name not in self.patch_names():
            names = ", ".join(self.patch_names()) or "none"
            raise UserError(f"{self.path} has no patched run {name}; it has {names}; make one with: headlapse patch")
        return PatchedRun(self.path / "patches" / name, self.path)

    def patch_dataset(self, name: str) -> "xr.Dataset":
        """A patched run in memory, with labelled dimensions."""
        return self.patch(name).load()

    def open_patch(
        self,
        name: str,
        settings: PatchSettings,
        layers: Sequence[int],
        labels: Sequence[str],
        mask: Bool[np.ndarray, "subset head"],
        measures: Sequence[Measure] = (),
        n_tokens: int = 0,
        overwrite: bool = False,
        primary: Sequence[Primary] = (),
    ) -> PatchedRun:
        """The patched run `name`, created where it does not exist, extended where the store has more checkpoints.

        It has room for `measures` beside the logit difference and, with `n_tokens`, for texts of at most so many
        tokens.  With `overwrite`, what is to replace it once it is whole.  `primary` hypotheses are written into it
        when it is created, before anything is patched.
        Raises `UserError` where it exists with other settings or other primary hypotheses, naming the difference.
        """
        axes = self._run_axes(layers, labels, mask)
        record = registered(primary, settings.to_attributes(), self.study, self.patch_names()) if primary else {}
        create = functools.partial(
            create_patched_run, settings=settings, axes=axes, measures=measures, n_tokens=n_tokens, primary=record
        )
        run = PatchedRun(self._run_path(name, settings, create, overwrite), self.path)
        run.refuse_other_primary(primary)
        return self._extended(run)

    def open_texts(
        self,
        name: str,
        settings: PatchSettings,
        layers: Sequence[int],
        labels: Sequence[str],
        mask: Bool[np.ndarray, "subset head"],
        n_tokens: int,
        overwrite: bool = False,
    ) -> TextRun:
        """The patched run `name` of the published protocol: texts of at most `n_tokens` tokens.  As `open_patch`."""
        axes = self._run_axes(layers, labels, mask)
        create = functools.partial(create_text_run, settings=settings, axes=axes, n_tokens=n_tokens)
        return self._extended(TextRun(self._run_path(name, settings, create, overwrite), self.path))

    def _run_axes(self, layers: Sequence[int], labels: Sequence[str], mask: Bool[np.ndarray, "subset head"]) -> RunAxes:
        return RunAxes(self.rows(), layers, labels, mask, n_trials=self.array("tokens").shape[1])

    def _run_path(self, name: str, settings: PatchSettings, create: Callable[[Path], None], overwrite: bool) -> Path:
        """The path of a patched run, created where it does not exist, refused where it has other settings."""
        remedy = "give this run another --name, or replace it with --overwrite"
        return open_group(self.path, f"patches/{name}", {"patch": settings.to_attributes()}, create, overwrite, remedy)

    def _extended(self, run: Run) -> Run:
        run.add(self.rows())
        return run


class StoredActivations:
    """The activations of one checkpoint of a store, read when they are needed and kept in memory.

    Raises `DamageError` for what is not as it was written.
    """

    def __init__(self, store: Store, label: str) -> None:
        self._store, self._label, self._dtype = store, label, store.study["dtype"]
        self._record = store.record(label)
        self._position = {layer: position for position, layer in enumerate(store.layers)}
        """Stored layer -> index along the `layer` axis."""

        self._tensors: dict[tuple[str, int], Tensor] = {}

    @property
    def whereabouts(self) -> dict[str, Any]:
        """As `Store.whereabouts`."""
        return self._store.located(self._record["provenance"])

    def answer_logits(self) -> Float[np.ndarray, "run trial answer"]:
        """Of the unpatched runs."""
        return self._store.read("answer_logits", self._label, record=self._record)

    def read_all(self, first: int) -> None:
        """Read every kind from layer `first` on at once, which takes less time than layer by layer."""
        start = self._position[first]
        for kind in self._store.kinds():
            raw = self._store.read(kind, self._label, start, record=self._record)
            for layer, values in zip(self._store.layers[start:], raw, strict=True):
                self._tensors[kind, layer] = to_tensor(values, self._dtype)

    def read(self, kind: str, layer: int) -> Tensor:
        """(run, trial, position, ...), as in `Capture`."""
        if (kind, layer) not in self._tensors:
            [raw] = self._store.read(kind, self._label, self._position[layer], 1, self._record)
            self._tensors[kind, layer] = to_tensor(raw, self._dtype)
        return self._tensors[kind, layer]


def open_group(
    store: Path, name: str, settings: Mapping[str, Any], create: Callable[[Path], None], overwrite: bool, remedy: str
) -> Path:
    """The path of a group of a store, made by `create` where it is not there.

    With `overwrite` the group that is to replace it, begun anew where the one begun before has other settings.
    Raises `UserError`, which ends in `remedy`, where it is there with other `settings`, a part of its attributes.
    """
    path = store / name
    with layout_lock(store):
        if overwrite and path.exists():
            path = replacement_of(path)
            if path.exists() and {key: verified_attributes(path)[key] for key in settings} != settings:
                shutil.rmtree(path)
        if parent := name.rpartition("/")[0]:
            _require_group(store, parent)
        if not path.exists():
            with atomic_write(path, store) as partial:
                create(partial)
    attributes = verified_attributes(path)
    for key, requested in settings.items():
        zarr_group.refuse_difference(path, attributes[key], requested, remedy)
    return path


def _require_group(store: Path, name: str) -> None:
    """Make the plain group `name` in a store, where it is not there.  Raises `DamageError` where it cannot be read."""
    try:
        zarr.open_group(store, mode="r+").require_group(name)
    except OSError:
        raise
    except Exception as error:  # zarr raises many kinds for metadata that is not what it wrote
        raise damaged(store / name / "zarr.json", one_line(error)) from error
    sync(store / name / "zarr.json")


def create_store(
    path: Path,
    study: Mapping[str, Any],
    rows: Sequence[CheckpointRow],
    layers: Sequence[int],
    trials: Trials,
    widths: Mapping[str, tuple[int, ...]],
    store: Path | None = None,
) -> Store:
    """A new store with room for the checkpoints `rows`; it appears at `path` only when it is laid out.

    `widths` has the shape of what is kept at one position, by kind; `store` is the store that this one is to replace.
    """
    with atomic_write(path, store or path) as partial:
        group = zarr_group.start(partial, rows)
        _put_trials(group, trials)
        zarr_group.put_axis(group, "layer", np.array(layers))
        n_runs, n_trials, n_positions = trials.tokens.shape
        shape: tuple[int, ...] = (len(rows), n_runs, n_trials, len(ANSWERS))
        dims: tuple[str, ...] = ("checkpoint", "run", "trial", "answer")
        zarr_group.put_empty(group, "answer_logits", shape, (1, *shape[1:]), "float32", dims)
        zarr_group.put_empty(group, "problem", (len(rows),), (1,), str, ("checkpoint",))
        for kind, width in widths.items():
            at_layer = (n_runs, n_trials, n_positions, *width)
            shape = (len(rows), len(layers), *at_layer)
            dims = ("checkpoint", "layer", "run", "trial", "position", *DIMS[kind])
            # One file (shard) a checkpoint, so that checkpoints are written independently; one chunk a layer within it.
            dtype = NUMPY_DTYPES[study["dtype"]]
            zarr_group.put_empty(group, kind, shape, (1, 1, *at_layer), dtype, dims, shards=(1, *shape[1:]))
        attributes = {
            "headlapse_format": FORMAT,
            "study": dict(study),
            "contrasts": [vars(contrast) for contrast in trials.contrasts],
            "versions": zarr_group.package_versions(),
            "coordinates": "length repeats answer_tokens token_text problem",
        }
        zarr_group.finish_group(group, partial, rows, attributes)
    return Store(path)


def _put_trials(group: zarr.Group, trials: Trials) -> None:
    zarr_group.put_axis(group, "run", RUNS)
    zarr_group.put_axis(group, "answer", ANSWERS)
    zarr_group.put(group, "tokens", trials.tokens, ("run", "trial", "position"))
    zarr_group.put(group, "token_text", trials.token_text, ("run", "trial", "position"))
    zarr_group.put(group, "length", trials.length, ("run", "trial"))
    zarr_group.put(group, "answer_tokens", trials.answer_tokens, ("trial", "answer"))
    if trials.continuation is not None:
        zarr_group.put(group, "continuation", trials.continuation, ("trial", "answer", "token"))
    zarr_group.put(group, "repeats", np.array([contrast.repeats for contrast in trials.contrasts]), ("trial",))


def located(provenance: Mapping[str, Any], weights: Path | None) -> dict[str, Any]:
    """A checkpoint's provenance with the place where its weights lie now: in `weights`, unless that is None."""
    if weights is None:
        return dict(provenance)
    folder = weights / provenance["label"] if (weights / provenance["label"]).is_dir() else weights
    return {**provenance, "model": str(weights), "location": str(folder.absolute()), "stamps": {}}


def duplicate_weights(store: Store) -> list[str]:
    """Warnings about checkpoints of different steps whose weight files are identical."""
    places = {row.label: (row.stage, row.step) for row in store.rows()}
    by_hash: dict[str, list[str]] = {}
    for label, record in store.records().items():
        hashes = record["provenance"]["sha256"]
        by_hash.setdefault(" ".join(sorted(hashes.values())), []).append(label)
    return [
        f"{', '.join(labels)} serve the same weights (sha256 {digest[:12]}): at most one is what its name says"
        for digest, labels in by_hash.items()
        if len({places[label] for label in labels}) > 1
    ]
