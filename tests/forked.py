"""Processes of their own, to be killed or to run as a user's would, without the seconds that imports take.

They are forked from one that has imported everything once and done nothing: whatever tests have loaded, changed or
opened is not in them.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from headlapse.engine.store import patched_run
from tests.conftest import SEED

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "transformers.models.gpt_neox.modeling_gpt_neox",
        *(f"headlapse.engine.{room}.run" for room in ("capture", "replay", "mechanism")),
        "headlapse.engine.replay.protocols",
        "headlapse.engine.report.page",
        "headlapse.command_line",
    ]
)


def exit_status(work: Callable[..., None], *arguments: Any) -> int:
    """How a process that does the work ends: its exit status, or minus the signal that killed it."""
    process = CONTEXT.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_script(words: Sequence[str], directory: Path, env: Mapping[str, str], output: Path, kill_at: int) -> None:
    """Run a script as `python` does with these words, what it prints in files `output`.out and .err; SIGKILL it as it
    puts the file with the number `kill_at` in its place, counted from 0, if that is not negative."""
    _enter(directory, env, output)
    if kill_at >= 0:
        _die_at_write(kill_at)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def run_code(code: str, directory: Path, env: Mapping[str, str], output: Path) -> None:
    """Run what `python -c` would."""
    _enter(directory, env, output)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _enter(directory: Path, env: Mapping[str, str], output: Path) -> None:
    patched_run.new_seed = lambda: SEED
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(env)
    for suffix, stream in ((".out", sys.stdout), (".err", sys.stderr)):
        stream.flush()
        descriptor = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def _die_at_write(number: int) -> None:
    put_in_place, left = os.replace, number

    def put_in_place_or_die(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        put_in_place(*args, **kwargs)

    os.replace = put_in_place_or_die
