"""Laws of the sources: what a name and a label stand for, and that their files are on disk, whole and known.

The hub is a loopback one, asked by the real huggingface_hub client.
"""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save

from headlapse.engine.checkpoints import files
from headlapse.engine.checkpoints.availability import Availability, plan
from headlapse.engine.checkpoints.fetch import description, fetch, prepare
from headlapse.engine.checkpoints.files import Files
from headlapse.engine.checkpoints.resolve import Checkpoint, resolve
from headlapse.engine.checkpoints.training_place import read_place
from headlapse.engine.runtime.errors import UserError
from tests.hub_server import Cut, HubServer

REPO = "owner/series"
PYTHIA = "EleutherAI/pythia-160m"
STUDY = [f"step{step}" for step in (1000, 2000, 4000, 8000, 16000, 32000, 64000, 80000, 100000, 120000)] + ["main"]
DEMO_STEPS = (0, 8, 64, 512)


def weights(value: int = 0) -> bytes:
    return save({"w": np.full(1000, value, np.float32)})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


COMMON = {"config.json": b'{"model_type": "gpt_neox"}', "tokenizer.json": b'{"version": "1.0"}'}
SAFETENSORS = {"model.safetensors": weights(1)}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {"model.safetensors.index.json": index(*SHARDS), SHARDS[0]: weights(2), SHARDS[1]: weights(3)}
BIN = {"pytorch_model.bin": b"pickled" * 500}
BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
SHARDED_BIN = {"pytorch_model.bin.index.json": index(*BIN_SHARDS), BIN_SHARDS[0]: b"one" * 500, BIN_SHARDS[1]: b"two"}
FORMS = {"safetensors": SAFETENSORS, "sharded-safetensors": SHARDED, "bin": BIN, "sharded-bin": SHARDED_BIN}
CLUTTER = {"README.md": b"read me", "flax_model.msgpack": b"flax" * 500, "onnx/model.onnx": b"onnx" * 500}


def written(directory: Path, *parts: dict[str, bytes]) -> Path:
    for part in parts:
        for name, content in part.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Four checkpoints, one of each form."""
    for step, form in zip((0, 1, 1000, 3000), FORMS.values(), strict=True):
        written(tmp_path / "series" / f"step{step}", COMMON, form)
    return tmp_path / "series"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the module that trains; the directories in which it was called to train."""
    trained: list[Path] = []

    @dataclass(frozen=True)
    class Recipe:
        seed: int = 0

    def train(directory: Path, recipe: Recipe, until: int | None) -> None:
        assert directory.name == (f"demo-seed{recipe.seed}" if recipe.seed else "demo")
        trained.append(directory)
        for step in (step for step in DEMO_STEPS if until is None or step <= until):
            written(directory / f"step{step}", COMMON, {"model.safetensors": weights(step)})

    room = ModuleType("headlapse.engine.checkpoints.demo")
    monkeypatch.setattr(room, "STEPS", DEMO_STEPS, raising=False)
    monkeypatch.setattr(room, "SERIES", Recipe(), raising=False)
    monkeypatch.setattr(room, "train", train, raising=False)
    monkeypatch.setattr(room, "is_trained", lambda folder, step: (folder / f"step{step}").is_dir(), raising=False)
    monkeypatch.setitem(sys.modules, room.__name__, room)
    return trained


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A repository with a revision in each form of weights, and more."""
    revisions = {
        "main": COMMON | SAFETENSORS | BIN | CLUTTER,
        "step1000": COMMON | SAFETENSORS | CLUTTER,
        "step2000": COMMON | SHARDED | SHARDED_BIN,
        "step3000": COMMON | BIN | CLUTTER,
        "step4000": COMMON | SHARDED_BIN,
    }
    with HubServer({REPO: revisions, "gpt2": {"main": COMMON | SAFETENSORS}}) as server:
        server.use_here(monkeypatch, tmp_path / "home")
        without_waiting(monkeypatch)
        yield server
    huggingface_hub.close_session()


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits seconds between its tries."""
    patient = SimpleNamespace(sleep=lambda _seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time", patient)
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)


