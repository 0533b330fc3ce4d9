"""The zarr store: what a study kept of every checkpoint, and every patched run derived from it.

The layout is specified in the README.  A checkpoint counts once its `complete` mark is written, last; whatever was
interrupted before that is written again.  Stores and groups appear under their name only when whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import zarr
from jaxtyping import Bool, Float
from torch import Tensor

from headlapse.engine.capture import Capture
from headlapse.engine.study import RUNS, Refusal
from headlapse.engine.tasks import Contrast, Trials

FORMAT = 1
"""Version of the layout; a reader refuses another."""

ANSWERS = ("right", "wrong")
DIMS = {
    "z": ("head", "head_dim"),
    "key": ("kv_head", "head_dim"),
    "value": ("kv_head", "head_dim"),
    "resid_pre": ("d_model",),
}
"""Trailing dims of every captured kind, after (checkpoint, layer, run, trial, position)."""

_PACKAGES = ("headlapse", "torch", "transformers", "zarr", "numpy")


@dataclass(frozen=True)
class Row:
    """One place on the checkpoint axis."""

    label: str
    step: int


class Store:
    """An open store.  Reading needs no lock; writing goes through `writing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "zarr.json").is_file():
            raise Refusal(f"{path} is no store; make one with: python scripts/cache.py --store {path}")
        try:
            self._group = zarr.open_group(path, mode="r+")
            self.attrs: dict[str, Any] = dict(self._group.attrs)
        except (ValueError, OSError, json.JSONDecodeError) as error:
            raise Refusal(f"{path} cannot be read as a zarr store: {' '.join(str(error).split())}") from error
        if self.attrs.get("headlapse_format") != FORMAT:
            found = self.attrs.get("headlapse_format", "none")
            raise Refusal(f"{path} has store format {found}, this headlapse reads {FORMAT}; make it anew with --overwrite")

    # --- reading ---

    def dataset(self) -> xr.Dataset:
        """The captured arrays, lazily, with labelled dimensions."""
        return _open_dataset(self.path)

    def rows(self) -> list[Row]:
        """Every checkpoint on the axis, complete or not, in store order."""
        labels, steps = self._group["checkpoint"][:], self._group["step"][:]
        return [Row(str(label), int(step)) for label, step in zip(labels, steps, strict=True)]

    def complete(self) -> dict[str, int]:
        """Label -> index of every finished checkpoint, in order of training."""
        marks = self._group["complete"][:]
        done = [(row.step < 0, row.step, index, row.label) for index, row in enumerate(self.rows()) if marks[index]]
        return {label: index for _, _, index, label in sorted(done)}

    @property
    def study(self) -> dict[str, Any]:
        return dict(self.attrs["study"])

    @property
    def layers(self) -> list[int]:
        """Layers that are kept, ascending."""
        return [int(layer) for layer in self._group["layer"][:]]

    @property
    def n_layers(self) -> int:
        """Layers of the model; the last ones are always kept."""
        return self.layers[-1] + 1

    @property
    def n_heads(self) -> int:
        return int(self._group["z"].shape[5])

    def kinds(self) -> list[str]:
        """Which of z, key, value and resid_pre are kept."""
        return [kind for kind in DIMS if kind in self._group]

    def trials(self) -> Trials:
        """The tokenized prompts, as they were run."""
        read = {name: np.asarray(self._group[name][:]) for name in ("tokens", "length", "answer_tokens")}
        contrasts = tuple(Contrast(**fields) for fields in self.attrs["contrasts"])
        text = np.asarray(self._group["token_text"][:]).astype(str)
        return Trials(**read, token_text=text, contrasts=contrasts, notes=())

    def answer_logits(self, index: int) -> Float[np.ndarray, "run trial answer"]:
        return np.asarray(self._group["answer_logits"][index])

    def activations(self, index: int) -> "StoredActivations":
        """One checkpoint's captured tensors; each is read from disk once, when first asked for."""
        return StoredActivations(self._group, index, self.attrs["study"]["dtype"], self.layers)

    # --- writing ---

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store against other writers.  Raises `Refusal` when one is at work."""
        with locked(self.path):
            yield

    def add(self, rows: Sequence[Row]) -> None:
        """Put checkpoints that are not there yet at the end of the axis, incomplete."""
        held = self.rows()
        new = [row for row in rows if row not in held]
        clash = {row.label: row.step for row in held}
        for row in new:
            if row.label in clash:
                raise Refusal(f"{self.path} holds {row.label} as step {clash[row.label]}, it is now step {row.step}; use another --store")
        n = len(held) + len(new)
        # `checkpoint` grows last: readers go by its length, and an interrupted growth is simply done again.
        for name in [*(name for name in self._on_checkpoint_axis() if name != "checkpoint"), "checkpoint"]:
            array = self._group[name]
            array.resize((n, *array.shape[1:]))
            if name == "step" and new:
                array[len(held) :] = np.array([row.step for row in new])
            if name == "checkpoint" and new:
                array[len(held) :] = np.array([row.label for row in new], dtype=object)

    def write(self, label: str, captured: Capture, provenance: Mapping[str, Any]) -> None:
        """Write one checkpoint, its completion mark last.  Raises `Refusal` when its shapes differ from the store's."""
        for kind in self.kinds():
            found, held = len(captured.kept[kind]), self.n_layers
            if found != held or tuple(captured.read(kind, 0).shape) != self._group[kind].shape[2:]:
                shape = list(captured.read(kind, 0).shape)
                raise Refusal(
                    f"{kind} of {label} comes as {found} layers of {shape}, {self.path} holds {held} of "
                    f"{list(self._group[kind].shape[2:])}; a step of another shape belongs in another store"
                )
        index = [row.label for row in self.rows()].index(label)
        for kind in self.kinds():
            tensors = [captured.read(kind, layer) for layer in self.layers]
            self._group[kind][index] = to_numpy(torch.stack(tensors))
        self._group["answer_logits"][index] = captured.answer_logits.numpy()
        known = dict(self._group.attrs["checkpoints"])
        self._group.attrs["checkpoints"] = {**known, label: dict(provenance)}
        self.attrs = dict(self._group.attrs)
        self._group["complete"][index] = True

    def _on_checkpoint_axis(self) -> list[str]:
        names = [name for name, array in self._group.arrays() if array.metadata.dimension_names[:1] == ("checkpoint",)]
        return sorted(names)

    # --- patched runs ---

    def patch_names(self) -> list[str]:
        """Names of the patched runs, oldest first."""
        folder = self.path / "patches"
        found = [p for p in folder.iterdir() if (p / "zarr.json").is_file() and p.suffix != ".partial"] if folder.is_dir() else []
        return [p.name for p in sorted(found, key=lambda p: (p / "zarr.json").stat().st_mtime_ns)]

    def patch_dataset(self, name: str) -> xr.Dataset:
        """One patched run, lazily, with labelled dimensions."""
        return _open_dataset(self.path / "patches" / name)

    def patch(self, name: str) -> "PatchedRun":
        return PatchedRun(self.path / "patches" / name, self.rows())

    def new_patch(
        self, name: str, settings: Mapping[str, Any], layers: Sequence[int], labels: Sequence[str], mask: Bool[np.ndarray, "subset head"]
    ) -> "PatchedRun":
        """The patched run `name`, made when it is not there.

        Raises `Refusal` when it is there with other settings, spelling out the difference.
        """
        path = self.path / "patches" / name
        if path.exists():
            held = PatchedRun(path, self.rows())
            refuse_difference(f"{path}", held.settings, settings, "give this run another --name, or replace it with --overwrite")
            return held
        n_trials = int(self._group["tokens"].shape[1])
        with _appearing(path) as partial:
            _create_patch(partial, settings, self.rows(), layers, labels, mask, n_trials)
        if "patches" not in self._group:
            self._group.create_group("patches")
        return PatchedRun(path, self.rows())


class StoredActivations:
    """One checkpoint of a store as tensors (run, trial, position, ...), each read once."""

    def __init__(self, group: zarr.Group, index: int, dtype: str, layers: Sequence[int]) -> None:
        self._group, self._index, self._dtype = group, index, dtype
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._read: dict[tuple[str, int], Tensor] = {}

    def read(self, kind: str, layer: int) -> Tensor:
        if (kind, layer) not in self._read:
            raw = self._group[kind][self._index, self._place[layer]]
            self._read[kind, layer] = to_tensor(np.asarray(raw), self._dtype)
        return self._read[kind, layer]


class PatchedRun:
    """The results of one patch, checkpoint by checkpoint."""

    def __init__(self, path: Path, rows: Sequence[Row]) -> None:
        self.path = path
        self._group = zarr.open_group(path, mode="r+")
        self._rows = list(rows)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._group.attrs["patch"])

    def dataset(self) -> xr.Dataset:
        return _open_dataset(self.path)

    def complete(self) -> set[str]:
        """Labels of the checkpoints whose patched runs are all there."""
        labels, marks = self._group["checkpoint"][:], self._group["complete"][:]
        return {str(label) for label, mark in zip(labels, marks, strict=False) if mark}

    def grow(self) -> None:
        """Take in checkpoints that were added to the store since."""
        n = len(self._rows)
        for name in ("logit_diff", "clean_logit_diff", "corrupt_logit_diff", "self_check", "complete", "step", "checkpoint"):
            array = self._group[name]
            array.resize((n, *array.shape[1:]))
        self._group["step"][:] = np.array([row.step for row in self._rows])
        self._group["checkpoint"][:] = np.array([row.label for row in self._rows], dtype=object)

    def write(
        self,
        label: str,
        logit_diff: Float[np.ndarray, "layer subset trial"],
        answer_logits: Float[np.ndarray, "run trial answer"],
        self_check: float,
    ) -> None:
        """Write one checkpoint's patched runs, the completion mark last."""
        index = [row.label for row in self._rows].index(label)
        plain = answer_logits[..., 0] - answer_logits[..., 1]
        self._group["logit_diff"][index] = logit_diff
        self._group["clean_logit_diff"][index] = plain[RUNS.index("clean")]
        self._group["corrupt_logit_diff"][index] = plain[RUNS.index("corrupt")]
        self._group["self_check"][index] = self_check
        self._group["complete"][index] = True


def create_store(
    path: Path,
    study: Mapping[str, Any],
    rows: Sequence[Row],
    layers: Sequence[int],
    kinds: Sequence[str],
    trials: Trials,
    captured: Capture,
) -> Store:
    """A new store, shaped by a first capture; it appears at `path` only when whole."""
    with _appearing(path) as partial:
        group = zarr.open_group(partial, mode="w")
        n, n_runs, n_trials, n_positions = len(rows), *trials.tokens.shape
        _axis(group, "checkpoint", [row.label for row in rows])
        _axis(group, "run", RUNS)
        _axis(group, "answer", ANSWERS)
        _axis(group, "layer", np.array(layers))
        _plain(group, "step", np.array([row.step for row in rows]), ("checkpoint",))
        _empty(group, "complete", (n,), (1,), bool, ("checkpoint",))
        _plain(group, "tokens", trials.tokens, ("run", "trial", "position"))
        _plain(group, "length", trials.length, ("run", "trial"))
        _plain(group, "answer_tokens", trials.answer_tokens, ("trial", "answer"))
        _plain(group, "token_text", trials.token_text.astype(object), ("run", "trial", "position"))
        _plain(group, "repeats", np.array([c.repeats for c in trials.contrasts]), ("trial",))
        shape = (n, n_runs, n_trials, len(ANSWERS))
        _empty(group, "answer_logits", shape, (1, *shape[1:]), "float32", ("checkpoint", "run", "trial", "answer"))
        for kind in kinds:
            one = to_numpy(captured.read(kind, layers[0]))
            shape = (n, len(layers), *one.shape)
            dims = ("checkpoint", "layer", "run", "trial", "position", *DIMS[kind])
            _empty(group, kind, shape, (1, 1, *one.shape), one.dtype, dims, shard=(1, *shape[1:]))
        group.attrs.update(
            headlapse_format=FORMAT,
            study=dict(study),
            contrasts=[vars(contrast) for contrast in trials.contrasts],
            checkpoints={},
            dtype_note="bfloat16 is kept as its raw 16 bits, in uint16" if study["dtype"] == "bfloat16" else "as computed",
            versions={package: version(package) for package in _PACKAGES},
            coordinates="step complete length repeats answer_tokens token_text",
        )
    return Store(path)


def refuse_difference(where: str, held: Mapping[str, Any], asked: Mapping[str, Any], mend: str) -> None:
    """Raise `Refusal` naming every field in which `asked` differs from what `held` says."""
    keys = [key for key in {**held, **asked} if held.get(key) != asked.get(key)]
    if keys:
        told = "; ".join(f"{key} is {_short(held.get(key))} there, {_short(asked.get(key))} asked" for key in keys)
        raise Refusal(f"{where} answers another question: {told}; {mend}")


def find_store(cache: Path) -> Path:
    """The store under `cache` that was written to last.  Raises `Refusal` where there is none."""
    found = [p for p in cache.iterdir() if _is_store(p)] if cache.is_dir() else []
    if not found:
        raise Refusal(f"there is no store under {cache}; make one with: python scripts/cache.py")
    return max(found, key=lambda p: (p / "zarr.json").stat().st_mtime_ns)


def remove(path: Path) -> None:
    """Delete a store or group.  Raises `Refusal` for a directory that is none."""
    if path.exists() and not (path / "zarr.json").is_file():
        raise Refusal(f"{path} is no store and is left alone; remove it yourself or choose another --store")
    if path.exists():
        gone = path.with_name(f".{path.name}.partial")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other writers for the length of the body; a killed holder lets go by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"another run is writing {path}; wait for it, or use another --store") from None
        yield


def to_numpy(tensor: Tensor) -> np.ndarray:
    """As numpy, bfloat16 as its raw 16 bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor `to_numpy` was given."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _create_patch(
    path: Path,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    layers: Sequence[int],
    labels: Sequence[str],
    mask: Bool[np.ndarray, "subset head"],
    n_trials: int,
) -> None:
    group = zarr.open_group(path, mode="w")
    n, runs = len(rows), (len(layers), len(labels), n_trials)
    _axis(group, "checkpoint", [row.label for row in rows])
    _axis(group, "layer", np.array(layers))
    _axis(group, "subset", labels)
    _plain(group, "step", np.array([row.step for row in rows]), ("checkpoint",))
    _plain(group, "mask", mask, ("subset", "head"))
    _empty(group, "logit_diff", (n, *runs), (1, 1, *runs[1:]), "float32", ("checkpoint", "layer", "subset", "trial"))
    for name in ("clean_logit_diff", "corrupt_logit_diff"):
        _empty(group, name, (n, n_trials), (1, n_trials), "float32", ("checkpoint", "trial"))
    _empty(group, "self_check", (n,), (1,), "float32", ("checkpoint",))
    _empty(group, "complete", (n,), (1,), bool, ("checkpoint",))
    group.attrs.update(
        patch=dict(settings),
        versions={package: version(package) for package in _PACKAGES},
        coordinates="step complete mask self_check",
    )


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A directory to write into that takes the name `path` once the body is through."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, path)


def _open_dataset(path: Path) -> xr.Dataset:
    return xr.open_zarr(path, consolidated=False, mask_and_scale=False)


def _axis(group: zarr.Group, name: str, values: Sequence[str] | np.ndarray) -> None:
    array = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    _plain(group, name, array, (name,))


def _plain(group: zarr.Group, name: str, values: np.ndarray, dims: tuple[str, ...]) -> None:
    """A small array, written at once."""
    dtype = str if values.dtype == object else values.dtype
    array = group.create_array(name, shape=values.shape, dtype=dtype, dimension_names=dims, chunks=_at_least_one(values.shape))
    array[...] = values


def _empty(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: Any,
    dims: tuple[str, ...],
    shard: tuple[int, ...] | None = None,
) -> None:
    """An array to be written checkpoint by checkpoint; NaN, False or 0 where nothing is yet.

    Uncompressed: activations hardly shrink, and reading is then as fast as the disk.
    """
    fill = float("nan") if np.dtype(dtype).kind == "f" else 0
    group.create_array(
        name, shape=shape, chunks=chunk, shards=shard, dtype=dtype, dimension_names=dims, fill_value=fill, compressors=None
    )


def _at_least_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, n) for n in shape)


def _is_store(path: Path) -> bool:
    meta = path / "zarr.json"
    if path.name.startswith(".") or not meta.is_file():
        return False
    try:
        return "headlapse_format" in json.loads(meta.read_text()).get("attributes", {})
    except (OSError, ValueError):
        return False


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
