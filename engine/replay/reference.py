"""The backstop: patched runs done again the slow way, with stock attention, plain hooks and no cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..checkpoints.model import ResidentModel
from ..runtime.errors import VerificationError
from ..study.alignment import Alignment
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from .patch_inputs import Site, source_and_target


def choose_pairs(label: str, sites: Sequence[Site], n_subsets: int, n_pairs: int) -> list[tuple[int, int]]:
    """Random (site, subset) indices to verify; the same for the same checkpoint, whoever asks."""
    draw = np.random.default_rng([*label.encode(), len(sites), n_subsets])
    places = draw.choice(len(sites) * n_subsets, size=min(n_pairs, len(sites) * n_subsets), replace=False)
    return [divmod(int(place), n_subsets) for place in sorted(places)]


def choose_trials(label: str, n_trials: int, most: int) -> list[int]:
    """Random trials to verify on, ascending; the same for the same checkpoint."""
    draw = np.random.default_rng([*label.encode(), n_trials])
    return sorted(draw.choice(n_trials, size=min(most, n_trials), replace=False).tolist())


def hooked_logit_diff(
    resident: ResidentModel,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    patches: Sequence[tuple[Site, Bool[np.ndarray, " head"]]],
) -> Float[np.ndarray, "patch trial"]:
    """Patched runs by their definition: a full forward of stock transformers each, with a hook on W_O's input.

    A patch is the layers and the heads that are patched.  The source run's z is taken from a full forward of its own,
    not from the store.
    """
    right, wrong = torch.from_numpy(trials.answer_tokens).to(resident.device).T
    trial = torch.arange(trials.n_trials, device=resident.device)

    def logit_diff(logits: Tensor) -> Tensor:
        return (logits[trial, 0, right] - logits[trial, 0, wrong]).float()

    last = trials.length[..., None] - 1
    return hooked(resident, trials, alignment, direction, patches, last, logit_diff).cpu().numpy()


@torch.inference_mode()
def hooked(
    resident: ResidentModel,
    trials: Trials,
    alignment: Alignment,
    direction: Direction,
    patches: Sequence[tuple[Site, Bool[np.ndarray, " head"]]],
    read: Int[np.ndarray, "run trial read"],
    reading: Callable[[Float[Tensor, "trial read vocab"]], Float[Tensor, "trial *more"]],
) -> Float[Tensor, "patch trial *more"]:
    """Whatever `reading` makes of the logits of such patched runs at the positions `read`."""
    source, target = source_and_target(direction)
    into, out_of = alignment.positions[target], alignment.positions[source]
    found = []
    with resident.stock() as model:
        layers = {layer for site, _ in patches for layer in site}
        projections = {layer: model.get_submodule(resident.architecture.out_proj[layer]) for layer in layers}
        with _reading(projections) as z:
            stock_logits(resident, trials, source, read)
        for site, heads in patches:
            patched = {layer: projections[layer] for layer in site}
            with _writing(patched, z, into, out_of, alignment.valid, heads, resident.architecture.n_heads):
                logits = stock_logits(resident, trials, target, read)
            found.append(reading(logits))
    return torch.stack(found)


def require_exact(difference: float, allowed: float, where: str) -> None:
    """Raise `VerificationError` when replay and the hooked forward are further apart than `allowed` (nats)."""
    if not difference <= allowed:
        raise VerificationError(
            f"{where}: replay differs from a full hooked forward by {difference:.2g}, more than {allowed:.2g}; either "
            "the weights are not those that were cached (cache again with --overwrite) or headlapse does not compute "
            "this architecture rightly"
        )


def stock_logits(
    resident: ResidentModel, trials: Trials, run: int, read: Int[np.ndarray, "run trial read"]
) -> Float[Tensor, "trial read vocab"]:
    """What the model, as it attends now, makes of each prompt of a run at the positions `read`."""
    arrays = (trials.tokens, trials.length, read)
    tokens, length, positions = (torch.from_numpy(x[run]).to(resident.device) for x in arrays)
    real = torch.arange(tokens.shape[1], device=resident.device) < length[:, None]
    kept, which = torch.unique(positions, return_inverse=True)
    logits = resident.model(tokens, attention_mask=real.long(), use_cache=False, logits_to_keep=kept).logits
    return logits[torch.arange(len(tokens), device=resident.device)[:, None], which]


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
    valid: Bool[np.ndarray, "trial patched"],
    heads: Bool[np.ndarray, " head"],
    n_heads: int,
) -> Iterator[None]:
    """Replace the named heads' z at the aligned positions of every projection's input while the body runs."""

    def patch(layer: int):
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            z = args[0].clone().unflatten(-1, (n_heads, -1))
            source = source_z[layer].unflatten(-1, (n_heads, -1))
            for trial, patched in enumerate(valid):
                for head in np.flatnonzero(heads):
                    z[trial, into[trial, patched], head] = source[trial, out_of[trial, patched], head]
            return (z.flatten(-2), *args[1:])

        return hook

    with ExitStack() as stack:
        for layer, module in projections.items():
            stack.callback(module.register_forward_pre_hook(patch(layer)).remove)
        yield
