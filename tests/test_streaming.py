"""Weights come and go: at most so many checkpoints' at a time, only what was fetched, whatever happens in between."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save

from headlapse.__main__ import main
from headlapse.engine.capture.estimate import at_once
from headlapse.engine.checkpoints.eviction import FetchedWeights
from headlapse.engine.checkpoints.fetch import fetch
from headlapse.engine.checkpoints.resolve import Checkpoint, resolve
from headlapse.engine.store.checkpoint_arrays import CheckpointArrays
from tests.hub_server import Cut, HubServer
from tests.models import save as save_model
from tests.models import tiny, tiny_tokenizer
from tests.test_sources import without_waiting

REPO, N = "org/series", 40
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def revisions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of many checkpoints: the same but for their weights."""
    directory = tmp_path_factory.mktemp("model")
    save_model(tiny("neox-parallel", intermediate_size=2048), directory, tokenizer=tiny_tokenizer())
    parts = {path.name: path.read_bytes() for path in directory.iterdir()}
    weights = load_file(directory / "model.safetensors")
    return {
        f"step{step}": parts
        | {"model.safetensors": save({name: value * (1 + step / 1000) for name, value in weights.items()})}
        for step in range(N)
    }


@pytest.fixture
def hub(revisions: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer({REPO: revisions}) as server:
        server.use_here(monkeypatch, tmp_path / "home")
        without_waiting(monkeypatch)
        monkeypatch.chdir(tmp_path)
        yield server
    huggingface_hub.close_session()


def weights_in(home: Path) -> list[Path]:
    """Weights in the client's cache, whole or not, by all names they have there."""
    large = [path for path in home.rglob("*") if not path.is_symlink() and path.stat().st_size > 100_000]
    return large + [path for path in home.rglob("model.safetensors") if path.is_symlink()]


def bytes_in(*folders: Path) -> int:
    """Of all files, while others come and go."""
    total = 0
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(place, name)).st_size
    return total


def run(*words: str, folder: Path) -> int:
    return main(["cache", "--model", REPO, "--checkpoints", "all", *words], folder)


