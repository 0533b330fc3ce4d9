"""One forward for all trials of a checkpoint: every head's z, and what replay needs besides."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.attention_hook import attending, causal_attention
from ..checkpoints.model import ResidentModel
from ..runtime.resources import as_many_as_fit
from ..store.activations import KINDS, Capture
from ..study.prompts import Trials


def capture(resident: ResidentModel, trials: Trials, memory: int) -> Capture:
    """Run every prompt of both runs once, right-padded, all in one forward unless `memory` (bytes) demands less."""
    n_runs, n_trials, n_positions = trials.tokens.shape
    tokens = torch.from_numpy(trials.tokens.reshape(-1, n_positions)).to(resident.device)
    read = torch.from_numpy(trials.length.reshape(-1, 1) - 1).to(resident.device)
    answers = torch.from_numpy(np.tile(trials.answer_tokens, (n_runs, 1))).to(resident.device)
    first_try = min(len(tokens), max(1, memory // _bytes_per_prompt(resident, n_positions)))

    def run(batch_size: int) -> tuple[dict[str, list[Tensor]], Tensor]:
        parts = [
            _forward(resident, *batch)
            for batch in zip(*(x.split(batch_size) for x in (tokens, read, answers)), strict=True)
        ]
        layers = range(resident.architecture.n_layers)
        kept = {kind: [torch.cat([kept[kind][layer] for kept, _ in parts]) for layer in layers] for kind in KINDS}
        return kept, torch.cat([logits for _, logits in parts])

    kept, logits = as_many_as_fit(run, first_try)
    by_run = (n_runs, n_trials)
    return Capture(
        kept={kind: [tensor.unflatten(0, by_run) for tensor in tensors] for kind, tensors in kept.items()},
        answer_logits=logits.unflatten(0, by_run).float(),
    )


class _Capturing:
    """An attention mode that keeps z, keys and values of every layer, moved off the device."""

    def __init__(self, n_layers: int, longest: int) -> None:
        self.longest = longest
        empty = torch.empty(0)
        self.kept: dict[str, list[Tensor]] = {kind: [empty] * n_layers for kind in KINDS}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        z = causal_attention(query, key, value, scaling)
        self.kept["z"][layer] = z.cpu()
        self.kept["key"][layer] = key.transpose(1, 2).cpu()
        self.kept["value"][layer] = value.transpose(1, 2).cpu()
        return z

    @contextmanager
    def watching(self, layers: list[nn.Module]) -> Iterator[None]:
        """Keep what enters every layer while the body runs."""

        def keep(layer: int):
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.kept["resid_pre"][layer] = (args[0] if args else kwargs["hidden_states"]).cpu()

            return hook

        with ExitStack() as stack:
            for layer, module in enumerate(layers):
                stack.callback(module.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
            yield


@torch.inference_mode()
def _forward(
    resident: ResidentModel, tokens: Tensor, read: Tensor, answers: Tensor
) -> tuple[dict[str, list[Tensor]], Tensor]:
    capturing = _Capturing(resident.architecture.n_layers, tokens.shape[1])
    with attending(capturing), capturing.watching(resident.layer_modules()), resident.answering(answers, read):
        logits = resident.model(tokens, use_cache=False).logits
    return capturing.kept, logits[:, 0].cpu()


def _bytes_per_prompt(resident: ResidentModel, n_positions: int) -> int:
    """A generous estimate: what is kept of every layer, and the widest moment of one layer."""
    body = resident.architecture
    kept = body.n_heads * body.value_dim + 2 * body.n_kv_heads * body.head_dim + body.d_model
    widest = 16 * body.d_model + body.n_heads * n_positions
    return n_positions * (body.n_layers * kept + widest) * resident.dtype.itemsize
