"""The published study's procedure, bug for bug, and its numbers.

Clean and corrupt prompt are the contrast's own texts.  What the study patches are slices of the attention module's
output, which are not heads; it copies them position by position from the start, though the prompts are not aligned; and
its hook fires at every decoding step, writing what the clean prompt had at its first position.  A text succeeds when it
holds the right answer and not the wrong one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ..checkpoints.model import ModelLoader, load_tokenizer
from ..measures.logit_diff import finished
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

MODEL, TASK = "pythia-160m", "published"

RATES = {
    "step1000": (0.0, 0.0, 0.0), "step2000": (0.0, 0.0, 0.0), "step4000": (0.0, 0.0, 0.0),
    "step8000": (0.0, 0.0, 0.0), "step16000": (0.0, 0.0, 0.0), "step32000": (1.0, 1.0, 1.0),
    "step64000": (1.0, 1.0, 1.0), "step80000": (0.0, 0.0, 0.0), "step100000": (0.0, 0.0, 0.0),
    "step120000": (0.0, 0.0, 0.0), "step143000": (0.0, 1.0, 0.0), "main": (0.0, 1.0, 0.0),
}  # fmt: skip
"""Success rates the study gives for pythia-160m: unpatched, even, odd.  Its step143000 was loaded as `main`."""


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


def success_table(run: xr.Dataset, study: Mapping[str, Any]) -> pd.DataFrame:
    """Per checkpoint the success rates, at one layer, and the study's own where it has some; all of it as text."""
    done = finished(run)
    asked = Path(study["model"]).name, study["task"]
    rows = [_row(done.isel(checkpoint=[index]), _shown(done), asked) for index in range(done.sizes["checkpoint"])]
    return pd.DataFrame(rows).set_index("checkpoint").fillna("")


def format_texts(run: xr.Dataset, study: Mapping[str, Any]) -> str:
    """The success rates, how to read them, and one text of each condition."""
    done, table = finished(run), success_table(run, study)
    chosen = "; each row shows the layer where even and odd are furthest apart" if done.sizes["layer"] > 1 else ""
    n, n_near = done.sizes["trial"], int(done.n_near.sum())
    unknown = (
        f"the study gives no numbers for {Path(study['model']).name} on {study['task']}; "
        f"it asked {MODEL} the pair of --task {TASK}, at layer {LAYERS[0]}"
    )
    return "\n".join(
        [
            table.to_string(),
            "success by the published procedure (output slices, which are no heads, copied from the start and at every "
            f"decoding step; {N_TOKENS} greedy tokens) over {n} distinct prompt{'s' * (n != 1)}{chosen}",
            *(f"{done.checkpoint.values[-1]}, {word}: {text[:80]!r}" for word, text in examples(done).items()),
            *([] if "published" in table else [unknown]),
            "one text of each checkpoint was generated again by transformers' own generate and is the same; "
            f"{n_near:,} of all texts had two next tokens as good as equal and come from it",
        ]
    )


def examples(done: xr.Dataset) -> dict[str, str]:
    """The first prompt's text under each condition, at the last checkpoint and the first layer."""
    first = done.text.isel(checkpoint=-1, layer=0, trial=0)
    return {_called(word): str(first.sel(subset=word).item()) for word in _shown(done)}


def _shown(done: xr.Dataset) -> list[str]:
    return [word for word in SUBSETS if word in done.subset.values] or list(map(str, done.subset.values[:3]))


def _row(one: xr.Dataset, words: Sequence[str], asked: tuple[str, str]) -> dict[str, str]:
    """One checkpoint's line: of several layers the one where the first two patched conditions are furthest apart."""
    rate = one.success.isel(checkpoint=0).sel(subset=list(words)).mean("trial").transpose("layer", "subset").values
    place = int(np.abs(rate[:, -1] - rate[:, -2]).argmax()) if len(words) > 2 else 0
    label, layer, here = str(one.checkpoint.values[0]), int(one.layer.values[place]), tuple(rate[place].tolist())
    row = {"checkpoint": label, "layer": str(layer)}
    row |= {_called(word): f"{value:.0%}" for word, value in zip(words, here, strict=True)}
    if tuple(words) != SUBSETS:
        return row
    row["strength"] = f"{here[1] - here[2]:+.2f}"
    if (*asked, str(layer)) == (MODEL, TASK, LAYERS[0]) and label in RATES:
        for said, rates in (("published", RATES[label]), ("here", here)):
            row[said] = " ".join(f"{value:.0%}" for value in rates)
        row["same?"] = "yes" if here == RATES[label] else "no"
    return row


def _called(word: str) -> str:
    return "baseline" if word == "none" else word
