"""Laws of clusters: jobs do together what one process does, and what becomes of a job is said by who waits for it."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import headlapse
from headlapse import jobs, slurm
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.store.store import Store
from headlapse.jobs import Answer, Share
from headlapse.options import CacheOptions, MechanismOptions, PatchOptions
from headlapse.slurm import FORGOTTEN, JobState, Slurm, parse_request
from tests import one_node
from tests.models import save, tiny, tiny_tokenizer
from tests.test_docs import read
from tests.test_scripts import ROOT, messages, run
from tests.test_writers import files_of

LABELS = tuple(f"step{step}" for step in range(8))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), folder / label, tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def alone(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process writes."""
    cache = tmp_path_factory.mktemp("alone")
    assert run("cache", "--model", series, "--trials", 3, "--store", cache / "s.zarr", cache=cache).returncode == 0
    return cache / "s.zarr"


# Words


def test_words_become_what_sbatch_is_told() -> None:
    asked = parse_request(
        "slurm:partition=gpu,account=me,qos=low,constraint=a100&ib,gpus=a100:1,cpus=8,mem=32GB,jobs=9"
    )
    assert asked.n_jobs == 9
    assert asked.parameters == {
        **{"partition": "gpu", "account": "me", "qos": "low", "constraint": "a100&ib", "gpus_per_node": "a100:1"},
        **{"cpus_per_task": 8, "mem": "32G", "time": slurm.MINUTES},
    }
    assert parse_request("slurm:") == slurm.JobRequest("slurm:", slurm.N_JOBS, {"time": slurm.MINUTES})


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("1-12", 2160), ("1-12:30", 2190), ("0-0:0:1", 1), ("0:30", 1)],
)
def test_a_time_limit_has_one_of_the_forms_that_slurm_knows(text: str, minutes: int) -> None:
    assert parse_request(f"slurm:time={text}").parameters["time"] == minutes


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("slurm:nodes=2", "nodes=2 is not understood; write slurm:KEY=VALUE,... with the keys partition, account, qos"),
        ("slurm:partition", "partition is not understood"),
        ("slurm:mem=1G,mem=2G", "mem=2G is given twice"),
        ("slurm:gpus=2", "gpus=2: write 0, 1, or a type and 1, e.g. a100:1: a job computes on one GPU"),
        ("slurm:time=soon", "time=soon: write a time limit"),
        ("slurm:time=0", "time=0: write a time limit"),
        ("slurm:mem=much", "mem=much: write memory"),
        ("slurm:cpus=0", "cpus=0: write a number of cores"),
        ("slurm:jobs=1001", "jobs=1001: write how many jobs share the checkpoints, from 1 to 1,000"),
        ("ray:somewhere", "write local:N, e.g. local:4, or slurm:KEY=VALUE,..."),
    ],
)
def test_words_that_no_cluster_is_told_are_refused_by_every_command(words: str, found: str) -> None:
    for options in (CacheOptions(workers=words), PatchOptions(workers=words), MechanismOptions(workers=words)):
        with pytest.raises(UserError) as refused:
            options.refuse_impossible()
        assert str(refused.value).startswith(f"--workers {words}: ") and found in str(refused.value)


def test_what_is_refused_needs_no_torch() -> None:
    words = [["cache", "--workers", "slurm:nodes=2"], ["patch", "--workers", "slurm:jobs=2"]]
    code = f"from headlapse.__main__ import main; import sys; print([*map(main, {words})], 'torch' in sys.modules)"
    env = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "[2, 2] False\n" and done.stderr.count("\n") == 2, done.stderr


def test_where_no_job_can_be_submitted_it_says_what_is_lacking_and_what_needs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = CacheOptions(workers="slurm:partition=gpu")
    with pytest.raises(UserError, match=r"no sbatch, srun, scontrol, scancel in PATH; .* --shard, which needs nothing"):
        asked.refuse_impossible()
    for name in ("sbatch", "srun", "scontrol", "scancel"):
        program(tmp_path / name, "exit 0")
    asked.refuse_impossible()
    monkeypatch.setattr(slurm, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"submitit is not installed; pip install 'headlapse\[slurm\]' brings it"):
        asked.refuse_impossible()


