"""One forward for all trials of a checkpoint: every head's z, and what replay needs besides."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.attention_hook import attending, causal_attention
from ..checkpoints.hooks import hook_inputs
from ..checkpoints.model import ResidentModel
from ..runtime.errors import UserError
from ..runtime.resources import as_many_as_fit
from ..store.activations import KINDS, Capture
from ..study.prompts import Trials


def capture(resident: ResidentModel, trials: Trials, memory: int) -> Capture:
    """Run every prompt of both runs once, right-padded, all in one forward unless `memory` (bytes) demands less."""
    n_runs, n_trials, n_positions = trials.tokens.shape
    largest, n_vocabulary = max(trials.tokens.max(), trials.answer_tokens.max()), resident.architecture.n_vocabulary
    if largest >= n_vocabulary:
        raise UserError(
            f"the tokenizer gives token {largest}, the model has an embedding for {n_vocabulary:,}; they do not belong "
            "together: put the model's own tokenizer beside it"
        )
    tokens = torch.from_numpy(trials.tokens.reshape(-1, n_positions)).to(resident.device)
    read = torch.from_numpy(trials.length.reshape(-1, 1) - 1).to(resident.device)
    answers = torch.from_numpy(np.tile(trials.answer_tokens, (n_runs, 1))).to(resident.device)
    first_try = min(len(tokens), max(1, memory // _bytes_per_prompt(resident, n_positions)))

    def run(batch_size: int) -> tuple[dict[str, list[Tensor]], Tensor]:
        parts = [
            _forward(resident, *batch)
            for batch in zip(*(torch.split(x, batch_size) for x in (tokens, read, answers)), strict=True)
        ]
        layers = range(resident.architecture.n_layers)
        joined = {kind: [torch.cat([part[kind][layer] for part, _ in parts]) for layer in layers] for kind in KINDS}
        return joined, torch.cat([logits for _, logits in parts])

    captured, logits = as_many_as_fit(run, first_try)
    by_run = (n_runs, n_trials)
    return Capture(
        tensors={
            kind: [torch.unflatten(tensor, 0, by_run) for tensor in tensors] for kind, tensors in captured.items()
        },
        answer_logits=torch.unflatten(logits, 0, by_run).float(),
    )


class _Capturing:
    """An attention mode that collects z, keys and values of every layer, moved off the device."""

    def __init__(self, n_layers: int, longest: int) -> None:
        self.longest = longest
        empty = torch.empty(0)
        self.captured: dict[str, list[Tensor]] = {kind: [empty] * n_layers for kind in KINDS}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        z = causal_attention(query, key, value, scaling)
        self.captured["z"][layer] = z.cpu()
        self.captured["key"][layer] = key.transpose(1, 2).cpu()
        self.captured["value"][layer] = value.transpose(1, 2).cpu()
        return z

    def collecting_resid_pre(self, layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Collect what enters every layer while the body runs, moved off the device."""

        def collect(layer: int, inputs: tuple[Any, ...]) -> None:
            self.captured["resid_pre"][layer] = inputs[0].cpu()

        return hook_inputs(dict(enumerate(layers)), collect)


@torch.inference_mode()
def _forward(
    resident: ResidentModel, tokens: Tensor, read: Tensor, answers: Tensor
) -> tuple[dict[str, list[Tensor]], Tensor]:
    capturing = _Capturing(resident.architecture.n_layers, tokens.shape[1])
    with (
        attending(capturing),
        capturing.collecting_resid_pre(resident.layer_modules()),
        resident.answering(answers, read),
    ):
        logits = resident.model(tokens, use_cache=False).logits
    return capturing.captured, logits[:, 0].cpu()


def _bytes_per_prompt(resident: ResidentModel, n_positions: int) -> int:
    """A generous estimate: what is captured of every layer, and the most that one layer holds while it computes."""
    shape = resident.architecture
    captured = shape.n_heads * shape.value_dim + 2 * shape.n_kv_heads * shape.head_dim + shape.d_model
    widest = 16 * shape.d_model + shape.n_heads * n_positions
    return n_positions * (shape.n_layers * captured + widest) * resident.dtype.itemsize
