"""Clean, corrupt and patched runs over training, as a table."""

import pandas as pd
import xarray as xr

from ...measures.logit_diff import NAMED, strongest, timeline
from ...study.patch_settings import PatchSettings


def format_timeline(run: xr.Dataset, settings: PatchSettings) -> str:
    """The timeline as a plain table, with a line that says how to read it."""
    frame = timeline(run, settings.direction)
    table = pd.DataFrame(index=frame.index)
    table["step"] = [str(step) if step >= 0 else "?" for step in frame["step"]]
    for name in ("clean", "corrupt", *NAMED):
        if name in frame:
            pairs = zip(frame[name], frame[f"{name}_rate"], strict=True)
            table[name] = [f"{nats:+.2f} {rate:4.0%}" for nats, rate in pairs]
    if not set(NAMED) & set(frame):
        best = strongest(run, settings.direction)
        table["largest effect"] = [
            f"{nats:+.2f} {rate:4.0%}" for nats, rate in zip(best["mean"], best["rate"], strict=True)
        ]
        table["heads"] = [label if len(label) <= 24 else f"{label[:23]}…" for label in best["subset"]]
    if "even_minus_odd_rate" in frame:
        table["even - odd rate"] = [f"{value:+.2f}" for value in frame["even_minus_odd_rate"]]
    if not settings.joint:
        table["best layer"] = frame["best_layer"].astype(str)
    judge = "all heads" if "all" in run.subset.values else "the subset with the largest effect"
    n = run.sizes["trial"]
    where = f"the layer with the largest effect of {judge}"
    if settings.joint:
        where = f"layers {', '.join(map(str, settings.layers))} at once"
    return (
        f"{table.to_string()}\n"
        f"mean logit difference (right - wrong, nats) and success rate over {n} distinct prompt{'s' * (n != 1)}; "
        f"patched columns: {settings.direction} at {where}"
    )
