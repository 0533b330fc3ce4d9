"""Laws of how a script ends: what a user caused is one line and a status, a bug stays a traceback."""

import errno
import sys

import pytest
import torch

from headlapse.engine.runtime.errors import UserError, VerificationError
from headlapse.engine.runtime.exit_status import exit_status_of, print_problems


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--trials 0: at least one"), 2, "error: --trials 0: at least one\n"),
        (VerificationError("step1: replay differs"), 1, "error: step1: replay differs\n"),
        (OSError(errno.ENOSPC, "No space left on device", "z/c/0"), 1, "z/c/0: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write: No space left on device; make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "z/c/0"), 1, "z/c/0: Disk quota exceeded"),
        (OSError(errno.EACCES, "Permission denied", "cache"), 1, "cache: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "cache"), 1, "cache: Read-only file system"),
        (MemoryError(), 1, "out of memory; give less --memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory (CUDA out of memory.)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nallocate"), 1, "out of memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 1, "out of memory"),
        (OSError(errno.EMFILE, "Too many open files", "z/c/0"), 1, "too many open files"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), 1, "ulimit -n"),
        (RuntimeError("can't start new thread"), 1, "no further thread can be started"),
        (UserError("one\ntwo \x1b[2J\u2028three"), 2, r"error: one\ntwo \x1b[2J\u2028three"),
        (UserError("9" * 10**5 + ": the reason"), 2, "98,012 characters left out) ... 9999"),
    ],
)
def test_what_a_user_caused_is_one_line_and_a_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    def main() -> int:
        raise error

    assert exit_status_of(main) == status
    printed = capsys.readouterr()
    assert line in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_script_that_ends_by_itself_keeps_its_status_and_adds_no_line(
    capsys: pytest.CaptureFixture[str], status: int
) -> None:
    assert exit_status_of(lambda: status) == status
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_script_ends_at_once_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="130"):
        exit_status_of(main)
    printed = capsys.readouterr()
    assert printed.err.startswith("interrupted") and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    "bug",
    [
        *(kind("x") for kind in (ValueError, KeyError, RuntimeError, AssertionError, OSError)),
        *(OSError(number, "x") for number in (errno.EBADF, errno.EIO, errno.ENOENT)),
    ],
)
def test_a_bug_is_not_swallowed(bug: Exception) -> None:
    def main() -> int:
        raise bug

    with pytest.raises(type(bug)):
        exit_status_of(main)


def test_a_problem_that_many_share_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    print_problems({"step1": "no network", "step2": "cut off", "step3": "no network"})
    assert capsys.readouterr().err == "error: step1, step3: no network\nerror: step2: cut off\n"
