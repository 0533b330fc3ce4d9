"""The published study's procedure, bug for bug.

Clean and corrupt prompt are the contrast's own texts.  What the study patches are slices of the attention module's
output, which are not heads; it copies them position by position from the start, though the prompts are not aligned; and
its hook fires at every decoding step, writing what the clean prompt had at its first position.  A text succeeds when it
holds the right answer and not the wrong one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.model import ModelLoader, load_tokenizer
from ..runtime.errors import UserError, VerificationError
from ..runtime.outcome import Outcome
from ..runtime.resources import Machine
from ..store.store import Store, TextRun
from ..study.patch_settings import PatchRequest, PatchSettings
from ..study.study import Arithmetic
from ..study.subsets import Subsets, parse_layers, parse_subsets
from ..study.tasks.contrast import Contrast
from .cached_checkpoints import LoadedCheckpoint, load_each
from .greedy_decoding import Condition, Texts, Tokens, generate, generate_once, reference_generate
from .reference import choose_pairs
from .run import joined, shortened

SUBSETS = ("none", "even", "odd")
LAYERS = ("6",)
"""What the study patched."""

N_TOKENS = 20


@dataclass(frozen=True)
class PublishedPlan:
    """The study's procedure, spelled out for one store."""

    settings: PatchSettings
    contrasts: tuple[Contrast, ...]
    layers: tuple[int, ...]
    subsets: Subsets
    dtype: Arithmetic

    @property
    def n_runs(self) -> int:
        """Texts of one checkpoint."""
        return len(self.layers) * len(self.subsets) * len(self.contrasts)


def name_of(request: PatchRequest) -> str:
    """What the run is called when the user does not say."""
    words = ["published", "layers" + "+".join(request.layers)]
    words += [joined(request.subsets)] if request.subsets != SUBSETS else []
    words += [request.dtype] if request.dtype else []
    return shortened("-".join(words))


def make_plan(request: PatchRequest, store: Store) -> PublishedPlan:
    """Raises `UserError` for what the study's procedure does not have, or the model."""
    plain = PatchRequest()
    for flag in ("joint", "positions", "direction", "measures"):
        if getattr(request, flag) != getattr(plain, flag):
            raise UserError(
                f"--protocol published copies from the start, one layer at a time, and scores texts; leave --{flag} out"
            )
    if request.generate:
        raise UserError(f"--protocol published generates {N_TOKENS} tokens as it is; leave --generate out")
    every = range(store.layers[-1] + 1)
    if request.layers == LAYERS and int(LAYERS[0]) not in every:
        raise UserError(
            f"--protocol published patches layer {LAYERS[0]}, this model has layers 0 to {every[-1]}; say --layers"
        )
    layers = tuple(parse_layers(request.layers, every))
    dtype: Arithmetic = request.dtype or store.study["dtype"]
    settings = PatchSettings("published", layers=layers, subsets=request.subsets, dtype=dtype, n_tokens=N_TOKENS)
    return PublishedPlan(
        settings, store.trials().contrasts, layers, parse_subsets(request.subsets, store.n_heads), dtype
    )


def open_run(store: Store, plan: PublishedPlan, name: str, device: str) -> TextRun:
    """The run `name` of the store, made where it is not there."""
    run = store.open_texts(name, plan.settings, plan.layers, plan.subsets.labels, plan.subsets.mask, N_TOKENS)
    run.group.attrs["device"] = device
    return run


def patch_series(
    store: Store,
    plan: PublishedPlan,
    run: TextRun,
    missing: Sequence[str],
    cache: Path,
    machine: Machine,
    done: Callable[[int], object],
) -> Iterator[Outcome]:
    """Generate every text at every missing checkpoint, and one of them again by definition.

    Raises `VerificationError` where the two differ.
    """
    for label, checkpoint in load_each(store, missing, cache, ModelLoader(plan.dtype, machine), first_layer=None):
        if isinstance(checkpoint, UserError):
            yield Outcome(label, str(checkpoint))
            continue
        _write(plan, run, label, checkpoint)
        done(plan.n_runs)
        yield Outcome(label)


def _write(plan: PublishedPlan, run: TextRun, label: str, checkpoint: LoadedCheckpoint) -> None:
    tokenizer = load_tokenizer(checkpoint.files.config.parent)
    conditions = _conditions(plan, tokenizer)
    texts = _generated(checkpoint, conditions)
    _require_same(checkpoint, conditions, texts, label)
    shape = (len(plan.layers), len(plan.subsets), len(plan.contrasts))
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in texts.tokens]
    token = np.full((len(decoded), N_TOKENS), -1, dtype=np.int32)
    for row, made in zip(token, texts.tokens, strict=True):
        row[: len(made)] = made
    right = [
        succeeds(text, contrast) for text, contrast in zip(decoded, plan.contrasts * (shape[0] * shape[1]), strict=True)
    ]
    run.write_texts(
        label,
        np.array(decoded, dtype=object).reshape(shape),
        token.reshape(*shape, N_TOKENS),
        np.array(right).reshape(shape),
        texts.n_near,
    )


def succeeds(text: str, contrast: Contrast) -> bool:
    """The study's score: the right answer occurs in the text, and the wrong one does not; upper or lower case."""
    said = text.lower()
    return contrast.answer.strip().lower() in said and contrast.wrong.strip().lower() not in said


def _conditions(plan: PublishedPlan, tokenizer: Any) -> list[Condition]:
    """In order of layer, subset and trial."""

    def read(prompt: str) -> Tokens:
        return tuple(tokenizer(prompt)["input_ids"])

    prompts = [(read(contrast.clean), read(contrast.corrupt)) for contrast in plan.contrasts]
    return [
        Condition(clean, corrupt, layer, tuple(heads.tolist()))
        for layer in plan.layers
        for heads in plan.subsets.mask
        for clean, corrupt in prompts
    ]


def _generated(checkpoint: LoadedCheckpoint, conditions: Sequence[Condition]) -> Texts:
    """Every text; where nothing is patched, one for all layers."""
    keys = [condition if any(condition.slices) else _unpatched(condition) for condition in conditions]
    return generate_once(
        checkpoint.resident, keys, lambda some, most: generate(checkpoint.resident, some, N_TOKENS, most)
    )


def _unpatched(condition: Condition) -> Condition:
    return Condition(condition.clean, condition.corrupt, 0, condition.slices)


def _require_same(checkpoint: LoadedCheckpoint, conditions: Sequence[Condition], texts: Texts, label: str) -> None:
    """Generate one random text again by definition.  Raises `VerificationError` when it is another."""
    [(at, _)] = choose_pairs(label, [(index,) for index in range(len(conditions))], 1, 1)
    again = reference_generate(checkpoint.resident, conditions[at], N_TOKENS)
    if again != texts.tokens[at]:
        raise VerificationError(
            f"{label}: in a batch the tokens are {texts.tokens[at]}, by transformers' own generate {again}; headlapse "
            "does not compute this architecture rightly"
        )