def test_jobs_take_no_shard_and_replace_nothing_and_keep_what_they_fetch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("headlapse.options.refuse_absent", lambda _words: None)
    with pytest.raises(UserError, match="--keep-weights: jobs keep what they fetch; start each share by --shard"):
        CacheOptions(workers="slurm:", keep_weights=2).refuse_impossible()
    with pytest.raises(UserError, match="leave --shard out"):
        CacheOptions(workers="slurm:", shard="0/2").refuse_impossible()
    for options in (CacheOptions, PatchOptions, MechanismOptions):
        with pytest.raises(UserError, match=r"remove the old \(headlapse rm\) and leave --overwrite out"):
            options(workers="slurm:", overwrite=True).refuse_impossible()


def program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


# What SLURM says

SHOWN = """\
JobId=4 ArrayJobId=4 ArrayTaskId=4-5,7%3 JobName=x JobState=PENDING Reason=Priority ExitCode=0:0 NodeList=
JobId=8 ArrayJobId=4 ArrayTaskId=2 JobName=x JobState=RUNNING Reason=None ExitCode=0:0 ReqNodeList=(null) NodeList=n1
JobId=7 ArrayJobId=4 ArrayTaskId=1 JobName=x JobState=FAILED Reason=NonZeroExitCode ExitCode=137:0 NodeList=n2
"""


def test_scontrol_is_asked_first_and_sacct_for_what_it_has_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program(
        tmp_path / "scontrol", f"[ $4 = 4 ] && echo {shlex.quote(SHOWN)} && exit", "echo Invalid job id >&2; exit 1"
    )
    program(tmp_path / "sacct", "echo '4_0|OUT_OF_MEMORY|n3|0:125'; echo '4_1|RUNNING|n3|0:0'")
    cluster = Slurm.__new__(Slurm)
    assert cluster.states(["4_0", "4_1", "4_2", "4_5", "4_7", "9"]) == {
        "4_0": JobState("OUT_OF_MEMORY", "n3", "0:125"),
        "4_1": JobState("FAILED", "n2", "137:0"),
        "4_2": JobState("RUNNING", "n1", "0:0"),
        **dict.fromkeys(["4_5", "4_7"], JobState("PENDING", "", "0:0")),
        "9": JobState(FORGOTTEN),
    }
    program(tmp_path / "scontrol", "echo Unable to contact slurm controller >&2; exit 1")
    assert cluster.states(["4_0", "9"]) == {}, "who does not answer now may answer later"


# Jobs that are none, to see what is made of them


