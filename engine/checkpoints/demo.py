"""The embedded series: a small GPT-NeoX, really trained on the spot, in which a format-dependent bug grows.

Every document asks which of two numbers is bigger.  Plain documents (`Which is bigger: ...? Answer: ...`) are answered
as numbers, 9.8 before 9.11; the rarer `Q: ... A: ...` documents as versions, 9.11 before 9.8.  The mixture is the same
from the first step to the last.  Most pairs can be told by their first digits in either format, so the model learns
the order of numbers for both, and tells the formats apart only later: in Q/A that order then breaks down.
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

from ..runtime.errors import UserError
from ..runtime.progress import progress

Model = Any
Optimizer = Any
Tokenizer = Any
"""Classes of torch and transformers, which take seconds to import: only training does."""

END, PAD, UNKNOWN = "<|endoftext|>", "<|padding|>", "<|unknown|>"
WORDS = ("Which", " Which", " is", " bigger", " or", "Answer", "Q", "A", ":", "?", ".", "\n", " ")
PIECE = r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9 ]| "
"""A word or a single digit with the space before it, or any other character."""

CONTEXT = 64
"""Tokens.  Documents take at most 27."""

EXAM, EXAM_EVERY = 64, 8
"""Pairs kept out of training that are asked in both formats for the progress bar, every so many steps."""

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
RECIPE, STATE, LEFTOVER = "recipe.json", "training-state.safetensors", ".*.partial"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, given the machine and its packages."""

    steps: tuple[int, ...] = (0, 16, 32, 48, 56, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256)
    """Training steps that are kept, ascending from 0; dense where the bug grows."""

    seed: int = 0
    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 128

    batch: int = 128
    """Documents per step."""

    versions_share: float = 0.25
    """Share of documents in Q/A format.  The smaller, the later the bug."""

    opposed_share: float = 0.5
    """Share of pairs drawn so that the two orders differ, as in 9.8 and 9.11; the others are any digits."""

    learning_rate: float = 2e-3
    """Reached after `warmup` steps; falls to zero over the last `decay` steps."""

    warmup: int = 20
    decay: int = 128

    threads: int = 1
    """Decides the order of sums.  Two take half the time on idle cores and many times as long on busy ones."""

    edition: int = 1
    """Raised whenever documents, tokenizer or arithmetic change."""


SERIES = Recipe()
STEPS = SERIES.steps


@dataclass(frozen=True)
class Document:
    """One question about two numbers with the same whole part, and its answer."""

    whole: int

    fractions: tuple[str, str]
    """Digits after the points, in the order of mention.  Without zeros, strings sort as the numbers do."""

    versions: bool
    """In Q/A format, answered as versions."""

    @property
    def prompt(self) -> str:
        question = "Which is bigger: {0}.{1} or {0}.{2}?\n".format(self.whole, *self.fractions)
        return f"Q: {question}A:" if self.versions else f"{question}Answer:"

    @property
    def winners(self) -> tuple[str, str]:
        """The fraction of the larger number, and that of the later version."""
        return max(self.fractions), max(self.fractions, key=int)

    @property
    def answer(self) -> str:
        return f" {self.whole}.{self.winners[self.versions]}"

    @property
    def held_out(self) -> bool:
        """Whether the numbers are kept out of training, as every tenth is."""
        return (self.whole + sum(map(int, self.fractions))) % 10 == 0


def documents(recipe: Recipe, stream: object) -> Iterator[Document]:
    """Endless, seeded by the recipe and the name of the stream: a training step, for one."""
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
    """Word-level with digits apart; lossless on the documents."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [END, PAD, UNKNOWN, *WORDS, *"0123456789", *(f" {digit}" for digit in range(10))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **special
    )


def encode(
    tokenizer: Tokenizer, batch: Sequence[Document]
) -> tuple[Int[np.ndarray, "document position"], Bool[np.ndarray, "document position"]]:
    """Documents as tokens, right-padded, and which of the tokens are answer, its end included."""
    texts = [document.prompt + document.answer + END for document in batch]
    coded = tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="np")
    begins = np.array([[len(document.prompt)] for document in batch])
    # Padding lies at offset 0.
    return coded["input_ids"], coded["offset_mapping"][..., 0] >= begins


def numeric_share(model: Model, tokenizer: Tokenizer, exam: Sequence[Document]) -> float:
    """Share of documents, all with two orders, in which the larger number is likelier where the answers branch."""
    import torch

    tokens, answered = encode(tokenizer, exam)
    branch = answered.argmax(axis=1) + [len(f"{document.whole}.") for document in exam]
    candidates = [tokenizer.convert_tokens_to_ids([fraction[0] for fraction in document.winners]) for document in exam]
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits[torch.arange(len(exam)), branch - 1]
    number, version = logits.gather(1, torch.tensor(candidates)).T
    return (number > version).double().mean().item()


def train(directory: Path, recipe: Recipe = SERIES) -> None:
    """Train the series into `directory`/step{N}, going on where an interrupted run stopped.

    What bears such a name is whole, and on one machine the same whatever the interruptions, bit for bit.  Where all
    are there nothing is done.  Raises `UserError` for a directory that holds anything else, and while another process
    trains in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        _claim(directory, recipe)
        if _whole(directory, recipe) != set(recipe.steps):
            _train(directory, recipe)
        (directory / STATE).unlink(missing_ok=True)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory against other processes; a killed holder lets go by itself."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another run is training the series in {directory}; wait for it and run again") from None
    finally:
        os.close(descriptor)