def labels(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [checkpoint.label for checkpoint in checkpoints]


def on_hub(label: str, repo: str = REPO, commit: str | None = None) -> Checkpoint:
    return Checkpoint(label, read_place(label).step, repo, repo, commit)


def refusal(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def contents(files: Files) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files.directory.iterdir()}


def names(files: Files) -> list[str]:
    return [path.name for path in files.weights]


# What a name stands for


def test_demo_is_the_embedded_series(demo: list[Path], cache: Path) -> None:
    checkpoints = resolve("demo", (), cache)
    assert labels(checkpoints) == ["step0", "step8", "step64", "step512"]
    assert [checkpoint.step for checkpoint in checkpoints] == list(DEMO_STEPS)
    assert checkpoints[1].location == str((cache / "demo" / "step8").resolve())
    assert not demo, "nothing is trained before it is fetched"


def test_a_local_series_is_its_step_and_checkpoint_folders(series: Path, cache: Path) -> None:
    written(series / "checkpoint-20", COMMON, BIN)
    written(series / "logs", {"events": b""})
    (series / "step99").write_bytes(b"a file")
    checkpoints = resolve(str(series), (), cache)
    assert labels(checkpoints) == ["step0", "step1", "checkpoint-20", "step1000", "step3000"]
    assert [checkpoint.step for checkpoint in checkpoints] == [0, 1, 20, 1000, 3000]
    assert all(checkpoint.location == str(series / checkpoint.label) for checkpoint in checkpoints)
    assert {checkpoint.model for checkpoint in checkpoints} == {str(series)}


def test_a_folder_without_a_number_comes_last_with_an_unknown_step(series: Path, cache: Path) -> None:
    written(series / "checkpoint-best", COMMON, BIN)
    assert [(c.label, c.step) for c in resolve(str(series), (), cache)][-2:] == [
        ("step3000", 3000),
        ("checkpoint-best", -1),
    ]


def test_a_directory_with_config_and_weights_is_one_checkpoint(tmp_path: Path, cache: Path) -> None:
    for name, step in (("my-model", -1), ("checkpoint-500", 500)):
        directory = written(tmp_path / name, COMMON, SHARDED_BIN)
        assert resolve(str(directory), (), cache) == [Checkpoint(name, step, str(directory), str(directory))]
        assert resolve(str(directory), [name, "all"], cache) == resolve(str(directory), (), cache)


def test_a_trainers_directory_is_its_checkpoints_not_the_weights_above_them(tmp_path: Path, cache: Path) -> None:
    directory = written(tmp_path / "run", COMMON, SAFETENSORS)
    for step in (500, 1000):
        written(directory / f"checkpoint-{step}", COMMON, SAFETENSORS)
    assert labels(resolve(str(directory), (), cache)) == ["checkpoint-500", "checkpoint-1000"]


def test_a_relative_directory_is_remembered_from_the_root(
    series: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(series.parent)
    assert resolve("series", ["step0"], cache)[0].location == str(series / "step0")
    assert resolve("./series/", ["step0"], cache)[0].location == str(series / "step0")
    monkeypatch.setenv("HOME", str(series.parent))
    assert resolve("~/series", ["step0"], cache)[0].location == str(series / "step0")


def test_a_directory_wins_over_a_hub_id_of_its_name(series: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series.rename(series.parent / "gpt2")
    monkeypatch.chdir(series.parent)
    assert labels(resolve("gpt2", (), cache)) == ["step0", "step1", "step1000", "step3000"]


def test_a_name_or_owner_and_name_is_a_hub_id(cache: Path) -> None:
    for model in ("gpt2", "owner/name", "allenai/OLMo-1B_v1.5"):
        assert resolve(model, (), cache) == [Checkpoint("main", -1, model, model)]


@pytest.mark.parametrize("model", ["./no", "/no/such", "~/no/such", "a/b/c", ".", "..", "no/such/", "owner/"])
def test_a_path_that_is_not_there_is_no_hub_id(
    model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "deep")
    assert f"--model {model}" in refusal(resolve, model, (), cache)


def test_a_name_that_can_be_neither_is_refused(cache: Path) -> None:
    for model in ("", "two words", "owner/näme"):
        assert "neither a directory here nor a hub id" in refusal(resolve, model, (), cache)


def test_a_file_is_refused_as_a_model(tmp_path: Path, cache: Path) -> None:
    directory = written(tmp_path, SAFETENSORS)
    assert "is a file; give the directory" in refusal(resolve, str(directory / "model.safetensors"), (), cache)


def test_a_directory_that_is_no_checkpoint_is_refused_with_what_was_found_there(tmp_path: Path, cache: Path) -> None:
    written(tmp_path / "photos", {f"{n}.jpg": b"" for n in range(7)})
    message = refusal(resolve, str(tmp_path / "photos"), (), cache)
    assert "is no checkpoint" in message and message.endswith(
        "found there: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more"
    )
    written(tmp_path / "half", COMMON)
    assert "found there: config.json, tokenizer.json" in refusal(resolve, str(tmp_path / "half"), (), cache)


# What is wanted of it


def test_pythias_revisions_are_known_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headlapse.engine.checkpoints.hub.revisions", None)
    for model in (PYTHIA, "EleutherAI/pythia-1.4b-deduped", "EleutherAI/pythia-14m-seed3"):
        every = resolve(model, ["all"], cache)
        assert len(every) == 154 and labels(every)[:4] == ["step0", "step1", "step2", "step4"]
        assert [c.step for c in every] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 143001, 1000)]
        assert labels(resolve(model, (), cache)) == labels(resolve(model, ["study"], cache)) == STUDY
    assert resolve(PYTHIA, ["main"], cache) == [
        Checkpoint("main", 143000, PYTHIA, PYTHIA, tokens_seen=143000 * 2_097_152)
    ]


def test_log_goes_by_powers_of_two_and_ends_with_the_last(cache: Path, series: Path, demo: list[Path]) -> None:
    early = [f"step{step}" for step in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    late = [f"step{step}" for step in (1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000, 143000)]
    assert labels(resolve(PYTHIA, ["log"], cache)) == early + late
    for step in (3, 600, 1024, 2000, 2500):
        written(series / f"step{step}", COMMON, BIN)
    assert labels(resolve(str(series), ["log"], cache)) == ["step0", "step1", "step1000", "step2000", "step3000"]
    assert labels(resolve("demo", ["log"], cache)) == ["step0", "step8", "step64", "step512"]


def test_a_range_holds_both_its_ends_and_not_main_twice(cache: Path, series: Path) -> None:
    last = labels(resolve(PYTHIA, ["step120000..step143000"], cache))
    assert last == [f"step{step}" for step in range(120000, 143001, 1000)]
    assert labels(resolve(PYTHIA, ["step142000..main"], cache)) == ["step142000", "step143000"]
    assert labels(resolve(PYTHIA, ["0..3"], cache)) == ["step0", "step1", "step2"]
    assert labels(resolve(str(series), ["step1..checkpoint-2999"], cache)) == ["step1", "step1000"]


@pytest.mark.parametrize(
    "item", ["step1000..", "..step1000", "..", "step1..step2..step3", "step1...step2", "first..last"]
)
def test_a_range_without_a_step_at_both_ends_is_refused(item: str, cache: Path) -> None:
    message = refusal(resolve, PYTHIA, [item], cache)
    assert f"--checkpoints {item}" in message and "e.g. step1000..step8000" in message


def test_a_range_that_runs_backwards_or_holds_nothing_is_refused(cache: Path) -> None:
    assert "ends before it begins" in refusal(resolve, PYTHIA, ["step8000..step1000"], cache)
    message = refusal(resolve, PYTHIA, ["step1001..step1999"], cache)
    assert "not among the 154 checkpoints" in message and "near it are step1000, step2000;" in message


def test_a_bare_number_is_a_step_whatever_the_folder_is_called(series: Path, cache: Path) -> None:
    written(series / "checkpoint-20", COMMON, BIN)
    assert labels(resolve(str(series), ["20", "1000"], cache)) == ["checkpoint-20", "step1000"]
    assert labels(resolve(PYTHIA, ["512"], cache)) == ["step512"]
    written(series / "checkpoint-1000", COMMON, BIN)
    assert "checkpoint-1000, step1000 at that step" in refusal(resolve, str(series), ["1000"], cache)


def test_what_is_named_twice_comes_once_in_order_of_training(cache: Path) -> None:
    wanted = ["main", "step143000", "step8000", "0", "step8000", "step0..step1", "8000"]
    assert labels(resolve(PYTHIA, wanted, cache)) == ["step0", "step1", "step8000", "step143000", "main"]


def test_the_study_of_a_series_without_its_steps_is_refused_with_what_there_is(
    series: Path, demo: list[Path], cache: Path
) -> None:
    message = refusal(resolve, "demo", ["study"], cache)
    assert "demo lacks 11 of the 11 published steps" in message and "it has step0, step8, step64, step512" in message
    assert "lacks 10 of the 11" in refusal(resolve, str(series), ["study"], cache)
    for step in [*range(1000, 20001, 1000), 32000, 64000, 80000, 100000, 120000, 143000]:
        written(series / f"step{step}", COMMON, BIN)
    assert labels(resolve(str(series), ["study"], cache)) == [*STUDY[:-1], "step143000"]


def test_a_step_that_is_not_there_is_refused_with_the_nearest(series: Path, demo: list[Path], cache: Path) -> None:
    message = refusal(resolve, PYTHIA, ["step1500"], cache)
    assert message.startswith("--checkpoints step1500: not among the 155 checkpoints of EleutherAI/pythia-160m")
    assert "near it are step1000, step2000;" in message
    assert "near it are step64, step512;" in refusal(resolve, "demo", ["step256"], cache)
    assert "near it are step1, step1000;" in refusal(resolve, str(series), ["5"], cache)
    assert "near it are step3000;" in refusal(resolve, str(series), ["5000"], cache)
    assert "near it are step0, step1, step1000;" in refusal(resolve, str(series), ["main"], cache)


def test_a_misspelt_label_is_refused_with_the_nearest_spelling(series: Path, cache: Path) -> None:
    assert "near it are step0, step1000, step3000;" in refusal(resolve, str(series), ["stpe3000"], cache)


def test_labels_of_an_unknown_repository_need_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headlapse.engine.checkpoints.hub.revisions", None)
    commit = "0123456789abcdef0123456789abcdef01234567"
    checkpoints = resolve(REPO, ["main", commit, "stage2-ingredient1-step500", "stage1-step1000-tokens5B"], cache)
    assert labels(checkpoints) == ["stage1-step1000-tokens5B", "stage2-ingredient1-step500", commit, "main"]
    assert [checkpoint.step for checkpoint in checkpoints] == [1000, 500, -1, -1]
    assert [checkpoint.stage for checkpoint in checkpoints] == ["stage1", "stage2-ingredient1", "", ""]
    assert [checkpoint.tokens_seen for checkpoint in checkpoints] == [5 * 10**9, -1, -1, -1]
    assert labels(resolve(PYTHIA, [commit], cache)) == [commit]
    assert "not among the 155 checkpoints" in refusal(resolve, PYTHIA, [""], cache)


def test_sets_ranges_and_numbers_of_an_unknown_repository_come_from_its_branches_and_tags(
    hub: HubServer, cache: Path
) -> None:
    hub.tags = frozenset({"step4000"})
    steps = ["step1000", "step2000", "step3000", "step4000"]
    assert labels(resolve(REPO, ["all"], cache)) == [*steps, "main"]
    assert hub.requests.total() == 1
    assert labels(resolve(REPO, ["step1500..3000", "4000"], cache)) == ["step2000", "step3000", "step4000"]
    assert hub.requests.total() == 2, "one listing a call"
    assert labels(resolve(REPO, ["log"], cache)) == ["step1000", "step2000", "step4000"]
    assert "near it are step4000;" in refusal(resolve, REPO, ["5000"], cache)


def test_log_of_a_repository_without_steps_is_refused(hub: HubServer, cache: Path) -> None:
    assert "it has main" in refusal(resolve, "gpt2", ["log"], cache)


# Files of the embedded series and of directories


@pytest.mark.parametrize("name", ["demo", "demo-seed3"])
def test_the_embedded_series_is_grown_as_far_as_it_is_needed(name: str, demo: list[Path], cache: Path) -> None:
    checkpoints = resolve(name, (), cache)
    prepare(checkpoints[:2], cache)
    assert {path.name for path in (cache / name).iterdir()} == set(labels(checkpoints[:2]))
    # What is there is used; what is not is grown with all the rest before anything is handed out.
    found = [fetch(checkpoint, cache) for checkpoint in checkpoints]
    assert demo == [cache / name] * 2
    assert [files.directory.name for files in found] == labels(checkpoints)
    assert found[2].sha256 == {"model.safetensors": sha256(weights(64))} and found[2].commit is None


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_is_found_and_hashed(form: str, tmp_path: Path, cache: Path) -> None:
    directory = written(tmp_path / "model", COMMON, FORMS[form], CLUTTER)
    files = fetch(resolve(str(directory), (), cache)[0], cache)
    expected = {name: content for name, content in FORMS[form].items() if not name.endswith(".json")}
    assert names(files) == sorted(expected)
    assert files.sha256 == {name: sha256(content) for name, content in expected.items()}
    assert (files.directory, files.config, files.commit) == (directory, directory / "config.json", None)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    found: list[str] = []
    digest = files.sha256

    def count(path: Path) -> str:
        found.append(path.name)
        return digest(path)

    monkeypatch.setattr(files, "sha256", count)
    return found


def recorded(fetched: Files) -> dict[str, object]:
    """What a store keeps of them."""
    return {"sha256": fetched.sha256, "stamps": {path.name: files.stamp(path) for path in fetched.weights}}


def test_only_files_that_were_touched_are_hashed_again(tmp_path: Path, cache: Path, hashed: list[str]) -> None:
    directory = written(tmp_path / "model", COMMON, SHARDED)
    [checkpoint] = resolve(str(directory), (), cache)
    held = recorded(fetch(checkpoint, cache))
    hashed.clear()
    assert fetch(checkpoint, cache, held).sha256 == held["sha256"] and not hashed
    touched = directory / sorted(SHARDS)[0]
    exchanged = bytes(reversed(touched.read_bytes()))
    touched.write_bytes(exchanged)
    os.utime(touched, ns=(1, 1))
    now = fetch(checkpoint, cache, held)
    assert hashed == [touched.name] and now.sha256 == {**now.sha256, touched.name: sha256(exchanged)} != held["sha256"]


def test_a_file_of_another_size_or_time_is_hashed_again_whatever_is_in_it(
    tmp_path: Path, cache: Path, hashed: list[str]
) -> None:
    directory = written(tmp_path / "model", COMMON, SAFETENSORS)
    [checkpoint] = resolve(str(directory), (), cache)
    [(name, content)] = SAFETENSORS.items()
    path, then = directory / name, 10**18
    os.utime(path, ns=(then, then))
    held = recorded(fetch(checkpoint, cache))
    changes = ((content, 1000), (content, -1000), (content + b" ", 0), (content[:-1], 0), (content[::-1], 1000))
    for now, later in changes:
        hashed.clear()
        path.write_bytes(now)
        os.utime(path, ns=(then, then + later))
        assert fetch(checkpoint, cache, held).sha256 == {name: sha256(now)} and hashed == [name]
    hashed.clear()
    path.write_bytes(content)
    os.utime(path, ns=(then + 1, then))
    assert fetch(checkpoint, cache, held).sha256 == held["sha256"] and not hashed, "reading it is no change"


def test_nothing_that_was_recorded_stands_for_a_file_that_is_gone(tmp_path: Path, cache: Path) -> None:
    directory = written(tmp_path / "model", COMMON, SHARDED)
    [checkpoint] = resolve(str(directory), (), cache)
    held = recorded(fetch(checkpoint, cache))
    written(directory, SAFETENSORS)
    assert fetch(checkpoint, cache, held).sha256 == {n: sha256(content) for n, content in SAFETENSORS.items()}
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    assert refusal(fetch, checkpoint, cache, held) == refusal(fetch, checkpoint, cache)


def test_a_store_without_stamps_has_its_files_hashed(tmp_path: Path, cache: Path, hashed: list[str]) -> None:
    [checkpoint] = resolve(str(written(tmp_path / "model", COMMON, SHARDED)), (), cache)
    held = recorded(fetch(checkpoint, cache))
    hashed.clear()
    del held["stamps"]
    assert fetch(checkpoint, cache, held).sha256 == held["sha256"] and sorted(hashed) == sorted(SHARDS)


def test_the_best_form_of_weights_is_taken(tmp_path: Path, cache: Path) -> None:
    directory = written(tmp_path / "model", COMMON, SHARDED_BIN)
    for better, expected in ((BIN, list(BIN)), (SHARDED, sorted(SHARDS)), (SAFETENSORS, list(SAFETENSORS))):
        written(directory, better)
        assert names(fetch(resolve(str(directory), (), cache)[0], cache)) == expected


def test_one_bad_folder_of_a_series_is_refused_when_it_is_fetched_and_only_it(series: Path, cache: Path) -> None:
    written(series / "step2", COMMON)
    written(series / "step4", SAFETENSORS)
    (series / "step8").mkdir()
    checkpoints = {checkpoint.label: checkpoint for checkpoint in resolve(str(series), (), cache)}
    assert len(checkpoints) == 7
    for label, said in {
        "step2": "holds no weights (model.safetensors or pytorch_model.bin, whole or in shards); found there: config",
        "step4": "is no checkpoint: no config.json in it; found there: model.safetensors",
        "step8": "is no checkpoint: no config.json in it; found there: nothing",
    }.items():
        message = refusal(fetch, checkpoints[label], cache)
        assert said in message and str(series / label) in message
    for label in ("step0", "step1", "step1000", "step3000"):
        assert fetch(checkpoints[label], cache).weights


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"config.json": b'{"model_type": '}, "config.json is not JSON (Expecting value"),
        ({"config.json": b"\xff\xfe\x00"}, "config.json is not JSON"),
        ({"config.json": b"[" * 100_000}, "config.json is not JSON"),
        ({"config.json": b"[]"}, "config.json is no JSON object"),
        ({"model.safetensors.index.json": index(*SHARDS, "model-3.safetensors")}, "lacks model-3.safetensors, which"),
        (
            {"model.safetensors.index.json": index("../model.safetensors")},
            "names ../model.safetensors, which is no file",
        ),
        ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
        ({SHARDS[0]: b"version https://git-lfs.github.com/spec/v1\n"}, "is a Git LFS pointer"),
    ],
)
def test_broken_files_are_refused_by_name(broken: dict[str, bytes], said: str, tmp_path: Path, cache: Path) -> None:
    directory = written(tmp_path / "model", COMMON, SHARDED, broken)
    message = refusal(fetch, Checkpoint("model", -1, str(directory), str(directory)), cache)
    assert said in message and str(directory) in message