class Fate:
    """A cluster in which everything that happens to a job is laid down: it answers, or SLURM tells how it died."""

    def __init__(self, folder: Path, *states: JobState | None) -> None:
        self.folder, self.fates = folder, list(states)
        self.known: dict[str, JobState] = {}
        self.submitted: list[Share] = []
        self.cancelled: list[str] = []

    def submit(self, shares: Sequence[Share]) -> list[Any]:
        return [self._submit(share) for share in shares]

    def _submit(self, share: Share) -> Any:
        name, fate = str(len(self.submitted)), self.fates.pop(0) if self.fates else None
        self.submitted.append(share)
        paths = SimpleNamespace(stderr=self.folder / f"{name}.err", result_pickle=self.folder / f"{name}.pkl")
        answer: Answer | None = None
        if fate is None:
            answer = share()
            paths.result_pickle.touch()
        self.known[name] = fate or JobState("COMPLETED")
        if fate:
            paths.stderr.write_text("submitit INFO starting\nthe last thing it said\n")
        return SimpleNamespace(job_id=name, paths=paths, exception=lambda: None, result=lambda: answer)

    def states(self, names: Sequence[str]) -> Mapping[str, JobState]:
        return {name: self.known[name] for name in names}

    def cancel(self, names: Sequence[str]) -> None:
        self.cancelled += names


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for what is on this machine."""
    monkeypatch.setattr(jobs, "LOOK", 0.01)
    monkeypatch.setattr(jobs, "ASK", 0.01)


@pytest.fixture
def fated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Callable[..., Fate]:
    def fated(*states: JobState | None) -> Fate:
        cluster = Fate(tmp_path, *states)
        monkeypatch.setattr(jobs, "cluster_for", lambda *_asked: cluster)
        monkeypatch.setattr("headlapse.options.refuse_absent", lambda _words: None)
        return cluster

    return fated


@pytest.mark.slow
def test_every_command_hands_what_is_missing_to_jobs_and_gets_what_one_process_writes(
    alone: Path, series: Path, tmp_path: Path, fated: Callable[..., Fate]
) -> None:
    cluster = fated()
    store = headlapse.cache(series, trials=3, store=tmp_path / "s.zarr", workers="slurm:jobs=3")
    assert [share.labels for share in cluster.submitted] == [LABELS[0::3], LABELS[1::3], LABELS[2::3]]
    assert files_of(store.path) == files_of(alone)
    one, two = headlapse.open(shutil.copytree(alone, tmp_path / "one.zarr")), list(LABELS[:2])
    for other, workers in ((one, None), (store, "slurm:jobs=2")):
        other.patch(subsets="even", layers=1, name="r", checkpoints=two, workers=workers)
        other.mechanism(parts="weights", checkpoints=two, workers=workers)
    assert [share.command for share in cluster.submitted[3:]] == ["patch", "patch", "mechanism", "mechanism"]
    assert files_of(store.path) == files_of(one.path)
    store.patch(subsets="even", layers=1, name="r", checkpoints=two, workers="slurm:jobs=2")
    assert len(cluster.submitted) == 7, "nothing is missing, and no job is submitted"


@pytest.mark.slow
def test_how_a_job_died_is_said_for_each_checkpoint_that_it_left_with_its_last_line_and_log(
    series: Path, tmp_path: Path, fated: Callable[..., Fate]
) -> None:
    fated(
        JobState("OUT_OF_MEMORY", "n1", "0:125"), None, JobState("FAILED", "n2", "137:0"), JobState("CANCELLED", "n3")
    )
    store = tmp_path / "s.zarr"
    words = ("--model", series, "--trials", 3, "--store", store, "--workers", "slurm:jobs=4")
    done = run("cache", *words, cache=tmp_path)
    assert done.returncode == 1 and "cached 2 checkpoints" in done.stdout and "on 4 jobs on cpu" in done.stdout
    assert list(Store(store).complete()) == [LABELS[1], LABELS[5]]
    said = "; its last line: the last thing it said; log: {}/{}.err; {}"
    again = "the same command does what is left"
    memory = said.format(tmp_path, 0, "ask for more in --workers, e.g. mem=64G")
    assert messages(done) == [
        f"error: step0, step4: job 0 n1 ended as OUT_OF_MEMORY{memory}",
        f"error: step2, step6: job 2 n2 ended as FAILED, killed by signal 9{said.format(tmp_path, 2, again)}",
        f"error: step3, step7: job 3 n3 ended as CANCELLED{said.format(tmp_path, 3, again)}",
    ]
    assert "[2] the last thing it said" in done.stderr and "submitit INFO" not in done.stderr
    assert run("cache", *words, cache=tmp_path).returncode == 0 and list(Store(store).complete()) == list(LABELS)


@pytest.mark.slow
def test_what_was_preempted_is_submitted_again_so_many_times(
    series: Path, tmp_path: Path, fated: Callable[..., Fate]
) -> None:
    words = ("--model", series, "--trials", 3, "--store", tmp_path / "s.zarr", "--workers", "slurm:jobs=1")
    preempted = JobState("PREEMPTED", "n1", "0:15")
    cluster = fated(*[preempted] * (1 + jobs.RESUBMISSIONS))
    done = run("cache", *words, cache=tmp_path)
    assert done.returncode == 1 and "job 3 n1 ended as PREEMPTED" in done.stderr
    assert len(cluster.submitted) == 4 and len(set(cluster.submitted)) == 1
    cluster = fated(preempted, JobState("NODE_FAIL", "n1"))
    assert run("cache", *words, cache=tmp_path).returncode == 0
    assert len(cluster.submitted) == 3 and not cluster.cancelled


def test_what_is_not_taken_again_is_told_beside_how_it_ended(
    tmp_path: Path, fated: Callable[..., Fate], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = fated(JobState("PREEMPTED"))
    submit = cluster.submit

    def once(shares: Sequence[Share]) -> list[Any]:
        if cluster.submitted:
            raise UserError("sbatch: no more")
        return submit(shares)

    monkeypatch.setattr(cluster, "submit", once)
    asked = CacheOptions(workers="slurm:jobs=1")
    gathered = jobs.run_jobs("cache", asked, tmp_path, tmp_path / "s.zarr", ["a", "b"])
    assert [*gathered.reasons] == ["a", "b"] and gathered.device == "1 job"
    assert str(gathered.reasons["a"].problem).startswith(
        "job 0 ended as PREEMPTED; its last line: the last thing it said"
    )
    assert str(gathered.reasons["b"].problem).endswith("; it was not taken again: sbatch: no more")


def test_leaving_early_cancels_the_jobs_that_are_left(
    tmp_path: Path, fated: Callable[..., Fate], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = fated(JobState("FAILED"), JobState("RUNNING"))

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_jobs("cache", CacheOptions(workers="slurm:"), tmp_path, tmp_path / "s.zarr", ["a", "b"])
    assert cluster.cancelled == ["1"] and capsys.readouterr().err.endswith("cancelled 1\n")


# Jobs of submitit on this machine, and of a SLURM of one node


class LocalCluster:
    """Jobs as submitit starts them on this machine."""

    def __init__(self, folder: Path) -> None:
        from submitit import LocalExecutor

        self.executor, self.jobs = LocalExecutor(folder), {}  # type: ignore[var-annotated]
        self.executor.update_parameters(timeout_min=5)

    def submit(self, shares: Sequence[Share]) -> list[Any]:
        submitted = [self.executor.submit(share) for share in shares]
        self.jobs |= {job.job_id: job for job in submitted}
        return submitted

    def states(self, names: Sequence[str]) -> Mapping[str, JobState]:
        ends = {"INTERRUPTED": "CANCELLED", "FINISHED": "FAILED"}  # unless there is an answer
        return {name: JobState(ends.get(self.jobs[name].state, "RUNNING")) for name in names}

    def cancel(self, names: Sequence[str]) -> None:
        for name in names:
            self.jobs[name].cancel()


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs import what this process does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


@pytest.mark.slow
def test_a_share_goes_into_a_job_of_submitits_and_its_answer_comes_back(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, importable: None
) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "series").mkdir()
    for label in LABELS[:2]:
        (tmp_path / "series" / label).symlink_to(series / label)
    (tmp_path / "series" / "step9").mkdir()
    (tmp_path / "series" / "step9" / "config.json").write_text("{")
    monkeypatch.setattr(jobs, "cluster_for", lambda _asked, _name, folder: LocalCluster(folder))
    monkeypatch.setattr("headlapse.options.refuse_absent", lambda _words: None)
    words = ("--model", tmp_path / "series", "--trials", 3, "--store", tmp_path / "s.zarr", "--workers", "slurm:jobs=1")
    done = run("cache", *words, "--checkpoints", "all", cache=tmp_path)
    assert done.returncode == 1 and list(Store(tmp_path / "s.zarr").complete()) == list(LABELS[:2]), done.stderr
    assert [line.partition(":")[2].partition(":")[0] for line in messages(done)] == [" step9"]
    assert "config.json" in messages(done)[0] and "ended, 2 of 3 checkpoints" in done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a real SLURM."""
    if lacking := one_node.lacking():
        pytest.skip(f"no SLURM is installed here (Debian: apt-get install slurm-wlm): no {lacking}")
    with one_node.one_node(tmp_path_factory.mktemp("slurm"), n_cores=4) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield env


