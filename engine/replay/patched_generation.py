"""Greedy texts of the corrected patch: heads' z at aligned positions of the prompt, and how the model then goes on.

The prompt is the token row that is replayed, which ends in the beginning that both answers share; the patch is in place
while it is read, so that the first token comes from a patched position, and is gone while the model goes on.  A text is
that beginning and what follows.  It succeeds when it begins with the right answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..checkpoints.hooks import collect_inputs, replace_inputs
from ..checkpoints.model import ResidentModel
from ..runtime.errors import UserError
from ..store.patched_run import Answers
from ..study.alignment import Alignment
from ..study.patch_settings import Direction
from ..study.prompts import Trials, spell
from ..study.study import RUNS
from ..study.tasks.contrast import Tokenizer
from .greedy_decoding import (
    GeneratedTexts,
    Tokens,
    generate_batched,
    generate_distinct,
    one_row,
    padded,
    require_same_text,
    stock_generate,
)
from .patch_inputs import Site, source_and_target
from .reference import choose_pairs

MOST_TEXTS = 4096
"""Patched runs of one checkpoint, at most, whose texts are generated: a text costs a hundred replayed runs."""

VERIFIED_TEXTS = 2
"""Texts generated again by the reference at every checkpoint."""


@dataclass(frozen=True)
class PatchedGeneration:
    """One text to generate: heads take their z from one prompt, where another prompt is read."""

    target: Tokens
    source: Tokens = ()
    site: Site = ()
    heads: tuple[bool, ...] = ()

    into: tuple[int, ...] = ()
    """Positions of the target prompt."""

    out_of: tuple[int, ...] = ()
    """Positions of the source prompt, one for each of them."""


def refuse_too_many(n_tokens: int, n_sites: int, n_subsets: int, n_trials: int) -> None:
    """Raises `UserError` for more texts than `MOST_TEXTS`, or a negative number of tokens."""
    if n_tokens < 0:
        raise UserError(f"--generate {n_tokens}: give a number of tokens, e.g. 20")
    n_texts = n_sites * n_subsets * n_trials
    if n_tokens and n_texts > MOST_TEXTS:
        raise UserError(
            f"--generate {n_tokens}: {n_sites:,} layers x {n_subsets:,} subsets x {n_trials:,} prompts are "
            f"{n_texts:,} texts a checkpoint, more than {MOST_TEXTS:,}; name fewer --subsets or --layers, "
            "or leave --generate out"
        )


def answers(
    resident: ResidentModel,
    tokenizer: Tokenizer,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
    n_tokens: int,
    label: str,
    seed: int = 0,
) -> Answers:
    """`n_tokens` greedy tokens of every patched run and of both unpatched ones.

    Raises `VerificationError` where one of the few that the reference generates again, chosen by `seed`, is another.
    """
    prompts = _prompts(trials)
    run_and_trial = [(run, trial) for run in range(len(RUNS)) for trial in range(trials.n_trials)]
    unpatched = [PatchedGeneration(prompts[run][trial]) for run, trial in run_and_trial]
    patched = list(_patched_generations(prompts, alignment, direction, sites, mask))
    generations = unpatched + patched
    texts = _generate_all(resident, generations, n_tokens)
    for place, _ in choose_pairs(label, [(index,) for index in range(len(generations))], 1, VERIFIED_TEXTS, seed):
        require_same_text(texts.tokens[place], reference_generate(resident, generations[place], n_tokens), label)

    target = source_and_target(direction)[1]
    run_and_trial += len(sites) * len(mask) * [(target, trial) for trial in range(trials.n_trials)]
    decoder = _AnswerDecoder(tokenizer, trials)
    decoded = [decoder.text(*where, tokens) for where, tokens in zip(run_and_trial, texts.tokens, strict=True)]
    succeeded = [decoder.succeeds(*where, text) for where, text in zip(run_and_trial, decoded, strict=True)]
    first, shape, by_run = len(unpatched), (len(sites), len(mask), trials.n_trials), (len(RUNS), trials.n_trials)
    return Answers(
        text=np.array(decoded[first:], dtype=object).reshape(shape),
        token=padded(texts.tokens[first:], n_tokens).reshape(*shape, n_tokens),
        success=np.array(succeeded[first:]).reshape(shape),
        plain_text=np.array(decoded[:first], dtype=object).reshape(by_run),
        plain_success=np.array(succeeded[:first]).reshape(by_run),
        n_near=texts.n_near,
    )


def begins_with(text: str, right: str, wrong: str) -> bool:
    """Whether the text begins with the right answer, white space before it aside.

    A number must end where the right one does (9.85 is not 9.8); where the wrong answer goes on from the right one, the
    text must not begin with that.
    """
    text, right, wrong = text.lstrip(), right.strip(), wrong.strip()
    is_longer = right[-1:].isdigit() and text[len(right) : len(right) + 1].isdigit()
    return text.startswith(right) and not is_longer and not (wrong.startswith(right) and text.startswith(wrong))


class _AnswerDecoder:
    """Tokens after a run's prompt as text, and whether they give the right answer, as this tokenizer spells it."""

    def __init__(self, tokenizer: Tokenizer, trials: Trials) -> None:
        self._tokenizer = tokenizer
        self._spelling = [
            [spell(contrast, getattr(contrast, run), tokenizer) for contrast in trials.contrasts] for run in RUNS
        ]

    def text(self, run: int, trial: int, tokens: Sequence[int]) -> str:
        return self._decode([*self._spelling[run][trial].shared, *tokens])

    def succeeds(self, run: int, trial: int, text: str) -> bool:
        spelling = self._spelling[run][trial]
        return begins_with(text, self._decode(spelling.right), self._decode(spelling.wrong))

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _prompts(trials: Trials) -> list[list[Tokens]]:
    """The token rows that are run, without padding, by run and trial."""
    return [
        [tuple(row[:length].tolist()) for row, length in zip(trials.tokens[run], trials.length[run], strict=True)]
        for run in range(len(RUNS))
    ]


