"""Direct logit attribution: what every head adds to the logit difference of the answers directly.

z of the read position · W_O · the frozen final norm · (W_U[right] - W_U[wrong]): the head's direct path alone, without
what later layers make of its output (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al.
2022, arXiv:2211.00593).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..checkpoints.hooks import hook_inputs, hook_outputs
from ..checkpoints.model import ResidentModel
from ..replay.additive_layers import layer_output, output_weight
from ..replay.layers import LayerRunner
from ..runtime.errors import UserError
from .readout import WITHOUT_ATTRIBUTION, readout, rounding


@dataclass(frozen=True)
class Attribution:
    """One run's logit difference as a sum of contributions, in nats."""

    heads: Float[Tensor, "layer head trial"]

    rest: Float[Tensor, "layer trial"]
    """All else that each layer wrote: its MLP, and the biases of attention and MLP."""

    start: Float[Tensor, " trial"]
    """The residual stream that entered the first of the layers: for layer 0, the embedding."""

    constant: Float[Tensor, " trial"]
    """Biases of the final norm and of the unembedding."""

    def total(self) -> Float[Tensor, " trial"]:
        """The logit difference, in nats."""
        return self.heads.double().sum((0, 1)) + self.rest.double().sum(0) + self.start + self.constant


def attribute(runner: LayerRunner, layers: Sequence[int]) -> Attribution:
    """The contributions in the target run, at the read position; `layers` end with the last and have no gap.

    Raises `UserError` for an architecture whose heads do not write straight into the residual stream.
    """
    resident, inputs = runner.resident, runner.inputs
    z = {layer: inputs.patched("z", layer, inputs.target)[:, 0] for layer in layers}
    resid_pre = {layer: inputs.patched("resid_pre", layer, inputs.target)[:, 0] for layer in layers}
    # Only inputs of layers are stored: what leaves the last one is computed again.
    final = layer_output(runner, layers[-1], z[layers[-1]][:, None])[:, 0]
    final_readout = readout(resident, final, inputs.answers)
    heads, rest = [], []
    for layer in layers:
        _refuse_indirect_heads(runner, layer)
        z_direction = torch.einsum("hvm,tm->thv", output_weight(resident, layer).float(), final_readout.direction)
        heads.append((z[layer].float() * z_direction).sum(-1).T)
        resid_post = resid_pre.get(layer + 1, final)
        written = ((resid_post.float() - resid_pre[layer].float()) * final_readout.direction).sum(-1)
        rest.append(written - heads[-1].sum(0))
    start = (resid_pre[layers[0]].float() * final_readout.direction).sum(-1)
    return Attribution(torch.stack(heads), torch.stack(rest), start, final_readout.constant)


def _refuse_indirect_heads(runner: LayerRunner, layer: int) -> None:
    """Raise `UserError` where a perturbation of z reaches the residual stream otherwise than through W_O alone.

    Modules after W_O in the layer give zero meanwhile, so that only the direct path is open.
    """
    resident = runner.resident
    z = runner.inputs.patched("z", layer, runner.inputs.target)
    perturbation = torch.ones_like(z) * z.std()
    with _zero_after_output_projection(resident, layer):
        before, after = (layer_output(runner, layer, perturbed) for perturbed in (z, z + perturbation))
    expected = perturbation.flatten(-2) @ output_weight(resident, layer).flatten(0, 1)
    allowed = rounding(before.dtype) * before.abs().max()
    if not (after - before - expected).abs().max() <= allowed + 0.01 * expected.abs().max():
        raise UserError(
            f"{resident.architecture.name} scales or norms what its heads write before it joins the residual "
            f"stream; direct logit attribution is not supported for it{WITHOUT_ATTRIBUTION}"
        )


@contextmanager
def _zero_after_output_projection(resident: ResidentModel, layer: int) -> Iterator[None]:
    """While the body runs, every module with weights that runs after W_O in the layer returns zero."""
    block = resident.layer_modules()[layer]
    out_proj = resident.model.get_submodule(resident.architecture.out_proj[layer])
    weighted = {
        module: module for module in block.modules() if next(module.parameters(recurse=False), None) is not None
    }
    has_run = False

    def restart(_module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        nonlocal has_run
        has_run = False

    def zero(module: nn.Module, output: Any) -> Tensor | None:
        nonlocal has_run
        if module is out_proj:
            has_run = True
            return None
        return torch.zeros_like(output) if has_run and isinstance(output, Tensor) else None

    with hook_inputs({block: block}, restart), hook_outputs(weighted, zero):
        yield
