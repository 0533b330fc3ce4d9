"""Greedy texts of the corrected patch: heads' z at aligned positions of the prompt, and what the model then says.

The prompt is the row that is replayed, which ends in the beginning that both answers share; the patch is in place while
it is read, so that the first token comes from a patched position, and is gone while the model goes on.  A text is that
beginning and what follows.  It succeeds when it begins with the right answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..checkpoints.model import ResidentModel
from ..runtime.errors import UserError, VerificationError
from ..store.store import Answers
from ..study.alignment import Alignment
from ..study.patch_settings import Direction
from ..study.prompts import Trials, spell
from ..study.study import RUNS
from ..study.tasks.contrast import Tokenizer
from .greedy_decoding import Texts, Tokens, generate_once, generate_patched, row_of, stock_generate
from .patch_inputs import Site, source_and_target
from .reference import choose_pairs

MOST_TEXTS = 4096
"""Patched runs of one checkpoint, at most, whose texts are generated: a text costs a hundred replayed runs."""

VERIFIED = 2
"""Texts generated again by definition at every checkpoint."""


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
    """Raises `UserError` for more texts than `MOST_TEXTS`, or a number of tokens that is none."""
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
) -> Answers:
    """`n_tokens` greedy tokens of every patched run and of both unpatched ones.

    Raises `VerificationError` where one of a few that are generated again by definition is another.
    """
    rows = _prompts(trials)
    plain = [PatchedGeneration(rows[run][trial]) for run in range(len(RUNS)) for trial in range(trials.n_trials)]
    patched = list(_grafts(rows, alignment, direction, sites, mask))
    grafts = plain + patched
    texts = _generated(resident, grafts, n_tokens)
    for place, _ in choose_pairs(label, [(index,) for index in range(len(grafts))], 1, VERIFIED):
        _require_same(resident, grafts[place], texts.tokens[place], n_tokens, label)

    shape = (len(sites), len(mask), trials.n_trials)
    target = source_and_target(direction)[1]
    of_plain = [(run, trial) for run in range(len(RUNS)) for trial in range(trials.n_trials)]
    of_patched = [(target, trial) for _ in range(shape[0] * shape[1]) for trial in range(trials.n_trials)]
    said = _Reading(tokenizer, trials)
    read = [said.text(*where, made) for where, made in zip(of_plain + of_patched, texts.tokens, strict=True)]
    right = [said.succeeds(*where, text) for where, text in zip(of_plain + of_patched, read, strict=True)]
    token = np.full((len(patched), n_tokens), -1, dtype=np.int32)
    for row, made in zip(token, texts.tokens[len(plain) :], strict=True):
        row[: len(made)] = made
    by_run = (len(RUNS), trials.n_trials)
    return Answers(
        text=np.array(read[len(plain) :], dtype=object).reshape(shape),
        token=token.reshape(*shape, n_tokens),
        success=np.array(right[len(plain) :]).reshape(shape),
        plain_text=np.array(read[: len(plain)], dtype=object).reshape(by_run),
        plain_success=np.array(right[: len(plain)]).reshape(by_run),
        n_near=texts.n_near,
    )


def begins_with(text: str, right: str, wrong: str) -> bool:
    """Whether the text begins with the right answer, white space before it aside.

    A number must end where the right one does (9.85 is not 9.8); where the wrong answer goes on from the right one, the
    text must not begin with that.
    """
    said, right, wrong = text.lstrip(), right.strip(), wrong.strip()
    is_longer = right[-1:].isdigit() and said[len(right) : len(right) + 1].isdigit()
    return said.startswith(right) and not is_longer and not (wrong.startswith(right) and said.startswith(wrong))


class _Reading:
    """Tokens after a run's prompt as text, and whether they say the right answer, as this tokenizer spells it."""

    def __init__(self, tokenizer: Tokenizer, trials: Trials) -> None:
        self._tokenizer = tokenizer
        self._spelling = [
            [spell(contrast, getattr(contrast, run), tokenizer) for contrast in trials.contrasts] for run in RUNS
        ]

    def text(self, run: int, trial: int, made: Sequence[int]) -> str:
        return self._decode([*self._spelling[run][trial].shared, *made])

    def succeeds(self, run: int, trial: int, text: str) -> bool:
        spelling = self._spelling[run][trial]
        return begins_with(text, self._decode(spelling.right), self._decode(spelling.wrong))

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _prompts(trials: Trials) -> list[list[Tokens]]:
    """The rows that are run, without padding, by run and trial."""
    return [
        [tuple(row[:length].tolist()) for row, length in zip(trials.tokens[run], trials.length[run], strict=True)]
        for run in range(len(RUNS))
    ]


def _grafts(
    rows: Sequence[Sequence[Tokens]],
    alignment: Alignment,
    direction: Direction,
    sites: Sequence[Site],
    mask: Bool[np.ndarray, "subset head"],
) -> Iterator[PatchedGeneration]:
    """In order of site, subset and trial."""
    source, target = source_and_target(direction)
    for site in sites:
        for heads in mask:
            for trial, is_real in enumerate(alignment.valid):
                into, out_of = (tuple(alignment.positions[run, trial][is_real].tolist()) for run in (target, source))
                yield PatchedGeneration(
                    rows[target][trial], rows[source][trial], site, tuple(heads.tolist()), into, out_of
                )


