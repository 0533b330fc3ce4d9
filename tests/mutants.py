"""Changes the code in small ways and reports which changes no test notices: `make mutants`.

    python -m tests.mutants                                everything in TESTS; hours
    python -m tests.mutants statistics/shapley replay      one module, one room
    python -m tests.mutants --share 0.33 --seed 0 replay   a random third of each module's mutants
    python -m tests.mutants --again statistics             those that survived once more, after tests were added
    python -m tests.mutants --list                         what is known so far, without running anything
    python -m tests.mutants --list --share 0.33 replay     the same, of that sample

mutmut makes the mutants and runs each in a fork of a process that has imported everything once, with those of the
module's test files that call the mutated function.  It mutates no decorated function (properties, class methods,
context managers) and no line outside functions.  Verdicts are kept in build/mutants: an interrupted run goes on where
it was, and a module that is changed loses its verdicts.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "mutants"

TESTS: dict[str, tuple[str, ...]] = {
    "statistics/bootstrap": ("rates", "splits", "onset"),
    "statistics/changepoint": ("shape",),
    "statistics/comparison": ("comparison",),
    "statistics/drops": ("onset",),
    "statistics/head_effects": ("head_effects", "verdict"),
    "statistics/head_subsets": ("coalitions", "energy"),
    "statistics/hypotheses": ("onset", "ground_truth"),
    "statistics/joint": ("joint", "splits"),
    "statistics/means": ("means", "head_effects", "comparison"),
    "statistics/multiple_testing": ("corrections",),
    "statistics/onset": ("onset",),
    "statistics/parity_onset": ("parity_onset", "onset"),
    "statistics/permutation": ("splits", "primary"),
    "statistics/primary": ("primary",),
    "statistics/rates": ("rates",),
    "statistics/selection": ("selection",),
    "statistics/shapley": ("games", "coalitions"),
    "measures/logit_diff": ("measures", "findings", "head_effects"),
    "store/activations": ("store", "replay"),
    "store/checkpoint_arrays": ("store", "completion"),
    "store/chunk_files": ("chunk_files",),
    "store/disk": ("store",),
    "store/integrity": ("store", "integrity"),
    "store/health": ("doctor",),
    "store/inventory": ("store", "cli"),
    "store/locks": ("store", "writers"),
    "store/patched_run": ("completion", "sweep", "answers"),
    "store/small_files": ("store",),
    "store/store": ("store",),
    "store/zarr_group": ("store",),
    "replay/additive_layers": ("sums",),
    "replay/cached_checkpoints": ("sweep", "answers"),
    "replay/greedy_decoding": ("generation", "published", "answers"),
    "replay/layers": ("replay", "sums", "vocabulary_measures"),
    "replay/patch_inputs": ("replay", "sums"),
    "replay/patched_generation": ("answers",),
    "replay/protocols": ("format1", "answers", "published"),
    "replay/published_protocol": ("published",),
    "replay/reference": ("reference", "verify", "sweep"),
    "replay/replay": ("replay",),
    "replay/rounding": ("rounding",),
    "replay/run": ("sweep", "vocabulary_measures", "answers"),
    "replay/vocabulary_measures": ("vocabulary_measures",),
}
"""Of each module under engine/, the test files that can kill its mutants."""

LONG = (
    "tests/test_head_effects.py::test_no_head_of_a_model_without_effects_is_significant_in_more_than_five_percent_of_models",
    "tests/test_verdict.py::test_parity_is_said_to_be_there_in_at_most_five_percent_of_models_without_it",
)
"""Tests that are left out: each takes seconds, of every mutant that survives the others."""

LINKED = ("headlapse", "kernels", "engine", "scripts", "README.md", "docs")
"""What tests read besides themselves."""

BY_FILE = """
import mutmut.__main__ as mutmut
from mutmut.state import state
collect = mutmut.collect_or_load_stats

