"""Imports of torch, transformers and what they bring: some seconds, of which the collector need not have a share."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
