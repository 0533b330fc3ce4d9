"""The backstop: patched runs done again the slow way, with stock attention, plain hooks and no cache."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headlapse.engine.checkpoints import TORCH_DTYPES, Skeleton
from headlapse.engine.passes import Direction, Site, source_and_target
from headlapse.engine.study import Dtype, Inexact
from headlapse.engine.tasks import Alignment, Trials

TOLERANCE = 1e-4
"""Largest difference of a float32 logit difference, in nats, between replay and a full hooked forward."""


def tolerance(*dtypes: Dtype) -> float:
    """The largest difference allowed where the coarsest of `dtypes` rounds: as many roundings as in float32."""
    float32 = torch.finfo(torch.float32).eps
    return TOLERANCE * max(torch.finfo(TORCH_DTYPES[dtype]).eps / float32 for dtype in dtypes)


def choose_pairs(label: str, sites: Sequence[Site], n_subsets: int, n_pairs: int) -> list[tuple[int, int]]:
    """Random (site, subset) indices to verify; the same for the same checkpoint, whoever asks."""
    draw = np.random.default_rng([*label.encode(), len(sites), n_subsets])
    places = draw.choice(len(sites) * n_subsets, size=min(n_pairs, len(sites) * n_subsets), replace=False)
    return [divmod(int(place), n_subsets) for place in sorted(places)]


@torch.inference_mode()
def hooked_logit_diff(
    skeleton: Skeleton,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    site: Site,
    heads: Bool[np.ndarray, " head"],
) -> Float[np.ndarray, " trial"]:
    """One patched run by its definition: a full forward of stock transformers with a hook on W_O's input.

    The source run's z is taken from a full forward of its own, not from the store.
    """
    source, target = source_and_target(direction)
    with skeleton.stock() as model:
        projections = {layer: model.get_submodule(skeleton.anatomy.out_proj[layer]) for layer in site}
        with _reading(projections) as z:
            _logits(skeleton, trials, source)
        with _writing(
            projections, z, alignment.positions[target], alignment.positions[source], heads, skeleton.anatomy.n_heads
        ):
            logits = _logits(skeleton, trials, target)
    right, wrong = torch.from_numpy(trials.answer_tokens).to(skeleton.device).T
    trial = torch.arange(trials.n_trials, device=skeleton.device)
    return (logits[trial, right] - logits[trial, wrong]).float().cpu().numpy()


def require_exact(difference: float, allowed: float, where: str) -> None:
    """Raise `Inexact` when replay and the hooked forward are further apart than `allowed` (nats)."""
    if not difference <= allowed:
        raise Inexact(
            f"{where}: replay differs from a full hooked forward by {difference:.2g}, more than {allowed:.2g}; either "
            "the weights are not those that were cached (cache again with --overwrite) or headlapse does not compute "
            "this architecture rightly"
        )


def _logits(skeleton: Skeleton, trials: Trials, run: int) -> Float[Tensor, "trial vocab"]:
    """Logits at each prompt's last token."""
    tokens, length = (torch.from_numpy(x[run]).to(skeleton.device) for x in (trials.tokens, trials.length))
    real = torch.arange(tokens.shape[1], device=skeleton.device) < length[:, None]
    logits = skeleton.model(tokens, attention_mask=real.long(), use_cache=False).logits
    return logits[torch.arange(len(tokens), device=skeleton.device), length - 1]


@contextmanager
def _reading(projections: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collect the input of each projection while the body runs."""
    z: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            z[layer] = args[0].detach()

        return hook

    with ExitStack() as stack:
        for layer, module in projections.items():
            stack.callback(module.register_forward_pre_hook(keep(layer)).remove)
        yield z


@contextmanager
def _writing(
    projections: dict[int, nn.Module],
    source_z: dict[int, Tensor],
    into: np.ndarray,
    out_of: np.ndarray,
    heads: Bool[np.ndarray, " head"],
    n_heads: int,
) -> Iterator[None]:
    """Replace the named heads' z at the aligned positions of every projection's input while the body runs."""

    def patch(layer: int):
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            z = args[0].clone().unflatten(-1, (n_heads, -1))
            source = source_z[layer].unflatten(-1, (n_heads, -1))
            for trial in range(len(into)):
                for head in np.flatnonzero(heads):
                    z[trial, into[trial], head] = source[trial, out_of[trial], head]
            return (z.flatten(-2), *args[1:])

        return hook

    with ExitStack() as stack:
        for layer, module in projections.items():
            stack.callback(module.register_forward_pre_hook(patch(layer)).remove)
        yield
