"""Checkpoints a few at a time: fetched, cached, patched and let go, so that only those few need room for their weights.

`cache --keep-weights N --then patch ...`.  Each step is the command's own; the next checkpoints are fetched meanwhile.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import pipeline
from .engine.checkpoints.eviction import FetchedWeights
from .engine.checkpoints.resolve import Checkpoint
from .engine.runtime.errors import UserError
from .engine.runtime.progress import progress, silenced
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.store.inventory import is_store
from .engine.store.locks import claimed
from .options import CacheOptions


def stream(options: CacheOptions, folder: Path, checkpoints: Sequence[Checkpoint]) -> pipeline.CacheWork:
    """Cache the checkpoints, and do with each what is to be done then, with the weights of a few on disk at a time.

    Raises `UserError` where nothing can be had.
    """
    path = pipeline.cache_path(options, folder)
    lacking = set(unfinished(options, [each.label for each in checkpoints], path))
    todo = [_pinned(each, path) for each in checkpoints if each.label in lacking]
    total = pipeline.capture(options, folder, checkpoints, ())
    slices = _at_hand(todo, options.keep_weights or len(todo), _record(options, path), folder)
    with _alone(options, path), slices as each_slice, progress("checkpoints", "checkpoint", len(todo)) as bar:
        for labels in each_slice:
            with silenced():
                cached = pipeline.capture(options, folder, checkpoints, labels)
                total = pipeline.joined(total, replace(cached, then=pipeline.then(options, folder, labels)))
            bar.update(len(labels))
    return total if todo else replace(total, then=pipeline.then(options, folder, ()))


@contextmanager
def _alone(options: CacheOptions, path: Path) -> Iterator[None]:
    """Keep others from letting go of this process's weights.  Raises `UserError` where another process is at it."""
    with claimed(path, "weights", [options.shard or "all"]) as mine:
        if not mine:
            raise UserError(
                f"--keep-weights: another process fetches weights for {path}; wait for it, or give each its --shard I/N"
            )
        yield


@contextmanager
def _at_hand(todo: Sequence[Checkpoint], most: int, record: Path, folder: Path) -> Iterator[Iterator[list[str]]]:
    """The labels of some checkpoints whose weights are on disk, again and again; the weights of at most so many are
    there at once.  What was downloaded and is still there in the end is removed."""
    weights, pool = FetchedWeights(record), ThreadPoolExecutor(1, "fetch")
    weights.let_go_all()  # of a command that was killed
    waiting, ahead = deque(todo), deque[tuple[Checkpoint, Future[None]]]()

    def fetch_ahead(room: int) -> None:
        while waiting and len(ahead) < room:
            checkpoint = waiting.popleft()
            ahead.append((checkpoint, pool.submit(weights.fetch, checkpoint, folder)))

    def slices() -> Iterator[list[str]]:
        fetch_ahead(most)
        while ahead:
            mine = [ahead.popleft() for _ in range(min(len(ahead), max(1, most // 2)))]
            for _, fetched in mine:
                fetched.exception()  # whoever uses the weights will find why they are not there, and say so
            fetch_ahead(most - len(mine))
            yield [checkpoint.label for checkpoint, _ in mine]
            for checkpoint, _ in mine:
                weights.let_go(checkpoint)
            fetch_ahead(most)

    try:
        yield slices()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # What is still on its way, after an interruption, stays in the record for the next command.
        if all(fetched.done() for _, fetched in ahead):
            weights.let_go_all()


def unfinished(options: CacheOptions, labels: Sequence[str], path: Path) -> list[str]:
    """Those that the store lacks, or one of its groups that are to be written then; this process's share of them."""
    mine = options.share(list(labels))
    if not is_store(path):
        return mine
    groups = [path, *pipeline.then_groups(options, path)]
    complete = [CheckpointArrays(group, path).complete() if group.exists() else {} for group in groups]
    return [label for label in mine if not all(label in there for there in complete)]


def _pinned(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint as the store records it, where it holds it already."""
    arrays = CheckpointArrays(path) if is_store(path) else None
    if arrays is None or checkpoint.label not in arrays.complete():
        return checkpoint
    return Checkpoint.recorded(arrays.record(checkpoint.label)["provenance"])


def _record(options: CacheOptions, path: Path) -> Path:
    """Where it is kept what was downloaded: each process of several has its own."""
    share = f"-{options.shard.replace('/', '-')}" if options.shard else ""
    return path.with_name(f".{path.name}.fetched{share}")
