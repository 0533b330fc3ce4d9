"""Laws of the machine: what may be asked of it, how amounts are told, and that fewer are tried where memory fails."""

import pytest
import torch

from headlapse.engine.machine import Machine, as_many_as_fit, most_of_memory, peak_memory, told_bytes, told_time
from headlapse.engine.study import Refusal


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GB", 8 * 10**9), ("500MB", 5 * 10**8), ("1.5G", 15 * 10**8), (" 2 gb ", 2 * 10**9), ("1kB", 1000), ("7", 7)],
)
def test_memory_is_a_number_with_a_unit(text: str, n_bytes: int) -> None:
    assert Machine.asked("cpu", text).memory == n_bytes


@pytest.mark.parametrize("text", ["much", "0", "0GB", "-1GB", "8GBB", "8 G B", "1e9", "GB"])
def test_what_is_no_amount_of_memory_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(Refusal, match="not an amount of memory; write 8GB"):
        Machine.asked("cpu", text)


def test_the_default_is_the_same_whatever_is_free_just_now() -> None:
    first = Machine.asked("cpu").memory
    held = torch.ones(2**24)
    assert Machine.asked("cpu").memory == first == most_of_memory("cpu") > held.nbytes


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(Refusal, match=f"--device {device}: torch cannot compute there"):
        Machine.asked(device)


def test_tf32_is_refused_where_nothing_computes_in_it() -> None:
    with pytest.raises(Refusal, match="--dtype tf32: cpu does not compute in it"):
        Machine.asked("cpu", dtype="tf32")


def test_peak_memory_never_falls() -> None:
    before = peak_memory("cpu")
    held = torch.ones(2**26)
    during = peak_memory("cpu")
    del held
    assert during - before >= 0 and during > 2**28 and peak_memory("cpu") >= during


@pytest.mark.parametrize(
    ("n_bytes", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (15 * 10**8, "1.5 GB"),
        (2 * 10**12, "2.0 TB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_bytes_are_told_in_the_unit_that_suits(n_bytes: int, told: str) -> None:
    assert told_bytes(n_bytes) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (172800, "2 days"),
        (4e10, "1,268 years"),
    ],
)
def test_time_is_told_in_the_unit_that_suits(seconds: float, told: str) -> None:
    assert told_time(seconds) == told


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