def running(env: Mapping[str, str]) -> list[str]:
    return sorted(one_node.ask(dict(env), "squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split())


def process_of(task: str) -> int:
    """The number of the process that does a task of a job array."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        is_python = b"submitit.core._submit" in words and b"srun" not in words and b"bash" not in words
        if is_python and f"SLURM_ARRAY_TASK_ID={task}".encode() in variables:
            return int(folder.name)
    return 0


@pytest.mark.slow
def test_of_four_jobs_one_is_cancelled_and_one_killed_the_others_finish_and_a_rerun_completes(
    series: Path, alone: Path, tmp_path: Path, cluster: dict[str, str], quick: None, importable: None
) -> None:
    pytest.importorskip("submitit")

    def interfere() -> None:
        one_node.until(lambda: len(running(cluster)) == 4)
        array = running(cluster)[0].partition("_")[0]
        subprocess.run(["scancel", f"{array}_1"], check=True)
        one_node.until(lambda: process_of("2"))
        os.kill(process_of("2"), signal.SIGKILL)

    store = tmp_path / "s.zarr"
    words = (
        "--model",
        series,
        "--trials",
        3,
        "--store",
        store,
        "--workers",
        "slurm:partition=gpu,gpus=1,cpus=1,mem=2GB,time=10,jobs=",
    )
    stranger = threading.Thread(target=interfere)
    stranger.start()
    done = run("cache", *words[:-1], f"{words[-1]}4", cache=tmp_path)
    stranger.join()
    assert done.returncode == 1 and "cached 4 checkpoints" in done.stdout, done.stderr
    assert sorted(Store(store).complete()) == sorted(LABELS[0::4] + LABELS[3::4])
    [cancelled, killed] = messages(done)
    assert cancelled.startswith("error: step1, step5: job ") and "ended as CANCELLED" in cancelled
    assert killed.startswith("error: step2, step6: job ") and "ended as FAILED, killed by signal 9" in killed
    assert killed.endswith("_2_0_log.err; the same command does what is left")
    again = run("cache", *words[:-1], f"{words[-1]}1", cache=tmp_path)
    assert again.returncode == 0 and "cached 4 checkpoints" in again.stdout, again.stderr
    assert files_of(store) == files_of(alone)


@pytest.mark.slow
def test_the_job_array_of_the_page_about_clusters_runs(
    series: Path,
    alone: Path,
    tmp_path: Path,
    cluster: dict[str, str],
    importable: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its file as it stands there, as an array of two with one core each, as one process has it here."""
    [text] = re.findall(r"^```bash\n(.*?)^```", read("docs/cluster.md"), re.MULTILINE | re.DOTALL)
    (tmp_path / "headlapse.sbatch").write_text(text)
    program(tmp_path / "headlapse", f'exec {sys.executable} -m headlapse "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    store = tmp_path / "s.zarr"
    words = ["cache", "--model", str(series), "--trials", "3", "--store", str(store)]
    submitted = [
        "sbatch",
        "--wait",
        "--array=0-1",
        "--cpus-per-task=1",
        f"--chdir={tmp_path}",
        "headlapse.sbatch",
        *words,
    ]
    done = subprocess.run(submitted, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    logs = [path.read_text() for path in sorted(tmp_path.glob("headlapse-*.log"))]
    assert done.returncode == 0 and [log.count("cached 4 checkpoints") for log in logs] == [1, 1], (done.stderr, logs)
    assert files_of(store) == files_of(alone)
