"""The tools used today for the same work, each as its documentation recommends: what scripts/bench.py times.

Everybody does the same: z of the listed heads at the clean prompt's last token is written over the corrupt prompt's,
at one layer, and the logit difference is read at the corrupt prompt's last token; all trials go through in one
right-padded batch.  Nobody keeps gradients or a key/value cache, the clean prompts are run once, and the unembedding is
applied at last tokens only (`logits_to_keep`, which all of them hand through to transformers).

Optional packages: `transformer-lens>=4.3,<5` and `nnsight>=0.8,<0.9`, imported only by whoever asks for them.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.architecture import Architecture, inspect_architecture
from ..study.prompts import Trials
from ..study.study import RUNS

Condition = tuple[int, Bool[np.ndarray, " head"]]
"""A layer and the heads that are patched in it."""

SEVERAL = 12
"""Conditions per forward where a tool is asked to take several."""


class Peer(Protocol):
    """A tool wrapped around one model in memory."""

    name: str

    def capture(self, trials: Trials) -> list[Float[Tensor, "run trial position head head_dim"]]:
        """z of every layer, for all clean and corrupt prompts."""

    def patch(self, trials: Trials, conditions: Sequence[Condition]) -> Float[np.ndarray, "condition trial"]:
        """Right minus wrong logit of the patched corrupt run, in nats."""


@dataclass(frozen=True)
class _Prompts:
    """Right-padded prompts on the device that computes."""

    tokens: Int[Tensor, "row position"]
    real: Int[Tensor, "row position"]
    """The attention mask."""
    last: Int[Tensor, " row"]
    """Each prompt's last position."""
    kept: Int[Tensor, " kept"]
    """The distinct last positions, where logits are made."""
    read: Int[Tensor, " row"]
    """Each prompt's place among the kept."""

    @classmethod
    def of(cls, tokens: Int[np.ndarray, "row position"], length: Int[np.ndarray, " row"], device: Any) -> "_Prompts":
        tokens = tokens[:, : length.max()]
        real = np.arange(tokens.shape[1]) < length[:, None]
        kept, read = np.unique(length - 1, return_inverse=True)
        arrays = (tokens, real.astype(np.int64), length - 1, kept, read)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def repeated(self, times: int) -> "_Prompts":
        """All prompts once, then all prompts again."""
        tokens, real = (x.repeat(times, 1) for x in (self.tokens, self.real))
        return _Prompts(tokens, real, self.last.repeat(times), self.kept, self.read.repeat(times))


class _Tool(ABC):
    """What the tools have in common: everything but how z is read and written."""

    def __init__(self, name: str, model: PreTrainedModel, together: int = 1) -> None:
        self.name = name if together == 1 else f"{name}, {together} conditions a forward"
        self.together = together
        self.device = model.device
        self.architecture = inspect_architecture(model.config)

    @abstractmethod
    def read(self, prompts: _Prompts) -> list[Tensor]:
        """z of every layer, (row, position, head * head_dim)."""

    @abstractmethod
    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        """Logits of one forward of so many patched runs: (condition * trial, kept, vocab)."""

    @torch.inference_mode()
    def capture(self, trials: Trials) -> list[Float[Tensor, "run trial position head head_dim"]]:
        both = trials.tokens.reshape(-1, trials.tokens.shape[-1]), trials.length.reshape(-1)
        read = self.read(_Prompts.of(*both, self.device))
        return [_by_head(z, self.architecture.n_heads).unflatten(0, (len(RUNS), -1)) for z in read]

    @torch.inference_mode()
    def patch(self, trials: Trials, conditions: Sequence[Condition]) -> Float[np.ndarray, "condition trial"]:
        prompts = zip(trials.tokens, trials.length, strict=True)
        clean, corrupt = (_Prompts.of(tokens, length, self.device) for tokens, length in prompts)
        trial = torch.arange(trials.n_trials, device=self.device)
        source = [_by_head(z, self.architecture.n_heads)[trial, clean.last] for z in self.read(clean)]
        right, wrong = torch.from_numpy(trials.answer_tokens).to(self.device).T
        found = []
        for first in range(0, len(conditions), self.together):
            some = conditions[first : first + self.together]
            logits = self.logits(corrupt, some, source).unflatten(0, (len(some), -1))
            found.append(logits[:, trial, corrupt.read, right] - logits[:, trial, corrupt.read, wrong])
        return torch.cat(found).float().cpu().numpy()

    def _place(self, layer: int, z: Tensor, last: Tensor, conditions: Sequence[Condition], source: Tensor) -> None:
        """Write source z (trial, head, head_dim) where a condition asks for it at this layer, in place.

        Every architecture makes z anew for W_O, so nobody else sees the change.
        """
        runs = _by_head(z, self.architecture.n_heads).unflatten(0, (len(conditions), -1))
        trial = torch.arange(len(source), device=z.device)
        for run, (patched, heads) in zip(runs, conditions, strict=True):
            if patched == layer:
                chosen = torch.from_numpy(heads).to(z.device)[:, None]
                run[trial, last] = torch.where(chosen, source, run[trial, last])


