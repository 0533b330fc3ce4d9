"""What heads do and how their weights change, at every checkpoint of a store; no prompt is run again."""

import argparse
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from headlapse.engine.runtime.exit_status import DONE, FAILED, REFUSED, exit_status_of, print_problems
from headlapse.engine.study.study import ARITHMETICS

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HEADLAPSE_CACHE") or os.path.relpath(ROOT / "cache"))

PARTS = """attribution (what each head adds to the logit difference directly), attention (to the
first token, the previous, itself, the digits), weights (QK and OV: norms, change, likeness),
patching (gradient estimate beside the exact effect), e.g. attribution weights (default: all)"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("store", nargs="?", type=Path, help="e.g. cache/demo-decimal.zarr (default: the newest under cache/)")
    add("--checkpoints", nargs="+", metavar="C", default=["all"], help="e.g. step1000 step4000..main (default: all)")
    add("--parts", nargs="+", choices=["attribution", "attention", "weights", "patching"], help=PARTS)
    add("--direction", default="denoise", choices=["denoise", "noise"], help="of patching, e.g. noise (see patch.py)")
    add("--device", help="e.g. cpu or cuda:0 (default: cuda where there is one)")
    add("--dtype", choices=ARITHMETICS, help="arithmetic, e.g. float32 (default: the store's)")
    add("--memory", help="what weights and computing may take, e.g. 8GB (default: three quarters of what there is)")
    add("--overwrite", action="store_true", help="replace what was measured before")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # Torch and transformers take seconds to import: a wrong argument should not have to wait for them.
    from headlapse.engine.mechanism import run as mechanism_run
    from headlapse.engine.mechanism import store as mechanism_store
    from headlapse.engine.report.findings import mechanism
    from headlapse.engine.runtime import resources
    from headlapse.engine.runtime.format import format_bytes
    from headlapse.engine.store import store, zarr_group
    from headlapse.engine.study import mechanism_settings

    path = args.store or store.find_store(CACHE)
    held = store.Store(path)
    plan = mechanism_run.make_plan(held, args.parts or mechanism_settings.PARTS, args.direction, args.dtype)
    asked = mechanism_run.wanted(held, args.checkpoints)
    where = resources.Machine.from_options(args.device, args.memory, plan.dtype)
    with zarr_group.locked(path):
        if args.overwrite:
            zarr_group.remove(mechanism_store.mechanism_path(held))
        run = mechanism_store.open_mechanism(held, plan.settings)
        missing = {label: asked[label] for label in run.missing(asked)}
        started = time.perf_counter()
        with tqdm(total=len(missing), desc="mechanism", unit="checkpoint", disable=not missing) as bar:
            outcomes = list(mechanism_run.measure_series(held, plan, run, missing, CACHE, where, bar.update))
        seconds = time.perf_counter() - started
    problems = {outcome.label: outcome.problem for outcome in outcomes if outcome.problem}
    done = run.dataset()
    if done.complete.any():
        print(mechanism.mechanism_text(done, plan.settings))
        n = sum(outcome.problem is None for outcome in outcomes)
        peak = format_bytes(resources.peak_memory(where.device))
        speed = f"{n} checkpoint{'s' * (n != 1)} in {seconds:.1f} s ({where.device}, {plan.dtype}), peak memory {peak}"
        print(f"{speed if missing else 'nothing to do'}; mechanism is in {path}")
    print_problems(problems)
    return DONE if not problems else FAILED if done.complete.any() else REFUSED


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
