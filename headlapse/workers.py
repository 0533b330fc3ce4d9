"""Several processes on this machine that share one command's checkpoints: `--workers local:N`.

`python -m headlapse.workers` is one of them; it takes its share as a pickle on standard input.
"""

import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .engine.runtime.allotment import gpus, n_cores
from .engine.runtime.format import parse_whole
from .options import ComputeOptions


@contextmanager
def in_processes(command: str, options: ComputeOptions, folder: Path) -> Iterator[None]:
    """Run a command in so many processes as `--workers local:N` says, each with its share, and wait for them.

    They start before the body runs, which has imports of its own to wait for, and have ended after it.  What they could
    not finish is left for the process that calls this, which finds it missing.  Their progress appears on stderr, each
    line with the number of its process.
    """
    running: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
    try:
        for number in range(options.n_workers if options.n_workers > 1 else 0):
            running.append(_start(command, options, folder, number))
        yield
        for process, reader in running:
            process.wait()
            reader.join()
    except BaseException:
        for process, _ in running:
            process.terminate()
        for process, reader in running:
            process.wait()
            reader.join()
        raise


def _start(
    command: str, options: ComputeOptions, folder: Path, number: int
) -> tuple[subprocess.Popen[bytes], threading.Thread]:
    """A process that does one share, and the thread that passes on what it says."""
    shard = f"{number}/{options.n_workers}"
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment_of(number, options.n_workers, options.device),
    )
    assert process.stdin is not None and process.stderr is not None
    share = dataclasses.replace(options, workers=None, shard=shard)
    process.stdin.write(pickle.dumps((command, share, folder.absolute())))
    process.stdin.close()
    reader = threading.Thread(target=_forward, args=(process.stderr, f"[{shard}]"))
    reader.start()
    return process, reader


def _forward(lines: IO[bytes], prefix: str) -> None:
    with lines:
        for line in lines:
            print(prefix, line.decode(errors="replace").rstrip(), file=sys.stderr)


def environment_of(number: int, n_workers: int, device: str | None) -> dict[str, str]:
    """An equal part of the cores that this process may use, and one of its GPUs where a device is not named exactly."""
    threads = max(1, n_cores() // n_workers)
    asked = parse_whole(os.environ.get("OMP_NUM_THREADS", ""))
    variables = {**os.environ, "OMP_NUM_THREADS": str(min(threads, asked) if asked else threads)}
    if device in (None, "cuda") and (names := _gpus()):
        variables["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
    return variables


def _gpus() -> list[str]:
    names = gpus()
    if names is None:
        import torch

        names = [str(number) for number in range(torch.cuda.device_count())]
    return names


def main() -> int:
    """Do the share that stands on standard input."""
    from . import pipeline
    from .engine.runtime.exit_status import DONE, exit_status_of

    command, options, folder = pickle.load(sys.stdin.buffer)

    def work() -> int:
        getattr(pipeline, command)(options, folder)
        return DONE

    return exit_status_of(work)


if __name__ == "__main__":
    sys.exit(main())
