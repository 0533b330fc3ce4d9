"""How far a command is: one bar on a terminal or in a notebook, plain lines everywhere else."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .format import format_time

if TYPE_CHECKING:
    from tqdm import tqdm

FIRST_LINE, LONGEST_SILENCE = 30.0, 600.0
"""Seconds: when a piece of work says its first plain line, and at most between two.  The time between them doubles."""


class Progress(Protocol):
    """One piece of work on its way."""

    def update(self, n: int) -> object:
        """Add the `n` units that were completed since."""

    def describe(self, state: str) -> None:
        """Say how things stand, beside the count, the next time it is shown."""

    def write(self, line: str) -> None:
        """Print a line on stderr that stays, without disturbing a bar."""


_silent = ContextVar("silent", default=False)


@contextmanager
def silenced() -> Iterator[None]:
    """No piece of work shows how far it is while the body runs: it is a part of one that does."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


@contextmanager
def progress(work: str, unit: str, total: int, initial: int = 0) -> Iterator[Progress]:
    """Show how much of `total` is completed while the body runs, on stderr.

    `work` is a word such as `patch`, `unit` what is counted, in the singular.
    """
    if _silent.get():
        yield _Silent()
        return
    if total <= initial or not (sys.stderr.isatty() or _in_notebook()):
        yield _Lines(work, unit, total, initial)
        return
    with warnings.catch_warnings():
        # Without ipywidgets tqdm warns and shows its bar as text, which is all that is wanted then.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

        bar = tqdm(total=total, initial=initial, desc=work, unit=unit, unit_scale=total >= 10_000, leave=False)
    with bar:
        yield _Bar(bar)


class _Silent:
    """Nothing but the lines that stay."""

    def update(self, n: int) -> object:
        """Not shown."""

    def describe(self, state: str) -> None:
        """Not shown."""

    def write(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


@dataclass
class _Bar:
    """tqdm's bar."""

    bar: "tqdm[Any]"

    def update(self, n: int) -> object:
        return self.bar.update(n)

    def describe(self, state: str) -> None:
        self.bar.set_postfix_str(state, refresh=False)

    def write(self, line: str) -> None:
        self.bar.write(line, file=sys.stderr)


@dataclass
class _Lines:
    """A line now and then, for logs."""

    work: str
    unit: str
    total: int
    completed: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    state: str = ""

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.last_line = self.started
        self.first: tuple[float, int] | None = None
        """When the first units were completed, and how many: what came before them (training, say) tells no rate."""

    def update(self, n: int) -> None:
        self.completed += n
        now = time.monotonic()
        self.first = self.first or (now, self.completed)
        silence = min(max(FIRST_LINE, self.last_line - self.started), LONGEST_SILENCE)
        if now - self.last_line < silence or self.completed >= self.total:
            return
        self.last_line = now
        count = f"{self.work}: {self.completed:,} of {self.total:,} {self.unit}s in {format_time(now - self.started)}"
        self.write(", ".join(part for part in (count, self._left(now), self.state) if part))

    def _left(self, now: float) -> str:
        """About how long the rest takes; nothing after the first units, which may have taken longer than others."""
        assert self.first is not None
        began, n_before = self.first
        if self.completed == n_before:
            return ""
        return f"about {format_time((now - began) / (self.completed - n_before) * (self.total - self.completed))} left"

    def describe(self, state: str) -> None:
        self.state = state

    def write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


def _in_notebook() -> bool:
    """Whether this runs in a kernel that draws: only IPython's own module can say, where it was imported at all."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
