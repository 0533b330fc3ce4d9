"""`headlapse verify-known`: its arithmetic by hand, and its way through a hub that serves the real names."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPTNeoXConfig, PreTrainedConfig, PreTrainedTokenizerFast

from headlapse.__main__ import main
from headlapse.engine.mechanism.known_comparison import ComparedOnset, compare, compare_heads, compare_onset
from headlapse.engine.mechanism.role_summary import roles_frame
from headlapse.engine.report.findings.known_heads import comparison_lines
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.study.known_heads import GPT2, KNOWN, PYTHIA, Check, KnownHeads, KnownOnset
from headlapse.engine.study.tasks import greater_than, ioi, names
from tests.hub_server import HubServer
from tests.models import randomised, save
from tests.test_roles import planted_run

TRIALS = 4
WORDS = [f"{a}{b}{c}" for a in "klm" for b in "aeiou" for c in "nrst"]
"""Of the induction task."""


# --- arithmetic ---


def test_every_head_that_is_known_is_one_of_its_model() -> None:
    for check in KNOWN.values():
        assert check.heads or check.onsets
        for known in check.heads:
            assert len(set(known.heads)) == len(known.heads) and re.search(r"\d{4}, arXiv:\d{4}\.\d{5}$", known.source)
            assert all(0 <= layer < 12 and 0 <= head < 12 for layer, head in known.heads)
    assert KNOWN["ioi"].heads[0].heads == ((9, 9), (10, 0), (9, 6))
    [onset] = KNOWN["induction"].onsets
    assert [step * 2_097_152 for step in (onset.after, onset.by)] == pytest.approx([2.5e9, 5e9], rel=1e-3)


def test_places_are_counted_and_the_p_value_is_that_of_heads_drawn_at_random() -> None:
    values = np.array([[0.9, 0.1, 0.2, 0.3], [0.8, 0.4, 0.85, 0.0]])
    known = KnownHeads("x", ((0, 0), (1, 0)), "induction", "")
    compared = compare_heads(known, values)
    assert compared.places == (1, 3) and compared.n_heads == 8
    # 28 pairs of places; only 1 and 2 are better than 1 and 3.  Simulation error 0.003.
    exact = stats.mannwhitneyu([0.9, 0.8], [0.1, 0.2, 0.3, 0.4, 0.85, 0], alternative="greater").pvalue
    assert exact == pytest.approx(2 / 28) and compared.p == pytest.approx(exact, abs=0.01) and not compared.agrees
    tied = compare_heads(known, np.full((2, 4), 0.5))
    assert tied.places == (8, 8) and tied.p == 1
    missing = compare_heads(known, np.full((2, 4), np.nan))
    assert missing.places == () and np.isnan(missing.p) and not missing.agrees


@pytest.mark.parametrize(
    ("after", "by", "agrees"),
    [
        *((1000, 2000, True), (512, 1000, False), (2000, 3000, True), (3000, 4000, False)),
        *((None, 2000, True), (None, None, False)),
    ],
)
def test_an_onset_agrees_where_its_interval_overlaps(after: int | None, by: int | None, agrees: bool) -> None:
    assert ComparedOnset(KnownOnset("induction", 1192, 2384, ""), after, by).agrees == agrees


def test_the_onset_is_that_of_the_first_head_to_take_the_role_on() -> None:
    run = planted_run()
    frame, steps = roles_frame(run), dict(zip(map(str, run.checkpoint.values), run.step.values.tolist(), strict=True))
    onset = compare_onset(KnownOnset("induction", 12, 15, ""), frame, steps)
    assert (onset.after, onset.by) == (10, 20) and onset.agrees
    never = compare_onset(KnownOnset("S-inhibition", 12, 15, ""), frame, steps)
    assert (never.after, never.by) == (None, None) and not never.agrees


def test_what_is_known_is_compared_with_the_last_checkpoint_and_told() -> None:
    run = planted_run()
    check = Check(
        "ioi", "someone/model", "ioi", (),
        (
            KnownHeads("induction", ((1, 2),), "induction", "Here 2020"),
            KnownHeads("effect", ((0, 0), (0, 1)), "effect", "Here 2020"),
            KnownHeads("successor", ((0, 0),), "successor", "Here 2020"),
        ),
        (KnownOnset("induction", 12, 15, "There 2021"),),
    )  # fmt: skip
    score = run.role_score.copy()
    score.loc[{"role": "successor"}] = np.nan
    heads, onsets = compare(check, run.assign(role_score=score))
    assert [compared.places for compared in heads] == [(1,), heads[1].places, ()]
    # One of eight heads at random is the first in one case of eight; adjusted over two.
    assert heads[0].p == pytest.approx(2 / 8, abs=0.02) and onsets[0].agrees
    lines = list(comparison_lines(check, heads, onsets))
    assert lines[0] == "ioi on someone/model: 1 of 4 findings of the literature found again"
    assert "induction            NOT as published (p = 0.2" in lines[1] and "L1.H2 1" in lines[1]
    assert lines[5].endswith("not scored, so not compared") and "between steps 10 and 20; published" in lines[7]


def test_a_model_that_lacks_the_heads_is_refused() -> None:
    check = Check("ioi", "x/y", "ioi", (), (KnownHeads("induction", ((5, 5),), "induction", ""),))
    with pytest.raises(UserError, match="x/y has 2 layers of 4 heads, the literature's has more"):
        compare(check, planted_run())


# --- the command ---


def words_of_the_tasks() -> PreTrainedTokenizerFast:
    """Every word of the three tasks, and digits one by one."""
    text = " ".join([*ioi.SCENES, *ioi.PLACES, *ioi.THINGS, *names.MEN, *names.WOMEN, *greater_than.EVENTS])
    text += " The lasted from the year to " + " ".join(WORDS)
    words = dict.fromkeys(["[UNK]", *re.findall(r"[A-Za-z]+|[.,]", text), *"0123456789"])
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("[0-9]|[.,]"), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def files_of(config: PreTrainedConfig, directory: Path, seed: int = 0) -> dict[str, bytes | Path]:
    save(randomised(config, seed), directory, tokenizer=words_of_the_tasks())
    return {path.name: path for path in directory.iterdir()}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Random models of the real ones' names, layers and heads, and of no other likeness."""
    folder, n_tokens = tmp_path_factory.mktemp("served"), len(words_of_the_tasks())
    special = {"bos_token_id": None, "eos_token_id": None}
    gpt2 = GPT2Config(
        vocab_size=n_tokens, n_embd=48, n_layer=12, n_head=12, n_inner=16, n_positions=64, **special
    )  # fmt: skip
    pythia = GPTNeoXConfig(
        vocab_size=n_tokens, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, **special,
    )  # fmt: skip
    steps = KNOWN["induction"].checkpoints
    repos = {
        GPT2: {"main": files_of(gpt2, folder / "gpt2")},
        PYTHIA: {label: files_of(pythia, folder / label, seed) for seed, label in enumerate(steps)},
    }
    with HubServer(repos) as server:
        yield server


