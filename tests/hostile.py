"""Hostile input, seeded: option strings that nobody should type and files that nobody should publish.

    python -m tests.hostile 10000 500 200

tries so many option strings, so many damaged checkpoints and tasks, and so many stores with damaged metadata, and says
how each ended that did not end as it should.  It takes a quarter of an hour; tests/test_hostile.py tries a share.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from headlapse import pipeline
from headlapse.__main__ import main
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.options import CacheOptions, MechanismOptions, PatchOptions, ReportOptions

LONGEST = 10.0
"""Seconds that one input may take."""

LARGEST = 10**9
"""Bytes that all of them together may add to the memory of this process."""

DIGITS = "9" * 5000
OPTIONS: dict[str, type] = {
    "cache": CacheOptions,
    "patch": PatchOptions,
    "mechanism": MechanismOptions,
    "report": ReportOptions,
}
COMMANDS = (*OPTIONS, "ls", "info", "rm", "", "cahce", "--version", "--help")
RIGHT = (
    *("demo", "decimal", "ioi", "all", "even", "odd", "each", "size:2", "random:10", "lattice", "balanced", "0,2,4"),
    *("0", "1", "4-8", "step1000", "step1..step8", "main", "last", "end:3", "denoise", "noise", "kl", "float32", "8GB"),
    *("cpu", "published", "holm", "weights", "parity", "store.zarr", "tasks.jsonl", "20"),
)
WRONG = (
    *(
        "",
        " ",
        "-",
        "--",
        "=",
        ",",
        ":",
        "..",
        "...",
        "0,,2",
        "-1",
        "+1",
        "0x10",
        "1e9",
        "1_000",
        "NaN",
        "inf",
        "²",
        "٣",
    ),
    *(DIGITS, f"-{DIGITS}", f"0-{DIGITS}", f"{DIGITS}-0", f"1..1{'0' * 5000}", f"step{DIGITS}", f"{DIGITS}GB"),
    *(f"size:{DIGITS}", f"random:{DIGITS}", f"orders:{DIGITS}", f"splits:{'9' * 18}", f"end:{DIGITS}", f"0,{DIGITS}"),
    *("0-99999999", "99999999-0", "8-4", "size:-1", "random:1e3", "size:", "orders:0", "end:0", "end:-1"),
    *("0GB", "1e400GB", "9" * 400 + "TB", "cuda:99", "cuda:-1", "meta", "mps", "hpu", "\N{SNOWMAN}" * 90),
    *("zarr.json", "../x", "../../x", "/", ".", "~", "~nobody/x", ".hidden", "a" * 300, "a/" * 3000, "é" * 200, "CON"),
    *("/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/fd", "/dev/null/x", "tasks.jsonl/x"),
    *("s3://bucket/x", "http://host/x", "file:///etc/passwd", "owner/name/../..", "a\0b", "a\nb", "\x1b[2J", "\u202e"),
    *("\udcff", "$(id)", "`id`", "{0}", "%s%n", "';--", "<script>", "x" * 100_000, "step1 " * 2000, '{"a": 1}'),
)
"""Words that are right in some places, and words that are right in none."""


def option_words(draw: random.Random) -> list[str]:
    """One command line, wrong in most cases."""
    command = draw.choice(COMMANDS)
    words = [command]
    fields = list(getattr(OPTIONS.get(command), "__dataclass_fields__", {"yes": 0, "store": 0}))
    for _ in range(draw.randint(0, 4)):
        name = draw.choice([*fields, "subsets", "layers", "nothing", "h", "0"])
        glue = draw.choice(["--", "--", "--", "--", "-", "--no-", ""])
        value = _word(draw)
        words += [f"{glue}{name}={value}"] if draw.random() < 0.1 else [f"{glue}{name}", value]
        words += [_word(draw) for _ in range(draw.choice([0, 0, 0, 1, 3]))]
    return [*words, _word(draw)] if draw.random() < 0.2 else words


def _word(draw: random.Random) -> str:
    word = draw.choice(RIGHT if draw.random() < 0.3 else WRONG)
    if draw.random() < 0.2:
        at = draw.randint(0, len(word))
        word = word[:at] + draw.choice([*"-.,:=/\\ '\"9", "\0", "\n", "..", "\u0661", DIGITS]) + word[at + 1 :]
    return word


@contextmanager
def only_checked() -> Iterator[None]:
    """Commands end where their work would begin: options are parsed and checked, names looked up."""

    def cache(options: CacheOptions, folder: Path) -> Any:
        options.refuse_impossible()
        resolve(options.model, options.checkpoints, folder)
        raise _Accepted

    def patch(options: PatchOptions | MechanismOptions, folder: Path) -> Any:
        options.refuse_impossible()
        pipeline.select_checkpoints(pipeline.store_path(options.store, folder), options.checkpoints)
        raise _Accepted

    def report(options: ReportOptions, folder: Path) -> Any:
        pipeline.store_path(options.store, folder)
        raise _Accepted

    stand_ins = {"cache": cache, "describe_cache": cache, "patch": patch, "mechanism": patch, "report": report}
    with mock.patch.multiple(pipeline, **stand_ins):
        yield


class _Accepted(BaseException):
    """Everything that is checked beforehand was right."""


def run_words(words: Sequence[str]) -> str:
    """How one command line ends: `accepted`, `refused`, or what is wrong with that."""
    out, err = io.StringIO(), io.StringIO()
    status: object
    with redirect_stdout(out), redirect_stderr(err), _time_limit():
        try:
            status = main(list(words))
        except _Accepted:
            return "accepted"
        except BaseException:
            return f"traceback: {traceback.format_exc()[-1500:]}"
    if status == 0:
        return "accepted"
    lines = err.getvalue()
    one_line = lines.startswith("error: ") and lines.count("\n") == 1 and len(lines) < 4000
    return "refused" if status in (1, 2) and one_line else f"status {status}, {lines[:500]!r}"


# Files

PAIR = {"clean": "Which is bigger: 9.8 or 9.1?\nAnswer:", "corrupt": "Q: Which is bigger: 9.8 or 9.1?\nA:"}
TASK = [PAIR | {"answer": f" {n}", "wrong": f" {n + 1}"} for n in range(4)]
FORMS = ("safetensors", "sharded-safetensors", "bin")
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 20_000, 10**9, 10**18, 10**30, float("nan"), float("inf"), -float("inf")),
    *("", "x", "12", "\0", "../../x", "/etc/passwd", "\ud800", "x" * 100_000, "é" * 1000, "1e9", "auto", "float16"),
    *([], {}, [[]], [None], [1, "x"], {"a": {"b": {}}}, ["x"] * 10_000, {str(n): n for n in range(1000)}),
)
"""Values that a field of a JSON file does not expect."""


def write_model(directory: Path, form: str) -> None:
    """A sound checkpoint and a sound task in an empty folder."""
    from tests.models import save, tiny, tiny_tokenizer

    with redirect_stderr(io.StringIO()):  # transformers' progress bar
        save(tiny("llama-gqa"), directory, form=form, tokenizer=tiny_tokenizer())  # type: ignore[arg-type]
    (directory / "task.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in TASK))


def damage(directory: Path, draw: random.Random) -> str:
    """Damage one file of a checkpoint or its task; says which and how."""
    names = sorted(path.name for path in directory.iterdir())
    # Half of all damage is done to configs, by value: they are read by most code.
    name = "config.json" if draw.random() < 0.4 else draw.choice(names)
    path = directory / name
    by_value = name.endswith(".json") and draw.random() < 0.8
    how = _damage_value(path, draw) if by_value else _damage_bytes(path, draw)
    return f"{name}: {how}"


def _damage_value(path: Path, draw: random.Random) -> str:
    content = json.loads(path.read_bytes())
    places = list(_places(content))
    holder, key = draw.choice(places)
    value = draw.choice([*STRANGE, holder[key], [holder[key]] * 3])
    how = draw.choice(["replaced", "replaced", "replaced", "removed", "added", "digits", "nested"])
    if how == "replaced":
        holder[key] = value
    elif how == "removed":
        del holder[key]
    elif how == "added" and isinstance(holder, dict):
        unknown = ("auto_map", "quantization_config", "layer_types", "rope_scaling", "dtype", "architectures", "x" * 9)
        holder[draw.choice(unknown)] = value
    else:
        holder[key] = "PLACE"
    text = json.dumps(content)
    text = text.replace('"PLACE"', DIGITS if how == "digits" else "[" * 5000 + "]" * 5000)
    path.write_text(text)
    return f"{key!r} {how}, {str(value)[:40]!r}"


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from _places(content[key])


def _damage_bytes(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    at = draw.randrange(min(len(content), draw.choice([8, 64, 10**9])))
    changes: dict[str, Callable[[], bytes]] = {
        "bit": lambda: content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        "byte": lambda: content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
        "cut": lambda: content[:at],
        "empty": lambda: b"",
        "zeros": lambda: content[:at] + bytes(1000) + content[at:],
        "noise": lambda: content[:at] + draw.randbytes(1000) + content[at:],
        "twice": lambda: content + content,
        "mark": lambda: b"\xef\xbb\xbf" + content,
        "utf-16": lambda: content.decode("latin-1").encode("utf-16"),
        "pickle": lambda: b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR.",
        "long-line": lambda: content.rstrip() + b" " * 2_000_000 + b"\n",
    }
    how = draw.choice(list(changes))
    path.write_bytes(changes[how]())
    return f"{how} at {at}"


def run_files(directory: Path, store: Path) -> str:
    """How capturing the checkpoint ends, in this process: `accepted`, `refused`, or what is wrong with that."""
    task = directory / "task.jsonl"
    return run_words(
        ["cache", "--model", str(directory), "--task", str(task), "--store", str(store), "--memory", "4GB"]
    )


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `TimeoutError` where the body takes longer than one input may."""

    def late(_number: int, _frame: object) -> None:
        raise TimeoutError(f"more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_options(seeds: Sequence[int]) -> dict[str, str]:
    """Each command line as JSON → how it ended."""
    with only_checked():
        cases = {seed: option_words(random.Random(f"options {seed}")) for seed in seeds}
        return {f"{seed} {json.dumps(words)[:2000]}": run_words(words) for seed, words in cases.items()}


def try_files(seeds: Sequence[int], folder: Path) -> dict[str, str]:
    """Each damaged checkpoint → how capturing it ended."""
    ends: dict[str, str] = {}
    sound = {form: folder / f"sound-{form}" for form in FORMS}
    for form, directory in sound.items():
        write_model(directory, form)
    for seed in seeds:
        draw = random.Random(f"files {seed}")
        directory, store = folder / str(seed) / "model", folder / str(seed) / "store.zarr"
        directory.mkdir(parents=True)
        for path in sound[draw.choice(FORMS)].iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        how = damage(directory, draw)
        ends[f"{seed} {how}"] = run_files(directory, store)
    return ends


def try_stores(seeds: Sequence[int], folder: Path) -> dict[str, str]:
    """Each store whose metadata are damaged → how a command that reads it ended."""
    ends: dict[str, str] = {}
    sound = folder / "sound.zarr"
    write_model(folder / "model", "safetensors")
    assert run_files(folder / "model", sound) == "accepted"
    assert run_words(["patch", str(sound), "--subsets", "even", "--layers", "1", "--name", "one"]) == "accepted"
    for seed in seeds:
        draw = random.Random(f"stores {seed}")
        store = folder / str(seed) / "a.zarr"
        shutil.copytree(sound, store)
        path = draw.choice(sorted(store.rglob("zarr.json")))
        how = _damage_value(path, draw) if draw.random() < 0.8 else _damage_bytes(path, draw)
        commands = (
            ["info", str(store)],
            ["ls", str(store.parent)],
            ["patch", str(store), "--subsets", "odd", "--layers", "1", "--name", draw.choice(["one", "two"])],
            ["report", str(store), "--out", str(store.with_name("page"))],
            ["mechanism", str(store), "--parts", "attention"],
        )
        words = draw.choice(commands)
        ends[f"{seed} {words[0]}, {path.relative_to(store)}: {how}"] = run_words(words)
        shutil.rmtree(store.parent)
    return ends


def wrong(ends: dict[str, str]) -> list[str]:
    """The inputs that did not end as they should, with how they ended."""
    return [f"{case}\n  {end}" for case, end in ends.items() if end not in ("accepted", "refused")]


def peak_memory() -> int:
    """Bytes that this process has used at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_all(n_options: int, n_files: int, n_stores: int = 0) -> int:
    """Try as many as are asked for; 0 where all of them ended as they should."""
    from headlapse.engine.capture import run  # torch and transformers are no part of what an input takes

    assert run
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        started, before = time.monotonic(), peak_memory()
        ends = try_options(range(n_options)) | try_files(range(n_files), Path(folder) / "models")
        if n_stores:
            ends |= try_stores(range(n_stores), Path(folder) / "stores")
        added = peak_memory() - before
    counts = Counter(end if end in ("accepted", "refused") else "wrong" for end in ends.values())
    print(*wrong(ends), sep="\n")
    print(f"{len(ends):,} inputs in {time.monotonic() - started:.0f} s: {dict(counts)}; {added / 1e6:.0f} MB added")
    return 0 if not wrong(ends) and added < LARGEST else 1


if __name__ == "__main__":
    sys.exit(run_all(*map(int, sys.argv[1:4])))
