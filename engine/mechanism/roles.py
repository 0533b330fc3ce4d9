"""What each head is known to do, scored by the field's definitions: the roles of `ROLES`, each beside its null.

On random tokens that are repeated (`repeated_tokens`):
  previous token   mean attention on the token before; null: of a head that attends evenly (Olsson et al. 2022)
  duplicate token  mean attention, from a token's second occurrence, on the first (Wang et al. 2023)
  induction        ... on the token after the first: prefix matching (Olsson et al. 2022); the null of both is the same
                   head's attention at the same distance where nothing is repeated
From the weights:
  successor        share of days, months, numbers, letters of which the head writes the next (Gould et al. 2023); null:
                   the words of each order shuffled
  copying          share of positive eigenvalues of the full OV circuit (Elhage et al. 2021); null: tokens shuffled
In the task's own prompts, from their last position:
  name mover       attention on the answer's mention, times how often the head copies such words (Wang et al. 2023);
                   null: the same with the attention on that word in the corrupt prompt, where it is not the answer
  S-inhibition     attention on the second mention of the wrong answer (Wang et al. 2023); null: the most of what its
                   first mention, the answer's or an even share get
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ..checkpoints.model import ResidentModel
from ..replay.layers import LayerRunner
from ..replay.vocabulary_measures import Vocabulary, known_tokens
from ..runtime.errors import UserError
from ..study.prompts import Trials
from ..study.role_settings import FEWEST_TOKENS, N_SEQUENCES, ROLES, SEED, SHUFFLES, Role
from ..study.study import RUNS
from .answer_attention import CLEAN, Mentions, Pattern, to_answer, to_second_mention
from .attention import attention
from .head_writing import HeadWriter, among_top, in_prompts
from .ov_copying import OVCopying
from .repeated_tokens import draw_sequences, repetition_scores, uniform_previous
from .role_tests import paired_p_values, shuffled_p_values
from .successor import FEWEST_PAIRS, SuccessorScores, shuffled_words, succession, successor_score

MOST_MENTIONS = 16
"""Distinct words at most whose copying is tried: each takes a product with the whole vocabulary, for every head."""

FEWEST_TRIALS = 2
"""Prompt pairs at least that mention the answers: one alone tells nothing from chance."""

ByHead = Float[np.ndarray, "layer head"]


@dataclass(frozen=True)
class Scored:
    """One role of every head."""

    score: ByHead
    null: ByHead
    """The same head's score where what the role goes by is taken away."""

    p: ByHead
    """Of a score above its null, adjusted over the heads."""


@dataclass(frozen=True)
class RoleScores:
    """The roles of one checkpoint."""

    scored: Mapping[Role, Scored]

    problems: Mapping[Role, str]
    """Why a role could not be scored."""

    name_copying: ByHead
    """Copying score of the answers' words minus the negative one, -1 to 1; NaN where prompts do not mention them."""

    loss_first: Float[np.ndarray, " sequence"]
    loss_second: Float[np.ndarray, " sequence"]
    """Mean loss on random tokens and on their repetition, in nats; NaN without sequences."""

    drawn: Mapping[str, int]
    """What was drawn: seed, sequences and tokens in each before the repetition."""

    def arrays(self) -> dict[str, np.ndarray]:
        """As the store keeps them: array name -> values."""
        absent = np.full(self.name_copying.shape, np.nan)
        values: dict[str, np.ndarray] = {
            f"role_{field}": np.stack(
                [getattr(self.scored[role], field) if role in self.scored else absent for role in ROLES], axis=-1
            )
            for field in ("score", "null", "p")
        }
        problems = np.array([self.problems.get(role, "") for role in ROLES], dtype=object)
        return values | {
            "role_problem": problems,
            "name_copying": self.name_copying,
            "loss_first": self.loss_first,
            "loss_second": self.loss_second,
        }


@dataclass(frozen=True)
class RoleInputs:
    """What roles are scored with."""

    resident: ResidentModel
    tokenizer: Any
    trials: Trials
    runners: Mapping[str, LayerRunner]
    """Run -> its runner, at the read position."""

    layers: range
    memory: int
    """Bytes that may be taken."""


