"""A store on disk: any dtype comes back, and nothing that is not what was written."""

import pickle

import pytest
import torch
from safetensors.torch import load_file

from tests.runtime.damage import DAMAGES
from upweight.errors import StaleStore
from upweight.runtime.resources import Resources
from upweight.runtime.store import DTYPES, Store

TENSORS = {str(dtype): (torch.arange(12) - 5).reshape(3, 4).to(dtype) for dtype in DTYPES}
TENSORS |= {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "turned": torch.eye(3)[:, :2].mT}


def test_every_dtype_comes_back_and_others_can_read_the_file(tmp_path):
    store = Store.open(tmp_path, {"of": "é"})
    store.write("file", TENSORS)
    tensors, others = Store.load(tmp_path).read("file"), load_file(store.path("file"))
    assert Store.load(tmp_path).description == {"of": "é"}
    assert set(tensors) == set(others) == set(TENSORS)
    for name, each in TENSORS.items():
        assert torch.equal(tensors[name], each) and torch.equal(others[name], each)
        assert tensors[name].dtype == each.dtype


def test_what_is_changed_in_tensors_that_were_read_is_changed_in_no_file(tmp_path):
    store = Store.open(tmp_path, {})
    store.write("file", {"values": torch.ones(5)})
    store.read("file")["values"].mul_(3)
    for each in (store, Store.load(tmp_path)):
        assert torch.equal(each.read("file")["values"], torch.ones(5))


def test_it_travels_to_other_processes_without_its_maps(tmp_path):
    store = Store.open(tmp_path, {}, again="x")
    store.write("file", {"values": torch.ones(5)})
    store.verify()
    again = pickle.loads(pickle.dumps(store))
    assert again == store and again.again == "x" and again.known == {}
    assert torch.equal(again.read("file")["values"], torch.ones(5))


@pytest.mark.parametrize("damage", DAMAGES)
def test_altered_tensors_are_refused_until_they_are_deleted(tmp_path, damage):
    """Here those of a fit on its way, which is then begun anew."""
    state = Resources(folder=tmp_path).checkpoint(lambda: {"model": "a"})
    assert state.read() is None
    state.write({"sums": torch.arange(9.0).reshape(3, 3)})
    file = state.store.path("state")
    DAMAGES[damage](file)
    with pytest.raises(StaleStore, match=r"(?s)state.*delete the file and ask again: the same fit"):
        state.read()
    file.rmdir() if file.is_dir() else file.unlink()
    assert Resources(folder=tmp_path).checkpoint(lambda: {"model": "a"}).read() is None


def test_a_shard_of_another_description_is_refused_until_it_is_deleted(tmp_path):
    mine, other = (Store.open(tmp_path / name, {"recipe": name}) for name in "ab")
    other.write("rows", {"values": torch.eye(1)})
    mine.path("rows").write_bytes(other.path("rows").read_bytes())
    with pytest.raises(StaleStore, match="the numbers of something else"):
        mine.read("rows")
    mine.path("rows").unlink()
    assert mine.names() == []
    mine.write("rows", {"values": 2 * torch.eye(1)})
    assert mine.read("rows")["values"] == 2.0


@pytest.mark.parametrize("told", [b"", b"{}", b"\xff"])
def test_a_damaged_manifest_is_refused_and_names_the_ways_out(tmp_path, told):
    Store.open(tmp_path / "kept", {"recipe": "a"}).write("rows", {"values": torch.eye(1)})
    (tmp_path / "kept" / "manifest.json").write_bytes(told)
    with pytest.raises(StaleStore, match=r"delete the folder .*kept and.*or give another folder"):
        Store.open(tmp_path / "kept", {"recipe": "a"})


def test_what_differs_in_another_description_is_named(tmp_path):
    first = Store.open(tmp_path, {"recipe": "a", "data": "x", "seed": "2"})
    assert first != Store.open(tmp_path, {"recipe": "a", "data": "x", "seed": "1"}), "no work yet"
    first.load(tmp_path).write("rows", {"values": torch.eye(1)})
    with pytest.raises(StaleStore, match=r"which is of another recipe, seed\."):
        Store.open(tmp_path, {"recipe": "b", "data": "x"})


def test_a_store_is_replaced_by_one_of_other_shards(tmp_path, monkeypatch):
    def made(value, *names):
        shards = {name: {"values": torch.tensor([value])} for name in names}
        return Store.replace(tmp_path, {"of": str(value)}, shards, {"value": value})

    def full(_):
        raise OSError(28, "No space left on device")

    made(1.0, "a", "b")
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            made(2.0, "c")
    assert Store.load(tmp_path).facts == {"value": 1.0} and Store.load(tmp_path).names() == [
        "a",
        "b",
    ]
    made(2.0, "b", "c")
    found = Store.load(tmp_path)
    assert (found.names(), found.facts, found.description) == (
        ["b", "c"],
        {"value": 2.0},
        {"of": "2.0"},
    )
    assert found.read("b")["values"] == 2.0 and not found.path("a").exists()
    found.verify()


def test_a_store_whose_replacement_was_interrupted_is_not_read(tmp_path):
    """New numbers under the old description, or beside the old hashes: neither is believed."""
    for name, value in (("old", 1.0), ("new", 2.0)):
        shards = {"a": {"values": torch.tensor([value])}}
        Store.replace(tmp_path / name, {"of": "x"}, shards, {})
    target = Store.load(tmp_path / "old")
    target.path("a").write_bytes(Store.load(tmp_path / "new").path("a").read_bytes())
    with pytest.raises(StaleStore, match="other numbers than finished"):
        target.read("a")
