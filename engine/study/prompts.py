"""Contrasts as tokens: draw them, find the first token where their answers differ, leave out repeats.

A trial is one distinct contrast.  The model runs the clean and the corrupt prompt up to that token, and the logits that
follow are compared.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from ..runtime.errors import UserError
from ..runtime.format import one_line, shorten
from .study import RUNS
from .tasks.contrast import Contrast, Tokenizer
from .tasks.jsonl import file_digest, read_contrasts
from .tasks.registry import SEED, TASKS

DEFAULT_TRIALS = 15
"""Of a built-in task."""

PATIENCE = 10_000
"""Contrasts of a built-in task that may turn out unusable with a tokenizer before the task is given up."""


@dataclass(frozen=True)
class Trials:
    """Distinct contrasts as tokens; `run` is in the order of `RUNS`.

    A row ends just before the first token where the answers differ.
    """

    tokens: Int[np.ndarray, "run trial position"]
    """The prompt and the beginning that both answers share; right-padded with 0."""

    length: Int[np.ndarray, "run trial"]
    """Tokens of each row without padding."""

    answer_tokens: Int[np.ndarray, "trial answer"]
    """The first tokens where the answers differ: right, wrong."""

    token_text: Shaped[np.ndarray, "run trial position"]
    """Each token decoded by itself; empty where padded."""

    contrasts: tuple[Contrast, ...]

    notes: tuple[str, ...]
    """Remarks for the user: contrasts dropped, repeats merged, words unknown to the tokenizer."""

    continuation: Int[np.ndarray, "trial answer token"] | None = None
    """The answers from the first differing token on, padded with -1; None in stores that are older than this field."""

    @property
    def n_trials(self) -> int:
        return len(self.contrasts)

    def only(self, chosen: Sequence[int]) -> "Trials":
        """The trials at the indices `chosen`."""
        by_run = {name: getattr(self, name)[:, chosen] for name in ("tokens", "length", "token_text")}
        contrasts = tuple(self.contrasts[trial] for trial in chosen)
        continuation = None if self.continuation is None else self.continuation[chosen]
        return replace(
            self, **by_run, answer_tokens=self.answer_tokens[chosen], contrasts=contrasts, continuation=continuation
        )


def check_task(task: str) -> None:
    """Raise `UserError` unless `task` is a built-in task or a valid JSON Lines file."""
    if task not in TASKS:
        read_contrasts(task)


def load_contrasts(task: str, tokenizer: Tokenizer) -> Iterable[Contrast]:
    """The contrasts of a built-in task or a JSON Lines file.  Raises `UserError` naming line and remedy."""
    return TASKS[task].contrasts(SEED, tokenizer) if task in TASKS else read_contrasts(task)


def task_digest(task: str) -> str:
    """What identifies a task: the sha256 of a file's bytes in hex, the name of a built-in task."""
    return task if task in TASKS else file_digest(task)


