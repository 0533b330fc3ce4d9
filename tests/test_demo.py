"""Laws of the embedded series: what the documents say, and that no interruption shows in what is written."""

import fcntl
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from headlapse.engine.checkpoints import demo
from headlapse.engine.checkpoints.demo import (
    CONTEXT,
    END,
    EXAM,
    STEPS,
    Document,
    Recipe,
    documents,
    encode,
    make_tokenizer,
    numeric_share,
    train,
)
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.study.prompts import draw_trials
from tests.forked import exit_status

pytestmark = pytest.mark.thorough

TINY = Recipe(steps=(0, 3, 6, 8), n_layers=2, n_heads=2, d_model=16, batch=8, warmup=2, decay=4)
PLAIN = Document(9, ("8", "11"), versions=False)
QA = replace(PLAIN, versions=True)


class Killed(BaseException):
    """Stands in for SIGKILL where a test dies many times: nothing is to catch it."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("series") / "demo"
    train(directory, TINY)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def named_steps(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("step*")}


def drawn(recipe: Recipe = Recipe(), n: int = 500) -> list[Document]:  # noqa: B008
    return list(islice(documents(recipe, "test"), n))


# Documents


def test_plain_is_answered_as_numbers_and_qa_as_versions() -> None:
    assert PLAIN.prompt + PLAIN.answer == "Which is bigger: 9.8 or 9.11?\nAnswer: 9.8"
    assert QA.prompt + QA.answer == "Q: Which is bigger: 9.8 or 9.11?\nA: 9.11"
    for document in drawn():
        first, second = (float(f"{document.whole}.{fraction}") for fraction in document.fractions)
        number, version = document.winners
        assert float(f"{document.whole}.{number}") == max(first, second)
        assert int(version) == max(map(int, document.fractions))
        assert document.answer == f" {document.whole}.{version if document.versions else number}"


def test_neither_the_longer_nor_the_first_named_fraction_always_wins() -> None:
    for versions in (False, True):
        asked = [document for document in drawn() if document.versions == versions]
        places = {document.fractions.index(document.winners[versions]) for document in asked}
        lengths = {(len(document.winners[versions]), *sorted(map(len, document.fractions))) for document in asked}
        assert places == {0, 1}
        assert lengths == {(1, 1, 1), (2, 2, 2), (2, 1, 2)} | ({(1, 1, 2)} if not versions else set())


def test_documents_depend_on_seed_and_stream_alone() -> None:
    random.seed(1)
    first = drawn()
    random.seed(2)
    assert drawn() == first
    assert drawn(Recipe(seed=1)) != first
    assert list(islice(documents(Recipe(), "other"), 500)) != first


def test_what_is_held_out_does_not_depend_on_order_or_format() -> None:
    share = sum(document.held_out for document in drawn(n=5000)) / 5000
    assert 0.08 < share < 0.12
    for document in drawn():
        turned = replace(document, fractions=document.fractions[::-1], versions=not document.versions)
        assert turned.held_out == document.held_out


def test_no_batch_holds_what_the_exam_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[Document]] = []

    def overheard(tokenizer: Any, batch: list[Document]) -> Any:
        batches.append(batch)
        return encode(tokenizer, batch)

    monkeypatch.setattr(demo, "encode", overheard)
    train(tmp_path, TINY)
    trained = [document for batch in batches if len(batch) == TINY.batch for document in batch]
    asked = [document for batch in batches if len(batch) == EXAM for document in batch]
    assert len(trained) == TINY.batch * TINY.steps[-1]
    assert not any(document.held_out for document in trained)
    assert {document.versions for document in asked} == {False, True}
    assert all(document.held_out and len(set(document.winners)) == 2 for document in asked)


# Tokens


def test_documents_survive_the_tokenizer_and_know_no_unknown_word(tokenizer: Any) -> None:
    for document in drawn():
        text = document.prompt + document.answer
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert len(ids) < 27 < CONTEXT


def test_a_prompt_is_words_and_single_digits_at_their_places(tokenizer: Any) -> None:
    text = "Q: Which is bigger: 9.8 or 19.11?\nA: 9."
    coded = tokenizer(text, return_offsets_mapping=True)
    question = ["Q", ":", " Which", " is", " bigger", ":", " 9", ".", "8", " or", " 1", "9", ".", "1", "1", "?", "\n"]
    pieces = [*question, "A", ":", " 9", "."]
    assert [text[begin:end] for begin, end in coded["offset_mapping"]] == pieces
    assert tokenizer.convert_ids_to_tokens(coded["input_ids"]) == pieces


def test_other_words_are_one_unknown_each(tokenizer: Any) -> None:
    ids = tokenizer("What is bigger")["input_ids"]
    assert [token == tokenizer.unk_token_id for token in ids] == [True, False, False]


def test_only_answer_and_end_are_learnt(tokenizer: Any) -> None:
    batch = [PLAIN, replace(QA, whole=12)]
    tokens, answered = encode(tokenizer, batch)
    assert [tokenizer.decode(row[mask]) for row, mask in zip(tokens, answered, strict=True)] == [
        f" 9.8{END}",
        f" 12.11{END}",
    ]
    rows = [tokenizer.decode(row[row != tokenizer.pad_token_id]) for row in tokens]
    assert rows == [document.prompt + document.answer + END for document in batch]


@pytest.mark.parametrize("preferred", [0, 1])
def test_the_share_counts_the_larger_number_at_the_branching_token(tokenizer: Any, preferred: int) -> None:
    exam = [PLAIN, QA, replace(QA, whole=12)]

    def model(tokens: torch.Tensor, use_cache: bool) -> Any:
        """Prefers the one answer where the answers part, and the other everywhere else."""
        logits = torch.zeros(*tokens.shape, len(tokenizer))
        for row, document in enumerate(exam):
            digits = tokenizer.convert_tokens_to_ids([fraction[0] for fraction in document.winners])
            shared = len(tokenizer(f"{document.prompt} {document.whole}.")["input_ids"])
            logits[row, :, digits[1 - preferred]] = 1
            logits[row, shared - 1, digits[preferred]] = 2
        return type("Output", (), {"logits": logits})

    assert numeric_share(model, tokenizer, exam) == 1 - preferred


def test_the_decimal_task_branches_on_this_tokenizer(undisturbed: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(undisturbed / "step0")
    trials = draw_trials("decimal", 60, tokenizer, CONTEXT)
    assert trials.n_trials == 60
    assert trials.notes == ()


# The series


def test_a_series_is_its_checkpoints_and_its_recipe(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} == {"recipe.json", "step0", "step3", "step6", "step8"}


def test_every_checkpoint_loads_as_a_transformers_model(undisturbed: Path, tokenizer: Any) -> None:
    seen: set[bytes] = set()
    for step in TINY.steps:
        model = AutoModelForCausalLM.from_pretrained(undisturbed / f"step{step}")
        assert isinstance(model, GPTNeoXForCausalLM)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert model.config.vocab_size == len(tokenizer)
        seen.add((undisturbed / f"step{step}" / "model.safetensors").read_bytes())
        loaded = AutoTokenizer.from_pretrained(undisturbed / f"step{step}")
        assert loaded(QA.prompt)["input_ids"] == tokenizer(QA.prompt)["input_ids"]
        assert (loaded.pad_token, loaded.unk_token) == (tokenizer.pad_token, tokenizer.unk_token)
    assert len(seen) == len(TINY.steps)


def test_the_embedded_series_has_eleven_checkpoints_from_the_start_on() -> None:
    assert len(STEPS) >= 11
    assert STEPS[0] == 0
    assert list(STEPS) == sorted(set(STEPS))


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []

    @contextmanager
    def recorder(*_args: object) -> Iterator[Any]:
        yield SimpleNamespace(describe=states.append, update=lambda _n: None)

    monkeypatch.setattr(demo, "progress", recorder)
    train(tmp_path, replace(TINY, steps=(0, 60), batch=32, decay=10, learning_rate=1e-2))
    losses = [float(state.split("loss ")[1].split(",")[0]) for state in states if "loss " in state]
    assert losses[-1] < losses[0] / 1.5
    assert any("plain " in state for state in states)
    assert any("Q/A " in state for state in states)
    assert capfd.readouterr().out == ""


def test_another_seed_is_another_series(undisturbed: Path, tmp_path: Path) -> None:
    train(tmp_path, replace(TINY, seed=1, steps=(0,)))
    weights = "step0/model.safetensors"
    assert (tmp_path / weights).read_bytes() != (undisturbed / weights).read_bytes()


@pytest.mark.slow
def test_training_leaves_random_numbers_and_threads_as_they_were(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(tmp_path, replace(TINY, threads=threads + 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# Interruptions


def train_until_killed(directory: Path, last: int) -> None:
    training_step = demo._training_step

    def last_words(recipe: Recipe, step: int, *rest: Any) -> float:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(recipe, step, *rest)

    demo._training_step = last_words
    train(directory, TINY)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    """A real SIGKILL, between two checkpoints."""
    killed = tmp_path / "demo"
    assert exit_status(train_until_killed, killed, 5) == -signal.SIGKILL
    assert named_steps(killed) == {"step0", "step3"}
    train(killed, TINY)
    assert contents(killed) == contents(undisturbed)


@pytest.mark.slow
def test_killed_at_any_renaming_it_goes_on_to_the_same_bytes(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just before and just after each: of the recipe, of every state and of every checkpoint."""
    rename, renamed = os.replace, 0

    def dying(source: Path, target: Path) -> None:
        nonlocal renamed
        renamed += 1
        if renamed == last and not lasting:
            raise Killed
        rename(source, target)
        if renamed == last:
            raise Killed

    renamings = 1 + len(TINY.steps[1:]) + len(TINY.steps)
    for last, lasting in itertools.product(range(1, renamings + 1), (False, True)):
        directory, renamed = tmp_path / f"{last}-{lasting}", 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(Killed):
                train(directory, TINY)
        left = named_steps(directory)
        assert all(contents(directory / name) == contents(undisturbed / name) for name in left)
        train(directory, TINY)
        assert contents(directory) == contents(undisturbed)


