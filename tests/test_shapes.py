"""Laws of checks that are not made twice: what jaxtyping refuses is refused, whatever passed before."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Int

from headlapse.engine.statistics.means import interval
from headlapse.engine.statistics.onset import Series
from tests.shapes import FEW, Unlike, _bare, likeness, remembering

A, B = np.zeros(3), np.zeros((3, 4))


def both(value: Float[np.ndarray, " row"], other: Float[np.ndarray, "row column"]) -> Float[np.ndarray, " column"]:
    return other.sum(0) if other.shape[1] != 2 else value


def word(value: Literal["mean", "sum"], times: int = 1, *more: str, **named: Int[np.ndarray, " row"]) -> str:
    return value * times if times != 2 else times  # type: ignore[return-value]


def held(values: list[Float[np.ndarray, " row"]], by_name: dict[str, Float[np.ndarray, " row"]]) -> int:
    return len(values) + len(by_name)


def each(values: frozenset[int], kind: type[float]) -> Iterator[int]:
    yield from values


CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (both, (A, B), {}),
    (both, (A, B.T), {}),
    (both, (A,), {"other": B}),
    (both, (A, np.zeros((3, 2))), {}),
    (both, (A, B.astype(int)), {}),
    (both, (A, [B]), {}),
    (both, (A,), {}),
    (word, ("mean",), {}),
    (word, ("median",), {}),
    (word, ("mean", 2), {}),
    (word, ("mean", 3, "a", "b"), {}),
    (word, ("mean", 3, "a", 4), {}),
    (word, ("sum",), {"first": np.zeros(2, int), "second": np.zeros(2, int)}),
    (word, ("sum",), {"first": np.zeros(2, int), "second": np.zeros(3, int)}),
    (held, ([A], {"a": A}), {}),
    (held, ([A], {"a": B}), {}),
    (held, ([A], {"a": np.zeros(4)}), {}),
    (held, ([A] * (FEW + 1), {"a": A}), {}),
    (held, ([B] * (FEW + 1), {"a": A}), {}),
    (each, (frozenset({1}), float), {}),
    (each, (frozenset({"1"}), float), {}),
    (each, (frozenset({1}), str), {}),
]


def outcome(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    try:
        result = call(*args, **kwargs)
    except (jaxtyping.TypeCheckError, BeartypeCallHintViolation):
        return "refused"
    except TypeError:
        return "cannot be called so"
    return repr(list(result) if isinstance(result, Iterator) else result)


def test_what_is_refused_and_given_is_the_same_at_every_call() -> None:
    remembered = {fn: remembering(fn, typechecker=beartype) for fn, *_ in CALLS}
    expected = [outcome(_bare(fn, typechecker=beartype), args, kwargs) for fn, args, kwargs in CALLS]
    assert expected.count("refused") == 13
    for order in (1, -1, 1):
        assert [outcome(remembered[fn], args, kwargs) for fn, args, kwargs in CALLS[::order]][::order] == expected


def test_a_call_like_one_that_has_passed_is_not_checked_again() -> None:
    looks = []

    def counting(fn: Callable[..., Any]) -> Callable[..., Any]:
        checked = beartype(fn)

        def call(*args: Any, **kwargs: Any) -> Any:
            looks.append(fn)
            return checked(*args, **kwargs)

        return call

    def total(values: Float[np.ndarray, " row"]) -> float:
        return float(values.sum())

    remembered = remembering(total, typechecker=counting)
    for _ in range(3):
        remembered(A + 1)
    assert looks
    before = len(looks)
    remembered(A)
    assert len(looks) == before
    remembered(np.zeros(5))
    assert len(looks) > before


def test_functions_and_records_of_the_engine_are_checked() -> None:
    for _ in range(2):
        assert np.isfinite(interval(np.eye(3))).all()
        with pytest.raises(jaxtyping.TypeCheckError):
            interval([1.0, 2.0])  # type: ignore[arg-type]
        with pytest.raises(jaxtyping.TypeCheckError):
            Series("it", None, np.zeros(3), 0.5, "nats", True)


def test_what_cannot_be_looked_through_is_like_nothing() -> None:
    for value in (map(str, []), [0] * (FEW + 1), {at: at for at in range(FEW + 1)}):
        with pytest.raises(Unlike):
            likeness(value)
