"""Greedy texts of patched runs, many in one batch: token for token those of transformers' own `generate`.

The patch here is the published study's hook.  What it overwrites is what leaves an attention module, after the output
projection, cut into as many slices as there are heads.  These are not heads: each mixes all of them.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..checkpoints.hooks import collect_outputs, replace_outputs
from ..checkpoints.model import ResidentModel
from ..runtime.errors import UserError, VerificationError
from ..runtime.resources import as_many_as_fit

ROUNDINGS = {torch.float32: 64, torch.float16: 4, torch.bfloat16: 4}
"""Two logits that are closer than so many roundings of the largest one may change places with the shape of the batch.

Sums of 16-bit numbers are accumulated in float32 and rounded once, so that they rarely differ at all.
"""

SIDE_BY_SIDE = {"cpu": 64, "cuda": 512}
"""Texts generated at once, by kind of device."""

Tokens = tuple[int, ...]
Prompt = TypeVar("Prompt")


@dataclass(frozen=True)
class SlicePatch:
    """One text to generate: slices of a layer's attention output on the clean prompt are copied into the corrupt one's.

    The published study's patch; the slices are not heads.
    """

    clean: Tokens
    corrupt: Tokens
    layer: int

    slices: tuple[bool, ...]
    """Which are copied, of as many as there are heads."""


@dataclass(frozen=True)
class GeneratedTexts:
    """Greedy continuations of some prompts."""

    tokens: list[list[int]]
    """Prompt by prompt; ends with the end-of-text token where one came."""

    n_near: int
    """Texts with near-tied next tokens, which were therefore generated again by the reference."""


@torch.inference_mode()
def generate_slice_patched(
    resident: ResidentModel, patches: Sequence[SlicePatch], n_tokens: int, batch_size: int
) -> GeneratedTexts:
    """`n_tokens` greedy tokens of every patched run, `batch_size` of them side by side.

    Token for token what `reference_generate` gives.  Raises `UserError` beyond the model's context.
    """
    return generate_batched(
        resident,
        [patch.corrupt for patch in patches],
        lambda batch: _overwriting(resident, [patches[index] for index in batch]),
        lambda index: reference_generate(resident, patches[index], n_tokens),
        n_tokens,
        batch_size,
    )


def generate_batched(
    resident: ResidentModel,
    prompts: Sequence[Tokens],
    patching: Callable[[Sequence[int]], AbstractContextManager[None]],
    reference: Callable[[int], list[int]],
    n_tokens: int,
    batch_size: int,
) -> GeneratedTexts:
    """`n_tokens` greedy tokens after every prompt, `batch_size` of them side by side.

    `patching` puts the hooks of a batch of prompts, given by their indices, in place; `reference` generates one text
    by itself.  Prompts of one length share a batch, so that nothing is padded.  Where rounding could decide between
    two tokens, the reference does.  Raises `UserError` for texts that are longer than the model's context.
    """
    _refuse_beyond_context(resident, max(map(len, prompts)), n_tokens)
    stop = stop_tokens(resident)
    generated: dict[int, list[int]] = {}
    near: list[int] = []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with resident.stock("default"):
        for batch in _batches(order, prompts, batch_size):
            with patching(batch):
                tokens, is_near = _generate(resident, [prompts[index] for index in batch], n_tokens, stop)
            for index, text, doubtful in zip(batch, tokens.tolist(), is_near.tolist(), strict=True):
                generated[index] = _cut(text, stop)
                near += [index] if doubtful else []
    for index in near:
        generated[index] = reference(index)
    return GeneratedTexts([generated[index] for index in range(len(prompts))], len(near))


def generate_distinct(
    resident: ResidentModel, prompts: Sequence[Prompt], generate: Callable[[list[Prompt], int], GeneratedTexts]
) -> GeneratedTexts:
    """What `generate` makes of all the prompts: equal ones once, as many side by side as the device has room for."""
    distinct = list(dict.fromkeys(prompts))
    batch_size = min(len(distinct), SIDE_BY_SIDE.get(torch.device(resident.device).type, SIDE_BY_SIDE["cpu"]))
    texts = as_many_as_fit(lambda size: generate(distinct, size), batch_size)
    place = {prompt: index for index, prompt in enumerate(distinct)}
    return GeneratedTexts([texts.tokens[place[prompt]] for prompt in prompts], texts.n_near)


@torch.inference_mode()
def reference_generate(resident: ResidentModel, patch: SlicePatch, n_tokens: int) -> list[int]:
    """The same as the study does it: transformers' own `generate`, one prompt, a hook on the attention module."""
    with resident.stock("default") as model:
        attention = {patch.layer: model.get_submodule(resident.architecture.out_proj[patch.layer].rpartition(".")[0])}
        with collect_outputs(attention) as clean:
            model(one_row(resident, patch.clean), use_cache=False, logits_to_keep=1)
        source = clean[patch.layer]
        width = resident.architecture.d_model // len(patch.slices)

        def overwrite(_layer: int, output: Tensor) -> Tensor:
            patched = output.clone()
            n_shared = min(patched.shape[1], source.shape[1])
            for index, is_copied in enumerate(patch.slices):
                if is_copied:
                    columns = slice(index * width, (index + 1) * width)
                    patched[:, :n_shared, columns] = source[:, :n_shared, columns]
            return patched

        with replace_outputs(attention, overwrite):
            return stock_generate(resident, patch.corrupt, n_tokens)


