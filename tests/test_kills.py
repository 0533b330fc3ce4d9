"""Laws of interrupted writing: killed at any file operation, or by a power cut, the next run ends at the same bytes.

Each command's writing is run here at the level of the store, without a model, in a forked process that is killed at one
of its file operations.  HEADLAPSE_KILLS=1 tries every one of them, which takes half an hour; else every so many.
"""

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from headlapse.engine.mechanism.store import open_mechanism
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.store.disk import put_in_place, recover, replacement_of, sweep
from headlapse.engine.store.locks import claimed, layout_lock
from headlapse.engine.store.store import Store
from headlapse.engine.store.zarr_group import CheckpointRow
from headlapse.engine.study.mechanism_settings import MechanismSettings
from headlapse.engine.study.patch_settings import PatchSettings
from headlapse.engine.study.subsets import parse_subsets
from tests.test_store import HEADS, ROWS, STUDY, TRIALS, some_capture, some_store

STRIDE = int(os.environ.get("HEADLAPSE_KILLS", "97"))
FIRST, ALL = ROWS[:2], [*ROWS, CheckpointRow("step20", 20)]
SUBSETS = parse_subsets(["even", "none"], HEADS)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def capture(path: Path, rows: list[CheckpointRow], store: Path | None = None, study: object = None) -> None:
    """What `headlapse cache` writes at `path`, for the store at `store`."""
    with layout_lock(store or path):
        sweep(store or path)
    with claimed(store or path, "cache", [row.label for row in rows]) as mine:
        if not path.exists():
            with layout_lock(path):
                some_store(path, rows=rows, study=study or STUDY)
        opened = Store(path)
        opened.add(rows)
        for row in rows:
            if row.label in mine and row.label not in opened.complete():
                opened.write(row.label, some_capture(row.step + 1), {"sha256": {"m": "0" * 64}})


def cache_new(path: Path) -> None:
    capture(path, ALL)


def cache_growing(path: Path) -> None:
    capture(path, ALL)


def cache_shards(path: Path) -> None:
    for rows in (ALL[::2], ALL[1::2]):
        with claimed(path, "cache", [row.label for row in rows]):
            if not path.exists():
                with layout_lock(path):
                    sweep(path)
                    some_store(path, rows=ALL)
            store = Store(path)
            for row in rows:
                if row.label not in store.complete():
                    store.write(row.label, some_capture(row.step + 1), {})
    with layout_lock(path):
        sweep(path)


def cache_overwriting(path: Path) -> None:
    recover(path)
    study = {**STUDY, "task": "another"}
    if path.exists() and Store(path).study != study:
        capture(replacement_of(path), ALL, path, study)
        put_in_place(path, path)
    with layout_lock(path):
        sweep(path)


def patch(path: Path) -> None:
    with layout_lock(path):
        sweep(path)
    store = Store(path)
    run = store.open_patch("r", PatchSettings(), [0, 1], SUBSETS.labels, SUBSETS.mask)
    for label in store.complete():
        if label not in run.complete():
            rng = np.random.default_rng(store.index(label))
            writer = run.write(label)
            for layer in range(2):
                writer.put_layers(layer, rng.normal(size=(1, 2, TRIALS)).astype("float32"))
            writer.finish(rng.normal(size=(2, TRIALS, 2)).astype("float32"), 1e-6, 1e-4, device="cpu")


def mechanism(path: Path) -> None:
    with layout_lock(path):
        sweep(path)
    store = Store(path)
    run = open_mechanism(store, MechanismSettings.of_parts(("attention",), "denoise", "float32"))
    for label in store.complete():
        if label not in run.complete():
            run.write(label, {"attention": np.full(run.array("attention").shape[1:], 0.5, dtype="float32")}, {})


PREPARED: dict[Callable[[Path], None], list[CheckpointRow]] = {
    cache_new: [], cache_growing: FIRST, cache_shards: [], cache_overwriting: FIRST, patch: FIRST, mechanism: FIRST,
}  # fmt: skip
"""What writes, and the checkpoints that a store holds before it does."""


