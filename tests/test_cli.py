"""The command `headlapse`: help, refusals, lists of stores, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from headlapse.__main__ import main
from headlapse.engine.store.inventory import patch_paths, summarize
from headlapse.engine.store.store import Store
from headlapse.options import CacheOptions, MechanismOptions, PatchOptions, WatchOptions
from tests.models import save, tiny, tiny_tokenizer

ROOT = Path(__file__).parent.parent
COMMANDS = ("cache", "watch", "patch", "mechanism", "report", "doctor", "verify-known", "ls", "info", "rm")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with one store of two checkpoints, the second of which cannot be read, and two patched runs."""
    folder = tmp_path_factory.mktemp("cli")
    for seed, label in enumerate(("step0", "step10")):
        save(tiny("neox-parallel", seed), folder / "series" / label, tokenizer=tiny_tokenizer())
    weights = folder / "series" / "step10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADLAPSE_CACHE", str(folder / "cache"))
        assert main(["cache", "--model", str(folder / "series"), "--trials", "3"]) == 1
        for name in ("one", "two"):
            assert main(["patch", "--subsets", "each", "all", "--name", name]) == 0
    return folder / "cache"


@pytest.fixture
def here(cached: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(cached))
    return cached


def store_in(cache: Path) -> Path:
    [path] = cache.glob("*.zarr")
    return path


