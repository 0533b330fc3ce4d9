"""The weights of a head as two circuits: where it attends (QK) and what it writes from there (OV).

QK = W_Q W_K^T and OV = W_V W_O are d_model x d_model matrices of rank at most head_dim (Elhage et al. 2021, A
Mathematical Framework for Transformer Circuits); only their factors are kept in memory.  They are the checkpoint's raw
weights: the norm before attention, biases and the scaling of scores are left out.  Under rotary embeddings QK is the
content part between equal positions, where the rotations of query and key cancel.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..checkpoints.attention_hook import AttentionMode, attending
from ..checkpoints.model import LayerCall, ResidentModel
from ..replay.additive_layers import output_weight
from ..runtime.errors import UserError
from .readout import rounding

CIRCUITS = ("QK", "OV")
"""Labels of the axis `circuit`."""


@dataclass(frozen=True)
class Circuit:
    """One of the two circuits, of every head of a layer: the matrix left right^T.

    Norms and products are computed in float64 from the factors, never from the d_model x d_model matrix.
    """

    left: Float[Tensor, "head d_model width"]
    right: Float[Tensor, "head d_model width"]

    def norm(self) -> Float[Tensor, " head"]:
        """Frobenius norm."""
        # Rounding can leave the square of a vanishing norm below zero.
        return self.inner(self).clamp(min=0).sqrt()

    def inner(self, other: "Circuit") -> Float[Tensor, " head"]:
        """Frobenius inner product: tr(A B^T D C^T) = sum of (A^T C) * (B^T D), entry by entry."""
        left = self.left.double().transpose(1, 2) @ other.left.double()
        right = self.right.double().transpose(1, 2) @ other.right.double()
        return (left * right).sum((1, 2))

    def cosine(self, other: "Circuit") -> Float[Tensor, " head"]:
        """Cosine between the two matrices taken as vectors, -1 to 1; NaN where one of them is zero."""
        return self.inner(other) / (self.norm() * other.norm())

    def change(self, before: "Circuit") -> Float[Tensor, " head"]:
        """Norm of the difference to `before`, relative to the norm of `before`.

        A B^T - C D^T = A (B - D)^T + (A - C) D^T: both terms are as small as the difference, so nothing large cancels.
        """
        left = self.left.double() - before.left.double()
        right = self.right.double() - before.right.double()
        difference = Circuit(
            torch.cat([self.left.double(), left], dim=2), torch.cat([right, before.right.double()], dim=2)
        )
        return difference.norm() / before.norm()


@torch.no_grad()
def circuits(resident: ResidentModel, layers: Sequence[int]) -> dict[int, tuple[Circuit, Circuit]]:
    """Layer -> (QK, OV), in tensors that stay as they are when other weights are loaded.

    W_Q, W_K and W_V are what the layer's own code makes of unit vectors, so no table of module names is needed.  Raises
    `UserError` for an architecture whose queries, keys or values are no linear function of the normed residual stream.
    """
    d_model = resident.architecture.d_model
    units = torch.eye(d_model, device=resident.device, dtype=resident.dtype)
    check = torch.randn(1, d_model, generator=torch.Generator().manual_seed(0)).to(units)
    inputs = torch.cat([units, torch.zeros_like(check), check])[None]
    # At position 0 rotary embeddings rotate by nothing.
    calls = resident.layer_calls(torch.zeros(inputs.shape[:2], dtype=torch.long, device=resident.device))
    by_layer = {}
    for layer in layers:
        projected = project(resident, layer, inputs, calls[layer], keep_norm=False)
        weights = [_linear_part(resident, outputs, check[0]) for outputs in projected]
        query, key, value = (_by_query_head(resident, weight) for weight in weights)
        output = output_weight(resident, layer).transpose(1, 2).clone()
        by_layer[layer] = Circuit(query, key), Circuit(value, output)
    return by_layer


def _linear_part(
    resident: ResidentModel, outputs: Float[Tensor, "head row width"], check: Float[Tensor, " d_model"]
) -> Float[Tensor, "head d_model width"]:
    """The matrix of a projection, from its outputs for every unit vector, for zero (the bias) and for `check`.

    Raises `UserError` where the output for `check` is not what matrix and bias give.
    """
    bias, output = outputs[:, -2], outputs[:, -1]
    weight = outputs[:, :-2] - bias[:, None]
    allowed = rounding(outputs.dtype) * output.abs().max()
    if not (torch.einsum("m,hmd->hd", check, weight) + bias - output).abs().max() <= allowed:
        raise UserError(
            f"{resident.architecture.name} norms or clips its queries, keys or values; its QK and OV circuits are "
            "no products of weights and are not supported; leave weights out of --parts"
        )
    return weight


def _by_query_head(
    resident: ResidentModel, weight: Float[Tensor, "some_head d_model width"]
) -> Float[Tensor, "head d_model width"]:
    """One matrix a query head, where several share a key and value head."""
    return weight.repeat_interleave(resident.architecture.n_heads // len(weight), dim=0)


class _AttentionReached(Exception):
    """Query, key and value are recorded: the rest of the layer need not run."""


@dataclass(frozen=True)
class _ProjectionRecorder(AttentionMode):
    """An attention mode that records query, key and value and ends the layer's forward there."""

    longest: int = 1
    recorded: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.recorded.append((query[0], key[0], value[0]))
        raise _AttentionReached


def project(
    resident: ResidentModel, layer: int, inputs: Float[Tensor, "one row d_model"], call: LayerCall, keep_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's query, key and value of `inputs`, each (head, row, width); the norm before attention is skipped
    unless `keep_norm`."""
    args, kwargs = call
    block, recorder = resident.layer_modules()[layer], _ProjectionRecorder()
    with nullcontext() if keep_norm else _norm_skipped(block, inputs), attending(recorder):
        try:
            block(inputs, *args, **kwargs)
        except _AttentionReached:
            return recorder.recorded[0]
    raise AssertionError("a layer attends")


@contextmanager
def _norm_skipped(block: nn.Module, inputs: Tensor) -> Iterator[None]:
    """While the body runs, norms of the layer's input return it unchanged.

    A norm is recognised by what it is given and by its weights: no submodules and no matrices.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return inputs if args and args[0] is inputs else output

    norms = [
        module
        for module in block.modules()
        if next(module.children(), None) is None and all(weight.ndim < 2 for weight in module.parameters())
    ]
    with ExitStack() as stack:
        for module in norms:
            stack.callback(module.register_forward_hook(hook).remove)
        yield
