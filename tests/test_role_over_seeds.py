"""A role is found in every seed of a series in which it grows, though no two seeds need have it in the same heads."""

import re
from pathlib import Path

import pytest

import headlapse
from tests.grown_induction import STEPS, grow


@pytest.mark.slow
def test_induction_is_found_in_each_of_three_seeds_whatever_the_numbers_of_its_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, captured, patched and measured as a user would; 60 CPU seconds, of which training takes most."""
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    stores = []
    for seed in (0, 1, 2):
        folder = tmp_path / f"grown-seed{seed}"
        grow(folder, seed, (STEPS[0], STEPS[-1]))
        store = headlapse.cache(folder, task="induction", trials=8)
        store.patch(subsets=["each", "all"])
        store.mechanism(parts="roles")
        stores.append(store)
    found = headlapse.compare(*stores)
    induction = {name: set(heads["induction"]) for name, heads in found.roles.items()}
    assert len(induction) == 3 and all(induction.values())
    for name, row in found.table.iterrows():
        assert row["heads"][0] in induction[str(name)], "the head whose patch matters most has the role"
    [line] = [line for line in found.verdict() if line.startswith("roles")]
    assert re.search(r"induction in 3 of 3", line), line
    assert len(found.verdict()) <= 12
    assert "induction in 3 of 3" in found.report().read_text()
