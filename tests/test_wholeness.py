"""Laws of what is still being written: cut off anywhere it is not whole, whole it is, and it must have come to rest."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from headlapse.engine.checkpoints.wholeness import Settling, lacking, snapshot
from tests.models import FORMS, Form, save, tiny, tiny_tokenizer


@pytest.fixture(scope="module", params=FORMS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, in each form that weights have."""
    form: Form = request.param
    directory = tmp_path_factory.mktemp(form) / "checkpoint-5"
    save(tiny("neox-parallel"), directory, form, tokenizer=tiny_tokenizer())
    return directory


@pytest.fixture
def written(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint-5"))


def places(path: Path) -> list[int]:
    """Lengths at which something else is missing of a file: all, a number's middle, its header, its data, its end."""
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else size // 3
    near = [place + step for place in (0, 4, 8, header, (header + size) // 2, size) for step in (-1, 0, 1)]
    spread = [size * part // 40 for part in range(40)]
    return sorted({length for length in [*near, *spread, size - 22, size - 64] if 0 <= length < size})


def test_a_whole_checkpoint_lacks_nothing(whole: Path) -> None:
    assert lacking(whole) == ""


def test_weights_cut_off_anywhere_are_not_whole(written: Path) -> None:
    shards = [path for path in written.iterdir() if path.suffix in (".safetensors", ".bin")]
    for path in shards:
        content = path.read_bytes()
        for length in places(path):
            path.write_bytes(content[:length])
            said = lacking(written)
            assert path.name in said, f"{length} of {len(content)} bytes of {path.name}: {said!r}"
            assert "again" not in said and "delete" not in said, "there is nothing to do but wait"
        path.write_bytes(content)
    assert shards and lacking(written) == ""


def test_any_file_that_is_named_and_not_there_is_lacking(written: Path) -> None:
    for path in sorted(written.iterdir()):
        beside = path.rename(written.parent / "aside")
        if path.name in ("config.json", "tokenizer.json") or path.name.startswith(("model", "pytorch_model")):
            assert lacking(written), path.name
        beside.rename(path)


def test_json_cut_off_anywhere_is_not_whole(written: Path) -> None:
    for path in [path for path in written.iterdir() if path.suffix == ".json"]:
        content = path.read_bytes().rstrip()
        for length in {0, 1, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            assert lacking(written), f"{length} of {len(content)} bytes of {path.name}"
        path.write_bytes(content)


def test_a_file_of_another_length_than_it_announces_is_not_whole(tmp_path: Path) -> None:
    save(tiny("neox-parallel"), tmp_path, tokenizer=tiny_tokenizer())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for other in (
        content + b"\0",
        (2**63).to_bytes(8, "little") + content[8:],
        content[:8] + b"x" * (len(content) - 8),
    ):
        weights.write_bytes(other)
        assert "model.safetensors" in lacking(tmp_path)


def test_a_tokenizer_may_lie_above_or_elsewhere(tmp_path: Path) -> None:
    save(tiny("neox-parallel"), tmp_path / "checkpoint-5")
    assert "tokenizer" in lacking(tmp_path / "checkpoint-5")
    assert lacking(tmp_path / "checkpoint-5", with_tokenizer=False) == ""
    tiny_tokenizer().save_pretrained(tmp_path)
    assert lacking(tmp_path / "checkpoint-5") == ""


def test_weights_as_torch_wrote_them_before_2020_are_left_to_time(tmp_path: Path) -> None:
    model = tiny("neox-parallel")
    save(model, tmp_path, tokenizer=tiny_tokenizer())
    (tmp_path / "model.safetensors").unlink()
    old = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), old, _use_new_zipfile_serialization=False)
    assert lacking(tmp_path) == ""
    old.write_bytes(b"")
    assert "pytorch_model.bin" in lacking(tmp_path)


def test_a_folder_that_is_not_there_lacks_everything(tmp_path: Path) -> None:
    assert lacking(tmp_path / "nothing") and snapshot(tmp_path / "nothing") == frozenset()


def test_a_folder_has_come_to_rest_when_nothing_in_it_was_seen_to_change(tmp_path: Path) -> None:
    now = 100.0
    settling = Settling(lambda: now)
    file = tmp_path / "global_step5" / "states.pt"
    file.parent.mkdir()
    file.write_bytes(b"a")
    os.utime(file, (0, 0))  # however old it says that it is
    assert settling.look(tmp_path)[1] == 0
    now = 103.0
    assert settling.look(tmp_path)[1] == 3
    file.write_bytes(b"b")  # as many bytes, at another time
    now = 104.0
    assert settling.look(tmp_path)[1] == 0
    now = 104.5
    seen, quiet = settling.look(tmp_path)
    assert quiet == 0.5 and {(name, size) for name, size, _ in seen} == {("global_step5/states.pt", 1)}
    (tmp_path / "another").touch()
    assert settling.look(tmp_path)[1] == 0
