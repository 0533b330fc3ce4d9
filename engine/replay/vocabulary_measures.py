"""Measures beside the logit difference: of patched runs, of unpatched ones and of full hooked forwards.

Probability, rank and divergence answer other questions than the logit difference, and can answer them otherwise (Zhang
and Nanda 2023, arXiv:2309.16042): a probability also moves when tokens that are neither answer do, and saturates; a
rank sees only order.

They need the whole unembedding and not two rows of it, multiplied for a block of rows at a time: exact, at the cost of
that product.  Rows that belong to no token of the tokenizer were never trained; they are left out of softmax, rank and
divergence alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..capture.forward import capture
from ..checkpoints.model import ResidentModel
from ..store.activations import Activations
from ..study.alignment import Alignment
from ..study.answers import answer, continued, lengthened
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from ..study.study import RUNS, Measure
from .additive_layers import layer_output
from .layers import LayerRunner, Resid
from .patch_inputs import PatchInputs, Site
from .reference import hooked, stock_logits
from .replay import Reading, replay_reading, runs_at_once

BLOCK = {"cpu": 2**28, "cuda": 2**32}
"""Bytes that a block of rows of the whole vocabulary takes, by kind of device."""

BELOW = -1e30
"""A logit that has probability 0.  Finite: where both of two runs have it, their difference must not be NaN."""

RIGHT, WRONG = 0, 1

Patches = Sequence[tuple[Site, Bool[np.ndarray, " head"]]]


def log_probability(logits: Float[Tensor, "*run vocab"], token: Int[Tensor, "*run"]) -> Float[Tensor, "*run"]:
    """Log-probability of a token under the softmax, in nats.

    Its exponential is the probability metric of Zhang and Nanda 2023, arXiv:2309.16042; its sum over an answer's tokens
    is the log-probability of the answer.
    """
    return logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)


def rank(logits: Float[Tensor, "*run vocab"], token: Int[Tensor, "*run"]) -> Float[Tensor, "*run"]:
    """How many tokens come before a token, 0 where none does.

    Tokens that tie with it come before it half of the time: the mean of the places they share, as ranks are averaged in
    statistics (Kendall 1945, Biometrika 33).
    """
    own = logits.gather(-1, token[..., None])
    above, tied = ((logits > own).sum(-1), (logits == own).sum(-1) - 1)
    return (above + tied / 2).to(logits.dtype)


def kl(clean: Float[Tensor, "*#run vocab"], patched: Float[Tensor, "*#run vocab"]) -> Float[Tensor, "*#run"]:
    """Kullback-Leibler divergence of the patched run from the clean one, in nats, both as log-probabilities.

    Sum of p_clean (log p_clean - log p_patched): Kullback and Leibler 1951, Ann. Math. Statist. 22; as a metric of
    patching Conmy et al. 2023, arXiv:2304.14997, and Zhang and Nanda 2023, arXiv:2309.16042.
    """
    return ((clean - patched) * clean.exp()).sum(-1)


def known_tokens(tokenizer: Any) -> Int[np.ndarray, " token"]:
    """Every token that the tokenizer has."""
    return np.unique(list(tokenizer.get_vocab().values()))


@dataclass(frozen=True)
class Vocabulary:
    """The logits of all tokens, for a block of rows at a time."""

    resident: ResidentModel

    unknown: Int[Tensor, " token"]
    """Rows of the unembedding that belong to no token."""

    block_rows: int
    """Rows whose logits are computed at once."""

    @classmethod
    def prepare(cls, resident: ResidentModel, known: Int[np.ndarray, " token"], memory: int) -> "Vocabulary":
        """Blocks that take at most a quarter of `memory` (bytes)."""
        model: Any = resident.model
        weight = model.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        unknown = torch.from_numpy(np.setdiff1d(np.arange(len(weight)), known)).to(resident.device)
        # The logits as they come, and three times in float32: converted, normalised and compared.
        bytes_per_row = len(weight) * (resident.dtype.itemsize + 3 * 4)
        block = min(BLOCK.get(torch.device(resident.device).type, BLOCK["cpu"]), memory // 4)
        return cls(resident, unknown, max(1, block // bytes_per_row))

    def only_known(self, logits: Float[Tensor, "*run vocab"]) -> Float[Tensor, "*run vocab"]:
        """In float32, without the rows that belong to no token.  Logits in float32 are changed in place."""
        return logits.float().index_fill_(-1, self.unknown, BELOW)

    def blocks(
        self, resid: Float[Tensor, "trial run d_model"]
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "some_trial some_run vocab"]]]:
        """Block by block, which trials and runs it holds, and the logits of their residual streams."""
        n_trials, n_runs, _ = resid.shape
        by_trial = min(n_trials, self.block_rows)
        by_run = max(1, self.block_rows // by_trial)
        for trial in range(0, n_trials, by_trial):
            for run in range(0, n_runs, by_run):
                trials, runs = slice(trial, trial + by_trial), slice(run, run + by_run)
                yield trials, runs, self.only_known(self.resident.logits(resid[trials, runs]))


def compute_measures(
    measures: Sequence[Measure],
    logits: Float[Tensor, "trial run vocab"],
    right: Int[Tensor, " trial"],
    clean: Float[Tensor, "trial vocab"] | None,
) -> Float[Tensor, "measure trial run"]:
    """The measures of one position; `clean` is the clean run's log-probabilities there, which the divergence needs."""
    token = right[:, None].expand(logits.shape[:-1])
    values = {}
    if "probability" in measures:
        values["probability"] = log_probability(logits, token).exp()
    if "rank" in measures:
        values["rank"] = rank(logits, token)
    if "kl" in measures:
        assert clean is not None
        values["kl"] = kl(clean[:, None], logits.log_softmax(-1))
    return torch.stack([values[name] for name in measures])


