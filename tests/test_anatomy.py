"""Laws of the dry run: shapes and places are found without weights, what cannot be patched is refused by name."""

import pytest
import torch
from transformers import MptConfig

from headlapse.engine.capture.forward import capture
from headlapse.engine.checkpoints.architecture import inspect_architecture
from headlapse.engine.checkpoints.model import ResidentModel
from headlapse.engine.runtime.errors import UserError
from tests.models import D_MODEL, MAIN, N_HEADS, N_KV_HEADS, N_LAYERS, REFUSED, random_trials, tiny

PROJECTIONS = {
    "neox-parallel": "gpt_neox.layers.1.attention.dense",
    "neox-sequential": "gpt_neox.layers.1.attention.dense",
    "gpt2": "transformer.h.1.attn.c_proj",
    "llama-gqa": "model.layers.1.self_attn.o_proj",
}


@pytest.mark.parametrize("name", MAIN)
def test_shapes_and_output_projections_are_found_without_weights(name: str) -> None:
    body = inspect_architecture(MAIN[name]())
    assert (body.n_layers, body.n_heads, body.d_model) == (N_LAYERS, N_HEADS, D_MODEL)
    assert body.n_kv_heads == (N_KV_HEADS if name == "llama-gqa" else N_HEADS)
    assert body.head_dim == body.value_dim == D_MODEL // N_HEADS
    assert body.out_proj[1] == PROJECTIONS[name]
    assert body.layer_of(body.out_proj[2] + ".weight") == 2
    assert body.layer_of("lm_head.weight") is None


def test_a_layer_is_not_taken_for_another_whose_number_begins_alike() -> None:
    body = inspect_architecture(MAIN["gpt2"]().__class__(n_layer=12, n_embd=16, n_head=2, vocab_size=10, n_positions=8))
    assert body.layer_of("transformer.h.11.mlp.c_fc.weight") == 11


@pytest.mark.parametrize("name", REFUSED)
def test_what_plain_causal_attention_cannot_reproduce_is_refused_by_name(name: str) -> None:
    """At the dry run or, where it depends on the prompts, at the capture; never computed wrongly."""
    model = tiny(name)
    with pytest.raises(UserError) as refused:
        resident = ResidentModel(model.config, torch.float32, "cpu")
        resident.load_weights(model.state_dict())
        capture(resident, random_trials(), 2**30)
    assert model.config.model_type.replace("_", "") in str(refused.value).lower().replace("_", "")


def test_a_model_that_breaks_off_in_the_dry_run_is_refused_in_one_line() -> None:
    """MPT's attention needs a mask that the interface does not give."""
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=50)
    with pytest.raises(UserError, match="MptForCausalLM cannot be run through transformers' attention interface"):
        inspect_architecture(config)