def _generated(resident: ResidentModel, grafts: Sequence[PatchedGeneration], n_tokens: int) -> Texts:
    """Every text; where nothing is patched, one for all layers."""
    keys = [graft if any(graft.heads) else PatchedGeneration(graft.target) for graft in grafts]
    return generate_once(resident, keys, lambda some, most: generate_grafted(resident, some, n_tokens, most))


@torch.inference_mode()
def generate_grafted(resident: ResidentModel, grafts: Sequence[PatchedGeneration], n_tokens: int, most: int) -> Texts:
    """`n_tokens` greedy tokens for every graft, `most` of them side by side: those that `reference_generate` gives."""
    return generate_patched(
        resident,
        [graft.target for graft in grafts],
        lambda batch: _grafting(resident, [grafts[index] for index in batch]),
        lambda index: reference_generate(resident, grafts[index], n_tokens),
        n_tokens,
        most,
    )


@torch.inference_mode()
def reference_generate(resident: ResidentModel, graft: PatchedGeneration, n_tokens: int) -> list[int]:
    """The same as anyone would write it: transformers' own `generate`, one prompt, hooks that act on the prompt."""
    read: set[int] = set()
    with resident.stock("default"), ExitStack() as stack:
        z = _source_z(resident, graft.source, graft.site)

        def patch(layer: int):
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                if layer in read:  # the prompt has been read: the model goes on
                    return None
                read.add(layer)
                found = args[0].clone().unflatten(-1, (len(graft.heads), -1))
                for into, out_of in zip(graft.into, graft.out_of, strict=True):
                    for head in np.flatnonzero(graft.heads):
                        found[0, into, head] = z[layer][out_of, head]
                return (found.flatten(-2), *args[1:])

            return hook

        for layer in graft.site:
            stack.callback(_projection(resident, layer).register_forward_pre_hook(patch(layer)).remove)
        return stock_generate(resident, graft.target, n_tokens)


def _require_same(
    resident: ResidentModel, graft: PatchedGeneration, made: list[int], n_tokens: int, label: str
) -> None:
    again = reference_generate(resident, graft, n_tokens)
    if again != made:
        raise VerificationError(
            f"{label}: in a batch the tokens are {made}, by transformers' own generate {again}; headlapse does not "
            "compute this architecture rightly"
        )


@contextmanager
def _grafting(resident: ResidentModel, grafts: Sequence[PatchedGeneration]) -> Iterator[None]:
    """At the body's first forward, which reads the prompts, every graft's heads take their z from its source."""
    by_layer: dict[int, list[int]] = {}
    for row, graft in enumerate(grafts):
        for layer in graft.site if any(graft.heads) else ():
            by_layer.setdefault(layer, []).append(row)
    sources: dict[Tokens, set[int]] = {}
    for layer, rows in by_layer.items():
        for row in rows:
            sources.setdefault(grafts[row].source, set()).add(layer)
    z = {source: _source_z(resident, source, sorted(layers)) for source, layers in sources.items()}
    with ExitStack() as stack:
        for layer, rows in by_layer.items():
            hook = _PromptOnlyHook(
                resident, rows, [grafts[row] for row in rows], [z[grafts[row].source][layer] for row in rows]
            )
            stack.callback(_projection(resident, layer).register_forward_pre_hook(hook).remove)
        yield


class _PromptOnlyHook:
    """The hook of one layer on the rows of a batch that are patched there; it acts once."""

    def __init__(
        self, resident: ResidentModel, rows: Sequence[int], grafts: Sequence[PatchedGeneration], z: Sequence[Tensor]
    ) -> None:
        device = resident.device
        self.is_over = False
        places = [(row, into, graft.heads) for row, graft in zip(rows, grafts, strict=True) for into in graft.into]
        self.row, self.into, self.heads = (torch.tensor(column, device=device) for column in zip(*places, strict=True))
        self.source = torch.cat([one[list(graft.out_of)] for one, graft in zip(z, grafts, strict=True)])

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.is_over:
            return None
        self.is_over = True
        z = args[0].clone().unflatten(-1, (self.heads.shape[1], -1))
        z[self.row, self.into] = torch.where(self.heads[..., None], self.source, z[self.row, self.into])
        return (z.flatten(-2), *args[1:])


def _source_z(
    resident: ResidentModel, source: Tokens, layers: Sequence[int]
) -> dict[int, Float[Tensor, "position head head_dim"]]:
    """z of one prompt, run by itself."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            kept[layer] = args[0][0].unflatten(-1, (resident.architecture.n_heads, -1))

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_projection(resident, layer).register_forward_pre_hook(keep(layer)).remove)
        if layers:
            resident.model(row_of(resident, source), use_cache=False, logits_to_keep=1)
    return kept


def _projection(resident: ResidentModel, layer: int) -> nn.Module:
    return resident.model.get_submodule(resident.architecture.out_proj[layer])
