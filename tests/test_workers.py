"""Laws of several processes on one machine: what each may use of it, and that together they do what one does."""

import os
import shutil
from pathlib import Path

import pytest

from headlapse.engine.runtime import allotment
from headlapse.engine.runtime.allotment import gpus, n_cores
from headlapse.engine.store.store import Store
from headlapse.workers import environment_of
from tests.models import save, tiny, tiny_tokenizer
from tests.test_clusters import program
from tests.test_scripts import run
from tests.test_writers import files_of

LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-1ea4ab1e-9d3c-4f0b-8d1e-3a9a0f2b1c55)
"""
"""What nvidia-smi says of two GPUs of which the first is divided (NVIDIA's MIG guide, ids shortened nowhere)."""


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0,1", ["0", "1"]),
        ("3", ["3"]),
        (" 2 , 0", ["2", "0"]),
        ("GPU-5d5b,MIG-c6d4", ["GPU-5d5b", "MIG-c6d4"]),
        ("MIG-GPU-5d5b/1/0", ["MIG-GPU-5d5b/1/0"]),
        ("1,-1,2", ["1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_the_gpus_are_those_that_the_variable_leaves(visible: str, names: list[str]) -> None:
    assert gpus({"CUDA_VISIBLE_DEVICES": visible}) == names


def test_else_they_are_all_that_nvidia_smi_lists_and_of_a_divided_one_its_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allotment, "_DRIVERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus({}) == [], "no driver"
    program(tmp_path / "nvidia-smi", f"echo '{LISTED}'")
    assert [name[:8] for name in gpus({}) or ()] == ["MIG-c6d4", "MIG-cba6", "GPU-1ea4"]
    program(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert gpus({}) == []


def test_where_only_torch_can_tell_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allotment, "_DRIVERS", (str(tmp_path),))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpus({}) is None
    assert [environment_of(number, 3, None)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["0", "1", "0"]


def test_each_process_has_one_gpu_in_turn_unless_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-7")
    for device in (None, "cuda"):
        pinned = [environment_of(number, 3, device)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
        assert pinned == ["4", "MIG-7", "4"]
    for device in ("cpu", "cuda:1"):
        assert environment_of(1, 3, device)["CUDA_VISIBLE_DEVICES"] == "4,MIG-7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment_of(1, 3, None)["CUDA_VISIBLE_DEVICES"] == ""


def test_the_cores_that_may_be_used_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headlapse.workers.n_cores", lambda: 10)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [environment_of(0, n, "cpu")["OMP_NUM_THREADS"] for n in (1, 3, 20)] == ["10", "3", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [environment_of(0, n, "cpu")["OMP_NUM_THREADS"] for n in (1, 3, 20)] == ["2", "2", "1"]


def test_cores_are_those_of_the_affinity_of_a_containers_quota_and_of_slurms_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(3, 15)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    quota, period, together = tmp_path / "quota", tmp_path / "period", tmp_path / "max"
    monkeypatch.setattr(allotment, "_QUOTAS", ((str(together),), (str(quota), str(period))))
    assert n_cores() == 12
    for text, n in (("max 100000", 12), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 12)):
        together.write_text(f"{text}\n")
        assert n_cores() == n
    together.unlink()
    quota.write_text("-1\n")
    period.write_text("100000\n")
    assert n_cores() == 12
    quota.write_text("400000\n")
    assert n_cores() == 4
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert n_cores() == 2


def test_the_memory_is_that_of_slurms_job(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = allotment.memory()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert allotment.memory() == 100 * 2**20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(2**40))
    assert allotment.memory() == everything
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "50")
    monkeypatch.setattr(allotment, "n_cores", lambda: 3)
    assert allotment.memory() == 150 * 2**20


@pytest.mark.slow
def test_two_processes_do_together_what_one_does_and_what_one_cannot_is_said_once(tmp_path: Path) -> None:
    series = tmp_path / "series"
    for seed in range(4):
        save(tiny("neox-parallel", seed), series / f"step{seed}", tokenizer=tiny_tokenizer())
    words = ("--model", series, "--trials", 3)
    assert run("cache", *words, "--store", tmp_path / "one.zarr", cache=tmp_path).returncode == 0
    broken = series / "step4"
    shutil.copytree(series / "step3", broken)
    (broken / "config.json").write_text("{")
    two = tmp_path / "two.zarr"
    done = run("cache", *words, "--store", two, "--workers", "local:2", cache=tmp_path)
    assert done.returncode == 1 and list(Store(two).complete()) == [f"step{step}" for step in range(4)]
    assert done.stderr.count("error: step4") == 1, done.stderr
    chunks = {name: data for name, data in files_of(tmp_path / "one.zarr").items() if name.startswith("z/c/")}
    assert chunks and {name: files_of(two)[name] for name in chunks} == chunks
