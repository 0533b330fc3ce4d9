"""Laws of renumbering heads: the model computes the same, and each head does what another did."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import headlapse
from headlapse.engine.checkpoints.renumbered import renumber_heads
from headlapse.engine.runtime.errors import UserError
from tests.models import save, tiny, tiny_tokenizer

ORDER = (2, 0, 3, 1, 7, 6, 5, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("renumbered")
    model = tiny("neox-parallel", 3)
    assert model.config.num_attention_heads == len(ORDER)
    save(model, folder / "was" / "step1", tokenizer=tiny_tokenizer())
    renumber_heads(folder / "was" / "step1", folder / "is" / "step1", 1, ORDER)
    return folder


def test_every_prompt_has_the_same_logits(folder: Path) -> None:
    tokens = torch.arange(12)[None]
    was, now = (AutoModelForCausalLM.from_pretrained(folder / name / "step1")(tokens).logits for name in ("was", "is"))
    torch.testing.assert_close(now, was, rtol=0, atol=1e-5)
    weights = [(folder / name / "step1" / "model.safetensors").read_bytes() for name in ("was", "is")]
    assert weights[0] != weights[1]


def test_each_head_does_what_another_did(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(folder / "cache"))
    effects = []
    for name in ("was", "is"):
        store = headlapse.cache(folder / name, trials=3)
        effects.append(store.patch(subsets="each").heads()["effect"].unstack("head").xs("step1", level="checkpoint"))
    was, now = (torch.tensor(effect.to_numpy()) for effect in effects)
    torch.testing.assert_close(now[1], was[1, list(ORDER)], rtol=0, atol=1e-4)
    torch.testing.assert_close(now[[0, 2]], was[[0, 2]], rtol=0, atol=1e-4)


def test_other_architectures_orders_and_layers_are_refused(folder: Path, tmp_path: Path) -> None:
    save(tiny("gpt2", 0), tmp_path / "gpt2", tokenizer=tiny_tokenizer())
    with pytest.raises(UserError, match="gpt2; heads are renumbered in GPT-NeoX"):
        renumber_heads(tmp_path / "gpt2", tmp_path / "out", 1, ORDER)
    with pytest.raises(UserError, match="name each of the 8 heads once"):
        renumber_heads(folder / "was" / "step1", tmp_path / "out", 1, (0, 0, 1, 2, 3, 4, 5, 6))
    with pytest.raises(UserError, match="layer 9 is not in"):
        renumber_heads(folder / "was" / "step1", tmp_path / "out", 9, ORDER)
    assert not (tmp_path / "out").exists()
