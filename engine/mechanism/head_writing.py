"""What a head would write if it attended to a given token alone: its OV circuit, read through the unembedding.

The input of a head is the token as the layers before it make it, the layer's own norm and biases included; what it
writes is read by the model's own final norm and unembedding.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checkpoints.attention_hook import AttentionMode, attending, causal_attention
from ..checkpoints.hooks import hook_inputs
from ..checkpoints.model import ResidentModel
from ..replay.additive_layers import output_weight
from ..replay.vocabulary_measures import Vocabulary
from .circuits import project

TOP = 5
"""A token is copied where it is among so many with the largest logits (Wang et al. 2023)."""


@dataclass(frozen=True)
class TokenInputs:
    """Some tokens as they enter the layers."""

    first: Float[Tensor, "row d_model"]
    """Of the first layer: the embedding."""

    second: Float[Tensor, "row d_model"]
    """Of the second layer, which stands for all later ones; for a model of one layer the embedding."""

    def of(self, layer: int) -> Float[Tensor, "row d_model"]:
        return self.second if layer else self.first


def embedded(resident: ResidentModel, tokens: Int[Tensor, " row"]) -> TokenInputs:
    """Each token alone in the first position, and after the first layer's MLP, whose heads are silent meanwhile.

    The effective embedding of Gould et al. 2023 (arXiv:2312.09230).
    """
    return _inputs(resident, tokens[:, None], _Silent())


def in_prompts(
    resident: ResidentModel, tokens: Int[Tensor, "prompt position"], at: Int[Tensor, "row two"]
) -> TokenInputs:
    """The tokens at (prompt, position) `at` as the first layer leaves them in their prompts (Wang et al. 2023)."""
    inputs = _inputs(resident, tokens, _Plain(tokens.shape[1]))
    flat = at[:, 0] * tokens.shape[1] + at[:, 1]
    return TokenInputs(inputs.first[flat], inputs.second[flat])


class HeadWriter:
    """Computes what the heads of each layer write when they attend to `inputs`."""

    def __init__(self, resident: ResidentModel, inputs: TokenInputs) -> None:
        self.resident, self.inputs = resident, inputs
        # In the first position, for the value does not depend on it.
        positions = torch.zeros(1, len(inputs.first), dtype=torch.long, device=resident.device)
        self._calls = resident.layer_calls(positions)

    @torch.no_grad()
    def values(self, layer: int) -> Float[Tensor, "head row value_dim"]:
        """The layer's value of every row for every query head, its norm and bias included."""
        _, _, value = project(self.resident, layer, self.inputs.of(layer)[None], self._calls[layer], keep_norm=True)
        return value.repeat_interleave(self.resident.architecture.n_heads // len(value), dim=0)

    @torch.no_grad()
    def written(self, layer: int) -> Float[Tensor, "head row d_model"]:
        """value(token) · W_O, in the units of the residual stream."""
        return self.values(layer) @ output_weight(self.resident, layer)


@torch.no_grad()
def among_top(
    writer: HeadWriter, layer: int, tokens: Int[Tensor, " token"], vocabulary: Vocabulary
) -> Float[np.ndarray, "head row token"]:
    """1 where a token is among the `TOP` that the head writes most when it attends to a row, -1 where it is among those
    that it writes least, else 0.

    The copying and the negative copying score of Wang et al. 2023 (arXiv:2211.00593, section 3.3) are the shares of
    ones and of minus ones where row and token are the same.
    """
    written = writer.written(layer)
    result = np.zeros((*written.shape[:2], len(tokens)))
    nothing = writer.resident.logits(torch.zeros_like(written[:1, :1])).float()
    for heads, rows, logits in vocabulary.blocks(written):
        # Norms are odd but for their bias: the logits of minus what is written are these, turned over about nothing's.
        negative = vocabulary.only_known(2 * nothing - logits)
        for sign, values in ((1, logits), (-1, negative)):
            least = values.topk(min(TOP, values.shape[-1])).values[..., -1:]
            result[heads, rows] += sign * (values[..., tokens] >= least).cpu().numpy()
    return result


def _inputs(resident: ResidentModel, tokens: Int[Tensor, "prompt position"], mode: AttentionMode) -> TokenInputs:
    """Every position of every prompt, in order, as it enters the first two layers."""
    entered: dict[int, Tensor] = {}
    layers = dict(enumerate(resident.layer_modules()[:2]))

    def keep(layer: int, inputs: tuple[Any, ...]) -> None:
        entered[layer] = inputs[0].flatten(0, 1)
        if layer == max(layers):
            raise _Entered

    with torch.no_grad(), attending(mode), hook_inputs(layers, keep), suppress(_Entered):
        resident.model.base_model(input_ids=tokens, use_cache=False)
    return TokenInputs(entered[0], entered[max(layers)])


class _Entered(Exception):
    """The layers' inputs are known: the rest of the model need not run."""


@dataclass(frozen=True)
class _Plain:
    """An attention mode that does what the model does."""

    longest: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return causal_attention(query, key, value, scaling)


@dataclass(frozen=True)
class _Silent:
    """An attention mode in which every z is zero."""

    longest: int = 1

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, n_heads, n_positions, _ = query.shape
        return value.new_zeros(batch, n_positions, n_heads, value.shape[3])
