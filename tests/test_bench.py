"""Laws of the benchmark: what is timed against replay does the same work, and what is printed follows from it.

The optional tools are held against plain hooks in scripts/bench.py itself, which prints the largest difference.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from headlapse.engine.bench import contestants, random_models
from headlapse.engine.bench.contestants import Workload, choose_tools, installed, multiplying
from headlapse.engine.bench.end_to_end import CommandRun, Pace, run_command
from headlapse.engine.bench.overhead import Overhead, overheads
from headlapse.engine.bench.peers import Hooks, generate_published
from headlapse.engine.bench.scaling import Growth, WeakScaling
from headlapse.engine.bench.table import WORKLOADS, choose_workloads, overhead_line, patch_workloads, scaling_line
from headlapse.engine.capture.forward import capture
from headlapse.engine.replay.reference import hooked_logit_diff
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.study.alignment import align
from tests.models import MAIN, N_HEADS, N_LAYERS, random_subsets, random_trials, tiny
from tests.test_capture import dressed
from tests.test_scripts import run_here

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("together", [1, 4])
def test_plain_hooks_are_the_patched_runs_by_definition(name: str, together: int) -> None:
    model, trials = tiny(name), random_trials()
    conditions = [(layer, heads) for layer in range(N_LAYERS) for heads in random_subsets(3, N_HEADS, seed=layer)]
    logit_diff = Hooks(model, together).patch(trials, conditions)
    patches = [((layer,), heads) for layer, heads in conditions]
    expected = hooked_logit_diff(dressed(model), trials, align(trials, "last"), "denoise", patches)
    assert np.abs(logit_diff - expected).max() <= 1e-5
    assert np.ptp(expected, axis=0).min() > 1e-2


def test_plain_hooks_capture_what_the_store_holds() -> None:
    model, trials = tiny("neox-parallel"), random_trials()
    captured = capture(dressed(model), trials, 2**30)
    real = torch.from_numpy(np.arange(trials.tokens.shape[-1]) < trials.length[..., None])
    for layer, z in enumerate(Hooks(model).capture(trials)):
        assert (z - captured.read("z", layer))[real].abs().max() <= 1e-5


def test_a_peer_shares_the_weights_and_leaves_the_model_alone() -> None:
    model, trials = tiny("neox-parallel"), random_trials()
    peer = Hooks(model)
    peer.patch(trials, [(0, np.ones(N_HEADS, dtype=bool))])
    assert {p.data_ptr() for p in peer.model.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert not {*peer.model.modules()} & {*model.modules()}
    assert not any(hooks(module) for tree in (model, peer.model) for module in tree.modules())


def test_the_published_procedure_generates_from_a_patched_prompt() -> None:
    model = tiny("neox-parallel", eos_token_id=None)
    clean, corrupt = torch.arange(2, 8), torch.arange(20, 29)
    generations = generate_published(model, clean, corrupt, layer=1, n_trials=2, n_tokens=5)
    assert [[len(tokens) for tokens in trials] for trials in generations] == [[5, 5]] * 3
    assert all(torch.equal(*trials) for trials in generations)
    by_itself = model.generate(corrupt[None], attention_mask=torch.ones(1, 9), max_new_tokens=5, do_sample=False)
    assert torch.equal(generations[0][0], by_itself[0, 9:])
    assert not torch.equal(generations[1][0], generations[0][0])
    assert not any(hooks(module) for module in model.modules())


def hooks(module: nn.Module) -> list[object]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "checkpoint"
    random_models.write_random("pythia-14m", directory, "float16")
    return directory


def test_a_random_checkpoint_is_written_once_and_is_the_same_for_the_same_seed(
    checkpoint: Path, tmp_path: Path
) -> None:
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    random_models.write_random("pythia-14m", checkpoint, "float16")
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before
    for seed in (0, 1):
        random_models.write_random("pythia-14m", tmp_path / str(seed), "float16", seed)
    held = [
        (directory / "model.safetensors").read_bytes() for directory in (checkpoint, tmp_path / "0", tmp_path / "1")
    ]
    assert held[0] == held[1] != held[2]


def test_random_prompts_are_right_padded_and_their_answers_differ() -> None:
    trials = random_models.some_trials(5, 4, 7)
    assert (trials.length == [[4] * 5, [7] * 5]).all()
    assert not trials.tokens[0, :, 4:].any() and trials.tokens[1].all()
    assert (trials.answer_tokens[:, 0] != trials.answer_tokens[:, 1]).all()


def test_the_floor_counts_every_row_that_passes_a_layer_after_the_patch(checkpoint: Path) -> None:
    resident, n_trials = contestants._open_resident(checkpoint, torch.float32, "cpu"), 7
    worker = contestants._Ours(resident, random_models.some_trials(n_trials, 4, 6))
    work = Workload("", (1, 4), ("each",))
    worker.patch(random_models.some_trials(n_trials, 4, 6), work.conditions(4))
    counts = contestants._row_counts(resident, work, n_trials)
    n_layers, n_subsets = 6, 4
    passed = sum(n_layers - 1 - layer for layer in work.layers)
    assert sum(rows * times for rows, times in counts.items()) == passed * n_subsets * n_trials


def test_only_linear_layers_are_counted_as_matrix_products() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    with multiplying() as spent:
        model[0](torch.zeros(1, 8))
        assert spent.seconds == 0
        model(torch.zeros(1, 8))
    taken = spent.seconds
    assert taken > 0
    model(torch.zeros(1, 8))
    assert spent.seconds == taken


def test_linear_growth_has_exponent_one_and_quadratic_two() -> None:
    sizes = (1, 2, 4, 8)
    assert Growth("", sizes, (3.0, 6.0, 12.0, 24.0), (0,) * 4).exponent == pytest.approx(1)
    assert Growth("", sizes, (1.0, 4.0, 16.0, 64.0), (0,) * 4).exponent == pytest.approx(2)


def test_what_a_checkpoint_costs_is_the_slope_and_start_up_what_is_left() -> None:
    runs = tuple(CommandRun(0.0, 5.0 + 0.03 * size, 10**6) for size in (10, 20, 40))
    overhead = Overhead("cache", (10, 20, 40), runs)
    assert (overhead.each, overhead.start_up) == (pytest.approx(0.03), pytest.approx(5))
    assert overhead_line(overhead).startswith("cache: 30 ms a checkpoint, 5.0 s to start (10: 5.3 s, 20: 5.6 s, ")


@pytest.mark.slow
def test_overhead_is_that_of_whole_commands_over_series_of_each_length(tmp_path: Path) -> None:
    for overhead in overheads(ROOT / "scripts", tmp_path, sizes=(2,)):
        [run] = overhead.runs
        assert run.cpu > 1 and run.peak > 10**8
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_a_checkpoints_time_is_what_neither_reading_nor_products_take() -> None:
    assert Pace(1, 10.0, 2.0, 7.0, 0).rest == pytest.approx(0.1)
    assert Pace(1, 10.0, 5.0, 7.0, 0).rest == 0  # read while something was computed


@pytest.mark.slow
def test_a_command_that_fails_is_refused_with_its_last_line() -> None:
    with pytest.raises(UserError, match="no such directory"):
        run_command(ROOT / "scripts" / "cache.py", "--model", "./nowhere")


def test_weak_scaling_is_the_gain_in_checkpoints_a_minute() -> None:
    scaling = WeakScaling(2, 5, CommandRun(50.0, 45.0, 0), CommandRun(60.0, 100.0, 0), 0.25)
    assert scaling.gain == pytest.approx(10 / 60 / (5 / 50))
    assert scaling_line(scaling) == (
        "checkpoints patched: local:1 6.00 a minute (9.0 s of processor time each), "
        "local:2 10.00 a minute (10.0 s of processor time each): 1.67 x (load before: 0.2)"
    )


def test_tools_take_an_arithmetic_of_their_own() -> None:
    tools = choose_tools(["headlapse@bfloat16", "hooks"], "float16")
    assert [tool.dtype for tool in tools.values()] == ["bfloat16", "float16"]
    assert "headlapse" in installed() and "hooks" in installed()
    with pytest.raises(UserError, match="not a tool that is installed"):
        choose_tools(["scissors"], "float32")
    with pytest.raises(UserError, match="not an arithmetic"):
        choose_tools(["hooks@int8"], "float32")


def test_what_would_never_finish_is_left_out_and_refused_when_asked_for() -> None:
    assert choose_workloads([], "pythia-160m") == list(WORKLOADS)
    assert "splits" not in choose_workloads([], "pythia-2.8b")
    with pytest.raises(UserError, match="32 heads"):
        choose_workloads(["parity", "splits"], "pythia-2.8b")
    with pytest.raises(UserError, match="not a workload"):
        choose_workloads(["speed"], "pythia-160m")
    with pytest.raises(UserError, match="known are pythia-14m"):
        random_models.pythia_config("gpt-5")


def test_the_patch_workloads_are_the_ones_they_are_called() -> None:
    counts = {word: len(work.conditions(12)) for word, work in patch_workloads("pythia-160m").items()}
    assert counts == {"parity": 24, "each": 144, "splits": 924, "lattice": 4096}


@pytest.mark.slow
def test_bench_prints_who_took_how_long_and_how_far_they_are_apart(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "bench" / "pythia-14m-float16"
    cache.parent.mkdir()
    cache.symlink_to(checkpoint)
    words = ["scripts/bench.py", "--shape", "pythia-14m", "--dtype", "float16", "--trials", "3"]
    words += ["--tools", "headlapse@float32", "hooks@float32", "--workloads", "each", "capture", "loading"]
    words += ["--repeats", "1"]
    done = run_here(words, tmp_path)
    assert done.returncode == 0 and not done.stderr
    hardware, *tables = done.stdout.strip().split("\n\n")
    assert "pythia-14m" in hardware and "torch" in hardware
    titles = [table.splitlines()[0] for table in tables]
    assert titles == [
        "each head, every layer: 24 conditions x 3 trials",
        "capture of all prompts",
        "loading a checkpoint",
    ]
    for table in tables:
        assert re.search(r"^headlapse@float32 .* x ", table, re.M) and re.search(
            r"^hooks@float32 .*1\.00 x", table, re.M
        )
    difference = re.search(r"^headlapse@float32 .* (\S+)$", tables[0], re.M)
    assert difference and 0 < float(difference[1]) < 1e-5