@dataclass(frozen=True)
class AnswerContinuation:
    """Prompts with an answer appended, to be scored token by token."""

    inputs: PatchInputs
    reverse: PatchInputs
    """The same with source and target exchanged."""

    tokens: Int[Tensor, "trial token"]
    """The answer from the first token where the answers differ on, padded with -1."""


@dataclass(frozen=True)
class VocabularyMeasures:
    """Computes some measures, and the logit difference with them, at one checkpoint."""

    vocabulary: Vocabulary
    inputs: PatchInputs
    reverse: PatchInputs
    """The same with source and target exchanged."""

    measures: tuple[Measure, ...]
    """Those of one position."""

    sequence: bool
    """Whether the whole answers are scored besides."""

    continuations: tuple[AnswerContinuation, ...]
    """Right and wrong; empty where answers are single tokens, or are not scored."""

    clean: Float[Tensor, "trial vocab"] | None
    """Log-probabilities of the clean run at the position that predicts the answers, where they are needed."""

    memory: int
    """Bytes that replay may take."""

    @classmethod
    @torch.inference_mode()
    def prepare(
        cls,
        resident: ResidentModel,
        activations: Activations,
        trials: Trials,
        alignment: Alignment,
        direction: Direction,
        measures: Sequence[Measure],
        known: Int[np.ndarray, " token"],
        memory: int = 2**33,
    ) -> "VocabularyMeasures":
        """Run what no store has: the prompts with answers of several tokens, and the clean run's last layer."""
        vocabulary = Vocabulary.prepare(resident, known, memory)
        both_inputs = _both_ways(resident, activations, trials, alignment, direction)
        sequence = "sequence" in measures
        tokens = [answer(trials, which) for which in (RIGHT, WRONG)] if sequence else []
        continuations: tuple[AnswerContinuation, ...] = ()
        if any(part.shape[1] > 1 for part in tokens):
            continuations = tuple(
                AnswerContinuation(
                    *_continued_inputs(resident, trials, alignment, direction, which, memory),
                    torch.from_numpy(tokens[which]).to(resident.device),
                )
                for which in (RIGHT, WRONG)
            )
        clean = _clean_log_probs(vocabulary, _into(both_inputs, "clean")) if "kl" in measures else None
        of_one_position = tuple(name for name in measures if name != "sequence")
        return cls(vocabulary, *both_inputs, of_one_position, sequence, continuations, clean, memory)

    def patched(
        self,
        sites: Sequence[Site],
        mask: Bool[np.ndarray, "subset head"],
        progress: Callable[[int], object] = lambda _runs: None,
    ) -> dict[str, Float[np.ndarray, "site subset trial"]]:
        """Every measure of every patched run, and `logit_diff`; `progress` as in `replay`."""
        resident = self.vocabulary.resident

        def read(
            inputs: PatchInputs, reading: Reading, n_readings: int, progress: Callable[[int], object]
        ) -> Float[np.ndarray, "reading site subset trial"]:
            runs = runs_at_once(resident, inputs.valid.numel(), self.memory)
            return replay_reading(resident, inputs, sites, mask, reading, progress, runs, n_readings)

        names = ("logit_diff", *self.measures)
        values = dict(zip(names, read(self.inputs, self._read, len(names), progress), strict=True))
        if self.continuations:
            right, wrong = (
                read(continuation.inputs, self._answer_reading(continuation), 1, lambda _runs: None)[0]
                for continuation in self.continuations
            )
            values["sequence"] = right - wrong
        elif self.sequence:
            values["sequence"] = values["logit_diff"]
        return values

    @torch.inference_mode()
    def unpatched(self) -> dict[str, Float[np.ndarray, "run trial"]]:
        """The same measures of both unpatched runs, from the capture."""
        names = ("logit_diff", *self.measures)
        by_run = [self._unpatched(_into((self.inputs, self.reverse), run), self._read) for run in RUNS]
        values = dict(zip(names, np.stack(by_run, axis=1), strict=True))
        if self.continuations:
            right, wrong = (self._unpatched_answer(continuation) for continuation in self.continuations)
            values["sequence"] = right - wrong
        elif self.sequence:
            values["sequence"] = values["logit_diff"]
        return values

    def _unpatched_answer(self, continuation: AnswerContinuation) -> Float[np.ndarray, "run trial"]:
        both_inputs = (continuation.inputs, continuation.reverse)
        reading = self._answer_reading(continuation)
        return np.stack([self._unpatched(_into(both_inputs, run), reading)[0] for run in RUNS])

    def _unpatched(self, inputs: PatchInputs, reading: Reading) -> Float[np.ndarray, "reading trial"]:
        runner = LayerRunner(self.vocabulary.resident, inputs)
        numbers: np.ndarray = reading(runner, _final_resid(runner))[:, 0].cpu().numpy()
        return numbers

    def _read(self, runner: LayerRunner, resid: Resid) -> Float[Tensor, "reading run trial"]:
        """The logit difference, and the measures of one position."""
        logit_diff = runner.logit_diff(resid)
        if not self.measures:
            return logit_diff[None]
        values = logit_diff.new_empty(len(self.measures), *resid.shape[:2])
        for trials, runs, logits in self.vocabulary.blocks(runner.read(resid)):
            right = runner.inputs.answers[trials, RIGHT]
            clean = None if self.clean is None else self.clean[trials]
            values[:, trials, runs] = compute_measures(self.measures, logits, right, clean)
        return torch.cat([logit_diff[None], values.transpose(1, 2)])

    def _answer_reading(self, continuation: AnswerContinuation) -> Reading:
        """The log-probability of an answer, token by token."""

        def read(runner: LayerRunner, resid: Resid) -> Float[Tensor, "reading run trial"]:
            total = torch.zeros(resid.shape[:2], device=resid.device)
            for ahead, token in enumerate(continuation.tokens.T):
                for trials, runs, logits in self.vocabulary.blocks(runner.read(resid, ahead)):
                    total[trials, runs] += _token_log_probability(logits, token[trials, None].expand(logits.shape[:-1]))
            return total.T[None]

        return read


