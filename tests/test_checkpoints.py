"""Laws of the checkpoint room: every weight form gives the same model, and only the right keys are worn."""

import threading
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from headlapse.engine.checkpoints import loader
from headlapse.engine.checkpoints.architecture import read_config
from headlapse.engine.checkpoints.fetch import fetch
from headlapse.engine.checkpoints.files import Files, vocabulary_file
from headlapse.engine.checkpoints.loader import ModelLoader, open_resident_model
from headlapse.engine.checkpoints.model import ResidentModel
from headlapse.engine.checkpoints.prefetch import prefetch
from headlapse.engine.checkpoints.resolve import Checkpoint
from headlapse.engine.checkpoints.tokenizer import load_tokenizer
from headlapse.engine.checkpoints.weights import read_weights, weight_bytes
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.resources import Machine
from tests.models import FORMS, MAIN, MORE, Form, legacy_buffers, save, tiny, tiny_tokenizer

TOKENS = torch.arange(2, 10)[None]


def files_of(directory: Path) -> Files:
    from headlapse.engine.checkpoints.resolve import resolve

    [checkpoint] = resolve(str(directory), [], directory / "cache")
    assert isinstance(checkpoint, Checkpoint)
    return fetch(checkpoint, directory / "cache")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["neox-parallel", "gpt2"])
def test_every_weight_form_gives_the_stock_models_logits(tmp_path: Path, name: str, form: Form) -> None:
    model = tiny(name)
    extra = legacy_buffers(model) if name.startswith("neox") and form.endswith("bin") else None
    files = files_of(save(model, tmp_path, form, extra=extra))
    resident = open_resident_model(files, "float32", "cpu")
    resident.load_weights(read_weights(files, torch.float32, "cpu"))
    with torch.no_grad(), resident.stock() as stock:
        assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", [*MAIN, *MORE])
def test_one_skeleton_wears_one_checkpoint_after_the_other(name: str) -> None:
    first, second = tiny(name, seed=1), tiny(name, seed=2)
    resident = ResidentModel(first.config, torch.float32, "cpu")
    for model in (first, second, first):
        resident.load_weights(model.state_dict())
        with torch.no_grad(), resident.stock() as stock:
            torch.testing.assert_close(stock(TOKENS).logits, model(TOKENS).logits, atol=1e-6, rtol=0)


def test_the_resident_skeleton_is_kept_while_the_config_is_the_same(tmp_path: Path) -> None:
    files = files_of(save(tiny("gpt2"), tmp_path / "a"))
    other = files_of(save(tiny("neox-parallel"), tmp_path / "b"))
    resident = open_resident_model(files, "float32", "cpu")
    assert open_resident_model(files, "float32", "cpu", resident) is resident
    assert open_resident_model(other, "float32", "cpu", resident) is not resident


