"""Files are whole or not there, are nobody else's, and what killed runs left does not stay."""

import os
import signal
import subprocess
import sys

import pytest

from upweight.errors import NotWritten, StaleStore
from upweight.runtime import atomic
from upweight.runtime.atomic import append, contents, remove_left_over, replacing, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "state"
    for text in (b"first", b"second"):
        write_whole(target, text)
        assert target.read_bytes() == text
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_has_the_rights_that_the_user_gives_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "state", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_was_there_stays_where_writing_fails(tmp_path, monkeypatch, step):
    target = tmp_path / "state"
    write_whole(target, b"first")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{step}", fails)
    with pytest.raises(OSError, match=r"(?s)state: No space left.*a full disk\.") as caught:
        write_whole(target, b"second")
    assert f"{target} was not written" in caught.value.__notes__[0]
    assert caught.value.errno == 28
    assert target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    write_whole(target, b"second")  # the way out: free space
    write_whole(tmp_path / "other", b"second")


def test_the_note_is_there_where_nothing_can_be_removed_either(tmp_path, monkeypatch):
    """As on a disk that became read-only."""

    def fails(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.fsync", fails)
    monkeypatch.setattr("pathlib.Path.unlink", fails)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_whole(tmp_path / "state", b"contents")
    assert "was not written" in caught.value.__notes__[0]


def test_an_error_of_what_is_written_leaves_nothing(tmp_path):
    def half():
        with replacing(tmp_path / "state") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(atomic.fcntl is None, reason="no locks on files")
def test_what_killed_processes_left_is_removed_but_not_what_others_are_writing(tmp_path):
    """Whatever the clocks say: a file that has stood for days may still be written."""
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from upweight.runtime.atomic import replacing\n"
        "with replacing(Path(sys.argv[1]) / 'state') as file:\n"
        "    print('open', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    (tmp_path / "notes.part").write_text("of the user's")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        (staged,) = tmp_path.glob("state.*.part")
        os.utime(staged, (0, 0))
        remove_left_over(tmp_path)
        assert staged.exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
    remove_left_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.part"]


@pytest.mark.skipif(atomic.fcntl is None, reason="no locks on files")
def test_a_file_that_was_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = atomic.fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.extend(tmp_path.glob("*.part"))
            removed[0].unlink()
        lock(file, how)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    write_whole(tmp_path / "state", b"contents")
    assert removed and (tmp_path / "state").read_bytes() == b"contents"


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_no_link_is_written_through(tmp_path, link):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    for name in ("state", "log.txt"):
        link(victim, folder / name)
    write_whole(folder / "state", b"contents")
    if link is os.symlink:
        with pytest.raises(StaleStore, match=r"log\.txt, which is a link.*\n.*\n.*remove it"):
            append(folder / "log.txt", "a line\n")
        (folder / "log.txt").unlink()
    append(folder / "log.txt", "a line\n")
    append(folder / "log.txt", "another\n")
    assert victim.read_text() == "precious"
    assert (folder / "state").read_bytes() == b"contents"
    assert (folder / "log.txt").read_text().endswith("a line\nanother\n")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="neither a file"):
        contents(tmp_path / "pipe")
    with pytest.raises(NotWritten, match="pipe"):
        append(tmp_path / "pipe", "a line\n")


def test_a_folder_with_links_in_it_is_refused(tmp_path):
    (tmp_path / "scores" / "deep").mkdir(parents=True)
    atomic.require_own(tmp_path)
    (tmp_path / "scores" / "deep" / "link").symlink_to(tmp_path)
    with pytest.raises(StaleStore, match="link, which is a link"):
        atomic.require_own(tmp_path)
    (tmp_path / "scores" / "deep" / "link").unlink()
    atomic.require_own(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StaleStore, match="pipe, which is no file"):
        atomic.require_own(tmp_path)
