"""sha256 of weight files, computed here from the bytes that arrived, on threads of their own while others read them."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..runtime.errors import UserError

_THREADS = 4
"""Files hashed at once; one thread hashes about as fast as a good disk reads."""


class Hashing:
    """The digests of some files, on their way; `results` waits for them.

    On daemon threads: a program that ends early does not wait for the rest.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        digest: Callable[[Path], str],
        known: Mapping[str, str] | None = None,
        stated: Mapping[str, str] | None = None,
    ) -> None:
        """Begin to hash those of `paths` whose digest is not `known` already.

        `stated` is what the hub says of the content, or the cache by a blob's name: file name → sha256, or git's hash
        of a file that git keeps itself.
        """
        self._digest, self._stated = digest, dict(stated or {})
        self._results = {path.name: (known or {}).get(path.name, "") for path in paths}
        self._problems: list[str] = []
        self._waiting = deque(path for path in paths if not self._results[path.name])
        count = min(len(self._waiting), _THREADS, os.cpu_count() or 1)
        self._threads = [threading.Thread(target=self._work, daemon=True, name="sha256") for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def results(self) -> dict[str, str]:
        """File name → sha256 in hex, once all of them are there.

        Raises `UserError` for a file that cannot be read, and for one whose content is not what was stated.
        """
        for thread in self._threads:
            thread.join()
        if self._problems:
            raise UserError(min(self._problems))
        return dict(self._results)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashing) and self.results() == other.results()

    def _work(self) -> None:
        while True:
            try:
                path = self._waiting.popleft()
            except IndexError:
                return
            try:
                digest = self._digest(path)
                if (stated := self._stated.get(path.name)) is not None:
                    require_content(path, stated, digest)
            except OSError as error:
                self._problems.append(f"{path} cannot be read: {error.strerror}; make it readable and run again")
            except UserError as error:
                self._problems.append(error.message)
            else:
                self._results[path.name] = digest


def require_content(path: Path, stated: str, sha256: str) -> None:
    """Raise `UserError` unless the file's content is that `stated`, by its sha256 or by git's hash of it."""
    arrived, kind = (sha256, "sha256") if len(stated) == 64 else (git_hash(path), "git hash")
    if arrived != stated:
        # The cache keeps the bytes under another name, to which `path` is a link.
        raise UserError(
            f"{path.name} has {kind} {arrived[:12]}, the hub says {stated[:12]}: it is not what was published; "
            f"delete {path.resolve()} and run it again"
        )


def git_hash(path: Path) -> str:
    """What git calls a file's content: the sha1 of its size and its bytes, in hex."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