def stock_generate(resident: ResidentModel, prompt: Tokens, n_tokens: int) -> list[int]:
    """What transformers' own greedy `generate` makes of one prompt, under whatever hooks are in place."""
    row, model = one_row(resident, prompt), cast(Any, resident.model)
    options = {"max_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(
        row, attention_mask=torch.ones_like(row), eos_token_id=stop_tokens(resident) or None, **options
    )
    return [int(token) for token in tokens[0, len(prompt) :]]


def stop_tokens(resident: ResidentModel) -> list[int]:
    """The tokens that end a text, as the checkpoint names them."""
    named = cast(Any, resident.model).generation_config.eos_token_id
    return [] if named is None else list(named) if isinstance(named, list) else [int(named)]


def one_row(resident: ResidentModel, tokens: Tokens) -> Int[Tensor, "one token"]:
    """A batch of one prompt, on the model's device."""
    return torch.tensor([tokens], device=resident.device)


def padded(texts: Sequence[Sequence[int]], n_tokens: int) -> Int[np.ndarray, "text token"]:
    """Texts of different lengths as one array, -1 after the end."""
    tokens = np.full((len(texts), n_tokens), -1, dtype=np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens


def require_same_text(tokens: list[int], expected: list[int], label: str) -> None:
    """Raise `VerificationError` when a text that was generated in a batch is not the reference's."""
    if tokens != expected:
        raise VerificationError(
            f"{label}: in a batch the tokens are {tokens}, by transformers' own generate {expected}; headlapse does "
            "not compute this architecture rightly"
        )


def _refuse_beyond_context(resident: ResidentModel, longest: int, n_tokens: int) -> None:
    context = resident.architecture.context
    if longest + n_tokens > context:
        raise UserError(
            f"{n_tokens} tokens after a prompt of {longest} are more than the model's context of {context} holds; "
            "cache shorter prompts, or generate fewer tokens"
        )


def _batches(order: Sequence[int], prompts: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Up to `batch_size` prompts at a time, of equal length each time."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or len(prompts[batch[0]]) != len(prompts[index])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generate(
    resident: ResidentModel, prompts: Sequence[Tokens], n_tokens: int, stop: Sequence[int]
) -> tuple[Int[Tensor, "prompt token"], Bool[Tensor, " prompt"]]:
    """The batch's tokens, and which prompts had near-tied next tokens before their end."""
    model: Any = resident.model
    device = resident.device
    inputs = torch.tensor(prompts, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    is_near, tokens, cache = ended.clone(), [], None
    cache_name = _cache_keyword(model)
    ends = torch.tensor(stop, dtype=torch.long, device=device)
    for _ in range(n_tokens):
        output = model(inputs, **{cache_name: cache}, use_cache=True, logits_to_keep=1)
        cache, logits = output[cache_name], output.logits[:, -1].float()
        token, (best, second) = logits.argmax(1), logits.topk(2).values.unbind(1)
        is_near |= ~ended & (best - second <= _rounding_bound(resident, logits))
        tokens.append(token)
        ended |= torch.isin(token, ends)
        if bool(ended.all()):
            break
        inputs = token[:, None]
    return torch.stack(tokens, dim=1), is_near


def _cache_keyword(model: nn.Module) -> str:
    """What this model calls its keys and values: transformers renamed `past_key_values` to `cache` in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _rounding_bound(resident: ResidentModel, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
    return ROUNDINGS[resident.dtype] * torch.finfo(resident.dtype).eps * logits.abs().amax(1)


@contextmanager
def _overwriting(resident: ResidentModel, patches: Sequence[SlicePatch]) -> Iterator[None]:
    """Every patch's slices are overwritten at its layer while the body runs, position by position from the start.

    The hook fires at every forward: at a decoding step there is one position, and the clean prompt's first one goes in.
    """
    rows: dict[int, list[int]] = {}
    for row, patch in enumerate(patches):
        if any(patch.slices):
            rows.setdefault(patch.layer, []).append(row)
    projections = resident.output_projections(rows)
    outputs = _clean_outputs(resident, patches, projections)
    overwrites = {
        layer: _Overwrite(torch.tensor(rows[layer]), [patches[row] for row in rows[layer]], outputs, resident)
        for layer in rows
    }
    with replace_outputs(projections, lambda layer, output: overwrites[layer](output)):
        yield


class _Overwrite:
    """What one layer's output becomes, in the rows of a batch that are patched there."""

    def __init__(
        self,
        rows: Tensor,
        patches: Sequence[SlicePatch],
        outputs: dict[Tokens, dict[int, Tensor]],
        resident: ResidentModel,
    ) -> None:
        self.rows = rows.to(resident.device)
        sources = [outputs[patch.clean][patch.layer] for patch in patches]
        self.length = torch.tensor([len(source) for source in sources], device=resident.device)
        self.source = nn.utils.rnn.pad_sequence(sources, batch_first=True)
        slices = torch.tensor([patch.slices for patch in patches], device=resident.device)
        d_model, n_slices = self.source.shape[2], slices.shape[1]
        # Coordinates beyond the last whole slice belong to none.
        within = slices.repeat_interleave(d_model // n_slices, dim=1)
        self.coordinates = nn.functional.pad(within, (0, d_model - within.shape[1]))

    def __call__(self, output: Tensor) -> Tensor:
        n_shared = min(output.shape[1], self.source.shape[1])
        patched = output.clone()
        own = patched[self.rows, :n_shared]
        is_shared = torch.arange(n_shared, device=output.device) < self.length[:, None]
        is_copied = is_shared[:, :, None] & self.coordinates[:, None]
        patched[self.rows, :n_shared] = torch.where(is_copied, self.source[:, :n_shared], own)
        return patched


def _clean_outputs(
    resident: ResidentModel, patches: Sequence[SlicePatch], projections: dict[int, nn.Module]
) -> dict[Tokens, dict[int, Float[Tensor, "position d_model"]]]:
    """What leaves each of the output projections on every clean prompt that is copied from, run by itself."""
    model: Any = resident.model
    outputs: dict[Tokens, dict[int, Tensor]] = {}
    for clean in dict.fromkeys(patch.clean for patch in patches if any(patch.slices)):
        with collect_outputs(projections) as collected:
            model(one_row(resident, clean), use_cache=False, logits_to_keep=1)
        outputs[clean] = {layer: output[0] for layer, output in collected.items()}
    return outputs


def _cut(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Up to and with the first token that ends a text."""
    end = next((index for index, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: end + 1]
