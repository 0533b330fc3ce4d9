"""Time headlapse against the tools used today: the same patched runs, in turn, on random weights of Pythia's shapes."""

import argparse
import os
import sys
from pathlib import Path

from headlapse.engine.guard import DONE, guarded
from headlapse.engine.study import DTYPES

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HEADLAPSE_CACHE") or os.path.relpath(ROOT / "cache"))

TOOLS = """who runs, e.g. headlapse hooks nnsight-several (default: all that are installed;
pip install -e '.[bench]' installs TransformerLens and nnsight)"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--shape", default="pythia-160m", help="e.g. pythia-410m")
    add("--tools", nargs="+", metavar="T", help=TOOLS)
    add("--workloads", nargs="+", default=["parity", "each", "splits", "lattice"], metavar="W", help="e.g. parity each")
    add("--trials", type=int, default=15, help="prompt pairs, e.g. 30")
    add("--tokens", type=int, nargs=2, default=[12, 17], metavar="N", help="of clean and corrupt prompts, e.g. 12 17")
    add("--sample", type=int, default=72, help="patched conditions that a peer is timed on, 0 for all, e.g. 144")
    add("--device", help="e.g. cpu or cuda:0 (default: cuda where there is one)")
    add("--dtype", default="float32", choices=DTYPES, help="arithmetic of all tools, e.g. bfloat16")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    from headlapse.engine import bench, machine

    device = machine.Machine.asked(args.device).device
    directory = CACHE / "bench" / f"{args.shape}-{args.dtype}"
    bench.write_random(args.shape, directory, args.dtype)
    trials = bench.some_trials(args.trials, *args.tokens)
    tools = args.tools or bench.installed()
    print(bench.machine(device, args.dtype), flush=True)
    print(f"{args.shape}, {args.trials} trials, {args.tokens[0]} and {args.tokens[1]} tokens", flush=True)
    contestants = {tool: bench.Contestant(tool, directory, trials, args.dtype, device) for tool in tools}
    for table in bench.tables(contestants, args.shape, args.workloads, args.sample):
        print(f"\n{table}", flush=True)
    for contestant in contestants.values():
        contestant.close()
    return DONE


if __name__ == "__main__":
    sys.exit(guarded(main))
