"""Where the mechanism is kept: a group of the store, written checkpoint by checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..store import zarr_group
from ..store.checkpoint_arrays import CheckpointArrays
from ..store.disk import is_group
from ..store.store import Store, open_group
from ..store.zarr_group import CheckpointRow
from ..study.mechanism_settings import MechanismSettings, Part
from ..study.role_settings import N_SEQUENCES, ROLES
from ..study.study import RUNS
from .attention import ATTENDED_TO
from .circuits import CIRCUITS

_HEADS = ("layer", "head")
ARRAYS: dict[Part, dict[str, tuple[str, ...]]] = {
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
    "roles": {
        "role_score": (*_HEADS, "role"),
        "role_null": (*_HEADS, "role"),
        "role_p": (*_HEADS, "role"),
        "role_problem": ("role",),
        "name_copying": _HEADS,
        "loss_first": ("sequence",),
        "loss_second": ("sequence",),
    },
}
"""Arrays of every part, float32 but for `TEXTS`, with their dims after `checkpoint`.

Units: `attribution*`, `self_check`, `effect`, `estimate` and `loss*` in nats; `attention` is a share of 0 to 1; `norm`
is a Frobenius norm, `change` relative to the norm before, `to_previous` and `to_last` are cosines; `role_score` and
`role_null` are of 0 to 1, or of -1 to 1 (`copying`, `name mover`, and `name_copying`).
"""

TEXTS = ("role_problem",)
"""Arrays that hold text."""

NEIGHBOURS = ("previous", "last")
"""Names of the arrays that hold the labels of the two checkpoints a checkpoint's weights were compared with: the one
before it and the final one.  An empty label: there was none, or its weights could not be read."""


class MechanismRun(CheckpointArrays):
    """The open group `mechanism` of a store."""

    @property
    def settings(self) -> MechanismSettings:
        return MechanismSettings.from_attributes(self.attrs["mechanism"])

    def write(self, label: str, values: Mapping[str, np.ndarray], neighbours: Mapping[str, str], **fields: Any) -> None:
        """Write one checkpoint's arrays, and `fields` into its record; the completion mark is cleared first and set
        last."""
        writer = self.writer(label)
        for name, value in values.items():
            writer.put(name, value)
        for name, neighbour in neighbours.items():
            writer.put(name, neighbour)
        writer.finish(**fields)

    def missing(self, wanted: Mapping[str, Mapping[str, str]]) -> list[str]:
        """The labels of `wanted` (label -> neighbours) that are unfinished or were compared with other neighbours."""
        finished = self.complete()
        compared = {name: self.values(name) for name in NEIGHBOURS if name in self.group}
        return [
            label
            for label, neighbours in wanted.items()
            if label not in finished
            or any(labels[finished[label]] != neighbours[name] for name, labels in compared.items())
        ]


def mechanism_path(store: Store) -> Path:
    return store.path / "mechanism"


def read_mechanism(store: Store) -> MechanismRun | None:
    """What `headlapse mechanism` measured of a store; None where it has not finished a checkpoint."""
    path = mechanism_path(store)
    run = MechanismRun(path) if is_group(path) else None
    return run if run and run.complete() else None


def open_mechanism(store: Store, settings: MechanismSettings, overwrite: bool = False) -> MechanismRun:
    """The store's group: created if absent, extended by checkpoints that the store gained since.

    With `overwrite`, what is to replace it once it is whole.

    Raises `UserError` where it exists with other settings, naming the difference.
    """
    path = open_group(
        store.path,
        "mechanism",
        {"mechanism": settings.to_attributes()},
        lambda partial: _create(partial, settings, store.rows(), store),
        overwrite,
        "give the same options, or replace it with --overwrite",
    )
    run = MechanismRun(path, store.path)
    run.add(store.rows())
    return run


def _create(path: Path, settings: MechanismSettings, checkpoints: Sequence[CheckpointRow], store: Store) -> None:
    group = zarr_group.start(path, checkpoints)
    arrays = {name: dims for part in settings.parts for name, dims in ARRAYS[part].items()}
    axes: dict[str, Any] = {"run": RUNS, "to": ATTENDED_TO, "circuit": CIRCUITS}
    axes |= {"layer": np.array(store.layers), "head": np.arange(store.n_heads)}
    axes |= {"role": ROLES, "sequence": np.arange(N_SEQUENCES)}
    for name, values in axes.items():
        if any(name in dims for dims in arrays.values()):
            zarr_group.put_axis(group, name, values)
    sizes = {name: len(values) for name, values in axes.items()} | {"trial": store.array("tokens").shape[1]}
    for name, dims in arrays.items():
        shape = tuple(sizes[dim] for dim in dims)
        dtype = str if name in TEXTS else "float32"
        zarr_group.put_empty(group, name, (len(checkpoints), *shape), (1, *shape), dtype, ("checkpoint", *dims))
    if "weights" in settings.parts:
        for name in NEIGHBOURS:
            zarr_group.put_empty(group, name, (len(checkpoints),), (1,), str, ("checkpoint",))
    attributes = {
        "mechanism": settings.to_attributes(),
        "versions": zarr_group.package_versions(),
        "coordinates": "previous last role_problem",
    }
    zarr_group.finish_group(group, path, checkpoints, attributes)
