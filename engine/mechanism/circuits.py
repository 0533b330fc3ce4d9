"""The weights of a head as two circuits: what it looks for (QK) and what it writes where it looks (OV).

QK = W_Q W_K^T and OV = W_V W_O are matrices of d_model x d_model and of a head's rank (Elhage et al. 2021, A
Mathematical Framework for Transformer Circuits); only their small factors are ever held.  They are those of the
checkpoint as it is: the norm before attention, biases and the scaling of scores are left out.  Where positions are
rotated, QK is the content part between equal positions, where the rotations of query and key cancel.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..checkpoints.attention_hook import AttentionMode, attending
from ..checkpoints.model import ResidentModel
from ..replay.additive_layers import output_weight
from ..runtime.errors import UserError
from .readout import rounding

CIRCUITS = ("QK", "OV")


@dataclass(frozen=True)
class Circuit:
    """One of the two circuits of every head of a layer: left right^T."""

    left: Float[Tensor, "head d_model width"]
    right: Float[Tensor, "head d_model width"]

    def norm(self) -> Float[Tensor, " head"]:
        """Frobenius norm of left right^T."""
        return self.inner(self).clamp(min=0).sqrt()

    def inner(self, other: "Circuit") -> Float[Tensor, " head"]:
        """Sum over the entries of both matrices' products: tr(A B^T D C^T) = sum of (A^T C) * (B^T D)."""
        left = self.left.double().transpose(1, 2) @ other.left.double()
        right = self.right.double().transpose(1, 2) @ other.right.double()
        return (left * right).sum((1, 2))

    def cosine(self, other: "Circuit") -> Float[Tensor, " head"]:
        """Cosine between both matrices taken as long vectors; NaN for one that is all zero."""
        return self.inner(other) / (self.norm() * other.norm())

    def change(self, before: "Circuit") -> Float[Tensor, " head"]:
        """Norm of the difference, relative to the norm before.

        A B^T - C D^T = A (B - D)^T + (A - C) D^T: both terms are as small as the difference, nothing large cancels.
        """
        left, right = (x.double() - y.double() for x, y in ((self.left, before.left), (self.right, before.right)))
        difference = Circuit(
            torch.cat([self.left.double(), left], dim=2), torch.cat([right, before.right.double()], dim=2)
        )
        return difference.norm() / before.norm()


@torch.no_grad()
def circuits(resident: ResidentModel, layers: Sequence[int]) -> dict[int, tuple[Circuit, Circuit]]:
    """QK and OV of each layer, in tensors of their own.

    Found by running the layer's own way into attention on unit vectors, not from a table of modules.  Raises
    `UserError` for an architecture whose queries, keys or values are no linear function of the normed residual stream.
    """
    d_model = resident.architecture.d_model
    units = torch.eye(d_model, device=resident.device, dtype=resident.dtype)
    draw = torch.Generator().manual_seed(0)
    some = torch.randn(1, d_model, generator=draw).to(units)
    rows = torch.cat([units, torch.zeros_like(some), some])[None]
    # At position 0 nothing is rotated.
    calls = resident.layer_calls(torch.zeros(rows.shape[:2], dtype=torch.long, device=resident.device))
    found = {}
    for layer in layers:
        projections = [_projection(resident, given, some[0]) for given in _projected(resident, layer, rows, calls)]
        query, key, value = (_by_query_head(resident, weight) for weight in projections)
        output = output_weight(resident, layer).transpose(1, 2).clone()
        found[layer] = Circuit(query, key), Circuit(value, output)
    return found


def _projection(
    resident: ResidentModel, given: Float[Tensor, "head row width"], some: Float[Tensor, " d_model"]
) -> Float[Tensor, "head d_model width"]:
    """The matrix that makes of unit vectors what was given: rows are units, zero, and one to check with."""
    bias, check = given[:, -2], given[:, -1]
    weight = given[:, :-2] - bias[:, None]
    allowed = rounding(given.dtype) * check.abs().max()
    if not (torch.einsum("m,hmd->hd", some, weight) + bias - check).abs().max() <= allowed:
        raise UserError(
            f"{resident.architecture.name} norms or clips its queries, keys or values; its QK and OV circuits are "
            "no products of weights and are not supported; leave weights out of --parts"
        )
    return weight


def _by_query_head(
    resident: ResidentModel, weight: Float[Tensor, "some_head d_model width"]
) -> Float[Tensor, "head d_model width"]:
    """One a query head, where several share a key and value head."""
    return weight.repeat_interleave(resident.architecture.n_heads // len(weight), dim=0)


class _Attended(Exception):
    """Attention was reached: the rest of the layer need not run."""


@dataclass(frozen=True)
class _Stopping(AttentionMode):
    """An attention mode that keeps query, key and value and goes no further."""

    longest: int = 1
    heard: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.heard.append((query[0], key[0], value[0]))
        raise _Attended


def _projected(
    resident: ResidentModel, layer: int, rows: Float[Tensor, "one row d_model"], calls: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (head, row, width) of `rows` that no norm has changed."""
    args, kwargs = calls[layer]
    block, stopping = resident.layer_modules()[layer], _Stopping()
    with _without_norm(block, rows), attending(stopping):
        try:
            block(rows, *args, **kwargs)
        except _Attended:
            return stopping.heard[0]
    raise AssertionError("a layer attends")


@contextmanager
def _without_norm(block: nn.Module, rows: Tensor) -> Iterator[None]:
    """While the body runs, what norms the layer's input lets it pass: a module without matrices that is given it."""

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return rows if args and args[0] is rows else output

    norms = [
        module
        for module in block.modules()
        if next(module.children(), None) is None and all(weight.ndim < 2 for weight in module.parameters())
    ]
    with ExitStack() as stack:
        for module in norms:
            stack.callback(module.register_forward_hook(hook).remove)
        yield