@dataclass(frozen=True)
class Hooked:
    """The measures of a few patched runs by full hooked forwards of stock transformers."""

    values: Mapping[str, Float[np.ndarray, "patch trial"]]

    allowed: Mapping[str, Float[np.ndarray, "patch trial"]]
    """Largest difference that rounding alone explains, of each."""


@torch.inference_mode()
def hooked_measures(
    vocabulary: Vocabulary,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    patches: Patches,
    measures: Sequence[Measure],
    tolerance: float,
) -> Hooked:
    """What `VocabularyMeasures` should compute.  `tolerance` is that of a logit difference, in nats.

    A probability may differ by as much, the divergence by as much plus that share of itself, a whole answer by as much
    per token; a rank by the number of tokens whose logits are that close.
    """
    resident = vocabulary.resident
    last = trials.length[..., None] - 1
    right = torch.from_numpy(trials.answer_tokens[:, RIGHT]).to(resident.device)
    of_one_position = [name for name in measures if name != "sequence"]
    with resident.stock():
        clean = vocabulary.only_known(stock_logits(resident, trials, RUNS.index("clean"), last)[:, 0]).log_softmax(-1)

    def read(logits: Float[Tensor, "trial read vocab"]) -> Float[Tensor, "trial measure"]:
        logits = vocabulary.only_known(logits)
        near = (logits[:, 0] - logits[:, 0].gather(1, right[:, None])).abs() <= tolerance
        values = logits.new_empty(len(logits), 0)
        if of_one_position:
            values = compute_measures(of_one_position, logits, right, clean)[..., 0].T
        return torch.cat([values, near.sum(1, keepdim=True) - 1], dim=1)

    measured = hooked(resident, trials, alignment, direction, patches, last, read).cpu().numpy()
    values: dict[str, np.ndarray] = {name: measured[..., place] for place, name in enumerate(of_one_position)}
    allowed: dict[str, np.ndarray] = {name: np.full_like(measured[..., 0], tolerance) for name in measures}
    if "rank" in measures:
        allowed["rank"] = measured[..., -1]
    if "kl" in measures:
        allowed["kl"] = tolerance * (1 + values["kl"])
    if "sequence" in measures:
        right_answer, wrong_answer = (
            _hooked_answer(vocabulary, trials, alignment, direction, patches, which) for which in (RIGHT, WRONG)
        )
        values["sequence"] = right_answer - wrong_answer
        allowed["sequence"] *= trials.continuation.shape[2] if trials.continuation is not None else 1
    return Hooked(values, allowed)


