"""Laws of the documentation: what README and docs name exists, and what they show runs."""

import ast
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import headlapse
from headlapse.engine.checkpoints import demo, series
from tests.forked import exit_status, run_code

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
GUIDES = tuple(page for page in PAGES if page != "CHANGELOG.md")
"""Pages that speak of today; the changelog also names what is gone."""

MOST_WORDS = 1500
"""Of the README."""

FOREIGN = {"--no-deps", "--help", "--version", "--install-completion"}
"""Options of pip, and those that every command has."""

SBATCH = {
    *("--array", "--cpus-per-task", "--dependency", "--gpus-per-node", "--job-name", "--mem"),
    *("--output", "--parsable", "--partition", "--requeue", "--time"),
}
"""Options of sbatch, in the page about clusters."""

SCRIPTS = ("bench", "controls", "convert")
"""Scripts that are no command."""

BANNED = (
    r"\bhalvings?\b(?!:)",
    r"\bfaults?\b",
    r"\b(?:repaired|mended|worn|wardrobe|skeletons?|coalitions?|evident)\b",
    r"\bbranching token",
    r"\b(?:does most|most moved|by definition)\b",
    r"\bbeside chance\b",
    r"\beven and odd part\b",
    r"\b[Hh]ead \d+ of layer \d+|\b[Ll]ayer \d+,? head \d+",
)
"""Words of the project's first private dialect, as regular expressions."""


def read(page: str) -> str:
    return (ROOT / page).read_text()


def code_of(page: str) -> str:
    """Everything in a page that is set as code: fenced, indented or between backticks."""
    text = read(page)
    fence = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    prose = fence.sub("", text)
    indented = re.findall(r"^ {4}.+$", prose, re.MULTILINE)
    return "\n".join([*fence.findall(text), *indented, *re.findall(r"`([^`]+)`", prose)])


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*", text))


@functools.cache
def help_of(*words: str) -> str:
    """What `--help` prints after these words of a command line, wide enough that nothing is broken."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    command = [sys.executable, *words, "--help"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment, timeout=60
    ).stdout


def anchors(text: str) -> Iterator[str]:
    """GitHub's names for the headings of a page."""
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short() -> None:
    assert len(read("README.md").split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page} links {target}, which has no such heading"


@pytest.mark.parametrize("page", GUIDES)
def test_files_that_a_page_names_exist(page: str) -> None:
    named = set(re.findall(r"(?<![\w/.])((?:engine|kernels|headlapse|scripts|tests|docs)/[\w./-]*\w)", code_of(page)))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"{page} names {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_no_word_of_the_private_dialect_is_left(page: str) -> None:
    text = read(page)
    found = [match.group() for pattern in BANNED for match in re.finditer(pattern, text)]
    assert not found, f"{page} says {found}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_python(page: str) -> None:
    for block in python_blocks(page):
        ast.parse(block)


def test_every_room_is_on_the_map() -> None:
    rooms = {path.parent.relative_to(ROOT) for path in ROOT.glob("engine/**/*.py")} - {Path("engine")}
    missing = sorted(str(room) for room in rooms if f"`{room}/`" not in read("CONTRIBUTING.md"))
    assert rooms and not missing


@functools.cache
def declared(*words: str) -> frozenset[str]:
    """The options that a command line declares: what the first column of its help names."""
    column = re.findall(r"^ {2}(\S.*?)(?: {2}|$)", help_of(*words), re.MULTILINE)
    return frozenset(options_in("\n".join(column)) - FOREIGN)


def commands() -> list[str]:
    """The subcommands that the command line has."""
    return sorted(set(re.findall(r"^  ([a-z][a-z-]+) ", help_of("-m", "headlapse"), re.MULTILINE)))


