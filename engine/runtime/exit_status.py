"""How a script ends: what a user caused is one line and a status, never a traceback."""

import errno
import os
import sys
from collections.abc import Callable, Mapping

from .errors import UserError, VerificationError

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)


def print_problems(problems: Mapping[str, str]) -> None:
    """A line on stderr for every problem, with the labels of all that have it."""
    for problem in dict.fromkeys(problems.values()):
        labels = ", ".join(label for label in problems if problems[label] == problem)
        print(f"error: {labels}: {problem}", file=sys.stderr)


def exit_status_of(main: Callable[[], int]) -> int:
    """Run `main` and return its exit status: 2 refused, 1 inexact or disk full, 130 interrupted."""
    # Idle OpenMP threads then soon sleep instead of spinning on: as fast alone, many times faster on a machine that
    # others use.  Read when torch is first imported, which `main` does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        return main()
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return REFUSED
    except VerificationError as difference:
        print(f"error: {difference}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Whoever read our output has gone: nothing more can be said, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.errno not in _FULL + _FORBIDDEN:
            raise
        place = f" {error.filename}" if error.filename else ""
        mend = (
            "make room and run it again; what was finished is kept" if error.errno in _FULL else "choose another place"
        )
        print(f"error: cannot write{place}: {error.strerror}; {mend}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: a thread in the middle of reading or training would break the interpreter's own way out.
        os._exit(INTERRUPTED)
