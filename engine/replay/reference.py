"""The reference: patched runs computed the slow way, with stock attention, plain hooks and no cache."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checkpoints.hooks import collect_inputs, replace_inputs
from ..checkpoints.model import ResidentModel
from ..runtime.errors import VerificationError
from ..study.alignment import Alignment
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from .patch_inputs import Site, source_and_target


def choose_pairs(label: str, sites: Sequence[Site], n_subsets: int, n_pairs: int, seed: int) -> list[tuple[int, int]]:
    """Random (site, subset) indices to verify: the same ones for the same checkpoint and seed."""
    draw = np.random.default_rng([seed, *label.encode(), len(sites), n_subsets])
    places = draw.choice(len(sites) * n_subsets, size=min(n_pairs, len(sites) * n_subsets), replace=False)
    return [divmod(int(place), n_subsets) for place in sorted(places)]


def choose_trials(label: str, n_trials: int, n_chosen: int, seed: int) -> list[int]:
    """Random trials to verify on, ascending, at most `n_chosen`: the same ones for the same checkpoint and seed."""
    draw = np.random.default_rng([seed, *label.encode(), n_trials])
    return sorted(draw.choice(n_trials, size=min(n_chosen, n_trials), replace=False).tolist())


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
    n_heads = resident.architecture.n_heads
    with resident.stock():
        projections = resident.output_projections({layer for site, _ in patches for layer in site})
        with collect_inputs(projections) as source_z:
            stock_logits(resident, trials, source, read)

        def run(site: Site, heads: Bool[np.ndarray, " head"]) -> Float[Tensor, "trial *more"]:
            def patch(layer: int, z: Tensor) -> Tensor:
                return _patched(z, source_z[layer], alignment, (source, target), heads, n_heads)

            with replace_inputs(resident.output_projections(site), patch):
                return reading(stock_logits(resident, trials, target, read))

        return torch.stack([run(site, heads) for site, heads in patches])


def _patched(
    z: Float[Tensor, "trial position width"],
    source_z: Float[Tensor, "trial position width"],
    alignment: Alignment,
    source_and_target: tuple[int, int],
    heads: Bool[np.ndarray, " head"],
    n_heads: int,
) -> Float[Tensor, "trial position width"]:
    """z in which the named heads' values at the aligned positions are those of the source run."""
    out_of, into = (alignment.positions[run] for run in source_and_target)
    patched, source = (torch.unflatten(values, -1, (n_heads, -1)) for values in (z.clone(), source_z))
    for trial, is_valid in enumerate(alignment.valid):
        for head in np.flatnonzero(heads):
            patched[trial, into[trial, is_valid], head] = source[trial, out_of[trial, is_valid], head]
    return patched.flatten(-2)


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
    """Logits of each prompt of a run at the positions `read`, by the model with whatever attention and hooks it has."""
    arrays = (trials.tokens, trials.length, read)
    tokens, length, positions = (torch.from_numpy(x[run]).to(resident.device) for x in arrays)
    is_token = torch.arange(tokens.shape[1], device=resident.device) < length[:, None]
    needed, which = torch.unique(positions, return_inverse=True)
    logits: Tensor = resident.model(
        tokens, attention_mask=is_token.long(), use_cache=False, logits_to_keep=needed
    ).logits
    return logits[torch.arange(len(tokens), device=resident.device)[:, None], which]
