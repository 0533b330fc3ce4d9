"""Laws of the controls: what renumbering makes is no pattern, and what was planted is one, from its step on."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import headlapse
from headlapse.engine.checkpoints.planted import planted, task, tokenizer
from headlapse.engine.measures.logit_diff import PATTERN
from headlapse.engine.runtime.errors import UserError
from tests.models import save

SCRIPT = Path(__file__).parent.parent / "scripts" / "controls.py"


@pytest.fixture(scope="module")
def controls() -> ModuleType:
    specification = importlib.util.spec_from_file_location("controls", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def store_of(carriers: range, controls: ModuleType, folder: Path, noise: float = 0.02) -> headlapse.Store:
    for step, carry in ((0, 0.0), (100, 0.25)):
        save(planted(carry, noise, step, carriers=carriers), folder / "series" / f"step{step}", tokenizer=tokenizer())
    pairs = task(folder / "digits.jsonl", controls.PAIRS)
    return headlapse.cache(folder / "series", task=pairs, store=folder / "series.zarr")


@pytest.mark.slow
def test_heads_that_are_only_renumbered_meet_the_rule_and_are_no_pattern(controls: ModuleType, tmp_path: Path) -> None:
    """Heads 0 to 5 carry the answer, three of them even."""
    store = store_of(range(6), controls, tmp_path)
    row = controls.renumbered(store, tmp_path / "renumbered", str(tmp_path / "digits.jsonl"))
    assert row.rates[-1] > PATTERN and row.labels == ("step0", "step100")
    assert row.verdict.startswith(("no", "cannot tell")), row
    assert "ways to halve the heads meet it" in row.met and "pattern from step100" in str(row)


@pytest.mark.slow
def test_what_is_planted_is_found_from_its_step_on_beside_the_head_that_acts_earlier(
    controls: ModuleType, tmp_path: Path
) -> None:
    row = controls.planted(tmp_path / "planted")
    assert row.rates[-1] > PATTERN and row.verdict.startswith("yes"), row
    assert f"L1.H{controls.ONE_HEAD} " in row.verdict and "from step 100-200" in row.verdict
    assert "pattern from step700" in str(row)


@pytest.mark.slow
def test_where_no_half_meets_the_rule_there_is_nothing_to_show(controls: ModuleType, tmp_path: Path) -> None:
    store = store_of(range(0), controls, tmp_path, noise=0.0)
    with pytest.raises(UserError, match="meets the rule; nothing shows what renumbering can do"):
        controls.renumbered(store, tmp_path / "renumbered", str(tmp_path / "digits.jsonl"))
