"""A training that goes on is followed: what is half written is waited for, what is whole taken once, kills do no harm.

Time stands still but for the waits of the watch; in each of them the training does its next step.
"""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from playwright.sync_api import expect
from safetensors.torch import load_file, save_file

from headlapse import command_line, pipeline, watching
from headlapse.__main__ import main
from headlapse.engine.checkpoints.revisions import has_come_to
from headlapse.engine.checkpoints.training_place import read_place
from headlapse.engine.store.checkpoint_arrays import CheckpointArrays
from headlapse.options import ReportOptions
from tests.browser import Open, browser, open_page
from tests.forked import CONTEXT, exit_status, run_code
from tests.hub_server import HubServer
from tests.models import save, tiny, tiny_tokenizer
from tests.test_sources import without_waiting

__all__ = ["browser", "open_page"]

LABELS = ("checkpoint-10", "checkpoint-20", "checkpoint-30")
EVERY = 60.0
LAST = 30
"""Steps of a real training."""

WORDS = ("watch", "--model", "./out", "--trials", "3", "--every", str(EVERY))
THEN = ("--then", "patch", "--subsets", "even", "odd", "--name", "r")

Step = Callable[[], object]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), folder / label, tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def expected(ready: Path) -> CheckpointArrays:
    """The store of one command over the finished training."""
    store = ready.parent / "expected.zarr"
    assert main(["cache", "--model", str(ready), "--trials", "3", "--store", str(store), *THEN]) == 0
    return CheckpointArrays(store)


class Training:
    """What happens while the watch waits, a step each time, and then nothing for a few times."""

    def __init__(self) -> None:
        self.now, self.steps, self.idle = 0.0, list[Step](), 0
        self.waits: list[float] = []
        self.taken: list[list[str]] = []
        """Labels of the checkpoints that were handed on together."""

        self.reloads: list[float | None] = []
        """Of the pages that were written."""

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)
        assert self.steps or self.idle < 20, "the watch waits for what never comes"
        self.idle += not self.steps
        if self.steps:
            self.steps.pop(0)()


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    training, cache_arrived = Training(), pipeline.cache_arrived

    def counted(options: Any, folder: Path, arrived: Sequence[Any]) -> Any:
        training.taken.append([each.label for each in arrived])
        return cache_arrived(options, folder, arrived)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watching, "sleep", training.sleep)
    monkeypatch.setattr(watching, "monotonic", lambda: training.now)
    monkeypatch.setattr(pipeline, "cache_arrived", counted)
    monkeypatch.setattr(pipeline, "report", lambda _options, _folder, reload: training.reloads.append(reload))
    return training


def copied(ready: Path, *labels: str) -> None:
    for label in labels:
        shutil.copytree(ready / label, Path("out") / label)


