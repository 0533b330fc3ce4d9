"""The answers' logit difference as a plain product of the residual stream that leaves the last layer.

The final norm's scale is frozen at what it is in the run; all else about it is linear and treated exactly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checkpoints.model import ResidentModel
from ..runtime.errors import UserError
from ..study.study import ROUNDING

ROUNDINGS = 64
"""What was found by trying holds within so many roundings of the largest value."""

MEND = "; leave attribution out of --parts"


def rounding(dtype: torch.dtype) -> float:
    """The allowed difference of what was found by trying, over the largest value."""
    is_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return ROUNDINGS * (ROUNDING["tf32"] if is_tf32 else torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Readout:
    """Logit difference = residual stream · direction + constant, where the final norm's scale is that of the run."""

    direction: Float[Tensor, "trial d_model"]
    """(W_U[right] - W_U[wrong]) through the frozen final norm, its mean-centring included; nats per unit."""

    constant: Float[Tensor, " trial"]
    """What the biases of the final norm and of the unembedding give, in nats."""

    def of(self, resid: Float[Tensor, "trial d_model"]) -> Float[Tensor, " trial"]:
        """The logit difference that these residual streams make, in nats."""
        return (resid.float() * self.direction).sum(-1) + self.constant


def readout(
    resident: ResidentModel, resid: Float[Tensor, "trial d_model"], answers: Int[Tensor, "trial answer"]
) -> Readout:
    """The readout of runs whose last layer left `resid`.

    Freezing the scale is what makes a head's share of the logits well defined (Elhage et al. 2021, A Mathematical
    Framework for Transformer Circuits; Wang et al. 2022, arXiv:2211.00593).  Raises `UserError` where the logits are no
    such product.
    """
    norm = _FrozenNorm.found(resident, resid)
    unembed = resident.model.get_output_embeddings()
    weight, bias = unembed.weight, getattr(unembed, "bias", None)
    assert isinstance(weight, Tensor)
    right, wrong = weight[answers].float().unbind(1)
    constant = (right - wrong) @ norm.bias
    if bias is not None:
        constant = constant + bias[answers].float() @ constant.new_tensor([1.0, -1.0])
    found = Readout(norm.back(right - wrong), constant)
    _refuse_other_logits(resident, found, resid, answers)
    return found


@dataclass(frozen=True)
class _FrozenNorm:
    """normed = gain · (resid - its mean, where it is centred) / scale + bias."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    is_centred: bool

    scale: Float[Tensor, " trial"]
    """Up to a factor that the gain has the inverse of."""

    @classmethod
    def found(cls, resident: ResidentModel, resid: Float[Tensor, "trial d_model"]) -> "_FrozenNorm":
        """By trying: what is odd is the norm, what is even its bias; ones are nothing to one that centres.

        Raises `UserError` where what stands before the unembedding is no LayerNorm and no RMSNorm.
        """
        signs = torch.ones_like(resid[0])
        signs[1::2] = -1
        probes = torch.stack([resid, -resid], dim=1), torch.stack([signs, -signs, signs.abs()])[None]
        normed, tried = (resident.before_unembedding(probe).float() for probe in probes)
        if normed.shape[2] != resid.shape[1]:
            raise UserError(
                f"{resident.architecture.name} projects its residual stream before it unembeds it; direct logit "
                f"attribution is not supported for it{MEND}"
            )
        bias, odd = normed.mean((0, 1)), (normed[:, 0] - normed[:, 1]) / 2
        of_signs = (tried[0, 0] - tried[0, 1]) / 2
        is_centred = bool((tried[0, 2] - bias).abs().max() < of_signs.abs().max() / 2)
        gain = of_signs / _centred(signs.float(), is_centred)
        unscaled = gain * _centred(resid.float(), is_centred)
        scale = (unscaled**2).sum(1) / (unscaled * odd).sum(1)
        allowed = rounding(resid.dtype) * normed.abs().max()
        if not (unscaled / scale[:, None] - odd).abs().max() <= allowed:
            raise UserError(
                f"{resident.architecture.name} ends in no LayerNorm and no RMSNorm; direct logit attribution is not "
                f"supported for it{MEND}"
            )
        return cls(gain, bias, is_centred, scale)

    def back(self, direction: Float[Tensor, "trial d_model"]) -> Float[Tensor, "trial d_model"]:
        """The direction in the residual stream that ends as `direction` after the norm."""
        return _centred(direction * self.gain, self.is_centred) / self.scale[:, None]


def _centred(values: Tensor, is_centred: bool) -> Tensor:
    return values - values.mean(-1, keepdim=True) if is_centred else values


def _refuse_other_logits(resident: ResidentModel, found: Readout, resid: Tensor, answers: Tensor) -> None:
    logits = resident.answer_logits(resid[:, None], answers)[:, 0].float()
    terms = found.direction.abs().amax(1) * resid.float().abs().amax(1) + logits.abs().amax(1)
    allowed = rounding(resid.dtype) * terms
    if not ((found.of(resid) - logits[:, 0] + logits[:, 1]).abs() <= allowed).all():
        raise UserError(
            f"{resident.architecture.name} scales or caps its logits; direct logit attribution is not supported "
            f"for it{MEND}"
        )
