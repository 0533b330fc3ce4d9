"""What simulations run under."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import config


@contextmanager
def unchecked() -> Iterator[None]:
    """Shapes and types go unchecked while the body runs: over hundreds of repetitions that takes as long as the calls
    themselves, and other tests make the same calls."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