class _UnusableContrast(ValueError):
    """The tokenizer leaves no single token at which the answers can be compared."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy


@dataclass(frozen=True)
class _PromptTokens:
    """One prompt and the beginning that both answers share, up to the first token where they differ."""

    tokens: tuple[int, ...]

    shared: tuple[int, ...]
    """The last of `tokens`, those that reach past the end of the prompt."""

    answers: tuple[int, int]
    """The first tokens where the answers differ: right, wrong."""

    # Left out of comparisons: trials are the same if the model runs the same tokens and the same logits are compared.
    continuation: tuple[tuple[int, ...], ...] = field(compare=False)
    """The answers from the first differing token on."""

    unknown: tuple[str, ...] = field(compare=False)
    """Words that the tokenizer does not know."""


TokenPair = tuple[_PromptTokens, ...]
"""The clean and the corrupt prompt of one contrast."""


def draw_trials(task: str, n_trials: int | None, tokenizer: Tokenizer, context: int) -> Trials:
    """The first `n_trials` usable contrasts of a task as tokens; identical ones become one trial.

    Without `n_trials`, 15 of a built-in task and all of a file.  `context` is the longest row that the model takes, in
    tokens.  A built-in task draws another contrast in place of one that the tokenizer makes unusable; a file's line is
    refused.  Raises `UserError` for that, for rows longer than `context`, and for a tokenizer without character
    offsets.
    """
    if n_trials is not None and n_trials < 1:
        raise UserError(f"--trials {n_trials}: at least one trial is needed")
    if not tokenizer.is_fast:
        raise UserError("the model's tokenizer gives no character offsets; save it with a tokenizer.json (a fast one)")
    built_in = task in TASKS
    n_wanted = DEFAULT_TRIALS if built_in and n_trials is None else n_trials
    distinct: dict[TokenPair, Contrast] = {}
    dropped: dict[Contrast, str] = {}
    n_drawn = 0
    for contrast in islice(load_contrasts(task, tokenizer), n_wanted and n_wanted + PATIENCE * built_in):
        if n_drawn == n_wanted:
            break
        if contrast in dropped:  # a task may repeat one contrast for ever
            continue
        try:
            pair = _token_pair(contrast, tokenizer, context)
            if built_in and TASKS[task].replaces:
                _check_replaced(pair, tokenizer)
        except _UnusableContrast as error:
            if not built_in:
                raise UserError(f"{contrast.source}: {error.problem}; {error.remedy}") from None
            dropped[contrast] = error.problem
            continue
        n_drawn += 1
        distinct[pair] = replace(distinct[pair], repeats=distinct[pair].repeats + 1) if pair in distinct else contrast
    if built_in and n_wanted is not None and n_drawn < n_wanted:
        reason = f", {len(dropped)} were dropped ({next(iter(dropped.values()))})" if dropped else ""
        file = "write a JSON Lines file of prompts that this tokenizer takes"
        remedy = f"ask for at most {n_drawn}" if n_drawn else file
        raise UserError(f"--task {task} --trials {n_wanted}: only {n_drawn} can be drawn{reason}; {remedy}")
    return _trials(distinct, tuple(_notes(task, n_trials, distinct, dropped)), tokenizer)


def _token_pair(contrast: Contrast, tokenizer: Tokenizer, context: int) -> TokenPair:
    pair = tuple(_prompt_tokens(prompt, contrast, tokenizer) for prompt in (contrast.clean, contrast.corrupt))
    for run, row in zip(RUNS, pair, strict=True):
        if len(row.tokens) > context:
            problem = f"the {run} prompt takes {len(row.tokens)} tokens, the model's context is {context}"
            raise UserError(f"{contrast.source}: {problem}; write a shorter prompt or take a model with more context")
    if (pair[0].shared, pair[0].continuation) != (pair[1].shared, pair[1].continuation):
        problem = f"{contrast.answer!r} and {contrast.wrong!r} become other tokens after clean than after corrupt"
        raise _UnusableContrast(problem, "let both prompts end alike, for instance in a colon")
    return pair


@dataclass(frozen=True)
class Spelling:
    """A contrast's answers as tokens after one prompt, from the end of the prompt on."""

    shared: tuple[int, ...]
    """The beginning that both answers share: the last tokens of the row that is run."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]


def spell(contrast: Contrast, prompt: str, tokenizer: Tokenizer) -> Spelling:
    """How the tokenizer spells the answers after `prompt`, which is the contrast's clean or corrupt one."""
    row = _prompt_tokens(prompt, contrast, tokenizer)
    start = len(row.tokens) - len(row.shared)
    answers = tokenizer([prompt + contrast.answer, prompt + contrast.wrong], verbose=False)["input_ids"]
    right, wrong = (tuple(answer[start:]) for answer in answers)
    return Spelling(row.shared, right, wrong)


