"""What is said of even and odd heads in models where their numbers mean nothing, through real caching and patching.

The models are random, as a series of checkpoints: each head has a strength of its own, over an order of magnitude, in
every second model one head is ten times as strong again, and each starts at a checkpoint of its own.  Which heads are
even has no part in any of that.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from transformers import GPTNeoXConfig, PreTrainedModel

import headlapse
from headlapse.engine.measures.logit_diff import best_layer
from headlapse.engine.report.findings.verdict import verdict
from headlapse.engine.statistics.hypotheses import SUPPORTED, THIRDS, hypotheses
from headlapse.engine.study.patch_settings import PatchSettings
from headlapse.engine.study.subsets import parse_subsets
from tests.models import D_MLP, D_MODEL, N_HEADS, SHAPE, randomised, redrawn, save, tiny_tokenizer
from tests.simulating import unchecked

MODELS = int(os.environ.get("HEADLAPSE_NULL_MODELS", "4"))
"""With 500, half an hour: what docs/statistics.md states."""

STEPS = (0, 100, 200, 300)
N_LAYERS, N_PROMPTS = 3, 8
EVERY_SPLIT, DEFAULT = ("balanced", "all", "each"), ("even", "odd", "all", "each", "splits")


def strengths(rng: np.random.Generator, has_dominant: bool) -> np.ndarray:
    """(checkpoint, layer, head): what each head's output is multiplied by."""
    shape = (N_LAYERS, N_HEADS)
    strength = 10 ** rng.uniform(-0.5, 0.5, shape)
    if has_dominant:
        strength[np.arange(N_LAYERS), rng.integers(N_HEADS, size=N_LAYERS)] *= 10
    step, starts = np.arange(len(STEPS))[:, None, None], rng.integers(len(STEPS), size=shape)
    return np.asarray(strength * (step >= starts) * (1 + 0.05 * step))


def write_series(model: PreTrainedModel, directory: Path, seed: int) -> None:
    """The same random weights at every checkpoint, but for how strong each head is."""
    redrawn(model, seed)
    by_step = strengths(np.random.default_rng(seed), has_dominant=seed % 2 == 0)
    written = [layer.attention.dense.weight.detach().clone() for layer in model.gpt_neox.layers]
    for step, strength in zip(STEPS, by_step, strict=True):
        for layer, weight, of_heads in zip(model.gpt_neox.layers, written, strength, strict=True):
            columns = np.repeat(of_heads, D_MODEL // N_HEADS)
            layer.attention.dense.weight.data = weight * torch.from_numpy(columns).float()
        save(model, directory / f"step{step}", tokenizer=tiny_tokenizer())


def random_questions(path: Path, seed: int) -> Path:
    """A task file of eight pairs that differ by a word, among random digits; what is right is arbitrary too."""
    rng = np.random.default_rng(seed)
    answer, wrong = (f" {digit}" for digit in rng.choice(10, 2, replace=False))
    digits = [" ".join(map(str, rng.integers(10, size=2))) for _ in range(4 * N_PROMPTS)]
    pairs = [
        {"clean": f"{few} is bigger ?", "corrupt": f"{few} or bigger ?", "answer": answer, "wrong": wrong}
        for few in list(dict.fromkeys(digits))[:N_PROMPTS]
    ]
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return path


def answers(run: xr.Dataset, words: Sequence[str]) -> list[str]:
    """The verdict on even and odd heads had only the subsets `words` been run, and which of H1 to H3 are supported."""
    settings = replace(PatchSettings.from_attributes(run.attrs["patch"]), subsets=tuple(words))
    part = run.sel(subset=list(parse_subsets(words, N_HEADS).labels)).assign_attrs(patch=settings.to_attributes())
    line = next(line for line in verdict(part, settings, {"model": "m", "task": "t"}) if line.startswith("even/odd"))
    found = hypotheses(part, settings.direction, int(best_layer(part, settings.direction).values[-1]))
    assert found is not None
    supported = [name for name in THIRDS if found.verdicts[name] == SUPPORTED]
    return [line.removeprefix("even/odd").strip().partition(":")[0], *supported]


def asked(model: PreTrainedModel, directory: Path, seed: int) -> list[list[str]]:
    """What is said of one series where all equal splits were run, and in the default run."""
    write_series(model, directory / "model", seed)
    questions = random_questions(directory / "questions.jsonl", seed)
    run = headlapse.cache(directory / "model", task=questions, store=directory / "s.zarr").patch(subsets=EVERY_SPLIT)
    return [answers(run.dataset.load(), words) for words in (EVERY_SPLIT, DEFAULT)]


def is_false(said: Sequence[str]) -> bool:
    """Whether it is more than a `no` or that it cannot be told."""
    return len(said) > 1 or not said[0].startswith(("no", "cannot tell"))


@pytest.mark.slow
def test_any_answer_but_no_or_cannot_tell_appears_in_at_most_five_percent(tmp_path: Path) -> None:
    """So many false ones of `MODELS` that a rate of 5 % has fewer in 0.1 % of cases would be noticed."""
    model = randomised(GPTNeoXConfig(**SHAPE | {"num_hidden_layers": N_LAYERS}, intermediate_size=D_MLP))
    with unchecked():
        said = [asked(model, tmp_path / str(seed), seed) for seed in range(MODELS)]
    for of_words in zip(*said, strict=True):
        n_false = sum(map(is_false, of_words))
        print(f"{n_false} of {MODELS} false; {Counter(map(tuple, of_words))}")
        assert n_false <= stats.binom.isf(0.001, MODELS, 0.05)
