"""Laws of CUDA devices: replay there equals a full hooked forward on the CPU, and whole commands run there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from headlapse.engine.capture.forward import capture
from headlapse.engine.checkpoints.model import ResidentModel
from headlapse.engine.replay.replay import replay
from headlapse.engine.store.store import Store
from headlapse.engine.study.alignment import align
from tests.models import MAIN, N_HEADS, N_LAYERS, random_subsets, random_trials, save, tiny, tiny_tokenizer
from tests.reference import logit_diffs
from tests.test_scripts import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("positions", ["last", "end:3", "all"])
@pytest.mark.parametrize("name", MAIN)
def test_replay_on_the_device_equals_a_full_hooked_forward_on_the_cpu(name: str, positions: str) -> None:
    model, trials = tiny(name), random_trials(lengths="paired" if positions == "all" else "unequal")
    resident = ResidentModel(model.config, torch.float32, "cuda")
    resident.load_weights({key: tensor.to("cuda") for key, tensor in model.state_dict().items()})
    mask, sites = random_subsets(50, N_HEADS), [(layer,) for layer in range(N_LAYERS)]
    activations = capture(resident, trials, 2**30)
    replayed = replay(resident, activations, trials, align(trials, positions), "denoise", sites, mask)
    expected = np.stack([logit_diffs(model, trials, positions, site, mask, "denoise") for site in sites])
    assert np.abs(replayed - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_whole_commands_run_on_the_device_and_say_so(tmp_path: Path, dtype: str) -> None:
    for step in (0, 1):
        save(tiny("neox-parallel", step), tmp_path / "series" / f"step{step}", tokenizer=tiny_tokenizer())
    path = tmp_path / "s.zarr"
    cached = run("cache", "--model", tmp_path / "series", "--store", path, "--device", "cuda", cache=tmp_path)
    assert cached.returncode == 0 and "on cuda" in cached.stdout
    patched = run("patch", path, "--device", "cuda", "--dtype", dtype, "--verbose", cache=tmp_path)
    assert patched.returncode == 0 and "self-check" in patched.stdout
    [name] = Store(path).patch_names()
    for record in Store(path).patch(name).records().values():
        assert record["device"] == "cuda" and record["kernels"] == "triton"
    measured = run("mechanism", path, "--device", "cuda", "--dtype", dtype, cache=tmp_path)
    assert measured.returncode == 0 and "(cuda, " in measured.stdout
