"""What a patched run is, spelled out: a stock model, plain hooks, one trial and one condition at a time, no padding.

Slow and obvious on purpose, and built on nothing of ours but the trials: the definition that everything fast is held
against.  A patched run is a forward pass over the target's own prompt in which, at the named layers, the input of the
output projection (z) of the named heads is overwritten at the aligned positions with what it was in the source run.
`denoise` has source clean and target corrupt; `noise` the reverse.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headlapse.engine.study.prompts import Trials

Direction = Literal["denoise", "noise"]
Z = dict[int, Tensor]
"""Layer -> z (position, head, head_dim)."""

CLEAN, CORRUPT = 0, 1

OUTPUT_PROJECTION = {
    "cohere": "model.layers.{}.self_attn.o_proj",
    "gemma2": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "granite": "model.layers.{}.self_attn.o_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
    "mistral": "model.layers.{}.self_attn.o_proj",
    "olmo": "model.layers.{}.self_attn.o_proj",
    "olmo2": "model.layers.{}.self_attn.o_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "phi": "model.layers.{}.self_attn.dense",
    "qwen2": "model.layers.{}.self_attn.o_proj",
    "qwen3": "model.layers.{}.self_attn.o_proj",
}


@contextmanager
def before_output_projection(
    model: PreTrainedModel, hooks: dict[int, Callable[[Tensor], Tensor | None]]
) -> Iterator[None]:
    """While the body runs, show each named layer's z (batch, position, head, head_dim) and take what is returned."""
    n_heads = model.config.num_attention_heads
    path = OUTPUT_PROJECTION[model.config.model_type]

    def hook_of(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor] | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            changed = hooks[layer](args[0].unflatten(-1, (n_heads, -1)))
            return None if changed is None else (changed.flatten(-2),)

        return hook

    handles = [model.get_submodule(path.format(layer)).register_forward_pre_hook(hook_of(layer)) for layer in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompt(trials: Trials, run: int, trial: int) -> Tensor:
    return torch.tensor(trials.tokens[run, trial, : trials.length[run, trial]])


def last_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits after the last token of each row (batch, position): (batch, vocab)."""
    assert model.config._attn_implementation == "eager" and not model.training
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, -1]


def source_z(model: PreTrainedModel, tokens: Tensor) -> Z:
    """z of every layer, of one prompt run by itself."""
    z: Z = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def hook(found: Tensor) -> None:
            z[layer] = found[0].clone()

        return hook

    with before_output_projection(model, {layer: keep(layer) for layer in range(model.config.num_hidden_layers)}):
        last_logits(model, tokens[None])
    return z


_FOUND: WeakKeyDictionary[PreTrainedModel, dict[bytes, Z]] = WeakKeyDictionary()


def source_z_once(model: PreTrainedModel, tokens: Tensor) -> Z:
    """`source_z`, run once for the same weights and prompt: patched runs that differ in their heads share it."""
    digest = hashlib.blake2b(tokens.numpy().tobytes())
    for held in model.state_dict().values():
        digest.update(held.contiguous().flatten().view(torch.uint8).numpy())
    found = _FOUND.setdefault(model, {})
    key = digest.digest()
    if key not in found:
        found[key] = source_z(model, tokens)
    return found[key]


def aligned(positions: str, source_length: int, target_length: int) -> list[tuple[int, int]]:
    """Pairs of (source, target) position: `last`, `end:K` counted from the end, `all`."""
    if positions == "last":
        return [(source_length - 1, target_length - 1)]
    if positions == "all":
        assert source_length == target_length
        return [(position, position) for position in range(target_length)]
    k = int(positions.removeprefix("end:"))
    assert 1 <= k <= min(source_length, target_length)
    return [(source_length - back, target_length - back) for back in range(k, 0, -1)]


def patched_logits(
    model: PreTrainedModel,
    tokens: Tensor,
    z: Z,
    pairs: list[tuple[int, int]],
    layers: Collection[int],
    heads: Collection[int],
) -> Tensor:
    """Logits (vocab,) after the last of `tokens`, run with z of the heads written in at the paired positions."""

    def write(layer: int) -> Callable[[Tensor], Tensor]:
        def hook(found: Tensor) -> Tensor:
            changed = found.clone()
            for source, target in pairs:
                for head in heads:
                    changed[0, target, head] = z[layer][source, head]
            return changed

        return hook

    with before_output_projection(model, {layer: write(layer) for layer in layers}):
        return last_logits(model, tokens[None])[0]


def logit_diff(
    model: PreTrainedModel,
    trials: Trials,
    positions: str,
    layers: Collection[int],
    heads: Collection[int],
    direction: Direction,
) -> np.ndarray:
    """Right minus wrong of the patched run, per trial."""
    source, target = (CLEAN, CORRUPT) if direction == "denoise" else (CORRUPT, CLEAN)
    found = []
    for trial in range(trials.n_trials):
        source_tokens, target_tokens = prompt(trials, source, trial), prompt(trials, target, trial)
        z = source_z_once(model, source_tokens)
        pairs = aligned(positions, len(source_tokens), len(target_tokens))
        logits = patched_logits(model, target_tokens, z, pairs, layers, heads)
        right, wrong = trials.answer_tokens[trial]
        found.append(float(logits[right] - logits[wrong]))
    return np.array(found)


def logit_diffs(
    model: PreTrainedModel,
    trials: Trials,
    positions: str,
    layers: Collection[int],
    mask: np.ndarray,
    direction: Direction,
) -> np.ndarray:
    """`logit_diff` of every row of `mask` (subset, head): (subset, trial).  The subsets of a trial run as one batch."""
    source, target = (CLEAN, CORRUPT) if direction == "denoise" else (CORRUPT, CLEAN)
    chosen = torch.tensor(mask)
    found = np.empty((len(mask), trials.n_trials))
    for trial in range(trials.n_trials):
        source_tokens, target_tokens = prompt(trials, source, trial), prompt(trials, target, trial)
        z = source_z_once(model, source_tokens)
        pairs = aligned(positions, len(source_tokens), len(target_tokens))

        def write(layer: int, z: Z = z, pairs: list[tuple[int, int]] = pairs) -> Callable[[Tensor], Tensor]:
            def hook(found: Tensor) -> Tensor:
                changed = found.clone()
                for source, target in pairs:
                    changed[:, target] = torch.where(chosen[:, :, None], z[layer][source], found[:, target])
                return changed

            return hook

        with before_output_projection(model, {layer: write(layer) for layer in layers}):
            logits = last_logits(model, target_tokens.expand(len(mask), -1))
        right, wrong = trials.answer_tokens[trial]
        found[:, trial] = (logits[:, right] - logits[:, wrong]).numpy()
    return found


def answer_logits(model: PreTrainedModel, trials: Trials) -> np.ndarray:
    """Logits of the right and the wrong answer in the unpatched runs: (run, trial, answer)."""
    found = np.empty((2, trials.n_trials, 2))
    for run in (CLEAN, CORRUPT):
        for trial in range(trials.n_trials):
            logits = last_logits(model, prompt(trials, run, trial)[None])[0]
            found[run, trial] = logits[torch.tensor(trials.answer_tokens[trial])].numpy()
    return found


def run_logit_diff(model: PreTrainedModel, trials: Trials) -> np.ndarray:
    """Right minus wrong of the unpatched runs: (run, trial)."""
    logits = answer_logits(model, trials)
    return logits[..., 0] - logits[..., 1]
