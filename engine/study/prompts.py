"""Contrasts as tokens: the token at which their answers branch, and how their positions are aligned."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from jaxtyping import Int, Shaped

from ..runtime.errors import UserError
from .study import RUNS
from .tasks.contrast import Contrast, Tokenizer
from .tasks.jsonl import file_digest, read_contrasts
from .tasks.registry import SEED, TASKS

DEFAULT_TRIALS = 15

PATIENCE = 10_000
"""Contrasts that a built-in task may lose to a tokenizer before it is given up."""


@dataclass(frozen=True)
class Trials:
    """Distinct contrasts as tokens.  Rows stop just before the branching token; `run` is in the order of `RUNS`."""

    tokens: Int[np.ndarray, "run trial position"]
    """Prompt and the beginning that both answers share; right-padded with 0."""

    length: Int[np.ndarray, "run trial"]
    """Real tokens of each row."""

    answer_tokens: Int[np.ndarray, "trial answer"]
    """The two branching tokens: right, wrong."""

    token_text: Shaped[np.ndarray, "run trial position"]
    """Each token decoded by itself; empty where padded."""

    contrasts: tuple[Contrast, ...]

    notes: tuple[str, ...]
    """What the user should hear: pairs dropped, repeats merged, words unknown."""

    continuation: Int[np.ndarray, "trial answer token"] | None = None
    """The answers from the branching token on, padded with -1; None where a store from before did not keep them."""

    @property
    def n_trials(self) -> int:
        return len(self.contrasts)

    def only(self, chosen: Sequence[int]) -> "Trials":
        """Some of the trials."""
        kept = {name: getattr(self, name)[:, chosen] for name in ("tokens", "length", "token_text")}
        contrasts = tuple(self.contrasts[trial] for trial in chosen)
        continuation = None if self.continuation is None else self.continuation[chosen]
        return replace(
            self, **kept, answer_tokens=self.answer_tokens[chosen], contrasts=contrasts, continuation=continuation
        )


def check_task(task: str) -> None:
    """Raises `UserError` for a name that is no built-in task's and no good JSON Lines file's."""
    if task not in TASKS:
        read_contrasts(task)


def load_contrasts(task: str, tokenizer: Tokenizer) -> Iterable[Contrast]:
    """A built-in task's contrasts, or a JSON Lines file's.  Raises `UserError` that names line and mend."""
    return TASKS[task].contrasts(SEED, tokenizer) if task in TASKS else read_contrasts(task)


def task_digest(task: str) -> str:
    """sha256 of a file's bytes in hex; of a built-in task its name."""
    return task if task in TASKS else file_digest(task)


class _Unreadable(ValueError):
    """The answers do not branch at one token that can be read: what was found, and the mend."""


@dataclass(frozen=True)
class _PromptTokens:
    """One prompt and the answers' common beginning, up to the branching token."""

    tokens: tuple[int, ...]
    shared: tuple[int, ...]
    """The last tokens, those that reach past the end of the prompt."""
    answers: tuple[int, int]
    continuation: tuple[tuple[int, ...], ...] = field(compare=False)
    """The answers from the branching token on."""
    unknown: tuple[str, ...] = field(compare=False)


def draw_trials(task: str, n_trials: int | None, tokenizer: Tokenizer, context: int) -> Trials:
    """The first `n_trials` contrasts of a task whose answers branch, as tokens; identical ones once.

    Without `n_trials`, 15 of a built-in task and all of a file.  `context` is the longest row the model takes, in
    tokens.  Raises `UserError` for a line that does not branch; a built-in task draws another contrast instead.
    """
    if n_trials is not None and n_trials < 1:
        raise UserError(f"--trials {n_trials}: at least one trial is needed")
    if not tokenizer.is_fast:
        raise UserError("the model's tokenizer tells no character offsets; save it with a tokenizer.json (a fast one)")
    built_in = task in TASKS
    wanted = DEFAULT_TRIALS if built_in and n_trials is None else n_trials
    kept: dict[tuple[_PromptTokens, ...], Contrast] = {}
    dropped: dict[Contrast, str] = {}
    drawn = 0
    for contrast in islice(load_contrasts(task, tokenizer), wanted and wanted + PATIENCE * built_in):
        if drawn == wanted:
            break
        if contrast in dropped:  # a task that repeats itself
            continue
        try:
            rows = _rows(contrast, tokenizer, context)
            if built_in and TASKS[task].replaces:
                _check_replaced(rows, tokenizer)
        except _Unreadable as reason:
            found, mend = reason.args
            if not built_in:
                raise UserError(f"{contrast.source}: {found}; {mend}") from None
            dropped[contrast] = found
            continue
        drawn += 1
        kept[rows] = replace(kept[rows], repeats=kept[rows].repeats + 1) if rows in kept else contrast
    if built_in and wanted is not None and drawn < wanted:
        why = f", {len(dropped)} were dropped ({next(iter(dropped.values()))})" if dropped else ""
        mend = f"ask for at most {drawn}" if drawn else "write a JSON Lines file of prompts that this tokenizer takes"
        raise UserError(f"--task {task} --trials {wanted}: only {drawn} can be drawn{why}; {mend}")
    return _trials(kept, tuple(_notes(task, n_trials, kept, dropped)), tokenizer)


