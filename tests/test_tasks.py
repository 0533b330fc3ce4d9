"""Laws of tasks: which contrasts are drawn, where their answers branch, how positions are aligned, what is refused."""

import hashlib
import json
import random
import string
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headlapse.engine.runtime.errors import UserError
from headlapse.engine.study.alignment import align
from headlapse.engine.study.prompts import Trials, draw_trials, load_contrasts, same_tokens, task_digest
from headlapse.engine.study.tasks.contrast import FIELDS
from headlapse.engine.study.tasks.registry import TASKS

CONTEXT = 64
UNKNOWN, BOS, EOS = "[UNK]", "<s>", "</s>"
WORDS = ("Which", "is", "bigger", "or", "Answer", "Q", "A", ":", "?", ".", "yes", "no", "sun", "sunny")
PUBLISHED = {"clean": "Which is bigger: 9.8 or 9.11?", "corrupt": "Q: Which is bigger: 9.8 or 9.11?\nA:"}


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def word_level(split: pre_tokenizers.PreTokenizer, words: list[str]) -> Tokenizer:
    vocab = {word: number for number, word in enumerate(dict.fromkeys([UNKNOWN, BOS, EOS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    return tokenizer


def whole_tokenizer(extra: str = "", unknown: tuple[str, ...] = ()) -> Tokenizer:
    """Words and whole numbers with their leading space, as byte-level tokenizers cut them; `extra` is cut first."""
    split = pre_tokenizers.Split(Regex(extra + r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]|\s"), "isolated")
    words = [*WORDS, *map(str, range(100)), "\n", " ", "A: 9"]
    return word_level(split, [word for word in (*words, *(f" {word}" for word in words)) if word not in unknown])


@pytest.fixture(scope="module")
def digits() -> PreTrainedTokenizerFast:
    """Word-level, white space dropped, digits apart."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    return fast(word_level(split, [*WORDS, *string.digits]), unk_token=UNKNOWN)


@pytest.fixture(scope="module")
def whole() -> PreTrainedTokenizerFast:
    """Numbers kept whole: ` 9`, `.`, `11`."""
    return fast(whole_tokenizer(), unk_token=UNKNOWN)


@pytest.fixture(scope="module")
def bounded() -> PreTrainedTokenizerFast:
    """Puts a token before and another after every text."""
    tokenizer = whole_tokenizer()
    ends = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
    return fast(tokenizer, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS)


def byte_level(*merges: tuple[str, str], trim: bool) -> PreTrainedTokenizerFast:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def line(**fields: object) -> dict[str, object]:
    return {"clean": "Which is bigger: 1.5 or 1.4?", "corrupt": "A:", "answer": " 1.5", "wrong": " 1.4"} | fields


def write(directory: Path, *lines: object) -> str:
    path = directory / "my.jsonl"
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in lines) + "\n")
    return str(path)


def refusal(task: str, tokenizer: PreTrainedTokenizerFast, n_trials: int | None = None, context: int = CONTEXT) -> str:
    with pytest.raises(UserError) as caught:
        draw_trials(task, n_trials, tokenizer, context)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Built-in tasks


def test_decimal_begins_with_the_published_numbers() -> None:
    first = next(iter(load_contrasts("decimal", tokenizer=None)))
    assert (first.clean, first.corrupt) == (f"{PUBLISHED['clean']}\nAnswer:", PUBLISHED["corrupt"])
    assert (first.answer, first.wrong) == (" 9.8", " 9.11")


def test_decimal_pairs_are_distinct_and_ordered_one_way_as_numbers_and_the_other_as_versions() -> None:
    contrasts = list(TASKS["decimal"].contrasts(0, None))
    assert len({frozenset((each.answer, each.wrong)) for each in contrasts}) == len(contrasts) == 6480
    for each in contrasts:
        (whole, tenths), (same, hundredths) = each.answer.split("."), each.wrong.split(".")
        assert whole == same and (len(tenths), len(hundredths)) == (1, 2) and hundredths[-1] != "0"
        assert float(each.answer) > float(each.wrong) and int(tenths) < int(hundredths)


def test_decimal_names_the_larger_number_first_in_every_other_pair() -> None:
    for number, each in enumerate(islice(TASKS["decimal"].contrasts(3, None), 300)):
        larger_first = each.clean.index(each.answer + " or") if number % 2 == 0 else each.clean.index(each.answer + "?")
        assert larger_first > 0 and each.corrupt == f"Q: {each.clean.removesuffix('Answer:')}A:"


def test_a_seed_draws_the_same_pairs_again_and_another_seed_others() -> None:
    first, again, other = (list(islice(TASKS["decimal"].contrasts(seed, None), 50)) for seed in (1, 1, 2))
    assert first == again and first[1:] != other[1:]


def test_more_trials_only_add_trials(digits: PreTrainedTokenizerFast) -> None:
    few, many = (draw_trials("decimal", n, digits, CONTEXT) for n in (15, 40))
    assert many.contrasts[:15] == few.contrasts


def test_a_built_in_task_has_15_trials_unless_told_otherwise(digits: PreTrainedTokenizerFast) -> None:
    assert draw_trials("decimal", None, digits, CONTEXT).n_trials == 15


def test_identical_trials_are_computed_once_and_counted_once(whole: PreTrainedTokenizerFast) -> None:
    for n_trials, repeats in ((None, 15), (4, 4)):
        trials = draw_trials("published", n_trials, whole, CONTEXT)
        (contrast,) = trials.contrasts
        assert (contrast.clean, contrast.corrupt) == tuple(PUBLISHED.values())
        assert contrast.repeats == repeats
        assert trials.notes == (
            f"published: {repeats} trials, 1 distinct; identical ones are computed once and counted once",
        )


# Branching


def test_digits_apart_branch_at_the_first_decimal(digits: PreTrainedTokenizerFast) -> None:
    trials = draw_trials("published", 1, digits, CONTEXT)
    assert digits.convert_ids_to_tokens(trials.answer_tokens[0].tolist()) == ["8", "1"]
    assert trials.length.tolist() == [[15], [19]]
    clean, corrupt = map(" ".join, trials.token_text[:, 0])
    assert clean.rstrip() == "Which is bigger : 9 . 8 or 9 . 1 1 ? 9 ."
    assert corrupt == "Q : Which is bigger : 9 . 8 or 9 . 1 1 ? A : 9 ."


def test_numbers_kept_whole_branch_at_the_whole_fraction(whole: PreTrainedTokenizerFast) -> None:
    trials = draw_trials("published", 1, whole, CONTEXT)
    assert whole.convert_ids_to_tokens(trials.answer_tokens[0].tolist()) == ["8", "11"]
    assert trials.token_text[1, 0, -5:].tolist() == ["\n", "A", ":", " 9", "."]


def test_special_tokens_are_kept_as_the_tokenizer_adds_them(bounded: PreTrainedTokenizerFast) -> None:
    trials = draw_trials("decimal", 5, bounded, CONTEXT)
    assert (trials.token_text[:, :, 0] == BOS).all() and EOS not in trials.token_text


def test_a_row_followed_by_an_answer_is_how_the_tokenizer_reads_prompt_and_answer(
    digits: PreTrainedTokenizerFast, whole: PreTrainedTokenizerFast, bounded: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (digits, whole, bounded):
        trials = draw_trials("decimal", 40, tokenizer, CONTEXT)
        for run in range(2):
            for trial, contrast in enumerate(trials.contrasts):
                row = trials.tokens[run, trial, : trials.length[run, trial]].tolist()
                for answer, token in zip((contrast.answer, contrast.wrong), trials.answer_tokens[trial], strict=True):
                    read = tokenizer((contrast.clean, contrast.corrupt)[run] + answer)["input_ids"]
                    assert read[: len(row) + 1] == [*row, token]


def test_a_row_followed_by_a_continuation_is_the_whole_prompt_and_answer_but_for_what_the_tokenizer_appends(
    digits: PreTrainedTokenizerFast, bounded: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In byte-level tokenizers a token of nothing but spaces spans no text: at the branching, or later on."""
    spaced = write(tmp_path, line(answer=" 1  5", wrong=" 14"), line(answer=" a  b", wrong=" a c"))
    cases = [(byte_level(("Ġ", "Ġ"), trim=trim), spaced, 0) for trim in (True, False)]
    cases += [(byte_level(trim=True), spaced, 0), (digits, "decimal", 0), (bounded, "decimal", 1)]
    for tokenizer, task, n_appended in cases:
        trials = draw_trials(task, None, tokenizer, CONTEXT)
        assert trials.continuation is not None
        assert (trials.continuation[..., 0] == trials.answer_tokens).all()
        for (run, trial), length in np.ndenumerate(trials.length):
            contrast, row = trials.contrasts[trial], trials.tokens[run, trial, :length].tolist()
            for text, padded in zip((contrast.answer, contrast.wrong), trials.continuation[trial], strict=True):
                read = tokenizer((contrast.clean, contrast.corrupt)[run] + text)["input_ids"]
                assert read[: len(read) - n_appended] == [*row, *padded[padded >= 0].tolist()]


def test_trials_whose_answers_go_on_otherwise_are_not_the_same(digits: PreTrainedTokenizerFast) -> None:
    trials = draw_trials("decimal", 5, digits, CONTEXT)
    assert trials.continuation is not None
    other = replace(trials, continuation=np.where(trials.continuation > 0, 7, -1))
    assert same_tokens(trials, trials) and not same_tokens(trials, other)
    assert same_tokens(trials, replace(other, continuation=None)), "a store from before kept none"


def test_rows_are_padded_on_the_right_with_0_up_to_the_longest(digits: PreTrainedTokenizerFast) -> None:
    trials = draw_trials("decimal", 40, digits, CONTEXT)
    real = np.arange(trials.tokens.shape[-1]) < trials.length[..., None]
    assert trials.tokens.shape[-1] == trials.length.max()
    assert (trials.tokens[~real] == 0).all() and ((trials.token_text != "") == real).all()


def test_pairs_that_do_not_branch_are_dropped_with_a_word_and_others_are_drawn() -> None:
    odd = tuple(str(number) for number in range(11, 100, 2))
    tokenizer = fast(whole_tokenizer(unknown=odd), unk_token=UNKNOWN)
    trials = draw_trials("decimal", 15, tokenizer, CONTEXT)
    drawn = islice(TASKS["decimal"].contrasts(0, None), 1000)
    assert list(trials.contrasts) == list(islice((each for each in drawn if int(each.wrong[-1]) % 2 == 0), 15))
    (note,) = trials.notes
    assert "dropped" in note and "' 9.8' and ' 9.11' first differ at a special token ('8' against '[UNK]')" in note


@pytest.mark.slow
def test_a_built_in_task_that_never_branches_is_refused() -> None:
    tokenizer = fast(whole_tokenizer(unknown=tuple(map(str, range(1, 100)))), unk_token=UNKNOWN)
    assert "only 0 can be drawn, 6480 were dropped" in refusal("decimal", tokenizer)
    assert "--trials 7: only 0 can be drawn, 1 were dropped" in refusal("published", tokenizer, 7)


@pytest.mark.slow
def test_more_trials_than_there_are_pairs_are_refused(digits: PreTrainedTokenizerFast) -> None:
    assert "--trials 7000: only 6480 can be drawn; ask for at most 6480" in refusal("decimal", digits, 7000)


def test_answers_that_are_one_anothers_beginning_are_refused(
    digits: PreTrainedTokenizerFast, bounded: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = write(tmp_path, line(), line(answer=" sun.", wrong=" sun"))
    message = refusal(task, digits)
    assert message.startswith(f"line 2 of {task}: ' sun.' and ' sun' never differ")
    assert "first differ at a special token ('.' against '</s>')" in refusal(task, bounded)


def test_answers_that_begin_alike_as_text_but_not_as_tokens_are_kept(
    whole: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trials = draw_trials(write(tmp_path, line(answer=" sunny", wrong=" sun")), None, whole, CONTEXT)
    assert whole.convert_ids_to_tokens(trials.answer_tokens[0].tolist()) == [" sunny", " sun"]


def test_answers_the_tokenizer_reads_alike_are_refused(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert "they read the same" in refusal(write(tmp_path, line(answer=" Zürich", wrong=" Bern")), digits)


@pytest.mark.parametrize("trim", [True, False], ids=["spaces-left-out-of-spans", "spaces-in-spans"])
def test_a_branching_token_that_begins_inside_the_prompt_is_refused(trim: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(("Ġ", "8"), ("Ġ", "7"), ("A", "b"), trim=trim)
    space = write(tmp_path, line(clean="Q: ", corrupt="A: ", answer="8", wrong="7"))
    assert "begins inside the prompt (' 8' against ' 7')" in refusal(space, tokenizer)
    letter = write(tmp_path, line(clean="A", corrupt="A", answer="b", wrong="c"))
    assert "begins inside the prompt ('Ab' against 'A')" in refusal(letter, tokenizer)
    mended = write(tmp_path, line(clean="Q:", corrupt="A:", answer=" 8", wrong=" 7"))
    trials = draw_trials(mended, None, tokenizer, CONTEXT)
    assert trials.token_text[0, 0].tolist() == ["Q", ":"]


def test_clean_and_corrupt_that_read_the_answers_differently_are_dropped_or_refused(tmp_path: Path) -> None:
    tokenizer = fast(whole_tokenizer(extra="A: 9|"), unk_token=UNKNOWN)
    trials = draw_trials("decimal", 200, tokenizer, CONTEXT)
    assert not any(each.answer.startswith(" 9.") for each in trials.contrasts)
    assert "' 9.8' and ' 9.11' become other tokens after clean than after corrupt" in trials.notes[0]
    task = write(tmp_path, line(clean="Answer:", answer=" 9.8", wrong=" 9.11"))
    assert "line 1 of" in refusal(task, tokenizer) and "let both prompts end alike" in refusal(task, tokenizer)


def test_answers_cut_differently_after_clean_than_after_corrupt_are_refused(tmp_path: Path) -> None:
    # "ab cd" against "ab c e" after a, but "bc d" against "bc e" after x.
    tokenizer = byte_level(("a", "b"), ("b", "c"), ("c", "d"), trim=True)
    task = write(tmp_path, line(clean="a", corrupt="x", answer="bcd", wrong="bce"))
    assert "become other tokens after clean than after corrupt; let both prompts end alike" in refusal(task, tokenizer)


def test_a_prompt_without_a_token_is_refused(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert "no token of the prompt is left" in refusal(
        write(tmp_path, line(clean=" ", answer=" yes", wrong=" no")), digits
    )


@pytest.mark.slow
def test_random_answers_are_either_read_at_one_shared_branching_token_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    alphabet = ["a", "b", " ", ":"]
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "Ġ"), ("b", "a"), (":", "a"), ("ab", "a"), ("Ġ", "b"), ("Ġa", "b")]
    outcomes = {"kept": 0, "refused": 0}
    for trim in (True, False):
        tokenizer = byte_level(*merges, trim=trim)
        for _ in range(300):
            fields = {name: "".join(draw.choices(alphabet, k=draw.randint(1, 5))) for name in FIELDS}
            if fields["answer"] == fields["wrong"]:
                continue
            texts = [[fields[run] + fields[answer] for answer in FIELDS[2:]] for run in FIELDS[:2]]
            read = [[tokenizer(text)["input_ids"] for text in pair] for pair in texts]
            try:
                trials = draw_trials(write(tmp_path, fields), None, tokenizer, CONTEXT)
            except UserError:
                outcomes["refused"] += 1
                continue
            outcomes["kept"] += 1
            for run in range(2):
                n = trials.length[run, 0]
                row = trials.tokens[run, 0, :n].tolist()
                assert [tokens[: n + 1] for tokens in read[run]] == [[*row, token] for token in trials.answer_tokens[0]]
                assert len(tokenizer.decode(row)) >= len(fields[FIELDS[run]]), "the whole prompt is run"
    assert min(outcomes.values()) > 50


# Files


def test_a_file_gives_all_its_lines_in_order_and_blank_lines_are_skipped(
    digits: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = write(tmp_path, line(answer=" 1.5"), "", line(answer=" 1.6"), "  \r", line(answer=" 1.7"))
    trials = draw_trials(task, None, digits, CONTEXT)
    assert [each.answer for each in trials.contrasts] == [" 1.5", " 1.6", " 1.7"]
    assert [each.source for each in trials.contrasts] == [f"line {n} of {task}" for n in (1, 3, 5)]
    assert trials.notes == ()
    assert draw_trials(task, 2, digits, CONTEXT).contrasts == trials.contrasts[:2]


def test_a_file_shorter_than_the_trials_asked_for_is_used_whole_with_a_note(
    digits: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trials = draw_trials(write(tmp_path, line(), line(answer=" 1.6")), 15, digits, CONTEXT)
    assert trials.n_trials == 2 and "holds 2 trials where --trials asks for 15" in trials.notes[0]


def test_lines_with_the_same_tokens_are_one_trial(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    task = write(tmp_path, line(), line(answer=" 1.6"), line(), line(clean="Which  is bigger: 1.5 or 1.4?"))
    trials = draw_trials(task, None, digits, CONTEXT)
    assert [each.repeats for each in trials.contrasts] == [3, 1]
    assert "4 trials, 2 distinct" in trials.notes[0]
    unknown = write(tmp_path, line(clean="Whales:"), line(clean="Herrings:"))
    assert draw_trials(unknown, None, digits, CONTEXT).n_trials == 1


def test_clean_may_equal_corrupt(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trials = draw_trials(write(tmp_path, line(clean="A:", corrupt="A:")), None, digits, CONTEXT)
    assert (trials.tokens[0] == trials.tokens[1]).all()


def test_a_byte_order_mark_and_line_separators_inside_text_are_no_matter(
    digits: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line(clean="A\u2028A:"), ensure_ascii=False).encode() + b"\r\n")
    assert draw_trials(str(path), None, digits, CONTEXT).contrasts[0].clean == "A\u2028A:"


def test_answers_glued_to_their_prompt_are_noted_once(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    glued = [line(answer="1.5"), line(answer="1.6"), line(clean="A: ", corrupt="A: ", answer="1.7", wrong="1.8")]
    trials = draw_trials(write(tmp_path, *glued), None, digits, CONTEXT)
    (note,) = trials.notes
    assert "no white space between prompt and answer in 2 trials, first in line 1" in note


def test_words_the_tokenizer_does_not_know_are_noted(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trials = draw_trials(write(tmp_path, line(clean="Whales or whales:")), None, digits, CONTEXT)
    assert "2 words unknown to the tokenizer, first 'Whales'" in trials.notes[0]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{'clean': 1}", "not JSON (Expecting property name enclosed in double quotes, column 2); write one {"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ({"clean": "A:", "wrong": " no"}, "corrupt, answer missing; write all of clean, corrupt, answer, wrong"),
        (line(labels=1), "unknown field 'labels'; known are clean, corrupt, answer, wrong"),
        (line(answer=9.8), "answer is 9.8; write some text, in quotes"),
        (line(corrupt=None), "corrupt is null"),
        (line(wrong=""), 'wrong is ""'),
        (line(clean="\ud83d"), 'clean is "\\ud83d"'),
        (line(wrong=" 1.5"), "answer and wrong are both ' 1.5'; write two different ones"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_mend(
    bad: object, said: str, digits: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = write(tmp_path, line(), "", bad)
    message = refusal(task, digits)
    assert message.startswith(f"line 3 of {task}: ") and said in message


def test_text_that_is_not_utf8_is_refused_with_its_line(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(json.dumps(line()).encode() + b"\n" + '{"clean": "größer"'.encode("latin-1"))
    assert refusal(str(path), digits).startswith(f"line 2 of {path}: not UTF-8")


def test_an_empty_file_is_refused(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for lines in ([""], ["", "  ", "\t"]):
        task = write(tmp_path, *lines)
        assert refusal(task, digits).startswith(f"--task {task}: the file is empty; write one")


def test_a_directory_is_refused(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert refusal(str(tmp_path), digits).startswith(f"--task {tmp_path}: a directory")


def test_an_unknown_name_is_refused_with_the_built_in_ones_and_the_nearest(digits: PreTrainedTokenizerFast) -> None:
    message = refusal("decimals", digits)
    assert "no such file; did you mean decimal? built in are decimal, decimal-order, " in message
    assert "did you mean" not in refusal("no/such/file.jsonl", digits)


def test_no_trials_are_refused(digits: PreTrainedTokenizerFast) -> None:
    for n_trials in (0, -3):
        assert f"--trials {n_trials}: at least one" in refusal("decimal", digits, n_trials)


def test_a_prompt_longer_than_the_context_is_refused_and_one_as_long_is_not(
    digits: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = write(tmp_path, line(clean="A:"), line(clean="Q:", corrupt="A " * 14))
    assert draw_trials(task, None, digits, context=16).length.max() == 16
    message = refusal(task, digits, context=15)
    assert message.startswith(f"line 2 of {task}: the corrupt prompt takes 16 tokens, the model's context is 15; write")
    assert "decimal: the clean prompt takes" in refusal("decimal", digits, context=11)


def test_a_digest_is_a_files_sha256_and_a_built_in_tasks_name(tmp_path: Path) -> None:
    task = write(tmp_path, line())
    assert task_digest("decimal") == "decimal"
    assert task_digest(task) == hashlib.sha256(Path(task).read_bytes()).hexdigest()
    with pytest.raises(UserError, match="no such file"):
        task_digest(str(tmp_path / "other.jsonl"))


# Alignment


@pytest.fixture(scope="module")
def decimals(digits: PreTrainedTokenizerFast) -> Trials:
    return draw_trials("decimal", 30, digits, CONTEXT)


@pytest.fixture
def equals(digits: PreTrainedTokenizerFast, tmp_path: Path) -> Trials:
    """Clean and corrupt equally long, trials not: 4 and 6 tokens."""
    short = line(clean="Q:", corrupt="A:")
    return draw_trials(write(tmp_path, short, line(clean="Q: A A", corrupt="A: Q A")), None, digits, CONTEXT)


def test_last_is_the_last_real_token_of_each_run(decimals: Trials) -> None:
    last = align(decimals, "last")
    assert (last.positions[..., 0] == decimals.length - 1).all()
    assert last.valid.all() and last.valid.shape == (30, 1) and (last.read == 0).all()


def test_end_k_is_the_last_k_tokens_of_each_run_in_order(decimals: Trials) -> None:
    for k in (1, 3, int(decimals.length.min())):
        end = align(decimals, f"end:{k}")
        for run in range(2):
            for trial in range(30):
                n = int(decimals.length[run, trial])
                assert end.positions[run, trial].tolist() == list(range(n - k, n))
        assert end.valid.all() and (end.read == k - 1).all()


def test_end_1_is_last(decimals: Trials) -> None:
    end, last = align(decimals, "end:1"), align(decimals, "last")
    assert (end.positions == last.positions).all() and (end.read == last.read).all()


def test_all_pairs_every_position_with_itself_as_far_as_a_trial_goes(equals: Trials) -> None:
    every = align(equals, "all")
    assert equals.length.tolist() == [[4, 6], [4, 6]]
    assert (every.positions == np.arange(6)).all() and every.positions.shape == (2, 2, 6)
    assert every.valid.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert every.read.tolist() == [3, 5]


def test_read_points_at_the_token_before_the_branch(decimals: Trials, equals: Trials) -> None:
    for trials, specs in ((decimals, ("last", "end:4")), (equals, ("last", "end:4", "all"))):
        for spec in specs:
            alignment = align(trials, spec)
            for trial in range(trials.n_trials):
                at = alignment.positions[:, trial, alignment.read[trial]]
                assert (at == trials.length[:, trial] - 1).all()


def test_all_positions_of_unequal_prompts_are_refused_with_both_rows_in_columns(
    digits: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = write(tmp_path, line(clean="Q:", corrupt="A:"), line(clean="Which is bigger:", corrupt="Q:"))
    with pytest.raises(UserError) as caught:
        align(draw_trials(task, None, digits, CONTEXT), "all")
    said, *view = str(caught.value).split("\n")
    assert f"line 2 of {task} has 6 and 4 tokens; take last or end:K" in said
    assert view == [
        "position  0        1     2         3    4    5",
        "clean     'Which'  'is'  'bigger'  ':'  '1'  '.'",
        "corrupt   'Q'      ':'   '1'       '.'",
    ]


def test_more_positions_than_the_shortest_prompt_has_are_refused_with_both_rows_aligned_from_the_end(
    digits: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = write(tmp_path, line(corrupt="Q: A:"), line(clean="Q: A:", corrupt="A:"))
    with pytest.raises(UserError) as caught:
        align(draw_trials(task, None, digits, CONTEXT), "end:5")
    said, *view = str(caught.value).split("\n")
    assert said == f"--positions end:5: line 2 of {task} has only 4 tokens; take end:4 or fewer"
    assert view == [
        "position  -6   -5   -4   -3   -2   -1",
        "clean     'Q'  ':'  'A'  ':'  '1'  '.'",
        "corrupt             'A'  ':'  '1'  '.'",
    ]


def test_a_view_of_long_rows_is_cut(digits: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trials = draw_trials(write(tmp_path, line(clean="A " * 100)), None, digits, 200)
    for spec in ("all", "end:50"):
        with pytest.raises(UserError) as caught:
            align(trials, spec)
        view = str(caught.value).split("\n")[1:]
        assert view[0] == "(66 positions not shown)" and len(view) == 10 and max(map(len, view)) <= 120


@pytest.mark.parametrize("spec", ["", "first", "end", "end:", "end:0", "end:-2", "end:two", "end:1.5", "ALL", "end:3 "])
def test_a_choice_of_positions_outside_the_three_forms_is_refused(spec: str, decimals: Trials) -> None:
    with pytest.raises(UserError, match=r"write last, end:K \(the last K, at least 1\) or all"):
        align(decimals, spec)
