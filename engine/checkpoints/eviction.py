"""Weights that come and go: what a command has downloaded of the hub is removed once it is done with.

What was in the client's cache before, config and tokenizer, and weights outside the hub are never touched.
"""

import json
import threading
from collections.abc import Iterable
from pathlib import Path

from ..runtime.durable import rename, sync
from . import hub
from .fetch import bring
from .resolve import Checkpoint


class FetchedWeights:
    """What has been downloaded since, kept in a `record`, so that it is known after a kill."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._own: set[Path] = set(map(Path, json.loads(record.read_text()))) if record.exists() else set()
        self._at_hand: dict[Checkpoint, set[Path]] = {}
        """Checkpoint -> those of its files that were downloaded here; those of the same content share one."""

        self._lock = threading.Lock()
        """One checkpoint is let go while another is fetched, on a thread of its own."""

    def fetch(self, checkpoint: Checkpoint, cache: Path) -> None:
        """Have the checkpoint's files on disk.  Raises `UserError` as `fetch.fetch` does."""

        def remember(blobs: set[Path]) -> None:
            with self._lock:
                self._keep(self._own | {blob for blob in blobs if not blob.exists()})
                self._at_hand[checkpoint] = self._own & blobs

        bring(checkpoint, cache, remember)

    def let_go(self, checkpoint: Checkpoint) -> None:
        """Remove what was downloaded for it and no other checkpoint at hand needs."""
        with self._lock:
            blobs = self._at_hand.pop(checkpoint, set())
            self._remove(blobs.difference(*self._at_hand.values()))

    def let_go_all(self) -> None:
        """Remove everything that was downloaded here, by commands that were killed too."""
        with self._lock:
            self._at_hand.clear()
            self._remove(self._own)

    def _remove(self, blobs: Iterable[Path]) -> None:
        gone = set(blobs)
        for blob in gone:
            hub.remove_blob(blob)
        self._keep(self._own - gone)

    def _keep(self, blobs: set[Path]) -> None:
        """Remember what is its own, before it is there and after it is gone."""
        if blobs == self._own:
            return
        self._own = blobs
        partial = self._record.with_name(f"{self._record.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(sorted(map(str, blobs))))
        sync(partial)
        rename(partial, self._record)
        if not blobs:
            self._record.unlink()