class Hooks(_Tool):
    """Plain transformers with hooks on the output projections' inputs."""

    def __init__(self, model: PreTrainedModel, together: int = 1) -> None:
        super().__init__("transformers hooks", model, together)
        self.model = _twin(model)
        self.projections = [self.model.get_submodule(path) for path in self.architecture.out_proj]

    def read(self, prompts: _Prompts) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])

        with ExitStack() as stack:
            for projection in self.projections:
                stack.callback(projection.register_forward_pre_hook(keep).remove)
            self.model(prompts.tokens, attention_mask=prompts.real, use_cache=False, logits_to_keep=1)
        return found

    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        def write(layer: int):
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                self._place(layer, args[0], corrupt.last, conditions, source[layer])

            return hook

        rows = corrupt.repeated(len(conditions))
        with ExitStack() as stack:
            for layer in {layer for layer, _ in conditions}:
                stack.callback(self.projections[layer].register_forward_pre_hook(write(layer)).remove)
            kept = corrupt.kept
            return self.model(rows.tokens, attention_mask=rows.real, use_cache=False, logits_to_keep=kept).logits


class Lens(_Tool):
    """TransformerLens 4: a `TransformerBridge` around the model, without weight processing."""

    def __init__(self, model: PreTrainedModel, together: int = 1) -> None:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        super().__init__("TransformerLens", model, together)
        # What `boot_transformers(hf_model=...)` does, but that needs a tokenizer.
        twin = _twin(model)
        self.bridge = build_bridge_from_module(twin, type(model).__name__, hf_config=twin.config)
        self.z_names = [f"blocks.{layer}.attn.hook_z" for layer in range(self.architecture.n_layers)]

    def read(self, prompts: _Prompts) -> list[Tensor]:
        # Without the explicit False, run_with_cache asks transformers for every attention pattern.
        _, cache = self.bridge.run_with_cache(
            prompts.tokens,
            names_filter=self.z_names,
            attention_mask=prompts.real,
            output_attentions=False,
            use_cache=False,
            logits_to_keep=1,
        )
        return [cache[name] for name in self.z_names]

    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        def write(layer: int):
            def hook(z: Tensor, hook: Any) -> Tensor:
                self._place(layer, z, corrupt.last, conditions, source[layer])
                return z

            return hook

        rows = corrupt.repeated(len(conditions))
        hooks = [(self.z_names[layer], write(layer)) for layer in {layer for layer, _ in conditions}]
        return self.bridge.run_with_hooks(
            rows.tokens, fwd_hooks=hooks, attention_mask=rows.real, use_cache=False, logits_to_keep=corrupt.kept
        )


class NNsight(_Tool):
    """nnsight, one trace per condition.  (`together` is for the subclass.)

    nnsight runs the bodies of the `with` blocks itself, beside the model's forward; names that they bind come back
    only when saved.
    """

    def __init__(self, model: PreTrainedModel, together: int = 1) -> None:
        # Importing it gives every object in the process a method `save`.
        import nnsight

        class Batching(nnsight.NNsight):  # type: ignore[misc]
            """How prompts of equal shape become one batch, as nnsight leaves to subclasses.

            Its own `TransformersModel` does it as well, but needs a tokenizer.
            """

            def _batch_size(self, *inputs: Any, **_kwargs: Any) -> int:
                return len(inputs[0]) if inputs else 0

            def _batch(self, invokes: list[tuple[Any, Any]], fn: Any) -> tuple[Any, Any]:
                tokens = torch.cat([inputs[0] for inputs, _ in invokes])
                real = torch.cat([kwargs["attention_mask"] for _, kwargs in invokes])
                return (tokens,), invokes[0][1] | {"attention_mask": real}

        super().__init__("nnsight", model, together)
        self.model = Batching(_twin(model))
        self.projections = [self.model.get(path) for path in self.architecture.out_proj]
        self.save = nnsight.save

    def read(self, prompts: _Prompts) -> list[Tensor]:
        with self.model.trace(prompts.tokens, attention_mask=prompts.real, use_cache=False, logits_to_keep=1):
            found: list[Tensor] = self.save([projection.input for projection in self.projections])
        return found

    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        ((layer, _heads),) = conditions
        kept = corrupt.kept
        with self.model.trace(corrupt.tokens, attention_mask=corrupt.real, use_cache=False, logits_to_keep=kept):
            self._place(layer, self.projections[layer].input, corrupt.last, conditions, source[layer])
            logits: Tensor = self.save(self.model.output.logits)
        return logits


