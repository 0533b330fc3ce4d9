"""Checks of shapes that are not made twice.

jaxtyping binds, checks and binds again at each call: in loops over small arrays that takes longer than what is called.
Whether a call passes depends on the types, dtypes and shapes of what it takes and gives alone; so a call like one that
has passed is let through.  All others go the whole way, and what jaxtyping makes for a function waits for its first
call.
"""

import contextlib
import dataclasses
import functools
import inspect
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType, GeneratorType
from typing import Any, get_args

import jaxtyping
import numpy as np

KNOWN = 1024
"""Calls of a function that are remembered."""

FEW = 16
"""Things in a list or dictionary that is looked through; of more, beartype looks at one, whichever."""

_bare = jaxtyping.jaxtyped


_PASSED: defaultdict[CodeType, dict[Hashable, set[Hashable]]] = defaultdict(dict)
"""Of each function, also one that is made anew at every call of another: calls that have passed, and their results."""


class Unlike(Exception):
    """Of a value that is like no other: what it contains is too much, or cannot be seen without changing it."""


def install(modules: list[str], checker: str) -> None:
    """Have the shapes in these modules, none of them imported yet, checked by `checker`."""
    setattr(jaxtyping, "jaxtyped", lambda *, typechecker: functools.partial(remembering, typechecker=typechecker))  # noqa: B010
    jaxtyping.install_import_hook(modules, checker)


def remembering(fn: Any, *, typechecker: Any) -> Any:
    """What `jaxtyping.jaxtyped` makes of a function or class, but letting calls through like one that has passed."""
    init = getattr(fn, "__init__", None)
    if dataclasses.is_dataclass(fn) and isinstance(init, FunctionType):
        if not hasattr(init, "has_its_shapes_checked"):
            setattr(fn, "__init__", remembering(init, typechecker=typechecker))  # noqa: B010
        return fn
    if not isinstance(fn, FunctionType):
        return _bare(fn, typechecker=typechecker)
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    is_annotated = [name in fn.__annotations__ for name in names]
    given = threading.local()
    is_bare = has_shapes(fn) or inspect.isgeneratorfunction(fn)
    check = functools.partial(_bare, typechecker=typechecker) if is_bare else typechecker
    checked, checked_result = functools.cache(lambda: check(fn)), functools.cache(lambda: check(_giver(fn, given)))
    passed = _PASSED[fn.__code__]

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        try:
            taken = _likeness_of_call(args, kwargs, is_annotated)
        except Unlike:
            return checked()(*args, **kwargs)
        results = passed.get(taken)
        if results is None:
            result = checked()(*args, **kwargs)
            if len(passed) >= KNOWN:
                passed.clear()
            results = passed.setdefault(taken, set())
            _note(result, results)
            return result
        result = fn(*args, **kwargs)
        if not _is_noted(result, results):
            given.result = result
            checked_result()(*args, **kwargs)
            _note(result, results)
        return result

    call.has_its_shapes_checked = True  # type: ignore[attr-defined]
    return call


def has_shapes(annotation: Any) -> bool:
    """Whether shapes are asked for in a function's annotations, or in one of them.  What is quoted may hold any."""
    if isinstance(annotation, FunctionType):
        return any(map(has_shapes, annotation.__annotations__.values()))
    is_shape = isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_shape or isinstance(annotation, str) or any(map(has_shapes, get_args(annotation)))


def _giver(fn: FunctionType, given: threading.local) -> FunctionType:
    """A function that looks like `fn`, and gives what it is told in place of running."""

    def give(*_args: Any, **_kwargs: Any) -> Any:
        return given.result

    giver = FunctionType(give.__code__, fn.__globals__, fn.__name__, None, give.__closure__)
    functools.update_wrapper(giver, fn)
    return giver


def _is_noted(result: Any, results: set[Hashable]) -> bool:
    try:
        return likeness(result) in results
    except Unlike:
        return False


def _note(result: Any, results: set[Hashable]) -> None:
    with contextlib.suppress(Unlike):
        results.add(likeness(result))


def _likeness_of_call(args: tuple[Any, ...], kwargs: dict[str, Any], is_annotated: list[bool]) -> Hashable:
    """What decides whether arguments pass: those that have no annotation always do."""
    n_named = len(is_annotated)
    taken = [likeness(value) for at, value in enumerate(args) if at >= n_named or is_annotated[at]]
    if kwargs:
        return len(args), *taken, *((name, likeness(value)) for name, value in kwargs.items())
    return len(args), *taken


def likeness(value: Any) -> Hashable:
    """What annotations can tell of a value: type, dtype and shape, words and classes themselves, and the same of what
    it contains.  Numbers count by their type: no annotation asks for more.  Raises `Unlike`."""
    kind = type(value)
    read = _READERS.get(kind)
    if read is None:
        read = _READERS[kind] = _reader(kind)
    return read(value)


def _reader(kind: Any) -> Callable[[Any], Hashable]:
    """How values of a type are read.  Of cells of tables no annotation speaks, and what is no container has none."""
    torch = sys.modules.get("torch")
    if kind is str or issubclass(kind, type):
        return lambda value: value
    if issubclass(kind, np.ndarray) or (torch is not None and issubclass(kind, torch.Tensor)):
        return lambda value: (kind, value.dtype, value.shape)
    if issubclass(kind, list | tuple):
        return lambda value: (kind, *map(likeness, _few(value)))
    if issubclass(kind, set | frozenset):
        return lambda value: (kind, frozenset(map(likeness, _few(value))))
    if issubclass(kind, dict):
        return lambda value: (kind, *((likeness(name), likeness(held)) for name, held in _few(value).items()))
    is_whole = kind.__module__.partition(".")[0] in ("pandas", "xarray")
    return type if is_whole or issubclass(kind, GeneratorType) or not hasattr(kind, "__iter__") else _unlike


def _few(values: Any) -> Any:
    return values if len(values) <= FEW else _unlike(values)


def _unlike(_value: Any) -> Hashable:
    raise Unlike


_READERS: dict[type, Callable[[Any], Hashable]] = {}
