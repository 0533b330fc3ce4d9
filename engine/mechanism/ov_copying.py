"""Whether a head's OV circuit copies: does attending to a token make that very token likelier, for all tokens?

The full OV circuit W_E W_V W_O W_U maps every token to what it makes of every token's logit.  Positive eigenvalues mean
copying (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Copying / Primarily positive
eigenvalues").  Norms are merged into the weights next to them up to their scale, as there: what a unit vector becomes.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checkpoints.model import LayerCall, ResidentModel
from ..replay.additive_layers import output_weight
from ..runtime.errors import UserError
from .circuits import project
from .readout import rounding

MOST_SHUFFLED = 8192
"""Tokens that labels are shuffled among, drawn from all: the eigenvalues' shares do not depend on how many."""

WITHOUT_COPYING = "it has no OV circuit that is a product of weights"


class OVCopying:
    """Computes, layer by layer, the copying score of every head, also with tokens' labels shuffled.

    Raises `UserError` for an architecture whose logits are no product with an embedding as wide as the residual stream.
    """

    def __init__(self, resident: ResidentModel, known: Int[np.ndarray, " token"], seed: int, n_shuffles: int) -> None:
        self._resident = resident
        d_model = resident.architecture.d_model
        embedding, unembedding = _embeddings(resident)
        if embedding.shape[1] != d_model or unembedding.shape[1] != d_model:
            raise UserError(f"{resident.architecture.name} projects its embeddings; {WITHOUT_COPYING}")
        self._units = torch.eye(d_model, device=resident.device, dtype=resident.dtype)
        check = torch.randn(1, d_model, generator=torch.Generator().manual_seed(seed)).to(self._units)
        self._rows = torch.cat([self._units, check, -self._units, -check])
        read = self._odd(resident.before_unembedding(self._rows[None])[0].float())
        rng = np.random.default_rng(seed)
        some = rng.choice(known, min(len(known), MOST_SHUFFLED), replace=False)
        self._read = [
            read @ _product(embedding, unembedding, known, known),
            *(read @ _product(embedding, unembedding, some, rng.permutation(some)) for _ in range(n_shuffles)),
        ]
        """W_U W_E, with the final norm, for the labels as they are and shuffled; each (written, read)."""

        positions = torch.zeros(1, len(self._rows), dtype=torch.long, device=resident.device)
        self._calls: list[LayerCall] = resident.layer_calls(positions)

    @torch.no_grad()
    def scores(self, layer: int) -> Float[np.ndarray, "labels head"]:
        """Sum of the eigenvalues over the sum of their sizes, -1 to 1: of the tokens' own labels first, then shuffled.

        The eigenvalues are those of W_O W_U W_E W_V, head_dim x head_dim, which are the full circuit's that are not
        zero.  Raises `UserError` where values are no linear function of what they are made from.
        """
        _, _, value = project(self._resident, layer, self._rows[None], self._calls[layer], keep_norm=True)
        value = value.repeat_interleave(self._resident.architecture.n_heads // len(value), dim=0)
        read = torch.stack([self._odd(rows) for rows in value.float()])
        output = output_weight(self._resident, layer).float()
        circuits = torch.stack([output @ middle @ read for middle in self._read])
        values = torch.linalg.eigvals(circuits.double().cpu())
        shares: np.ndarray = (values.real.sum(-1) / values.abs().sum(-1)).numpy()
        return shares

    def _odd(self, outputs: Float[Tensor, "row width"]) -> Float[Tensor, "d_model width"]:
        """The matrix of a map that is linear but for a bias and a norm, up to its scale: what it makes of unit vectors.

        Raises `UserError` where the map is none, as one random vector shows.
        """
        above, below = outputs.chunk(2)
        odd = (above - below) / 2
        matrix, check = odd[:-1], odd[-1]
        expected = self._rows[len(matrix)].float() @ matrix
        # The norm scales a random vector otherwise than unit vectors: by which factor, least squares say.
        scale = (expected @ check) / (expected @ expected)
        if not (scale * expected - check).abs().max() <= rounding(self._resident.dtype) * check.abs().max():
            raise UserError(f"{self._resident.architecture.name} norms or clips its values; {WITHOUT_COPYING}")
        return matrix


def _embeddings(resident: ResidentModel) -> tuple[Tensor, Tensor]:
    """W_E and W_U, each (token, width)."""
    model: Any = resident.model
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, Tensor) and isinstance(unembedding, Tensor)
    return embedding, unembedding


def _product(
    embedding: Tensor, unembedding: Tensor, tokens: Int[np.ndarray, " token"], labels: Int[np.ndarray, " token"]
) -> Float[Tensor, "written read"]:
    """W_U^T W_E over tokens, the token `tokens[i]` read as `labels[i]`.

    The mean over tokens is taken from W_U: what is added to all logits alike changes no probability.
    """
    label, token = (torch.from_numpy(values).to(embedding.device) for values in (labels, tokens))
    unembedded = unembedding[label].float()
    return (unembedded - unembedded.mean(0)).T @ embedding[token].float()
