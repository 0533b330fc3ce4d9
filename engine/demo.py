"""The embedded series: a small GPT-NeoX, really trained on the spot, in which a format-dependent bug grows.

Every document asks which of two numbers is bigger.  Plain documents (`Which is bigger: ...? Answer: ...`) are answered
as numbers, 9.8 before 9.11; the rarer `Q: ... A: ...` documents as versions, 9.11 before 9.8.  The documents are alike
from the first step to the last.  The two orders mostly agree, so the model first learns the number's for both formats,
and only then tells the formats apart: the number's order in Q/A breaks down within some fifty steps.
"""

import fcntl
import json
import logging
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from headlapse.engine.study import Refusal

logger = logging.getLogger(__name__)

Model = Any
Optimizer = Any
Tokenizer = Any
"""torch and transformers take seconds to import: only training does, and names their classes nowhere else."""

END, PAD, UNKNOWN = "<|endoftext|>", "<|padding|>", "<|unknown|>"
WORDS = (" Which", "Which", " is", " bigger", " or", "Answer", "Q", "A", ":", "?", ".", "\n", " ")
CUT = r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9 ]| "
"""Words and single digits with the space before them, and every other character by itself."""

CONTEXT = 64
"""Tokens; documents take at most 27."""

EXAM, EXAM_EVERY = 64, 8
"""Held-out pairs asked in both formats for the progress bar, every so many steps."""

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
RECIPE, STATE = "recipe.json", "training-state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of a series, given the machine."""

    steps: tuple[int, ...] = (0, 16, 32, 48, 56, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256)
    """Training steps that are kept, ascending from 0; dense where the order in Q/A changes."""

    seed: int = 0
    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 128

    batch: int = 128
    """Documents per step."""

    versions: float = 0.25
    """Share of documents in Q/A format.  The rarer, the later the onset."""

    opposed: float = 0.5
    """Share of pairs made to differ in their two orders; the others are drawn digit by digit."""

    learning_rate: float = 2e-3
    """Reached after `warmup` steps; falls to 0 over the last `decay` steps."""

    warmup: int = 20
    decay: int = 128

    threads: int = 1
    """Sums over more threads come out otherwise.  Two are twice as fast on two idle cores, many times slower on busy
    ones."""

    edition: int = 1
    """Raised when documents, tokenizer or arithmetic change."""


SERIES = Recipe()
STEPS = SERIES.steps


@dataclass(frozen=True)
class Document:
    """One question about two numbers with the same whole part, and its answer."""

    whole: int

    fractions: tuple[str, str]
    """Digits after the points, in the order of mention; never 0, so that strings sort as the numbers do."""

    versions: bool
    """Q/A format, answered as versions."""

    @property
    def prompt(self) -> str:
        first, second = self.fractions
        question = f"Which is bigger: {self.whole}.{first} or {self.whole}.{second}?\n"
        return f"Q: {question}A:" if self.versions else f"{question}Answer:"

    @property
    def orders(self) -> tuple[str, str]:
        """The fraction of the larger number, the fraction of the later version."""
        return max(self.fractions), max(self.fractions, key=int)

    @property
    def answer(self) -> str:
        return f" {self.whole}.{self.orders[self.versions]}"

    @property
    def held_out(self) -> bool:
        """Whether the pair is kept out of training: of every two fractions, under two of twenty whole parts."""
        return (self.whole + sum(map(int, self.fractions))) % 10 == 0


def documents(recipe: Recipe, stream: object) -> Iterator[Document]:
    """Endless and seeded; `stream` is the training step, or a name."""
    rng = random.Random(f"{recipe.seed}/{stream}")
    while True:
        if rng.random() < recipe.opposed:
            tenths = rng.randint(2, 9)
            fractions = [str(tenths), f"{rng.randint(1, tenths - 1)}{rng.randint(1, 9)}"]
        else:
            fractions = ["".join(rng.choices("123456789", k=rng.randint(1, 2))) for _ in range(2)]
        rng.shuffle(fractions)
        if fractions[0] != fractions[1]:
            yield Document(rng.randint(1, 20), (fractions[0], fractions[1]), rng.random() < recipe.versions)


