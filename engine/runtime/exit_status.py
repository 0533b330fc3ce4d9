"""How a command ends: what the user can change is reported in one line with an exit status, never as a traceback."""

import io
import os
import sys
from collections.abc import Callable, Mapping

from .errors import UserError, VerificationError, printable, unwritable
from .importing import import_less
from .shortage import shortage_of

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def print_problems(problems: Mapping[str, str]) -> None:
    """Print each distinct problem once on stderr, after the labels of all checkpoints that have it."""
    for problem in dict.fromkeys(problems.values()):
        labels = ", ".join(label for label in problems if problems[label] == problem)
        print(f"error: {labels}: {problem}", file=sys.stderr)


def prepare_imports() -> None:
    """What a process of our own sets before it first imports torch."""
    # Idle OpenMP threads then go to sleep soon instead of spinning: no slower alone, many times faster on a machine
    # that others use too.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import_less()


def exit_status_of(main: Callable[[], int]) -> int:
    """Run `main` and return its exit status.

    2 for a `UserError`, 1 for a `VerificationError`, a full disk, a place that cannot be written to, a lack of memory,
    open files or threads, or a closed pipe, 130 for an interrupt.  Any other exception is a bug and passes through.
    """
    # A name that the terminal's encoding lacks is shown with escapes, as on stderr, rather than ending the command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    prepare_imports()
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`).  Python would print a second error when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, the same command continues from there", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: a daemon thread that is reading weights or training can crash the interpreter as it shuts down.
        os._exit(INTERRUPTED)
    except Exception as error:
        problem = unwritable(error) if isinstance(error, OSError) else None
        problem = problem or shortage_of(error)
        if problem is None:
            raise
        print(f"error: {printable(problem)}", file=sys.stderr)
        return FAILED