def test_a_directory_that_is_gone_is_refused(series: Path, cache: Path) -> None:
    [checkpoint] = resolve(str(series), ["step0"], cache)
    (series / "step0").rename(series / "moved")
    assert "the directory is not there" in refusal(fetch, checkpoint, cache)


def test_a_file_that_cannot_be_read_is_refused(series: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    checkpoint = resolve(str(series), ["step0"], cache)[0]
    assert "cannot be read: Input/output error" in refusal(lambda: fetch(checkpoint, cache).sha256)
    monkeypatch.setattr(Path, "iterdir", fail)
    monkeypatch.setattr(Path, "stat", fail)
    assert "step0 cannot be read: Input/output error" in refusal(fetch, checkpoint, cache)


# Files from the hub


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("main", SAFETENSORS),
        ("step1000", SAFETENSORS),
        ("step2000", SHARDED),
        ("step3000", BIN),
        ("step4000", SHARDED_BIN),
    ],
)
def test_only_what_is_needed_is_downloaded(label: str, expected: dict[str, bytes], hub: HubServer, cache: Path) -> None:
    files = fetch(on_hub(label), cache)
    assert contents(files) == COMMON | expected
    assert sorted(hub.downloads()) == sorted(COMMON | expected), "each once"
    assert files.sha256 == {name: sha256(data) for name, data in expected.items() if not name.endswith(".json")}
    assert files.commit == files.directory.name == hub.commit(REPO, label)


