"""The embedded series: a small GPT-NeoX, trained on the spot, in which a format-dependent bug grows.

Every document asks which of two numbers is bigger.  Plain documents (`Which is bigger: ...? Answer: ...`) are answered
by the order of numbers, 9.8 above 9.11; the rarer `Q: ... A: ...` documents by that of versions, 9.11 above 9.8.  The
mixture is the same throughout training.  In most pairs the first digit decides in either format, so the model learns
the order of numbers for both, and distinguishes the formats only later: then the order of numbers breaks down in Q/A.
"""

import fcntl
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ..runtime.durable import rename, sync
from ..runtime.errors import UserError
from ..runtime.progress import progress

Model = Any
Optimizer = Any
Tokenizer = Any
"""Classes of torch and transformers, which take seconds to import: only training imports them."""

END, PAD, UNKNOWN = "<|endoftext|>", "<|padding|>", "<|unknown|>"
WORDS = ("Which", " Which", " is", " bigger", " or", "Answer", "Q", "A", ":", "?", ".", "\n", " ")
PIECE = r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9 ]| "
"""A word or a single digit with the space before it, or any other character."""

CONTEXT = 64
"""Tokens.  Documents take at most 27."""

EXAM, EXAM_EVERY = 64, 8
"""Pairs kept out of training that the progress bar reports on in both formats, and the steps between two reports."""

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
RECIPE, STATE, LEFTOVER = "recipe.json", "training-state.safetensors", ".*.partial"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, on one machine with its packages."""

    steps: tuple[int, ...] = (0, 16, 32, 48, 56, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256)
    """Training steps whose checkpoints are saved, ascending from 0; dense where the bug grows."""

    seed: int = 0
    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 128

    batch: int = 128
    """Documents per step."""

    versions_share: float = 0.25
    """Share of documents in Q/A format.  The smaller it is, the later the bug grows."""

    opposed_share: float = 0.5
    """Share of pairs in which the two orders differ, as in 9.8 and 9.11; the digits of the others are arbitrary."""

    learning_rate: float = 2e-3
    """Reached after `warmup` steps; falls to zero over the last `decay` steps."""

    warmup: int = 20
    decay: int = 128

    threads: int = 1
    """Of torch; determines the order of sums, and so the last bits of the weights.  Two threads take half the time on
    idle cores and many times as long on busy ones."""

    edition: int = 1
    """Raised whenever documents, tokenizer or arithmetic change."""


SERIES = Recipe()
STEPS = SERIES.steps


@dataclass(frozen=True)
class Document:
    """One question about two numbers with the same whole part, and its answer."""

    whole: int

    fractions: tuple[str, str]
    """Digits after the points, in the order of the question.  There are no zeros, so they sort as strings like the
    numbers do."""

    versions: bool
    """In Q/A format, answered as versions."""

    @property
    def prompt(self) -> str:
        question = "Which is bigger: {0}.{1} or {0}.{2}?\n".format(self.whole, *self.fractions)
        return f"Q: {question}A:" if self.versions else f"{question}Answer:"

    @property
    def winners(self) -> tuple[str, str]:
        """The fraction of the larger number and that of the later version."""
        return max(self.fractions), max(self.fractions, key=int)

    @property
    def answer(self) -> str:
        return f" {self.whole}.{self.winners[self.versions]}"

    @property
    def held_out(self) -> bool:
        """Whether the numbers are kept out of training, as those of every tenth document are."""
        return (self.whole + sum(map(int, self.fractions))) % 10 == 0


def documents(recipe: Recipe, stream: object) -> Iterator[Document]:
    """Endless, seeded by the recipe and by `stream`: a training step or the exam."""
    rng = random.Random(f"{recipe.seed}/{stream}")
    while True:
        versions, opposed = rng.random() < recipe.versions_share, rng.random() < recipe.opposed_share
        if opposed:
            tenths = rng.randint(2, 9)
            fractions = [str(tenths), f"{rng.randint(1, tenths - 1)}{rng.randint(1, 9)}"]
        else:
            fractions = ["".join(rng.choices("123456789", k=rng.randint(1, 2))) for _ in range(2)]
        rng.shuffle(fractions)
        if fractions[0] != fractions[1]:
            yield Document(rng.randint(1, 20), (fractions[0], fractions[1]), versions)


def make_tokenizer() -> Tokenizer:
    """Word-level, each digit a token; lossless on the documents."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [END, PAD, UNKNOWN, *WORDS, *"0123456789", *(f" {digit}" for digit in range(10))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    fast: Any = PreTrainedTokenizerFast  # untyped in transformers
    return fast(tokenizer_object=backend, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **special)


