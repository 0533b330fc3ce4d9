"""What is timed: random weights of Pythia's shapes, in the files that a trained checkpoint has, and random prompts."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from ..checkpoints.demo import make_tokenizer
from ..checkpoints.files import CONFIG
from ..checkpoints.revisions import STUDY
from ..checkpoints.weights import TORCH_DTYPES
from ..runtime.errors import UserError
from ..study.prompts import Trials
from ..study.study import Arithmetic
from ..study.tasks.contrast import Contrast

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


def pythia_config(shape: str) -> GPTNeoXConfig:
    """The config of one of Pythia's shapes.  Raises `UserError` for any other."""
    if shape not in SHAPES:
        raise UserError(f"--shape {shape}: not a known shape; known are {', '.join(SHAPES)}")
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


def write_random(shape: str, directory: Path, dtype: Arithmetic, seed: int = 0) -> None:
    """Write a checkpoint of random weights, initialised as GPT-NeoX's are, unless `directory` holds one."""
    if (directory / CONFIG).exists():
        return
    _write(pythia_config(shape), directory, dtype, seed)


def write_tiny(directory: Path, seed: int) -> None:
    """Write a checkpoint that computes next to nothing: two layers of eight heads, 64 wide, with a small vocabulary."""
    config = pythia_config("pythia-14m")
    config.num_hidden_layers, config.num_attention_heads, config.hidden_size = 2, 8, 64
    config.intermediate_size, config.vocab_size = 128, 512
    _write(config, directory, "float32", seed)


def _write(config: GPTNeoXConfig, directory: Path, dtype: Arithmetic, seed: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # untyped in transformers
        parameters = model.state_dict()
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in parameters.items():
        drawn = torch.empty(parameter.shape).normal_(0, 0.02, generator=draw)
        gain = "norm.weight" in name or "layernorm.weight" in name
        weights[name] = (1 + drawn if gain else drawn).to(TORCH_DTYPES[dtype])
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(directory)
    config.save_pretrained(directory)


def write_series(shape: str, directory: Path) -> None:
    """Write float16 checkpoints at the steps of the published study; its `main` is named by its step."""
    for seed, step in enumerate(STUDY):
        write_random(shape, directory / f"step{step}", "float16", seed)


def some_trials(n_trials: int, clean: int, corrupt: int, seed: int = 0) -> Trials:
    """Random prompts of `clean` and `corrupt` tokens, each with two different answer tokens."""
    draw = np.random.default_rng(seed)
    length = np.array([[clean] * n_trials, [corrupt] * n_trials])
    tokens = draw.integers(2, 50_000, (2, n_trials, max(clean, corrupt)))
    tokens[np.arange(tokens.shape[2]) >= length[..., None]] = 0
    answers = draw.permuted(np.tile(np.arange(2, 50_000), (n_trials, 1)), axis=1)[:, :2]
    contrasts = tuple(Contrast(str(n), str(n), "right", "wrong", f"random {n}") for n in range(n_trials))
    return Trials(tokens, length, answers, tokens.astype(str), contrasts, notes=())
