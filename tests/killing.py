"""A process of its own that is killed once it has kept something."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def kill_once_kept(script, folder, files):
    """Run a script, which may import `tests`, and kill -9 it when the folder holds that many."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    line = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(line, env=os.environ | {"PYTHONPATH": paths}) as process:
        deadline = time.monotonic() + 60
        while len(list(folder.rglob("*.safetensors"))) < files and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