def encode(
    tokenizer: Tokenizer, batch: Sequence[Document]
) -> tuple[Int[np.ndarray, "document position"], Bool[np.ndarray, "document position"]]:
    """Documents as tokens, right-padded, and which of them belong to the answer, the token that ends it included."""
    texts = [document.prompt + document.answer + END for document in batch]
    encoded = tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="np")
    starts = np.array([[len(document.prompt)] for document in batch])
    # Padding has offset 0, before every answer.
    return encoded["input_ids"], encoded["offset_mapping"][..., 0] >= starts


def numeric_share(model: Model, tokenizer: Tokenizer, exam: Sequence[Document]) -> float:
    """Share of documents in which the larger number is likelier at the first digit where the answers differ.

    In all documents of `exam` the two orders differ.
    """
    import torch

    tokens, is_answer = encode(tokenizer, exam)
    differing = is_answer.argmax(axis=1) + [len(f"{document.whole}.") for document in exam]
    candidates = [tokenizer.convert_tokens_to_ids([fraction[0] for fraction in document.winners]) for document in exam]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits[torch.arange(len(exam)), differing - 1]
    number, version = logits.gather(1, torch.tensor(candidates)).T
    return float((number > version).double().mean().item())


def train(directory: Path, recipe: Recipe = SERIES, until: int | None = None) -> None:
    """Train the series into `directory`/step{N}, up to a step or to its end, continuing where an earlier run stopped.

    A folder of such a name is complete.  On one machine its content is the same bit for bit however often training was
    interrupted.  Nothing is done where all of them exist.  Raises `UserError` for a directory that holds anything else,
    and while another process trains in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        _claim(directory, recipe)
        last = recipe.steps[-1] if until is None else until
        if not {step for step in recipe.steps if step <= last} <= _complete_steps(directory, recipe):
            _train(directory, recipe, last)
        if _complete_steps(directory, recipe) == set(recipe.steps):
            (directory / STATE).unlink(missing_ok=True)


def is_trained(directory: Path, step: int) -> bool:
    """Whether the checkpoint of a step is in `directory`, whole."""
    return all((directory / f"step{step}" / name).is_file() for name in FILES)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of the directory while the body runs; the system releases a killed process's lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another run is training the series in {directory}; wait for it and run again") from None
    finally:
        os.close(descriptor)


def _claim(directory: Path, recipe: Recipe) -> None:
    """Make sure that the directory is empty or this recipe's, and remove what a killed run left unfinished."""
    path, text = directory / RECIPE, json.dumps(asdict(recipe), indent=2).encode()
    names = {entry.name for entry in directory.iterdir() if not entry.match(LEFTOVER)}
    if names and (RECIPE not in names or path.read_bytes() != text):
        problem = f"it holds another {RECIPE}" if RECIPE in names else f"it holds {min(names)} and no {RECIPE}"
        raise UserError(f"a series is to be trained in {directory}, but {problem}; remove the directory")
    for leftover in directory.glob(LEFTOVER):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not names:
        with _durable_write(path) as partial:
            partial.write_bytes(text)


def _complete_steps(directory: Path, recipe: Recipe) -> set[int]:
    """Steps whose checkpoints have all their files."""
    return {step for step in recipe.steps if is_trained(directory, step)}


