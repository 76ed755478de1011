"""Without an extra, what needs it says which one: in a process of its own, where it is hidden."""

import subprocess
import sys

import pytest

HIDE = "import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
VIEW = "from upweight.view.server import Loopback; Loopback(str)"
ASK = """
from upweight.errors import MissingPackage
try:
    {ask}
except MissingPackage as error:
    assert isinstance(error, ImportError)
    print(error)
"""


@pytest.mark.parametrize(
    "hidden, ask, way_out",
    [
        (["sklearn"], "import upweight.adapters.sklearn", "upweight[sklearn]"),
        (["statsmodels"], "import upweight.adapters.statsmodels", "upweight[statsmodels]"),
        (
            ["transformers"],
            "from upweight.adapters.transformers import Recorder; Recorder('steps')",
            "upweight[transformers]",
        ),
        (
            ["lightning", "pytorch_lightning"],
            "from upweight.adapters.lightning import Recorder; Recorder('steps')",
            "upweight.record(",
        ),
        (["uvicorn"], VIEW, "upweight[view]"),
        (
            ["starlette"],
            "from upweight.view.server import Loopback; Loopback(str)",
            "upweight[view]",
        ),
    ],
)
def test_what_is_not_installed_is_said(hidden, ask, way_out, tmp_path):
    code = HIDE.format(hidden=hidden) + ASK.format(ask=ask)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    parts = [line.strip().partition(":")[0] for line in found.stdout.splitlines()]
    assert parts[1:] == ["Given", "Usual cause", "Way out"], found.stdout + found.stderr
    assert way_out in found.stdout
