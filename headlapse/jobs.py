"""Jobs of a cluster that share one command's checkpoints: `--workers slurm:...`.

Each job takes a slice of what the store lacks, and writes it there, as a process with `--shard` does.  The command
waits for them: it prints what they log, and gathers what they could not finish.
"""

import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .engine.runtime.allotment import n_cores
from .engine.runtime.errors import UserError, printable
from .engine.runtime.exit_status import prepare_imports
from .engine.runtime.format import format_count, parse_whole
from .engine.runtime.outcome import Outcome, describe
from .options import CacheOptions, Sharable, shard_of
from .slurm import FORGOTTEN, JobRequest, JobState, Slurm, parse_request

if TYPE_CHECKING:
    import submitit

LOOK, ASK = 1.0, 10.0
"""Seconds between two readings of the jobs' files, and at least between two questions to SLURM."""

LATENESS = 60.0
"""Seconds that an answer may take to be seen through a shared file system, after its job has ended."""

_QUEUED_ANEW = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
"""States of jobs that ended by no doing of their own."""

_ALIVE = ("", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD",
          "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip

RESUBMISSIONS = 3
"""How often at most a slice is submitted again after a preemption that ended its job, or the failure of a node."""

_REMEDIES = {
    "OUT_OF_MEMORY": "ask for more in --workers, e.g. mem=64G",
    "TIMEOUT": "ask for more in --workers, e.g. time=12:00:00, or for more jobs",
    "DEADLINE": "ask for more in --workers, e.g. time=12:00:00, or for more jobs",
}


@dataclass(frozen=True)
class Answer:
    """What a job says at its end."""

    problems: Mapping[str, str]
    """Label -> why a checkpoint could not be finished."""

    by_input: bool
    device: str = ""
    peak_memory: int = 0
    """Bytes."""


@dataclass(frozen=True)
class Share:
    """One job's part of a command, called in the job."""

    command: str
    options: Sharable
    folder: Path
    labels: tuple[str, ...]

    def __call__(self) -> Answer:
        from . import pipeline

        os.environ.setdefault("OMP_NUM_THREADS", str(n_cores()))
        prepare_imports()
        try:
            work = getattr(pipeline, self.command)(self.options, self.folder)
        except Exception as error:  # whatever it is, it is said where the command was typed, and in full in the log
            traceback.print_exc()
            return Answer(dict.fromkeys(self.labels, describe(error)), isinstance(error, UserError))
        return Answer(work.problems, work.by_input, work.device, work.peak_memory)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit submits where the job is to be queued again: the same; the store knows what is complete."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Cluster(Protocol):
    """Where jobs run."""

    def submit(self, shares: Sequence[Share]) -> "list[submitit.Job[Answer]]":
        """A job for each share.  Raises `UserError` where they are refused."""

    def states(self, names: Sequence[str]) -> Mapping[str, JobState]:
        """The states of the jobs of these numbers; one that is left out is as it was."""

    def cancel(self, names: Sequence[str]) -> None:
        """Cancel jobs."""


@dataclass
class _Job:
    """A slice of the checkpoints, and the job that is to do it now."""

    share: Share
    handle: "submitit.Job[Answer]"
    n_submissions: int = 1
    known: JobState = field(default_factory=lambda: JobState(""))
    n_read: int = 0
    """Bytes of its log that were shown."""

    last_line: str = ""
    ended_at: float | None = None
    """When it was first seen to have ended without an answer."""

    answer: Answer | None = None
    death: str = ""
    """How it ended that gave no answer."""

    @property
    def name(self) -> str:
        return str(self.handle.job_id)

    @property
    def is_over(self) -> bool:
        return self.answer is not None or bool(self.death)

    @property
    def log(self) -> Path:
        return Path(self.handle.paths.stderr)


@dataclass(frozen=True)
class Gathered:
    """What the jobs did, as one command tells it."""

    reasons: Mapping[str, Outcome]
    """Label -> why a checkpoint is not finished, if it is not."""

    device: str
    peak_memory: int


def cluster_for(request: JobRequest, name: str, folder: Path) -> Cluster:
    """The cluster that `--workers` names."""
    return Slurm(request, name, folder)


def run_jobs(command: str, options: Sharable, folder: Path, store: Path, labels: Sequence[str]) -> Gathered:
    """Have the checkpoints `labels` done by jobs and wait for them; Ctrl-C cancels them.

    Raises `UserError` where the cluster refuses them.
    """
    assert options.workers is not None
    request = parse_request(options.workers)
    logs = folder.absolute() / "jobs" / store.stem
    cluster = cluster_for(request, f"headlapse-{command}", logs)
    n_jobs = min(request.n_jobs, len(labels))
    slices = [tuple(labels[number::n_jobs]) for number in range(n_jobs)]
    given = replace(options, workers=None, store=store.absolute())
    if isinstance(given, CacheOptions):
        given = replace(given, then=())  # which have workers of their own
    shares = [Share(command, replace(given, shard=shard_of(each)), folder.absolute(), each) for each in slices]
    jobs = [_Job(share, handle) for share, handle in zip(shares, cluster.submit(shares), strict=True)]
    names = ", ".join(job.name for job in jobs)
    _print(f"submitted {format_count(len(jobs), 'job')}: {names}; Ctrl-C cancels them; logs: {logs}")
    try:
        _wait(cluster, jobs)
    except BaseException:
        left = [job.name for job in jobs if not job.is_over]
        if left:
            cluster.cancel(left)
            _print(f"cancelled {', '.join(left)}")
        raise
    return _gathered(jobs)


def _wait(cluster: Cluster, jobs: Sequence[_Job]) -> None:
    asked = -ASK
    while left := [job for job in jobs if not job.is_over]:
        for job in left:
            _show_log(job)
            _take_answer(job)
        if time.monotonic() - asked >= ASK:
            asked = time.monotonic()
            states = cluster.states([job.name for job in left])
            for job in left:
                _follow(job, states.get(job.name, job.known), cluster)
        time.sleep(LOOK)


def _show_log(job: _Job) -> None:
    """Print the lines that a job has logged since, behind its number and node."""
    if not job.log.exists():
        return
    with job.log.open("rb") as log:
        log.seek(job.n_read)
        read = log.read()
    whole = read[: read.rfind(b"\n") + 1]
    job.n_read += len(whole)
    for line in whole.decode(errors="replace").splitlines():
        if line.strip() and not line.startswith("submitit "):
            job.last_line = printable(line.strip())
            _print(f"[{_title(job)}] {job.last_line}")


def _take_answer(job: _Job) -> None:
    if job.answer is not None or not job.handle.paths.result_pickle.exists():
        return
    _show_log(job)
    if (error := job.handle.exception()) is not None:
        job.death = f"job {_title(job)} ended early: {printable(str(error).strip().splitlines()[-1])}{_where(job)}"
        return
    job.answer = job.handle.result()
    n_asked = len(job.share.labels)
    _print(f"[{_title(job)}] ended, {n_asked - len(job.answer.problems)} of {n_asked} checkpoints")


def _follow(job: _Job, state: JobState, cluster: Cluster) -> None:
    """Take note of what SLURM says of a job; submit it again where it ended by no doing of its own."""
    if job.is_over:
        return
    if state.state != job.known.state and state.state in ("PENDING", "RUNNING"):
        job.known = state
        _print(f"[{_title(job)}] {state.state.lower()}")
    job.known = state
    if state.state in _ALIVE:
        job.ended_at = None
        return
    job.ended_at = job.ended_at or time.monotonic()
    may_be_late = state.state in ("COMPLETED", FORGOTTEN) and time.monotonic() - job.ended_at < LATENESS
    _take_answer(job)
    if job.is_over or may_be_late:
        return
    _show_log(job)
    _print(f"[{_title(job)}] {_ending(state)}")
    job.death = f"job {_title(job)} ended as {_ending(state)}{_where(job)}"
    if state.state in _QUEUED_ANEW and job.n_submissions <= RESUBMISSIONS:
        _submit_again(job, cluster)


def _submit_again(job: _Job, cluster: Cluster) -> None:
    try:
        [handle] = cluster.submit([job.share])
    except UserError as error:
        job.death += f"; it was not taken again: {error}"
        return
    _print(f"[{_title(job)}] submitted again as {handle.job_id}")
    job.handle, job.known, job.n_read, job.ended_at, job.death = handle, JobState(""), 0, None, ""
    job.n_submissions += 1


def _ending(state: JobState) -> str:
    """`CANCELLED`, `FAILED, exit status 1`, `FAILED, killed by signal 9`."""
    status, _, number = state.exit_code.partition(":")
    if state.state != "FAILED" or not status:
        return state.state
    # A shell, and srun, report a signal as a status above 128.
    killed_by = parse_whole(number) or max(0, int(status) - 128)
    return f"FAILED, killed by signal {killed_by}" if killed_by else f"FAILED, exit status {status}"


def _where(job: _Job) -> str:
    """What to read, and what to do."""
    said = f"; its last line: {job.last_line}" if job.last_line else "; it logged nothing"
    remedy = _REMEDIES.get(job.known.state, "the same command does what is left")
    return f"{said}; log: {job.log}; {remedy}"


def _gathered(jobs: Sequence[_Job]) -> Gathered:
    reasons: dict[str, Outcome] = {}
    for job in jobs:
        for label in job.share.labels:
            reason = job.death or f"job {_title(job)} ended without it; log: {job.log}; run this again"
            reasons[label] = Outcome(label, reason, by_input=False)
        if job.answer is not None:
            for label, problem in job.answer.problems.items():
                reasons[label] = Outcome(label, problem, by_input=job.answer.by_input)
    answers = [job.answer for job in jobs if job.answer is not None]
    devices = sorted({answer.device for answer in answers if answer.device})
    where = f"{format_count(len(jobs), 'job')}{' on ' if devices else ''}{' and '.join(devices)}"
    return Gathered(reasons, where, max((answer.peak_memory for answer in answers), default=0))


def _title(job: _Job) -> str:
    return f"{job.name} {job.known.node}".strip()


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