def _check_replaced(pair: TokenPair, tokenizer: Tokenizer) -> None:
    """Raise `_UnusableContrast` unless tokens correspond one by one and one token tells the answers apart."""
    clean, corrupt = (row.tokens for row in pair)
    remedy = "write words that the tokenizer reads as equally many tokens, neither the beginning of the other"
    if len(clean) != len(corrupt):
        raise _UnusableContrast(f"the clean prompt takes {len(clean)} tokens, the corrupt one {len(corrupt)}", remedy)
    if clean == corrupt:
        raise _UnusableContrast("the prompts read as the same tokens", remedy)
    # " 17" against " 170": the answer 1709 may begin with either.
    pieces = tokenizer.batch_decode([[token] for token in pair[0].answers], clean_up_tokenization_spaces=False)
    short, long = sorted(pieces, key=len)
    if long.startswith(short):
        raise _UnusableContrast(f"the answers first differ at {long!r} against {short!r}, its beginning", remedy)


def _prompt_tokens(prompt: str, contrast: Contrast, tokenizer: Tokenizer) -> _PromptTokens:
    """Tokenize the prompt with either answer, up to the first difference.  Raises `_UnusableContrast`.

    Prompt and answer are tokenized together, because a tokenizer may merge the end of the one with the beginning of
    the other.
    """
    texts = [prompt + contrast.answer, prompt + contrast.wrong]
    encoded = _encode(tokenizer, texts)
    right, wrong = encoded["input_ids"]
    answers = f"{contrast.answer!r} and {contrast.wrong!r}"
    split = next((i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), None)
    if split is None:
        problem = f"{answers} never differ in tokens: they read the same, or one is the beginning of the other"
        raise _UnusableContrast(
            problem, "write answers that the tokenizer reads differently, for instance up to a full stop"
        )
    pieces = tokenizer.batch_decode([[right[split]], [wrong[split]]], clean_up_tokenization_spaces=False)
    spans = [offsets[split] for offsets in encoded["offset_mapping"]]
    if {right[split], wrong[split]} & set(tokenizer.all_special_ids):
        problem = f"{answers} first differ at a special token ({pieces[0]!r} against {pieces[1]!r})"
        raise _UnusableContrast(
            problem, "write answers in words the tokenizer knows, neither the beginning of the other"
        )
    if min(map(_true_start, texts, spans, pieces)) < len(prompt):
        problem = (
            f"{answers} first differ in a token that begins inside the prompt ({pieces[0]!r} against {pieces[1]!r})"
        )
        raise _UnusableContrast(problem, "begin both answers with white space and leave none at the prompt's end")
    if split == 0:
        raise _UnusableContrast("no token of the prompt is left to run", "write a prompt that the tokenizer can see")
    run = list(zip(right[:split], encoded["offset_mapping"][0][:split], strict=True))
    return _PromptTokens(
        tokens=tuple(right[:split]),
        shared=tuple(token for token, (_, end) in run if end > len(prompt)),
        answers=(right[split], wrong[split]),
        continuation=tuple(
            _without_end(row[split:], offsets[split:], tokenizer)
            for row, offsets in zip((right, wrong), encoded["offset_mapping"], strict=True)
        ),
        unknown=tuple(texts[0][a:b] for token, (a, b) in run if token == tokenizer.unk_token_id and a < b),
    )


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Mapping[str, Any]:
    try:
        encoded: Mapping[str, Any] = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    except MemoryError:
        raise
    except Exception as error:  # a tokenizer of whatever files; tokenizers raises bare Exceptions
        said = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"the model's tokenizer cannot split {shorten(repr(texts[0]), 60)} ({said})") from error
    return encoded


