"""Laws of the plan: it names every checkpoint, and what it says will be stored is what capture then writes."""

import shutil
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from headlapse.engine.capture import estimate as room
from headlapse.engine.capture.estimate import cost_of, describe
from headlapse.engine.capture.run import cache_series
from headlapse.engine.checkpoints.architecture import inspect_architecture, read_config
from headlapse.engine.checkpoints.availability import Availability
from headlapse.engine.checkpoints.resolve import Checkpoint, resolve
from headlapse.engine.checkpoints.tokenizer import load_tokenizer
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.store import Store
from headlapse.engine.study.prompts import draw_trials
from headlapse.engine.study.study import Study
from tests.models import save, tiny, tiny_tokenizer

pytestmark = pytest.mark.thorough

Usage = namedtuple("Usage", "total used free")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a model in which z, keys and the residual stream are all of different widths."""
    directory = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(("step0", "step10")):
        save(tiny("qwen3", seed), directory / label, tokenizer=tiny_tokenizer())
    return directory


def study_of(model: Path, sites: str = "all", dtype: str = "float32") -> Study:
    return Study(str(model), trials=3, sites=(sites,), dtype=dtype)  # type: ignore[arg-type]


def captured(study: Study, checkpoints: Sequence[Checkpoint], path: Path) -> Store:
    outcomes = list(cache_series(study, checkpoints, path, path.parent, Machine()))
    assert [outcome.problem for outcome in outcomes] == [None] * len(checkpoints)
    return Store(path)


def messages(text: str, label: str) -> str:
    """The plan's one line about a checkpoint."""
    [line] = [line for line in text.splitlines() if line.split()[0] == label]
    return line