def test_a_name_without_owner_is_fetched_too(hub: HubServer, cache: Path) -> None:
    assert contents(fetch(on_hub("main", "gpt2"), cache)) == COMMON | SAFETENSORS


def test_what_is_in_the_cache_is_not_downloaded_again(hub: HubServer, cache: Path) -> None:
    first = [fetch(on_hub(label), cache) for label in ("step1000", "step2000")]
    hub.requests.clear()
    assert [fetch(on_hub(label), cache) for label in ("step1000", "step2000")] == first
    assert hub.downloads() == []


def test_a_known_commit_in_the_cache_needs_no_network_at_all(hub: HubServer, cache: Path) -> None:
    first = fetch(on_hub("step2000"), cache)
    hub.requests.clear()
    assert fetch(on_hub("step2000", commit=first.commit), cache) == first
    assert not hub.requests


def test_a_known_commit_is_fetched_after_the_revision_has_moved_on(hub: HubServer, cache: Path) -> None:
    commit = hub.commit(REPO, "step1000")
    hub.push(REPO, "later", dict(COMMON | BIN))
    hub.repos[REPO]["step1000"], moved = hub.repos[REPO]["later"], hub.commit(REPO, "step1000")
    assert hub.commit(REPO, "step1000") != commit == moved
    assert names(fetch(on_hub("step1000"), cache)) == ["pytorch_model.bin"]
    hub.push(REPO, "step1000", dict(COMMON | SAFETENSORS | CLUTTER))
    assert hub.commit(REPO, "step1000") == commit
    assert names(fetch(on_hub("step1000", commit=commit), cache)) == ["model.safetensors"]