def _without_end(tokens: Sequence[int], spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> tuple[int, ...]:
    """`tokens` without what a tokenizer appends by itself: special tokens at the end that span no text.

    Spanning no text is not enough: in byte-level tokenizers a token of nothing but spaces spans none either.
    """
    special = set(tokenizer.all_special_ids)
    text = [i for i, (token, (a, b)) in enumerate(zip(tokens, spans, strict=True)) if a < b or token not in special]
    return tuple(tokens[: text[-1] + 1])


def _true_start(text: str, span: tuple[int, int], piece: str) -> int:
    """Where a token begins in `text`: byte-level tokenizers leave a token's own leading spaces out of its span."""
    start, end = span
    n_spaces = len(piece) - len(piece.lstrip(" "))
    left_out = n_spaces and not text[start:end].startswith(" ") and text[:start].endswith(" " * n_spaces)
    return start - n_spaces if left_out else start


def _notes(
    task: str, n_trials: int | None, distinct: Mapping[TokenPair, Contrast], dropped: Mapping[Contrast, str]
) -> Iterator[str]:
    contrasts = distinct.values()
    n_drawn = sum(contrast.repeats for contrast in contrasts)
    if dropped:
        yield f"{task}: dropped {len(dropped)} pairs and drew others ({next(iter(dropped.values()))})"
    if n_trials is not None and n_drawn < n_trials:
        yield f"{task}: holds {n_drawn} trials where --trials asks for {n_trials}; all of them are used"
    if n_drawn > len(distinct):
        yield f"{task}: {n_drawn} trials, {len(distinct)} distinct; identical ones are computed once and counted once"
    if glued := [contrast for contrast in contrasts if _lacks_space(contrast)]:
        which = f"in {len(glued)} trials, first in {glued[0].source}"
        yield f"{task}: no white space between prompt and answer {which}; answers are appended as written"
    if unknown := {word: None for pair in distinct for row in pair for word in row.unknown}:
        yield f"{task}: prompts hold {len(unknown)} words unknown to the tokenizer, first {next(iter(unknown))!r}"


def _lacks_space(contrast: Contrast) -> bool:
    """Whether nothing separates a prompt from an answer."""
    prompts = contrast.clean[-1].isspace() and contrast.corrupt[-1].isspace()
    answers = contrast.answer[0].isspace() and contrast.wrong[0].isspace()
    return not prompts and not answers


def _trials(distinct: Mapping[TokenPair, Contrast], notes: tuple[str, ...], tokenizer: Tokenizer) -> Trials:
    rows_by_run = tuple(zip(*distinct, strict=True))
    length = np.array([[len(row.tokens) for row in rows] for rows in rows_by_run])
    is_real = np.arange(length.max()) < length[..., None]
    tokens = np.zeros(is_real.shape, dtype=np.int64)
    tokens[is_real] = [token for rows in rows_by_run for row in rows for token in row.tokens]
    # Each distinct token is decoded once: with thousands of trials decoding would take longer than the forward.
    vocabulary, index = np.unique(tokens[is_real], return_inverse=True)
    pieces = tokenizer.batch_decode([[token] for token in vocabulary.tolist()], clean_up_tokenization_spaces=False)
    token_text = np.zeros(is_real.shape, dtype=np.array(pieces).dtype)
    token_text[is_real] = np.array(pieces)[index]
    answer_tokens = np.array([clean.answers for clean, _ in distinct], dtype=np.int64)
    continuation = _continuation([clean for clean, _ in distinct])
    return Trials(tokens, length, answer_tokens, token_text, tuple(distinct.values()), notes, continuation)


def _continuation(rows: Sequence[_PromptTokens]) -> Int[np.ndarray, "trial answer token"]:
    longest = max(len(tokens) for row in rows for tokens in row.continuation)
    return np.array([[(*tokens, *[-1] * (longest - len(tokens))) for tokens in row.continuation] for row in rows])


def same_tokens(first: Trials, second: Trials) -> bool:
    """Whether both have the same prompts and answers, token for token."""
    fields = ["tokens", "length", "answer_tokens"]
    if first.continuation is not None and second.continuation is not None:
        fields.append("continuation")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in fields)
