"""kill -9 at twenty instants: what is left is finished to the same scores, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("killed.py")


def test_a_run_killed_at_any_instant_finishes_with_the_same_scores_bit_for_bit(tmp_path):
    command = [sys.executable, str(DRIVER), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    kills = told["kills"]
    assert len(kills) == 20
    assert told["files"] > 5, "one shard would be no test of going on in the middle"
    assert sum(kill["began"] and not kill["was_finished"] for kill in kills) >= 10
    assert [kill for kill in kills if kill["code"] != 0 or not kill["same"]] == []
    assert [kill["left_over"] for kill in kills] == [[]] * 20
