"""The tools used today for the same work, each as its documentation recommends: what scripts/bench.py times.

Every tool does the same: z of the listed heads at the clean prompt's last token is written over the corrupt prompt's,
at one layer, and the logit difference is read at the corrupt prompt's last token; all trials go through in one
right-padded batch.  None keeps gradients or a key/value cache, the clean prompts are run once, and the unembedding is
applied at last tokens only (`logits_to_keep`, which all of them hand through to transformers).

Optional packages: `transformer-lens>=4.3,<5` and `nnsight>=0.8,<0.9`, imported only where they are used.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoints.architecture import Architecture, inspect_architecture
from ..checkpoints.hooks import collect_inputs, collect_outputs, hook_inputs, hook_outputs
from ..study.prompts import Trials
from ..study.study import RUNS

Condition = tuple[int, Bool[np.ndarray, " head"]]
"""A layer and the heads that are patched in it."""

SEVERAL = 12
"""Conditions per forward of the tools that run several at once."""


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
    distinct: Int[Tensor, " distinct"]
    """The distinct last positions, where logits are computed."""
    read: Int[Tensor, " row"]
    """Each prompt's index among the distinct positions."""

    @classmethod
    def of(cls, tokens: Int[np.ndarray, "row position"], length: Int[np.ndarray, " row"], device: Any) -> "_Prompts":
        tokens = tokens[:, : length.max()]
        real = np.arange(tokens.shape[1]) < length[:, None]
        distinct, read = np.unique(length - 1, return_inverse=True)
        arrays = (tokens, real.astype(np.int64), length - 1, distinct, read)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def repeated(self, times: int) -> "_Prompts":
        """All prompts once, then all prompts again."""
        tokens, real = (x.repeat(times, 1) for x in (self.tokens, self.real))
        return _Prompts(tokens, real, self.last.repeat(times), self.distinct, self.read.repeat(times))


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
        """Logits of one forward of so many patched runs: (condition * trial, distinct, vocab)."""

    @torch.inference_mode()
    def capture(self, trials: Trials) -> list[Float[Tensor, "run trial position head head_dim"]]:
        both = trials.tokens.reshape(-1, trials.tokens.shape[-1]), trials.length.reshape(-1)
        read = self.read(_Prompts.of(*both, self.device))
        return [torch.unflatten(_by_head(z, self.architecture.n_heads), 0, (len(RUNS), -1)) for z in read]

    @torch.inference_mode()
    def patch(self, trials: Trials, conditions: Sequence[Condition]) -> Float[np.ndarray, "condition trial"]:
        prompts = zip(trials.tokens, trials.length, strict=True)
        clean, corrupt = (_Prompts.of(tokens, length, self.device) for tokens, length in prompts)
        trial = torch.arange(trials.n_trials, device=self.device)
        source = [_by_head(z, self.architecture.n_heads)[trial, clean.last] for z in self.read(clean)]
        right, wrong = torch.from_numpy(trials.answer_tokens).to(self.device).T
        logit_diffs = []
        for first in range(0, len(conditions), self.together):
            some = conditions[first : first + self.together]
            logits = torch.unflatten(self.logits(corrupt, some, source), 0, (len(some), -1))
            logit_diffs.append(logits[:, trial, corrupt.read, right] - logits[:, trial, corrupt.read, wrong])
        return torch.cat(logit_diffs).float().cpu().numpy()

    def _place(self, layer: int, z: Tensor, last: Tensor, conditions: Sequence[Condition], source: Tensor) -> None:
        """Write source z (trial, head, head_dim) where a condition patches this layer, in place.

        Every architecture makes a new tensor of z for W_O alone, so nothing else sees the change.
        """
        runs = torch.unflatten(_by_head(z, self.architecture.n_heads), 0, (len(conditions), -1))
        trial = torch.arange(len(source), device=z.device)
        for run, (patched, heads) in zip(runs, conditions, strict=True):
            if patched == layer:
                chosen = torch.from_numpy(heads).to(z.device)[:, None]
                run[trial, last] = torch.where(chosen, source, run[trial, last])


class Hooks(_Tool):
    """Plain transformers with hooks on the output projections' inputs."""

    def __init__(self, model: PreTrainedModel, together: int = 1) -> None:
        super().__init__("transformers hooks", model, together)
        self.model = _with_shared_weights(model)
        self.projections = [self.model.get_submodule(path) for path in self.architecture.out_proj]

    def read(self, prompts: _Prompts) -> list[Tensor]:
        with collect_inputs(dict(enumerate(self.projections))) as z:
            self.model(prompts.tokens, attention_mask=prompts.real, use_cache=False, logits_to_keep=1)
        return [z[layer] for layer in range(len(self.projections))]

    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        def write(layer: int, inputs: tuple[Any, ...]) -> None:
            self._place(layer, inputs[0], corrupt.last, conditions, source[layer])

        rows = corrupt.repeated(len(conditions))
        with hook_inputs({layer: self.projections[layer] for layer, _ in conditions}, write):
            logits: Tensor = self.model(
                rows.tokens, attention_mask=rows.real, use_cache=False, logits_to_keep=corrupt.distinct
            ).logits
        return logits


