"""One tool in a process of its own, timed on a piece of work.

Imports of one tool cannot disturb another, and each has a peak memory of its own.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..capture.forward import capture
from ..checkpoints.architecture import inspect_architecture, read_config
from ..checkpoints.files import Files, config_file, sha256, weight_files
from ..checkpoints.hashing import Hashing
from ..checkpoints.model import ResidentModel
from ..checkpoints.weights import Weights, read_weights
from ..replay.greedy_decoding import SlicePatch, generate_slice_patched
from ..replay.published_protocol import N_TOKENS
from ..replay.replay import replay, run_batches, runs_at_once
from ..runtime.errors import UserError
from ..runtime.resources import allow_tf32, peak_memory
from ..store.activations import Capture
from ..study.alignment import align
from ..study.prompts import Trials
from ..study.study import ARITHMETICS, Arithmetic
from ..study.subsets import parse_subsets
from .peers import PEERS, Condition, generate_published

Result = TypeVar("Result")

OURS = "headlapse"


@dataclass(frozen=True)
class Workload:
    """Patched runs: every subset that the words name, at every layer listed."""

    name: str
    layers: tuple[int, ...]
    words: tuple[str, ...]

    def mask(self, n_heads: int) -> Bool[np.ndarray, "subset head"]:
        return parse_subsets(self.words, n_heads).mask

    def conditions(self, n_heads: int) -> list[Condition]:
        return list(product(self.layers, self.mask(n_heads)))


@dataclass(frozen=True)
class Timing:
    """Time and memory of one tool for one piece of work."""

    seconds: float

    repeats: int = 1
    """How often the work was repeated; this is the fastest time."""

    values: Float[np.ndarray, "condition trial"] | None = None
    """Logit differences in nats."""

    every: int = 1
    """One in this many conditions was timed; `seconds` is scaled up to all of them."""

    share: float | None = None
    """Share of the time that the matrix products alone take, on the same shapes and weights: median over repeats."""

    flops: float | None = None
    """Floating-point operations of these matrix products."""

    peak: int = 0
    """Peak memory of the process so far, in bytes."""


def fastest(repeats: Sequence[Timing]) -> Timing:
    """The fastest repeat, with the median share and the largest peak of all."""
    best = min(repeats, key=lambda timing: timing.seconds)
    share = median(timing.share for timing in repeats if timing.share is not None) if best.share is not None else None
    return replace(best, repeats=len(repeats), share=share, peak=max(timing.peak for timing in repeats))


@dataclass(frozen=True)
class Tool:
    """A tool to time, and its arithmetic."""

    name: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, "float32" if self.dtype == "tf32" else self.dtype)
        return dtype

    @property
    def is_ours(self) -> bool:
        return self.name == OURS


def choose_tools(words: Sequence[str], dtype: Arithmetic) -> dict[str, Tool]:
    """Tools by name: `hooks`, or `headlapse@bfloat16` with an arithmetic of its own.

    Raises `UserError` for one that is not known or not installed.
    """
    tools = {}
    for word in words:
        name, _, own = word.partition("@")
        if name not in installed():
            raise UserError(f"--tools {word}: not a tool that is installed; there are {', '.join(installed())}")
        if own not in ("", "float64", *ARITHMETICS):
            raise UserError(f"--tools {word}: not an arithmetic; there are {', '.join(ARITHMETICS)} and float64")
        tools[word] = Tool(name, own or dtype)
    return tools


def installed() -> list[str]:
    """Every tool that can be imported here."""
    packages = {"lens": "transformer_lens", "nnsight": "nnsight"}
    return [OURS, *(tool for tool in PEERS if find_spec(packages.get(tool.partition("-")[0], "torch")))]


@contextmanager
def at_work(
    tools: Mapping[str, Tool], directory: Path, trials: Trials, device: str
) -> Iterator[dict[str, "Contestant"]]:
    """All tools ready, each in its own process, while the body runs."""
    with ExitStack() as stack:
        contestants = {}
        for word, tool in tools.items():
            contestants[word] = Contestant(tool, directory, trials, device)
            stack.callback(contestants[word].close)
        yield contestants


class Contestant:
    """A tool at work in a process of its own, on one checkpoint and the same prompts as all."""

    def __init__(self, tool: Tool, directory: Path, trials: Trials, device: str) -> None:
        self.tool = tool
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._do(_prepare, tool, directory, trials, device)

    def patch(self, workload: Workload, sample: int | None = None) -> Timing:
        """Time the workload's patched runs; of a slow tool a sample, scaled up."""
        return self._do(_time_patch, workload, sample)

    def capture(self) -> Timing:
        """Time one capture of z, for all prompts."""
        return self._do(_time_capture)

    def load(self) -> Timing:
        """Time loading a checkpoint from its files into the model."""
        return self._do(_time_load)

    def generate(self) -> Timing:
        """Time the published study's 45 generations."""
        return self._do(_time_generation)

    def close(self) -> None:
        self._process.shutdown()

    def _do(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return self._process.submit(work, *arguments).result()


class _Ours:
    """headlapse, behind the interface of its peers."""

    def __init__(self, resident: ResidentModel, trials: Trials) -> None:
        self.resident, self.alignment = resident, align(trials, "last")
        self.activations: Capture = self.capture(trials)

    def capture(self, trials: Trials) -> Capture:
        return capture(self.resident, trials, 2**33)

    def patch(self, trials: Trials, conditions: Sequence[Condition]) -> Float[np.ndarray, "condition trial"]:
        """Conditions come layer by layer, with the same subsets at each."""
        layers = dict.fromkeys(layer for layer, _ in conditions)
        mask = np.array([heads for _, heads in conditions[: len(conditions) // len(layers)]])
        sites = [(layer,) for layer in layers]
        logit_diff = replay(self.resident, self.activations, trials, self.alignment, "denoise", sites, mask)
        return logit_diff.reshape(-1, trials.n_trials)


@dataclass(frozen=True)
class _Here:
    """State of a contestant's process."""

    tool: Tool
    worker: Any
    n_heads: int
    directory: Path
    trials: Trials
    device: str


_here: _Here
_buffers: Weights = {}


def _prepare(tool: Tool, directory: Path, trials: Trials, device: str) -> None:
    global _here
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers
    allow_tf32(tool.dtype == "tf32")
    n_heads = inspect_architecture(read_config(directory)).n_heads
    worker: Any = (
        _Ours(_open_resident(directory, tool.torch_dtype, device), trials)
        if tool.is_ours
        else PEERS[tool.name](_stock(directory, tool.torch_dtype, device))
    )
    _here = _Here(tool, worker, n_heads, directory, trials, device)
    if tool.is_ours:  # what is learned once per architecture: whether heads add up
        worker.patch(
            trials, [(layer, np.ones(n_heads, dtype=bool)) for layer in range(worker.resident.architecture.n_layers)]
        )


def _open_resident(directory: Path, dtype: torch.dtype, device: str) -> ResidentModel:
    resident = ResidentModel(read_config(directory), dtype, device)
    resident.load_weights(read_weights(_files(directory), dtype, device))
    return resident


def _files(directory: Path) -> Files:
    return Files(directory, weight_files(directory), config_file(directory), Hashing((), sha256), commit=None)


def _stock(directory: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    stock: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return stock


def _time_patch(workload: Workload, sample: int | None) -> Timing:
    worker, trials = _here.worker, _here.trials
    conditions = workload.conditions(_here.n_heads)
    if not _here.tool.is_ours:
        every = max(1, len(conditions) // sample) if sample else 1
        chosen = conditions[::every]
        timing = _timed(lambda: worker.patch(trials, chosen))
        return replace(timing, seconds=timing.seconds * len(conditions) / len(chosen), every=every)
    timing = _timed(lambda: worker.patch(trials, conditions))
    multiply, flops = _products(worker.resident, workload, trials)
    return replace(timing, share=_timed(multiply).seconds / timing.seconds, flops=flops)


def _time_capture() -> Timing:
    timing = _timed(lambda: _here.worker.capture(_here.trials))
    if not _here.tool.is_ours:
        return timing
    with multiplying() as spent:
        _here.worker.capture(_here.trials)
    return replace(timing, share=spent.seconds / timing.seconds)


def _time_load() -> Timing:
    """A checkpoint's weights into a resident model, or a model anew where the tool cannot do that."""
    if _here.tool.is_ours:
        dtype, files = _here.tool.torch_dtype, _files(_here.directory)
        return _timed(lambda: _here.worker.resident.load_weights(read_weights(files, dtype, _here.device, _buffers)))
    return _timed(lambda: _stock(_here.directory, _here.tool.torch_dtype, _here.device))


def _time_generation() -> Timing:
    """The published study's texts; ours are its three conditions, as identical trials are one."""
    clean, corrupt = (_here.trials.tokens[run, 0, : _here.trials.length[run, 0]] for run in (0, 1))
    parity = [tuple(head % 2 == which for head in range(_here.n_heads)) for which in (0, 1)]
    if _here.tool.is_ours:
        layer = _here.worker.resident.architecture.n_layers // 2
        slices = [(False,) * _here.n_heads, *parity]
        patches = [SlicePatch(tuple(clean.tolist()), tuple(corrupt.tolist()), layer, each) for each in slices]
        return _timed(
            lambda: _rows(generate_slice_patched(_here.worker.resident, patches, N_TOKENS, len(patches)).tokens)
        )
    model, layer = _here.worker.model, len(_here.worker.projections) // 2
    prompts = torch.from_numpy(clean), torch.from_numpy(corrupt)
    return _timed(lambda: _rows([trials[0].tolist() for trials in generate_published(model, *prompts, layer)]))


def _rows(texts: Sequence[Sequence[int]]) -> Float[np.ndarray, "text token"]:
    """Token numbers padded with -1 to one width, for comparison."""
    return np.array([[*text, *[-1] * (N_TOKENS - len(text))] for text in texts], dtype=float)


def _timed(work: Callable[[], Any]) -> Timing:
    started = time.perf_counter()
    values = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return Timing(seconds, 1, values if isinstance(values, np.ndarray) else None, peak=peak_memory(_here.device))


LINEAR = (nn.Linear, Conv1D)


@dataclass
class Spent:
    """Seconds that went into linear layers."""

    seconds: float = 0.0


@contextmanager
def multiplying() -> Iterator[Spent]:
    """Add up, on a processor, what all linear layers take while the body runs."""
    spent, began = Spent(), [0.0]

    def before(module: nn.Module, _args: Any) -> None:
        began[0] = time.perf_counter()

    def after(module: nn.Module, _args: Any, _output: Any) -> None:
        if isinstance(module, LINEAR):
            spent.seconds += time.perf_counter() - began[0]

    with ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_pre_hook(before).remove)
        stack.callback(nn.modules.module.register_module_forward_hook(after).remove)
        yield spent


def _products(resident: ResidentModel, workload: Workload, trials: Trials) -> tuple[Callable[[], None], float]:
    """The replay's matrix products alone, and their operations: the same modules on as many rows as often.

    Those of the layers after the patch, at the patched position; attention and the unembedding are left out.
    """
    modules = [module for module in resident.layer_modules()[0].modules() if isinstance(module, LINEAR)]
    counts = _row_counts(resident, workload, trials.n_trials)
    n_in = {module: module.weight.shape[0 if isinstance(module, Conv1D) else 1] for module in modules}
    inputs = {n: torch.randn(max(counts), n, device=resident.device).to(resident.dtype) for n in n_in.values()}

    @torch.inference_mode()
    def multiply() -> None:
        for n_rows, times in counts.items():
            for _ in range(times):
                for module in modules:
                    module(inputs[n_in[module]][:n_rows])

    flops = sum(2 * n_rows * times * module.weight.numel() for n_rows, times in counts.items() for module in modules)
    return multiply, float(flops)


def _row_counts(resident: ResidentModel, workload: Workload, n_trials: int) -> Counter[int]:
    """How many rows go through a layer together, and how often."""
    sites = [(layer,) for layer in workload.layers]
    counts: Counter[int] = Counter()
    for batch in run_batches(
        sites, len(workload.mask(resident.architecture.n_heads)), runs_at_once(resident, n_trials)
    ):
        for layer in range(resident.architecture.n_layers):
            counts[n_trials * sum(group.n_runs for group in batch if group.site[0] < layer)] += 1
            if not resident.heads_add_up.get(layer):
                counts.update(n_trials * group.n_runs for group in batch if group.site[0] == layer)
    del counts[0]
    return counts
