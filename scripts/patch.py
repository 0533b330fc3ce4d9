"""Patch heads between clean and corrupt runs at every checkpoint of a store: exact, and no prompt is run again."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.exit_status import DONE, FAILED, REFUSED, exit_status_of, print_problems
from headlapse.engine.study.patch_settings import PatchRequest
from headlapse.engine.study.study import ARITHMETICS, MEASURES

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HEADLAPSE_CACHE") or os.path.relpath(ROOT / "cache"))

PROTOCOL = """corrected (z of true heads at aligned positions, default) or published (the study bug for bug:
layer 6, slices of the attention's output, 20 greedy tokens)"""
MEASURED = """beside the logit difference: probability, rank, kl (from the clean run) or sequence (whole
answers), e.g. probability kl"""
SUBSETS = """which heads: even odd none all, each (single heads), but (all but one), balanced (every split
in halves), lattice (all 2^H), size:K (all of K heads), random:N, halvings:N (even, odd and N
random other halves, each with what it leaves), orders:N (beginnings of N random orders and
their reverses, for Shapley values), or heads themselves,
e.g. even odd 0,2,4 size:6 random:100 (default: even odd all each)"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("store", nargs="?", type=Path, help="e.g. cache/demo-decimal.zarr (default: the newest under cache/)")
    add("--subsets", nargs="+", metavar="S", help=SUBSETS)
    add("--layers", nargs="+", metavar="L", help="which layers, one at a time, e.g. all | 6 | 4-8 11 (default: all)")
    add("--joint", action="store_true", help="patch those layers all at once, e.g. --layers 4-8 --joint")
    add("--positions", default="last", help="last, end:K (the last K) or all (prompts of equal length), e.g. end:3")
    add(
        "--direction",
        default="denoise",
        choices=["denoise", "noise"],
        help="denoise (clean into corrupt) or noise (corrupt into clean)",
    )
    add("--measures", nargs="+", default=[], choices=MEASURES, help=MEASURED)
    add("--protocol", default="corrected", choices=["corrected", "published"], help=PROTOCOL)
    add("--correction", default="bh", choices=["bh", "holm"], help="of p over layers and checkpoints, e.g. holm")
    add("--generate", type=int, default=0, metavar="N", help="greedy tokens of every patched run as well, e.g. 20")
    add("--name", help="what to call the run in the store, e.g. parity (default: from the settings)")
    add("--device", help="e.g. cpu or cuda:0 (default: cuda where there is one)")
    add("--dtype", choices=ARITHMETICS, help="arithmetic of the replay, e.g. float32 (default: the store's)")
    add("--memory", help="what weights and computing may take, e.g. 8GB (default: three quarters of what there is)")
    add("--overwrite", action="store_true", help="replace a run of that name")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.name is not None and not re.fullmatch(r"[\w+=-][\w.+=-]{0,99}", args.name):
        raise UserError(f"--name {args.name!r}: a name is a word of letters, digits and . _ + = -, of 100 at most")
    # Torch and transformers take seconds to import: a wrong argument should not have to wait for them.
    from headlapse.engine.replay.protocols import protocol_named
    from headlapse.engine.report.findings import all_findings
    from headlapse.engine.runtime import resources
    from headlapse.engine.store import store, zarr_group

    protocol = protocol_named(args.protocol)
    subsets, layers = args.subsets or protocol.default.subsets, args.layers or protocol.default.layers
    how = (args.joint, args.positions, args.direction, args.dtype, tuple(args.measures), args.generate)
    asked = PatchRequest(tuple(subsets), tuple(layers), *how)
    path = args.store or store.find_store(CACHE)
    held = store.Store(path)
    plan = protocol.make_plan(asked, held)
    name = args.name or protocol.name_of(asked)
    where = resources.Machine.from_options(args.device, args.memory, plan.dtype)
    with zarr_group.locked(path):
        if args.overwrite:
            zarr_group.remove(path / "patches" / name)
        run = protocol.open_run(held, plan, name, where.device)
        missing = [label for label in held.complete() if label not in run.complete()]
        started = time.perf_counter()
        with tqdm(
            total=plan.n_runs * len(missing), desc="patch", unit="run", unit_scale=True, disable=not missing
        ) as bar:
            outcomes = list(protocol.patch_series(held, plan, run, missing, CACHE, where, bar.update))
        seconds = time.perf_counter() - started
    problems = {outcome.label: outcome.problem for outcome in outcomes if outcome.problem}
    done = run.dataset()
    if done.complete.any():
        for told in all_findings.tell(done, plan.settings, held.study, args.correction):
            print(told)
        n_runs = plan.n_runs * (len(missing) - len(problems))
        speed = f"{n_runs:,} patched runs in {seconds:.1f} s ({n_runs / seconds:,.0f}/s, {where.device}, {plan.dtype})"
        speed += f", peak memory {resources.format_bytes(resources.peak_memory(where.device))}"
        print(f"{speed if missing else 'nothing to do'}; {name} is in {path}")
        if "self_check" in done:
            worst = float(done.self_check.max())
            print(f"self-check against full hooked forwards of stock transformers: largest difference {worst:.1e} nats")
    print_problems(problems)
    return DONE if not problems else FAILED if done.complete.any() else REFUSED


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
