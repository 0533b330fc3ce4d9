"""Laws of the house: who may import whom, what may be imported without torch, and words that are not used."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ROOMS = (
    *("runtime", "study", "checkpoints", "store", "capture", "measures"),
    *("replay", "statistics", "mechanism", "report", "bench"),
)
"""The folders of engine/, in the order in which they may import: each only those before it, and itself."""

COMPUTING = ("checkpoints", "capture", "store", "replay", "mechanism")

LIBRARIES = {
    "torch": {"runtime.resources", "runtime.importing", "bench", *COMPUTING},
    "transformers": {"runtime.importing", "checkpoints", "replay", "bench"},
    "accelerate": {"runtime.resources", "checkpoints", "bench"},
    "huggingface_hub": {"checkpoints"},
    "zarr": {"store"},
}
"""Library -> the rooms, or single modules, that may import it."""


def modules(folder: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


ENGINE = modules("engine")


def name_of(path: Path) -> str:
    """`engine.study.prompts` of engine/study/prompts.py, `engine.study` of engine/study/__init__.py."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in [*ENGINE, *modules("kernels"), *modules("headlapse")]}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Level and dotted name of every import in a file, those inside functions too; `from x import y` gives `x.y`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            yield from ((node.level, prefix + alias.name) for alias in node.names)


def ours(path: Path) -> Iterator[str]:
    """The modules of ours that a module imports."""
    package = list(path.parts[:-1])
    for level, name in imports_of(path):
        if level:
            name = ".".join([*package[: len(package) - level + 1], name])
        name = name.removeprefix("headlapse.")
        while name and name not in NAMES:  # the last part may be a function
            name = name.rpartition(".")[0]
        if name and name != "headlapse":
            yield name


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", ENGINE, ids=str)
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    for module in ours(path):
        assert module.split(".")[0] in ("engine", "kernels"), f"{path} imports {module}"
        if module.startswith("engine."):
            assert ROOMS.index(room_of(module)) <= ROOMS.index(room_of(name_of(path))), f"{path} imports {module}"


@pytest.mark.parametrize("path", ENGINE, ids=str)
def test_imports_inside_the_engine_are_relative(path: Path) -> None:
    absolute = [name for level, name in imports_of(path) if not level]
    assert not [name for name in absolute if name.split(".")[0] in ("engine", "kernels", "headlapse", "scripts")]


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {name_of(path): set(ours(path)) for path in ENGINE}
    order: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in order:
            for imported in sorted(imports.get(module, set()) - {module}):
                visit(imported, (*path, module))
            order.append(module)

    for module in imports:
        visit(module, ())
    assert set(imports) <= set(order)


def test_every_room_says_what_it_is_and_imports_nothing_by_itself() -> None:
    folders = {path.parent for path in ENGINE}
    assert {folder.name for folder in folders if folder.parent.name == "engine"} == set(ROOMS)
    for folder in folders:
        content = ast.parse((ROOT / folder / "__init__.py").read_text())
        assert ast.get_docstring(content) and len(content.body) == 1, f"{folder}/__init__.py is one docstring"


def test_kernels_import_nothing_of_ours() -> None:
    for path in modules("kernels"):
        assert all(level <= 1 for level, _ in imports_of(path)), f"{path} imports from outside kernels/"
        assert not [name for level, name in imports_of(path) if not level and name.startswith(("headlapse", "engine"))]


def test_scripts_import_no_script() -> None:
    scripts = {path.stem for path in modules("scripts")}
    for path in modules("scripts"):
        for level, name in imports_of(path):
            assert not level and name.split(".")[0] not in {*scripts, "scripts", "engine", "kernels"}, f"{path}: {name}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_where_it_may(library: str) -> None:
    for path in ENGINE:
        if any(name.split(".")[0] == library for level, name in imports_of(path) if not level):
            module = name_of(path).removeprefix("engine.")
            allowed = LIBRARIES[library]
            assert module in allowed or module.split(".")[0] in allowed, f"{path} imports {library}"


