"""Write a patched run as a page with figures and tables: index.html, PNG, SVG and CSV."""

import argparse
import os
import sys
from pathlib import Path

from headlapse.engine.runtime.exit_status import DONE, exit_status_of

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HEADLAPSE_CACHE") or os.path.relpath(ROOT / "cache"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("store", nargs="?", type=Path, help="e.g. cache/demo-decimal.zarr (default: the newest under cache/)")
    add("--out", type=Path, help="folder to write, e.g. cache/demo-decimal-report (default: <store>-report beside it)")
    add("--name", help="which patched run, e.g. parity (default: the newest; the page lists them all)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Torch, xarray and matplotlib take seconds to import: --help should not have to wait for them.
    from headlapse.engine.report import page
    from headlapse.engine.store import store

    path = (args.store or store.find_store(CACHE)).absolute()
    out = args.out or path.with_name(f"{path.name.removesuffix('.zarr')}-report")
    print(page.write_report(store.Store(path), out, args.name))
    return DONE


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
