"""Forward hooks, in place for the length of a `with` block: see, collect or replace what enters or leaves modules."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

Key = TypeVar("Key")


@contextmanager
def hook_inputs(
    modules: Mapping[Key, nn.Module], act: Callable[[Key, tuple[Any, ...]], Tensor | None]
) -> Iterator[None]:
    """Before each of the modules runs, call `act` with its key and its inputs; a tensor takes the first one's place.

    Inputs are the positional arguments and then those by keyword, of which `hidden_states` comes first.
    """

    def hook_of(key: Key) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            names = sorted(kwargs, key=lambda name: name != "hidden_states")
            replacement = act(key, (*args, *(kwargs[name] for name in names)))
            if replacement is None:
                return None
            return ((replacement, *args[1:]), kwargs) if args else ((), {**kwargs, names[0]: replacement})

        return hook

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook_of(key), with_kwargs=True).remove)
        yield


@contextmanager
def hook_outputs(modules: Mapping[Key, nn.Module], act: Callable[[Key, Any], Any]) -> Iterator[None]:
    """After each of the modules ran, call `act` with its key and its output; what is not None takes the output's place.

    An output may be a tensor, or a tuple that begins with one.
    """

    def hook_of(key: Key) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda _module, _args, output: act(key, output)

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.callback(module.register_forward_hook(hook_of(key)).remove)
        yield


@contextmanager
def collect_inputs(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """Collect the first input of each module while the body runs, detached; of several calls the last."""
    collected: dict[Key, Tensor] = {}

    def collect(key: Key, inputs: tuple[Any, ...]) -> None:
        collected[key] = inputs[0].detach()

    with hook_inputs(modules, collect):
        yield collected


@contextmanager
def collect_outputs(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """Collect each module's output, or the first of its outputs, while the body runs; of several calls the last."""
    collected: dict[Key, Tensor] = {}

    def collect(key: Key, output: Any) -> None:
        collected[key] = (output[0] if isinstance(output, tuple) else output).detach()

    with hook_outputs(modules, collect):
        yield collected


@contextmanager
def replace_inputs(modules: Mapping[Key, nn.Module], replace: Callable[[Key, Tensor], Tensor | None]) -> Iterator[None]:
    """While the body runs, the first input of each module is what `replace` makes of it; None leaves it alone."""
    with hook_inputs(modules, lambda key, inputs: replace(key, inputs[0])):
        yield


@contextmanager
def replace_outputs(
    modules: Mapping[Key, nn.Module], replace: Callable[[Key, Tensor], Tensor | None]
) -> Iterator[None]:
    """While the body runs, the output of each module, or the first of its outputs, is what `replace` makes of it."""

    def act(key: Key, output: Any) -> Any:
        if not isinstance(output, tuple):
            return replace(key, output)
        replacement = replace(key, output[0])
        return None if replacement is None else (replacement, *output[1:])

    with hook_outputs(modules, act):
        yield
