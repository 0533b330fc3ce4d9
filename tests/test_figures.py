"""Laws of the figures: what they show is what the store holds, and it can be read."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from headlapse.engine.report.figures import draw
from headlapse.engine.report.head_figures import heads_alone
from headlapse.engine.report.plot_style import CHARACTER, COLOURS, choose_ticks, place_steps
from headlapse.engine.report.result import read_result
from headlapse.engine.store.store import Store
from tests.test_report import HEADS, some_run, some_store

pytestmark = pytest.mark.thorough


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Figures of its runs are not laid out, which takes longer than drawing them and moves no data."""
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda _figure: None)
    return some_store(tmp_path / "tiny.zarr")


def map_of(axes: Axes) -> QuadMesh:
    [found] = [drawn for drawn in axes.collections if isinstance(drawn, QuadMesh)]
    return found


def test_the_timeline_shows_every_finished_checkpoint_in_both_panels(store: Store) -> None:
    some_run(store, done=lambda label: label != "step1")
    upper, lower = draw(read_result(store, "run"))["timeline"].axes[:2]
    for axes in (upper, lower):
        for colour in COLOURS.values():
            lines = [line for line in axes.get_lines() if line.get_color() == colour]
            assert sum(np.size(line.get_xdata()) for line in lines) == 4
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["0", "10", "100", "main"]
    assert {text.get_text() for text in upper.figure.legends[0].get_texts()} == {
        "clean, unpatched", "corrupt, unpatched", "even heads patched", "odd heads patched", "all heads patched",
    }  # fmt: skip


def test_the_heatmap_is_the_change_of_the_patched_runs_centred_at_zero(store: Store) -> None:
    some_run(store)
    result = read_result(store, "run")
    upper, lower = draw(result)["heatmap"].axes[:2]
    change, rate = map_of(upper), map_of(lower)
    data = store.patch_dataset("run").sel(subset="all").load()
    expected = (data.logit_diff - data.corrupt_logit_diff).mean("trial").transpose("layer", "checkpoint").values
    assert np.allclose(np.asarray(change.get_array()), expected, atol=1e-6)
    assert change.get_clim() == pytest.approx((-abs(expected).max(), abs(expected).max()))
    assert np.allclose(np.asarray(rate.get_array()) / 100, (data.logit_diff > 0).mean("trial").values.T)


@pytest.mark.slow
def test_the_head_map_needs_every_single_head(store: Store) -> None:
    some_run(store, ["3", "1", "all", "0", "2"], name="each-in-disorder")
    some_run(store, ["0", "1", "2", "all"], name="three-of-four")
    figure = draw(read_result(store, "each-in-disorder"))["heads"]
    data = store.patch_dataset("each-in-disorder").isel(checkpoint=-1).load()
    expected = [data.logit_diff.sel(subset=str(head)).mean("trial").values for head in range(HEADS)]
    shown = np.asarray(map_of(figure.axes[0]).get_array())
    assert np.allclose(shown, np.stack(expected, axis=1) - data.corrupt_logit_diff.mean().item(), atol=1e-6)
    assert "heads" not in draw(read_result(store, "three-of-four"))


def test_heads_over_training_are_the_effects_of_single_heads_with_their_intervals(store: Store) -> None:
    some_run(store)
    result = read_result(store, "run")
    axes = draw(result)["training"].axes[0]
    data = store.patch_dataset("run").load()
    moved = (data.logit_diff - data.corrupt_logit_diff).mean("trial")
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    assert len(lines) == 5
    for line in lines:
        layer, head = str(line.get_label()).removeprefix("L").split(".H")
        expected = moved.sel(layer=int(layer), subset=head)
        assert np.allclose(np.asarray(line.get_ydata()), expected, atol=1e-6)
    held = heads_alone(result)
    assert (held.low <= held.value).all() and (held.value <= held.high).all() and (held.low < held.high).any()


@pytest.mark.slow
def test_even_minus_odd_stands_among_all_equal_splits_at_every_layer(store: Store) -> None:
    some_run(store, ["lattice"])
    axes = draw(read_result(store, "run"))["splits"].axes[0]
    data = store.patch_dataset("run").isel(checkpoint=-1).logit_diff.mean("trial").load()
    [even] = [line for line in axes.get_lines() if line.get_color() == COLOURS["even"]]
    assert np.allclose(np.asarray(even.get_xdata()), data.sel(subset="even") - data.sel(subset="odd"), atol=1e-6)
    drawn = [len(lines.get_segments()) for lines in axes.collections if isinstance(lines, LineCollection)]
    assert drawn == [6] * len(data.layer)
    some_run(store, ["even", "odd", "0,1", "0,3", "1,2"], name="five-of-six")
    assert "splits" not in draw(read_result(store, "five-of-six"))


def test_steps_over_a_factor_of_ten_are_logarithmic_with_zero_and_unknown_steps_apart() -> None:
    x, is_log = place_steps(np.array([0, 1, 10, 100, -1, -1]))
    assert is_log and (np.diff(x) > 0.1).all() and x[3] - x[2] == x[2] - x[1] == 1
    x, is_log = place_steps(np.array([0, 1000, 2000, -1]))
    assert not is_log and x[:3].tolist() == [0, 1000, 2000] and x[3] > 2000
    for lone in (0, 7, -1):
        assert np.isfinite(place_steps(np.array([lone]))[0]).all()
    assert len(set(place_steps(np.array([-1, -1]))[0])) == 2


def test_tick_labels_never_touch_and_the_ends_have_theirs() -> None:
    x, labels = np.linspace(0, 1, 200), ["143k"] * 200
    ticks = choose_ticks(x, labels, 6.0, range(200))
    assert ticks[0] == 0 and ticks[-1] == 199 and 5 < len(ticks) < 20
    assert (np.diff(x[ticks]) * 6.0 > 4 * CHARACTER).all()
