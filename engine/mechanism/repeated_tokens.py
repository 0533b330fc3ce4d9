"""Random tokens and the same ones again: prompts that tell apart heads which attend by order and by repetition.

What a head does there it does whatever the words mean (Olsson et al. 2022, arXiv:2209.11895; Wang et al. 2023,
arXiv:2211.00593, who check their heads on such prompts too).
"""

from collections.abc import Collection
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checkpoints.attention_hook import attending, causal_attention
from ..checkpoints.model import ResidentModel
from ..replay.vocabulary_measures import Vocabulary
from ..runtime.resources import as_many_as_fit
from ..study.role_settings import FEWEST_TOKENS, N_SEQUENCES, N_TOKENS, SEED


@dataclass(frozen=True)
class Sequences:
    """Prompts in which random tokens are repeated, each with a control in which they are not."""

    repeated: Int[np.ndarray, "sequence position"]
    """The start token, where there is one, `half` random tokens, and the same ones again."""

    control: Int[np.ndarray, "sequence position"]
    """The same with other random tokens in place of the repetition."""

    half: int

    @property
    def start(self) -> int:
        """Tokens before the first random one."""
        return int(self.repeated.shape[1]) - 2 * self.half


def draw_sequences(
    known: Int[np.ndarray, " token"], special: Collection[int], start_token: int | None, context: int, seed: int = SEED
) -> Sequences | None:
    """Sequences of `known` tokens that are not `special`, no longer than `context`; None where they would be too short.

    Tokens are drawn evenly, none twice within a half, and none of the first half is in the control's second.
    """
    drawn_from = np.setdiff1d(known, np.array(list(special), dtype=np.int64))
    n_start = 0 if start_token is None else 1
    half = min(N_TOKENS, len(drawn_from) // 2, (context - n_start) // 2)
    if half < FEWEST_TOKENS:
        return None
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(drawn_from, 2 * half, replace=False) for _ in range(N_SEQUENCES)])
    start = np.full((N_SEQUENCES, n_start), -1 if start_token is None else start_token)
    first, other = drawn[:, :half], drawn[:, half:]
    return Sequences(np.hstack([start, first, first]), np.hstack([start, first, other]), half)


@dataclass(frozen=True)
class RepetitionScores:
    """How every head attends in the sequences, and how well the model predicts them."""

    previous: Float[Tensor, "layer head sequence"]
    """Share of attention on the token before, mean over positions."""

    duplicate: Float[Tensor, "layer head sequence"]
    """Of the second half: on the same token in the first."""

    induction: Float[Tensor, "layer head sequence"]
    """Of the second half: on the token after that one."""

    loss_first: Float[Tensor, " sequence"]
    """Mean loss on the random tokens of the first half, in nats."""

    loss_second: Float[Tensor, " sequence"]
    """On those of the second half but its first, which nothing announces."""


def uniform_previous(sequences: Sequences) -> float:
    """The `previous` score of a head that attends to everything it can see alike."""
    return float((1 / (_queries(sequences, 1, 0) + 1)).mean())


def repetition_scores(
    resident: ResidentModel, sequences: Sequences, vocabulary: Vocabulary, memory: int
) -> tuple[RepetitionScores, RepetitionScores]:
    """Of the repeated sequences and of their controls; `memory` is what may be taken, in bytes.

    Raises `UserError` where attention is not plain causal attention over the whole sequence.
    """
    n_positions, shape = sequences.repeated.shape[1], resident.architecture
    # Logits three times in float32, and scores and attention of one layer.
    bytes_each = 4 * n_positions * (3 * shape.n_vocabulary + 2 * shape.n_heads * n_positions + 16 * shape.d_model)
    largest = max(1, min(len(sequences.repeated), memory // (2 * bytes_each)))

    def run(tokens: Int[np.ndarray, "sequence position"]) -> RepetitionScores:
        rows = torch.from_numpy(tokens).to(resident.device)
        parts = as_many_as_fit(
            lambda n: [_forward(resident, sequences, part, vocabulary) for part in torch.split(rows, n)], largest
        )
        names = [field.name for field in fields(RepetitionScores)]
        return RepetitionScores(**{name: torch.cat([getattr(part, name) for part in parts], dim=-1) for name in names})

    return run(sequences.repeated), run(sequences.control)


class _ScoringAttention:
    """An attention mode that keeps, of every layer, the mean attention at fixed distances before the query."""

    def __init__(self, sequences: Sequences, n_layers: int) -> None:
        half, start = sequences.half, sequences.start
        self.longest = sequences.repeated.shape[1]
        self.looked_at = {
            "previous": (1, _queries(sequences, 1, 0)),
            "duplicate": (half, _queries(sequences, half, start + half)),
            "induction": (half - 1, _queries(sequences, half - 1, start + half)),
        }
        """Name -> how far before the query the head should attend, and from which positions."""

        self.scores = {name: [torch.empty(0)] * n_layers for name in self.looked_at}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        pattern = causal_pattern(query, key, scaling)
        for name, (distance, queries) in self.looked_at.items():
            at = torch.from_numpy(queries).to(pattern.device)
            self.scores[name][layer] = pattern[:, :, at, at - distance].mean(-1).T.cpu()
        return causal_attention(query, key, value, scaling)


def causal_pattern(
    query: Float[Tensor, "batch head position head_dim"],
    key: Float[Tensor, "batch kv_head position head_dim"],
    scaling: float,
) -> Float[Tensor, "batch head position position"]:
    """Attention weights from every position to those up to it, in float32 or, for float64 queries, in that."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.to(dtype) @ key.to(dtype).transpose(2, 3) * scaling
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def _queries(sequences: Sequences, distance: int, first: int) -> Int[np.ndarray, " query"]:
    """Positions from `first` on that have one `distance` before them, the prompt's first left out: heads with nothing
    to do attend there."""
    return np.arange(max(first, distance + 1), sequences.repeated.shape[1])


@torch.no_grad()
def _forward(
    resident: ResidentModel, sequences: Sequences, tokens: Int[Tensor, "sequence position"], vocabulary: Vocabulary
) -> RepetitionScores:
    mode = _ScoringAttention(sequences, resident.architecture.n_layers)
    with attending(mode):
        logits = resident.model(tokens, use_cache=False).logits
    log_probs = vocabulary.only_known(logits[:, :-1]).log_softmax(-1)
    loss = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0].cpu()
    first = max(sequences.start, 1) - 1
    second = sequences.start + sequences.half
    return RepetitionScores(
        **{name: torch.stack(by_layer) for name, by_layer in mode.scores.items()},
        loss_first=loss[:, first : second - 1].mean(1),
        loss_second=loss[:, second:].mean(1),
    )
