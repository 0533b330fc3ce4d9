"""Laws of the completion mark: it is the last thing written of a checkpoint; and duplicated weights are noticed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headlapse.engine.store.checkpoint_arrays import CheckpointArrays
from headlapse.engine.store.patched_run import PatchedRun, TextRun
from headlapse.engine.store.store import Store, duplicate_weights
from headlapse.engine.store.zarr_group import CheckpointRow
from headlapse.engine.study.patch_settings import PatchSettings
from headlapse.engine.study.subsets import parse_subsets
from tests.test_store import HEADS, TRIALS, some_capture, some_store

pytestmark = pytest.mark.thorough

LABEL = "step10"
SUBSETS = parse_subsets(["even", "none"], HEADS)
SHAPE = (1, len(SUBSETS.labels), TRIALS)


def write_captured(store: Store) -> tuple[CheckpointArrays, Callable[[], None]]:
    return store, lambda: store.write(LABEL, some_capture(1), {"commit": "abc"})


def write_patched(store: Store) -> tuple[CheckpointArrays, Callable[[], None]]:
    run = store.open_patch("r", PatchSettings(), [0], SUBSETS.labels, SUBSETS.mask)

    def write() -> None:
        writer = run.write(LABEL)
        writer.put_layers(0, np.ones(SHAPE, dtype="float32"))
        writer.finish(np.ones((2, TRIALS, 2), dtype="float32"), 0.0, 1e-4)

    return run, write


def write_texts(store: Store) -> tuple[CheckpointArrays, Callable[[], None]]:
    run = store.open_texts("t", PatchSettings("published"), [0], SUBSETS.labels, SUBSETS.mask, n_tokens=3)
    text, success = np.full(SHAPE, "a", dtype=object), np.ones(SHAPE, dtype=bool)
    return run, lambda: run.write_texts(LABEL, text, np.zeros((*SHAPE, 3), dtype="int32"), success, 0)


@pytest.mark.parametrize("prepare", [write_captured, write_patched, write_texts])
def test_a_checkpoint_is_complete_only_once_every_other_write_is_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Store], tuple[CheckpointArrays, Any]]
) -> None:
    """The disk fills up at the first write, at the second, and so on: no such checkpoint counts."""
    group, write = prepare(some_store(tmp_path / "s.zarr"))
    put_in_place, n_writes = os.replace, 0

    def fail_at(last: int) -> Callable[[str, str], None]:
        def replace(partial: str, path: str) -> None:
            nonlocal n_writes
            if n_writes == last:
                raise OSError("no space left on device")
            n_writes += 1
            put_in_place(partial, path)

        return replace

    failures = 0
    while True:
        n_writes = 0
        monkeypatch.setattr(os, "replace", fail_at(failures))
        try:
            write()
        except OSError:
            failures += 1
            assert type(group)(group.path).complete() == {}, f"complete after {n_writes} of its writes"
            assert not list(group.path.rglob("*.partial"))
            continue
        break
    assert failures == n_writes >= 4
    assert type(group)(group.path).complete() == {LABEL: 1}
    assert isinstance(group, Store | PatchedRun | TextRun)


def test_the_same_weights_are_noticed_at_different_steps_and_not_under_different_names(tmp_path: Path) -> None:
    """A branch `main` may be the last step under another name; two steps are never the same weights."""
    rows = [CheckpointRow(label, step) for label, step in {"step0": 0, "step10": 10, "main": 10}.items()]
    store = some_store(tmp_path / "s.zarr", rows=rows)
    for label, digest in {"step0": "a" * 64, "step10": "b" * 64, "main": "b" * 64}.items():
        store.write(label, some_capture(0), {"sha256": {f"{label}.bin": digest}})
    assert duplicate_weights(store) == []
    store.write("step0", some_capture(0), {"sha256": {"model.bin": "b" * 64}})
    [warning] = duplicate_weights(store)
    assert all(label in warning for label in ("step0", "step10", "main")) and "b" * 12 in warning
