"""How exact a patched run was found to be, in a line.  Pure."""

import xarray as xr


def self_check_text(run: xr.Dataset) -> str:
    """The largest difference from stock transformers that the run saw of itself, in nats."""
    largest = float(run.self_check.max())
    return f"self-check against full hooked forwards of stock transformers: largest difference {largest:.1e} nats"
