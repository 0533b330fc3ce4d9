"""A SLURM of one node, run by whoever runs the tests: Debian's slurm-wlm, with its own key, folder and ports.

Nothing of it is the machine's: configuration, state, logs and the socket of munge lie in one folder, and its three
daemons are children that end with it.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=1
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=localhost CPUs={n_cores} RealMemory=64000 Gres=gpu:{n_cores} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

PATIENCE = 20.0
"""Seconds for the node to say that it is idle, and for a job to come to a state."""


def lacking() -> str:
    """What is not installed of it, as words; nothing where all of it is."""
    names = (*DAEMONS, "sbatch", "srun", "scontrol", "scancel")
    return ", ".join(name for name in names if shutil.which(name, path=_path()) is None)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@contextmanager
def one_node(folder: Path, n_cores: int) -> Iterator[dict[str, str]]:
    """Run it in `folder`; the environment that its commands want."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = [_free_port(), _free_port()]
    conf = folder / "slurm.conf"
    conf.write_text(CONFIGURATION.format(folder=folder, ports=ports, user=getpass.getuser(), n_cores=n_cores))
    for number in range(n_cores):  # GPUs that are only counted
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{n_cores - 1}]\n")
    env = {"SLURM_CONF": str(conf), "PATH": _path()}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", *munge],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf), "-N", "localhost"],
    )
    with ExitStack() as stack:
        for command in commands:
            stack.enter_context(_daemon(command, folder, env))
            if command[0] == "munged":
                until((folder / "munge.socket").exists)
        until(lambda: "idle" in ask(env, "sinfo", "--noheader", "--format=%T"))
        try:
            yield env
        finally:  # no job outlives the daemons, whose end its srun would wait for
            ask(env, "scancel", f"--user={getpass.getuser()}")
            until(lambda: not ask(env, "squeue", "--noheader"))


@contextmanager
def _daemon(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=output, stderr=output, cwd=folder)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(env: dict[str, str], *command: str) -> str:
    """What one of SLURM's commands answers; nothing where it fails."""
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE).stdout


def until(holds: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for something to hold."""
    limit = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < limit, f"waited {patience:.0f} s in vain"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
