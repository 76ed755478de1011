"""Tensors on disk: any dtype comes back, and nothing that is not what was written."""

import pytest
import torch
from safetensors.torch import load_file

from tests.runtime.damage import DAMAGES
from upweight.errors import StaleStore
from upweight.runtime.checkpoint import Checkpoint
from upweight.runtime.rows import RowStore
from upweight.runtime.tensors import DTYPES, read_tensors, write_tensors

TENSORS = {str(dtype): (torch.arange(12) - 5).reshape(3, 4).to(dtype) for dtype in DTYPES}
TENSORS |= {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "turned": torch.eye(3)[:, :2].mT}


def test_every_dtype_comes_back_and_others_can_read_the_file(tmp_path):
    told = write_tensors(tmp_path / "file", TENSORS, {"of": "é"})
    tensors, about = read_tensors(tmp_path / "file", "")
    others = load_file(tmp_path / "file")
    assert about == {"of": "é"} and len(told) == 64
    assert set(tensors) == set(others) == set(TENSORS)
    for name, each in TENSORS.items():
        assert torch.equal(tensors[name], each) and torch.equal(others[name], each)
        assert tensors[name].dtype == each.dtype


@pytest.mark.parametrize("damage", DAMAGES)
def test_altered_tensors_are_refused(tmp_path, damage):
    write_tensors(tmp_path / "file", {"values": torch.randn(4, 4)}, {"of": "a"})
    DAMAGES[damage](tmp_path / "file")
    with pytest.raises(StaleStore, match=r"(?s)file with .*delete it\."):
        read_tensors(tmp_path / "file", "delete it.")


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_altered_state_is_refused_until_it_is_deleted(tmp_path, damage):
    state = Checkpoint.open(tmp_path / "state", "a model")
    assert state.read() is None
    state.write({"sums": torch.arange(9.0).reshape(3, 3)})
    DAMAGES[damage](state.file)
    with pytest.raises(StaleStore, match="delete this one"):
        state.read()
    state.file.rmdir() if state.file.is_dir() else state.file.unlink()
    assert Checkpoint.open(tmp_path / "state", "a model").read() is None


def test_rows_of_another_description_are_refused_until_they_are_deleted(tmp_path):
    mine, others = (RowStore.open(tmp_path, {"recipe": name}) for name in "ab")
    others.record(["00ff"], {"values": torch.eye(1)})
    (file,) = others.directory.glob("*.safetensors")
    copy = mine.directory / file.name
    copy.write_bytes(file.read_bytes())
    with pytest.raises(StaleStore, match="rows of something else"):
        mine.read()
    copy.unlink()
    assert mine.read() == {}
    mine.record(["00ff"], {"values": 2 * torch.eye(1)})
    assert mine.read()["00ff"]["values"] == 2.0


@pytest.mark.parametrize("told", [b"", b"{}", b"\xff"])
def test_another_description_of_rows_is_refused_until_it_is_deleted(tmp_path, told):
    store = RowStore.open(tmp_path, {"recipe": "a"})
    store.record(["00ff"], {"values": torch.eye(1)})
    (store.directory / "manifest.json").write_bytes(told)
    with pytest.raises(StaleStore, match="delete that file; it is written again"):
        RowStore.open(tmp_path, {"recipe": "a"})
    (store.directory / "manifest.json").unlink()
    assert set(RowStore.open(tmp_path, {"recipe": "a"}).read()) == {"00ff"}