def test_a_cache_that_lacks_the_tokenizer_of_a_known_commit_is_completed(hub: HubServer, cache: Path) -> None:
    files = fetch(on_hub("step1000"), cache)
    (files.directory / "tokenizer.json").unlink()
    assert (fetch(on_hub("step1000", commit=files.commit), cache).directory / "tokenizer.json").is_file()


def test_equal_files_of_two_revisions_are_downloaded_once(hub: HubServer, cache: Path) -> None:
    fetch(on_hub("step1000"), cache)
    hub.requests.clear()
    fetch(on_hub("main"), cache)
    assert hub.downloads() == []


def test_weights_whose_hash_the_hub_does_not_tell_are_hashed_here(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({REPO: {"main": COMMON | SAFETENSORS}}, large=(".none",)) as server:
        server.use_here(monkeypatch, tmp_path / "home")
        expected = {"model.safetensors": sha256(SAFETENSORS["model.safetensors"])}
        files = fetch(on_hub("main"), cache)
        assert files.sha256 == expected
        assert fetch(on_hub("main", commit=files.commit), cache).sha256 == expected
    huggingface_hub.close_session()


def test_without_a_network_the_cache_is_used_and_said_so(
    hub: HubServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = [fetch(on_hub(label), cache) for label in ("step2000", "step3000")]
    hub.stop()
    with caplog.at_level(logging.WARNING, "headlapse"):
        assert [fetch(on_hub(label), cache) for label in ("step2000", "step3000")] == first
    said = [record.getMessage() for record in caplog.records if record.name.startswith("headlapse")]
    assert len(said) == 2 and "owner/series step2000 is read from the cache" in said[0] and hub.url in said[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_out_of_order_is_no_reason_not_to_use_the_cache(status: int, hub: HubServer, cache: Path) -> None:
    first = fetch(on_hub("step1000"), cache)
    hub.status = status
    assert fetch(on_hub("step1000"), cache) == first
    message = refusal(fetch, on_hub("step3000"), cache)
    assert f"{hub.url} answers owner/series revision step3000 with status {status}" in message


def test_offline_mode_uses_the_cache_and_refuses_the_rest(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch(on_hub("step1000"), cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(on_hub("step1000"), cache) == first
    assert "HF_HUB_OFFLINE is set; unset it" in refusal(fetch, on_hub("step3000"), cache)


def test_an_incomplete_cache_without_a_network_is_refused_by_what_it_lacks(hub: HubServer, cache: Path) -> None:
    files = fetch(on_hub("step2000"), cache)
    files.weights[1].unlink()
    hub.stop()
    assert f"lacks {SHARDS[1]}" in refusal(fetch, on_hub("step2000"), cache)


def test_no_network_is_refused_with_the_endpoint_named(hub: HubServer, cache: Path) -> None:
    hub.stop()
    message = refusal(fetch, on_hub("step1000"), cache)
    assert message.startswith(f"{hub.url} cannot be reached for owner/series revision step1000")
    assert "Connection refused" in message and "check the network" in message
    assert "cannot be reached for owner/series (" in refusal(resolve, REPO, ["all"], cache)


def test_an_endpoint_that_is_no_hub_is_refused(hub: HubServer, cache: Path) -> None:
    hub.not_a_hub = True
    assert f"{hub.url} does not answer owner/series revision step1000 as a hub" in refusal(
        fetch, on_hub("step1000"), cache
    )


def test_a_wrong_repository_is_refused(hub: HubServer, cache: Path) -> None:
    message = refusal(fetch, on_hub("main", "owner/serious"), cache)
    assert message.startswith(f"owner/serious is neither a directory here nor a model at {hub.url}")
    assert "neither a directory here" in refusal(fetch, on_hub("main", "owner/a--b"), cache)


def test_a_wrong_revision_is_refused_with_near_ones(hub: HubServer, cache: Path) -> None:
    message = refusal(fetch, on_hub("step2500"), cache)
    assert "not among the 5 checkpoints of owner/series; near it are step2000, step3000;" in message
    assert "near it are main;" in refusal(fetch, on_hub("mian"), cache)


def test_a_gated_repository_is_refused_with_where_to_accept_and_how_to_log_in(hub: HubServer, cache: Path) -> None:
    hub.gated.add(REPO)
    message = refusal(fetch, on_hub("main"), cache)
    assert "is gated" in message and f"{hub.url}/{REPO}" in message and "hf auth login" in message


def test_a_private_repository_is_refused_with_how_to_log_in(hub: HubServer, cache: Path) -> None:
    hub.private.add(REPO)
    message = refusal(fetch, on_hub("main"), cache)
    assert "refuses access" in message and "hf auth login" in message


def test_an_index_that_names_a_shard_the_hub_lacks_is_refused(hub: HubServer, cache: Path) -> None:
    hub.push(REPO, "step2000", {name: data for name, data in (COMMON | SHARDED).items() if name != SHARDS[1]})
    assert f"model.safetensors.index.json names {SHARDS[1]}" in refusal(fetch, on_hub("step2000"), cache)


def test_a_revision_that_is_no_checkpoint_is_refused_with_what_was_found_there(hub: HubServer, cache: Path) -> None:
    hub.push(REPO, "main", dict(CLUTTER))
    message = refusal(fetch, on_hub("main"), cache)
    assert "no config.json in it; found there: README.md, flax_model.msgpack, onnx/model.onnx" in message
    hub.push(REPO, "main", dict(COMMON | CLUTTER))
    assert "holds no weights" in refusal(fetch, on_hub("main"), cache)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: HubServer, cache: Path) -> None:
    hub.cuts["model.safetensors"] = Cut(after=1500, times=2)
    files = fetch(on_hub("step1000"), cache)
    assert files.weights[0].read_bytes() == SAFETENSORS["model.safetensors"]
    assert hub.downloads().count("model.safetensors") == 3


def test_a_download_that_keeps_breaking_off_is_refused_and_finished_later(hub: HubServer, cache: Path) -> None:
    hub.cuts[SHARDS[1]] = Cut(after=0)
    message = refusal(fetch, on_hub("step2000"), cache)
    assert message.startswith(f"the download of owner/series revision step2000 from {hub.url} broke off (peer closed")
    assert message.endswith("run it again, files that are complete are kept")
    hub.cuts.clear()
    hub.requests.clear()
    assert names(fetch(on_hub("step2000"), cache)) == list(SHARDS)
    assert SHARDS[1] in hub.downloads() and "config.json" not in hub.downloads()


def test_a_file_of_the_wrong_size_is_refused_with_what_to_delete(hub: HubServer, cache: Path) -> None:
    files = fetch(on_hub("step1000"), cache)
    assert files.sha256, "hashed before they are changed"
    blob = files.weights[0].resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    message = refusal(fetch, on_hub("step1000"), cache)
    assert "the hub says" in message and f"delete {blob}" in message
    blob.unlink()
    assert fetch(on_hub("step1000"), cache) == files


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, "the disk is full; make room"), (errno.EROFS, "cannot be kept"), (errno.EIO, "run it again")],
)
def test_a_disk_that_takes_no_more_is_refused(
    code: int, said: str, hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> str:
        raise OSError(code, "the disk says so")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert said in refusal(fetch, on_hub("step1000"), cache)


def test_a_broken_config_on_the_hub_is_refused(hub: HubServer, cache: Path) -> None:
    hub.push(REPO, "main", COMMON | SAFETENSORS | {"config.json": b"<html>"})
    assert "config.json is not JSON" in refusal(fetch, on_hub("main"), cache)


@pytest.mark.thorough
def test_the_environment_says_where_the_hub_and_the_cache_are(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from headlapse.engine.checkpoints.fetch import fetch\n"
        "from headlapse.engine.checkpoints.resolve import resolve\n"
        f"[checkpoint] = resolve({REPO!r}, ['step2000'], Path('cache'))\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules), 'slow to start'\n"
        "print(fetch(checkpoint, Path('cache')).directory)"
    )
    env = hub.env(tmp_path / "other")
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "other" / "hub")
    assert done.stderr == "", "no bars where nobody watches"


# The plan


def test_a_plan_tells_what_is_on_disk_and_what_is_to_be_fetched(hub: HubServer, cache: Path) -> None:
    common = sum(map(len, COMMON.values()))
    size = len(SAFETENSORS["model.safetensors"])
    sharded, pickled = sum(map(len, SHARDED.values())), len(BIN["pytorch_model.bin"])
    checkpoints = [on_hub(label) for label in ("step1000", "step2000", "step3000", "main")]
    told = plan(checkpoints, cache)
    assert hub.downloads() == [] and hub.requests.total() == 4, "one request a checkpoint"
    assert [supply.checkpoint.commit for supply in told] == [hub.commit(REPO, c.label) for c in checkpoints]
    assert [supply.n_bytes for supply in told] == [size, sharded, pickled, size]
    assert [supply.to_fetch for supply in told] == [common + size, sharded, pickled, 0], "shared files count once"
    for label in ("step1000", "step2000"):
        fetch(on_hub(label), cache)
    told = plan(checkpoints, cache)
    assert [supply.to_fetch for supply in told] == [0, 0, pickled, 0]
    assert [supply.on_disk for supply in told] == [True, True, False, True]


def test_a_plan_names_the_checkpoints_that_cannot_be_had(hub: HubServer, series: Path, cache: Path) -> None:
    good, bad = plan([on_hub("step1000"), on_hub("step9000")], cache)
    assert good.problem is None and bad.problem and "near it are" in bad.problem and not bad.on_disk
    written(series / "step9", COMMON)
    told = {supply.checkpoint.label: supply for supply in plan(resolve(str(series), (), cache), cache)}
    assert "holds no weights" in (told["step9"].problem or "") and told["step0"].on_disk
    with pytest.raises(UserError, match="near it are"):
        plan([on_hub("step9000")], cache)


def test_a_plan_without_a_network_knows_what_is_in_the_cache(hub: HubServer, cache: Path) -> None:
    files = fetch(on_hub("step1000"), cache)
    hub.stop()
    held, lacking = plan([on_hub("step1000"), on_hub("step2000")], cache)
    assert held.on_disk and held.checkpoint.commit == files.commit
    assert lacking.problem and "cannot be reached" in lacking.problem


def test_a_plan_of_the_embedded_series_trains_nothing(demo: list[Path], cache: Path) -> None:
    checkpoints = resolve("demo", (), cache)
    assert plan(checkpoints, cache) == [Availability(checkpoint) for checkpoint in checkpoints]
    assert not demo and not plan(checkpoints, cache)[0].on_disk
    fetch(checkpoints[2], cache)
    assert [supply.n_bytes for supply in plan(checkpoints, cache)] == [len(weights())] * 4


def test_a_description_is_config_and_tokenizer_without_the_weights(
    hub: HubServer, series: Path, demo: list[Path], cache: Path
) -> None:
    described = description(on_hub("step2000"), cache)
    assert described and {path.name for path in described.directory.iterdir()} == set(COMMON)
    assert described.tokenizer == described.directory
    assert hub.downloads() == sorted(COMMON)
    [local] = resolve(str(series), ["step0"], cache)
    found = description(local, cache)
    assert found and found.directory == series / "step0"
    assert description(resolve("demo", (), cache)[0], cache) is None and not demo
    hub.stop()
    assert description(on_hub("step2000"), cache) == described


def test_a_plan_of_nothing_is_nothing(cache: Path) -> None:
    assert plan([], cache) == []
