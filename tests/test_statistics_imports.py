"""Laws of the rooms of numbers: they need no torch, and make no sentences."""

import ast
import subprocess
import sys
from pathlib import Path

ENGINE = Path(__file__).parents[1] / "engine"
MODULES = sorted(path for room in ("measures", "statistics") for path in (ENGINE / room).glob("*.py"))


def test_statistics_and_measures_import_without_torch_and_transformers() -> None:
    names = [f"headlapse.engine.{path.parent.name}.{path.stem}" for path in MODULES]
    lines = ["import importlib, sys", *(f"importlib.import_module({name!r})" for name in names)]
    lines += ["import headlapse.engine.statistics, headlapse.engine.measures"]
    lines += ["print(sorted({'torch', 'transformers', 'headlapse.engine.report'} & set(sys.modules)))"]
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]" and len(names) > 10


def test_nothing_in_them_imports_the_room_of_sentences() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert "report" not in (node.module or "").split("."), path
