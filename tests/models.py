"""Random tiny models of many architectures, their files on disk, a tokenizer and random trials: what tests run on.

Weights are drawn large and nothing is left at zero or one (biases, gains of the norms), so that attention is far
from uniform, logit differences are of order 1, and a forgotten bias or norm shows.
"""

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from headlapse.engine.study.prompts import Trials
from headlapse.engine.study.tasks.contrast import Contrast

VOCAB = 48
D_MODEL, D_MLP = 64, 96
N_LAYERS, N_HEADS, N_KV_HEADS = 3, 8, 2
CONTEXT = 64
WINDOW = 4
"""Of the sliding-window models: shorter than every random trial."""

EMBEDDING_STD, MATRIX_STD, VECTOR_STD = 1.0, 0.2, 0.2
"""What a column of 64 weights makes of a normed residual stream is then of order 1."""

Form = Literal["safetensors", "sharded-safetensors", "bin", "sharded-bin"]
Lengths = Literal["unequal", "paired", "equal"]
FORMS: tuple[Form, ...] = get_args(Form)
SHARD_BYTES = 100_000

SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SHAPE: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": CONTEXT,
}
GATED: dict[str, Any] = SHAPE | {"intermediate_size": D_MLP, "num_key_value_heads": N_KV_HEADS}
GPT2_SHAPE: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCAB,
    "n_embd": D_MODEL,
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "n_positions": CONTEXT,
    "n_inner": D_MLP,
}
GEMMA2_SHAPE: dict[str, Any] = GATED | {"head_dim": 8, "query_pre_attn_scalar": 8}
PARTIAL_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

MAIN: dict[str, Callable[[], PreTrainedConfig]] = {
    "neox-parallel": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=D_MLP, use_parallel_residual=True),
    "neox-sequential": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=D_MLP, use_parallel_residual=False),
    "gpt2": lambda: GPT2Config(**GPT2_SHAPE),
    "llama-gqa": lambda: LlamaConfig(**GATED),
}
"""The architectures of which exactness is promised by name."""

MORE: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-4-heads": lambda: LlamaConfig(**GATED | {"num_attention_heads": 4}),
    "gpt2-scaled-by-layer": lambda: GPT2Config(**GPT2_SHAPE, scale_attn_by_inverse_layer_idx=True),
    "qwen2": lambda: Qwen2Config(**GATED),
    # Its heads together are twice as wide as the residual stream, and queries and keys have norms of their own.
    "qwen3": lambda: Qwen3Config(**GATED, head_dim=16),
    "mistral": lambda: MistralConfig(**GATED, sliding_window=None),
    "opt": lambda: OPTConfig(**SHAPE | {"pad_token_id": 1}, ffn_dim=D_MLP),
    # As OPT-350m: norms after attention and MLP, embeddings narrower than the residual stream.
    "opt-350m": lambda: OPTConfig(
        **SHAPE | {"pad_token_id": 1}, ffn_dim=D_MLP, do_layer_norm_before=False, word_embed_proj_dim=32
    ),
    "phi": lambda: PhiConfig(**GATED, rope_parameters=PARTIAL_ROTARY),
    "olmo": lambda: OlmoConfig(**GATED, clip_qkv=2.0),
    # A norm stands between the output projection and the residual stream.
    "olmo2": lambda: Olmo2Config(**GATED),
    # Numbers multiply embeddings, attention scores, branches and logits.
    "granite": lambda: GraniteConfig(
        **GATED, embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=0.5
    ),
    "cohere": lambda: CohereConfig(**GATED, logit_scale=0.7),
    # Windows that no prompt of the tests fills; the one caps its logits, which are then no plain product.
    "mistral-wide-window": lambda: MistralConfig(**GATED, sliding_window=CONTEXT),
    "gemma2-capped-logits": lambda: Gemma2Config(
        **GEMMA2_SHAPE, attn_logit_softcapping=None, final_logit_softcapping=3.0, sliding_window=CONTEXT
    ),
}
"""Other turns that an architecture can take and that plain attention allows."""

REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma2-soft-capping": lambda: Gemma2Config(
        **GEMMA2_SHAPE, attn_logit_softcapping=2.0, final_logit_softcapping=None, sliding_window=CONTEXT
    ),
    "mistral-sliding-window": lambda: MistralConfig(**GATED, sliding_window=WINDOW),
    "gemma2-alternating-window": lambda: Gemma2Config(
        **GEMMA2_SHAPE, attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=WINDOW
    ),
    "gpt-neo-local": lambda: GPTNeoConfig(
        **SPECIAL,
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_layers=2,
        num_heads=N_HEADS,
        intermediate_size=D_MLP,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    "bloom-alibi": lambda: BloomConfig(
        **SPECIAL, vocab_size=VOCAB, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS
    ),
    "gpt-oss-sinks": lambda: GptOssConfig(
        **GATED,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
}
"""What plain attention over plain keys gets wrong: to be refused by name."""

CONFIGS = MAIN | MORE | REFUSED

LEARNED_POSITIONS = ("gpt2", "gpt2-scaled-by-layer", "opt", "opt-350m")


def tiny(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A stock model in float32 with eager attention; `changes` are fields of its config."""
    config = CONFIGS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    return randomised(config, seed)


def randomised(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    assert isinstance(model, PreTrainedModel)
    return redrawn(model, seed)


def redrawn(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same model with all of its weights drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    unembedding = model.get_output_embeddings().weight
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {unembedding}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = EMBEDDING_STD if parameter in embeddings else MATRIX_STD if parameter.ndim > 1 else VECTOR_STD
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + is_gain)
    return model


def save(
    model: PreTrainedModel,
    directory: Path,
    form: Form = "safetensors",
    tokenizer: PreTrainedTokenizerFast | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint in Hugging Face layout; `extra` are keys that a .bin carries besides its weights."""
    sharded = form.startswith("sharded")
    model.save_pretrained(directory, max_shard_size=SHARD_BYTES if sharded else "5GB")
    if form.endswith("bin"):
        _as_bin(directory, sharded, extra or {})
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def _as_bin(directory: Path, sharded: bool, extra: Mapping[str, Tensor]) -> None:
    """Replace what safetensors files hold by pickles under the names that older transformers gave them."""
    weights = dict(extra)
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    size = SHARD_BYTES if sharded else "5GB"
    shards = split_torch_state_dict_into_shards(
        weights, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=size
    )
    for name, keys in shards.filename_to_tensors.items():
        torch.save({key: weights[key] for key in keys}, directory / name)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def legacy_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The keys that Pythia's .bin files hold and no current GPT-NeoX has."""
    config = model.config
    buffers: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"gpt_neox.layers.{layer}.attention"
        buffers[f"{prefix}.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril().bool()
        buffers[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        buffers[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(1)
    return buffers


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, single digits and marks; a newline is a token, a space is none."""
    words = ("[UNK]", "\n", *"?:.,", *string.digits, "Which", "is", "bigger", "or", "Answer", "Q", "A")
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"\n|[0-9]|[^\sA-Za-z0-9]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def random_trials(
    n_trials: int = 3,
    seed: int = 0,
    lengths: Lengths = "unequal",
    shared_end: int = 0,
) -> Trials:
    """Trials of random tokens, at least 5 in each row, whose runs share their last `shared_end` tokens and no other.

    Lengths are all `unequal`, `paired` (equal between the runs of a trial only) or all `equal`.
    """
    rng = np.random.default_rng(seed)
    if lengths == "unequal":
        length = 5 + rng.permutation(2 * n_trials).reshape(2, n_trials)
    elif lengths == "paired":
        length = np.tile(5 + rng.permutation(n_trials), (2, 1))
    else:
        length = np.full((2, n_trials), 8)
    drawn_from = ((2, VOCAB // 2), (VOCAB // 2, VOCAB))
    rows = [[rng.integers(*drawn_from[run], n).tolist() for n in length[run]] for run in range(2)]
    for clean, corrupt in zip(*rows, strict=True):
        corrupt[len(corrupt) - shared_end :] = clean[len(clean) - shared_end :]
    answers = np.stack([rng.choice(np.arange(2, VOCAB), 2, replace=False) for _ in range(n_trials)])
    return trials_of(rows[0], rows[1], answers.tolist())


def trials_of(
    clean: Iterable[Iterable[int]], corrupt: Iterable[Iterable[int]], answers: Iterable[Sequence[int]]
) -> Trials:
    """Trials of the given token rows and (right, wrong) tokens."""
    rows = [[list(row) for row in run] for run in (clean, corrupt)]
    length = np.array([[len(row) for row in run] for run in rows])
    tokens = np.zeros((*length.shape, length.max()), dtype=np.int64)
    text = np.full(tokens.shape, "", dtype="<U8")
    for run, trial in np.ndindex(*length.shape):
        row = rows[run][trial]
        tokens[run, trial, : len(row)] = row
        text[run, trial, : len(row)] = [f" t{token}" for token in row]
    answer_tokens = np.array(list(answers), dtype=np.int64)
    contrasts = tuple(
        Contrast("".join(text[0, trial]), "".join(text[1, trial]), f" t{right}", f" t{wrong}", f"random {trial}")
        for trial, (right, wrong) in enumerate(answer_tokens)
    )
    return Trials(tokens, length, answer_tokens, text, contrasts, notes=())


def clean_to_clean(trials: Trials) -> Trials:
    """Both runs are the clean one."""
    tokens, length, text = (values[[0, 0]] for values in (trials.tokens, trials.length, trials.token_text))
    return replace(trials, tokens=tokens, length=length, token_text=text)


def swapped(trials: Trials) -> Trials:
    """Clean becomes corrupt and corrupt clean."""
    tokens, length, text = (values[::-1].copy() for values in (trials.tokens, trials.length, trials.token_text))
    return replace(trials, tokens=tokens, length=length, token_text=text)


def all_subsets(n_heads: int) -> np.ndarray:
    """Every subset of the heads as boolean rows: none first, all last."""
    return (np.arange(2**n_heads)[:, None] >> np.arange(n_heads) & 1).astype(bool)


def random_subsets(n_subsets: int, n_heads: int, seed: int = 0) -> np.ndarray:
    """Distinct subsets; none and all are among them."""
    every = all_subsets(n_heads)
    inner = np.random.default_rng(seed).permutation(np.arange(1, len(every) - 1))[: n_subsets - 2]
    return every[[0, *inner, len(every) - 1]]
