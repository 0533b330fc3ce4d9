"""Libraries that keep to themselves: their warnings and log lines are not for the people who run a command."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("transformers", "huggingface_hub", "accelerate", "torch", "zarr", "matplotlib")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back libraries' warnings and log lines below errors while the body runs.

    A filter that was set before, by `python -W` or a test, still goes first.
    """
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", append=True)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
