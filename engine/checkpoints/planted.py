"""A model made by hand, whose answer is carried by known heads of one layer.

Of the prompt `is 8 bigger than five ?`, the heads of layer `LAYER` attend from the question mark to the digit, and the
carriers among them write how far it is from five towards `yes`.  The logit difference (yes - no, in nats) is the sum of
what they write, so that every patched run can be worked by hand.

The residual stream is made of features, each a pair of dimensions that hold +x and -x: their mean is zero, and norms
with an `eps` far above any variance, and gains that undo it, leave them alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel, PreTrainedTokenizerFast

N_LAYERS, N_HEADS, HEAD_DIM = 3, 12, 4
D_MODEL = N_HEADS * HEAD_DIM
LAYER = 1
EPS = 1e8

SHARP = 40.0
"""Attention score of the digit above every other word: they get exp(-40)."""

CUE, VALUE, ANSWER, TEXTURE = range(4)
"""Features: is a digit, how far from five, `yes` rather than `no`, and from here on a random texture of every word."""

WRITE = torch.kron(torch.eye(D_MODEL // 2), torch.tensor([[1.0, -1.0]]))
"""(feature, d_model): row by row, the direction that adds one unit of the feature to the residual stream."""

READ = WRITE / 2
"""(feature, d_model): row by row, the direction whose product with the residual stream is how much of it is there."""

ROTARY, PLAIN = 0.5, HEAD_DIM - 1
"""Share of a head's dimensions that is rotated, and one that is not."""

WORDS = ("[UNK]", "yes", "no", "now", "is", "bigger", "than", "five", "?", *"0123456789")
PAIRS = ((6, 4), (7, 3), (8, 2))
"""Digits of the clean and the corrupt prompt: 1, 2 and 3 above and below five."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, unk_token="[UNK]"
    )


def task(path: Path, pairs: Sequence[tuple[int, int]] = PAIRS) -> Path:
    """A task file; every second clean prompt is a word longer than its corrupt one."""
    lines = (
        f'{{"clean": "{"now " * (n % 2)}is {clean} bigger than five ?", "corrupt": "is {corrupt} bigger than five ?", '
        '"answer": " yes", "wrong": " no"}\n'
        for n, (clean, corrupt) in enumerate(pairs)
    )
    path.write_text("".join(lines))
    return path


def planted(
    carry: float,
    noise: float = 0.0,
    seed: int = 0,
    carriers: Sequence[int] = range(0, N_HEADS, 2),
    n_layers: int = N_LAYERS,
) -> PreTrainedModel:
    """The model in which each of the `carriers` writes `carry` nats per unit that the digit is above five.

    Every head also moves texture by random weights: those of layer `LAYER` from the digit, those of the other layers
    from wherever they attend, which is random too.  They write it into the texture, and `noise` times it towards `yes`.
    """
    generator = torch.Generator().manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(WORDS), hidden_size=D_MODEL, num_hidden_layers=n_layers, num_attention_heads=N_HEADS,
        intermediate_size=8, max_position_embeddings=16, layer_norm_eps=EPS, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": ROTARY},
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(EPS**0.5 if "norm" in name and name.endswith("weight") else 0.0)
        cast(Any, model.get_input_embeddings()).weight.copy_(_embeddings())
        for word, sign in (("yes", 1), ("no", -1)):
            model.get_output_embeddings().weight[  # type: ignore[no-untyped-call]
                WORDS.index(word)
            ] = sign * READ[ANSWER] / 2
        for layer in range(n_layers):
            for head in range(N_HEADS):
                carried = (carry if head in carriers else 0.0) if layer == LAYER else None
                _make_head(model, layer, head, carried, noise, generator)
    return model


def _embeddings() -> Tensor:
    """(word, d_model).  The same words have the same texture in every model."""
    texture = torch.randn(len(WORDS), D_MODEL // 2, generator=torch.Generator().manual_seed(0))
    texture[:, :TEXTURE] = 0
    table = texture @ WRITE
    for digit in range(10):
        table[WORDS.index(str(digit))] += WRITE[CUE] + (digit - 5) * WRITE[VALUE]
    return table


def _make_head(
    model: PreTrainedModel, layer: int, head: int, carried: float | None, noise: float, generator: torch.Generator
) -> None:
    """Set one head's weights; `carried` is None where it attends at random."""
    attention: Any = model.get_submodule(f"gpt_neox.layers.{layer}.attention")
    # A head's query, key and value lie together.
    query, key, value = attention.query_key_value.weight.unflatten(0, (N_HEADS, 3, HEAD_DIM))[head]
    write = attention.dense.weight.unflatten(1, (N_HEADS, HEAD_DIM))[:, head]
    for matrix in (query, key, value):
        matrix.copy_(_random_readings(generator))
    write[:, :PLAIN] = 0.3 * _random_readings(generator)[:PLAIN].T
    write[:, 0] += noise * WRITE[ANSWER]
    if carried is not None:
        query.zero_()
        key.zero_()
        attention.query_key_value.bias.unflatten(0, (N_HEADS, 3, HEAD_DIM))[head, 0, PLAIN] = 1.0
        key[PLAIN] = SHARP * HEAD_DIM**0.5 * READ[CUE]
        value[PLAIN] = READ[VALUE]
        write[:, PLAIN] = carried * WRITE[ANSWER]


def _random_readings(generator: torch.Generator) -> Tensor:
    """(head_dim, d_model): random readings of the texture, of order one like the texture itself."""
    n_textures = D_MODEL // 2 - TEXTURE
    weights = torch.randn(HEAD_DIM, n_textures, generator=generator) / n_textures**0.5
    readings: Tensor = weights @ READ[TEXTURE:]
    return readings