def process(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_a_line_for_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: headlapse {command}" in text and f"\nexamples:\n  headlapse {command}" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    entries = re.findall(r"^  (?:[A-Z_]+ )?(--[a-z-]+)", text, re.MULTILINE)
    options = {"cache": CacheOptions, "watch": WatchOptions, "patch": PatchOptions, "mechanism": MechanismOptions}.get(
        command
    )
    if options is not None:
        assert sorted(entries) == sorted(
            f"--{name.replace('_', '-')}" for name in options.__dataclass_fields__ if name != "_"
        )


def test_help_needs_no_torch_and_half_a_second_of_processor() -> None:
    code = (
        "import os, sys\n"
        "from headlapse.__main__ import main\n"
        "status = main(['patch', '--help'])\n"
        "print(sum(os.times()[:2]), sorted({'torch', 'numpy', 'zarr', 'transformers'} & set(sys.modules)))"
    )
    asked = process("-c", code)
    seconds, _, modules = asked.stdout.splitlines()[-1].partition(" ")
    assert modules == "[]", "options are declared without them"
    assert float(seconds) < 2 * 0.5, "a loose bound: the machine may be busy"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["patch", "--subsets", "evens"], "--subsets evens: not a subset"),
        (["patch", "--subsets", "size:x"], "--subsets size:x"),
        (["patch", "--subsets"], "--subsets"),
        (["patch", "--layers", "x"], "--layers x: not a layer"),
        (["patch", "--positions", "first"], "end:K"),
        (["patch", "--measures", "kll"], 'Invalid value "kll" for --measures'),
        (["patch", "--generate", "-1"], "--generate -1"),
        (["patch", "--name", "../x"], "--name '../x'"),
        (["patch", "--memory", "much"], "--memory much: not an amount of memory"),
        (["patch", "--subets", "even"], "Did you mean --subsets?"),
        (["patch", "nowhere.zarr"], "nowhere.zarr is no store"),
        (["patch", "--checkpoints", "step7"], "--checkpoints step7: not among"),
        (["patch", "one", "two"], "two: more than this command takes"),
        (["pacth"], 'Did you mean "patch"?'),
        (["cache", "--trials", "0"], "--trials 0"),
        (["cache", "--sites", "foo"], "--sites foo"),
        (["cache", "--task", "iio"], "did you mean ioi?"),
        (["cache", "--model", "./nowhere"], "there is no such directory"),
        (["cache", "--checkpoints", "step7"], "--checkpoints step7: not among"),
        (["mechanism", "--parts", "weihgts"], 'Invalid value "weihgts" for --parts'),
        (["verify-known", "--only", "docstring"], 'Invalid value "docstring" for --only'),
        (["verify-known", "--trials", "1"], "--trials 1: at least 2"),
        (["ls", "nowhere"], "there is no such folder"),
        (["info", "nowhere"], "nowhere is no store"),
        (["rm", "nowhere"], "nowhere is no store"),
    ],
)
def test_what_is_wrong_is_one_line_before_torch_is_imported(
    here: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As good as not installed: whoever imports it now fails.
    for name in [name for name in sys.modules if name.startswith("headlapse.engine.") and needs_torch(name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and not printed.out


def needs_torch(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and "import torch" in Path(file).read_text()


def test_stores_are_listed_with_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    path = store_in(here)
    assert line.startswith(str(path)) and "1 of 2 checkpoints" in line and "2 runs" in line
    assert line.endswith(f"1 checkpoint missing: headlapse info {path}")


def test_a_store_is_described_with_problems_runs_and_arrays(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 checkpoints: step0" in text and re.search(r"missing +step10: .*model\.safetensors", text)
    assert re.search(r"runs +one +1 of 2 .*subsets each all", text) and "two" in text
    assert re.search(r"z +float32 .*checkpoint 2, layer 3, run 2, trial 3", text) and "torch 2" in text


@pytest.mark.thorough
def test_listing_and_describing_and_removing_need_no_torch(cached: Path) -> None:
    code = (
        "import sys\n"
        "from headlapse.__main__ import main\n"
        "statuses = [main(words.split()) for words in ('ls', 'info', f'rm {sys.argv[1]} nothing')]\n"
        "print(statuses, 'torch' in sys.modules)"
    )
    asked = process("-c", code, str(store_in(cached)), HEADLAPSE_CACHE=str(cached))
    assert asked.stdout.splitlines()[-1] == "[0, 0, 2] False", asked.stderr


def test_a_run_and_a_store_are_removed_only_on_consent(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.zarr"
    subprocess.run(["cp", "-a", str(store_in(here)), str(copy)], check=True)
    assert main(["rm", str(copy)]) == 2 and "--yes" in capsys.readouterr().err, "nobody can be asked"
    assert main(["rm", str(copy), "three", "--yes"]) == 2
    assert "has no patched run three; it has one, two" in capsys.readouterr().err
    assert main(["rm", str(copy), "one", "--yes"]) == 0
    assert capsys.readouterr().out == f"removed patched run one of {copy}\n"
    assert [path.name for path in patch_paths(copy)] == ["two"]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _question: "n")
    assert main(["rm", str(copy)]) == 1 and copy.is_dir()
    monkeypatch.setattr("builtins.input", lambda _question: "y")
    assert main(["rm", str(copy)]) == 0 and not copy.exists()
    (tmp_path / "thesis").mkdir()
    assert main(["rm", str(tmp_path / "thesis"), "--yes"]) == 2 and (tmp_path / "thesis").is_dir()


def test_a_patch_ends_in_a_verdict_and_has_its_tables_on_request(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["patch", str(store_in(here)), "--subsets", "each", "all", "--name", "two"]) == 0
    short = capsys.readouterr()
    assert len(short.out.splitlines()) <= 13 and not short.err
    assert main(["patch", str(store_in(here)), "--subsets", "each", "all", "--name", "two", "--verbose"]) == 0
    whole = capsys.readouterr().out
    assert len(whole) > len(short.out) and short.out.splitlines()[-1] in whole and "self-check" in whole


def without_packages(*words: str) -> subprocess.CompletedProcess[str]:
    """A Python that has nothing installed."""
    return process("-I", "-S", *words)


@pytest.mark.parametrize("script", ["cache", "patch", "mechanism", "report"])
def test_a_script_without_its_packages_says_what_to_type(script: str) -> None:
    refused = without_packages(f"scripts/{script}.py")
    assert refused.returncode == 2 and not refused.stdout
    [line] = refused.stderr.splitlines()
    assert (
        line.startswith("error: ") and "lacks the package" in line and re.search(r"make demo|\.venv/bin/python", line)
    )


def test_an_interrupt_during_the_first_imports_is_one_line() -> None:
    code = (
        "import builtins, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what is started in the background ignores it
        "real = builtins.__import__\n"
        "def interrupted(name, *rest, **more):\n"
        "    if name.startswith('cyclopts'): os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = interrupted\n"
        "from headlapse.__main__ import main\n"
        "main(['patch'])"
    )
    ended = process("-c", code)
    assert ended.returncode == 128 + signal.SIGINT
    assert ended.stderr.startswith("interrupted") and ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_log_has_plain_lines_and_no_bars(cached: Path, tmp_path: Path) -> None:
    series = cached.parent / "series"
    words = ("-m", "headlapse", "cache", "--model", str(series), "--trials", "3", "--checkpoints", "step0")
    ended = process(*words, HEADLAPSE_CACHE=str(tmp_path))
    assert ended.returncode == 0 and "\r" not in ended.stderr and "it/s" not in ended.stderr
    assert ended.stderr == "", "nothing to say on the way, and no library has a word"
    assert ended.stdout.startswith("cached 1 checkpoint x 6 prompts in ") and ended.stdout.count("\n") == 1


@pytest.mark.thorough
def test_completion_is_offered_for_every_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        script = tmp_path / shell
        assert main(["--install-completion", "--shell", shell, "--output", str(script)]) == 0
        assert "subsets" in script.read_text() and "mechanism" in script.read_text()


ASSETS = {".j2", ".css", ".js"}
"""What pages are made of, besides code."""


def wheel_names(folder: Path) -> Sequence[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_the_wheel_is_complete_and_its_command_runs(tmp_path: Path) -> None:
    build = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"))
    copy = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    built = process(*build, str(copy))
    assert built.returncode == 0, built.stderr
    names = wheel_names(tmp_path / "site")
    for name in ("headlapse/py.typed", "headlapse/kernels/attend.py"):
        assert name in names
    beside = {path.relative_to(ROOT) for path in (ROOT / "engine" / "report").rglob("*") if path.suffix in ASSETS}
    assert {f"headlapse/{path}" for path in beside} <= set(names) and len(beside) > 10
    assert not [name for name in names if name.startswith(("headlapse/engine/bench", "tests", "scripts", "engine"))]
    assert "bin/headlapse" in names, "the command"
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "site" / "bin" / "headlapse"), "ls"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, "no store in cache; headlapse cache makes one\n"), ended.stderr


@pytest.mark.thorough
def test_problems_are_forgotten_once_a_checkpoint_is_there(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = tmp_path / "series"
    for seed, label in enumerate(("step0", "step10")):
        save(tiny("neox-parallel", seed), series / label, tokenizer=tiny_tokenizer())
    whole = (series / "step10" / "model.safetensors").read_bytes()
    (series / "step10" / "model.safetensors").write_bytes(whole[:1000])
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    words = ["cache", "--model", str(series), "--trials", "3"]
    assert main(words) == 1
    store = store_in(tmp_path / "cache")
    assert list(summarize(store).problems) == ["step10"]
    (series / "step10" / "model.safetensors").write_bytes(whole)
    assert main(words) == 0
    assert summarize(store).problems == {} and not Store(store).values("problem").any()