def by_file(*arguments, **options):
    collect(*arguments, **options)
    known = state().tests_by_mangled_function_name
    every = set(state().duration_by_test).union(*known.values())
    for function, tests in known.items():
        files = {test.partition("::")[0] for test in tests}
        known[function] = {test for test in every if test.partition("::")[0] in files}

mutmut.collect_or_load_stats = by_file
mutmut.cli()
"""
"""mutmut with every test of a file that calls the mutated function.  By itself it takes those during which the call was
seen: of a fixture that several tests share, the first alone, whatever the others say of what it made."""

VERDICTS = {0: "survived", 1: "killed", 3: "killed", 5: "no test", 33: "no test", 36: "timeout", None: "not run"}
VERDICTS |= dict.fromkeys((-24, 24, 152, 255), "timeout")

MISSED = ("survived", "no test")
"""What no test noticed."""


def workplace(module: str) -> Path:
    """A folder that looks like the project, with mutmut's settings for this module."""
    place = WORK / module
    place.mkdir(parents=True, exist_ok=True)
    for name in (*LINKED, "tests"):
        link = place / name
        if (ROOT / name).exists() and not link.is_symlink():
            link.symlink_to(ROOT / name)
    settings = {
        "source_paths": [f"headlapse/engine/{module}.py"],
        "also_copy": [name for name in LINKED if (ROOT / name).exists()],
        # jaxtyping's hook has to come before the first import, which mutmut's own processes are past; scipy is imported
        # where it is first used, which would be in every mutant.
        "pytest_add_cli_args": ["-o", "addopts=", "-p", "no:cacheprovider", "-m", "not slow", "-p", "scipy.stats"]
        + [f"--deselect={test}" for test in LONG],
        "pytest_add_cli_args_test_selection": [f"tests/test_{name}.py" for name in TESTS[module]],
        # A parent that has only collected tests: what has run them keeps caches and threads.
        "process_isolation": "forkserver",
        "timeout_constant": 5.0,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (place / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text() + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n"
    )
    return place


@dataclass
class Record:
    """What is known of the mutants of a module as it is.  mutmut forgets its verdicts when pyproject.toml changes."""

    path: Path
    source: str
    """Digest of the module: another one has other mutants."""

    names: list[str]
    first: dict[str, str] = field(default_factory=dict)
    """Mutant → its first verdict, before tests were written against it."""

    now: dict[str, str] = field(default_factory=dict)
    """Mutant → its last verdict."""

    @classmethod
    def of(cls, module: str) -> "Record":
        """Kept beside mutmut's own files; what an interrupted run came to is taken over."""
        place, path = workplace(module), WORK / module / "verdicts.json"
        source = hashlib.sha256((place / "headlapse" / "engine" / f"{module}.py").read_bytes()).hexdigest()
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("source") != source:
            kept = {"source": source, "names": mutant_names(place, module)}
        record = cls(path, **kept)
        record.update(module)
        return record

    def update(self, module: str) -> None:
        """Take over what mutmut has found since."""
        meta = self.path.parent / "mutants" / "headlapse" / "engine" / f"{module}.py.meta"
        codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"] if meta.exists() else {}
        found = {name: VERDICTS.get(codes.get(name), "crashed") for name in self.names}
        self.now |= {name: verdict for name, verdict in found.items() if verdict != "not run"}
        self.first = self.now | self.first
        kept = {"source": self.source, "names": self.names, "first": self.first, "now": self.now}
        self.path.write_text(json.dumps(kept, indent=0))

    def sample(self, share: float, seed: int) -> list[str]:
        """The mutants of a share by name; it depends on nothing that has been run."""
        return random.Random(seed).sample(self.names, round(share * len(self.names)))


def mutant_names(place: Path, module: str) -> list[str]:
    """All mutants of a module as it is; takes up to half a minute."""
    code = (
        "import sys; from pathlib import Path; from mutmut.mutation.file_mutation import mutate_file_contents; "
        "from mutmut.utils.format_utils import get_mutant_name; path = sys.argv[1]; "
        "names = mutate_file_contents(path, Path(path).read_text()).mutant_names; "
        "print(*(get_mutant_name(Path(path), name) for name in names), sep='\\n')"
    )
    words = [sys.executable, "-c", code, f"headlapse/engine/{module}.py"]
    return subprocess.run(words, cwd=place, check=True, capture_output=True, text=True).stdout.split()


def run(module: str, record: Record, names: list[str], again: bool, workers: int) -> None:
    place, wanted = WORK / module, MISSED if again else ("not run",)
    names = [name for name in names if record.now.get(name, "not run") in wanted]
    if not names:
        return
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    words = [sys.executable, "-c", BY_FILE, "run", "--max-children", str(workers), *names]
    with open(place / "log.txt", "w") as log:
        ended = subprocess.run(words, cwd=place, env=variables, stdout=log, stderr=subprocess.STDOUT)
    if ended.returncode:
        print(f"{module}: mutmut ended with {ended.returncode}, see {place / 'log.txt'}", file=sys.stderr)
    record.update(module)


def counts_of(record: Record, names: list[str]) -> Counter[str]:
    """Of these mutants: how many there are of each verdict, `sampled`, and `at first` those that survived then."""
    counts = Counter(record.now[name] for name in names if name in record.now)
    counts["sampled"] = counts.total()
    counts["at first"] = sum(record.first.get(name) in MISSED for name in names)
    counts["mutants"] = len(record.names)
    return counts


def row(name: str, counts: Counter[str]) -> str:
    """A line of the table.  The interval is Clopper and Pearson's, of a share drawn from very many mutants."""
    from scipy.stats import binomtest

    n, missed = counts["sampled"], sum(counts[verdict] for verdict in MISSED)
    cells = [counts[key] for key in ("mutants", "sampled", "killed", "timeout", "crashed", "at first")] + [missed]
    share = "-"
    if n:
        low, high = binomtest(missed, n).proportion_ci(0.95, method="exact")
        share = f"{missed / n:.1%} ({low:.1%} to {high:.1%})"
    return f"| {' | '.join(map(str, (name, *cells, share)))} |"


def show_survivors(module: str, record: Record, names: list[str]) -> None:
    place = WORK / module
    for name in names:
        if record.now.get(name) not in MISSED:
            continue
        words = [sys.executable, "-m", "mutmut", "show", name]
        shown = subprocess.run(words, cwd=place, capture_output=True, text=True).stdout.splitlines()
        print(f"{module}: {name.rpartition('.')[2]} ({record.now[name]})")
        print(*(line for line in shown if line[:1] in "+-" and line[:3] not in ("---", "+++")), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", default=[""], help="rooms or modules; all of them if none is given")
    parser.add_argument("--share", type=float, default=1.0, help="of each module's mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="only those that survived")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--survivors", action="store_true", help="print what survivors change")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    modules = [module for module in TESTS if any(module.startswith(asked) for asked in options.modules)]
    records = {module: Record.of(module) for module in modules}
    samples = {module: records[module].sample(options.share, options.seed) for module in modules}
    for module in modules:
        if not options.list:
            run(module, records[module], samples[module], options.again, options.workers)
    print("| module | mutants | sampled | killed | timed out | crashed | survived at first | survive | share |")
    print("|-|-|-|-|-|-|-|-|-|")
    rooms: dict[str, Counter[str]] = {}
    for module in modules:
        counts = counts_of(records[module], samples[module])
        print(row(module, counts))
        rooms.setdefault(module.partition("/")[0], Counter()).update(counts)
    for room, counts in rooms.items():
        print(row(f"**{room}**", counts))
    if options.survivors:
        for module in modules:
            show_survivors(module, records[module], samples[module])


if __name__ == "__main__":
    main()
