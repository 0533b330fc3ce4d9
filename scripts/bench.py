"""Time headlapse against the tools used today: the same work in turn, on random weights of Pythia's shapes."""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from headlapse.engine.runtime.exit_status import DONE, exit_status_of  # noqa: E402
from headlapse.engine.study.study import ARITHMETICS  # noqa: E402

CACHE = Path(os.environ.get("HEADLAPSE_CACHE") or os.path.relpath(ROOT / "cache"))

TOOLS = """who runs, e.g. headlapse headlapse@bfloat16 hooks nnsight-several (default: all that are
installed; pip install -e '.[bench]' installs TransformerLens and nnsight)"""
WORKLOADS = """parity each splits lattice capture loading generation study growth overhead workers (default: all),
e.g. parity splits"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--shape", default="pythia-160m", help="e.g. pythia-410m")
    add("--tools", nargs="+", metavar="T", help=TOOLS)
    add("--workloads", nargs="+", default=[], metavar="W", help=WORKLOADS)
    add("--trials", type=int, default=15, help="prompt pairs, e.g. 30")
    add("--tokens", type=int, nargs=2, default=[12, 17], metavar="N", help="of clean and corrupt prompts, e.g. 12 17")
    add("--sample", type=int, default=72, help="patched conditions that a peer is timed on, 0 for all, e.g. 144")
    add("--repeats", type=int, default=5, help="of each workload, of which the fastest counts, e.g. 3")
    add("--device", help="e.g. cpu or cuda:0 (default: cuda where there is one)")
    add("--dtype", default="float32", choices=ARITHMETICS, help="arithmetic where a tool says none, e.g. bfloat16")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    from headlapse.engine.bench import contestants, random_models, table
    from headlapse.engine.runtime import resources

    random_models.pythia_config(args.shape)
    words = table.choose_workloads(args.workloads, args.shape)
    device = resources.Machine.from_options(args.device, dtype=args.dtype).device
    checkpoint = CACHE / "bench" / f"{args.shape}-{args.dtype}"
    random_models.write_random(args.shape, checkpoint, args.dtype)
    trials = random_models.some_trials(args.trials, *args.tokens)
    print(
        f"{table.machine(device)}; {args.shape}, {args.dtype}, prompts of {args.tokens[0]} and {args.tokens[1]} tokens"
    )
    tools = contestants.choose_tools(args.tools or contestants.installed(), args.dtype)
    series = CACHE / "bench" / f"{args.shape}-series"
    with contestants.at_work(tools, checkpoint, trials, device) as contestants:
        bench = table.Bench(
            args.shape,
            checkpoint,
            series,
            ROOT / "scripts",
            contestants,
            args.sample,
            args.trials,
            device,
            args.repeats,
        )
        for text in bench.tables(words):
            print(f"\n{text}", flush=True)
    return DONE


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
