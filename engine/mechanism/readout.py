"""The logit difference of the answers as a plain product with the residual stream that leaves the last layer.

The final norm's scale is frozen at its value in the run; the rest of the norm is linear and treated exactly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checkpoints.model import ResidentModel
from ..runtime.errors import UserError
from ..study.study import ROUNDING

ROUNDINGS = 64
"""How many machine epsilons of the largest value a measured linear map may be off."""

WITHOUT_ATTRIBUTION = "; leave attribution out of --parts"
"""How every refusal of an architecture that attribution cannot treat ends."""


def rounding(dtype: torch.dtype) -> float:
    """The allowed error of a linear map that was measured by running it, relative to its largest value."""
    is_tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return ROUNDINGS * (ROUNDING["tf32"] if is_tf32 else torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Readout:
    """Logit difference = residual stream · direction + constant, where the final norm's scale is that of the run."""

    direction: Float[Tensor, "trial d_model"]
    """(W_U[right] - W_U[wrong]) through the frozen final norm, its mean-centring included; nats per unit."""

    constant: Float[Tensor, " trial"]
    """What the biases of the final norm and of the unembedding add, in nats."""

    def of(self, resid: Float[Tensor, "trial d_model"]) -> Float[Tensor, " trial"]:
        """The logit difference that these residual streams give, in nats."""
        return (resid.float() * self.direction).sum(-1) + self.constant


def readout(
    resident: ResidentModel, resid: Float[Tensor, "trial d_model"], answers: Int[Tensor, "trial answer"]
) -> Readout:
    """The readout of runs whose last layer left `resid`; `answers` are the right and the wrong token.

    Freezing the scale is what makes a head's contribution to the logits well defined (Elhage et al. 2021, A
    Mathematical Framework for Transformer Circuits; Wang et al. 2022, arXiv:2211.00593).  Raises `UserError` where the
    logits are no such product.
    """
    norm = _FrozenNorm.from_model(resident, resid)
    unembed = resident.model.get_output_embeddings()  # type: ignore[no-untyped-call]  # untyped in transformers
    weight, bias = unembed.weight, getattr(unembed, "bias", None)
    assert isinstance(weight, Tensor)
    right, wrong = weight[answers].float().unbind(1)
    constant = (right - wrong) @ norm.bias
    if bias is not None:
        constant = constant + bias[answers].float() @ constant.new_tensor([1.0, -1.0])
    result = Readout(norm.backward(right - wrong), constant)
    _refuse_other_logits(resident, result, resid, answers)
    return result


@dataclass(frozen=True)
class _FrozenNorm:
    """normed = gain · (resid - its mean, where the norm centres) / scale + bias."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    is_centred: bool

    scale: Float[Tensor, " trial"]
    """Up to a factor whose inverse is in `gain`."""

    @classmethod
    def from_model(cls, resident: ResidentModel, resid: Float[Tensor, "trial d_model"]) -> "_FrozenNorm":
        """Measured by running the model's norm, so that no table of module names is needed.

        norm(-x) = -(norm(x) - bias) + bias for LayerNorm and RMSNorm alike, so half the difference of norm(x) and
        norm(-x) is the norm without its bias, and their mean is the bias.  A vector of equal entries vanishes where the
        norm centres.  Raises `UserError` where what stands before the unembedding is neither of the two.
        """
        signs = torch.ones_like(resid[0])
        signs[1::2] = -1
        probes = torch.stack([resid, -resid], dim=1), torch.stack([signs, -signs, signs.abs()])[None]
        normed, normed_signs = (resident.before_unembedding(probe).float() for probe in probes)
        if normed.shape[2] != resid.shape[1]:
            raise UserError(
                f"{resident.architecture.name} projects its residual stream before it unembeds it; direct logit "
                f"attribution is not supported for it{WITHOUT_ATTRIBUTION}"
            )
        bias, unbiased = normed.mean((0, 1)), (normed[:, 0] - normed[:, 1]) / 2
        unbiased_signs = (normed_signs[0, 0] - normed_signs[0, 1]) / 2
        is_centred = bool((normed_signs[0, 2] - bias).abs().max() < unbiased_signs.abs().max() / 2)
        gain = unbiased_signs / _centred(signs.float(), is_centred)
        unscaled = gain * _centred(resid.float(), is_centred)
        # The least-squares scale; the check below refuses a norm that no scale describes.
        scale = (unscaled**2).sum(1) / (unscaled * unbiased).sum(1)
        allowed = rounding(resid.dtype) * normed.abs().max()
        if not (unscaled / scale[:, None] - unbiased).abs().max() <= allowed:
            raise UserError(
                f"{resident.architecture.name} ends in no LayerNorm and no RMSNorm; direct logit attribution is not "
                f"supported for it{WITHOUT_ATTRIBUTION}"
            )
        return cls(gain, bias, is_centred, scale)

    def backward(self, direction: Float[Tensor, "trial d_model"]) -> Float[Tensor, "trial d_model"]:
        """The direction in the residual stream whose product equals that of `direction` after the norm."""
        return _centred(direction * self.gain, self.is_centred) / self.scale[:, None]


def _centred(values: Tensor, is_centred: bool) -> Tensor:
    return values - values.mean(-1, keepdim=True) if is_centred else values


def _refuse_other_logits(resident: ResidentModel, result: Readout, resid: Tensor, answers: Tensor) -> None:
    """Raise `UserError` where the model's own logits are not what the readout gives."""
    logits = resident.answer_logits(resid[:, None], answers)[:, 0].float()
    terms = result.direction.abs().amax(1) * resid.float().abs().amax(1) + logits.abs().amax(1)
    allowed = rounding(resid.dtype) * terms
    if not ((result.of(resid) - logits[:, 0] + logits[:, 1]).abs() <= allowed).all():
        raise UserError(
            f"{resident.architecture.name} scales or caps its logits; direct logit attribution is not supported "
            f"for it{WITHOUT_ATTRIBUTION}"
        )
