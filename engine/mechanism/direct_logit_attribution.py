"""Direct logit attribution: what every head adds to the answers' logit difference by itself.

z of the read position · W_O · the frozen final norm · (W_U[right] - W_U[wrong]): the head's direct path alone, not what
later layers make of it (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022,
arXiv:2211.00593).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..checkpoints.model import ResidentModel
from ..replay.additive_layers import layer_output, output_weight
from ..replay.layers import LayerRunner
from ..runtime.errors import UserError
from .readout import MEND, readout, rounding


@dataclass(frozen=True)
class Attribution:
    """Shares of one run's logit difference, in nats.  All together they are the logit difference."""

    heads: Float[Tensor, "layer head trial"]

    rest: Float[Tensor, "layer trial"]
    """What else each layer wrote: its MLP, and the biases of both."""

    start: Float[Tensor, " trial"]
    """The residual stream that entered the first of the layers: the embedding, where that is layer 0."""

    constant: Float[Tensor, " trial"]
    """Biases of the final norm and of the unembedding."""

    def total(self) -> Float[Tensor, " trial"]:
        """The logit difference."""
        return self.heads.double().sum((0, 1)) + self.rest.double().sum(0) + self.start + self.constant


def attribute(runner: LayerRunner, layers: Sequence[int]) -> Attribution:
    """The target run's shares; `layers` go up to the last without a gap.

    Raises `UserError` for an architecture whose heads do not write straight into the residual stream.
    """
    resident, inputs = runner.resident, runner.inputs
    z = {layer: inputs.patched("z", layer, inputs.target)[:, 0] for layer in layers}
    entered = {layer: inputs.patched("resid_pre", layer, inputs.target)[:, 0] for layer in layers}
    left = layer_output(runner, layers[-1], z[layers[-1]][:, None])[:, 0]
    read = readout(resident, left, inputs.answers)
    heads, rest = [], []
    for layer in layers:
        _refuse_other_writing(runner, layer)
        by_head = torch.einsum("hvm,tm->thv", output_weight(resident, layer).float(), read.direction)
        heads.append((z[layer].float() * by_head).sum(-1).T)
        after = entered.get(layer + 1, left)
        written = ((after.float() - entered[layer].float()) * read.direction).sum(-1)
        rest.append(written - heads[-1].sum(0))
    start = (entered[layers[0]].float() * read.direction).sum(-1)
    return Attribution(torch.stack(heads), torch.stack(rest), start, read.constant)


def _refuse_other_writing(runner: LayerRunner, layer: int) -> None:
    """Raise `UserError` where a push on z reaches the residual stream otherwise than as W_O leaves it.

    What comes after W_O in the layer is silenced, so that only the direct way is open.
    """
    resident = runner.resident
    z = runner.inputs.patched("z", layer, runner.inputs.target)
    push = torch.ones_like(z) * z.std()
    with _silenced_after_output(resident, layer):
        before, after = (layer_output(runner, layer, given) for given in (z, z + push))
    expected = push.flatten(-2) @ output_weight(resident, layer).flatten(0, 1)
    allowed = rounding(before.dtype) * before.abs().max()
    if not (after - before - expected).abs().max() <= allowed + 0.01 * expected.abs().max():
        raise UserError(
            f"{resident.architecture.name} scales or norms what its heads write before it joins the residual "
            f"stream; direct logit attribution is not supported for it{MEND}"
        )


@contextmanager
def _silenced_after_output(resident: ResidentModel, layer: int) -> Iterator[None]:
    """While the body runs, every module with weights that comes after W_O in the layer gives zero."""
    project = resident.model.get_submodule(resident.architecture.out_proj[layer])
    attended: list[bool] = []

    def silence(module: nn.Module, _args: Any, output: Any) -> Any:
        if module is project:
            attended.append(True)
            return output
        return torch.zeros_like(output) if attended and isinstance(output, Tensor) else output

    def begin(_module: nn.Module, _args: Any) -> None:
        attended.clear()

    block = resident.layer_modules()[layer]
    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(begin).remove)
        for module in block.modules():
            if next(module.parameters(recurse=False), None) is not None:
                stack.callback(module.register_forward_hook(silence).remove)
        yield
