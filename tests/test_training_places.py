"""When in training a checkpoint was saved, as its name says: the names of published series, and their one order."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.checkpoints.revisions import RevisionIndex, select
from headlapse.engine.checkpoints.training_place import (
    Place,
    positions,
    read_place,
    refuse_unordered,
    short_stage,
    training_order,
)
from headlapse.engine.runtime.errors import UserError

B, T = 10**9, 10**12

TABLE: dict[str, dict[str, Place]] = {
    "Pythia": {
        "step0": Place(step=0), "step512": Place(step=512), "step143000": Place(step=143000), "main": Place(),
    },
    "OLMo-1B": {
        "step1000-tokens2B": Place(step=1000, tokens=2 * B), "step20000-tokens41B": Place(step=20000, tokens=41 * B),
        "step117850-tokens246B": Place(step=117850, tokens=246 * B), "main": Place(),
    },
    "OLMo-2, OLMo-3": {
        "stage1-step1000-tokens5B": Place("stage1", 1000, 5 * B),
        "stage1-step928646-tokens3896B": Place("stage1", 928646, 3896 * B),
        "stage2-ingredient1-step1000-tokens5B": Place("stage2-ingredient1", 1000, 5 * B),
        "stage2-ingredient1-step11931-tokens50B": Place("stage2-ingredient1", 11931, 50 * B),
        "stage3-step9000": Place("stage3", 9000), "main": Place(),
    },
    "SmolLM2": {"step-125000": Place(step=125000), "step-1000000": Place(step=1000000)},
    "SmolLM3": {
        "stage1-step-40000": Place("stage1", 40000), "stage1-step-3440000": Place("stage1", 3440000),
        "stage2-step-3450000": Place("stage2", 3450000), "stage3-step-4200000": Place("stage3", 4200000),
        "lc-4k-to-32k-step-4000": Place("lc-4k-to-32k", 4000), "lc-4k-to-32k-step-20000": Place("lc-4k-to-32k", 20000),
        "lc-32k-to-64k-step-4000": Place("lc-32k-to-64k", 4000), "it-SFT": Place(),
    },
    "Amber": {"ckpt_003": Place(step=3), "ckpt_100": Place(step=100), "ckpt_356": Place(step=356)},
    "Crystal": {
        "CrystalCoder_phase1_checkpoint_055500": Place("phase1", 55500),
        "CrystalCoder_phase2_checkpoint_000500": Place("phase2", 500),
        "CrystalCoder_phase3_checkpoint_027728": Place("phase3", 27728),
    },
    "BLOOM": {"global_step1000": Place(step=1000), "global_step95000": Place(step=95000)},
    "Apertus": {
        "step50000-tokens210B": Place(step=50000, tokens=210 * B),
        "step2627139-tokens15T": Place(step=2627139, tokens=15 * T),
    },
    "Lucie": {"step0005000": Place(step=5000), "step0100000": Place(step=100000)},
    "CRFM GPT-2": {"checkpoint-10": Place(step=10), "checkpoint-400000": Place(step=400000)},
    "MAP-Neo": {
        "hf_ckpt/16.78B": Place(tokens=16_780_000_000), "hf_ckpt/104.86B": Place(tokens=104_860_000_000),
        "hf_ckpt/1.1T": Place(tokens=1_100_000_000_000),
    },
    "TinyLlama": {
        "TinyLlama-1.1B-step-50K-105b": Place(step=50_000, tokens=105 * B),
        "TinyLlama-1.1B-intermediate-step-955k-token-2T": Place(step=955_000, tokens=2 * T),
        "TinyLlama-1.1B-intermediate-step-1431k-3T": Place(step=1_431_000, tokens=3 * T),
    },
    "MultiBERTs": {
        "multiberts-seed_0-step_20k": Place(step=20_000, seed=0),
        "multiberts-seed_0-step_100k": Place(step=100_000, seed=0),
        "multiberts-seed_0-step_2000k": Place(step=2_000_000, seed=0),
    },
    "Megatron": {"iter_0000500": Place(step=500), "iter_0001000": Place(step=1000)},
    "epochs": {"epoch_3": Place(step=3), "epoch_10": Place(step=10)},
    "Marin": {"kestrel": Place(), "phoenix": Place()},
}  # fmt: skip
"""Series -> its names in order of training -> what they say."""


@pytest.mark.parametrize("series", TABLE)
def test_names_of_published_series_say_what_they_say_and_come_out_in_training_order(series: str) -> None:
    places = TABLE[series]
    assert {label: read_place(label) for label in places} == places
    shuffler = random.Random(0)
    for _ in range(10):
        labels = shuffler.sample(list(places), len(places))
        assert training_order({label: read_place(label) for label in labels}) == list(places)
    refuse_unordered(places, "all of it")
    at = positions(list(places.values()))
    known = [position for position in at if position >= 0]
    assert known == sorted(set(known)) and at == [*known, *[-1] * (len(at) - len(known))]


@pytest.mark.parametrize(
    ("name", "seed"), [("pythia-160m-seed1", 1), ("pythia-160m-data-seed3", 3), ("multiberts-seed_0", 0), ("main", -1)]
)
def test_a_seed_is_read_without_a_step(name: str, seed: int) -> None:
    assert read_place(name) == Place(seed=seed)


def test_what_is_no_step_is_not_taken_for_one() -> None:
    assert read_place("step" + "9" * 19) == read_place("step999999999999999999k") == Place()
    assert read_place("TinyLlama-1.1B") == read_place("stage1") == read_place("7b-instruct") == Place()
    assert read_place("step1000-instruct2") == Place(step=1000)


def test_positions_count_steps_on_over_stages_as_worked_by_hand() -> None:
    places = [
        Place("stage1", 10),
        Place("stage2", 0),
        Place("stage1", 40),
        Place("stage2", 5),
        Place("lc-4k", 3),
        Place(),
    ]
    assert positions(places) == [10, 40, 40, 45, 48, -1]
    assert positions([Place(step=7), Place(step=0)]) == [7, 0], "without stages a position is the step"
    assert positions([Place("stage2", 7)]) == [7], "what came before is not known"
    assert positions([Place(tokens=7), Place(tokens=9)]) == [7, 9]
    assert positions([Place(step=7, tokens=9), Place(tokens=9)]) == [7, -1], "tokens are no steps"


def test_stages_that_cannot_be_ordered_have_no_position() -> None:
    branches = [Place("stage1", 10), Place("stage2-a", 5), Place("stage2-b", 8), Place("stage3", 1)]
    assert positions(branches) == [10, -1, -1, 19]
    assert positions([Place(step=10), Place("stage1", 5), Place("decay", 5)]) == [-1, 5, -1]


REFUSED = {
    "stage2-ingredient1 and stage2-ingredient2 are branches beside each other": (
        "stage1-step9", "stage2-ingredient2-step1", "stage2-ingredient1-step1",
    ),
    "nothing tells which of step500 and stage1-step1": ("stage1-step1", "step500"),
    "nothing tells which of step500 and extension_step1": ("step500", "extension_step1"),
    "different seeds": ("multiberts-seed_0-step_20k", "multiberts-seed_1-step_40k"),
    "checkpoint-10 and step10 are the same place in training": ("step10", "checkpoint-10", "step20"),
    "epoch_3 and checkpoint-400 count epochs and steps": ("epoch_3", "checkpoint-400"),
    "step3 and tokens4B count steps and tokens": ("step3", "tokens4B"),
}  # fmt: skip


@pytest.mark.parametrize(("said", "labels"), REFUSED.items())
def test_what_has_no_one_order_is_refused_in_a_line_with_what_was_found(said: str, labels: Sequence[str]) -> None:
    with pytest.raises(UserError) as raised:
        refuse_unordered({label: read_place(label) for label in labels}, "--checkpoints all")
    message = str(raised.value)
    assert said in message and message.startswith("--checkpoints all: ") and "\n" not in message


def test_the_words_that_choose_a_branch_choose_it() -> None:
    labels = [*TABLE["OLMo-2, OLMo-3"], "stage2-ingredient2-step1000-tokens5B", "stage2-ingredient10-step1000"]
    with pytest.raises(UserError) as raised:
        refuse_unordered({label: read_place(label) for label in labels}, "all")
    words = str(raised.value).split("'")[1::2]
    assert words == ["stage1-*", "stage2-ingredient1-*", "stage3-*"]
    chosen = {label: place for word in words for label, place in select(index(labels), word).items()}
    refuse_unordered(chosen, "those")
    assert set(chosen) == set(TABLE["OLMo-2, OLMo-3"]) - {"main"}


def test_main_and_names_without_a_place_may_stand_beside_any() -> None:
    refuse_unordered({label: read_place(label) for label in ("stage1-step1", "main", "kestrel")}, "all")
    refuse_unordered({"step143000": Place(step=143000), "main": Place(step=143000)}, "all")


def index(labels: Sequence[str]) -> RevisionIndex:
    return RevisionIndex("org/model", lambda: {label: read_place(label) for label in labels}, "all")


OLMO = [
    "stage1-step1000-tokens5B", "stage1-step2000-tokens9B", "stage1-step3000-tokens13B",
    "stage2-ingredient1-step500-tokens3B", "stage2-ingredient1-step1000-tokens5B",
    "stage2-ingredient2-step500-tokens3B", "stage3-step100-tokens1B", "main",
]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stage1-*", [0, 1, 2]),
        ("*-step500-*", [3, 5]),
        ("stage1-step[12]000-*", [0, 1]),
        ("stage1-step2000..stage2-ingredient1-step500", [1, 2, 3]),
        ("stage1-step2000-tokens9B..stage2-ingredient2-step700", [1, 2, 5]),
        ("stage1-step1500..9000", [1, 2]),
        ("stage2-ingredient1-step600..stage3-step100", [4, 6]),
        ("stage1-tokens6B..13B", [1, 2]),
        ("stage1-step1000..stage3-step5", [0, 1, 2, 3, 4, 5]),
        ("log", [0, 1, 2, 3, 4, 5, 6]),
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_words_choose_among_stages(word: str, expected: list[int]) -> None:
    assert training_order(select(index(OLMO), word)) == [OLMO[at] for at in expected]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("1000..3000", "has the stages stage1, stage2-ingredient1, stage2-ingredient2, stage3; name one at an end"),
        ("2B..9B", "name one at an end"),
        ("stage3-step1..stage1-step5", "ends before it begins"),
        ("stage1-step9..stage1-step5", "ends before it begins"),
        ("stage4-*", "not among the 8 checkpoints of org/model"),
        ("stage4-step1..stage4-step9", "not among the 7"),
        ("1000", "has stage1-step1000-tokens5B, stage2-ingredient1-step1000-tokens5B at that step"),
        ("stage1-step1900", "near it are stage1-step1000-tokens5B, stage1-step2000-tokens9B;"),
    ],
)
def test_words_that_leave_a_choice_or_find_nothing_are_refused(word: str, said: str) -> None:
    with pytest.raises(UserError, match="--checkpoints") as raised:
        select(index(OLMO), word)
    assert said in str(raised.value)


def test_tokens_choose_where_names_or_the_model_say_how_many(tmp_path: Path) -> None:
    neo = list(TABLE["MAP-Neo"])
    assert list(select(index(neo), "20B..1T")) == ["hf_ckpt/104.86B"]
    assert list(select(index(neo), "16.78B")) == ["hf_ckpt/16.78B"]
    pythia = resolve("EleutherAI/pythia-160m", ["2B..5B"], tmp_path)
    assert [(each.step, each.tokens_seen) for each in pythia] == [(1000, 2_097_152_000), (2000, 4_194_304_000)]


@pytest.mark.parametrize(
    "folders",
    [
        ["ckpt_003", "ckpt_100"], ["global_step500", "global_step1000"], ["iter_0000500", "iter_0010000"],
        ["epoch_3", "epoch_10"], ["stage1-step9000-tokens18B", "stage2-step10"], ["checkpoint-500", "checkpoint-final"],
        ["step-40k", "step-1431k"], ["lc-4k-to-32k-step-4000", "lc-32k-to-64k-step-1"],
    ],
)  # fmt: skip
def test_a_directory_of_folders_is_a_series_whatever_trainers_call_them(folders: list[str], tmp_path: Path) -> None:
    for folder in [*reversed(folders), "logs", "1B", "epoch_logs"]:
        (tmp_path / folder).mkdir()
    (tmp_path / "ckpt_4").write_text("no folder")
    assert [each.label for each in resolve(str(tmp_path), (), tmp_path / "cache")] == folders


def test_a_trainers_own_states_beside_weights_are_no_series(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-500"
    (checkpoint / "global_step500").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).touch()
    assert [each.label for each in resolve(str(checkpoint), (), tmp_path)] == ["checkpoint-500"]
    (checkpoint / "global_step500" / "config.json").touch()
    assert [each.label for each in resolve(str(checkpoint), (), tmp_path)] == ["global_step500"]


def test_branches_of_a_directory_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    labels = ["stage1-step10", "stage2-ingredient1-step1", "stage2-ingredient2-step1"]
    for label in labels:
        (tmp_path / label).mkdir()
    with pytest.raises(UserError, match="choose one of them, as 'stage1-\\*' 'stage2-ingredient1-\\*' does"):
        resolve(str(tmp_path), (), tmp_path)
    chosen = resolve(str(tmp_path), ["stage1-*", "stage2-ingredient2-*"], tmp_path)
    assert [each.label for each in chosen] == [labels[0], labels[2]]


def test_the_study_takes_the_steps_of_the_first_stage() -> None:
    steps = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 80000, 100000, 120000, 143000)
    labels = [f"stage{stage}-step{step}" for stage in (2, 1) for step in steps]
    assert list(select(index(labels), "study")) == [f"stage1-step{step}" for step in steps]


def test_a_stage_is_short_where_that_tells_it_apart() -> None:
    assert [short_stage(stage) for stage in ("stage2-ingredient1", "lc-4k-to-32k", "decay", "")] == [
        "stage2", "lc-4k", "decay", ""
    ]  # fmt: skip