def score_roles(inputs: RoleInputs) -> RoleScores:
    """Every role of every head.  What an architecture, tokenizer or task does not allow is a problem of its role."""
    known = known_tokens(inputs.tokenizer)
    known = known[known < inputs.resident.architecture.n_vocabulary]
    vocabulary = Vocabulary.prepare(inputs.resident, known, inputs.memory)
    n_sequences = np.full(N_SEQUENCES, np.nan)
    shape = len(inputs.layers), inputs.resident.architecture.n_heads
    kept: dict[str, Any] = {
        "name_copying": np.full(shape, np.nan), "loss_first": n_sequences, "loss_second": n_sequences,
        "drawn": {"seed": SEED},
    }  # fmt: skip
    scored: dict[Role, Scored] = {}
    problems: dict[Role, str] = {}
    for roles, score in _GROUPS.items():
        try:
            some, further = score(inputs, vocabulary, known)
        except UserError as error:
            problems |= dict.fromkeys(roles, str(error))
            continue
        scored |= some
        kept |= further
    return RoleScores(scored, problems, **kept)


Group = Callable[[RoleInputs, Vocabulary, Int[np.ndarray, " token"]], tuple[dict[Role, Scored], dict[str, Any]]]
"""Scores of some roles, and fields of `RoleScores` besides."""


def _by_repetition(
    inputs: RoleInputs, vocabulary: Vocabulary, known: Int[np.ndarray, " token"]
) -> tuple[dict[Role, Scored], dict[str, Any]]:
    tokenizer, architecture = inputs.tokenizer, inputs.resident.architecture
    sequences = draw_sequences(known, tokenizer.all_special_ids, tokenizer.bos_token_id, architecture.context)
    if sequences is None:
        raise UserError(
            f"{len(known)} tokens and a context of {architecture.context} do not take {FEWEST_TOKENS} tokens twice"
        )
    repeated, control = repetition_scores(inputs.resident, sequences, vocabulary, inputs.memory)

    def of(name: str, null: Float[np.ndarray, "layer head sequence"] | None) -> Scored:
        score = getattr(repeated, name)[inputs.layers.start :].numpy().astype(float)
        return _paired(score, np.full(score.shape, uniform_previous(sequences)) if null is None else null)

    def unrepeated(name: str) -> Float[np.ndarray, "layer head sequence"]:
        values: Float[np.ndarray, "layer head sequence"] = getattr(control, name)[inputs.layers.start :].numpy()
        return values.astype(float)

    scored: dict[Role, Scored] = {
        "previous token": of("previous", None),
        "duplicate token": of("duplicate", unrepeated("duplicate")),
        "induction": of("induction", unrepeated("induction")),
    }
    losses = {"loss_first": repeated.loss_first.numpy(), "loss_second": repeated.loss_second.numpy()}
    return scored, losses | {"drawn": {"seed": SEED, "sequences": N_SEQUENCES, "tokens": sequences.half}}


def _paired(score: Float[np.ndarray, "layer head unit"], null: Float[np.ndarray, "layer head unit"]) -> Scored:
    return Scored(score.mean(-1), null.mean(-1), paired_p_values(score - null))


def _successor(
    inputs: RoleInputs, _vocabulary: Vocabulary, _known: Int[np.ndarray, " token"]
) -> tuple[dict[Role, Scored], dict[str, Any]]:
    words = succession(inputs.tokenizer)
    if len(words.pairs) < FEWEST_PAIRS:
        raise UserError(
            f"the tokenizer holds {len(words.pairs)} pairs of successive days, months, numbers or letters as single "
            f"tokens, {FEWEST_PAIRS} are needed"
        )
    scores, rng = SuccessorScores(inputs.resident, words), np.random.default_rng(SEED)
    labels = [None, *(shuffled_words(words, rng) for _ in range(SHUFFLES))]
    written = [scores.written_most(layer) for layer in inputs.layers]
    by_label = np.stack([[successor_score(layer, words, label) for layer in written] for label in labels])
    return {"successor": _shuffled(by_label)}, {}


