"""Laws of the machine: what may be asked of it, how amounts are written, that fewer are tried where memory fails."""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from headlapse.engine.runtime import resources as room
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.format import format_bytes, format_time
from headlapse.engine.runtime.resources import (
    Machine,
    as_many_as_fit,
    default_memory,
    matmul_rate,
    peak_memory,
)

UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "s": 1, "min": 60, "h": 3600, "days": 86_400, "years": 31_557_600,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GB", 8 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5G", 15 * 10**8),
        ("2T", 2 * 10**12),
        (" 2 gb ", 2 * 10**9),
        ("0.5 kb", 500),
        ("1kB", 1000),
        ("7", 7),
    ],
)
def test_memory_is_a_number_with_a_unit(text: str, n_bytes: int) -> None:
    assert Machine.from_options("cpu", text).memory == n_bytes


@pytest.mark.parametrize("text", ["much", "0", "0GB", "-1GB", "8GBB", "8 G B", "1e9", "GB"])
def test_what_is_no_amount_of_memory_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(UserError, match="not an amount of memory; write 8GB"):
        Machine.from_options("cpu", text)


def test_the_default_is_the_same_whatever_is_free_just_now() -> None:
    first = Machine.from_options("cpu").memory
    tensor = torch.ones(2**24)
    assert Machine.from_options("cpu").memory == first == default_memory("cpu") > tensor.nbytes


def test_the_default_is_three_quarters_of_all_that_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (10**9, 15 * 10**9):
        memory = SimpleNamespace(total=16 * 10**9, available=available, free=available, used=16 * 10**9 - available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert Machine.from_options("cpu").memory == 12 * 10**9


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta:x", "meta", "-1", "gpu"])
def test_a_device_that_is_not_there_is_refused_in_a_line_with_one_that_is(device: str) -> None:
    with pytest.raises(UserError, match=f"^--device {device}: torch cannot compute there .*; use cpu$"):
        Machine.from_options(device, "1GB")


def test_the_device_is_the_one_asked_for_and_the_fastest_where_none_is() -> None:
    assert Machine.from_options("cpu", "1GB") == Machine("cpu", 10**9)
    assert Machine.from_options(None, "1GB").kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert Machine("cuda:3").kind == "cuda" and Machine("cpu").kind == "cpu"


def test_tf32_is_refused_where_nothing_computes_in_it() -> None:
    with pytest.raises(UserError, match="--dtype tf32: cpu does not compute in it"):
        Machine.from_options("cpu", dtype="tf32")


def test_peak_memory_grows_with_what_is_allocated_beyond_it_and_never_falls() -> None:
    before = peak_memory("cpu")
    below = before - psutil.Process().memory_info().rss
    tensor = torch.ones(below // 4 + 2**26)
    during = peak_memory("cpu")
    assert 2**27 < during - before < 2**29
    del tensor
    assert peak_memory("cpu") >= during


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_400, "999 kB"),
        (10**6, "1.0 MB"),
        (999_900_000, "999.9 MB"),
        (10**9, "1.0 GB"),
        (15 * 10**8, "1.5 GB"),
        (999_900_000_000, "999.9 GB"),
        (10**12, "1.0 TB"),
        (2 * 10**12, "2.0 TB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_suits(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (172600, "47.9 h"),
        (172800, "2 days"),
        (730 * 86400 - 86400, "729 days"),
        (730 * 86400, "2 years"),
        (4e10, "1,268 years"),
    ],
)
def test_time_is_written_in_the_unit_that_suits(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


@pytest.mark.parametrize("formatted", [format_bytes, format_time])
def test_what_is_written_is_the_amount_rounded_to_its_last_digit(formatted: Callable[[float], str]) -> None:
    for amount in 10 ** np.random.default_rng(0).uniform(0, 14, 2000):
        text = formatted(float(amount))
        match = re.fullmatch(r"([\d,]+)(\.\d)? (\w+)", text)
        assert match, text
        number, unit = float(match[1].replace(",", "") + (match[2] or "")), UNITS[match[3]]
        assert number >= 1 and abs(number - amount / unit) <= (0.05 if match[2] else 0.5) + 1e-9 * number


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_every_arithmetic_has_a_rate(dtype: torch.dtype) -> None:
    assert 0 < matmul_rate("cpu", dtype) < math.inf


def test_the_rate_is_operations_over_the_seconds_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    # A product, and then one that takes a quarter of a second by this clock.
    clock = iter([0.0, 9.0, 10.0, 15.0, 20.0, 20.25])
    monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert matmul_rate("cpu", torch.float32) == 2 * 512 * 1024 * 1024 / 0.25


def test_fewer_are_tried_only_where_the_devices_memory_fails() -> None:
    tried: list[int] = []

    def run(n: int) -> int:
        tried.append(n)
        if n > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return n

    assert as_many_as_fit(run, 4) == 4 and tried == [4]
    tried.clear()
    assert 1 <= as_many_as_fit(run, 64) <= 5 and tried[0] == 64 and tried == sorted(tried, reverse=True)

    def broken(_n: int) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        as_many_as_fit(broken, 8)
