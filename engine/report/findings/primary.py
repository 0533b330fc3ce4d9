"""What was named before anything was patched, and what came of it."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import xarray as xr

from ...runtime.format import format_count
from ...statistics.primary import PrimaryTest, primary_test
from ...study.patch_settings import PatchSettings
from ...study.primary import Primary, hash_of, parse_primary
from .finding import Finding

CHANGED = "what is written is not what was written, for its hash is another; it is not tested"


def primary_tests(
    complete: xr.Dataset, settings: PatchSettings, study: Mapping[str, Any]
) -> list[tuple[Primary, PrimaryTest | None]]:
    """Each hypothesis and its test, None until it can be made; none where nothing was written, or it was changed."""
    record = complete.attrs.get("primary")
    if record is None or is_changed(record, settings, study):
        return []
    hypotheses = parse_primary(record["tests"])
    return [(primary, primary_test(complete, settings, primary, len(hypotheses))) for primary in hypotheses]


def is_changed(record: Mapping[str, Any], settings: PatchSettings, study: Mapping[str, Any]) -> bool:
    """Whether the record, the settings or the study are others than when its hash was taken."""
    return bool(record["sha256"] != hash_of(record, settings.to_attributes(), study))


def stamps(record: Mapping[str, Any]) -> tuple[str, ...]:
    """`(written 2026-11-26 after 2 runs, 1a2b3c4d)`: when, how many runs there were already, and its hash; the longest
    first, and each with what the shorter ones say."""
    before = f"after {format_count(len(record['runs_before']), 'run')}" if record["runs_before"] else ""
    date, short = record["written"][:10], ", ".join(filter(None, (before, record["sha256"][:8])))
    return f"(written {date} {short})", f"({date} {short})", f"({short})"


def answer(test: PrimaryTest) -> str:
    """Yes, not found, or why it cannot be told."""
    if math.isnan(test.p):
        return "cannot tell from one prompt"
    return "yes" if test.is_found else "not found"


def primary_finding(run: xr.Dataset, settings: PatchSettings, study: Mapping[str, Any]) -> Finding | None:
    """All of them, each at its level; None where none was written."""
    record = run.attrs.get("primary")
    if record is None:
        return None
    title = "What was named beforehand"
    if is_changed(record, settings, study):
        return Finding(title, None, (CHANGED,), "primary")
    rows, numbers = {}, {}
    for primary, test in primary_tests(run, settings, study):
        if test is None:
            rows[str(primary)] = dict.fromkeys(("nats", "95 % interval", "p", "answer"), "-") | {"answer": "not yet"}
            continue
        rows[str(primary)] = {
            "nats": f"{test.effect:+.2f}",
            "95 % interval": "-" if math.isnan(test.low) else f"{test.low:+.2f} .. {test.high:+.2f}",
            "p": "-" if math.isnan(test.p) else f"{test.p:.4f}",
            "answer": answer(test),
        }
        numbers[str(primary)] = {"effect": test.effect, "low": test.low, "high": test.high, "p": test.p}
    tables = [pd.DataFrame.from_dict(each, orient="index").rename_axis("hypothesis") for each in (rows, numbers)]
    note = (
        f"written {record['written']}, sha256 {record['sha256']}, "
        f"{'after ' + ', '.join(record['runs_before']) if record['runs_before'] else 'before any run of this store'}; "
        f"each tested at {0.05 / len(rows):.2g}: layers by the permutation test, heads over prompts"
    )
    return Finding(title, tables[0].rename_axis(None), (note,), "primary", tables[1])