def _hooked_answer(
    vocabulary: Vocabulary, trials: Trials, alignment: Alignment, direction: Direction, patches: Patches, which: int
) -> Float[np.ndarray, "patch trial"]:
    """The log-probability of an answer, in nats."""
    resident, tokens = vocabulary.resident, answer(trials, which)
    longer = continued(trials, which, resident.architecture.context)
    read = np.minimum(trials.length[..., None] - 1 + np.arange(tokens.shape[1]), longer.tokens.shape[2] - 1)
    token = torch.from_numpy(tokens).to(resident.device)

    def score(logits: Float[Tensor, "trial read vocab"]) -> Float[Tensor, " trial"]:
        return _token_log_probability(vocabulary.only_known(logits), token).sum(1)

    return hooked(resident, longer, alignment, direction, patches, read, score).cpu().numpy()


def _token_log_probability(logits: Float[Tensor, "*run vocab"], token: Int[Tensor, "*run"]) -> Float[Tensor, "*run"]:
    """Log-probability of a token, in nats; 0 for the padding (-1) after an answer's end."""
    return torch.where(token >= 0, log_probability(logits, token.clamp(min=0)), 0)


def _both_ways(
    resident: ResidentModel, activations: Activations, trials: Trials, alignment: Alignment, direction: Direction
) -> tuple[PatchInputs, PatchInputs]:
    reverse: Direction = "noise" if direction == "denoise" else "denoise"
    forth, back = (
        PatchInputs.from_capture(resident, activations, trials, alignment, way) for way in (direction, reverse)
    )
    return forth, back


def _into(both_inputs: tuple[PatchInputs, PatchInputs], run: str) -> PatchInputs:
    """The one of both whose target is `run`."""
    return next(inputs for inputs in both_inputs if inputs.target == RUNS.index(run))


def _continued_inputs(
    resident: ResidentModel, trials: Trials, alignment: Alignment, direction: Direction, which: int, memory: int
) -> tuple[PatchInputs, PatchInputs]:
    """Inputs of both directions for the prompts with all of an answer but its last token appended."""
    longer = continued(trials, which, resident.architecture.context)
    n_appended = answer(trials, which).shape[1] - 1
    positions = lengthened(alignment, n_appended, longer.tokens.shape[2])
    return _both_ways(resident, capture(resident, longer, memory), longer, positions, direction)


def _final_resid(runner: LayerRunner) -> Resid:
    """The residual stream after the last layer of the target run, from the capture."""
    last = runner.resident.architecture.n_layers - 1
    return layer_output(runner, last, runner.inputs.patched("z", last, runner.inputs.target))[:, None]


def _clean_log_probs(vocabulary: Vocabulary, inputs: PatchInputs) -> Float[Tensor, "trial vocab"]:
    runner = LayerRunner(vocabulary.resident, inputs)
    parts = [logits[:, 0].log_softmax(-1) for _, _, logits in vocabulary.blocks(runner.read(_final_resid(runner)))]
    return torch.cat(parts)
