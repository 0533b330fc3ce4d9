"""Laws of forward hooks: they see and replace what enters and leaves a module, and are gone after the block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headlapse.engine.checkpoints.hooks import (
    collect_inputs,
    collect_outputs,
    hook_inputs,
    hook_outputs,
    replace_inputs,
    replace_outputs,
)


class Twice(nn.Module):
    """Twice its input, beside another value where asked."""

    def __init__(self, returns_tuple: bool = False) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, offset: float = 0.0) -> Any:
        output = 2 * hidden_states + offset
        return (output, "cache") if self.returns_tuple else output


ONE, THREE = torch.tensor([1.0]), torch.tensor([3.0])


@pytest.mark.parametrize("call", [lambda m: m(ONE), lambda m: m(offset=0.0, hidden_states=ONE)], ids=["args", "kwargs"])
def test_inputs_are_collected_and_replaced_however_they_are_passed(call: Callable[[nn.Module], Tensor]) -> None:
    module = Twice()
    with collect_inputs({"m": module}) as collected:
        assert call(module) == 2
    assert collected == {"m": ONE}
    with replace_inputs({"m": module}, lambda key, value: value + 2 if key == "m" else None):
        assert call(module) == 6
    assert call(module) == 2, "no hook is left"


def test_other_arguments_are_left_alone() -> None:
    module = Twice()
    with replace_inputs({0: module}, lambda _key, _value: THREE):
        assert module(ONE, 1.0) == 7
        assert module(ONE, offset=1.0) == 7
        assert module(offset=1.0, hidden_states=ONE) == 7
    seen: list[tuple[Any, ...]] = []
    with hook_inputs({0: module}, lambda _key, inputs: seen.append(inputs)):
        module(offset=1.0, hidden_states=ONE)
    assert seen == [(ONE, 1.0)]


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_outputs_are_collected_and_replaced_alone_or_first_of_a_tuple(returns_tuple: bool) -> None:
    module = Twice(returns_tuple)
    with collect_outputs({0: module}) as collected:
        module(ONE)
    assert collected == {0: torch.tensor([2.0])}
    with replace_outputs({0: module}, lambda _key, value: value + 1):
        output = module(ONE)
    assert output == ((THREE, "cache") if returns_tuple else THREE)
    with replace_outputs({0: module}, lambda _key, _value: None):
        assert (module(ONE)[0] if returns_tuple else module(ONE)) == 2


def test_hooks_are_gone_after_an_error() -> None:
    module = Twice()
    with pytest.raises(RuntimeError), hook_outputs({0: module}, lambda _key, _output: THREE):
        assert module(ONE) == 3
        raise RuntimeError
    with pytest.raises(RuntimeError), hook_inputs({0: module}, lambda _key, _inputs: THREE):
        assert module(ONE) == 6
        raise RuntimeError
    assert module(ONE) == 2
