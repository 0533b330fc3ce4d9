"""Run every checkpoint of a model once on a contrastive task and keep every head's activations in a zarr store."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headlapse.engine.runtime.exit_status import DONE, FAILED, REFUSED, exit_status_of, print_problems
from headlapse.engine.study.study import DTYPES, Study
from headlapse.engine.study.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("HEADLAPSE_CACHE") or os.path.relpath(ROOT / "cache"))

CHECKPOINTS = """labels, a range or a set (study = the published eleven, log, all),
e.g. step1000 main | step120000..step143000 | study"""
TASK = "\n".join(f"{name}: {task.asks}" for name, task in TASKS.items())
TASK += """
or a JSON Lines file, e.g. prompts.jsonl with lines such as
{"clean": "2+2=", "corrupt": "2+3=", "answer": "4", "wrong": "5"}"""
SITES = """what to keep: all, only what patching some layers needs, or z alone,
e.g. all | 6 | 4-8 | z"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="demo (trained here), a hub id or a directory, e.g. EleutherAI/pythia-160m")
    add("--checkpoints", nargs="+", default=[], metavar="C", help=CHECKPOINTS)
    add("--task", default="decimal", help=TASK)
    add("--trials", type=int, help="distinct prompt pairs, e.g. 30 (default: 15, or all lines of a file)")
    add("--sites", nargs="+", default=["all"], metavar="S", help=SITES)
    add("--store", type=Path, help="where to keep it, e.g. cache/mine.zarr (default: cache/<model>-<task>.zarr)")
    add("--device", help="e.g. cpu or cuda:0 (default: cuda where there is one)")
    add("--dtype", default="float32", choices=DTYPES, help="arithmetic and what is stored, e.g. float16")
    add("--memory", help="what weights and computing may take, e.g. 8GB (default: three quarters of what there is)")
    add("--plan", action="store_true", help="say what would be fetched and stored, and stop")
    add("--overwrite", action="store_true", help="replace a store that answers another question")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    study = Study(args.model, args.task, args.trials, tuple(args.sites), args.dtype)
    # Torch and transformers take seconds to import: a wrong argument should not have to wait for them.
    from headlapse.engine.capture import run
    from headlapse.engine.checkpoints import resolve
    from headlapse.engine.runtime import resources
    from headlapse.engine.store import store, zarr_group

    checkpoints = resolve.resolve(study.model, args.checkpoints, CACHE)
    path = args.store or CACHE / run.store_name(study)
    where = resources.Machine.from_options(args.device, args.memory)
    if args.plan:
        from headlapse.engine.capture import estimate

        print(estimate.describe(study, checkpoints, CACHE, path, where.device))
        return DONE
    if not run.pending(study, checkpoints, path, args.overwrite):
        print(f"nothing to do: {len(checkpoints)} of {len(checkpoints)} checkpoints are in {path} already")
        return DONE
    with zarr_group.locked(path):
        missing = run.pending(study, checkpoints, path, args.overwrite)
        started = time.perf_counter()
        bar = tqdm(
            run.cache_series(study, missing, path, CACHE, where, args.overwrite),
            total=len(missing),
            desc="cache",
            unit="ckpt",
        )
        problems = tell(bar)
        seconds = time.perf_counter() - started
    print_problems(problems)
    done = len(missing) - len(problems)
    if not done:
        return FAILED if len(problems) < len(checkpoints) else REFUSED
    opened = store.Store(path)
    for warning in store.duplicate_weights(opened):
        print(f"warning: {warning}", file=sys.stderr)
    n_prompts = opened.trials().length.size
    caught = f"{done} checkpoint{'s' * (done != 1)} x {n_prompts} prompts"
    peak = resources.format_bytes(resources.peak_memory(where.device))
    print(f"cached {caught} in {path} ({seconds:.1f} s on {where.device}, {study.dtype}, peak memory {peak})")
    return FAILED if problems else DONE


def tell(outcomes: Any) -> dict[str, str]:
    """Say what each checkpoint has to say as it comes; what could not be done, by label."""
    problems = {}
    for outcome in outcomes:
        for note in outcome.notes:
            outcomes.write(f"note: {note}", file=sys.stderr)
        if outcome.problem:
            problems[outcome.label] = outcome.problem
    return problems


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