def test_settings_that_are_the_same_are_read_once_and_others_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte the same: then transformers need not be asked again."""
    read: list[Path] = []

    def counted(directory: Path) -> PreTrainedConfig:
        read.append(directory)
        return read_config(directory)

    monkeypatch.setattr(loader, "read_config", counted)
    directories = [save(tiny("neox-parallel", seed), tmp_path / str(seed)) for seed in range(3)]
    directories.append(save(tiny("gpt2"), tmp_path / "other"))
    (directories[2] / "generation_config.json").write_text('{"eos_token_id": 7}')
    models = ModelLoader("float32", Machine())
    residents, ends = [], []
    for directory in directories:
        resident, _ = models.load_weights(models.prefetch(files_of(directory)))
        residents.append(resident)
        ends.append(resident.model.generation_config.eos_token_id)  # type: ignore[union-attr]
    assert read == [directories[0], directories[2], directories[3]]
    assert residents[0] is residents[1] is residents[2] is not residents[3]
    assert ends[0] == ends[1] != ends[2] == 7


def test_the_dtype_is_the_one_asked_for_whatever_the_file_holds(tmp_path: Path) -> None:
    files = files_of(save(tiny("neox-parallel").half(), tmp_path))
    assert {t.dtype for t in read_weights(files, torch.float32, "cpu").values()} == {torch.float32}
    assert {t.dtype for t in read_weights(files, torch.bfloat16, "cpu").values()} == {torch.bfloat16}


def test_what_is_cast_goes_into_the_buffers_of_an_earlier_reading(tmp_path: Path) -> None:
    first, second = (files_of(save(tiny("neox-parallel", n).half(), tmp_path / str(n))) for n in (1, 2))
    buffers: dict[str, torch.Tensor] = {}
    read = read_weights(first, torch.float32, "cpu", buffers)
    places = {name: tensor.data_ptr() for name, tensor in read.items()}
    again = read_weights(second, torch.float32, "cpu", buffers)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == places
    fresh = read_weights(second, torch.float32, "cpu")
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


def room_for(files: Files, times: float) -> Machine:
    return Machine("cpu", int(times * weight_bytes(files, torch.float32)) + 1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_checkpoint_is_read_ahead_only_where_two_find_room(tmp_path: Path, dtype: str, times: int) -> None:
    models = [tiny("neox-parallel", seed) for seed in (1, 2, 3)]
    held = {"float16": torch.float16, "float32": torch.float32}[dtype]
    files = [files_of(save(model.to(held), tmp_path / str(n))) for n, model in enumerate(models)]
    loader = ModelLoader("float32", room_for(files[0], times))
    for (_, loaded), model in zip(prefetch(files, loader.prefetch), models, strict=True):
        assert not isinstance(loaded, Exception)
        assert (loaded[1] is not None) == (times == 2)
        resident, left = loader.load_weights(loaded)
        assert 0 < left <= room_for(files[0], times).memory - weight_bytes(files[0], torch.float32)
        with torch.no_grad(), resident.stock() as stock:
            assert torch.equal(stock(TOKENS).logits, model.float()(TOKENS).logits)


def test_weights_that_the_memory_does_not_hold_are_refused_with_what_would(tmp_path: Path) -> None:
    files = files_of(save(tiny("neox-parallel"), tmp_path))
    loader = ModelLoader("float32", room_for(files, 0.5))
    with pytest.raises(UserError, match=r"in float32.*allowed.*--memory"):
        loader.load_weights(loader.prefetch(files))


def test_a_file_without_the_base_models_prefix_is_worn_too() -> None:
    model = tiny("gpt2")
    resident = ResidentModel(model.config, torch.float32, "cpu")
    resident.load_weights(
        {name.removeprefix("transformer."): t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    )
    with torch.no_grad(), resident.stock() as stock:
        assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


def test_missing_unknown_and_misshapen_keys_are_refused_by_name_and_nothing_is_worn() -> None:
    model = tiny("neox-parallel")
    resident = ResidentModel(model.config, torch.float32, "cpu")
    good = model.state_dict()
    resident.load_weights(good)
    # Older versions of transformers call it `embed_out`.
    (unembed,) = {"lm_head.weight", "embed_out.weight"} & good.keys()
    missing = {name: t for name, t in good.items() if name != unembed}
    with pytest.raises(UserError, match=rf"1 key missing \({unembed}\)"):
        resident.load_weights(missing)
    with pytest.raises(UserError, match=r"1 key unknown \(gpt_neox.layers.0.adapter\)"):
        resident.load_weights({**good, "gpt_neox.layers.0.adapter": torch.zeros(1)})
    with pytest.raises(UserError, match=rf"{unembed} has shape \[3, 4\]"):
        resident.load_weights({**good, unembed: torch.zeros(3, 4)})
    with torch.no_grad(), resident.stock() as stock:
        assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


def test_tied_embeddings_that_differ_in_the_file_are_refused() -> None:
    model = tiny("gpt2")
    resident = ResidentModel(model.config, torch.float32, "cpu")
    with pytest.raises(UserError, match="configured to tie"):
        resident.load_weights({**model.state_dict(), "lm_head.weight": torch.zeros_like(model.lm_head.weight)})


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_off_weight_file_is_refused_by_name(tmp_path: Path, form: Form) -> None:
    files = files_of(save(tiny("neox-parallel"), tmp_path, form))
    whole = files.weights[-1].read_bytes()
    files.weights[-1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=files.weights[-1].name):
        read_weights(files, torch.float32, "cpu")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    files = files_of(save(tiny("neox-parallel"), tmp_path, "bin"))
    torch.save({"a": threading.Lock}, files.weights[0])
    with pytest.raises(UserError, match="not unpickled"):
        read_weights(files, torch.float32, "cpu")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tiny("neox-parallel"), tmp_path / "without" / "step1")
    save(tiny("neox-parallel"), tmp_path / "with", tokenizer=tiny_tokenizer())
    assert load_tokenizer(vocabulary_file(tmp_path / "with").parent)("Answer").input_ids
    with pytest.raises(UserError, match="no tokenizer"):
        vocabulary_file(tmp_path / "without" / "step1")


def test_a_tokenizer_above_its_checkpoints_serves_them(tmp_path: Path) -> None:
    save(tiny("neox-parallel"), tmp_path / "checkpoint-1")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert vocabulary_file(tmp_path / "checkpoint-1").parent == tmp_path


def test_the_next_item_loads_while_this_one_is_used() -> None:
    loading = threading.Event()

    def load(item: int) -> int:
        if item == 1:
            loading.set()
        return item * 10

    for item, value in prefetch([0, 1, 2], load):
        assert value == item * 10
        if item == 0:
            assert loading.wait(5)


def test_an_item_that_cannot_be_loaded_comes_as_its_error_and_the_others_go_on() -> None:
    def load(item: int) -> int:
        if item == 1:
            raise UserError("bad")
        return item

    values = [value for _, value in prefetch([0, 1, 2], load)]
    assert values[0] == 0 and isinstance(values[1], UserError) and values[2] == 2