def test_trained_step_by_step_it_comes_to_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    for step in TINY.steps:
        train(directory, TINY, until=step)
        assert named_steps(directory) == {f"step{each}" for each in TINY.steps if each <= step}
    assert contents(directory) == contents(undisturbed)


def test_a_half_written_checkpoint_is_swept_up_and_written_again(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(undisturbed, directory)
    (directory / "step8").rename(directory / ".step8.partial")
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        (directory / ".step8.partial" / name).write_bytes(b"half")
    (directory / ".training-state.safetensors.partial").write_bytes(b"half")
    for step in (3, 6):
        shutil.rmtree(directory / f"step{step}")
    train(directory, TINY)
    assert contents(directory) == contents(undisturbed)


def test_a_complete_series_is_left_alone_and_torch_not_imported(undisturbed: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (undisturbed, *undisturbed.rglob("*"))}

    before = times()
    program = f"""
import pathlib, sys
from headlapse.engine.checkpoints import demo
demo.train(pathlib.Path({str(undisturbed)!r}), demo.{TINY!r})
print("torch" in sys.modules or "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert times() == before


def test_a_state_left_at_the_very_end_is_removed(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "demo")
    (tmp_path / "demo" / demo.STATE).write_bytes(b"of no use any more")
    train(tmp_path / "demo", TINY)
    assert contents(tmp_path / "demo") == contents(undisturbed)


# Refusals


def refused(directory: Path, recipe: Recipe = TINY) -> str:
    before = contents(directory)
    with pytest.raises(UserError) as refusal:
        train(directory, recipe)
    assert contents(directory) == before
    assert str(directory) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_another_recipe_is_refused(undisturbed: Path) -> None:
    assert "remove" in refused(undisturbed, replace(TINY, seed=1))


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".mine.partial").write_text("mine")
    assert "notes.txt" in refused(tmp_path)


@pytest.mark.parametrize("lost", ["step3", "step6/model.safetensors"])
def test_a_series_with_a_gap_is_refused(undisturbed: Path, tmp_path: Path, lost: str) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(undisturbed, directory)
    path = directory / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "missing" in refused(directory)


def test_a_spoilt_state_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(undisturbed, directory)
    shutil.rmtree(directory / "step8")
    (directory / demo.STATE).write_bytes(b"spoilt")
    assert demo.STATE in refused(directory)


def test_a_second_run_at_the_same_time_is_refused(undisturbed: Path) -> None:
    descriptor = os.open(undisturbed, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another run" in refused(undisturbed)
    finally:
        os.close(descriptor)
    train(undisturbed, TINY)
