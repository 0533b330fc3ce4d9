"""What scripts/bench.py times: the same patched runs by every tool, and the matrix products that they all need.

Every tool lives in a process of its own and is asked in turn, so that a noisy machine is noisy to all of them, one
tool's imports do not disturb another's, and each has a peak memory.
"""

import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from headlapse.engine.activations import Capture
from headlapse.engine.anatomy import dissect, read_config
from headlapse.engine.capture import capture
from headlapse.engine.checkpoints import TORCH_DTYPES, Skeleton, read_weights
from headlapse.engine.layout import CONFIG, config_file, weight_files
from headlapse.engine.machine import peak_memory
from headlapse.engine.peers import PEERS, Condition
from headlapse.engine.replay import replay, runs_at_once, waves
from headlapse.engine.sources import Files
from headlapse.engine.study import Dtype
from headlapse.engine.subsets import parse_subsets
from headlapse.engine.tasks import Contrast, Trials, align

OURS = "headlapse"

SHAPES = {
    "pythia-14m": (6, 128, 4),
    "pythia-70m": (6, 512, 8),
    "pythia-160m": (12, 768, 12),
    "pythia-410m": (24, 1024, 16),
    "pythia-1b": (16, 2048, 8),
    "pythia-1.4b": (24, 2048, 16),
    "pythia-2.8b": (32, 2560, 32),
}
"""Layers, d_model, heads."""

N_VOCAB = 50_304


@dataclass(frozen=True)
class Workload:
    """Patched runs: every subset of the words at every one of the layers."""

    name: str
    layers: tuple[int, ...]
    words: tuple[str, ...]

    def mask(self, n_heads: int) -> Bool[np.ndarray, "subset head"]:
        return parse_subsets(self.words, n_heads).mask

    def conditions(self, n_heads: int) -> list[Condition]:
        return list(product(self.layers, self.mask(n_heads)))


@dataclass(frozen=True)
class Timing:
    """What one tool took for one workload."""

    seconds: float
    """The fastest of so many goes."""

    goes: int
    values: Float[np.ndarray, "condition trial"] | None = None
    """Logit differences in nats."""

    every: int = 1
    """One in so many conditions was timed; the others are reckoned in."""

    floor: float | None = None
    """Seconds of the matrix products alone, on the same shapes with the same weights."""

    flops: float | None = None
    """Floating-point operations of these matrix products."""

    peak: int = 0
    """Bytes."""


def workloads(n_layers: int) -> dict[str, Workload]:
    """What is timed, by the word that asks for it."""
    every, middle = tuple(range(n_layers)), (n_layers // 2,)
    return {
        "parity": Workload("even and odd, every layer", every, ("even", "odd")),
        "each": Workload("each head, every layer", every, ("each",)),
        "splits": Workload("all balanced splits, one layer", middle, ("balanced",)),
        "lattice": Workload("all subsets, one layer", middle, ("lattice",)),
    }


def pythia_config(shape: str) -> GPTNeoXConfig:
    n_layers, d_model, n_heads = SHAPES[shape]
    return GPTNeoXConfig(
        vocab_size=N_VOCAB,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=4 * d_model,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
    )


def write_random(shape: str, directory: Path, dtype: Dtype, seed: int = 0) -> None:
    """A checkpoint of random weights, drawn as GPT-NeoX's are, where there is none."""
    if (directory / CONFIG).exists():
        return
    config = pythia_config(shape)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in names.items():
        drawn = torch.empty(like.shape).normal_(0, 0.02, generator=draw)
        gain = "norm.weight" in name or "layernorm.weight" in name
        weights[name] = (1 + drawn if gain else drawn).to(TORCH_DTYPES[dtype])
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)


def some_trials(n_trials: int, clean: int, corrupt: int, seed: int = 0) -> Trials:
    """Random prompts of `clean` and `corrupt` tokens."""
    draw = np.random.default_rng(seed)
    length = np.array([[clean] * n_trials, [corrupt] * n_trials])
    tokens = draw.integers(2, 50_000, (2, n_trials, max(clean, corrupt)))
    tokens[np.arange(tokens.shape[2]) >= length[..., None]] = 0
    answers = draw.permuted(np.tile(np.arange(2, 50_000), (n_trials, 1)), axis=1)[:, :2]
    contrasts = tuple(Contrast(str(n), str(n), "right", "wrong", f"random {n}") for n in range(n_trials))
    return Trials(tokens, length, answers, tokens.astype(str), contrasts, notes=())