def _rows(contrast: Contrast, tokenizer: Tokenizer, context: int) -> tuple[_PromptTokens, ...]:
    rows = tuple(_row(prompt, contrast, tokenizer) for prompt in (contrast.clean, contrast.corrupt))
    for run, row in zip(RUNS, rows, strict=True):
        if len(row.tokens) > context:
            found = f"the {run} prompt takes {len(row.tokens)} tokens, the model's context is {context}"
            raise UserError(f"{contrast.source}: {found}; write a shorter prompt or take a model with a longer context")
    if (rows[0].shared, rows[0].continuation) != (rows[1].shared, rows[1].continuation):
        found = f"{contrast.answer!r} and {contrast.wrong!r} read as other tokens after clean than after corrupt"
        raise _Unreadable(found, "let both prompts end alike, for instance in a colon")
    return rows


@dataclass(frozen=True)
class Spelling:
    """A contrast's answers as tokens after a prompt of its own, from where the prompt ends."""

    shared: tuple[int, ...]
    """The beginning that both share: the last tokens of the row that is run."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]


def spell(contrast: Contrast, prompt: str, tokenizer: Tokenizer) -> Spelling:
    """How the tokenizer spells the answers after `prompt`, which is the contrast's clean or corrupt one."""
    row = _row(prompt, contrast, tokenizer)
    start = len(row.tokens) - len(row.shared)
    answers = tokenizer([prompt + contrast.answer, prompt + contrast.wrong], verbose=False)["input_ids"]
    right, wrong = (tuple(answer[start:]) for answer in answers)
    return Spelling(row.shared, right, wrong)


def _check_replaced(rows: tuple[_PromptTokens, ...], tokenizer: Tokenizer) -> None:
    """Raises `_Unreadable` unless tokens correspond one by one and each answer is known by its branching token."""
    clean, corrupt = (row.tokens for row in rows)
    mend = "write words that the tokenizer reads as equally many tokens, neither the beginning of the other"
    if len(clean) != len(corrupt):
        raise _Unreadable(f"the clean prompt takes {len(clean)} tokens, the corrupt one {len(corrupt)}", mend)
    if clean == corrupt:
        raise _Unreadable("the prompts read as the same tokens", mend)
    # " 17" against " 170": the answer 1709 may begin with either.
    pieces = tokenizer.batch_decode([[token] for token in rows[0].answers], clean_up_tokenization_spaces=False)
    short, long = sorted(pieces, key=len)
    if long.startswith(short):
        raise _Unreadable(f"the answers part at {long!r} against {short!r}, its beginning", mend)


def _row(prompt: str, contrast: Contrast, tokenizer: Tokenizer) -> _PromptTokens:
    """Tokenize the prompt with either answer and find where the two part.  Raises `_Unreadable`."""
    texts = [prompt + contrast.answer, prompt + contrast.wrong]
    coded = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    right, wrong = coded["input_ids"]
    pair = f"{contrast.answer!r} and {contrast.wrong!r}"
    at = next((i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), None)
    if at is None:
        found = f"{pair} never part in tokens: they read the same, or one is the beginning of the other"
        raise _Unreadable(found, "write answers that the tokenizer tells apart, for instance up to a full stop")
    pieces = tokenizer.batch_decode([[right[at]], [wrong[at]]], clean_up_tokenization_spaces=False)
    spans = [offsets[at] for offsets in coded["offset_mapping"]]
    if {right[at], wrong[at]} & set(tokenizer.all_special_ids):
        found = f"{pair} part at a special token ({pieces[0]!r} against {pieces[1]!r})"
        raise _Unreadable(found, "write answers in words the tokenizer knows, neither the beginning of the other")
    if min(map(_true_start, texts, spans, pieces)) < len(prompt):
        found = f"{pair} part in a token that begins inside the prompt ({pieces[0]!r} against {pieces[1]!r})"
        raise _Unreadable(found, "begin both answers with white space and leave none at the prompt's end")
    if at == 0:
        raise _Unreadable("no token of the prompt is left to run", "write a prompt that the tokenizer can see")
    run = list(zip(right[:at], coded["offset_mapping"][0][:at], strict=True))
    return _PromptTokens(
        tokens=tuple(right[:at]),
        shared=tuple(token for token, (_, end) in run if end > len(prompt)),
        answers=(right[at], wrong[at]),
        continuation=tuple(
            _without_end(row[at:], offsets[at:], tokenizer)
            for row, offsets in zip((right, wrong), coded["offset_mapping"], strict=True)
        ),
        unknown=tuple(texts[0][a:b] for token, (a, b) in run if token == tokenizer.unk_token_id and a < b),
    )


