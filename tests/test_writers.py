"""Laws of many writers: several processes write together what one writes, and broken checkpoints stop nobody."""

import json
import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headlapse.engine.report.page import write_report
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.store import locks
from headlapse.engine.store.store import Store
from tests.forked import CONTEXT, run_script
from tests.models import save, tiny, tiny_tokenizer
from tests.test_scripts import ROOT, messages, run

LABELS = [f"step{step}" for step in range(6)]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), folder / label, tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def alone(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store and its patched run, written by one process."""
    cache = tmp_path_factory.mktemp("alone")
    assert run("cache", "--model", series, "--trials", 3, "--store", cache / "s.zarr", cache=cache).returncode == 0
    assert run("patch", cache / "s.zarr", "--name", "r", cache=cache).returncode == 0
    return cache / "s.zarr"


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def beside(path: Path) -> list[str]:
    """What else lies in the folder of a store."""
    return sorted(other.name for other in path.parent.iterdir() if other != path)


@pytest.mark.slow
def test_shards_in_any_order_write_what_one_process_writes(series: Path, alone: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    for shard in ("2/3", "0/3", "1/3"):
        done = run("cache", "--model", series, "--trials", 3, "--store", store, "--shard", shard, cache=tmp_path)
        assert done.returncode == 0 and "cached 2 checkpoints" in done.stdout
    for shard in ("1/2", "0/2"):
        assert run("patch", store, "--name", "r", "--shard", shard, cache=tmp_path).returncode == 0
    assert files_of(store) == files_of(alone)
    assert beside(store) == []


@pytest.mark.slow
def test_shards_at_once_killed_at_random_and_restarted_write_what_one_process_writes(
    series: Path, alone: Path, tmp_path: Path
) -> None:
    """Four of them, each killed twice; whoever reads meanwhile, and reports, sees a store with fewer checkpoints, never
    a broken one."""
    draw, store = random.Random(0), tmp_path / "s.zarr"
    cache = ["cache", "--model", str(series), "--trials", "3", "--store", str(store)]
    together([[*cache, "--shard", f"{number}/4"] for number in range(4)], tmp_path, draw)
    readings = together([["patch", str(store), "--name", "r", "--shard", f"{n}/4"] for n in range(4)], tmp_path, draw)
    assert None in readings
    assert files_of(store) == files_of(alone)
    assert beside(store) == []
    assert all(
        reading is None or "no finished checkpoint" in reading or "no patched run" in reading for reading in readings
    )


def together(commands: list[list[str]], folder: Path, draw: random.Random) -> list[str | None]:
    """Run commands side by side, each killed at one of its writes, twice, and started again; what a reader met
    meanwhile."""
    readings: list[str | None] = []
    for _ in range(2):
        killed = [start(command, folder, kill_at=draw.randrange(2, 20)) for command in commands]
        readings += watch(killed, folder / "s.zarr")
        assert -signal.SIGKILL in [process.exitcode for process in killed]
    left = [start(command, folder) for command in commands]
    readings += watch(left, folder / "s.zarr")
    assert [process.exitcode for process in left] == [0] * len(left)
    return readings


def start(command: list[str], cache: Path, kill_at: int = -1) -> ForkServerProcess:
    words = [f"scripts/{command[0]}.py", *command[1:]]
    variables = {**os.environ, "HEADLAPSE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    output = cache.with_name(f"{cache.name}.{command[-1].replace('/', '-')}")
    process = CONTEXT.Process(target=run_script, args=(words, ROOT, variables, output, kill_at))
    process.start()
    return process


def watch(processes: list[ForkServerProcess], store: Path) -> list[str | None]:
    """Read the store until the processes have ended; what each reading was refused for, None where it was not."""
    readings: list[str | None] = []
    while any(process.is_alive() for process in processes):
        if store.exists():
            try:
                opened = Store(store)
                for label in opened.complete():
                    opened.activations(label).read_all(0)
                write_report(opened, store.with_name("page"), "r")
                readings.append(None)
            except UserError as error:
                readings.append(str(error))
        time.sleep(0.5)
    shutil.rmtree(store.with_name("page"), ignore_errors=True)
    return readings


@pytest.mark.slow
def test_what_another_process_is_writing_is_left_to_it(series: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    words = ("--model", series, "--trials", 3, "--store", store, "--checkpoints", "step0", "step1")
    with locks.claimed(store, "cache", ["step1"]):
        done = run("cache", *words, cache=tmp_path)
    assert done.returncode == 1 and list(Store(store).complete()) == ["step0"]
    assert messages(done) == [
        f"error: step1: another process is writing it into {store}; run this again when it has ended"
    ]
    assert run("cache", *words, cache=tmp_path).returncode == 0


def broken(series: Path, folder: Path) -> Path:
    """Six checkpoints: the last is sound, the others are broken in five ways."""
    shutil.copytree(series, folder)
    (folder / "step0" / "config.json").write_text("{")
    weights = folder / "step1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    tensors = load_file(folder / "step2" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("dense.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, folder / "step2" / "model.safetensors", metadata={"format": "pt"})
    (folder / "step3" / "tokenizer.json").write_text(json.dumps({"model": {"type": "?"}}))
    (folder / "step4" / "model.safetensors").unlink()
    return folder


@pytest.mark.slow
def test_one_sound_checkpoint_among_five_broken_ones_is_cached_patched_and_reported(
    series: Path, alone: Path, tmp_path: Path
) -> None:
    store, folder = tmp_path / "s.zarr", broken(series, tmp_path / "broken")
    words = ("--model", folder, "--trials", 3, "--store", store)
    done = run("cache", *words, cache=tmp_path)
    assert done.returncode == 1 and "cached 1 checkpoint" in done.stdout
    lines = messages(done)
    assert len(lines) == 5 and [line.split(":")[1].strip() for line in lines] == LABELS[:5]
    assert "not finite" in lines[2]
    assert list(Store(store).complete()) == ["step5"]
    for command in (("patch", store), ("mechanism", store), ("report", store)):
        assert run(*command, cache=tmp_path).returncode == 0
    again = run("cache", *words, cache=tmp_path)
    assert again.returncode == 1 and len(messages(again)) == 5, "only what failed is tried again"


@pytest.mark.slow
def test_overwriting_a_good_store_by_a_broken_series_leaves_the_good_one_and_goes_on_later(
    series: Path, alone: Path, tmp_path: Path
) -> None:
    store, folder = tmp_path / "s.zarr", broken(series, tmp_path / "broken")
    shutil.copytree(alone, store)
    before = files_of(store)
    words = ("--model", folder, "--trials", 2, "--store", store, "--overwrite")
    done = run("cache", *words, cache=tmp_path)
    assert done.returncode == 1 and files_of(store) == before
    assert messages(done)[-1].startswith("note: the old one is kept")
    for label in LABELS[:5]:
        shutil.rmtree(folder / label)
        shutil.copytree(series / label, folder / label)
    done = run("cache", *words, cache=tmp_path)
    assert done.returncode == 0 and "cached 5 checkpoints" in done.stdout, "what was built before is not built again"
    assert list(Store(store).complete()) == LABELS and Store(store).study["trials"] == 2
    assert beside(store) == ["broken"]


@pytest.mark.slow
def test_weights_that_were_moved_are_accepted_by_their_hash_and_others_are_not(series: Path, tmp_path: Path) -> None:
    first, store = shutil.copytree(series, tmp_path / "first"), tmp_path / "s.zarr"
    assert run("cache", "--model", first, "--trials", 3, "--store", store, cache=tmp_path).returncode == 0
    first.rename(tmp_path / "moved")
    lost = run("patch", store, "--name", "r", cache=tmp_path)
    assert lost.returncode == 2 and len(messages(lost)) == len(LABELS)
    assert run("patch", store, "--name", "r", "--weights", tmp_path / "moved", cache=tmp_path).returncode == 0
    shutil.rmtree(tmp_path / "moved" / "step1")
    shutil.copytree(series / "step2", tmp_path / "moved" / "step1")
    other = run("patch", store, "--name", "again", "--weights", tmp_path / "moved", cache=tmp_path)
    assert other.returncode == 1 and "step1: the weights in" in messages(other)[-1]