def _copying(
    inputs: RoleInputs, _vocabulary: Vocabulary, known: Int[np.ndarray, " token"]
) -> tuple[dict[Role, Scored], dict[str, Any]]:
    copying = OVCopying(inputs.resident, known, SEED, SHUFFLES)
    return {"copying": _shuffled(np.stack([copying.scores(layer) for layer in inputs.layers], axis=1))}, {}


def _shuffled(by_label: Float[np.ndarray, "labels layer head"]) -> Scored:
    """Of scores by the true labels, which come first, and by shuffled ones."""
    score, shuffled = by_label[0], by_label[1:]
    return Scored(score, shuffled.mean(0), shuffled_p_values(score, shuffled))


def _by_answers(
    inputs: RoleInputs, vocabulary: Vocabulary, _known: Int[np.ndarray, " token"]
) -> tuple[dict[Role, Scored], dict[str, Any]]:
    mentions = Mentions.of(inputs.trials)
    if mentions.has_answer.sum() < FEWEST_TRIALS:
        raise UserError("the task's prompts do not mention their answers")
    copying = _name_copying(inputs, mentions, vocabulary)
    clean, corrupt = (np.stack(values, axis=1) for values in _each_layer(inputs, mentions, to_answer))
    by_trial = [np.moveaxis(values, 0, -1) * copying[..., None] for values in (clean, corrupt)]
    return {"name mover": _paired(by_trial[0], by_trial[1])}, {"name_copying": copying}


def _by_second_mention(
    inputs: RoleInputs, _vocabulary: Vocabulary, _known: Int[np.ndarray, " token"]
) -> tuple[dict[Role, Scored], dict[str, Any]]:
    mentions = Mentions.of(inputs.trials)
    if mentions.has_duplicate.sum() < FEWEST_TRIALS:
        raise UserError("the task's prompts do not mention their wrong answer twice")
    second, others = (np.stack(values, axis=1) for values in _each_layer(inputs, mentions, to_second_mention))
    return {"S-inhibition": _paired(np.moveaxis(second, 0, -1), np.moveaxis(others, 0, -1))}, {}


Attended = Callable[[Pattern, Mentions, Int[np.ndarray, "run trial"]], tuple[np.ndarray, np.ndarray]]


def _each_layer(
    inputs: RoleInputs, mentions: Mentions, attended: Attended
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What `attended` makes of the attention of every layer: a list of each of its two results."""
    by_layer = []
    for layer in inputs.layers:
        pattern = torch.stack([attention(inputs.runners[run], layer) for run in RUNS]).double().cpu().numpy()
        by_layer.append(attended(pattern, mentions, inputs.trials.length))
    first, second = zip(*by_layer, strict=True)
    return list(first), list(second)


def _name_copying(inputs: RoleInputs, mentions: Mentions, vocabulary: Vocabulary) -> ByHead:
    """Of the answers' words where the clean prompts first mention them, each word once."""
    tokens = inputs.trials.tokens[CLEAN]
    places = {
        int(tokens[trial, at]): (trial, at)
        for trial in np.flatnonzero(mentions.has_answer)
        for at in (mentions.answer[CLEAN][trial], mentions.wrong[trial])
    }
    words = list(places)[:MOST_MENTIONS]
    device = inputs.resident.device
    at = torch.tensor([places[word] for word in words], device=device)
    writer = HeadWriter(inputs.resident, in_prompts(inputs.resident, torch.from_numpy(tokens).to(device), at))
    asked = torch.tensor(words, device=device)
    by_layer = [among_top(writer, layer, asked, vocabulary) for layer in inputs.layers]
    return np.stack([np.diagonal(hits, axis1=1, axis2=2).mean(-1) for hits in by_layer])


_GROUPS: dict[tuple[Role, ...], Group] = {
    ("previous token", "duplicate token", "induction"): _by_repetition,
    ("successor",): _successor,
    ("copying",): _copying,
    ("name mover",): _by_answers,
    ("S-inhibition",): _by_second_mention,
}