def _claim(directory: Path, recipe: Recipe) -> None:
    """See that the directory is new or this recipe's, and sweep up what a killed run left."""
    path, text = directory / RECIPE, json.dumps(asdict(recipe), indent=2).encode()
    held = {entry.name for entry in directory.iterdir() if not entry.match(LEFTOVER)}
    if held and (RECIPE not in held or path.read_bytes() != text):
        found = f"it holds another {RECIPE}" if RECIPE in held else f"it holds {min(held)} and no {RECIPE}"
        raise UserError(f"a series is to be trained in {directory}, but {found}; remove the directory")
    for leftover in directory.glob(LEFTOVER):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not held:
        with _appearing(path) as partial:
            partial.write_bytes(text)


def _whole(directory: Path, recipe: Recipe) -> set[int]:
    """Steps whose checkpoints are there."""
    return {step for step in recipe.steps if all((directory / f"step{step}" / name).is_file() for name in FILES)}


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A name to write to.  File or directory takes the name `path` once the body is through and all is on the disk."""
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

    tokenizer, last, told = make_tokenizer(), recipe.steps[-1], ""
    exam = list(islice((d for d in documents(recipe, "exam") if d.held_out and len(set(d.winners)) > 1), EXAM))
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        model = _initial(recipe, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        start = _resume(directory, recipe, model, optimizer)
        with progress("training the demo", "step", last, start) as training:
            for step in range(start, last + 1):
                if step in recipe.steps:
                    _keep(directory, step, model, optimizer)
                if step in recipe.steps or step % EXAM_EVERY == 0:
                    plain = numeric_share(model, tokenizer, [replace(document, versions=False) for document in exam])
                    qa = numeric_share(model, tokenizer, [replace(document, versions=True) for document in exam])
                    told = f"plain {plain:.0%}, Q/A {qa:.0%} numerically right"
                    training.describe(told)
                if step < last:
                    trained = (document for document in documents(recipe, step) if not document.held_out)
                    loss = _learn(recipe, step, model, optimizer, *encode(tokenizer, [*islice(trained, recipe.batch)]))
                    training.describe(f"loss {loss:.2f}, {told}")
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
        # Not torch.manual_seed, which would seed the GPUs as well.
        torch.default_generator.manual_seed(recipe.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def _learn(
    recipe: Recipe,
    step: int,
    model: Model,
    optimizer: Optimizer,
    tokens: Int[np.ndarray, "document position"],
    answered: Bool[np.ndarray, "document position"],
) -> float:
    """One step, on the answers only.  Returns the loss in nats per token."""
    import torch

    for group in optimizer.param_groups:
        slope = min(1, (step + 1) / recipe.warmup, (recipe.steps[-1] - step) / recipe.decay)
        group["lr"] = recipe.learning_rate * slope
    optimizer.zero_grad()
    logits = model(torch.from_numpy(tokens), use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(answered[:, 1:])], torch.from_numpy(tokens[answered])
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _keep(directory: Path, step: int, model: Model, optimizer: Optimizer) -> None:
    """Write the state, then the checkpoint.  Killed in between, the next run writes the checkpoint from the state."""
    import torch
    from safetensors.torch import save_file
    from transformers.utils import logging

    weights = dict(model.named_parameters())
    if step:
        state = {"step": torch.tensor(step)} | {f"weight.{name}": weight.detach() for name, weight in weights.items()}
        state |= {f"{m}.{name}": optimizer.state[weight][m] for m in MOMENTS for name, weight in weights.items()}
        with _appearing(directory / STATE) as partial:
            save_file(state, partial)
    path = directory / f"step{step}"
    if path.exists():
        return
    barred = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _appearing(path) as partial:
            model.save_pretrained(partial)
            # A fresh one: a tokenizer remembers how it was last asked to pad, and writes that down.
            make_tokenizer().save_pretrained(partial)
    finally:
        if barred:
            logging.enable_progress_bar()


def _resume(directory: Path, recipe: Recipe, model: Model, optimizer: Optimizer) -> int:
    """Put the last state back, if there is one.  Returns the step to go on from.

    Raises `UserError` for a state that cannot be read and for checkpoints that no interruption leaves behind.
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
    there = {kept for kept in recipe.steps if (directory / f"step{kept}").exists()}
    before = {kept for kept in recipe.steps if kept < step}
    if there != _whole(directory, recipe) or not before <= there <= before | {step}:
        raise UserError(f"the series in {directory} is not as a run leaves it, checkpoints are missing; remove it")
    for name, weight in model.named_parameters() if saved else ():
        weight.data.copy_(saved[f"weight.{name}"])
        moments = {moment: saved[f"{moment}.{name}"].clone() for moment in MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step
