"""Laws of the writing behind: outcomes keep their order, and what fails is told where it belongs."""

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headlapse.engine.capture import run as room
from headlapse.engine.capture.run import _write_behind, cache_series, pending
from headlapse.engine.checkpoints.loader import ModelLoader
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.outcome import Outcome
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.inventory import problems_of
from headlapse.engine.store.store import Store
from headlapse.engine.study.study import Study
from tests.models import save, tiny, tiny_tokenizer
from tests.test_scripts import store_files

LABELS = ["step0", "step10", "step20"]
Job = tuple[Outcome, Callable[[], None]]


def fail(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_each_outcome_comes_in_order_and_after_its_work() -> None:
    written: list[str] = []

    def jobs() -> Iterator[Job]:
        for label in "abc":
            yield Outcome(label), lambda label=label: written.append(label)  # type: ignore[misc]

    for outcome in _write_behind(jobs()):
        assert outcome.label in written
    assert written == ["a", "b", "c"]


def test_work_that_is_refused_is_that_checkpoints_problem_and_the_others_go_on() -> None:
    jobs: list[Job] = [
        (Outcome("a"), lambda: None),
        (Outcome("b"), fail(UserError("no room"))),
        (Outcome("c"), lambda: None),
    ]
    assert [(one.label, one.problem) for one in _write_behind(jobs)] == [("a", None), ("b", "no room"), ("c", None)]


def test_a_full_disk_is_the_problem_of_those_that_met_it() -> None:
    jobs: list[Job] = [
        (Outcome("a"), fail(OSError(errno.ENOSPC, "No space left on device"))),
        (Outcome("b"), lambda: None),
    ]
    first, second = _write_behind(jobs)
    assert "No space left on device; make room" in str(first.problem) and not first.by_input
    assert second.problem is None


def test_what_was_given_to_be_written_is_written_though_the_next_capture_fails() -> None:
    written: list[str] = []

    def jobs() -> Iterator[Job]:
        yield Outcome("a"), lambda: written.append("a")
        raise RuntimeError("the next capture")

    with pytest.raises(RuntimeError, match="the next capture"):
        list(_write_behind(jobs()))
    assert written == ["a"]


def test_work_goes_on_while_the_next_is_made() -> None:
    making, met = threading.Event(), list[bool]()

    def jobs() -> Iterator[Job]:
        yield Outcome("a"), lambda: met.append(making.wait(5))
        making.set()
        yield Outcome("b"), lambda: None

    assert len(list(_write_behind(jobs()))) == 2 and met == [True]


def test_what_there_was_to_say_of_a_refused_checkpoint_is_said_all_the_same() -> None:
    jobs: list[Job] = [(Outcome("a", notes=("two prompts are alike",)), fail(UserError("no room")))]
    assert list(_write_behind(jobs)) == [Outcome("a", "no room", ("two prompts are alike",))]


def test_who_stops_listening_leaves_no_work_undone_behind() -> None:
    written: list[str] = []

    def jobs() -> Iterator[Job]:
        for label in "abc":
            yield Outcome(label), lambda label=label: written.append(label)  # type: ignore[misc]

    outcomes = _write_behind(jobs())
    assert next(outcomes).label == "a"
    outcomes.close()  # type: ignore[attr-defined]
    threads = [thread.name for thread in threading.enumerate()]
    assert "a" in written and not [name for name in threads if name.startswith("write")]


# A whole series


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), directory / label, tokenizer=tiny_tokenizer())
    return directory


def cached(model: Path, path: Path) -> Iterator[Outcome]:
    """Capture what the store lacks."""
    study = Study(str(model), trials=3)
    missing = pending(study, resolve(study.model, (), path.parent), path)
    return cache_series(study, missing, path, path.parent, Machine())


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    assert [outcome.problem for outcome in cached(model, path)] == [None] * 3
    return path


def fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, which: str | int, error: Exception
) -> threading.Event:
    """Fail at the call that names `which`, or at that call of all; what is set when it does."""
    does, failed, n_calls = getattr(owner, name), threading.Event(), 0

    def call(*given: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if which == n_calls or (isinstance(which, str) and which in given):
            failed.set()
            raise error
        return does(*given)

    monkeypatch.setattr(owner, name, call)
    return failed


@pytest.mark.thorough
def test_a_checkpoint_that_the_store_refuses_is_a_problem_and_the_others_are_captured(
    model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    with monkeypatch.context() as patch:
        fail_at(patch, Store, "write", "step10", UserError("it does not fit"))
        outcomes = list(cached(model, path))
    assert [(one.label, one.problem) for one in outcomes] == [
        ("step0", None), ("step10", "it does not fit"), ("step20", None),
    ]  # fmt: skip
    assert Store(path).complete() == {"step0": 0, "step20": 2}
    assert problems_of(Store(path)) == {"step10": "it does not fit"}
    assert [outcome.label for outcome in cached(model, path)] == ["step10"]
    assert store_files(path) == store_files(undisturbed) and problems_of(Store(path)) == {}


def test_what_failed_before_there_was_a_store_is_kept_in_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, ModelLoader, "load_weights", 1, UserError("no such weights"))
        assert [one.problem for one in cached(model, tmp_path / "s.zarr")] == ["no such weights", None, None]
    assert problems_of(Store(tmp_path / "s.zarr")) == {"step0": "no such weights"}


def test_a_problem_that_the_disk_does_not_take_either_is_noted_and_the_others_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        fail_at(patch, Store, "write", "step10", full)
        fail_at(patch, Store, "write_problem", "step10", full)
        outcomes = list(cached(model, tmp_path / "s.zarr"))
    assert ["make room" in str(one.problem) for one in outcomes] == [False, True, False]
    [note] = outcomes[1].notes
    assert "why step10 failed is not kept" in note and "No space left on device" in note


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_what_was_written_then(
    model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    with monkeypatch.context() as patch:
        fail_at(patch, Store, "write", "step10", OSError(errno.ENOSPC, "No space left on device"))
        outcomes = list(cached(model, path))
    assert [one.label for one in outcomes if one.problem and "make room" in one.problem] == ["step10"]
    assert Store(path).complete() == {"step0": 0, "step20": 2}
    assert [(one.label, one.problem) for one in cached(model, path)] == [("step10", None)]
    assert store_files(path) == store_files(undisturbed)


@pytest.mark.thorough
def test_a_capture_that_breaks_leaves_the_checkpoint_before_it_written_whole(
    model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it breaks before that checkpoint's first array is written."""
    path, write = tmp_path / "s.zarr", Store.write
    with monkeypatch.context() as patch:
        broken = fail_at(patch, room, "capture", 2, RuntimeError("the second capture"))

        def write_late(*given: Any) -> None:
            assert broken.wait(5)
            write(*given)

        patch.setattr(Store, "write", write_late)
        outcomes = list(cached(model, path))
    assert [one.problem for one in outcomes] == [None, "RuntimeError: the second capture", None]
    assert Store(path).complete() == {"step0": 0, "step20": 2}
    assert [(one.label, one.problem) for one in cached(model, path)] == [("step10", None)]
    assert store_files(path) == store_files(undisturbed)