class Contestant:
    """One tool in a process of its own."""

    def __init__(self, tool: str, directory: Path, trials: Trials, dtype: Dtype, device: str) -> None:
        self.tool = tool
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._process.submit(_prepare, tool, directory, trials, dtype, device).result()

    def patch(self, workload: Workload, sample: int | None = None) -> Timing:
        """Time the workload's patched runs; of a slow tool a sample, as if it had done all."""
        return self._process.submit(_time_patch, workload, sample).result()

    def capture(self) -> Timing:
        return self._process.submit(_time_capture).result()

    def load(self) -> Timing:
        return self._process.submit(_time_load).result()

    def close(self) -> None:
        self._process.shutdown()


class _Ours:
    """headlapse, with the same face as its peers."""

    name = OURS

    def __init__(self, skeleton: Skeleton, trials: Trials) -> None:
        self.skeleton, self.alignment = skeleton, align(trials, "last")
        self.activations: Capture = self.capture(trials)

    def capture(self, trials: Trials) -> Capture:
        return capture(self.skeleton, trials, 2**33)

    def patch(self, trials: Trials, conditions: Sequence[Condition]) -> Float[np.ndarray, "condition trial"]:
        """Conditions come layer by layer, with the same subsets at each."""
        layers = dict.fromkeys(layer for layer, _ in conditions)
        mask = np.array([heads for _, heads in conditions[: len(conditions) // len(layers)]])
        sites = [(layer,) for layer in layers]
        found = replay(self.skeleton, self.activations, trials, self.alignment, "denoise", sites, mask)
        return found.reshape(-1, trials.n_trials)


@dataclass(frozen=True)
class _Bench:
    """What a contestant's process holds."""

    tool: Any
    n_heads: int
    directory: Path
    trials: Trials
    dtype: Dtype
    device: str


_here: _Bench


def _prepare(tool: str, directory: Path, trials: Trials, dtype: Dtype, device: str) -> None:
    global _here
    n_heads = dissect(read_config(directory)).n_heads
    _here = _Bench(_tool(tool, directory, trials, dtype, device), n_heads, directory, trials, dtype, device)


def _tool(tool: str, directory: Path, trials: Trials, dtype: Dtype, device: str) -> Any:
    if tool == OURS:
        return _Ours(_dressed(directory, dtype, device), trials)
    return PEERS[tool](_stock(directory, dtype, device))


def _dressed(directory: Path, dtype: Dtype, device: str) -> Skeleton:
    skeleton = Skeleton(read_config(directory), TORCH_DTYPES[dtype], device)
    skeleton.wear(read_weights(_files(directory), TORCH_DTYPES[dtype], device))
    return skeleton


def _files(directory: Path) -> Files:
    return Files(directory, weight_files(directory), config_file(directory), sha256={}, commit=None)


def _stock(directory: Path, dtype: Dtype, device: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=TORCH_DTYPES[dtype], local_files_only=True)
    stock: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return stock


def _time_patch(workload: Workload, sample: int | None) -> Timing:
    tool, trials = _here.tool, _here.trials
    conditions = workload.conditions(_here.n_heads)
    if tool.name != OURS:
        every = max(1, len(conditions) // sample) if sample else 1
        chosen = conditions[::every]
        timing = _fastest(lambda: tool.patch(trials, chosen))
        return replace(timing, seconds=timing.seconds * len(conditions) / len(chosen), every=every)
    for layer in workload.layers:  # what is learned once per architecture: whether heads add up
        tool.patch(trials, [(layer, conditions[0][1])])
    timing = _fastest(lambda: tool.patch(trials, conditions))
    floor, flops = _floor(tool.skeleton, workload, trials)
    return replace(timing, floor=floor, flops=flops)


def _time_capture() -> Timing:
    return replace(_fastest(lambda: _here.tool.capture(_here.trials)), values=None)


def _time_load() -> Timing:
    """A checkpoint's weights into a resident model, or a model anew where the tool cannot do that."""
    if _here.tool.name == OURS:
        dtype = TORCH_DTYPES[_here.dtype]
        files = _files(_here.directory)
        return _fastest(lambda: _here.tool.skeleton.wear(read_weights(files, dtype, _here.device)))
    return _fastest(lambda: _stock(_here.directory, _here.dtype, _here.device))


def _fastest(work: Callable[[], Any], goes: int = 5, enough: float = 10.0) -> Timing:
    """The fastest of `goes`, or of as many as begin within `enough` seconds."""
    taken: list[float] = []
    while len(taken) < goes and sum(taken) < enough:
        started = time.perf_counter()
        values = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    kept = values if isinstance(values, np.ndarray) else None
    return Timing(min(taken), len(taken), kept, peak=peak_memory(_here.device))


@torch.inference_mode()
def _floor(skeleton: Skeleton, workload: Workload, trials: Trials) -> tuple[float, float]:
    """Seconds and operations of the replay's matrix products alone: the same modules on as many rows as often.

    Those of the layers after the patch, at the patched position; attention and the unembedding are left out.
    """
    modules = [module for module in skeleton.layer_modules()[0].modules() if isinstance(module, nn.Linear | Conv1D)]
    counts = _row_counts(skeleton, workload, trials.n_trials)
    n_in = {module: module.weight.shape[0 if isinstance(module, Conv1D) else 1] for module in modules}
    rows = {n: torch.randn(max(counts), n, device=skeleton.device).to(skeleton.dtype) for n in n_in.values()}

    def multiply() -> None:
        for n_rows, times in counts.items():
            for _ in range(times):
                for module in modules:
                    module(rows[n_in[module]][:n_rows])

    flops = sum(2 * n_rows * times * module.weight.numel() for n_rows, times in counts.items() for module in modules)
    return _fastest(multiply).seconds, float(flops)


def _row_counts(skeleton: Skeleton, workload: Workload, n_trials: int) -> Counter[int]:
    """How many rows go through a layer together, and how often."""
    sites = [(layer,) for layer in workload.layers]
    counts: Counter[int] = Counter()
    for wave in waves(sites, len(workload.mask(skeleton.anatomy.n_heads)), runs_at_once(skeleton, n_trials)):
        for layer in range(skeleton.anatomy.n_layers):
            counts[n_trials * sum(group.n_runs for group in wave if group.site[0] < layer)] += 1
            if not skeleton.heads_add_up.get(layer):
                counts.update(n_trials * group.n_runs for group in wave if group.site[0] == layer)
    del counts[0]
    return counts


def installed() -> list[str]:
    """Every tool that can be imported here."""
    packages = {"lens": "transformer_lens", "nnsight": "nnsight"}
    return [OURS, *(tool for tool in PEERS if find_spec(packages.get(tool.partition("-")[0], "torch")))]


def machine(device: str, dtype: Dtype) -> str:
    """Hardware, dtype and versions, to stand beside every number."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return f"{name}, {dtype}, torch {torch.__version__}, transformers {version('transformers')}"


def tables(contestants: Mapping[str, Contestant], shape: str, words: Sequence[str], sample: int) -> Iterator[str]:
    """A table per workload, as soon as all tools are through with it."""
    known = workloads(SHAPES[shape][0])
    for word in words:
        peers = word != "lattice"  # they would take a quarter of an hour
        timings = {
            tool: contestant.patch(known[word], sample or None)
            for tool, contestant in contestants.items()
            if peers or tool == OURS
        }
        n = len(known[word].conditions(SHAPES[shape][2]))
        yield f"{known[word].name}: {n} conditions\n{_table(timings)}"
    yield f"capture of all prompts\n{_table({tool: one.capture() for tool, one in contestants.items()})}"
    yield f"loading a checkpoint\n{_table({tool: one.load() for tool, one in contestants.items()})}"


def _table(timings: Mapping[str, Timing]) -> str:
    peers = {tool: timing.seconds for tool, timing in timings.items() if tool != OURS}
    best = min(peers.values(), default=None)
    like = next((timing for tool, timing in timings.items() if tool != OURS and timing.values is not None), None)
    rows = {tool: _row(timing, best, like) for tool, timing in timings.items()}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").to_string()


def _row(timing: Timing, best: float | None, like: Timing | None) -> dict[str, str]:
    row = {"seconds": f"{timing.seconds:.3f}", "of": f"{timing.goes} goes"}
    if best:
        row["faster than the best peer"] = f"{best / timing.seconds:.2f} x"
    if timing.floor and timing.flops:
        row["GFLOP/s"] = f"{timing.flops / timing.seconds / 1e9:.0f}"
        row["of matrix products alone"] = f"{timing.floor / timing.seconds:.0%}"
    if timing.every > 1:
        row["timed"] = f"1 in {timing.every}"
    row["peak memory"] = f"{timing.peak / 1e9:.1f} GB"
    if timing.values is not None and like is not None:
        row["largest difference"] = f"{np.abs(timing.values[:: like.every // timing.every] - like.values).max():.1e}"
    return row


def _processor() -> str:
    """The processor's name and how many threads torch uses."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