class Recorder:
    """Kills this process at its Nth file operation, and keeps a list of what was written and what was made durable."""

    def __init__(self, kill_at: int, folder: Path, log: Path) -> None:
        self.left, self.folder = kill_at, str(folder)
        self.log = open(log, "a", buffering=1)  # noqa: SIM115  # until the process is killed
        fsync = os.fsync

        def recorded(handle: int) -> None:
            fsync(handle)
            self.log.write(f"sync\t{os.readlink(f'/proc/self/fd/{handle}')}\n")

        os.fsync = recorded
        sys.addaudithook(self)

    def __call__(self, event: str, given: tuple[object, ...]) -> None:
        paths = [str(path) for path in given[:2] if isinstance(path, str | os.PathLike)]
        if not paths or not any(path.startswith(self.folder) for path in paths):
            return
        flags = given[2] if event == "open" and len(given) > 2 and isinstance(given[2], int) else 0
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link") or (flags & _WRITING):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.log.write("\t".join([event, *paths]) + "\n")


def killed(write: Callable[[Path], None], path: Path, kill_at: int, log: Path) -> bool:
    """Run `write` in a forked process that dies at that operation; whether it got so far."""
    child = os.fork()
    if child == 0:
        try:
            Recorder(kill_at, path.parent, log)
            write(path)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def each_kill(work: Callable[[int], int], place: Path, log: Path, stride: int) -> Iterator[int]:
    """The file operations at which `work`, of such a number, was killed in an empty `place`, until it comes to its end;
    it returns the exit status of the process that it ran in."""
    for kill_at in range(stride // 2, 10**6, stride):
        shutil.rmtree(place, ignore_errors=True)
        log.unlink(missing_ok=True)
        if work(kill_at) != -signal.SIGKILL:
            return
        yield kill_at


def cut_power(log: Path, folder: Path, before: Path) -> None:
    """Take back what was written and not made durable: to what was there before, or to nothing."""
    unsynced: set[str] = set()
    for line in log.read_text().splitlines():
        event, *paths = line.split("\t")
        if event == "sync":
            unsynced.discard(paths[0])
        elif event == "os.rename":
            unsynced |= {path.replace(paths[0], paths[1], 1) for path in unsynced if path.startswith(paths[0])}
            unsynced.add(paths[1])
        elif event == "open":
            unsynced.add(paths[0])
    for path in map(Path, unsynced):
        if path.is_file() and path.is_relative_to(folder):
            old = before / path.relative_to(folder)
            path.write_bytes(old.read_bytes()) if old.is_file() else path.unlink()


def empty_what_was_not_synced(log: Path, folder: Path) -> None:
    """The same for files that were never there before, by their names alone: also where a library wrote them unseen."""
    durable = {Path(line.split("\t")[1]).name for line in log.read_text().splitlines() if line.startswith("sync")}
    for file in filter(Path.is_file, folder.rglob("*")):
        if file.name not in durable:
            file.write_bytes(b"")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to see which file is made durable")
@pytest.mark.parametrize("write", PREPARED, ids=lambda write: write.__name__)
def test_what_was_cut_off_anywhere_is_finished_by_the_next_run(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """By a kill, and by a kill with a power cut; what two of them leave alike is tried once."""
    before, whole, place, log = (tmp_path / name for name in ("before", "whole", "place", "log"))
    before.mkdir()
    if PREPARED[write]:
        capture(before / "s.zarr", PREPARED[write])
    shutil.copytree(before, whole)
    write(whole / "s.zarr")
    expected, n_kills = files_of(whole), 0
    tried: set[object] = set()
    for kill_at in range(1 + STRIDE // 2, 10**6, STRIDE):
        shutil.copytree(before, place)
        if not killed(write, place / "s.zarr", kill_at, log):
            break
        n_kills += 1
        after_kill = tmp_path / "killed"
        shutil.copytree(place, after_kill)
        cut_power(log, place, before)
        for folder in (after_kill, place):
            if (left := left_in(folder)) not in tried:
                tried.add(left)
                refuse_nothing_but_in_words(folder / "s.zarr")
                write(folder / "s.zarr")
                assert files_of(folder) == expected, f"{folder.name} at file operation {kill_at}"
            shutil.rmtree(folder)
        log.unlink()
    assert n_kills * STRIDE > 50


def left_in(folder: Path) -> object:
    """All that a kill left, but for the random part of names."""
    names = {re.sub("[0-9a-f]{32}", "", str(path.relative_to(folder))): path for path in folder.rglob("*")}
    return frozenset((name, path.read_bytes() if path.is_file() else None) for name, path in names.items())


def refuse_nothing_but_in_words(path: Path) -> None:
    """Who reads what a kill left gets a whole store, or one line."""
    try:
        recover(path)
        store = Store(path)
        for label in store.complete():
            store.activations(label).read_all(0)
        for name in store.patch_names():
            store.patch(name).load()
    except UserError as error:
        assert "\n" not in str(error)