@pytest.mark.slow
def test_the_command_fetches_measures_compares_and_says_what_is_not_as_published(
    served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    words = ["verify-known", "--trials", str(TRIALS)]
    with served.used_here(monkeypatch, tmp_path / "home"):
        assert main(words) == 1, "random models have no such heads"
        first = capsys.readouterr()
        n_downloads = len(served.downloads())
        assert main(words) == 1 and len(served.downloads()) == n_downloads, "everything is there"
    told = first.out.splitlines()
    assert [line.split()[:3] for line in told if not line.startswith(" ")] == [
        ["ioi", "on", GPT2 + ":"], ["greater-than", "on", GPT2 + ":"], ["induction", "on", PYTHIA + ":"]
    ]  # fmt: skip
    assert sum(line.startswith("  ") and "as published" in line for line in told) >= 8
    assert re.search(
        r" name mover +(NOT )?as published \(p = \d\.\d+\); place among the highest scores of 144", told[1]
    )
    assert "no head takes it on; published: between steps 1,192 and 2,384" in first.out
    assert "error" not in first.err and capsys.readouterr().out == first.out
    assert not list((tmp_path / "cache").glob("*.zarr")), "no command takes them for its newest store"


@pytest.mark.slow
def test_offline_it_says_in_one_line_what_it_lacks(
    served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    with served.used_here(monkeypatch, tmp_path / "home"), monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert main(["verify-known", "--trials", str(TRIALS)]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    [line] = [line for line in printed.err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: not verified: ioi and greater-than (of {GPT2}), induction (of {PYTHIA}): main: ")


def test_the_tokens_of_the_served_tokenizer_take_the_tasks_words() -> None:
    tokenizer = words_of_the_tasks()
    assert tokenizer.unk_token_id not in tokenizer("The war lasted from the year 1732 to the year 1752")["input_ids"]
    assert torch.tensor(tokenizer("kan ken")["input_ids"]).numel() == 2
