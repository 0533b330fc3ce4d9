"""Changes the code in small ways and reports which changes no test notices: `make mutants`.

    python -m tests.mutants                                everything in TESTS; hours
    python -m tests.mutants statistics/shapley replay      one module, one room
    python -m tests.mutants --share 0.33 --seed 0 replay   a random third of each module's mutants
    python -m tests.mutants --again statistics             those that survived once more, after tests were added
    python -m tests.mutants --list                         what is known so far, without running anything

mutmut makes the mutants and runs each in a fork of a process that has imported everything once, with those tests of
the module's files that call the mutated function.  It mutates no decorated function (properties, class methods,
context managers) and no line outside functions.  Verdicts are kept in build/mutants: an interrupted run goes on where
it was, and a function that is changed loses its verdicts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "mutants"

TESTS: dict[str, tuple[str, ...]] = {
    "statistics/bootstrap": ("rates", "splits", "onset"),
    "statistics/changepoint": ("shape",),
    "statistics/head_subsets": ("coalitions",),
    "statistics/hypotheses": ("onset", "ground_truth"),
    "statistics/multiple_testing": ("corrections",),
    "statistics/onset": ("onset",),
    "statistics/permutation": ("splits",),
    "statistics/rates": ("rates",),
    "statistics/shapley": ("games", "coalitions"),
    "measures/logit_diff": ("measures", "findings"),
    "store/activations": ("store", "replay"),
    "store/store": ("store",),
    "store/zarr_group": ("store",),
    "replay/additive_layers": ("sums",),
    "replay/cached_checkpoints": ("sweep", "answers"),
    "replay/greedy_decoding": ("generation",),
    "replay/layers": ("replay", "sums"),
    "replay/patch_inputs": ("replay", "sums"),
    "replay/patched_generation": ("answers",),
    "replay/published_protocol": ("published",),
    "replay/reference": ("reference", "verify", "sweep"),
    "replay/replay": ("replay",),
    "replay/run": ("sweep",),
    "replay/vocabulary_measures": ("vocabulary_measures",),
}
"""Of each module under engine/, the test files that can kill its mutants."""

LINKED = ("headlapse", "kernels", "engine", "scripts", "README.md", "docs")
"""What tests read besides themselves."""

VERDICTS = {0: "survived", 1: "killed", 3: "killed", 5: "no test", 33: "no test", 36: "timeout", None: "not run"}
VERDICTS |= dict.fromkeys((-24, 24, 152, 255), "timeout")


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
        "pytest_add_cli_args": ["-o", "addopts=", "-p", "no:cacheprovider", "-m", "not slow", "-p", "scipy.stats"],
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


def verdicts(module: str) -> dict[str, str]:
    """Mutant → what became of it; empty before the first run."""
    path = WORK / module / "mutants" / "headlapse" / "engine" / f"{module}.py.meta"
    if not path.exists():
        return {}
    codes: dict[str, int | None] = json.loads(path.read_text())["exit_code_by_key"]
    return {name: VERDICTS.get(code, "crashed") for name, code in codes.items()}


def mutant_names(place: Path, module: str) -> list[str]:
    code = (
        "import sys; from pathlib import Path; from mutmut.mutation.file_mutation import mutate_file_contents; "
        "from mutmut.utils.format_utils import get_mutant_name; path = sys.argv[1]; "
        "names = mutate_file_contents(path, Path(path).read_text()).mutant_names; "
        "print(*(get_mutant_name(Path(path), name) for name in names), sep='\\n')"
    )
    words = [sys.executable, "-c", code, f"headlapse/engine/{module}.py"]
    return subprocess.run(words, cwd=place, check=True, capture_output=True, text=True).stdout.split()


def chosen(place: Path, module: str, share: float, seed: int, again: bool) -> list[str]:
    """The mutants to run by name; the sample of a share does not depend on what has been run."""
    known = verdicts(module)
    if again:
        return [name for name, verdict in known.items() if verdict == "survived"]
    names = mutant_names(place, module)
    sample = random.Random(seed).sample(names, round(share * len(names)))
    return [name for name in sample if known.get(name, "not run") == "not run"]


def run(module: str, share: float, seed: int, again: bool, workers: int) -> None:
    place = workplace(module)
    names = chosen(place, module, share, seed, again)
    if not names:
        return
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    words = [sys.executable, "-m", "mutmut", "run", "--max-children", str(workers), *names]
    with open(place / "log.txt", "w") as log:
        ended = subprocess.run(words, cwd=place, env=variables, stdout=log, stderr=subprocess.STDOUT)
    if ended.returncode:
        print(f"{module}: mutmut ended with {ended.returncode}, see {place / 'log.txt'}", file=sys.stderr)


def show(module: str) -> None:
    """One line of counts, then each survivor with what it changes."""
    known = verdicts(module)
    counts = Counter(known.values())
    n_run = len(known) - counts["not run"]
    share = f"{counts['survived'] / n_run:.1%}" if n_run else "-"
    cells = (
        len(known),
        n_run,
        *(counts[name] for name in ("killed", "survived", "timeout", "no test", "crashed")),
        share,
    )
    print("|", " | ".join((module, *map(str, cells))), "|")


def show_survivors(module: str) -> None:
    place = WORK / module
    for name, verdict in verdicts(module).items():
        if verdict not in ("survived", "no test"):
            continue
        words = [sys.executable, "-m", "mutmut", "show", name]
        shown = subprocess.run(words, cwd=place, capture_output=True, text=True).stdout.splitlines()
        print(f"{module}: {name.rpartition('.')[2]} ({verdict})")
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
    for module in modules:
        if not options.list:
            run(module, options.share, options.seed, options.again, options.workers)
    print("| module | mutants | run | killed | survived | timed out | no test | crashed | survivors |")
    print("|-|-|-|-|-|-|-|-|-|")
    for module in modules:
        show(module)
    if options.survivors:
        for module in modules:
            show_survivors(module)


if __name__ == "__main__":
    main()
