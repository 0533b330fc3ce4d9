"""A lock that is a file: filelock's, which a killed process lets go of, and whose file does not stay behind."""

from contextlib import ExitStack, suppress
from pathlib import Path


def hold(stack: ExitStack, file: Path, patience: float) -> bool:
    """Whether the lock could be had.  It is held until the stack is closed, and its file is then removed."""
    from filelock import FileLock, Timeout  # takes a while, and most commands only read

    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        return False
    stack.callback(lock.release)
    stack.callback(_remove, file)
    return True


def _remove(file: Path) -> None:
    """Remove a lock's file while it is held: whoever opened it meanwhile sees that it is gone, and makes another."""
    with suppress(FileNotFoundError):
        if file.stat().st_size == 0:  # a marker with content is filelock's to remove
            file.unlink()
