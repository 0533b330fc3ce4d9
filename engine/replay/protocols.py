"""The two patching protocols behind one class: what a command needs of either, from a request to its results.

protocol = protocol_named("corrected")
plan = protocol.make_plan(request, store)
run = protocol.open_run(store, plan, protocol.name_of(request), overwrite=False)
outcomes = list(protocol.patch_series(store, plan, run, missing, cache, machine, progress))
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..runtime.outcome import Outcome
from ..runtime.resources import Machine
from ..store.patched_run import AnyRun, PatchedRun, TextRun
from ..store.store import Store
from ..study import patch_settings
from ..study.patch_settings import PatchRequest
from . import published_protocol, run
from .published_protocol import PublishedPlan
from .run import SweepPlan

Plan = TypeVar("Plan", SweepPlan, PublishedPlan)
Run = TypeVar("Run", bound=AnyRun)


@dataclass(frozen=True)
class PatchProtocol(Generic[Plan, Run]):
    """A way to patch every checkpoint of a store."""

    name: patch_settings.Protocol

    default: PatchRequest
    """What is patched when the user names neither subsets nor layers."""

    name_of: Callable[[PatchRequest], str]
    """What a run is called in the store when the user does not say."""

    make_plan: Callable[[PatchRequest, Store], Plan]
    """The request worked out for one store.  Raises `UserError` for what the protocol or the store does not have.

    Every plan has `settings`, `dtype` and `n_runs`, the patched runs of one checkpoint.
    """

    open_run: Callable[[Store, Plan, str, bool], Run]
    """The run of a store by its name, made where it is not there; or, with True, what is to replace it."""

    patch_series: Callable[[Store, Plan, Run, Sequence[str], Path, Machine, Callable[[int], object]], Iterator[Outcome]]
    """Patch the missing checkpoints one after another, verify a few runs of each, and write them.

    Takes the store, the plan, the run, the labels of the missing checkpoints, the folder of the model files, the
    machine, and `progress`, which is called with the number of patched runs that each batch completed.  A checkpoint at
    which a verified run is another in stock transformers has a problem.
    """


CORRECTED = PatchProtocol[SweepPlan, PatchedRun](
    "corrected", PatchRequest(), run.name_of, run.make_plan, run.open_run, run.patch_series
)
"""z of true heads, at aligned positions, replayed from the cache."""

PUBLISHED = PatchProtocol[PublishedPlan, TextRun](
    "published",
    PatchRequest(published_protocol.SUBSETS, published_protocol.LAYERS),
    published_protocol.name_of,
    published_protocol.make_plan,
    published_protocol.open_run,
    published_protocol.patch_series,
)
"""The published study's procedure, bug for bug: slices of the attention's output, generated texts."""


def protocol_named(name: patch_settings.Protocol) -> PatchProtocol[Any, Any]:
    """The protocol of a request.  What its plans and runs are depends on the name."""
    return PUBLISHED if name == "published" else CORRECTED
