"""Two controls for a claim about even and odd heads: one where there is nothing, one where there is something.

    renumbered   the embedded series with the heads of one layer renumbered, so that the rule of the published study is
                 met: of the halves of the heads that meet it, the middle one is made the even heads.  Nothing about the
                 model's function changes
    planted      a series made by hand: one head of its own acts early, all even heads act from a known step on

Each is captured and patched as any other series, and has a row: what that rule says of it (even heads succeed on 0.3
more of the prompts than odd ones), and what headlapse says.

    python scripts/controls.py [STORE]

STORE is of a GPT-NeoX series with equal splits (default: cache/demo-decimal.zarr, patched with --subsets lattice).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import headlapse as hl  # noqa: E402
from headlapse.engine.measures.logit_diff import PATTERN  # noqa: E402
from headlapse.engine.runtime.errors import UserError  # noqa: E402
from headlapse.engine.runtime.exit_status import DONE, exit_status_of  # noqa: E402

PLANTED_STEPS, ONE_HEAD, ONE_HEAD_FROM, EVEN_FROM = range(0, 801, 100), 5, 200, 700
"""Of the series made by hand: the head that acts on its own, and from when on it and all even heads do."""

PAIRS = tuple((clean, corrupt) for clean in range(6, 10) for corrupt in range(1, 5))
"""Digits of its prompts."""


@dataclass(frozen=True)
class Control:
    """One row."""

    name: str
    rates: tuple[float, ...]
    """Even minus odd success rate at every checkpoint, in the layer that is patched."""

    labels: tuple[str, ...]
    verdict: str
    """What it says of even and odd heads, and of the head that acts on its own."""

    met: str = ""
    """How many of all equal splits meet the rule at the last checkpoint."""

    def __str__(self) -> str:
        first = next((label for label, rate in zip(self.labels, self.rates, strict=True) if rate > PATTERN), None)
        rule = f"pattern from {first}, {self.rates[-1]:+.2f} at the last" if first else f"none ({max(self.rates):+.2f})"
        return f"{self.name:<12}rule > {PATTERN}: {rule}{self.met}\n{'':<12}headlapse:  {self.verdict}"


def controls(store: Path, out: Path, task: str | None = None) -> list[Control]:
    """Make both series in the folder `out`, capture and patch them."""
    for name in ("renumbered", "planted"):
        if (out / name / "model").is_dir():  # made by an earlier run
            shutil.rmtree(out / name)
    return [renumbered(hl.open(store), out / "renumbered", task), planted(out / "planted")]


def renumbered(store: hl.Store, out: Path, task: str | None = None) -> Control:
    """The series of a store, with the heads of its leading layer renumbered as suits the claim."""
    from headlapse.engine.checkpoints.renumbered import renumber_heads
    from headlapse.engine.store.checkpoint_arrays import CheckpointArrays

    layer, half, met = half_that_meets_the_rule(with_all_splits(store))
    rest = [head for head in range(2 * len(half)) if head not in half]
    order = [head for pair in zip(half, rest, strict=True) for head in pair]
    for label in store.checkpoints:
        location = CheckpointArrays(store.path).record(label)["provenance"]["location"]
        renumber_heads(Path(location), out / "model" / label, layer, order)
    (out / "order.json").write_text(json.dumps({"layer": layer, "order": order}))
    return row("renumbered", out, layer, task or str(store.study["task"]), met)


def with_all_splits(store: hl.Store) -> hl.PatchedRun:
    """A patched run with every equal split."""
    for name in reversed(store.runs):
        settings = store[name].settings
        if settings.protocol == "corrected" and {"balanced", "lattice"} & set(settings.subsets):
            return store[name]
    return store.patch(subsets=["all", "balanced"])


def half_that_meets_the_rule(run: hl.PatchedRun) -> tuple[int, list[int], str]:
    """The layer where all heads do most at the last checkpoint; of the halves of its heads that meet the rule there,
    the middle one; and how many do.

    Not the best of all: it has the smallest p that there is, for having been chosen.
    """
    import numpy as np

    from headlapse.engine.measures.logit_diff import best_layer, finished
    from headlapse.engine.statistics.permutation import halves_and_complements

    complete = finished(run.dataset.load())
    layer = int(best_layer(complete.isel(checkpoint=[-1]), run.settings.direction).values[0])
    rows = halves_and_complements(complete.mask.values)
    assert rows is not None, "every equal split was run"
    last = complete.logit_diff.isel(checkpoint=-1).sel(layer=layer).transpose("subset", "trial").values
    rate, nats = (last > 0).mean(1), last.mean(1)
    by_size = sorted(
        (half for half, rest in zip(*rows, strict=True) if rate[half] - rate[rest] > PATTERN),
        key=lambda half: nats[half],
    )
    if not by_size:
        raise UserError(f"no half of the heads of layer {layer} meets the rule; nothing shows what renumbering can do")
    half = np.flatnonzero(complete.mask.values[by_size[len(by_size) // 2]]).tolist()
    return layer, half, f"; {len(by_size)} of {len(rows[0]) // 2} ways to halve the heads meet it"


def planted(out: Path) -> Control:
    """The series made by hand."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from headlapse.engine.checkpoints.planted import LAYER, N_HEADS, planted, task, tokenizer

    words = tokenizer()
    set_verbosity_error()
    disable_progress_bar()
    for seed, step in enumerate(PLANTED_STEPS):
        carriers = {ONE_HEAD} | (set(range(0, N_HEADS, 2)) if step >= EVEN_FROM else set())
        model = planted(0.25 if step >= ONE_HEAD_FROM else 0.0, 0.02, seed, sorted(carriers))
        model.save_pretrained(out / "model" / f"step{step}")
        words.save_pretrained(out / "model" / f"step{step}")
    return row("planted", out, LAYER, str(task(out / "digits.jsonl", PAIRS)), head=f"L{LAYER}.H{ONE_HEAD}")


def row(name: str, out: Path, layer: int, task: str, met: str = "", head: str = "") -> Control:
    """Capture and patch the series in `out`, as any user would."""
    store = hl.cache(out / "model", task=task, store=out / "store.zarr")
    run = store.patch(subsets=["even", "odd", "all", "each", "balanced"], layers=layer)
    data = run.dataset.sel(layer=layer)
    even, odd = ((data.logit_diff.sel(subset=word) > 0).mean("trial").values for word in ("even", "odd"))
    said = [" ".join(line.split()) for line in run.verdict()]
    parity = next(line for line in said if line.startswith("even/odd")).removeprefix("even/odd ")
    of_head = next((f"\n{'':<24}{line}" for line in said if head and line.startswith(f"{head} ")), "")
    labels = tuple(map(str, data.checkpoint.values))
    return Control(name, tuple(map(float, even - odd)), labels, parity + of_head, met)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path, default=ROOT / "cache" / "demo-decimal.zarr", metavar="STORE")
    parser.add_argument("--out", type=Path, default=ROOT / "cache" / "controls", help="folder for both series")
    parser.add_argument("--task", help="its JSON Lines file, where the store's task is not a built-in one")
    options = parser.parse_args(words)
    for control in controls(options.store, options.out, options.task):
        print(control)
    return DONE


if __name__ == "__main__":
    sys.exit(exit_status_of(lambda: main(sys.argv[1:])))