def _without_end(tokens: Sequence[int], spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Without what a tokenizer appends by itself, an end-of-text token say: a special token that spans no text.

    To span no text is not enough: in byte-level tokenizers a token of nothing but spaces spans none either.
    """
    own = set(tokenizer.all_special_ids)
    said = [at for at, (token, (a, b)) in enumerate(zip(tokens, spans, strict=True)) if a < b or token not in own]
    return tuple(tokens[: said[-1] + 1])


def _true_start(text: str, span: tuple[int, int], piece: str) -> int:
    """Where a token begins in `text`: byte-level tokenizers leave a token's own leading spaces out of its span."""
    start, end = span
    own = len(piece) - len(piece.lstrip(" "))
    left_out = own and not text[start:end].startswith(" ") and text[:start].endswith(" " * own)
    return start - own if left_out else start


def _notes(
    task: str, asked: int | None, kept: Mapping[tuple[_PromptTokens, ...], Contrast], dropped: Mapping[Contrast, str]
) -> Iterator[str]:
    contrasts = kept.values()
    drawn = sum(contrast.repeats for contrast in contrasts)
    if dropped:
        yield f"{task}: dropped {len(dropped)} pairs and drew others ({next(iter(dropped.values()))})"
    if asked is not None and drawn < asked:
        yield f"{task}: holds {drawn} trials where --trials asks for {asked}; all of them are used"
    if drawn > len(kept):
        yield f"{task}: {drawn} trials, {len(kept)} distinct; identical ones are computed once and counted once"
    if glued := [contrast for contrast in contrasts if _glued(contrast)]:
        found = f"no white space between prompt and answer in {len(glued)} trials, first in {glued[0].source}"
        yield f"{task}: {found}; answers are appended as written"
    if unknown := {word: None for rows in kept for row in rows for word in row.unknown}:
        yield f"{task}: prompts hold {len(unknown)} words unknown to the tokenizer, first {next(iter(unknown))!r}"


def _glued(contrast: Contrast) -> bool:
    prompts = contrast.clean[-1].isspace() and contrast.corrupt[-1].isspace()
    answers = contrast.answer[0].isspace() and contrast.wrong[0].isspace()
    return not prompts and not answers


def _trials(kept: Mapping[tuple[_PromptTokens, ...], Contrast], notes: tuple[str, ...], tokenizer: Tokenizer) -> Trials:
    runs = tuple(zip(*kept, strict=True))
    length = np.array([[len(row.tokens) for row in run] for run in runs])
    real = np.arange(length.max()) < length[..., None]
    tokens = np.zeros(real.shape, dtype=np.int64)
    tokens[real] = [token for run in runs for row in run for token in row.tokens]
    held, place = np.unique(tokens[real], return_inverse=True)
    pieces = tokenizer.batch_decode([[token] for token in held.tolist()], clean_up_tokenization_spaces=False)
    token_text = np.zeros(real.shape, dtype=np.array(pieces).dtype)
    token_text[real] = np.array(pieces)[place]
    answer_tokens = np.array([clean.answers for clean, _ in kept], dtype=np.int64)
    contrasts = tuple(kept.values())
    continuation = _continuation([clean for clean, _ in kept])
    return Trials(tokens, length, answer_tokens, token_text, contrasts, notes, continuation)


def _continuation(rows: Sequence[_PromptTokens]) -> Int[np.ndarray, "trial answer token"]:
    longest = max(len(tokens) for row in rows for tokens in row.continuation)
    return np.array([[(*tokens, *[-1] * (longest - len(tokens))) for tokens in row.continuation] for row in rows])


def same_tokens(one: Trials, other: Trials) -> bool:
    """Whether both ask the same, token for token."""
    fields = ["tokens", "length", "answer_tokens"]
    if one.continuation is not None and other.continuation is not None:
        fields.append("continuation")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)
