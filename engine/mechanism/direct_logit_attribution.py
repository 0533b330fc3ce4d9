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

from ..checkpoints.model import Skeleton
from ..replay.additive_layers import layer_output, output_weight
from ..replay.layers import Steps
from ..study.study import Refusal
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


def attribute(steps: Steps, layers: Sequence[int]) -> Attribution:
    """The target run's shares; `layers` go up to the last without a gap.

    Raises `Refusal` for an architecture whose heads do not write straight into the residual stream.
    """
    skeleton, ground = steps.skeleton, steps.ground
    z = {layer: ground.patched("z", layer, ground.target)[:, 0] for layer in layers}
    entered = {layer: ground.patched("resid_pre", layer, ground.target)[:, 0] for layer in layers}
    left = layer_output(steps, layers[-1], z[layers[-1]][:, None])[:, 0]
    read = readout(skeleton, left, ground.answers)
    heads, rest = [], []
    for layer in layers:
        _refuse_other_writing(steps, layer)
        by_head = torch.einsum("hvm,tm->thv", output_weight(skeleton, layer).float(), read.direction)
        heads.append((z[layer].float() * by_head).sum(-1).T)
        after = entered.get(layer + 1, left)
        written = ((after.float() - entered[layer].float()) * read.direction).sum(-1)
        rest.append(written - heads[-1].sum(0))
    start = (entered[layers[0]].float() * read.direction).sum(-1)
    return Attribution(torch.stack(heads), torch.stack(rest), start, read.constant)


def _refuse_other_writing(steps: Steps, layer: int) -> None:
    """Raise `Refusal` where a push on z reaches the residual stream otherwise than as W_O leaves it.

    What comes after W_O in the layer is silenced, so that only the direct way is open.
    """
    skeleton = steps.skeleton
    z = steps.ground.patched("z", layer, steps.ground.target)
    push = torch.ones_like(z) * z.std()
    with _silenced_after_output(skeleton, layer):
        before, after = (layer_output(steps, layer, given) for given in (z, z + push))
    expected = push.flatten(-2) @ output_weight(skeleton, layer).flatten(0, 1)
    allowed = rounding(before.dtype) * before.abs().max()
    if not (after - before - expected).abs().max() <= allowed + 0.01 * expected.abs().max():
        raise Refusal(
            f"{skeleton.anatomy.architecture} scales or norms what its heads write before it joins the residual "
            f"stream; direct logit attribution is not supported for it{MEND}"
        )


@contextmanager
def _silenced_after_output(skeleton: Skeleton, layer: int) -> Iterator[None]:
    """While the body runs, every module with weights that comes after W_O in the layer gives zero."""
    project = skeleton.model.get_submodule(skeleton.anatomy.out_proj[layer])
    attended: list[bool] = []

    def silence(module: nn.Module, _args: Any, output: Any) -> Any:
        if module is project:
            attended.append(True)
            return output
        return torch.zeros_like(output) if attended and isinstance(output, Tensor) else output

    def begin(_module: nn.Module, _args: Any) -> None:
        attended.clear()

    block = skeleton.layer_modules()[layer]
    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(begin).remove)
        for module in block.modules():
            if next(module.parameters(recurse=False), None) is not None:
                stack.callback(module.register_forward_hook(silence).remove)
        yield
