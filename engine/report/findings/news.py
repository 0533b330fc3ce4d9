"""What comes of a training that is watched: a line for each checkpoint."""

import xarray as xr

from ...measures.logit_diff import finished, strongest, timeline
from ...study.patch_settings import PatchSettings
from ..result import heads_of, ranges, signed


def checkpoint_news(run: xr.Dataset, settings: PatchSettings, label: str) -> str:
    """One checkpoint of a patched run: both unpatched runs, and the heads whose patch changes the most."""
    one = finished(run.sel(checkpoint=[label]))
    [row], [best] = (
        table(one, settings.direction).astype(object).to_dict("records") for table in (timeline, strongest)
    )
    unpatched = ", ".join(f"{name} {_amount(row[name], row[f'{name}_rate'])}" for name in ("clean", "corrupt"))
    layer = f"layers {ranges(settings.layers)} together" if settings.joint else f"layer {row['best_layer']}"
    heads = f"{heads_of(best['subset'])} of {layer}"
    return f"{label}: {unpatched}; with {heads} {_amount(best['mean'], best['rate'])}"


def _amount(nats: float, rate: float) -> str:
    """A mean logit difference, and how often the right answer is ahead."""
    return f"{signed(float(nats), 2)} nats ({rate:.0%} right)"
