"""`headlapse watch`: a training that goes on, followed from checkpoint to checkpoint.

Look which checkpoints are there, leave those that are still being written, cache and patch the new ones, write the
page, wait, look again.  All that lasts is in the store: after a kill the next watch goes on where this one was.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic, sleep

from . import pipeline
from .engine.checkpoints.resolve import Checkpoint
from .engine.checkpoints.revisions import has_come_to
from .engine.checkpoints.training_place import Place
from .engine.checkpoints.wholeness import SETTLING, Settling, Snapshot, lacking
from .engine.runtime.errors import NothingThereError, UserError, first_clause
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.store.disk import refuse_foreign
from .engine.store.inventory import is_store
from .options import MechanismOptions, PatchOptions, ReportOptions, WatchOptions
from .results import mechanism_lines, news_lines, patch_lines
from .streaming import unfinished

MOST_PATIENCE = 64
"""Looks, at most, from one try of a checkpoint that fails to the next; after each failure they double."""


@dataclass(frozen=True)
class News:
    """What one look at the training brought; what was said before is not said again."""

    finished: tuple[str, ...] = ()
    """Labels of the checkpoints that were finished then, in order of training."""

    problems: Mapping[str, str] = field(default_factory=dict)
    """Label -> why a checkpoint could not be finished."""

    waiting: Mapping[str, str] = field(default_factory=dict)
    """Label -> what a checkpoint lacks although nobody is writing it; "" -> why there is none to look at."""

    page: Path | None = None
    """Where it was written anew."""


@dataclass(frozen=True)
class _Setback:
    """A checkpoint that failed: how, with which files, how often, and when it is tried again."""

    problem: str
    snapshot: Snapshot
    n_failures: int
    next_look: int


class Watch:
    """A training that is followed, and what is known of it from one look to the next."""

    def __init__(self, options: WatchOptions, folder: Path) -> None:
        self.options, self.folder, self.cached = options, folder, options.cached
        self._settling = Settling(monotonic)
        self._setbacks: dict[str, _Setback] = {}
        self._lacking: dict[str, str] = {}
        """Label -> what lacks of what is there and at rest, as of the last look."""

        self._being_written: list[str] = []
        """Labels, as of the last look."""

        self._finished: set[str] = set()
        """Labels that need no look into the store any more, which takes a tenth of a second."""

        self._n_looks = 0
        self._said: dict[str, str] = {}

    @property
    def store(self) -> Path:
        return pipeline.cache_path(self.cached, self.folder)

    @property
    def problems(self) -> dict[str, str]:
        """Label -> why a checkpoint that is there is not finished."""
        failed = {label: setback.problem for label, setback in self._setbacks.items()}
        return failed | {label: f"not whole: {what}" for label, what in self._lacking.items()}

    def follow(self) -> Iterator[News]:
        """What each look brings, until the checkpoint of `--until` is finished, or for ever.

        Raises `UserError` for what will never be right: at the first look the model may not be there, but not be wrong.
        """
        refuse_foreign(self.store)
        while True:
            self._n_looks += 1
            there, why_not = self._arrivals()
            news = self._look(there)
            yield replace(news, waiting=self._unsaid(self._lacking | why_not), problems=self._unsaid(news.problems))
            if self._is_over(there):
                return
            sleep(min(self.options.seconds, SETTLING) if self._being_written else self.options.seconds)

    def page(self, reload: float | None = None) -> Path | None:
        """Write the page of what is patched; None where nothing is that has one."""
        name = self.run_name
        if name is None or not _is_begun(pipeline.run_path(self.store, name), self.store):
            return None
        return pipeline.report(ReportOptions(self.store, name=name), self.folder, reload)

    def lines(self, news: News) -> list[str]:
        """What is new, a line for each checkpoint."""
        return news_lines(self.store, self.run_name, news.finished) if news.finished else []

    def verdict(self) -> list[str]:
        """What the commands that follow `--then` end in."""
        lines: list[str] = []
        for command, group in self._groups():
            if not _is_begun(group, self.store):
                continue
            if isinstance(command, PatchOptions):
                lines += patch_lines(self.store, group.name, command.reading)
            else:
                lines += mechanism_lines(self.store, command.verbose)
        return lines

    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before believing the numbers."""
        return pipeline.weight_warnings(self.store)

    @property
    def run_name(self) -> str | None:
        """The patched run that the page shows: the last that can have one; None where none is made."""
        groups = self._groups()
        shown = [path.name for run, path in groups if isinstance(run, PatchOptions) and run.protocol == "corrected"]
        return shown[-1] if shown else None

    def _groups(self) -> list[tuple[PatchOptions | MechanismOptions, Path]]:
        """What is done with each checkpoint once it is cached, and the group of the store that it writes."""
        return list(zip(self.cached.then, pipeline.then_groups(self.cached, self.store), strict=True))

    def _arrivals(self) -> tuple[list[Checkpoint], dict[str, str]]:
        """What is there by now, up to the checkpoint of `--until`, or else why there is nothing."""
        try:
            there = pipeline.arrivals(self.cached, self.folder)
        except UserError as error:
            # What was right at first is so again some time: a hub that is away, a folder that does not fit in.
            if self._n_looks == 1 and not isinstance(error, NothingThereError):
                raise
            return [], {"": first_clause(error)}
        ends = [place for place, each in enumerate(there) if self._ends(each.label, each.place)]
        return there[: ends[0] + 1] if ends else there, {}

    def _look(self, there: Sequence[Checkpoint]) -> News:
        """Finish those that are whole and due."""
        snapshots: dict[str, Snapshot] = {}
        due: list[Checkpoint] = []
        self._lacking, self._being_written = {}, []
        for each in self._unfinished(there):
            snapshots[each.label], is_at_rest = self._seen(each)
            if not is_at_rest:
                self._being_written.append(each.label)
            elif what := _lacks(each):
                self._lacking[each.label] = what
            elif self._is_due(each.label, snapshots[each.label]):
                due.append(each)
        return self._finish(due, snapshots) if due else News()

    def _finish(self, due: Sequence[Checkpoint], snapshots: Mapping[str, Snapshot]) -> News:
        work = pipeline.cache_arrived(self.cached, self.folder, due)
        problems = dict(ChainMap(*(dict(each.problems) for each in (work, *work.then))))
        for each in due:
            before = self._setbacks.pop(each.label, None)
            if each.label in problems:
                n_failures = before.n_failures + 1 if before else 1
                again = self._n_looks + min(2**n_failures, MOST_PATIENCE)
                self._setbacks[each.label] = _Setback(problems[each.label], snapshots[each.label], n_failures, again)
        finished = tuple(each.label for each in due if each.label not in problems)
        return News(finished, problems, page=self.page(self.options.seconds) if finished else None)

    def _unfinished(self, there: Sequence[Checkpoint]) -> list[Checkpoint]:
        left = [each for each in there if each.label not in self._finished]
        labels = set(unfinished(self.cached, [each.label for each in left], self.store)) if left else set()
        self._finished |= {each.label for each in left} - labels
        return [each for each in left if each.label in labels]

    def _seen(self, checkpoint: Checkpoint) -> tuple[Snapshot, bool]:
        """What can be seen of a checkpoint, and whether nobody is writing it; on the hub it is there all at once."""
        if checkpoint.is_remote:
            return frozenset(), True
        seen, seconds = self._settling.look(Path(checkpoint.location))
        return seen, seconds >= SETTLING

    def _is_due(self, label: str, snapshot: Snapshot) -> bool:
        setback = self._setbacks.get(label)
        return setback is None or setback.snapshot != snapshot or self._n_looks >= setback.next_look

    def _is_over(self, there: Sequence[Checkpoint]) -> bool:
        """Whether the checkpoint of `--until` is finished or has failed, and none before it is being written still.

        It may be gone by now, or have been finished by an earlier watch.
        """
        if self.options.until is None or self._being_written:
            return False
        if last := [each.label for each in there if self._ends(each.label, each.place)]:
            return not self._lacking.keys() & set(last)
        rows = CheckpointArrays(self.store).rows() if is_store(self.store) else []
        ends = [row.label for row in rows if self._ends(row.label, row.place)]
        return len(unfinished(self.cached, ends, self.store)) < len(ends)

    def _ends(self, label: str, place: Place) -> bool:
        return self.options.until is not None and has_come_to(self.options.until, label, place)

    def _unsaid(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Those of the texts that have not been said of the same thing just before."""
        new = {about: text for about, text in texts.items() if self._said.get(about) != text}
        self._said |= new
        return new


def _lacks(checkpoint: Checkpoint) -> str:
    return "" if checkpoint.is_remote else lacking(Path(checkpoint.location), not checkpoint.tokenizer)


def _is_begun(group: Path, store: Path) -> bool:
    """Whether a group of the store has a finished checkpoint."""
    return group.exists() and bool(CheckpointArrays(group, store).complete())
