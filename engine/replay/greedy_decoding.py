"""Greedy texts of patched runs, many in one batch: token for token those of transformers' own `generate`.

The patch here is the published study's hook.  What it overwrites is what leaves an attention module, after the output
projection, cut into as many slices as there are heads.  These are not heads: each mixes all of them.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..checkpoints.model import ResidentModel
from ..runtime.errors import UserError
from ..runtime.resources import as_many_as_fit

ROUNDINGS = {torch.float32: 64, torch.float16: 4, torch.bfloat16: 4}
"""Two logits that are closer than so many roundings of the largest one may change places with the shape of the batch.

AdditiveLayer of 16-bit numbers are kept in float32 and rounded once, so that they rarely differ at all.
"""

SIDE_BY_SIDE = {"cpu": 64, "cuda": 512}
"""Texts generated at once, by kind of device."""

Tokens = tuple[int, ...]
Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Condition:
    """One text to generate: slices of what a layer's attention leaves on the clean prompt are copied into another."""

    clean: Tokens
    corrupt: Tokens
    layer: int

    slices: tuple[bool, ...]
    """Which are copied, of as many as there are heads."""


@dataclass(frozen=True)
class Texts:
    """What was generated."""

    tokens: list[list[int]]
    """Condition by condition; ends with the end-of-text token where one came."""

    n_near: int
    """Conditions with two next tokens as good as equal, which were generated again by definition."""


@torch.inference_mode()
def generate(resident: ResidentModel, conditions: Sequence[Condition], n_tokens: int, most: int) -> Texts:
    """`n_tokens` greedy tokens for every condition, `most` of them side by side.

    Token for token what `reference_generate` gives.
    """
    return generate_patched(
        resident,
        [condition.corrupt for condition in conditions],
        lambda batch: _overwriting(resident, [conditions[index] for index in batch]),
        lambda index: reference_generate(resident, conditions[index], n_tokens),
        n_tokens,
        most,
    )


def generate_patched(
    resident: ResidentModel,
    prompts: Sequence[Tokens],
    patching: Callable[[Sequence[int]], AbstractContextManager[None]],
    define: Callable[[int], list[int]],
    n_tokens: int,
    most: int,
) -> Texts:
    """`n_tokens` greedy tokens after every prompt, `most` of them side by side.

    `patching` puts the hooks of a batch of prompts, given by their indices, in place; `define` makes one text by
    definition.  Prompts of one length share a batch, so that nothing is padded.  Where rounding could decide between
    two tokens, the definition does.  Raises `UserError` for texts that are longer than the model's context.
    """
    _refuse_beyond_context(resident, max(map(len, prompts)), n_tokens)
    stop = stop_tokens(resident)
    found: dict[int, list[int]] = {}
    near = []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with resident.stock("default"):
        for batch in _batches(order, prompts, most):
            with patching(batch):
                tokens, is_near = _generate(resident, [prompts[index] for index in batch], n_tokens, stop)
            for index, row, doubtful in zip(batch, tokens.tolist(), is_near.tolist(), strict=True):
                found[index] = _cut(row, stop)
                near += [index] if doubtful else []
    for index in near:
        found[index] = define(index)
    return Texts([found[index] for index in range(len(prompts))], len(near))


def generate_once(resident: ResidentModel, asked: Sequence[Asked], make: Callable[[list[Asked], int], Texts]) -> Texts:
    """What `make` generates for all that is asked: equal ones once, as many side by side as the device holds."""
    distinct = list(dict.fromkeys(asked))
    most = min(len(distinct), SIDE_BY_SIDE.get(torch.device(resident.device).type, SIDE_BY_SIDE["cpu"]))
    made = as_many_as_fit(lambda size: make(distinct, size), most)
    place = {one: index for index, one in enumerate(distinct)}
    return Texts([made.tokens[place[one]] for one in asked], made.n_near)


@torch.inference_mode()
def reference_generate(resident: ResidentModel, condition: Condition, n_tokens: int) -> list[int]:
    """The same as the study does it: transformers' own `generate`, one prompt, a hook on the attention module."""
    with resident.stock("default") as model:
        attention = model.get_submodule(resident.architecture.out_proj[condition.layer].rpartition(".")[0])
        heard: list[Tensor] = []
        with _hooked(attention, heard.append):
            model(row_of(resident, condition.clean), use_cache=False, logits_to_keep=1)
        width = resident.architecture.d_model // len(condition.slices)

        def overwrite(output: Tensor) -> Tensor:
            patched = output.clone()
            n_shared = min(patched.shape[1], heard[0].shape[1])
            for one, is_copied in enumerate(condition.slices):
                if is_copied:
                    at = slice(one * width, (one + 1) * width)
                    patched[:, :n_shared, at] = heard[0][:, :n_shared, at]
            return patched

        with _hooked(attention, overwrite):
            return stock_generate(resident, condition.corrupt, n_tokens)


def stock_generate(resident: ResidentModel, prompt: Tokens, n_tokens: int) -> list[int]:
    """What transformers' own greedy `generate` makes of one prompt, under whatever hooks are in place."""
    row, model = row_of(resident, prompt), cast(Any, resident.model)
    wanted = {"max_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    made = model.generate(
        row, attention_mask=torch.ones_like(row), eos_token_id=stop_tokens(resident) or None, **wanted
    )
    return [int(token) for token in made[0, len(prompt) :]]


def stop_tokens(resident: ResidentModel) -> list[int]:
    """The tokens that end a text, as the checkpoint names them."""
    named = cast(Any, resident.model).generation_config.eos_token_id
    return [] if named is None else list(named) if isinstance(named, list) else [int(named)]