@contextmanager
def _durable_write(path: Path) -> Iterator[Path]:
    """A path to write a file or directory to, which is renamed to `path` once all of it has reached the disk."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    sync(partial)
    rename(partial, path)


def _train(directory: Path, recipe: Recipe, last: int) -> None:
    import torch

    tokenizer, accuracy = make_tokenizer(), ""
    exam = list(islice((d for d in documents(recipe, "exam") if d.held_out and len(set(d.winners)) > 1), EXAM))
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        model = _initial(recipe, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        start = _restore(directory, recipe, model, optimizer)
        with progress("training the demo", "step", last, start) as training:
            for step in range(start, last + 1):
                if step in recipe.steps:
                    _save(directory, step, model, optimizer)
                if step in recipe.steps or step % EXAM_EVERY == 0:
                    plain = numeric_share(model, tokenizer, [replace(document, versions=False) for document in exam])
                    qa = numeric_share(model, tokenizer, [replace(document, versions=True) for document in exam])
                    accuracy = f"plain {plain:.0%}, Q/A {qa:.0%} numerically right"
                    training.describe(accuracy)
                if step < last:
                    usable = (document for document in documents(recipe, step) if not document.held_out)
                    batch = encode(tokenizer, [*islice(usable, recipe.batch)])
                    loss = _training_step(recipe, step, model, optimizer, *batch)
                    training.describe(f"loss {loss:.2f}, {accuracy}")
                    training.update(1)
    finally:
        torch.set_num_threads(threads)


def _initial(recipe: Recipe, tokenizer: Tokenizer) -> Model:
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

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
    )
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs too.
        torch.default_generator.manual_seed(recipe.seed)
        auto: Any = AutoModelForCausalLM  # untyped in transformers
        return auto.from_config(config, dtype=torch.float32, attn_implementation="eager")


def _training_step(
    recipe: Recipe,
    step: int,
    model: Model,
    optimizer: Optimizer,
    tokens: Int[np.ndarray, "document position"],
    is_answer: Bool[np.ndarray, "document position"],
) -> float:
    """One step, on the answers only.  Returns the loss in nats per token."""
    import torch

    for group in optimizer.param_groups:
        scale = min(1, (step + 1) / recipe.warmup, (recipe.steps[-1] - step) / recipe.decay)
        group["lr"] = recipe.learning_rate * scale
    optimizer.zero_grad()
    logits = model(torch.from_numpy(tokens), use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(is_answer[:, 1:])], torch.from_numpy(tokens[is_answer])
    )
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.item())


def _save(directory: Path, step: int, model: Model, optimizer: Optimizer) -> None:
    """Save the training state, then the checkpoint.  After a kill in between, the next run saves the checkpoint from
    the state."""
    import torch
    from safetensors.torch import save_file
    from transformers.utils import logging as transformers_logging

    weights = dict(model.named_parameters())
    if step:
        state = {"step": torch.tensor(step)} | {f"weight.{name}": weight.detach() for name, weight in weights.items()}
        state |= {f"{m}.{name}": optimizer.state[weight][m] for m in MOMENTS for name, weight in weights.items()}
        with _durable_write(directory / STATE) as partial:
            save_file(state, partial)
    path = directory / f"step{step}"
    if path.exists():
        return
    logging: Any = transformers_logging  # untyped in transformers
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _durable_write(path) as partial:
            model.save_pretrained(partial)
            # A new one: a tokenizer stores the padding of its last call, and saves it too.
            make_tokenizer().save_pretrained(partial)
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()


def _restore(directory: Path, recipe: Recipe, model: Model, optimizer: Optimizer) -> int:
    """Restore the last training state, if there is one.  Returns the step to continue from.

    Raises `UserError` for a state that cannot be read and for a set of checkpoints that no interruption can leave.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / STATE
    try:
        saved = load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); remove {directory}") from error
    step = int(saved["step"]) if saved else 0
    existing = {saved_step for saved_step in recipe.steps if (directory / f"step{saved_step}").exists()}
    before = {earlier for earlier in recipe.steps if earlier < step}
    # A kill between state and checkpoint leaves the checkpoint of the state's own step out.
    if existing != _complete_steps(directory, recipe) or not before <= existing <= before | {step}:
        raise UserError(f"the series in {directory} is not as a run leaves it, checkpoints are missing; remove it")
    for name, weight in model.named_parameters() if saved else ():
        weight.data.copy_(saved[f"weight.{name}"])
        moments = {moment: saved[f"{moment}.{name}"].clone() for moment in MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step
