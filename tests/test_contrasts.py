"""Laws of the built-in tasks: what each contrast means, worked out again from its text; what tokenizers make of it."""

import re
import string
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headlapse.engine.runtime.errors import UserError
from headlapse.engine.study import prompts
from headlapse.engine.study.alignment import align
from headlapse.engine.study.prompts import Trials, draw_trials
from headlapse.engine.study.tasks import names, sampling
from headlapse.engine.study.tasks.contrast import Contrast
from headlapse.engine.study.tasks.decimals import CHAT, PLAIN
from headlapse.engine.study.tasks.registry import TASKS, Task

pytestmark = pytest.mark.thorough

CONTEXT = 64
N = 200
WORDS = [task for task in TASKS if task not in ("published", "induction")]
REPLACES = [name for name, task in TASKS.items() if task.replaces]
REPLACED_WORDS = {"decimal-order": 2, "induction": 2}
"""Words in which clean and corrupt differ; one in the other tasks."""

VARIANTS = ("decimal", "decimal-order", "decimal-digits", "decimal-whole", "decimal-format")


def byte_level(digits_apart: bool = False, unread: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's, trained on the built-in prompts without those that hold the word `unread`.

    Numbers come as centuries and pairs of digits; years from 1702 on are whole, as far as they were read.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if digits_apart else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    drawn = [each for task in WORDS for each in islice(TASKS[task].contrasts(1, byte_by_byte()), 1000)]
    texts = [each.clean + each.answer for each in drawn]
    read = [text for text in texts if ("year" not in text or "17" in text) and not (unread and unread in text)]
    halves = [f" {century}" for century in range(10, 20)] + [f"{year:02}" for year in range(100)]
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=split.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*read, *halves * 1000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_by_byte() -> PreTrainedTokenizerFast:
    """Merges nothing."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(sorted(split.alphabet()))}, []))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_level(*words: str) -> PreTrainedTokenizerFast:
    """Knows only these words, digits and marks."""
    vocab = {word: n for n, word in enumerate(["[UNK]", *words, *string.digits, *string.punctuation])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Words whole, and digits in whatever chunks were frequent."""
    return byte_level()


@pytest.fixture(scope="module")
def digits_apart() -> PreTrainedTokenizerFast:
    return byte_level(digits_apart=True)


@pytest.fixture(scope="module", params=["bpe", "digits_apart"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


def some(task: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, n: int = N) -> list[Contrast]:
    return list(islice(TASKS[task].contrasts(seed, tokenizer), n))


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


# Every task


@pytest.mark.parametrize("task", [task for task in TASKS if task != "published"])
def test_a_task_has_200_distinct_contrasts_that_a_seed_draws_again(task: str, bpe: PreTrainedTokenizerFast) -> None:
    first, again, other = (some(task, bpe, seed) for seed in (0, 0, 1))
    assert first == again and first[1:] != other[1:]
    assert len(set(first)) == N
    for each in first:
        assert each.source == task and each.repeats == 1
        assert each.clean != each.corrupt and each.answer != each.wrong
        assert all(prompt == prompt.strip() for prompt in (each.clean, each.corrupt))
        assert all(answer == " " + answer.strip() for answer in (each.answer, each.wrong))


@pytest.mark.parametrize("task", REPLACES)
def test_clean_becomes_corrupt_by_replaced_words(task: str, bpe: PreTrainedTokenizerFast) -> None:
    for each in some(task, bpe):
        pairs = list(zip(re.findall(r"[\w.]+", each.clean), re.findall(r"[\w.]+", each.corrupt), strict=True))
        assert sum(clean != corrupt for clean, corrupt in pairs) == REPLACED_WORDS.get(task, 1)


@pytest.mark.slow
@pytest.mark.parametrize("task", REPLACES)
def test_tokens_of_replaced_words_correspond_one_by_one(task: str, tokenizer: PreTrainedTokenizerFast) -> None:
    trials = draw_trials(task, 100, tokenizer, CONTEXT)
    clean, corrupt = trials.length
    assert (clean == corrupt).all() and align(trials, "all").valid.any()
    differing = (trials.tokens[0] != trials.tokens[1]).sum(axis=-1)
    assert (differing > 0).all()
    if task not in ("decimal-order", "greater-than"):
        # Words whole in the tokenizer, as nearly all are, are one token replaced by one token.
        assert (differing == REPLACED_WORDS.get(task, 1)).mean() > 0.9


@pytest.mark.parametrize("task", REPLACES)
def test_neither_branching_token_begins_the_other(task: str, tokenizer: PreTrainedTokenizerFast) -> None:
    trials = draw_trials(task, 100, tokenizer, CONTEXT)
    for right, wrong in trials.answer_tokens.tolist():
        pieces = tokenizer.decode([right]), tokenizer.decode([wrong])
        assert not pieces[0].startswith(pieces[1]) and not pieces[1].startswith(pieces[0])


def test_contrasts_whose_tokens_do_not_correspond_are_dropped_with_a_word_and_others_drawn(
    bpe: PreTrainedTokenizerFast,
) -> None:
    halved = byte_level(unread="pilots")
    assert (halved.tokenize(" pilots"), bpe.tokenize(" pilots")) == (["Ġpilot", "s"], ["Ġpilots"])
    trials = draw_trials("agreement", 40, halved, CONTEXT)
    others = [each for each in some("agreement", None) if "The pilot" not in each.clean]
    assert list(trials.contrasts) == others[:40]
    found = (
        r"agreement: dropped \d+ pairs and drew others \(the clean prompt takes (\d+) tokens, the corrupt one (\d+)\)"
    )
    (note,) = trials.notes
    said = re.fullmatch(found, note)
    assert said and abs(int(said[1]) - int(said[2])) == 1


def test_a_branching_token_that_begins_the_other_is_dropped_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "1"), ("Ġ1", "7"), ("Ġ17", "5")]  # 1759 is " 175" and "9", 1719 is " 17" and "19"
    table = {piece: n for n, piece in enumerate([*pieces, *map("".join, merges)])}
    made = Tokenizer(models.BPE(table, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    contrast = Contrast("from the year 1739", "from the year 1701", " 1759", " 1719", "mine")
    monkeypatch.setitem(TASKS, "mine", Task(lambda *_: iter([contrast]), "", replaces=True))
    with pytest.raises(UserError, match="the answers first differ at ' 175' against ' 17', its beginning"):
        draw_trials("mine", 1, PreTrainedTokenizerFast(tokenizer_object=made), CONTEXT)


@pytest.mark.parametrize("task", ["ioi", "agreement", "pronouns"])
def test_a_tokenizer_without_the_words_is_refused(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PATIENCE", 20)
    found = f"--task {task} --trials 15: only 0 can be drawn, 35 were dropped .*; write a JSON Lines file"
    with pytest.raises(UserError, match=found):
        draw_trials(task, None, word_level("the", "to", "year"), CONTEXT)


def test_a_tokenizer_with_too_few_words_for_a_random_sequence_is_refused() -> None:
    found = "--task induction: 12 words in small letters are needed, the tokenizer holds 2; write a JSON Lines file"
    with pytest.raises(UserError, match=found):
        draw_trials("induction", None, word_level("a", "to", "the", "year", "Which"), CONTEXT)


def test_help_names_every_task() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "scripts/cache.py", "--help"], cwd=root, capture_output=True, text=True)
    words = " ".join(done.stdout.split())
    assert all(f"{name}: {task.asks}" in words for name, task in TASKS.items())


def test_combinations_never_come_twice_and_all_come_where_there_are_few() -> None:
    few = list(sampling.combinations(0, "abc", range(4)))
    assert sorted(few) == [(letter, number) for letter in "abc" for number in range(4)] != few
    many = list(sampling.combinations(0, range(1000), range(1000)))
    assert len(set(many)) == len(many) == sampling.LIMIT
    assert list(sampling.combinations(0, "abc", "")) == []


# Decimals


@pytest.mark.parametrize("task", VARIANTS)
def test_decimals_are_ordered_one_way_as_numbers_and_the_other_as_versions(task: str) -> None:
    for each in some(task, None, n=1000):
        (whole, larger), (same, smaller) = each.answer.strip().split("."), each.wrong.strip().split(".")
        assert whole == same and float(each.answer) > float(each.wrong) and int(larger) < int(smaller)
        assert "0" not in (larger[-1], smaller[-1])
        named = [numbers(prompt) for prompt in (each.clean, each.corrupt)]
        assert all(set(pair) == {each.answer.strip(), each.wrong.strip()} for pair in named)
        if task != "decimal-order":
            assert named[0] == named[1]


@pytest.mark.parametrize("task", [task for task in VARIANTS if task != "decimal-order"])
def test_the_larger_decimal_is_named_first_in_every_other_pair(task: str) -> None:
    for number, each in enumerate(some(task, None)):
        assert (numbers(each.clean)[0] == each.answer.strip()) == (number % 2 == 0)


def test_decimal_order_names_the_larger_last_when_clean_and_first_when_corrupt() -> None:
    for each, plain in zip(some("decimal-order", None), some("decimal", None), strict=True):
        assert numbers(each.clean)[::-1] == numbers(each.corrupt) == [each.answer.strip(), each.wrong.strip()]
        assert plain.clean in (each.clean, each.corrupt)


def test_decimal_digits_sets_one_two_and_three_fractional_digits_against_each_other_by_turns() -> None:
    found = [tuple(len(x.split(".")[1]) for x in (each.answer, each.wrong)) for each in some("decimal-digits", None)]
    assert found == [((1, 2), (1, 3), (2, 3))[number % 3] for number in range(N)]


def test_decimal_whole_has_integer_parts_of_two_three_and_four_digits_by_turns_and_none_of_decimals() -> None:
    wholes = [each.answer.strip().split(".")[0] for each in some("decimal-whole", None)]
    assert [len(whole) for whole in wholes] == [2 + number % 3 for number in range(N)]
    assert min(map(int, wholes)) > 20


def test_decimal_format_asks_in_nine_pairs_of_other_words() -> None:
    forms = Counter(
        tuple(re.sub(r"\d+\.\d+", "{}", prompt) for prompt in (each.clean, each.corrupt))
        for each in some("decimal-format", None, n=180)
    )
    assert list(forms.values()) == [20] * 9
    cleans, corrupts = ({form[run] for form in forms} for run in range(2))
    assert not cleans & corrupts and not {PLAIN, CHAT} & (cleans | corrupts)
    assert all(form.endswith(":") for form in cleans | corrupts)


# Words


def test_ioi_asks_for_the_name_that_occurs_once() -> None:
    for number, each in enumerate(some("ioi", None, n=1000)):
        receiver, giver = each.answer.strip(), each.wrong.strip()
        for prompt, (once, twice) in ((each.clean, (receiver, giver)), (each.corrupt, (giver, receiver))):
            people = [word for word in re.findall("[A-Z][a-z]+", prompt) if word in (*names.WOMEN, *names.MEN)]
            assert Counter(people) == {once: 1, twice: 2} and people[2] == twice
            assert prompt.endswith(" to") and not prompt.startswith(people[0])
        first = re.search(f"{receiver}|{giver}", each.clean)
        assert first and (first[0] == receiver) == (number % 2 == 0)


def test_greater_than_ends_later_and_equally_far_from_the_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    for each in some("greater-than", tokenizer, n=1000):
        ((began,), (early,)) = (map(int, re.findall(r"\d{4}", prompt)) for prompt in (each.clean, each.corrupt))
        later, earlier = int(each.answer), int(each.wrong)
        assert earlier < began < later and later - began == began - earlier
        assert early % 100 == 1 and early < earlier, "corrupt has both right"
        assert len({year // 100 for year in (began, early, later, earlier)}) == 1
        assert len({year // 10 for year in (began, later, earlier)}) == 3


def test_every_year_that_begins_with_the_right_branching_token_is_later_and_with_the_wrong_one_earlier(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    trials = draw_trials("greater-than", 100, tokenizer, CONTEXT)
    for trial, each in enumerate(trials.contrasts):
        (began,) = map(int, re.findall(r"\d{4}", each.clean))
        row = trials.tokens[0, trial, : trials.length[0, trial]].tolist()
        for token, is_later in zip(trials.answer_tokens[trial].tolist(), (True, False), strict=True):
            beginning = tokenizer.decode([*row, token]).removeprefix(each.clean).strip()
            years = [year for year in range(1000, 2000) if str(year).startswith(beginning)]
            assert years and all((year > began) == is_later and year != began for year in years)


def test_greater_than_takes_only_years_that_are_cut_alike(bpe: PreTrainedTokenizerFast) -> None:
    def cut(year: int) -> list[int]:
        return [len(piece.lstrip("Ġ")) for piece in bpe.tokenize(f"the year {year}")[len(bpe.tokenize("the year")) :]]

    for each in some("greater-than", bpe, n=1000):
        years = map(int, [*numbers(each.clean), *numbers(each.corrupt), each.answer, each.wrong])
        assert len({tuple(cut(year)) for year in years}) == 1
    everything = {tuple(cut(year)) for year in range(1100, 1800)}
    assert len(everything) > 1, "this tokenizer cuts years in several ways"


def test_agreement_gives_the_verb_the_number_of_the_head_noun_beside_attractors_of_either() -> None:
    several, one = {" are", " were", " have"}, {" is", " was", " has"}
    cells = Counter()
    for number, each in enumerate(some("agreement", None, n=1000)):
        for prompt, verb, other in ((each.clean, each.answer, each.wrong), (each.corrupt, each.wrong, each.answer)):
            the, head, *middle = prompt.split()
            is_plural = head.endswith("s")
            assert the == "The" and {verb, other} <= several | one
            assert (verb in several) == is_plural and (other in several) != is_plural
            attractor = middle[middle.index("the") + 1]
            cells[is_plural, attractor.endswith("s")] += 1
            assert middle[0] != "that" or re.search("(ed|saw|knew)$", middle[-1]), "a verb in the past has no number"
        assert each.clean.split()[1].endswith("s") == (number % 2 == 1)
        assert each.clean.split()[2:] == each.corrupt.split()[2:]
    assert len(cells) == 4 and min(cells.values()) > 400


def test_pronouns_follow_the_names_gender() -> None:
    assert not set(names.WOMEN) & set(names.MEN)
    for number, each in enumerate(some("pronouns", None, n=1000)):
        for prompt, pronoun in ((each.clean, each.answer), (each.corrupt, each.wrong)):
            (name,) = set(re.findall(r"\w+", prompt)) & {*names.WOMEN, *names.MEN}
            assert pronoun == (" she" if name in names.WOMEN else " he")
            verb = re.search(r" (is|was) a ", prompt)
            assert verb and prompt.endswith(f", {verb[1]}n't")
        assert each.answer == (" she" if number % 2 == 0 else " he")


def test_induction_repeats_words_up_to_one_whose_successor_corrupt_exchanges(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for each in some("induction", tokenizer, n=500):
        runs = each.clean.split(), each.corrupt.split()
        for words, successor in zip(runs, (each.answer.strip(), each.wrong.strip()), strict=True):
            *before, last = words
            assert before.count(last) == 1, "the last word has one earlier place"
            assert before[before.index(last) + 1] == successor
            first = words[: len(set(words))]
            assert len(set(first)) == len(first) and words == first + first[: len(words) - len(first)]
        assert runs[0][-1] == runs[1][-1] and Counter(runs[0]) == Counter(runs[1])


def test_induction_draws_words_that_are_one_token_in_the_middle_of_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    words = {word for each in some("induction", tokenizer) for word in each.clean.split()}
    assert len(words) > 100
    for word in words:
        assert len(tokenizer.tokenize(f"Some {word}")) == len(tokenizer.tokenize("Some")) + 1
        assert re.fullmatch("[a-z]{3,9}", word)


def test_the_same_trials_are_drawn_whatever_their_number(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in REPLACES:
        few, many = (draw_trials(task, n, tokenizer, CONTEXT) for n in (5, 20))
        assert many.contrasts[:5] == few.contrasts
        assert isinstance(many, Trials) and np.array_equal(many.answer_tokens[:5], few.answer_tokens)