def in_pieces(source: Path, target: Path, n: int) -> Iterator[Step]:
    """The steps that write a checkpoint, its files one after another, each in so many pieces."""
    yield lambda: target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        content = path.read_bytes()
        for part in range(n):
            piece = content[len(content) * part // n : len(content) * (part + 1) // n]

            def write(name: str = path.name, piece: bytes = piece) -> None:
                with open(target / name, "ab") as file:
                    file.write(piece)

            yield write


def assert_same(store: Path, expected: CheckpointArrays, labels: Sequence[str] = LABELS) -> None:
    """What is stored of the checkpoints is bit for bit what one command stores of the finished training."""
    arrays = CheckpointArrays(store)
    assert list(arrays.complete()) == list(labels)
    for group, names in ((Path(), ("z", "key", "resid_pre")), (Path("patches/r"), ("logit_diff",))):
        mine = CheckpointArrays(store / group, store)
        theirs = CheckpointArrays(expected.path / group, expected.path)
        for label in labels:
            for name in names:
                assert (mine.read(name, label) == theirs.read(name, label)).all(), (label, name)


def test_a_checkpoint_that_is_written_slowly_is_taken_once_and_whole(
    training: Training, ready: Path, expected: CheckpointArrays, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path("out")
    training.steps += [place.mkdir, lambda: None]
    for label in LABELS[:2]:
        training.steps += [*in_pieces(ready / label, place / label, 4), lambda: None, lambda: None]
    weights = ready / LABELS[2] / "model.safetensors"

    def of_its_size_but_not_filled() -> None:
        shutil.copytree(ready / LABELS[2], place / LABELS[2], ignore=lambda *_: ["model.safetensors"])
        content = weights.read_bytes()
        (place / LABELS[2] / "model.safetensors").write_bytes(content[:-1000] + bytes(1000))

    training.steps += [of_its_size_but_not_filled, lambda: shutil.copy(weights, place / LABELS[2])]
    assert main([*WORDS, "--until", "checkpoint-30", *THEN]) == 0
    assert training.taken == [[label] for label in LABELS]
    assert_same(Path("cache/out-decimal.zarr"), expected)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == list(LABELS) and "nats" in lines[0]
    assert lines[3].startswith("out on decimal: 3 prompt pairs, 3 checkpoints")
    assert [line.partition(";")[0].partition(" (")[0] for line in printed.err.splitlines()] == [
        "watching ./out every 60 s until checkpoint-30",
        "waiting: --model ./out: there is no such directory",
        "waiting: --model ./out is no checkpoint",
    ]
    assert training.reloads == [EVERY, EVERY, EVERY, None], "the page that stays does not load itself anew"
    assert set(training.waits) == {EVERY, watching.SETTLING}, "what is being written is looked at again soon"


def test_what_a_training_left_half_written_is_waited_for_and_named_in_the_end(
    training: Training, ready: Path, expected: CheckpointArrays, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(ready, *LABELS[:2])
    weights = Path("out", LABELS[1], "model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    training.steps += [lambda: None, lambda: None, lambda: copied(ready, LABELS[2])]
    assert main([*WORDS, "--until", "30", *THEN]) == 1
    said = capsys.readouterr().err
    assert said.count(f"waiting for {LABELS[1]}: ") == 1 and said.count(f"error: {LABELS[1]}: not whole: ") == 1
    assert "delete" not in said and "again" not in said
    assert training.taken == [[LABELS[0]], [LABELS[2]]]
    weights.write_bytes(content)  # the training was taken up again
    assert main([*WORDS, "--until", "30", *THEN]) == 0
    assert_same(Path("cache/out-decimal.zarr"), expected)


def test_the_last_checkpoint_is_waited_for_however_long_nobody_writes_it(training: Training, ready: Path) -> None:
    copied(ready, LABELS[0])
    weights = Path("out", LABELS[0], "model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    training.steps += [lambda: None] * 5 + [lambda: weights.write_bytes(content)]
    assert main([*WORDS, "--until", "10", *THEN]) == 0
    assert training.taken == [[LABELS[0]]]


def test_a_bad_checkpoint_stops_no_other_and_is_tried_again_when_it_changes_and_ever_more_rarely(
    training: Training, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(ready, *LABELS[:2])
    weights = Path("out", LABELS[0], "model.safetensors")
    good = weights.read_bytes()
    tensors = load_file(weights)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, weights, {"format": "pt"})
    nothing: list[Step] = [lambda: None] * 10
    training.steps += [*nothing, lambda: weights.write_bytes(good), lambda: None, lambda: copied(ready, LABELS[2])]
    assert main([*WORDS, "--until", "30", *THEN]) == 0
    # The first look sees them, the second takes them; then after 2 and 4 more, and once it is another.
    assert training.taken == [list(LABELS[:2]), *[[LABELS[0]]] * 2, [LABELS[0]], [LABELS[2]]]
    printed = capsys.readouterr()
    assert printed.err.count(f"error: {LABELS[0]}: ") == 1 and "not finite" in printed.err
    assert [line.partition(":")[0] for line in printed.out.splitlines()[:3]] == [LABELS[1], LABELS[0], LABELS[2]]


def test_a_watch_ends_with_the_first_checkpoint_that_has_come_so_far_and_takes_none_after_it(
    training: Training, ready: Path
) -> None:
    copied(ready, *LABELS)
    Path("out", "tmp-checkpoint-15").mkdir()
    assert main([*WORDS, "--until", "15", *THEN]) == 0
    assert training.taken == [list(LABELS[:2])]
    shutil.rmtree("out/checkpoint-20")  # as a training does that keeps its last few
    assert main([*WORDS, "--checkpoints", "checkpoint-1*", "checkpoint-2*", "--until", "15", *THEN]) == 0
    assert len(training.taken) == 1


def test_mechanism_alone_has_no_page(training: Training, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied(ready, LABELS[0])
    assert main([*WORDS, "--until", "10", "--then", "mechanism", "--parts", "weights"]) == 0
    assert training.reloads == [] and capsys.readouterr().out.startswith(f"{LABELS[0]}: finished\n")


def test_ctrl_c_ends_in_the_verdict_and_in_a_page_that_stays(
    training: Training, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(ready, LABELS[0])

    def interrupt() -> None:
        raise KeyboardInterrupt

    training.steps += [lambda: None, interrupt]
    with pytest.raises(KeyboardInterrupt):
        command_line.run([*WORDS, *THEN], "cache")
    assert training.reloads == [EVERY, None]
    assert "1 checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["watch"], "--model"),
        (["watch", "--model", "demo"], "headlapse cache trains it to its end"),
        (["watch", "--model", "./out", "--every", "0"], "seconds above 0"),
        (["watch", "--model", "./out", "--every", "nan"], "seconds above 0"),
        (["watch", "--model", "./out", "--checkpoints", "log"], "changes while a training goes on"),
        (["watch", "--model", "./out", "--task", "nothing"], "nothing"),
        (["watch", "--model", "./out", "--then", "report"], "write patch or mechanism"),
        (["watch", "--model", "a file"], "neither a directory here nor a hub id"),
        (["watch", "--model", "./a.txt"], "is a file"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], complaint: str, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.txt").touch()
    assert main(words) == 2
    assert complaint in capsys.readouterr().err and not training.waits


@pytest.mark.parametrize(
    ("word", "label", "has_come"),
    [
        ("checkpoint-20", "checkpoint-10", False),
        ("checkpoint-20", "checkpoint-20", True),
        ("20", "checkpoint-20", True),
        ("20", "checkpoint-30", True),
        ("2k", "step1999", False),
        ("2B", "step100-tokens2B", True),
        ("2B", "step100", False),
        ("stage1-step20", "stage2-step1", True),
        ("stage2-step20", "stage1-step30", False),
        ("20", "stage2-step30", True),
        ("checkpoint-final", "checkpoint-final", True),
        ("checkpoint-final", "checkpoint-30", False),
        ("20", "checkpoint-final", False),
    ],
)
def test_whether_a_training_has_come_so_far(word: str, label: str, has_come: bool) -> None:
    assert has_come_to(word, label, read_place(label)) == has_come


def test_a_hub_is_followed_and_waited_for_where_it_is_away(
    training: Training, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {label: {path.name: path.read_bytes() for path in (ready / label).iterdir()} for label in LABELS}
    with HubServer({"org/series": {"main": contents[LABELS[0]]}}) as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        without_waiting(monkeypatch)
        url = huggingface_hub.constants.ENDPOINT

        def push(label: str) -> None:
            hub.push("org/series", label.replace("checkpoint-", "step"), contents[label])

        def away(endpoint: str = "http://127.0.0.1:9") -> None:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)

        steps: list[Step] = [lambda: None, lambda: push(LABELS[0]), away, lambda: push(LABELS[1]), lambda: away(url)]
        training.steps += steps
        words = ("watch", "--model", "org/series", "--trials", "3", "--keep-weights", "1", "--until", "step20")
        assert main([*words, *THEN]) == 0, capsys.readouterr().err
        assert training.taken == [["step10"], ["step20"]] and set(training.waits) == {300.0}
    assert capsys.readouterr().err.count("waiting: ") == 1
    huggingface_hub.close_session()


@pytest.mark.slow
def test_a_watch_that_is_killed_anywhere_goes_on_where_it_was(
    training: Training, ready: Path, expected: CheckpointArrays, tmp_path: Path
) -> None:
    copied(ready, *LABELS)
    words = [*WORDS[:-1], "0.1", *THEN]
    for owner in ("Store.write", "pipeline.then", "pipeline.report"):
        killed = (
            "import os, signal; from headlapse import pipeline, watching; from headlapse.__main__ import main\n"
            "from headlapse.engine.store.store import Store\n"
            f"watching.SETTLING, {owner} = 0.01, lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"main({words})"
        )
        assert exit_status(run_code, killed, tmp_path, dict(os.environ), tmp_path / "printed") == -9, owner
    assert main([*WORDS, "--until", "30", *THEN]) == 0
    assert_same(Path("cache/out-decimal.zarr"), expected)
    assert not training.taken, "all that the last one that was killed had left to do was the page"


def train(out: str, callback: str = "", die_at: int = 0, resume_from: str | None = None, last: int = LAST) -> None:
    """A real Trainer that saves every second or so; with a callback's code, or killed while it saves at a step."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    class Slow(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            time.sleep(0.1)

    class Killed(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if self.state.global_step == die_at:
                weights = Path(output_dir, "model.safetensors")
                os.truncate(weights, weights.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            super()._save_optimizer_and_scheduler(output_dir)

    defined: dict[str, Any] = {"__name__": "__main__"}
    exec(callback or "Lapse = None", defined)
    ids = torch.arange(64).remainder(40).reshape(8, 8)
    arguments = TrainingArguments(
        out, max_steps=last, save_steps=10, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, 
    )  # fmt: skip
    trainer = Killed(
        tiny("neox-parallel"),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # type: ignore[arg-type]
        data_collator=default_data_collator,
        processing_class=tiny_tokenizer(),
        callbacks=[defined["Lapse"]] if callback else [Slow],
    )
    trainer.train(resume_from_checkpoint=resume_from)


@pytest.mark.slow
def test_a_trainer_is_followed_to_its_end_through_a_kill_while_it_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watching, "SETTLING", 0.4)
    out, ends = str(tmp_path / "out"), list[int | None]()

    def trainings() -> None:
        for die_at, resume_from in ((20, None), (0, f"{out}/checkpoint-10")):
            process = CONTEXT.Process(target=train, args=(out, "", die_at, resume_from))
            process.start()
            process.join()
            ends.append(process.exitcode)
            left_was_seen.wait(60)

    def patient(seconds: float) -> None:
        assert time.monotonic() < until and 1 not in ends, "the training does not come to its end"
        time.sleep(seconds)

    def say_and_note(follower: watching.Watch, news: watching.News) -> None:
        say_news(follower, news)
        if "checkpoint-20" in news.waiting:
            left_was_seen.set()

    thread, left_was_seen, until = threading.Thread(target=trainings), threading.Event(), time.monotonic() + 120

    def write_the_last(options: Any, folder: Path, reload: float | None = None) -> Path | None:
        """Of the pages only the one that stays, to save seconds."""
        return write(options, folder) if reload is None else None

    say_news, write = command_line._say_news, pipeline.report
    monkeypatch.setattr(pipeline, "report", write_the_last)
    monkeypatch.setattr(command_line, "_say_news", say_and_note)
    monkeypatch.setattr(watching, "sleep", patient)
    thread.start()
    assert main([*WORDS[:-1], "0.5", "--until", str(LAST), *THEN]) == 0
    thread.join()
    assert ends == [-signal.SIGKILL, 0]
    printed = capsys.readouterr()
    labels = [f"checkpoint-{step}" for step in range(10, LAST + 1, 10)]
    assert [line.partition(":")[0] for line in printed.out.splitlines()[: len(labels)]] == labels
    assert printed.err.count("waiting for checkpoint-20: ") == 1 and "error" not in printed.err
    page = Path("cache/out-decimal-report/index.html").read_text()
    assert labels[-1] in page and "location.reload" not in page
    store = str(tmp_path / "expected.zarr")
    assert main(["cache", "--model", out, "--trials", "3", "--store", store, *THEN]) == 0
    assert_same(Path("cache/out-decimal.zarr"), CheckpointArrays(Path(store)), labels)


@pytest.mark.slow
def test_the_callback_of_the_docs_follows_a_trainer_and_leaves_its_training_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(__file__).parents[1].joinpath("docs/python.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "TrainerCallback" in block]
    assert 'task="ioi"' in code and ".patch()" in code
    code = (
        code.partition("\ntrainer")[0].replace('task="ioi"', "trials=3").replace(".patch()", '.patch(subsets="even")')
    )
    monkeypatch.chdir(tmp_path)
    process = CONTEXT.Process(target=train_twice, args=(str(tmp_path), code))
    process.start()
    process.join()
    assert process.exitcode == 0
    store = CheckpointArrays(Path("cache/followed-decimal.zarr"))
    assert list(store.complete()) == ["checkpoint-10", "checkpoint-20"]
    assert Path("cache/followed-decimal-report/index.html").is_file()
    for step in (10, 20):
        files = (Path(out, f"checkpoint-{step}", "model.safetensors") for out in ("plain", "followed"))
        plain, followed = map(load_file, files)
        assert all((plain[name] == followed[name]).all() for name in plain), step


def train_twice(folder: str, callback: str) -> None:
    os.chdir(folder)
    train("plain", last=20)
    train("followed", callback, last=20)


@pytest.mark.thorough
def test_a_page_that_loads_itself_anew_keeps_what_is_seen_of_it(
    open_page: Open, expected: CheckpointArrays, tmp_path: Path
) -> None:
    page = pipeline.report(ReportOptions(expected.path, out=tmp_path), tmp_path, 0.6)
    tab = open_page(page)
    tab.wait_for_selector("#stage[data-ready]")
    assert tab.locator("[data-role=reloading]").is_visible()
    tab.evaluate("document.querySelectorAll('details')[1].open = true")
    tab.locator("[type=range]").first.focus()
    tab.keyboard.press("Home")
    tab.mouse.wheel(0, 1500)
    tab.wait_for_timeout(300)
    top, address = tab.evaluate("scrollY"), tab.evaluate("location.hash")
    assert top > 1000
    page.write_text(page.read_text().replace("<title>", "<title>anew: "))
    expect(tab).to_have_title(re.compile("^anew"))
    tab.wait_for_selector("#stage[data-ready]")
    assert tab.evaluate("document.querySelectorAll('details')[1].open")
    assert "checkpoint=checkpoint-10" in address and tab.evaluate("location.hash") == address
    assert abs(tab.evaluate("scrollY") - top) < 50
    # While a reader is there, nothing moves.
    tab.evaluate("document.title = 'mine'")
    for _ in range(6):
        tab.mouse.move(1, 1)
        tab.mouse.move(2, 2)
        tab.wait_for_timeout(200)
    assert tab.title() == "mine"
