"""What the machine ran out of: memory, open files, threads.  Every library says so in its own way."""

import errno
import re
import resource
from collections.abc import Iterator

from .errors import UserError, printable
from .format import format_bytes

LEAST_ADDRESS_SPACE, LEAST_OPEN_FILES = 2_000_000_000, 64
"""Bytes and files; of memory that is addressed a third is used."""

_MEMORY = re.compile(
    "can't allocate memory|cannot allocate memory|out of memory|failed to map segment|bad_alloc|alloc_cpu",
    re.IGNORECASE,
)
_FILES = re.compile("too many open files", re.IGNORECASE)
_THREADS = re.compile("can't start new thread|pthread_create failed|Resource temporarily unavailable", re.IGNORECASE)

_REMEDY = "finished work is kept, the same command continues from there"


def refuse_small_limits() -> None:
    """Raise `UserError` where this process may have less than numpy, scipy and torch take to be imported.

    It is asked before they are: where memory ends while they are loaded, OpenBLAS waits for more for ever.
    """
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY and space < LEAST_ADDRESS_SPACE:
        raise UserError(
            f"this process may address {format_bytes(space)} of memory (ulimit -v), the libraries alone need "
            f"{format_bytes(LEAST_ADDRESS_SPACE)}; raise the limit"
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LEAST_OPEN_FILES:
        raise UserError(
            f"this process may open {files} files (ulimit -n), at least {LEAST_OPEN_FILES} are needed; raise the limit"
        )


def shortage_of(error: BaseException) -> str | None:
    """One line that says what ran out and what to do; None for an error of any other kind.

    The causes of `error` count too: libraries wrap them.
    """
    chain = list(_chain(error))
    if any(_is_memory(link) for link in chain):
        details = printable(" ".join(str(chain[-1]).split()))[:200]
        said = f" ({details})" if details else ""
        return f"out of memory{said}; give less --memory or fewer --trials, or free some; {_REMEDY}"
    if any(_is_files(link) for link in chain):
        return f"too many open files for this process; raise the limit (ulimit -n 4096); {_REMEDY}"
    if any(isinstance(link, RuntimeError) and _THREADS.search(str(link)) for link in chain):
        return f"no further thread can be started; raise the limits (ulimit -u, ulimit -v); {_REMEDY}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported here
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError | SystemError) and bool(_MEMORY.search(str(error)))


def _is_files(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    return isinstance(error, RuntimeError | ImportError | OSError) and bool(_FILES.search(str(error)))