class NNsightInvokes(NNsight):
    """nnsight, several conditions as so many invokes of one trace."""

    def __init__(self, model: PreTrainedModel, together: int = SEVERAL) -> None:
        super().__init__(model, together)

    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        with self.model.trace(use_cache=False, logits_to_keep=corrupt.kept) as tracer:
            for condition in conditions:
                with tracer.invoke(corrupt.tokens, attention_mask=corrupt.real):
                    layer = condition[0]
                    self._place(layer, self.projections[layer].input, corrupt.last, [condition], source[layer])
            with tracer.invoke():  # without an input it sees the rows of all
                logits: Tensor = self.save(self.model.output.logits)
        return logits


PEERS: dict[str, Callable[[PreTrainedModel], Peer]] = {
    "hooks": Hooks,
    "hooks-several": lambda model: Hooks(model, SEVERAL),
    "lens": Lens,
    "lens-several": lambda model: Lens(model, SEVERAL),
    "nnsight": NNsight,
    "nnsight-several": NNsightInvokes,
}
"""Every tool, one condition a forward and several; all share the weights of the model, none changes it."""


@torch.inference_mode()
def generate_published(
    model: PreTrainedModel,
    clean: Int[Tensor, " clean"],
    corrupt: Int[Tensor, " corrupt"],
    layer: int = 6,
    n_trials: int = 15,
    n_tokens: int = 20,
) -> list[list[Int[Tensor, " token"]]]:
    """The generations of the published study for one checkpoint, one by one: baseline, even, odd, trial by trial.

    As published: what is patched is the attention module's output, cut into as many slices as there are heads, which
    are not heads; positions are copied from the start, not aligned; and as the hook fires at every decoding step, the
    clean prompt's first position is written into each generated token.  To be timed, not to be believed.
    """
    architecture = inspect_architecture(model.config)
    attention = model.get_submodule(architecture.out_proj[layer].rpartition(".")[0])
    clean, corrupt = (tokens[None].to(model.device) for tokens in (clean, corrupt))
    with _listening(attention) as heard:
        model(clean, attention_mask=torch.ones_like(clean), use_cache=False, logits_to_keep=1)
    generations = []
    for slices in (range(0), range(0, architecture.n_heads, 2), range(1, architecture.n_heads, 2)):
        with _overwriting(attention, heard[0], slices, architecture):
            generations.append([_generate(model, corrupt, n_tokens) for _ in range(n_trials)])
    return generations


def _generate(model: PreTrainedModel, prompt: Tensor, n_tokens: int) -> Tensor:
    generate: Any = model.generate  # a mixin's, which the type does not tell
    mask = torch.ones_like(prompt)
    made: Tensor = generate(prompt, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
    return made[0, prompt.shape[1] :]


@contextmanager
def _listening(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what an attention module returns while the body runs."""
    heard: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _module, _args, output: heard.append(output[0]))
    try:
        yield heard
    finally:
        handle.remove()


@contextmanager
def _overwriting(
    attention: nn.Module, saved: Tensor, slices: Sequence[int], architecture: Architecture
) -> Iterator[None]:
    """Copy slices of a saved output, from the first position on, into all that the module returns."""

    def hook(_module: nn.Module, _args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        patched = _by_head(output[0].clone(), architecture.n_heads)
        shared = min(patched.shape[1], saved.shape[1])
        for one in slices:
            patched[:, :shared, one] = _by_head(saved, architecture.n_heads)[:, :shared, one]
        return (patched.flatten(2), *output[1:])

    handle = attention.register_forward_hook(hook) if slices else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _by_head(z: Tensor, n_heads: int) -> Tensor:
    """(row, position, head, head_dim), a view: some tools split heads and some do not."""
    return z.view(*z.shape[:2], n_heads, -1)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the same weights: tools rebuild the modules that they are given."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
