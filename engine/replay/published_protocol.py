"""The published study's procedure, bug for bug.

Clean and corrupt prompt are the contrast's own texts.  What the study patches are slices of the attention module's
output, which are not heads; it copies them position by position from the start, though the prompts are not aligned; and
its hook fires at every decoding step, writing what the clean prompt had at its first position.  A text succeeds when it
holds the right answer and not the wrong one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.loader import ModelLoader
from ..checkpoints.tokenizer import load_tokenizer
from ..runtime.errors import UserError
from ..runtime.outcome import Outcome
from ..runtime.resources import Machine
from ..store.patched_run import TextRun
from ..store.store import Store
from ..study.patch_settings import PatchRequest, PatchSettings
from ..study.study import Arithmetic
from ..study.subsets import Subsets, parse_layers, parse_subsets
from ..study.tasks.contrast import Contrast
from .cached_checkpoints import LoadedCheckpoint, each_outcome, load_each
from .greedy_decoding import (
    GeneratedTexts,
    SlicePatch,
    Tokens,
    generate_distinct,
    generate_slice_patched,
    padded,
    reference_generate,
    require_same_text,
)
from .reference import choose_pairs
from .run import joined, shortened

SUBSETS = ("none", "even", "odd")
LAYERS = ("6",)
"""What the study patched."""

N_TOKENS = 20


@dataclass(frozen=True)
class PublishedPlan:
    """The study's procedure, worked out for one store."""

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
    """The request worked out for one store.

    Raises `UserError` for options that the study's procedure does not have, and for layers that the model does not.
    """
    default = PatchRequest()
    for flag in ("joint", "positions", "direction", "measures"):
        if getattr(request, flag) != getattr(default, flag):
            raise UserError(
                f"--protocol published copies from the start, one layer at a time, and scores texts; leave --{flag} out"
            )
    if request.primary:
        raise UserError("--protocol published tests nothing of its own; leave --primary out")
    if request.generate:
        raise UserError(f"--protocol published generates {N_TOKENS} tokens as it is; leave --generate out")
    model_layers = range(store.layers[-1] + 1)
    if request.layers == LAYERS and int(LAYERS[0]) not in model_layers:
        raise UserError(
            f"--protocol published patches layer {LAYERS[0]}, this model has layers 0 to {model_layers[-1]}; "
            "say --layers"
        )
    layers = tuple(parse_layers(request.layers, model_layers))
    dtype: Arithmetic = request.dtype or store.study["dtype"]
    settings = PatchSettings("published", layers=layers, subsets=request.subsets, dtype=dtype, n_tokens=N_TOKENS)
    return PublishedPlan(
        settings, store.trials().contrasts, layers, parse_subsets(request.subsets, store.n_heads), dtype
    )


def open_run(store: Store, plan: PublishedPlan, name: str, overwrite: bool = False) -> TextRun:
    """The run `name` of the store, made where it is not there; with `overwrite`, what is to replace it."""
    labels, mask = plan.subsets.labels, plan.subsets.mask
    return store.open_texts(name, plan.settings, plan.layers, labels, mask, N_TOKENS, overwrite)


def patch_series(
    store: Store,
    plan: PublishedPlan,
    run: TextRun,
    missing: Sequence[str],
    cache: Path,
    machine: Machine,
    progress: Callable[[int], object],
) -> Iterator[Outcome]:
    """Generate every text at every missing checkpoint, and one of them again by the reference.

    `progress` is called with the number of texts that each checkpoint completed.  A checkpoint at which the two differ
    is an `Outcome` with a problem.
    """

    def generate(label: str, checkpoint: LoadedCheckpoint) -> None:
        _write(plan, run, label, checkpoint, machine.device)
        progress(plan.n_runs)

    loader = ModelLoader(plan.dtype, machine)
    yield from each_outcome(load_each(store, missing, cache, loader, first_layer=None), generate)


def _write(plan: PublishedPlan, run: TextRun, label: str, checkpoint: LoadedCheckpoint, device: str) -> None:
    tokenizer = load_tokenizer(checkpoint.files.vocabulary.parent)
    patches = _slice_patches(plan, tokenizer)
    texts = _generate_all(checkpoint, patches)
    _require_same(checkpoint, patches, texts, label, run.seed)
    shape = (len(plan.layers), len(plan.subsets), len(plan.contrasts))
    decoded = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts.tokens]
    contrasts = plan.contrasts * (shape[0] * shape[1])
    succeeded = [succeeds(text, contrast) for text, contrast in zip(decoded, contrasts, strict=True)]
    run.write_texts(
        label,
        np.array(decoded, dtype=object).reshape(shape),
        padded(texts.tokens, N_TOKENS).reshape(*shape, N_TOKENS),
        np.array(succeeded).reshape(shape),
        texts.n_near,
        device=device,
    )


def succeeds(text: str, contrast: Contrast) -> bool:
    """The study's score: the right answer occurs in the text, and the wrong one does not; upper or lower case."""
    text = text.lower()
    return contrast.answer.strip().lower() in text and contrast.wrong.strip().lower() not in text


def _slice_patches(plan: PublishedPlan, tokenizer: Any) -> list[SlicePatch]:
    """In order of layer, subset and trial."""

    def tokenize(prompt: str) -> Tokens:
        return tuple(tokenizer(prompt)["input_ids"])

    prompts = [(tokenize(contrast.clean), tokenize(contrast.corrupt)) for contrast in plan.contrasts]
    return [
        SlicePatch(clean, corrupt, layer, tuple(slices.tolist()))
        for layer in plan.layers
        for slices in plan.subsets.mask
        for clean, corrupt in prompts
    ]


def _generate_all(checkpoint: LoadedCheckpoint, patches: Sequence[SlicePatch]) -> GeneratedTexts:
    """Every text; where nothing is patched, one for all layers."""
    keys = [patch if any(patch.slices) else replace(patch, layer=0) for patch in patches]
    return generate_distinct(
        checkpoint.resident,
        keys,
        lambda distinct, batch_size: generate_slice_patched(checkpoint.resident, distinct, N_TOKENS, batch_size),
    )


def _require_same(
    checkpoint: LoadedCheckpoint, patches: Sequence[SlicePatch], texts: GeneratedTexts, label: str, seed: int
) -> None:
    """Generate one random text again by the reference.  Raises `VerificationError` when it is another."""
    [(place, _)] = choose_pairs(label, [(index,) for index in range(len(patches))], 1, 1, seed)
    require_same_text(texts.tokens[place], reference_generate(checkpoint.resident, patches[place], N_TOKENS), label)
