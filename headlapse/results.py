"""What a store's results say, as lines and as numbers: one way for the command line and for Python."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from .engine.mechanism.store import MechanismRun
from .engine.store.zarr_group import CheckpointArrays
from .pipeline import open_run

Correction = Literal["bh", "holm"]


def patch_tables(store: Path, name: str, correction: Correction = "bh") -> Iterator[str]:
    """Every table of a patched run, with how to read it."""
    from .engine.report.findings.all_findings import tell
    from .engine.report.findings.self_check import self_check_text

    run, settings = open_run(store, name)
    yield from tell(run, settings, CheckpointArrays(store).attrs["study"], correction)
    if "self_check" in run:
        yield self_check_text(run)


def patch_lines(store: Path, name: str, correction: Correction = "bh") -> list[str]:
    """The verdict on a patched run: at most twelve lines."""
    return []


def mechanism_lines(store: Path, verbose: bool = False) -> list[str]:
    """What was measured of the mechanism: at the last finished checkpoint, or at every one."""
    from .engine.report.findings.mechanism import mechanism_text
    from .engine.report.findings.mechanism_summary import last_checkpoint

    run = MechanismRun(store / "mechanism")
    finding = mechanism_text(run.dataset(), run.settings)
    return [str(finding)] if verbose else last_checkpoint(finding)