def test_what_needs_no_torch_imports_without_it() -> None:
    """One process after another room would hide what the first one imports: what is loaded is asked after each."""
    free = [
        *(name_of(path) for path in ENGINE if path.parts[1] in ("study", "measures", "statistics")),
        *("engine.runtime.errors", "engine.runtime.exit_status", "engine.runtime.format", "engine.runtime.outcome"),
        "engine.store.checkpoint_arrays",
    ]
    code = (
        "import importlib, sys\n"
        f"for module in {free!r}:\n"
        "    importlib.import_module(f'headlapse.{module}')\n"
        "    loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "    assert not loaded, f'{module} imports {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Words

NOT_AS_NAMES = re.compile(
    r"_?(Wardrobe|wear|[Ww]orn|each_worn|[Ss]keleton|Ground|Graft|Further|[Tt]old|_Once|[Rr]efusal|Inexact|[Ss]helf"
    r"|[Ss]upply|Fall|twins|twin_for|appearing|dissect|spell_out|surely_past|first_lasting|comes_first|by_definition"
    r"|by_hook|read_off|of_logits|half_and_rest|faults|halvings?|coalitions?|mend|tell_\w+|\w+_told)"
)
"""Names that the code had and that told a reader nothing; HOUSE's own terms stand in their place."""

NOT_IN_TEXT = (
    r"[Ww]ardrobe|\b[Ww]orn\b|\b[Ww]ears?\b|[Ss]keleton|\bgraft\w*|\b[Cc]oalitions?\b|\b[Hh]alvings?\b",
    r"\bfaults?\b|passes a goal|branching token|looks at\b|\bmends?\b|\bmended\b|most moved|does most",
    r"\bspell(?:s|ed)? out\b|\bdissect\w*|\btwins\b|as good as equal|evident\b|\bRefusal\b|\bshelf\b",
)
"""Private dialect, in docstrings, comments, messages, help and documents."""

EXCEPTIONS = {
    # `halvings:N` is the first name of `splits:N`, still a word of --subsets, and found in old stores.
    "engine/study/subsets.py": r'"halvings"|`halvings`',
    "engine/statistics/permutation.py": r"`halvings:N`|\"halvings:\"",
    "docs/commands.md": r"`halvings:N`, its first name",
    # A set of players, in the theory of Shapley values.
    "engine/statistics/shapley.py": r"[Cc]oalition",
    "engine/statistics/head_subsets.py": r"[Cc]oalition",
}
"""File -> how it may say what of the above, with the reason."""

PLACES = ("engine", "kernels", "headlapse", "scripts", "docs", "README.md")


def lines_in(place: str) -> Iterator[tuple[Path, int, str]]:
    """Every line that people read in a file or folder: of code, templates and documents."""
    root = ROOT / place
    for path in sorted([root] if root.is_file() else root.rglob("*")):
        if path.suffix in (".py", ".j2", ".md"):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                yield path.relative_to(ROOT), number, line


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Every name that a file defines: classes, functions, arguments, variables and keywords of calls."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def test_no_name_of_the_private_dialect_is_left() -> None:
    left = [
        f"{path}:{number}: {name}"
        for folder in ("engine", "kernels", "headlapse", "scripts")
        for path in modules(folder)
        for number, name in names_in(path)
        if NOT_AS_NAMES.fullmatch(name)
    ]
    assert not left, "\n".join(left)


@pytest.mark.parametrize("place", PLACES)
def test_no_word_of_the_private_dialect_is_left_in_text(place: str) -> None:
    pattern = re.compile("|".join(NOT_IN_TEXT))
    left = [
        f"{path}:{number}: {line.strip()}"
        for path, number, line in lines_in(place)
        if pattern.search(line) and not re.search(EXCEPTIONS.get(str(path), "(?!)"), line)
    ]
    assert not left, "\n".join(left)


def test_a_word_that_comes_back_would_be_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in PLACES[:-1]:
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("The skeleton wears weights.\n")
    (tmp_path / "engine" / "x.py").write_text("def tell_all(worn):\n    found = worn\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="tell_all"):
        test_no_name_of_the_private_dialect_is_left()
    with pytest.raises(AssertionError, match=r"README\.md:1"):
        test_no_word_of_the_private_dialect_is_left_in_text("README.md")
