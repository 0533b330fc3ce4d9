"""Laws of comparing training runs: heads are matched by effect, intervals are over seeds, parity is tested jointly."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import headlapse
from headlapse.__main__ import main
from headlapse.engine.report.findings.comparison import comparison_lines, comparison_table
from headlapse.engine.statistics.comparison import TrainingRun, compare, over_seeds, parity_over_seeds
from headlapse.engine.statistics.permutation import EqualSplits, find_equal_splits
from headlapse.engine.study.subsets import parse_subsets
from tests.models import save, tiny, tiny_tokenizer
from tests.simulating import unchecked
from tests.test_verdict import N_HEADS, STEPS, planted_run

BALANCED = ("even", "odd", "all", "each", "balanced")


def training_run(name: str, heads: dict[tuple[int, int], float], group: str = "tiny", **options: object) -> TrainingRun:
    run, settings = planted_run(heads, **options)  # type: ignore[arg-type]
    return TrainingRun(name, group, run, settings)


# --- what holds over seeds ---


@pytest.mark.parametrize("n", [2, 3, 9])
def test_an_interval_over_seeds_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 1, n)
    over = over_seeds(values)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (over.low, over.high) == pytest.approx((low, high)) and over.mean == pytest.approx(values.mean())
    assert (over.n, over.of, over.least, over.most) == (n, n, values.min(), values.max())


def test_points_of_training_have_a_geometric_mean_and_seeds_without_a_value_are_counted() -> None:
    over = over_seeds(np.array([16.0, 64.0, np.nan]), is_log=True)
    assert (over.n, over.of, over.mean) == (2, 3, pytest.approx(32))
    low, high = stats.t.interval(0.95, 1, math.log(32), stats.sem([math.log(16), math.log(64)]))
    assert (over.low, over.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert over_seeds(np.array([0.0, 64.0]), is_log=True).mean == 32, "step 0 has no logarithm"
    assert math.isnan(over_seeds(np.array([np.nan])).mean) and math.isnan(over_seeds(np.array([1.0])).low)


def test_heads_are_matched_by_their_effects_whatever_their_numbers() -> None:
    runs = [
        training_run("a", {(1, 0): 3.0, (2, 5): 1.0}, onset=48, seed=1),
        training_run("b", {(3, 7): 3.4, (1, 2): 1.2}, onset=64, seed=2),
        training_run("c", {(0, 4): 2.6, (0, 1): 0.8}, onset=96, seed=3),
    ]
    found = compare(runs)
    assert found.table["heads"].map(lambda heads: heads[:2]).tolist() == [
        ("L1.H0", "L2.H5"), ("L3.H7", "L1.H2"), ("L0.H4", "L0.H1"),
    ]  # fmt: skip
    first, second, since = (found.over_seeds["tiny"][name] for name in ("head_1", "head_2", "head_1_from"))
    assert first.mean == pytest.approx(found.table["head_1"].mean()) and first.low < 3 < first.high
    assert second.low < 1 < second.high and (since.least, since.most) == (48, 96)
    assert found.table["layer"].tolist() == [1, 3, 0]
    assert found.over_seeds["tiny"]["capability"].least == 32


def in_tokens(run: TrainingRun, per_step: int) -> TrainingRun:
    """The same training run, which saw so many tokens a step."""
    return replace(run, run=run.run.assign_coords(tokens_seen=run.run.step * per_step))


def test_training_runs_are_compared_where_the_shortest_ends() -> None:
    short = training_run("short", {(1, 0): 3.0}, steps=STEPS[:10])
    long = training_run("long", {(1, 0): 3.0})
    found = compare([short, long])
    assert found.unit == "steps" and found.at == {"short": "step96", "long": "step96"}
    by_tokens = compare([in_tokens(short, 200), in_tokens(long, 100)])
    assert by_tokens.unit == "tokens" and by_tokens.at == {"short": "step96", "long": "step192"}
    assert by_tokens.table.loc["long", "head_1_from"] == 4800
    assert by_tokens.timeline.loc["short"]["position"].tolist() == [200 * step for step in STEPS[:10]]


def test_training_runs_whose_tokens_are_not_all_known_are_compared_by_steps() -> None:
    known, unknown = in_tokens(training_run("a", {(1, 0): 3.0}), 200), in_tokens(training_run("b", {(1, 0): 3.0}), 100)
    unknown.run["tokens_seen"][3] = -1
    assert compare([known, unknown]).unit == "steps"


def test_a_constant_answer_is_no_capability() -> None:
    run = training_run("a", {})
    run.run["corrupt_logit_diff"][:] = 1.0
    assert math.isnan(compare([run, training_run("b", {})]).table.loc["a", "capability"])


# --- even against odd over seeds ---


def nulls(effects: Sequence[np.ndarray], words: Sequence[str]) -> list[tuple[np.ndarray, EqualSplits]]:
    """Differences of the equal splits of each training run, whose heads add up to these effects."""
    subsets = parse_subsets(words, N_HEADS)
    run, _ = planted_run({}, words)
    splits = find_equal_splits(run)
    assert splits is not None
    means = [subsets.mask @ of_heads for of_heads in effects]
    return [(mean[splits.halves] - mean[splits.rests], splits) for mean in means]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("even", "odd", "balanced"), ("splits:30",)])
def test_arbitrary_heads_are_rejected_in_five_percent_of_comparisons(words: Sequence[str]) -> None:
    """2,000 comparisons of three seeds, heads of very unequal sizes: standard error 0.5 %."""
    rng = np.random.default_rng(0)
    template = nulls([np.zeros(N_HEADS)], words)[0][1]
    mask, sizes = parse_subsets(words, N_HEADS).mask, np.array([9, 3, 1, 1, 1, 1, 1, 1])
    rejected = 0
    with unchecked():
        for seed in range(2000):
            means = [mask @ (rng.standard_normal(N_HEADS) * rng.permutation(sizes)) for _ in range(3)]
            drawn = [(mean[template.halves] - mean[template.rests], template) for mean in means]
            rejected += parity_over_seeds(drawn, seed).p <= 0.05
    assert 0.02 <= rejected / 2000 <= 0.065, rejected


def test_an_effect_of_one_direction_in_every_seed_is_found_and_of_changing_direction_is_not() -> None:
    rng, even = np.random.default_rng(0), np.where(np.arange(N_HEADS) % 2 == 0, 1.0, -1.0)
    noise = [rng.standard_normal(N_HEADS) for _ in range(4)]
    assert parity_over_seeds(nulls([even + part for part in noise], BALANCED)).p < 0.01
    turned = [sign * even + 0.1 * part for sign, part in zip((1, -1, 1, -1), noise, strict=True)]
    assert parity_over_seeds(nulls(turned, BALANCED)).p > 0.5


def test_the_size_of_one_seeds_effects_does_not_outweigh_the_others() -> None:
    rng, even = np.random.default_rng(1), np.where(np.arange(N_HEADS) % 2 == 0, 1.0, -1.0)
    effects = [1000 * rng.standard_normal(N_HEADS), *(even + 0.2 * rng.standard_normal(N_HEADS) for _ in range(3))]
    assert parity_over_seeds(nulls(effects, BALANCED)).p < 0.05


def test_with_few_relabellings_nothing_can_be_told() -> None:
    few = EqualSplits([0, 1], [1, 0], 0, sampled=False, mask=np.eye(2, dtype=bool))
    joint = parity_over_seeds([(np.array([1.0, -1.0]), few)] * 2)
    assert joint.least == 0.5


# --- in words ---


@pytest.mark.thorough
@pytest.mark.parametrize("words", [("each", "all"), ("even", "odd"), BALANCED, ("splits:9", "all", "each"), ("0,1",)])
@pytest.mark.parametrize("groups", [("a", "a", "a"), ("a", "a", "b"), ("a", "b", "c"), tuple("aabbcdefg")])
@pytest.mark.parametrize("n_prompts", [1, 9])
def test_every_comparison_has_its_lines(words: Sequence[str], groups: Sequence[str], n_prompts: int) -> None:
    runs = [
        training_run(f"run{place}", {(1, place % N_HEADS): 2.0}, group, words=words, seed=place, n_prompts=n_prompts)
        for place, group in enumerate(groups)
    ]
    found = compare(runs)
    lines = comparison_lines(found)
    assert len(lines) <= 12 and all(len(line) <= 100 for line in lines), lines
    assert not [line for line in lines if re.search(r"\bnan\b|\binf\b", line)]
    assert len(comparison_table(found)) == len(runs)
    assert any(line.startswith("seeds ") for line in lines) == (len(set(groups)) == len(groups))


def test_without_a_null_no_verdict_on_parity_and_with_one_a_verdict() -> None:
    def line(words: Sequence[str], heads: dict[tuple[int, int], float]) -> str:
        runs = [training_run(f"run{seed}", heads, words=words, seed=seed) for seed in range(3)]
        return next(line for line in comparison_lines(compare(runs)) if line.startswith("even/odd"))

    even = {(1, head): 1.0 for head in range(0, N_HEADS, 2)}
    assert "not tested" in line(("even", "odd", "all", "each"), even)
    assert "yes: +3.99" in line(BALANCED, even) and "over 3 seeds" in line(BALANCED, even)
    assert "no pattern" in line(BALANCED, {(1, 0): 1.0, (1, 1): 1.1, (1, 4): 0.9, (1, 5): 0.8})


# --- the command ---


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of a tiny model with two checkpoints, each in a store of its own, patched."""
    folder, tokenizer = tmp_path_factory.mktemp("seeds"), tiny_tokenizer()
    for seed in (1, 2, 3):
        for step in (1, 2):
            save(
                tiny("neox-parallel", 10 * seed + step),
                folder / f"tiny-seed{seed}" / f"step{step}",
                tokenizer=tokenizer,
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADLAPSE_CACHE", str(folder / "cache"))
        assert main(["cache", "--model", f"{folder}/tiny-seed{{seed}}", "--seeds", "1-3", "--trials", "3"]) == 0
        made = [folder / "cache" / f"tiny-seed{seed}-decimal.zarr" for seed in (1, 2, 3)]
        for store in made:
            assert main(["patch", str(store), "--subsets", "each", "all", "balanced", "--name", "same"]) == 0
        assert main(["patch", str(made[0]), "--direction", "noise", "--name", "other"]) == 0
    return made


@pytest.mark.thorough
def test_seeds_are_compared_by_the_command_and_by_python(
    stores: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, stores), "--name", "same", "--out", str(tmp_path / "page"), "--verbose"]) == 0
    printed = capsys.readouterr().out
    assert "3 training runs of tiny on decimal, at step2, aligned by steps" in printed
    assert "over 3 seeds" in printed and "joint permutation p" in printed
    page = (tmp_path / "page" / "index.html").read_text()
    assert (
        'data-role="verdict"' in page
        and "tiny-seed2-decimal" in page
        and "http" not in page.replace("http://www.w3", "").replace("http-equiv", "")
    )
    assert {path.name for path in (tmp_path / "page").glob("*.csv")} == {"runs.csv", "seeds.csv", "timeline.csv"}

    found = headlapse.compare(*stores, name="same")
    assert str(found.verdict()) in printed
    heads = headlapse.open(stores[1])["same"].heads().xs("step2", level="checkpoint")
    largest = heads.loc[heads["effect"].abs().idxmax(), "effect"]
    significant = heads[heads["p_adjusted"] <= 0.05]
    if significant.empty:
        assert found.table.loc["tiny-seed2-decimal", "head_1"] == pytest.approx(largest)
    assert found.summary.loc[("tiny on decimal", "all"), "n"] == 3
    assert set(found.timeline.loc["tiny-seed1-decimal"].index) == {"step1", "step2"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "was given no store"),
        ("{0}", "alone"),
        ("{0} {0} --name same", "one training run"),
        ("{0} {1} --name other", "no such patched run"),
        ("{0} {1}", "direction differs: noise in"),
        ("{0} nowhere.zarr", "no store"),
        ("{0} {1} --name same --out {0}", "is a store"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    words: str, complaint: str, stores: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words.format(*stores).split()]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.count("\n") == 1 and printed.err.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--model x{seed}", "give the seeds"),
        ("--seeds 1-3", "has no place for them"),
        ("--model x{seed} --seeds 3-1", "write numbers and ranges"),
        ("--model x{seed} --seeds 1,,2", "write numbers and ranges"),
        ("--model x{seed} --seeds 0-999999", "at most 1000"),
        ("--model x{seed} --seeds 1-2 --store s.zarr", "leave --store out"),
    ],
)
def test_seeds_that_cannot_be_read_are_refused(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *words.split()]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.count("\n") == 1


def test_pythias_seeds_are_one_group_and_its_tokens_are_known() -> None:
    from headlapse.comparing import _SEED
    from headlapse.engine.checkpoints.resolve import tokens_per_step

    assert {_SEED.sub("", name) for name in ("pythia-160m", "pythia-160m-seed1", "pythia-160m-seed9")} == {
        "pythia-160m"
    }
    assert tokens_per_step("EleutherAI/pythia-160m-seed3") == 2_097_152 and tokens_per_step("org/other") is None
