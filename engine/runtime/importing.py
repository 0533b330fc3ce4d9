"""Imports of torch, transformers and what they bring: seconds of every command, of which half is never used."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
"""The package behind `torch.compile`: a thousand modules with sympy, imported for marks on functions."""

MARKS = frozenset({"allow_in_graph", "assume_constant_result", "disable"})
"""Decorators of the compiler that leave a function as it is, but for the compiler."""

SELF_SUFFICIENT = f"{COMPILER}._trace_wrapped_higher_order_op"
"""A module of the compiler that transformers imports at once, and that needs none of the others."""


@contextmanager
def importing() -> Iterator[None]:
    """While the body imports, Python does not look for cyclic garbage: a thousand times it would find almost none.

    That takes a second of the eight.  Nothing is done where the collector is off already.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_less() -> None:
    """Spare a process of our own what transformers imports at once and a command hardly ever uses.

    The compiler of torch is put off until something of it is used.  Of two optional packages transformers believes that
    they are not there: torch.distributed, for models that are spread over processes, and scipy, for losses of object
    detection; it is written to do without them.  Where transformers is imported already, nothing is done: that process
    is somebody else's, who may want all of it.
    """
    if "transformers" not in sys.modules and not any(isinstance(finder, _LessImports) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LessImports())


class _LessImports(MetaPathFinder):
    """Asked before each import; finds nothing itself but the compiler."""

    def __init__(self) -> None:
        self._said = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == COMPILER:
            return self._put_off(PathFinder.find_spec(name, path, target))
        if name.startswith(f"{COMPILER}.") and name != SELF_SUFFICIENT:
            compiler = sys.modules[COMPILER]
            assert isinstance(compiler, _Later)
            compiler.run()
        # Once it has imported its utilities, transformers puts a module of its own kind into its place.
        is_ready = name.startswith("transformers.") and type(sys.modules["transformers"]) is not ModuleType
        if is_ready and not self._said:
            self._said = True
            _say_what_is_not_there()
        return None

    @staticmethod
    def _put_off(spec: ModuleSpec | None) -> ModuleSpec | None:
        if spec is not None and spec.loader is not None:
            spec.loader = _PuttingOff(spec.loader)
        return spec


def _say_what_is_not_there() -> None:
    """Let transformers ask now which optional packages there are: it remembers the answers, and only those change."""
    import torch
    from transformers.utils import import_utils

    if hasattr(import_utils, "is_torch_distributed_available"):  # older versions ask torch itself, and get all of it
        import_utils.is_torch_distributed_available.cache_clear()
        with _answering(torch.distributed, "is_available", lambda: False):
            import_utils.is_torch_distributed_available()
    import_utils.is_scipy_available.cache_clear()
    with _answering(import_utils, "_is_package_available", lambda *_names, **_options: (False, "N/A")):
        import_utils.is_scipy_available()


@contextmanager
def _answering(module: ModuleType, name: str, function: Callable[..., object]) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, own)


class _PuttingOff(Loader):
    """Loads a module that runs its code later; importlib's LazyLoader would run it for the module's path already."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Later(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


class _Later(ModuleType):
    """A module that is run when it is first asked for a name that is neither a mark nor Python's own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._lock, self._begun = threading.RLock(), False

    def __getattr__(self, name: str) -> Any:
        """Called for names that are not there: all of them before the module is run."""
        if name in MARKS and not self._begun:
            return _unmarked
        if not name.startswith("__") or name == "__all__":
            self.run()
        if name in self.__dict__:
            return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def run(self) -> None:
        """Once.  While it runs, it may ask itself for names that it does not have yet, in the thread with the lock."""
        with self._lock:
            if not self._begun:
                self._begun = True
                assert self.__spec__ is not None and isinstance(self.__spec__.loader, _PuttingOff)
                self.__spec__.loader.own.exec_module(self)


def _unmarked(function: Callable[..., object] | None = None, *_values: object, **_options: object) -> object:
    """Used as a decorator with or without options."""
    return _unmarked if function is None else function
