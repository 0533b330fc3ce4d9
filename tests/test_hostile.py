"""Whatever an option, a task or a model's files hold: one line at once, an exit status, and nothing of it is run.

tests/hostile.py makes the inputs at random; `python -m tests.hostile 10000 500` tries as many as one likes.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from headlapse.__main__ import main
from headlapse.engine.checkpoints.plausible import refuse_impossible_numbers
from headlapse.engine.runtime.errors import UserError
from tests import hostile
from tests.hostile import DIGITS
from tests.models import CONFIGS

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parent.parent
LAST = "9" * 18


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a task."""
    directory = tmp_path_factory.mktemp("sound") / "model"
    hostile.write_model(directory, "safetensors")
    return directory


@pytest.fixture
def model(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage; the current folder is empty beside it."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in sound.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return directory


@pytest.fixture(scope="module")
def store(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    assert hostile.run_files(sound, path) == "accepted"
    return path


def refused(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused."""
    with hostile._time_limit():
        assert main(list(words)) in (1, 2)
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and len(printed.err) < 3000
    assert not printed.out
    return printed.err


def caching(model: Path, *words: str) -> list[str]:
    usual = {"--model": str(model), "--task": str(model / "task.jsonl")}
    return ["cache", *(word for name in usual if name not in words for word in (name, usual[name])), *words]


# At random


def test_a_share_of_hostile_options_ends_in_one_line_each(model: Path) -> None:
    before = hostile.peak_memory()
    ends = hostile.try_options(range(10**6, 10**6 + 300))
    assert not hostile.wrong(ends), "\n".join(hostile.wrong(ends))
    assert list(ends.values()).count("refused") > 150 and "accepted" in ends.values()
    assert hostile.peak_memory() - before < hostile.LARGEST


@pytest.mark.slow
def test_a_share_of_damaged_files_ends_in_one_line_each(model: Path, tmp_path: Path) -> None:
    before = hostile.peak_memory()
    ends = hostile.try_files(range(10**6, 10**6 + 12), tmp_path / "damaged")
    assert not hostile.wrong(ends), "\n".join(hostile.wrong(ends))
    assert {"refused", "accepted"} == set(ends.values())
    assert hostile.peak_memory() - before < hostile.LARGEST


@pytest.mark.slow
def test_a_share_of_damaged_stores_ends_in_one_line_each(model: Path, tmp_path: Path) -> None:
    before = hostile.peak_memory()
    ends = hostile.try_stores(range(10**6, 10**6 + 12), tmp_path / "damaged")
    assert not hostile.wrong(ends), "\n".join(hostile.wrong(ends))
    assert "refused" in ends.values()
    assert hostile.peak_memory() - before < hostile.LARGEST


@pytest.mark.slow
def test_more_hostile_options_and_files_end_in_one_line_each(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.hostile", "400", "12"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "412 inputs" in ended.stdout and ended.stderr == "", "and no library has a word"


# Options


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--layers", "0-99999999"], "layer 1024 is not there"),
        (["--layers", f"0-{LAST}"], "layer 1024 is not there"),
        (["--layers", "5000-99999999"], "layer 5000 is not there"),
        (["--layers", DIGITS], "not a layer"),
        (["--subsets", f"random:{DIGITS}"], "needs a whole number"),
        (["--subsets", f"size:{LAST}"], "needs a whole number"),
        (["--subsets", f"0,{LAST}"], "heads are 0 to"),
        (["--subsets", DIGITS], "not a subset"),
        (["--checkpoints", f"1..1{'0' * 5000}"], "are no label, step or range"),
        (["--checkpoints", f"1..{LAST}"], "not among the"),
        (["--checkpoints", "9" * 100], "not among the"),
        (["--positions", f"end:{DIGITS}"], "not a choice"),
        (["--memory", f"{DIGITS}GB"], "not an amount of memory"),
        (["--memory", "0.0000001"], "not an amount of memory"),
        (["--generate", LAST], "is at most 100,000"),
        (["--generate", DIGITS], "--generate"),
        (["--name", "zarr.json"], "a store keeps files of its own"),
        (["--name", "x.partial"], "a store keeps files of its own"),
        (["--name", "../x"], "a name is a word of letters"),
        (["--name", "é" * 150], "a name is a word of letters"),
        (["--name", ""], "a name is a word of letters"),
        (["--name", "a\nb"], "control character"),
        (["--name", "x" * 100_000], "a word of 100,000 characters"),
    ],
)
def test_an_absurd_option_of_patch_is_refused(
    words: list[str], complaint: str, model: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refused(["patch", str(store), *words], capsys)
    assert not (store / "patches").exists(), "refused before anything is made"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--trials", LAST], "take at most 100,000"),
        (["--trials", DIGITS], "--trials"),
        (["--sites", f"0-{DIGITS}"], "--sites"),
        (["--sites", "0-999999999"], "layer 3 is not there"),
        (["--checkpoints", f"step{'9' * 150}"], "not among the"),
        (["--store", "s3://bucket/x.zarr"], "not at a URL"),
        (["--store", "http://host/x"], "not at a URL"),
        (["--store", "x" * 300], "no folder can have that name"),
        (["--store", "/dev/null/x.zarr"], "/dev/null is a file"),
        (["--store", "."], "give a store's own folder"),
        (["--store", ""], "--store"),
        (["--store", "/"], "give a store's own folder"),
        (["--store", "a\0b"], "control character"),
        (["--task", "/dev/zero"], "neither a built-in task nor a file"),
        (["--task", "/dev/stdin"], "--task /dev/stdin"),
        (["--task", "x" * 5000], "cannot be read (File name too long)"),
        (["--task", "/proc/self/mem"], "--task /proc/self/mem"),
        (["--model", "owner/name/../.."], "there is no such directory"),
        (["--model", "\udcff"], "neither a directory here nor a hub id"),
    ],
)
def test_an_absurd_option_of_cache_is_refused(
    words: list[str], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refused(caching(model, *words), capsys)
    assert not list(model.parent.rglob("*.zarr")), "nothing is made"


def test_python_is_refused_what_the_command_line_is(store: Path) -> None:
    import headlapse

    for options in ({"layers": DIGITS}, {"subsets": f"size:{DIGITS}"}, {"generate": 10**5000}, {"memory": DIGITS}):
        with pytest.raises(UserError) as caught:
            headlapse.open(store).patch(**options)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 3000 and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="take at most"):
        headlapse.cache("demo", trials=10**5000)


# Tasks


def pair(**fields: Any) -> str:
    return json.dumps({**hostile.TASK[0], **fields}) + "\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (lambda: pair(clean="x" * 2_000_000), "characters, the most are 1,000,000"),
        (lambda: " " * 70_000_000, "70.0 MB, the most are 64.0 MB"),
        (lambda: pair() * 150_000, "150,000 lines, the most are 100,000"),
        (lambda: "\n" * 30_000_000, "30,000,000 lines"),
        (lambda: "[" * 900_000, "brackets within brackets"),
        (lambda: pair(clean=7).replace("7", DIGITS), "a number of 5,000 digits"),
        (lambda: pair(**{"x" * 100_000: 1}), "unknown field"),
        (lambda: pair(**{str(n): n for n in range(20_000)}), "and 19995 more"),
        (lambda: pair(answer="y" * 400_000, wrong="y" * 400_000), "answer and wrong are both"),
        (lambda: pair(clean="\ud800"), "write some text"),
        (lambda: pair(clean="which " * 100_000), "the model's context is"),
    ],
)
def test_an_absurd_task_is_refused(
    content: Callable[[], str], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "task.jsonl").write_text(content())
    before = hostile.peak_memory()
    assert complaint in refused(caching(model), capsys)
    assert hostile.peak_memory() - before < hostile.LARGEST


# Configs


def test_no_architecture_we_know_has_impossible_numbers() -> None:
    for name, config in CONFIGS.items():
        refuse_impossible_numbers(Path(name), json.loads(config().to_json_string(use_diff=False)))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_hidden_layers": 20_000}, "num_hidden_layers is 20000, no model has more than 1,024"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, where a model has at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, where a model has at least 1"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is 3, where a model has a whole number"),
        ({"num_hidden_layers": True}, "where a model has a whole number"),
        ({"num_hidden_layers": [3]}, "no config of a model"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, no model has more"),
        ({"hidden_size": 1e9}, "hidden_size is 1000000000.0, where a model has a whole number"),
        ({"hidden_size": float("nan")}, "hidden_size is nan, which is no number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, which is no number"),
        ({"num_attention_heads": 5000}, "no model has more than 1,024"),
        ({"num_experts": 10**9}, "num_experts is 1000000000, no model has more than 16,384"),
        ({"text_config": {"num_hidden_layers": 10**12}}, "no model has more"),
        ({"hidden_size": 2**20, "num_hidden_layers": 1000}, "they do not belong together"),
        ({"intermediate_size": 2**26}, "they do not belong together"),
        ({"vocab_size": 2**26}, "they do not belong together"),
        ({"hidden_size": 65}, "config.json"),
        ({"num_attention_heads": 3}, "config.json"),
        ({"num_key_value_heads": 7}, "config.json"),
        ({"eos_token_id": [[0]]}, "config.json"),
        ({"model_type": "x" * 100_000}, "config.json"),
        ({"model_type": ["llama"]}, "config.json"),
    ],
)
def test_an_absurd_config_is_refused_by_name_before_it_is_built(
    fields: dict[str, Any],
    complaint: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(model / "config.json", **fields)
    before, allocated = hostile.peak_memory(), []
    monkeypatch.setattr("headlapse.engine.checkpoints.weights.torch.empty_like", lambda *_, **__: allocated.append(1))
    line = refused(caching(model), capsys)
    assert complaint in line and "config.json" in line and not allocated
    assert hostile.peak_memory() - before < hostile.LARGEST / 4


def test_tables_that_no_memory_holds_are_refused_before_they_are_computed(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headlapse.engine.checkpoints.model.default_memory", lambda _device: 1)
    assert "is max_position_embeddings right?" in refused(caching(model), capsys)


def test_a_model_larger_than_the_memory_is_refused_by_arithmetic(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "allowed do not hold" in refused(caching(model, "--memory", "100KB"), capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_of_a_hundred_megabytes_is_not_read(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(model / name, "r+b") as file:
        file.truncate(100_000_000)  # a hole: no disk is filled
    before = hostile.peak_memory()
    line = refused(caching(model), capsys)
    assert f"{name} has 100.0 MB, the most are" in line
    assert hostile.peak_memory() - before < hostile.LARGEST / 10


def test_a_tokenizer_of_another_model_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Which"] = 10**6
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizer gives token 1000000, the model has an embedding for" in refused(caching(model), capsys)


# Weights


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (lambda: {"w": torch.zeros(1).expand(10**6, 10**6)}, "which takes more"),
        (lambda: {"w": torch.zeros(3).to_sparse()}, "no plain tensor"),
        (lambda: {"w": "text"}, "no plain tensor"),
        (lambda: {7: torch.zeros(3)}, "no plain tensor"),
        (lambda: [torch.zeros(3)], "no weight file"),
        (lambda: {}, "keys missing"),
    ],
)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(
    tensors: Callable[[], object], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()
    torch.save(tensors(), model / "pytorch_model.bin")
    with open(model / "pytorch_model.bin", "ab") as file:
        file.write(b"\0" * 400_000)  # as many bytes as the config asks for; zip files are read from their end
    line = refused(caching(model), capsys)
    assert complaint in line or "no weight file" in line
    torch.save(tensors(), model / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(caching(model), capsys) or complaint in "keys missing"


# Code


MARK = "import os\nopen(os.environ['HEADLAPSE_MARK'], 'w').close()\nclass Own:\n    pass\n"
OWN = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}


@pytest.mark.parametrize("model_type", ["llama", "own"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_python_of_a_models_directory_runs_and_nobody_is_asked(
    name: str, model_type: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = model.parent / "ran"
    monkeypatch.setenv("HEADLAPSE_MARK", str(mark))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    (model / "own.py").write_text(MARK)
    change(model / name, auto_map=OWN, **({"model_type": model_type} if name == "config.json" else {}))
    if name == "tokenizer_config.json":
        change(model / name, tokenizer_class="Own")
    status = main(caching(model))
    printed = capsys.readouterr()
    if name == "config.json" and model_type == "own":
        assert status == 2 and "names Python code, which is never run" in printed.err
    else:
        assert (status, printed.err.count("\n")) in ((0, 0), (2, 1)), printed.err
    assert not mark.exists()


def test_a_pickle_that_calls_something_is_not_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = model.parent / "ran"

    class Calls:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(mark), "w")

    (model / "model.safetensors").unlink()
    torch.save({"w": Calls()}, model / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(caching(model), capsys)
    assert not mark.exists()


# A machine that has no more


def limited(limit: int, amount: int, *words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    def apply() -> None:
        resource.setrlimit(limit, (amount, amount))

    command = [sys.executable, *(("-m", "headlapse") if code is None else ("-c", code)), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=apply)


@pytest.mark.parametrize(
    ("limit", "amount", "complaint"),
    [
        (resource.RLIMIT_AS, 400 * 10**6, "400.0 MB of memory (ulimit -v), the libraries alone need 2.0 GB"),
        (resource.RLIMIT_NOFILE, 20, "may open 20 files (ulimit -n), at least 64 are needed"),
    ],
)
def test_a_process_that_may_have_too_little_is_refused_at_once(
    limit: int, amount: int, complaint: str, model: Path
) -> None:
    ended = limited(limit, amount, *caching(model))
    assert ended.returncode == 2 and complaint in ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [150, 400])
def test_a_process_whose_memory_ends_as_libraries_load_ends_in_one_line(megabytes: int, model: Path) -> None:
    """As where a limit is set by other means than ulimit, or memory is there for one thread of OpenBLAS only."""
    code = "import sys, headlapse.command_line as c; c.refuse_small_limits = lambda: None; sys.exit(c.app and m())"
    code = "from headlapse.__main__ import main as m\n" + code
    ended = limited(resource.RLIMIT_AS, megabytes * 10**6, *caching(model), code=code)
    assert ended.returncode in (1, 2), ended.stderr[-2000:]
    assert ended.stderr.startswith("error: out of memory") and ended.stderr.count("\n") == 1, ended.stderr[-2000:]
