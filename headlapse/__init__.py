"""A time-lapse of attention heads: which heads cause a behaviour, and when in training they start to.

    import headlapse as hl
    store = hl.cache("EleutherAI/pythia-160m", task="ioi", checkpoints="log")
    run = store.patch(subsets=["each"], layers="all")
    print(run.verdict())

Importing this loads neither torch nor any other library; that comes with the first call that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.runtime.errors import UserError as UserError
    from .engine.runtime.errors import VerificationError as VerificationError
    from .face import PatchedRun as PatchedRun
    from .face import Store as Store
    from .face import cache as cache
    from .face import checkpoints as checkpoints
    from .face import compare as compare
    from .face import doctor as doctor
    from .face import open_store as open
    from .version import __version__ as __version__

__all__ = [
    "PatchedRun",
    "Store",
    "UserError",
    "VerificationError",
    "__version__",
    "cache",
    "checkpoints",
    "compare",
    "doctor",
    "open",
]

_HOMES = {
    "PatchedRun": ("face", "PatchedRun"),
    "Store": ("face", "Store"),
    "UserError": ("engine.runtime.errors", "UserError"),
    "VerificationError": ("engine.runtime.errors", "VerificationError"),
    "__version__": ("version", "__version__"),
    "cache": ("face", "cache"),
    "checkpoints": ("face", "checkpoints"),
    "compare": ("face", "compare"),
    "doctor": ("face", "doctor"),
    "open": ("face", "open_store"),
}
"""Public name -> the module that holds it, and its name there."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