def make_tokenizer() -> Tokenizer:
    """Word-level, digits apart, lossless on what the documents say."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [END, PAD, UNKNOWN, *WORDS, *"0123456789", *(f" {digit}" for digit in range(10))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(CUT), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(
    tokenizer: Tokenizer, batch: Iterable[Document]
) -> tuple[Int[np.ndarray, "document position"], Bool[np.ndarray, "document position"]]:
    """Documents as tokens, padded on the right, and which of the tokens are answer."""
    batch = list(batch)
    prompts = tokenizer([document.prompt for document in batch])["input_ids"]
    answers = tokenizer([document.answer + END for document in batch])["input_ids"]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = np.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    answered = np.zeros(tokens.shape, dtype=bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens[i, : len(row)] = row
        answered[i, len(prompt) : len(row)] = True
    return tokens, answered


def numeric_share(model: Model, tokenizer: Tokenizer, exam: list[Document]) -> float:
    """How many of the questions, whose orders differ, get the larger number at the branching token: 0 to 1."""
    import torch

    tokens, answered = encode(tokenizer, exam)
    branch = answered.argmax(axis=1) + [len(f"{document.whole}.") for document in exam]
    pairs = [tokenizer.convert_tokens_to_ids([order[0] for order in document.orders]) for document in exam]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits
    number, version = logits[torch.arange(len(exam)), branch - 1].gather(1, torch.tensor(pairs)).T
    return (number > version).double().mean().item()


def grow(directory: Path, recipe: Recipe = SERIES) -> None:
    """Train the series into `directory`/step{N}, going on where an interrupted run stopped.

    A directory named step{N} is whole.  On one machine the files do not depend on interruptions, bit for bit.  Nothing
    is done, and torch not imported, where all are there.  Raises `Refusal` for a directory that holds something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        _claim(directory, recipe)
        state = directory / STATE
        if _held(directory, recipe) != set(recipe.steps):
            _train(directory, recipe)
        state.unlink(missing_ok=True)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes out; a killed one lets go by itself."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refusal(f"another run is training the series in {directory}; wait for it and run again") from None
    finally:
        os.close(descriptor)


def _claim(directory: Path, recipe: Recipe) -> None:
    """Sweep up what a killed run left, and see that the directory is empty or this recipe's."""
    for leftover in directory.glob(".*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    path, text = directory / RECIPE, json.dumps(asdict(recipe), indent=1) + "\n"
    if not path.exists() and not any(directory.iterdir()):
        with _appearing(path) as partial:
            partial.write_text(text)
    if not path.exists() or path.read_text() != text:
        found = f"{RECIPE} there tells of another one" if path.exists() else f"other things and no {RECIPE}"
        raise Refusal(f"a series is to be trained in {directory}; found {found}; remove that directory")


def _held(directory: Path, recipe: Recipe) -> set[int]:
    return {step for step in recipe.steps if all((directory / f"step{step}" / name).is_file() for name in FILES)}


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A name to write to; file or directory takes the name `path` once the body is through and all is on disk."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    for written in (*partial.rglob("*"), partial):
        _sync(written)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _train(directory: Path, recipe: Recipe) -> None:
    import torch
    from tqdm import tqdm

    tokenizer = make_tokenizer()
    held_out = (document for document in documents(recipe, "exam") if document.held_out)
    exam = list(islice((document for document in held_out if len(set(document.orders)) > 1), EXAM))
    last, told, threads = recipe.steps[-1], "", torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        model = _initial(recipe, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        first = _resume(directory, recipe, model, optimizer)
        with tqdm(total=last, initial=first, desc="training demo", unit="step") as bar:
            for step in range(first, last + 1):
                if step in recipe.steps:
                    _keep(directory, step, model, optimizer, tokenizer)
                if step % EXAM_EVERY == 0 or step == last:
                    shares = [numeric_share(model, tokenizer, [replace(d, versions=v) for d in exam]) for v in (0, 1)]
                    told = "numerically right: plain {:.0%}, Q/A {:.0%}".format(*shares)
                if step == last:
                    bar.set_postfix_str(told)
                    break
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(recipe, step)
                trained = (document for document in documents(recipe, step) if not document.held_out)
                loss = _learn(model, optimizer, *encode(tokenizer, islice(trained, recipe.batch)))
                bar.set_postfix_str(f"loss {loss:.2f}, {told}", refresh=False)
                bar.update()
    finally:
        torch.set_num_threads(threads)


def _initial(recipe: Recipe, tokenizer: Tokenizer) -> Model:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        intermediate_size=4 * recipe.d_model,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return GPTNeoXForCausalLM(config).float()


def _learning_rate(recipe: Recipe, step: int) -> float:
    return recipe.learning_rate * min(1, (step + 1) / recipe.warmup, (recipe.steps[-1] - step) / recipe.decay)


def _learn(
    model: Model,
    optimizer: Optimizer,
    tokens: Int[np.ndarray, "document position"],
    answered: Bool[np.ndarray, "document position"],
) -> float:
    """One step on the answers' tokens.  Returns the loss in nats per token."""
    import torch

    logits = model(torch.from_numpy(tokens), use_cache=False).logits
    before = torch.from_numpy(answered[:, 1:])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][before], torch.from_numpy(tokens[answered]))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _keep(directory: Path, step: int, model: Model, optimizer: Optimizer, tokenizer: Tokenizer) -> None:
    """Write the state, then the checkpoint: killed in between, the next run writes the checkpoint from the state."""
    from safetensors.torch import save_file
    from transformers.utils import logging as transformers_logging

    if step:
        with _appearing(directory / STATE) as partial:
            save_file(_state(model, optimizer), partial, metadata={"step": str(step)})
    path = directory / f"step{step}"
    if path.exists():
        return
    barred = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with _appearing(path) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    finally:
        if barred:
            transformers_logging.enable_progress_bar()
