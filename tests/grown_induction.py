"""A model of two layers in which induction grows in seconds, and its checkpoints.

It is trained on repeated random words, of which only the repetition counts.  How many words there are before they are
repeated differs from document to document, so that no fixed distance helps: a head has to find the word that followed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

from tests.models import save

N_LAYERS, N_HEADS = 2, 4
N_WORDS, N_POSITIONS, BATCH = 40, 48, 32
STEPS = (0, 100, 160, 180, 200, 220, 240, 260, 280, 300, 320, 360)
"""Dense where the loss falls, with the seeds that are used."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words of three letters, each a token: `aab`, `aac` and so on."""
    words = ["[UNK]", *(f"{a}{b}{c}" for a in "kl" for b in "aeiou" for c in "mnrs")][:N_WORDS]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def grow(directory: Path, seed: int, steps: Sequence[int] = STEPS) -> dict[int, float]:
    """Train, and save `directory`/step{N}; returns the training loss on the repetition before each of these steps."""
    config = GPTNeoXConfig(
        vocab_size=N_WORDS, hidden_size=64, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS,
        intermediate_size=8, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng, losses = np.random.default_rng(seed), {}
    for step in range(steps[-1] + 1):
        tokens, is_repeated = _documents(rng)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits[is_repeated[:, 1:]], tokens[:, 1:][is_repeated[:, 1:]])
        if step in steps:
            losses[step] = float(loss.detach())
            save(model, directory / f"step{step}", tokenizer=word_tokenizer())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


def _documents(
    rng: np.random.Generator,
) -> tuple[Int[torch.Tensor, "document position"], Bool[torch.Tensor, "document position"]]:
    """Words over and over, and which tokens the ones before announce."""
    tokens, is_repeated = np.zeros((BATCH, N_POSITIONS), int), np.zeros((BATCH, N_POSITIONS), bool)
    for row in range(BATCH):
        period = rng.integers(6, 16)
        words = rng.choice(np.arange(1, N_WORDS), period, replace=False)
        tokens[row], is_repeated[row, period + 1 :] = np.resize(words, N_POSITIONS), True
    return torch.from_numpy(tokens), torch.from_numpy(is_repeated)
