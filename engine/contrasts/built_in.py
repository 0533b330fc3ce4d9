"""The built-in tasks, each a seeded generator of contrasts.  To add one: write the function, name it in `TASKS`."""

from collections.abc import Callable, Iterator

from headlapse.engine.contrasts.contrast import Contrast
from headlapse.engine.contrasts.decimals import decimal, published

SEED = 0

TASKS: dict[str, Callable[[int], Iterator[Contrast]]] = {"decimal": decimal, "published": published}
