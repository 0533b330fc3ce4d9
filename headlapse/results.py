"""What a store's results say, as lines and as numbers: one way for the command line and for Python."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .engine.runtime.errors import UserError
from .engine.runtime.quiet import quiet_libraries
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.store.disk import last_write_ns
from .engine.study.mechanism_settings import MechanismSettings
from .engine.study.reading import READING, Reading
from .pipeline import open_run, report_folder, run_path


def patch_tables(store: Path, name: str, reading: Reading = READING) -> Iterator[str]:
    """Every table of a patched run, with how to read it."""
    from .engine.report.findings.all_findings import tell
    from .engine.report.findings.self_check import self_check_text

    run, settings = open_run(store, name)
    with quiet_libraries():
        yield from tell(run, settings, study_of(store), reading)
    if "self_check" in run:
        yield self_check_text(run)


def patch_lines(store: Path, name: str, reading: Reading = READING) -> list[str]:
    """The verdict on a patched run: at most twelve lines, with the page where there is one."""
    from .engine.report.findings.verdict import verdict

    run, settings = open_run(store, name)
    with quiet_libraries():
        return verdict(run, settings, study_of(store), _page(store, name), reading)


def news_lines(store: Path, name: str | None, labels: Sequence[str]) -> list[str]:
    """Checkpoints that were just finished, a line each: what a patched run says of them, where there is one."""
    from .engine.report.findings.news import checkpoint_news

    if name is None:
        return [f"{label}: finished" for label in labels]
    run, settings = open_run(store, name)
    return [checkpoint_news(run, settings, label) for label in labels]


def _page(store: Path, name: str) -> str:
    """Where the page is, and what to type where it is not, or is older than the run."""
    page = report_folder(store) / "index.html"
    if not page.is_file():
        return "headlapse report writes it"
    is_older = page.stat().st_mtime_ns < last_write_ns(run_path(store, name))
    return f"{page}{' (older than this run: headlapse report)' if is_older else ''}"


def heads(store: Path, name: str, reading: Reading = READING) -> pd.DataFrame:
    """What each head does when it is patched alone: one row for each checkpoint, layer and head."""
    from .engine.statistics.head_effects import head_effects

    run, settings = open_run(store, name)
    if settings.protocol == "published":
        raise UserError(f"{name} was made by the published protocol, which has no effects of heads; see its verdict")
    return head_effects(run, settings, reading.correction, reading.margin)


def mechanism_lines(store: Path, verbose: bool = False) -> list[str]:
    """What was measured of the mechanism: every checkpoint where `verbose`, then the final one in a few lines."""
    from .engine.report.findings.mechanism import mechanism_findings, mechanism_summary

    group = CheckpointArrays(store / "mechanism", store)
    settings, run = MechanismSettings.from_attributes(group.attrs["mechanism"]), group.load()
    with quiet_libraries():
        tables = [str(finding) for finding in mechanism_findings(run, settings)] if verbose else []
        return tables + mechanism_summary(run, settings, study_of(store))


def roles(store: Path) -> pd.DataFrame:
    """The roles of heads, one row for each checkpoint, role, layer and head."""
    from .engine.mechanism.role_summary import roles_frame

    group = CheckpointArrays(store / "mechanism", store)
    if "roles" not in MechanismSettings.from_attributes(group.attrs["mechanism"]).parts:
        raise UserError(f"{store} has no roles; store.mechanism(overwrite=True) measures them")
    return roles_frame(group.load())


def study_of(store: Path) -> dict[str, Any]:
    """What a store was made to answer."""
    return dict(CheckpointArrays(store).attrs["study"])
