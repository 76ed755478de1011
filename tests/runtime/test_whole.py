"""Files are whole or not there, and what a killed run left behind does not stay."""

import os
import time

import pytest

from upweight.runtime.whole import LEFT_BEHIND, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "state"
    for contents in (b"first", b"second"):
        write_whole(target, contents)
        assert target.read_bytes() == contents
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_was_there_stays_where_writing_fails(tmp_path, monkeypatch, step):
    target = tmp_path / "state"
    write_whole(target, b"first")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{step}", fails)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(target, b"second")
    assert f"{target} was not written" in caught.value.__notes__[0]
    assert target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]


def test_the_note_is_there_where_nothing_can_be_removed_either(tmp_path, monkeypatch):
    """As on a disk that became read-only."""

    def fails(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.fsync", fails)
    monkeypatch.setattr("pathlib.Path.unlink", fails)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_whole(tmp_path / "state", b"contents")
    assert "was not written" in caught.value.__notes__[0]


def test_what_killed_runs_left_is_removed_but_not_what_others_are_writing(tmp_path):
    target = tmp_path / "state"
    old, new, other = (tmp_path / f"{name}.part" for name in ("state.1", "state.2", "row.1"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 2 * LEFT_BEHIND,) * 2)
    write_whole(target, b"contents")
    assert sorted(tmp_path.iterdir()) == [other, target, new]