def _patched_generations(
    prompts: Sequence[Sequence[Tokens]],
    alignment: Alignment,
    direction: Direction,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
) -> Iterator[PatchedGeneration]:
    """In order of site, subset and trial."""
    source, target = source_and_target(direction)
    for site in sites:
        for heads in mask:
            for trial, is_valid in enumerate(alignment.valid):
                into, out_of = (tuple(alignment.positions[run, trial][is_valid].tolist()) for run in (target, source))
                yield PatchedGeneration(
                    prompts[target][trial], prompts[source][trial], site, tuple(heads.tolist()), into, out_of
                )


def _generate_all(resident: ResidentModel, generations: Sequence[PatchedGeneration], n_tokens: int) -> GeneratedTexts:
    """Every text; where nothing is patched, one for all layers."""
    keys = [generation if any(generation.heads) else PatchedGeneration(generation.target) for generation in generations]
    return generate_distinct(
        resident, keys, lambda distinct, batch_size: generate_patched(resident, distinct, n_tokens, batch_size)
    )


@torch.inference_mode()
def generate_patched(
    resident: ResidentModel, generations: Sequence[PatchedGeneration], n_tokens: int, batch_size: int
) -> GeneratedTexts:
    """`n_tokens` greedy tokens of every patched run, `batch_size` of them side by side.

    Token for token what `reference_generate` gives.  Raises `UserError` beyond the model's context.
    """
    return generate_batched(
        resident,
        [generation.target for generation in generations],
        lambda batch: _patching_prompts(resident, [generations[index] for index in batch]),
        lambda index: reference_generate(resident, generations[index], n_tokens),
        n_tokens,
        batch_size,
    )


@torch.inference_mode()
def reference_generate(resident: ResidentModel, generation: PatchedGeneration, n_tokens: int) -> list[int]:
    """The same as anyone would write it: transformers' own `generate`, one prompt, hooks that act on the prompt."""
    patched: set[int] = set()
    with resident.stock("default"):
        source_z = _source_z(resident, generation.source, generation.site)

        def patch(layer: int, projected: Tensor) -> Tensor | None:
            if layer in patched:  # the prompt has been read: the model goes on
                return None
            patched.add(layer)
            z = torch.unflatten(projected.clone(), -1, (len(generation.heads), -1))
            for into, out_of in zip(generation.into, generation.out_of, strict=True):
                for head in np.flatnonzero(generation.heads):
                    z[0, into, head] = source_z[layer][out_of, head]
            return z.flatten(-2)

        with replace_inputs(resident.output_projections(generation.site), patch):
            return stock_generate(resident, generation.target, n_tokens)


@contextmanager
def _patching_prompts(resident: ResidentModel, generations: Sequence[PatchedGeneration]) -> Iterator[None]:
    """At the model's first forward, which reads the prompts, every patched head takes its z from its source prompt."""
    rows: dict[int, list[int]] = {}
    for row, generation in enumerate(generations):
        for layer in generation.site if any(generation.heads) else ():
            rows.setdefault(layer, []).append(row)
    layers: dict[Tokens, set[int]] = {}
    for layer, layer_rows in rows.items():
        for row in layer_rows:
            layers.setdefault(generations[row].source, set()).add(layer)
    z = {source: _source_z(resident, source, sorted(layers[source])) for source in layers}
    hooks = {layer: _PromptOnlyHook(resident, layer, rows[layer], generations, z) for layer in rows}
    with replace_inputs(resident.output_projections(rows), lambda layer, projected: hooks[layer](projected)):
        yield


class _PromptOnlyHook:
    """The hook of one layer on the rows of a batch that are patched there; it acts once."""

    def __init__(
        self,
        resident: ResidentModel,
        layer: int,
        rows: Sequence[int],
        generations: Sequence[PatchedGeneration],
        z: dict[Tokens, dict[int, Tensor]],
    ) -> None:
        self.is_over = False
        places = [(row, into, generations[row].heads) for row in rows for into in generations[row].into]
        columns = zip(*places, strict=True)
        self.row, self.into, self.heads = (torch.tensor(column, device=resident.device) for column in columns)
        self.source = torch.cat([z[generations[row].source][layer][list(generations[row].out_of)] for row in rows])

    def __call__(self, projected: Tensor) -> Tensor | None:
        if self.is_over:
            return None
        self.is_over = True
        z = torch.unflatten(projected.clone(), -1, (self.heads.shape[1], -1))
        z[self.row, self.into] = torch.where(self.heads[..., None], self.source, z[self.row, self.into])
        return z.flatten(-2)


def _source_z(
    resident: ResidentModel, source: Tokens, layers: Sequence[int]
) -> dict[int, Float[Tensor, "position head head_dim"]]:
    """z of one prompt, run by itself."""
    if not layers:
        return {}
    with collect_inputs(resident.output_projections(layers)) as projected:
        resident.model(one_row(resident, source), use_cache=False, logits_to_keep=1)
    n_heads = resident.architecture.n_heads
    return {layer: torch.unflatten(projected[layer][0], -1, (n_heads, -1)) for layer in layers}
