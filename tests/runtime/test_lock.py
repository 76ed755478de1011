"""One process at a time in a folder, and none that is dead."""

import os
import signal
import subprocess
import sys

import pytest

from upweight.errors import InUse
from upweight.runtime.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from upweight.runtime.lock import locked
with locked(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=f"process {other.pid} on .*: a test"):
            with locked(tmp_path, "mine"):
                pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / ".holder").exists(), "it had no time to clean up"
    with locked(tmp_path, "mine"):
        assert f"process {os.getpid()}" in (tmp_path / ".holder").read_text()
    assert not (tmp_path / ".holder").exists()
