"""`headlapse verify-known`: public models whose heads the literature knows, measured here and compared."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import pipeline
from .engine.runtime.errors import UserError
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.study.known_heads import KNOWN, Check, CheckName
from .options import CacheOptions, MechanismOptions, VerifyKnownOptions

FOLDER = "known"
"""Below the cache folder, so that no command takes these stores for the newest one."""


@dataclass
class Verification:
    """What was compared, and what could not be."""

    lines: list[str] = field(default_factory=list)
    lacking: dict[CheckName, str] = field(default_factory=dict)
    """Check -> why it could not be made."""

    all_agree: bool = True

    @property
    def problem(self) -> str:
        """In one line, which checks could not be made, of which models, and why the first of them."""
        by_model: dict[str, list[str]] = {}
        for name in self.lacking:
            by_model.setdefault(KNOWN[name].model, []).append(name)
        needs = ", ".join(f"{' and '.join(names)} (of {model})" for model, names in by_model.items())
        return f"not verified: {needs}: {next(iter(self.lacking.values()))}"


def verify_known(options: VerifyKnownOptions, folder: Path) -> Verification:
    """Measure and compare every check; one that cannot be made is named, and the others go on."""
    options.refuse_impossible()
    verification = Verification()
    for name in options.only or tuple(KNOWN):
        try:
            store = _measured(KNOWN[name], options, folder)
            agree = list(_compared(KNOWN[name], store, verification.lines))
        except UserError as error:
            verification.lacking[name] = str(error)
            continue
        verification.all_agree &= all(agree)
    return verification


def _measured(check: Check, options: VerifyKnownOptions, folder: Path) -> Path:
    """The store of a check, with its mechanism.  Raises `UserError` where a checkpoint of it cannot be had."""
    store = folder / FOLDER / f"{check.name}-{options.trials}.zarr"
    cached = pipeline.cache(
        CacheOptions(
            model=check.model, checkpoints=check.checkpoints, task=check.task, trials=options.trials, store=store,
            device=options.device, memory=options.memory,
        ),
        folder,
    )  # fmt: skip
    _refuse_incomplete(cached)
    measured = pipeline.mechanism(
        MechanismOptions(store, parts=("patching", "roles"), device=options.device, memory=options.memory), folder
    )
    _refuse_incomplete(measured)
    return store


def _refuse_incomplete(work: pipeline.Work) -> None:
    for label, problem in work.problems.items():
        raise UserError(f"{label}: {problem}")


def _compared(check: Check, store: Path, lines: list[str]) -> Iterator[bool]:
    """Whether each finding agrees; what is said of it is added to `lines`."""
    from .engine.mechanism.known_comparison import compare
    from .engine.report.findings.known_heads import comparison_lines

    heads, onsets = compare(check, CheckpointArrays(store / "mechanism", store).load())
    lines += comparison_lines(check, heads, onsets)
    yield from (compared.agrees for compared in heads)
    yield from (onset.agrees for onset in onsets)
