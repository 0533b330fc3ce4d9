"""Laws of the writing behind: outcomes keep their order, and what fails is told where it belongs."""

import errno
from collections.abc import Callable, Iterator

import pytest

from headlapse.engine.series import Outcome, _behind
from headlapse.engine.study import Refusal

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

    for outcome in _behind(jobs()):
        assert outcome.label in written
    assert written == ["a", "b", "c"]


def test_work_that_is_refused_is_that_checkpoints_problem_and_the_others_go_on() -> None:
    jobs: list[Job] = [
        (Outcome("a"), lambda: None),
        (Outcome("b"), fail(Refusal("no room"))),
        (Outcome("c"), lambda: None),
    ]
    assert [(one.label, one.problem) for one in _behind(jobs)] == [("a", None), ("b", "no room"), ("c", None)]


def test_a_full_disk_comes_out() -> None:
    jobs: list[Job] = [
        (Outcome("a"), fail(OSError(errno.ENOSPC, "No space left on device"))),
        (Outcome("b"), lambda: None),
    ]
    with pytest.raises(OSError, match="No space left"):
        list(_behind(jobs))


def test_what_was_given_to_be_written_is_written_though_the_next_capture_fails() -> None:
    written: list[str] = []

    def jobs() -> Iterator[Job]:
        yield Outcome("a"), lambda: written.append("a")
        raise RuntimeError("the next capture")

    with pytest.raises(RuntimeError, match="the next capture"):
        list(_behind(jobs()))
    assert written == ["a"]