class Lens(_Tool):
    """TransformerLens 4: a `TransformerBridge` around the model, without weight processing."""

    def __init__(self, model: PreTrainedModel, together: int = 1) -> None:
        from transformer_lens.model_bridge.sources import build_bridge_from_module  # pyright: ignore[reportMissingImports], optional

        super().__init__("TransformerLens", model, together)
        # What `boot_transformers(hf_model=...)` does, but that needs a tokenizer.
        copied = _with_shared_weights(model)
        self.bridge = build_bridge_from_module(copied, type(model).__name__, hf_config=copied.config)
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
        def write(layer: int) -> Callable[..., Tensor]:
            def hook(z: Tensor, hook: Any) -> Tensor:
                self._place(layer, z, corrupt.last, conditions, source[layer])
                return z

            return hook

        rows = corrupt.repeated(len(conditions))
        hooks = [(self.z_names[layer], write(layer)) for layer in {layer for layer, _ in conditions}]
        logits: Tensor = self.bridge.run_with_hooks(
            rows.tokens, fwd_hooks=hooks, attention_mask=rows.real, use_cache=False, logits_to_keep=corrupt.distinct
        )
        return logits


class NNsight(_Tool):
    """nnsight, one trace per condition.  (`together` is for the subclass.)

    nnsight runs the bodies of the `with` blocks itself, beside the model's forward; names that they bind come back
    only when saved.
    """

    def __init__(self, model: PreTrainedModel, together: int = 1) -> None:
        # Importing it gives every object in the process a method `save`.
        import nnsight  # pyright: ignore[reportMissingImports], optional

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
        self.model = Batching(_with_shared_weights(model))
        self.projections = [self.model.get(path) for path in self.architecture.out_proj]
        self.save = nnsight.save

    def read(self, prompts: _Prompts) -> list[Tensor]:
        with self.model.trace(prompts.tokens, attention_mask=prompts.real, use_cache=False, logits_to_keep=1):
            z: list[Tensor] = self.save([projection.input for projection in self.projections])
        return z

    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        ((layer, _heads),) = conditions
        with self.model.trace(
            corrupt.tokens, attention_mask=corrupt.real, use_cache=False, logits_to_keep=corrupt.distinct
        ):
            self._place(layer, self.projections[layer].input, corrupt.last, conditions, source[layer])
            logits: Tensor = self.save(self.model.output.logits)
        return logits


class NNsightInvokes(NNsight):
    """nnsight, several conditions as so many invokes of one trace."""

    def __init__(self, model: PreTrainedModel, together: int = SEVERAL) -> None:
        super().__init__(model, together)

    def logits(self, corrupt: _Prompts, conditions: Sequence[Condition], source: list[Tensor]) -> Tensor:
        with self.model.trace(use_cache=False, logits_to_keep=corrupt.distinct) as tracer:
            for condition in conditions:
                with tracer.invoke(corrupt.tokens, attention_mask=corrupt.real):
                    layer = condition[0]
                    self._place(layer, self.projections[layer].input, corrupt.last, [condition], source[layer])
            with tracer.invoke():  # an invoke without input sees the rows of all the others
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
"""Every tool, with one condition a forward and with several; all share the model's weights, none changes the model."""


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
    clean prompt's first position is written into each generated token.  For timing only: its results mean little.
    """
    architecture = inspect_architecture(model.config)
    attention = model.get_submodule(architecture.out_proj[layer].rpartition(".")[0])
    clean, corrupt = (tokens[None].to(model.device) for tokens in (clean, corrupt))
    with collect_outputs({0: attention}) as outputs:
        model(clean, attention_mask=torch.ones_like(clean), use_cache=False, logits_to_keep=1)
    generations = []
    for slices in (range(0), range(0, architecture.n_heads, 2), range(1, architecture.n_heads, 2)):
        with _overwriting(attention, outputs[0], slices, architecture):
            generations.append([_generate(model, corrupt, n_tokens) for _ in range(n_trials)])
    return generations


def _generate(model: PreTrainedModel, prompt: Tensor, n_tokens: int) -> Tensor:
    generate: Any = model.generate  # from a mixin, which its type leaves out
    mask = torch.ones_like(prompt)
    output: Tensor = generate(prompt, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0)
    return output[0, prompt.shape[1] :]


@contextmanager
def _overwriting(
    attention: nn.Module, saved: Tensor, slices: Sequence[int], architecture: Architecture
) -> Iterator[None]:
    """Copy slices of a saved output, from the first position on, into all that the module returns."""

    def overwrite(_key: int, output: tuple[Any, ...]) -> tuple[Any, ...]:
        patched = _by_head(output[0].clone(), architecture.n_heads)
        shared = min(patched.shape[1], saved.shape[1])
        for index in slices:
            patched[:, :shared, index] = _by_head(saved, architecture.n_heads)[:, :shared, index]
        return (patched.flatten(2), *output[1:])

    with hook_outputs({0: attention} if slices else {}, overwrite):
        yield


def _by_head(z: Tensor, n_heads: int) -> Tensor:
    """(row, position, head, head_dim), a view: some tools split heads and some do not."""
    return z.view(*z.shape[:2], n_heads, -1)


def _with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """New modules over the same weights: some tools rebuild the modules that they are given."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