def sections() -> dict[str, str]:
    """The part of commands.md about each command, by its name."""
    parts = re.split(r"^## headlapse ([\w-]+)\n", read("docs/commands.md"), flags=re.MULTILINE)
    return {name: text.partition("\n## ")[0] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def first_column(text: str) -> str:
    """The first cells of a section's tables: what they are about."""
    return "\n".join(re.findall(r"^\|([^|]*)\|", text, re.MULTILINE))


def test_every_command_has_a_section_and_no_section_is_about_another() -> None:
    assert set(sections()) == set(commands()) != set()


@pytest.mark.parametrize("command", sorted(sections()))
def test_a_section_lists_the_options_of_its_command_and_no_other(command: str) -> None:
    section = sections()[command]
    options = declared("-m", "headlapse", command)
    assert options_in(first_column(section)) == options
    assert options_in(section) <= options | {option for name in sections() for option in _linked(section, name)}


def _linked(section: str, command: str) -> set[str]:
    """Options in a section that stand behind another command's name: `headlapse report --name`."""
    return options_in("\n".join(re.findall(rf"(?:headlapse|--then) {command} [^`\n]*", section)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_of_a_script_are_listed(script: str) -> None:
    text = read("docs/commands.md").partition(f"`scripts/{script}.py`")[2].partition("\n`scripts/")[0]
    assert options_in(first_column(text)) == declared(f"scripts/{script}.py")


def test_options_that_pages_name_exist() -> None:
    every = {option for name in commands() for option in declared("-m", "headlapse", name)}
    every |= {option for script in SCRIPTS for option in declared(f"scripts/{script}.py")}
    every |= declared("-m", "headlapse") | declared("-m", "tests.mutants")
    for page in GUIDES:
        others = FOREIGN | (SBATCH if page == "docs/cluster.md" else set())
        assert options_in(read(page)) <= every | others, page


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
    for page in GUIDES:
        named = set(re.findall(r"(?:^ {4}|`)make ([a-z][\w-]*)", read(page), re.MULTILINE))
        assert named <= targets, page


@pytest.fixture(scope="module")
def quick_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the embedded series after as many training steps as it has checkpoints.

    Training the real one takes a minute or more; here its labels stand for the first few steps.
    """
    cache = tmp_path_factory.mktemp("cache")
    demo.train(cache / "quick", replace(demo.SERIES, steps=tuple(range(len(demo.STEPS))), batch=4))
    (cache / series.DEMO).mkdir()
    (cache / series.DEMO / demo.RECIPE).write_text(json.dumps(asdict(demo.SERIES), indent=2))
    for quick, step in enumerate(demo.STEPS):
        (cache / "quick" / f"step{quick}").rename(cache / series.DEMO / f"step{step}")
    return cache


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run_and_print_what_the_readme_says(quick_series: Path) -> None:
    """Its figures are those of the trained series; what the lines are about does not depend on them.

    A few equal splits stand for all 70, which would take four times as long.
    """
    [block] = python_blocks("README.md")
    assert len(block.strip().splitlines()) <= 10
    [shown] = re.findall(r"^```text\n(.*?)^```", read("README.md"), re.MULTILINE | re.DOTALL)
    assert '"balanced"' in block
    code, output = block.replace('"balanced"', '"splits:3"'), quick_series / "printed"
    status = exit_status(run_code, code, quick_series, {**os.environ, "HEADLAPSE_CACHE": str(quick_series)}, output)
    assert status == 0, output.with_suffix(".err").read_text()
    printed, said = output.with_suffix(".out").read_text().splitlines(), shown.splitlines()
    assert (printed[0], printed[-1]) == (said[0], said[-1].replace("'subset': 79", "'subset': 17"))
    for lines in (printed, said):
        labels = [line.split()[0] for line in lines if line[:1].isalpha()]
        assert labels[1:3] == ["task", "heads"] and {"layer", "even/odd", "seeds", "checked", "page"} <= set(labels)
    assert [line.split() for line in said if "p_adjusted" in line] == [
        line.split() for line in printed if "p_adjusted" in line
    ]


def public_members(owner: type) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


def test_the_page_about_python_names_every_public_name_and_argument_and_no_other() -> None:
    page = read("docs/python.md")
    code = code_of("docs/python.md")
    for name in headlapse.__all__:
        assert re.search(rf"^\| `{name}` \|", page, re.MULTILINE), name
    functions = [headlapse.cache, headlapse.open, headlapse.Store.patch, headlapse.Store.mechanism]
    for function in functions:
        arguments = set(inspect.signature(function).parameters) - {"self"}
        missing = sorted(name for name in arguments if not re.search(rf"\b{name}\b", code))
        assert not missing, (function, missing)
    for owner in (headlapse.Store, headlapse.PatchedRun):
        section = re.split(rf"^## {owner.__name__}$", page, flags=re.MULTILINE)[1].partition("\n## ")[0]
        listed = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", first_column(section.partition("\n### ")[0])))
        fields = set(inspect.signature(owner).parameters)
        assert public_members(owner) <= listed <= public_members(owner) | fields, owner


def test_keyword_arguments_are_those_of_the_signatures() -> None:
    for name, function in (
        ("hl.cache", headlapse.cache),
        ("hl.open", headlapse.open),
        ("store.patch", headlapse.Store.patch),
        ("store.mechanism", headlapse.Store.mechanism),
    ):
        [shown] = re.findall(rf"^`{re.escape(name)}\(([^)]*)\)`", read("docs/python.md"), re.MULTILINE)
        words = {word.partition("=")[0].strip() for word in shown.replace("\n", " ").split(",")} - {"*"}
        assert words == set(inspect.signature(function).parameters) - {"self"}, name