def _refuse_beyond_context(resident: ResidentModel, longest: int, n_tokens: int) -> None:
    context = resident.architecture.context
    if longest + n_tokens > context:
        raise UserError(
            f"{n_tokens} tokens after a prompt of {longest} are more than the model's context of {context} holds; "
            "cache shorter prompts, or generate fewer tokens"
        )


def _batches(order: Sequence[int], prompts: Sequence[Tokens], most: int) -> Iterator[list[int]]:
    """At most so many prompts at a time, of equal length each time."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == most or len(prompts[batch[0]]) != len(prompts[index])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generate(
    resident: ResidentModel, prompts: Sequence[Tokens], n_tokens: int, stop: Sequence[int]
) -> tuple[Int[Tensor, "prompt token"], Bool[Tensor, " prompt"]]:
    """The batch's tokens, and who had two next tokens as good as equal before its end."""
    model: Any = resident.model
    device = resident.device
    tokens = torch.tensor(prompts, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    is_near, made, cache = ended.clone(), [], None
    cache_name = _cache_keyword(model)
    ends = torch.tensor(stop, dtype=torch.long, device=device)
    for _ in range(n_tokens):
        output = model(tokens, **{cache_name: cache}, use_cache=True, logits_to_keep=1)
        cache, logits = output[cache_name], output.logits[:, -1].float()
        token, (best, second) = logits.argmax(1), logits.topk(2).values.unbind(1)
        is_near |= ~ended & (best - second <= _bound(resident, logits))
        made.append(token)
        ended |= torch.isin(token, ends)
        if bool(ended.all()):
            break
        tokens = token[:, None]
    return torch.stack(made, dim=1), is_near


def _cache_keyword(model: nn.Module) -> str:
    """What this model calls its keys and values: transformers renamed `past_key_values` to `cache` in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _bound(resident: ResidentModel, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
    return ROUNDINGS[resident.dtype] * torch.finfo(resident.dtype).eps * logits.abs().amax(1)


@contextmanager
def _overwriting(resident: ResidentModel, conditions: Sequence[Condition]) -> Iterator[None]:
    """Every condition's slices are overwritten at its layer while the body runs, position by position from the start.

    The hook fires at every forward: at a decoding step there is one position, and the clean prompt's first one goes in.
    """
    by_layer: dict[int, list[int]] = {}
    for row, condition in enumerate(conditions):
        if any(condition.slices):
            by_layer.setdefault(condition.layer, []).append(row)
    with ExitStack() as stack:
        kept = _outputs(resident, conditions, list(by_layer))
        for layer, rows in by_layer.items():
            module = resident.model.get_submodule(resident.architecture.out_proj[layer])
            hook = _Overwrite(torch.tensor(rows), [conditions[row] for row in rows], kept[layer], resident)
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class _Overwrite:
    """The hook of one layer on the rows of a batch that are patched there."""

    def __init__(
        self, rows: Tensor, conditions: Sequence[Condition], kept: dict[Tokens, Tensor], resident: ResidentModel
    ):
        self.rows = rows.to(resident.device)
        sources = [kept[condition.clean] for condition in conditions]
        self.length = torch.tensor([len(source) for source in sources], device=resident.device)
        self.source = nn.utils.rnn.pad_sequence(sources, batch_first=True)
        slices = torch.tensor([condition.slices for condition in conditions], device=resident.device)
        d_model, n_slices = self.source.shape[2], slices.shape[1]
        # Coordinates beyond the last whole slice belong to none.
        within = slices.repeat_interleave(d_model // n_slices, dim=1)
        self.coordinates = nn.functional.pad(within, (0, d_model - within.shape[1]))

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        n_shared = min(output.shape[1], self.source.shape[1])
        patched = output.clone()
        mine = patched[self.rows, :n_shared]
        shared = torch.arange(n_shared, device=output.device) < self.length[:, None]
        chosen = shared[:, :, None] & self.coordinates[:, None]
        patched[self.rows, :n_shared] = torch.where(chosen, self.source[:, :n_shared], mine)
        return patched


def _outputs(
    resident: ResidentModel, conditions: Sequence[Condition], layers: Sequence[int]
) -> dict[int, dict[Tokens, Tensor]]:
    """What leaves each layer's output projection on every clean prompt, run by itself: (position, d_model)."""
    kept: dict[int, dict[Tokens, Tensor]] = {layer: {} for layer in layers}
    model: Any = resident.model

    def keep(layer: int, clean: Tokens):
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            kept[layer][clean] = output[0]

        return hook

    for clean in dict.fromkeys(condition.clean for condition in conditions):
        with ExitStack() as stack:
            for layer in layers:
                module = model.get_submodule(resident.architecture.out_proj[layer])
                stack.callback(module.register_forward_hook(keep(layer, clean)).remove)
            model(row_of(resident, clean), use_cache=False, logits_to_keep=1)
    return kept


def row_of(resident: ResidentModel, tokens: Tokens) -> Int[Tensor, "one token"]:
    return torch.tensor([tokens], device=resident.device)


@contextmanager
def _hooked(attention: nn.Module, see: Any) -> Iterator[None]:
    """What an attention module returns goes through `see`, whose answer, where it gives one, takes its place."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        told = see(output[0] if isinstance(output, tuple) else output)
        if told is None:
            return output
        return (told, *output[1:]) if isinstance(output, tuple) else told

    handle = attention.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _cut(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Up to and with the first token that ends a text."""
    end = next((at for at, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: end + 1]
