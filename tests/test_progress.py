"""How a command says how far it is where nobody watches: few plain lines, and no time left that is made up."""

from collections.abc import Callable

import pytest

from headlapse.engine.runtime import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines_of(clock: list[float], capsys: pytest.CaptureFixture[str]) -> Callable[[list[float], int], list[str]]:
    """What is written while one unit of so many is completed at each of these times."""

    def written(seconds: list[float], total: int) -> list[str]:
        clock[0] = 0.0
        with progress.progress("cache", "checkpoint", total) as work:
            for second in seconds:
                clock[0] = second
                work.update(1)
        return capsys.readouterr().err.splitlines()

    return written


Lines = Callable[[list[float], int], list[str]]


def test_short_work_says_nothing(lines_of: Lines) -> None:
    assert lines_of([1.0, 2.0, 3.0], 15) == []


def test_the_time_between_lines_doubles(lines_of: Lines) -> None:
    lines = lines_of([float(second) for second in range(1, 1000)], 2000)
    assert [line.split(" of ")[0] for line in lines] == [f"cache: {n}" for n in (30, 60, 120, 240, 480, 960)]


def test_the_time_left_is_reckoned_from_the_second_unit_on(lines_of: Lines) -> None:
    """The first checkpoint of a series may bring a training of minutes along."""
    first, second = lines_of([120.0, 121.0, 241.0], 15)
    assert first == "cache: 1 of 15 checkpoints in 2 min"
    assert second == "cache: 3 of 15 checkpoints in 4 min, about 12 min left"


def test_nothing_is_left_to_say_at_the_end(lines_of: Lines) -> None:
    assert lines_of([100.0], 1) == []