@pytest.mark.slow
def test_forty_checkpoints_on_a_disk_with_room_for_three(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, home = tmp_path / "cache", tmp_path / "home"
    size = len(hub.repos[REPO]["step0"]["model.safetensors"].content)  # type: ignore[arg-type]
    words = ("--keep-weights", "2", "--trials", "3", "--sites", "2")
    assert run(*words, "--plan", folder=cache) == 0
    planned = re.search(r"on disk at most: ([\d.]+) MB \(weights ([\d.]+) MB", capsys.readouterr().out)
    assert planned and float(planned[2]) == pytest.approx(2 * size / 1e6, rel=0.1)
    peaks: list[int] = []

    def measured(method: Callable[..., None]) -> Callable[..., None]:
        """What is on disk is most after something was fetched, and before something is let go."""

        def wrapped(*arguments: Any) -> None:
            if method.__name__ == "let_go":
                peaks.append(bytes_in(home, cache))
            method(*arguments)
            peaks.append(bytes_in(home, cache))

        return wrapped

    for method in (FetchedWeights.fetch, FetchedWeights.let_go):
        monkeypatch.setattr(FetchedWeights, method.__name__, measured(method))

    def usage(place: Path) -> Usage:
        """A disk of its own for the client's cache, with room for the weights of three."""
        return Usage(3 * size, bytes_in(home), 3 * size - bytes_in(home))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    then = ("--then", "patch", "--subsets", "even", "--layers", "2")
    assert run(*words, *then, folder=cache) == 0, capsys.readouterr().err
    [store] = cache.glob("*.zarr")
    [patched] = (path for path in (store / "patches").iterdir() if path.is_dir())
    assert len(CheckpointArrays(store).complete()) == len(CheckpointArrays(patched, store).complete()) == N
    assert not weights_in(home) and not list(cache.glob(".*fetched*"))
    assert max(peaks) == pytest.approx(float(planned[1]) * 1e6, rel=0.1)
    assert hub.downloads().count("model.safetensors") == N
    # What is there already needs no weights: nothing is fetched again, and the verdict is said.
    assert run(*words, *then, folder=cache) == 0
    assert hub.downloads().count("model.safetensors") == N
    assert "nothing to do" in capsys.readouterr().out


def test_results_are_those_of_weights_that_stay(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del hub.repos[REPO]["step0"]  # another number than that of the slices
    for step in range(5, N):
        del hub.repos[REPO][f"step{step}"]
    then = ("--then", "patch", "--subsets", "each", "--then", "mechanism", "--parts", "weights")
    for name, words in (("kept", ()), ("streamed", ("--keep-weights", "3")), ("one", ("--keep-weights", "1"))):
        store = str(tmp_path / f"{name}.zarr")
        assert run("--store", store, "--trials", "3", *words, *then, folder=tmp_path) == 0, capsys.readouterr().err
    kept, streamed, one = (CheckpointArrays(tmp_path / f"{name}.zarr") for name in ("kept", "streamed", "one"))
    for other in (streamed, one):
        assert list(other.complete()) == list(kept.complete()) == [f"step{step}" for step in range(1, 5)]
        assert (other.values("z") == kept.values("z")).all()
        for group, array in (("patches/denoise-last-each", "logit_diff"), ("mechanism", "norm")):
            mine, theirs = (CheckpointArrays(each.path / group, each.path).values(array) for each in (other, kept))
            assert (mine == theirs).all(), (group, array)
    assert len(weights_in(tmp_path / "home")) == 2 * 4  # the first command was to keep them


def test_only_what_was_fetched_is_let_go(hub: HubServer, tmp_path: Path) -> None:
    before, *others = resolve(REPO, ("step1", "step2", "step3"), tmp_path)
    kept = fetch(before, tmp_path).weights[0]
    weights = FetchedWeights(tmp_path / "record")
    for checkpoint in (before, *others):
        weights.fetch(checkpoint, tmp_path)
    assert len(weights_in(tmp_path / "home")) == 6
    for checkpoint in (before, *others):
        weights.let_go(checkpoint)
    assert weights_in(tmp_path / "home") == [kept.resolve(), kept] and not (tmp_path / "record").exists()
    # What was let go is fetched again by whoever needs it.
    assert fetch(others[0], tmp_path).sha256


def test_weights_of_the_same_content_stay_until_the_last_is_done_with_them(hub: HubServer, tmp_path: Path) -> None:
    hub.push(REPO, "step1", {name: blob.content for name, blob in hub.repos[REPO]["step0"].items()})
    first, second = resolve(REPO, ("step0", "step1"), tmp_path)
    weights = FetchedWeights(tmp_path / "record")
    weights.fetch(first, tmp_path)
    weights.fetch(second, tmp_path)
    weights.let_go(first)
    assert fetch(second, tmp_path).sha256
    weights.let_go(second)
    assert not weights_in(tmp_path / "home")


def test_one_is_let_go_while_another_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, 300 times, as fast as they can: nothing of what was fetched is forgotten."""
    fetched = [Checkpoint(f"step{step}", step, REPO, REPO) for step in range(300)]

    def bring(checkpoint: Checkpoint, _cache: Path, announce: Callable[[set[Path]], None]) -> None:
        announce({tmp_path / checkpoint.label})
        (tmp_path / checkpoint.label).touch()

    monkeypatch.setattr("headlapse.engine.checkpoints.eviction.bring", bring)
    monkeypatch.setattr("headlapse.engine.checkpoints.hub.remove_blob", Path.unlink)
    weights, interval = FetchedWeights(tmp_path / "record"), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            for done in [pool.submit(weights.fetch, each, tmp_path) for each in fetched]:
                done.result()
                weights.let_go(fetched.pop(0))
    finally:
        sys.setswitchinterval(interval)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_had_is_named_and_the_others_go_on(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.push(REPO, "step1", {"config.json": b"{}"})
    for step in range(4, N):
        del hub.repos[REPO][f"step{step}"]
    then = ("--then", "patch", "--subsets", "all")
    assert run("--trials", "3", "--keep-weights", "2", *then, folder=tmp_path / "cache") == 1
    printed = capsys.readouterr()
    assert printed.err.count("step1: ") == 1 and "holds no weights" in printed.err
    assert "27 patched runs" in printed.out  # three layers of three prompts at three checkpoints
    assert not weights_in(tmp_path / "home")


@pytest.mark.slow
def test_what_a_killed_command_has_fetched_is_let_go_by_the_next(
    hub: HubServer, revisions: dict[str, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(3, N):
        del hub.repos[REPO][f"step{step}"]
    hub.cuts["model.safetensors"] = Cut(after=10**9, times=0)
    words = ["cache", "--model", REPO, "--checkpoints", "all", "--trials", "3", "--keep-weights", "2"]
    killed = (
        "import os, signal; from headlapse import pipeline; from headlapse.__main__ import main\n"
        "def die(*_):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pipeline.then = die\n"
        f"main({words!r}, {str(tmp_path / 'cache')!r})"
    )
    died = subprocess.run([sys.executable, "-c", killed], env=hub.env(tmp_path / "home"), capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert weights_in(tmp_path / "home") and [*(tmp_path / "cache").glob(".*.fetched")]
    assert main(words, tmp_path / "cache") == 0, capsys.readouterr().err
    assert not weights_in(tmp_path / "home") and not [*(tmp_path / "cache").glob(".*.fetched")]


def test_a_second_command_touches_nothing_of_the_first(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(2, N):
        del hub.repos[REPO][f"step{step}"]
    seconds: list[int] = []

    def run_again(*_: Any) -> tuple[()]:
        here = len(weights_in(tmp_path / "home"))
        seconds.append(run("--trials", "3", "--keep-weights", "2", folder=tmp_path / "cache"))
        assert len(weights_in(tmp_path / "home")) == here > 0
        return ()

    monkeypatch.setattr("headlapse.pipeline.then", run_again)
    assert run("--trials", "3", "--keep-weights", "2", folder=tmp_path / "cache") == 0
    assert seconds and set(seconds) == {2} and "another process fetches weights" in capsys.readouterr().err
    assert not weights_in(tmp_path / "home")


def test_the_most_that_so_many_take_at_once() -> None:
    assert at_once([1, 5, 4, 1], 2) == 9 and at_once([1, 5, 4, 1], None) == 11 and at_once([3], 5) == 3
    assert at_once([], 2) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["cache", "--keep-weights", "0"], "at least those of one checkpoint"),
        (["cache", "--keep-weights", "1", "--overwrite"], "remove the old store first"),
        (["cache", "--then", "report"], "write patch or mechanism"),
        (["cache", "--then"], "write patch or mechanism"),
        (["cache", "--then", "patch", "x.zarr"], "leave out which"),
        (["cache", "--then", "patch", "--checkpoints", "step1"], "leave out which"),
        (["cache", "--then", "patch", "--margin", "0"], "--margin"),
        (["patch", "--then", "mechanism"], "only headlapse cache and headlapse watch are followed"),
    ],
)
def test_wrong_words_are_refused(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.count("\n") == 1 and not printed.out
