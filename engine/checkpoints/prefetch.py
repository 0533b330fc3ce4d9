"""Load the next checkpoint in a thread while this one computes."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def prefetch(items: Iterable[Item], load: Callable[[Item], Value]) -> Iterator[tuple[Item, Value | Exception]]:
    """Each item with what `load` returned, or the exception that it raised.

    The next item loads while the caller works on this one.
    """
    waiting: _Loading[Item, Value] | None = None
    for item in items:
        loaded = waiting
        if loaded is not None:
            loaded.join()
        waiting = _Loading(item, load)
        if loaded is not None:
            yield loaded.item, loaded.outcome()
    if waiting is not None:
        waiting.join()
        yield waiting.item, waiting.outcome()


class _Loading(threading.Thread, Generic[Item, Value]):
    """One item being loaded.  A daemon thread: an interrupted program does not wait for it."""

    def __init__(self, item: Item, load: Callable[[Item], Value]) -> None:
        super().__init__(daemon=True, name="prefetch")
        self.item, self._load = item, load
        self._value: Value
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._load(self.item)
        except BaseException as error:
            self._error = error  # raised or returned by `outcome`, in the thread that asks for it

    def outcome(self) -> Value | Exception:
        if self._error is None:
            return self._value
        if isinstance(self._error, Exception):
            return self._error
        raise self._error
