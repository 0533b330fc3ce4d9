"""SLURM: what `--workers slurm:partition=gpu,gpus=1,time=2:00:00` asks of it, and how its jobs are submitted and known.

submitit writes the batch script, carries a function into its job and an answer back, and has a job that comes to its
time limit queued again.  The words are read without it.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine.runtime.errors import UserError
from .engine.runtime.format import parse_whole

if TYPE_CHECKING:
    import submitit

PREFIX = "slurm"

TEXTS = ("partition", "account", "qos", "constraint")
"""Keys that sbatch is given as they are."""

KEYS = (*TEXTS, "gpus", "cpus", "mem", "time", "jobs")

MOST_JOBS, N_JOBS = 1000, 4
"""Of one command: at most, and unless `jobs=` says otherwise."""

MINUTES = 240
"""Time limit of a job where `time=` is not given."""

TIMEOUTS = 3
"""How often a job that comes to its time limit is queued again."""

FORGOTTEN = "unknown to SLURM"
"""The state of a job that has ended so long ago that only sacct could know, and does not."""


@dataclass(frozen=True)
class JobRequest:
    """What `--workers slurm:...` asks of each job, and of how many."""

    words: str
    n_jobs: int
    parameters: Mapping[str, Any]
    """Of submitit's executor."""


def parse_request(words: str) -> JobRequest:
    """`slurm:partition=gpu,gpus=1,time=2:00:00`.  Raises `UserError` for what sbatch could not be told."""
    given: dict[str, str] = {}
    for word in filter(None, words.removeprefix(PREFIX).removeprefix(":").split(",")):
        key, is_set, value = word.partition("=")
        if not is_set or not value or key not in KEYS or key in given:
            problem = "is given twice" if key in given else "is not understood"
            raise UserError(
                f"--workers {words}: {word} {problem}; write slurm:KEY=VALUE,... with the keys {', '.join(KEYS)}"
            )
        given[key] = value
    parameters: dict[str, Any] = {key: value for key, value in given.items() if key in TEXTS}
    parameters["time"] = MINUTES
    for key, (read, form) in _READ.items():
        if key in given:
            value = read(given[key])
            if value is None:
                raise UserError(f"--workers {words}: {key}={given[key]}: write {form}")
            parameters[_PARAMETERS[key]] = value
    return JobRequest(words, parameters.pop("jobs", N_JOBS), parameters)


def _number(most: int) -> Callable[[str], int | None]:
    return lambda text: number if (number := parse_whole(text)) is not None and 1 <= number <= most else None


def _gpu(text: str) -> str | None:
    return text if re.fullmatch(r"[01]|[\w.-]+:1", text, re.ASCII) else None


def _amount(text: str) -> str | None:
    """SLURM knows `16G`; `16GB` is what other options here take."""
    return text.rstrip("Bb") if re.fullmatch(r"[1-9]\d{0,9}(?:[KMGT]B?)?", text, re.ASCII | re.IGNORECASE) else None


def _minutes(text: str) -> int | None:
    """SLURM's forms of a time limit, `90`, `90:00`, `1:30:00`, `1-12`, `1-12:00`, `1-12:00:00`, as minutes."""
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", text, re.ASCII)
    if match is None:
        return None
    days, *rest = (int(group) if group is not None else None for group in match.groups())
    first, second, third = rest
    if days is not None or third is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    total = (days or 0) * 1440 + (hours or 0) * 60 + (minutes or 0) + ((seconds or 0) + 59) // 60
    return total or None


_READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "gpus": (_gpu, "0, 1, or a type and 1, e.g. a100:1: a job computes on one GPU; for more of them ask for more jobs"),
    "cpus": (_number(4096), "a number of cores for each job, e.g. cpus=8"),
    "mem": (_amount, "memory for each job, e.g. mem=32G"),
    "time": (_minutes, "a time limit for each job in one of SLURM's forms, e.g. time=2:00:00"),
    "jobs": (_number(MOST_JOBS), f"how many jobs share the checkpoints, from 1 to {MOST_JOBS:,}, e.g. jobs=8"),
}
"""Key -> how its value is read, None where it cannot be, and what to write."""