@pytest.mark.parametrize("dtype", ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sites", ["all", "1", "z"])
def test_what_is_planned_to_be_stored_is_what_is_then_written(
    model: Path, tmp_path: Path, sites: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured, narrow numbers take seconds on processors that do not compute in them.
    monkeypatch.setattr(room, "matmul_rate", lambda *_: 1e10)
    study, path = study_of(model, sites, dtype), tmp_path / "s.zarr"
    checkpoints = resolve(study.model, [], tmp_path)
    body = inspect_architecture(read_config(model / "step0"))
    trials = draw_trials(study.task, study.trials, load_tokenizer(model / "step0"), body.context)
    planned = 2 * cost_of(study, body, trials).stored
    text = describe(study, checkpoints, tmp_path, path, "cpu")

    store = captured(study, checkpoints, path)

    arrays = [store.array(kind) for kind in store.kinds()]
    assert planned == sum(array.size * array.dtype.itemsize for array in arrays)
    files = [file for kind in store.kinds() for file in (path / kind / "c").rglob("*") if file.is_file()]
    on_disk = sum(file.stat().st_size for file in files)
    assert 0 <= on_disk - planned <= 100 * len(files), "uncompressed, and a shard's index besides"
    assert f"to store: {planned / 1000:.0f} kB\n" in text


def test_the_operations_are_two_a_parameter_and_token(model: Path, tmp_path: Path) -> None:
    body = inspect_architecture(read_config(model / "step0"))
    trials = draw_trials("decimal", 3, load_tokenizer(model / "step0"), body.context)
    n_parameters = sum(parameter.numel() for parameter in tiny("qwen3").parameters())
    n_tokens = 2 * 3 * trials.tokens.shape[-1]
    assert cost_of(study_of(model), body, trials).flops == 2 * n_parameters * n_tokens


def test_a_plan_names_every_checkpoint_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    study = study_of(model)
    text = describe(study, resolve(study.model, [], tmp_path), tmp_path, tmp_path / "deep" / "s.zarr", "cpu")
    head, *_ = text.splitlines()
    assert "decimal, float32: 2 checkpoints" in head and "s.zarr" in head
    assert messages(text, "step0").split()[1:3] == ["step", "0"] and messages(text, "step0").endswith("on disk")
    assert messages(text, "step10").split()[1:3] == ["step", "10"] and messages(text, "step10").endswith("on disk")
    assert "to fetch: 0 B" in text and "on cpu" in text
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_store_is_said_and_not_counted_again(model: Path, tmp_path: Path) -> None:
    study, path = study_of(model), tmp_path / "s.zarr"
    checkpoints = resolve(study.model, [], tmp_path)
    store = captured(study, checkpoints[:1], path)
    text = describe(study, checkpoints, tmp_path, path, "cpu")
    assert messages(text, "step0").endswith("in the store") and messages(text, "step10").endswith("on disk")
    one = sum(store.array(kind).nbytes for kind in store.kinds())
    assert f"to store: {one / 1000:.0f} kB\n" in text


def test_there_is_nothing_to_do_once_all_of_them_are_stored(model: Path, tmp_path: Path) -> None:
    study, path = study_of(model), tmp_path / "s.zarr"
    checkpoints = resolve(study.model, [], tmp_path)
    captured(study, checkpoints, path)
    text = describe(study, checkpoints, tmp_path, path, "cpu")
    assert text.splitlines()[-1] == "nothing to do: all of them are in the store"
    assert "to store" not in text and "to fetch" not in text


def test_a_disk_that_is_too_small_is_said_aloud(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, path = study_of(model), tmp_path / "not" / "yet" / "s.zarr"
    checkpoints = resolve(study.model, [], tmp_path)
    asked: list[Path] = []

    def usage(place: Path) -> Usage:
        asked.append(Path(place))
        return Usage(10_000, 8_800, 1_200)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    text = describe(study, checkpoints, tmp_path, path, "cpu")
    assert text.count("NOT ENOUGH: 1 kB are free") == 1
    assert asked[-1] == tmp_path, "the nearest folder that is there"
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: Usage(10**13, 0, 2 * 10**12))
    text = describe(study, checkpoints, tmp_path, path, "cpu")
    assert "NOT ENOUGH" not in text and ", 2.0 TB are free" in text


def test_what_a_hub_has_is_shown_with_its_commit_and_what_has_to_come(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's answers are made up; its manners are tested with `sources`."""
    study = study_of(model)
    first, second = (replace(checkpoint, commit=COMMIT) for checkpoint in resolve(study.model, [], tmp_path))
    unknown = replace(second, label="main", step=-1, commit=None)
    supplies = [
        Availability(first, 2_500_000, 2_400_000, lacks_files=True),
        Availability(second, 2_500_000, 0),
        Availability(unknown, None, None, lacks_files=True),
    ]
    monkeypatch.setattr(room, "plan", lambda _checkpoints, _cache: supplies)
    text = describe(study, [first, second, unknown], tmp_path, tmp_path / "s.zarr", "cpu")
    assert messages(text, "step0").endswith("2.5 MB, to be fetched at 0123456789")
    assert messages(text, "step10").endswith("2.5 MB, on disk at 0123456789")
    assert messages(text, "main").split(maxsplit=3)[1:] == ["step", "?", "size unknown, to be fetched"]
    assert "to fetch: 2.4 MB and files whose size the hub does not give, about 0 s at 50.0 MB/s" in text


def test_a_checkpoint_that_cannot_be_had_is_told_and_not_counted(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "step10" / "model.safetensors").unlink()
    study = study_of(copy)
    text = describe(study, resolve(study.model, [], tmp_path), tmp_path, tmp_path / "s.zarr", "cpu")
    assert "error: " in messages(text, "step10") and "holds no weights" in messages(text, "step10")
    assert "error" not in messages(text, "step0")
    one = captured(study, resolve(study.model, ["step0"], tmp_path), tmp_path / "s.zarr")
    assert f"to store: {sum(one.array(kind).nbytes for kind in one.kinds()) / 1000:.0f} kB\n" in text


def test_a_checkpoint_that_cannot_be_had_is_never_said_to_be_in_the_store(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "step10" / "model.safetensors").unlink()
    study, path = study_of(copy), tmp_path / "s.zarr"
    captured(study, resolve(study.model, ["step0"], tmp_path), path)
    text = describe(study, resolve(study.model, [], tmp_path), tmp_path, path, "cpu")
    assert messages(text, "step0").endswith("in the store") and "error: " in messages(text, "step10")
    assert "all of them are in the store" not in text
