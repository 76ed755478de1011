"""Rows in a folder: an interrupted pass goes on, and nothing is read that was not written."""

import pytest
import torch

from upweight.errors import StaleStore
from upweight.runtime import stored
from upweight.runtime.stored import Stored

VALUES = torch.arange(33.0).reshape(11, 3)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "FILE_NUMBERS", 12)  # 4 rows a file

    def found(**changed):
        given = {"n": 11, "width": 3, "description": {"of": "x"}, "settings": {"at_once": 2}}
        return Stored.open(tmp_path, "gradients", **given | changed)

    return found


def made(asked, until=11):
    def make(start, stop):
        asked.append((start, stop))
        if start >= until:
            raise KeyboardInterrupt
        return VALUES[start:stop]

    return make


def test_goes_on_where_it_was_interrupted(opened):
    asked = []
    with pytest.raises(KeyboardInterrupt):
        opened().fill(made(asked, until=8))
    again = opened(settings={"at_once": 5})
    assert again.settings == {"at_once": 2}  # as it was begun
    again.fill(made(asked))
    assert asked == [(0, 4), (4, 8), (8, 11), (8, 11)]
    again.fill(made(asked))
    assert len(asked) == 4
    for start in range(11):
        for stop in range(start + 1, 12):
            assert torch.equal(again.rows(start, stop), VALUES[start:stop])


def test_refuses_what_it_did_not_write(opened):
    opened().fill(made([]))
    for changed in ({"n": 12}, {"width": 2}, {"description": {"of": "y"}}):
        with pytest.raises(StaleStore):
            opened(**changed)
    file = opened().directory / "rows-0000000004.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert torch.equal(opened().rows(0, 4), VALUES[:4])
    with pytest.raises(StaleStore, match="altered"):
        opened().rows(0, 11)
    file.write_bytes((opened().directory / "rows-0000000000.safetensors").read_bytes())
    with pytest.raises(StaleStore, match="something else"):
        opened().rows(4, 8)