_PARAMETERS = {"gpus": "gpus_per_node", "cpus": "cpus_per_task", "mem": "mem", "time": "time", "jobs": "jobs"}


def refuse_absent(words: str) -> None:
    """Raise `UserError` where no job can be submitted from here."""
    lacking = [name for name in ("sbatch", "srun", "scontrol", "scancel") if shutil.which(name) is None]
    without = "or start each share yourself by --shard, which needs nothing (docs/cluster.md)"
    if lacking:
        raise UserError(
            f"--workers {words}: no {', '.join(lacking)} in PATH; run this where jobs are submitted, {without}"
        )
    if find_spec("submitit") is None:
        raise UserError(
            f"--workers {words}: submitit is not installed; pip install 'headlapse[slurm]' brings it, {without}"
        )


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    state: str
    node: str = ""
    exit_code: str = ""
    """`status:signal`."""


class Slurm:
    """SLURM, by way of submitit and scontrol."""

    def __init__(self, request: JobRequest, name: str, folder: Path) -> None:
        from submitit import SlurmExecutor

        self.request = request
        self.executor = SlurmExecutor(folder, max_num_timeout=TIMEOUTS)
        # From 22.05 on srun does not ask for the cores that its job has, unless it is told to.
        cores = [f"--cpus-per-task={number}"] if (number := request.parameters.get("cpus_per_task")) else []
        self.executor.update_parameters(job_name=name, srun_args=cores, **request.parameters)

    def submit(self, functions: Sequence[Callable[[], object]]) -> "list[submitit.Job[Any]]":
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.helpers import clean_env

        # A job that submits jobs would hand its own memory and cores on to them.
        with clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
            try:
                with self.executor.batch():
                    return [self.executor.submit(function) for function in functions]
            except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
                said = [line for line in str(error).splitlines() if line.strip()]
                raise UserError(f"--workers {self.request.words}: sbatch: {' '.join(said[-1:])}") from error

    def states(self, names: Sequence[str]) -> Mapping[str, JobState]:
        return {name: state for array in _arrays(names) for name, state in _states_of(array, names)}

    def cancel(self, names: Sequence[str]) -> None:
        subprocess.run(["scancel", *names], check=False, stderr=subprocess.DEVNULL)


def _arrays(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition("_")[0] for name in names))


def _states_of(array: str, names: Sequence[str]) -> Iterator[tuple[str, JobState]]:
    """Number and state of every job of an array, or of one that is none.

    scontrol forgets jobs some minutes after their end, and sacct, which does not, is not kept everywhere.
    """
    asked = subprocess.run(["scontrol", "show", "job", "--oneliner", array], capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return  # the controller does not answer: it may a little later
    known = dict(_read_scontrol(asked.stdout))
    wanted = [name for name in names if name.partition("_")[0] == array]
    if set(wanted) - set(known):
        known = {**dict(_accounted(array)), **known}
    for name in wanted:
        yield name, known.get(name, JobState(FORGOTTEN))


def _read_scontrol(text: str) -> Iterator[tuple[str, JobState]]:
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^| )([A-Za-z:]+)=(\S*)", line))
        node = fields.get("NodeList", "").replace("(null)", "")
        state = JobState(fields.get("JobState", ""), node, fields.get("ExitCode", ""))
        if tasks := fields.get("ArrayTaskId"):
            yield from ((f"{fields['ArrayJobId']}_{task}", state) for task in _numbers(tasks))
        elif "JobId" in fields:
            yield fields["JobId"], state


def _accounted(array: str) -> Iterator[tuple[str, JobState]]:
    if shutil.which("sacct") is None:
        return
    words = ["--allocations", "--noheader", "--parsable2", "--format=JobID,State,NodeList,ExitCode", f"--jobs={array}"]
    for line in subprocess.run(["sacct", *words], capture_output=True, text=True).stdout.splitlines():
        if line.count("|") == 3:
            name, state, node, exit_code = line.split("|")
            # `CANCELLED by 1000`, on `None assigned` where it never began
            yield name, JobState((state.split() or [""])[0], "" if " " in node else node, exit_code)


def _numbers(text: str) -> list[int]:
    """`0-3,7%2`, as SLURM writes the tasks of an array that wait."""
    numbers: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
