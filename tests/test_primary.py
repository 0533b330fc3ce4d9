"""Laws of what is named beforehand: it is in the run before anything is patched, and tested at its own level."""

from pathlib import Path

import pytest
from scipy import stats

import headlapse as hl
from headlapse.engine.checkpoints.planted import planted, task, tokenizer
from headlapse.engine.report.findings.verdict import verdict
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.statistics.primary import primary_test
from headlapse.engine.store.store import Store
from headlapse.engine.study.primary import Primary, hash_of, parse_primary, refuse_untestable
from headlapse.engine.study.subsets import parse_subsets
from headlapse.pipeline import open_run
from tests.models import save
from tests.test_ground_truth import MANY_PAIRS, NOISE

pytestmark = pytest.mark.thorough

WORDS = ("layer:1@step300", "L1.H4@step300")
SUBSETS = ("even", "odd", "all", "4", "5", "splits:99")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints; even heads of layer 1 carry the answer at the second."""
    directory = tmp_path_factory.mktemp("primary")
    for seed, step in enumerate((0, 300)):
        save(planted(0.25 if step else 0.0, NOISE, seed), directory / "model" / f"step{step}", tokenizer=tokenizer())
    path = directory / "s.zarr"
    hl.cache(directory / "model", task=task(directory / "digits.jsonl", MANY_PAIRS), store=path)
    return path


def test_words_read_back_and_others_are_refused() -> None:
    layer, head = parse_primary((*WORDS, WORDS[0]))
    assert (layer, head) == (Primary(1, None, "step300"), Primary(1, 4, "step300"))
    assert (str(layer), str(head)) == WORDS
    for word in ("layer:6", "L3@step1", "layer:x@step1", "L3.H1@", "even"):
        with pytest.raises(UserError, match="write layer:6@step143000"):
            parse_primary((word,))


def test_it_is_written_before_anything_is_patched_and_tested_at_half_of_five_percent_each(store: Path) -> None:
    run = hl.open(store).patch(subsets=SUBSETS, layers="1", primary=WORDS, name="named")
    dataset, settings = open_run(store, "named")
    record, study = dataset.attrs["primary"], Store(store).study
    assert record["tests"] == list(WORDS) and record["runs_before"] == []
    assert record["sha256"] == hash_of(record, settings.to_attributes(), study)
    assert hash_of(record | {"tests": ["L1.H5@step300"]}, settings.to_attributes(), study) != record["sha256"]
    layer, head = (primary_test(dataset, settings, primary, 2) for primary in parse_primary(WORDS))
    assert layer is not None and head is not None
    assert layer.level == head.level == 0.025 and layer.is_found and head.is_found
    assert layer.p == pytest.approx(0.01) and layer.effect == pytest.approx(6 * 2.5 / 2 * 1, abs=2)
    nats = (dataset.logit_diff - dataset.corrupt_logit_diff).sel(checkpoint="step300", layer=1, subset="4").values
    assert head.effect == pytest.approx(nats.mean()) and head.p < 10 * stats.ttest_1samp(nats, 0).pvalue
    line = next(line for line in run.verdict() if line.startswith("primary"))
    assert "layer:1@step300: yes" in line and "1 more: --verbose" in line and record["sha256"][:8] in line
    assert any("What was named" in str(table) or "L1.H4@step300" in str(table) for table in run.tables())


def test_what_is_not_there_or_could_show_nothing_is_refused(store: Path) -> None:
    patch = hl.open(store).patch
    for word, subsets, message in (
        ("layer:2@step300", SUBSETS, "layer 2 is not patched"),
        ("layer:1@step9", SUBSETS, "has no checkpoint step9"),
        ("L1.H7@step300", SUBSETS, "head 7 is not patched alone"),
        ("layer:1@step300", ("even", "odd", "splits"), "tested at 0.05; add balanced or splits:200"),
    ):
        with pytest.raises(UserError, match=message):
            patch(subsets=subsets, layers="1", primary=word, name="refused")
    with pytest.raises(UserError, match="leave one of them out"):
        patch(subsets=SUBSETS, joint=True, primary=WORDS[0], name="refused")
    assert "refused" not in hl.open(store).runs


def test_a_run_that_is_there_takes_no_other_and_says_what_was_patched_before(store: Path) -> None:
    opened = hl.open(store)
    opened.patch(subsets=SUBSETS, layers="1", name="plain")
    with pytest.raises(UserError, match="without any; what is primary is named before anything is patched"):
        opened.patch(subsets=SUBSETS, layers="1", primary=WORDS, name="plain")
    run = opened.patch(subsets=SUBSETS, layers="1", primary="L1.H5@step300", name="later")
    line = next(line for line in run.verdict() if line.startswith("primary"))
    assert "not found" in line and "after 2 runs" in line
    again = opened.patch(subsets=SUBSETS, layers="1", primary="L1.H5@step300", name="later")
    assert again.verdict() == run.verdict(), "the same once more is nothing to do"


def test_what_was_changed_since_is_not_tested(store: Path) -> None:
    hl.open(store).patch(subsets=SUBSETS, layers="1", primary=WORDS[1], name="changed")
    dataset, settings = open_run(store, "changed")
    dataset.attrs["primary"] = dataset.attrs["primary"] | {"tests": ["L1.H5@step300"]}
    lines = verdict(dataset, settings, Store(store).study)
    assert "its hash is another" in next(line for line in lines if line.startswith("primary"))


def test_what_even_all_splits_could_not_show_is_refused_with_another_remedy() -> None:
    """Eight heads have 70 halves: no p below 2/70, which is above half of five percent."""
    words, subsets = ("layer:1@step1", "layer:0@step1"), parse_subsets(("even", "odd", "balanced"), 8)
    refuse_untestable(parse_primary(words[:1]), (0, 1), subsets, ["step1"])
    with pytest.raises(UserError, match=r"70 none below 0\.025; name fewer hypotheses, or one of a head"):
        refuse_untestable(parse_primary(words), (0, 1), subsets, ["step1"])
    with pytest.raises(UserError, match=r"all 16 none below 0\.05"):
        refuse_untestable(parse_primary(words[:1]), (0, 1), subsets, ["step1"], n_groups=4)
