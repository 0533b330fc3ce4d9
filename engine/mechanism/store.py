"""What is kept of the mechanism: a group of the store, checkpoint by checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..store import zarr_group
from ..store.store import Store
from ..store.zarr_group import CheckpointArrays, CheckpointRow
from ..study.study import RUNS
from .attention import TO
from .circuits import CIRCUITS

PARTS = ("attribution", "attention", "weights", "patching")

_HEADS = ("layer", "head")
ARRAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "attribution": {
        "attribution": (*_HEADS, "run", "trial"),
        "attribution_rest": ("layer", "run", "trial"),
        "attribution_start": ("run", "trial"),
        "attribution_constant": ("run", "trial"),
        "self_check": (),
    },
    "attention": {"attention": (*_HEADS, "run", "trial", "to")},
    "weights": dict.fromkeys(("norm", "change", "to_previous", "to_last"), ("circuit", *_HEADS)),
    "patching": {"effect": (*_HEADS, "trial"), "estimate": (*_HEADS, "trial")},
}
"""Arrays of every part, with their dims after `checkpoint`."""

NEIGHBOURS = ("previous", "last")
"""Labels of the checkpoints that a checkpoint's weights were compared with; empty where there was none."""


class MechanismRun(CheckpointArrays):
    """The open group `mechanism` of a store."""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.attrs["mechanism"])

    def write(self, label: str, values: Mapping[str, np.ndarray], neighbours: Mapping[str, str]) -> None:
        """Write one checkpoint, its completion mark last; none while it is written again."""
        index = self.index(label)
        self.array("complete")[index] = False
        for name, value in values.items():
            self.array(name)[index] = value
        for name, neighbour in neighbours.items():
            self.array(name)[index] = neighbour
        self.array("complete")[index] = True

    def missing(self, wanted: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Of the wanted labels, each with its neighbours, those that are not there, or were compared with others."""
        done = self.complete()
        held = {name: self.values(name) for name in NEIGHBOURS if name in self.group}
        return [
            label
            for label, neighbours in wanted.items()
            if label not in done or any(held[name][done[label]] != neighbours[name] for name in held)
        ]


def mechanism_path(store: Store) -> Path:
    return store.path / "mechanism"


def open_mechanism(store: Store, settings: Mapping[str, Any]) -> MechanismRun:
    """The store's group, made where it is not there, grown where the store has grown since.

    Raises `UserError` when it is there with other settings, spelling out the difference.
    """
    path = mechanism_path(store)
    if not path.exists():
        with zarr_group.atomic_write(path) as partial:
            _make(partial, settings, store.rows(), store)
    zarr_group.refuse_difference(
        path, zarr_group.attributes(path)["mechanism"], settings, "ask as before, or replace it with --overwrite"
    )
    run = MechanismRun(path)
    run.add(store.rows())
    return run


def _make(path: Path, settings: Mapping[str, Any], rows: Sequence[CheckpointRow], store: Store) -> None:
    group = zarr_group.start(path, rows)
    kept = {name: dims for part in settings["parts"] for name, dims in ARRAYS[part].items()}
    axes: dict[str, Any] = {"run": RUNS, "to": TO, "circuit": CIRCUITS}
    axes |= {"layer": np.array(store.layers), "head": np.arange(store.n_heads)}
    for name, values in axes.items():
        if any(name in dims for dims in kept.values()):
            zarr_group.put_axis(group, name, values)
    sizes = {name: len(values) for name, values in axes.items()} | {"trial": store.array("tokens").shape[1]}
    for name, dims in kept.items():
        one = tuple(sizes[dim] for dim in dims)
        zarr_group.put_empty(group, name, (len(rows), *one), (1, *one), "float32", ("checkpoint", *dims))
    if "weights" in settings["parts"]:
        for name in NEIGHBOURS:
            zarr_group.put_empty(group, name, (len(rows),), (1,), str, ("checkpoint",))
    group.attrs.update(
        mechanism=dict(settings), versions=zarr_group.package_versions(), coordinates="step complete previous last"
    )
