"""Driver of `test_kill.py`: kills `upweight attribute` twenty times, and reruns it each time.

A process of its own that imports PyTorch once; every attempt is a fork of it, killed by SIGKILL:
ten at a time on the clock, ten at a file, before or after it takes its place. Prints JSON.
"""

import contextlib
import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from digests import digests  # beside this script

import upweight as uw
from upweight import shards
from upweight.cli.main import cli
from upweight.curvature import layerwise as curvature
from upweight.runs.directory import Run
from upweight.runtime import resources
from upweight.scoring import stream

# Forks have what their parent has read: the digits are unpacked once.
uw.data.mnist_subset = functools.cache(uw.data.mnist_subset)

# Forks of a process that has started threads hang; and one thread gives the same digits anywhere.
torch.set_num_threads(1)

# Many small batches and files, so that there is always one to be killed in.
shards.SHARD_BYTES = 1_000
curvature.MOST_EXAMPLES = stream.MOST_EXAMPLES = 16
resources.EVERY_SECONDS = 0.0


def attempt(arguments, before=lambda: None):
    """Run the command line in a fork; returns its process id."""
    child = os.fork()
    if child == 0:
        before()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        code = 1
        try:
            cli(arguments, standalone_mode=False)
            code = 0
        except BaseException as error:
            print(type(error).__name__, getattr(error, "message", error), file=sys.stderr)
        os._exit(code)
    return child


def dying_at(files, after):
    """In the child: die at the k-th file that takes its place, just before or after."""
    replace, count = os.replace, 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count == files and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
        if count == files:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted


@contextlib.contextmanager
def counted_files():
    """The names of the files that take their place, in order."""
    replace, files = os.replace, []

    def counted(source, target):
        files.append(Path(target).name)
        replace(source, target)

    os.replace = counted
    try:
        yield files
    finally:
        os.replace = replace


def main(folder):
    project = str(Path(__file__).with_name("digits_project.py"))
    names = [f"{project}:task", "--train", f"{project}:train", "--queries", f"{project}:test"]

    def attribute(run):
        method = "Influence(EKFAC(), damping=Relative(0.1))"
        return ["attribute", *names, "--method", method, "--out", str(run.path)]

    reference = Run(folder / "reference")
    with contextlib.redirect_stdout(sys.stderr):
        cli(attribute(Run(folder / "first")), standalone_mode=False)  # what is done once is done
        with counted_files() as files:
            started = time.perf_counter()
            cli(attribute(reference), standalone_mode=False)
            lasts = time.perf_counter() - started
    expected, rng, found = digests(reference), random.Random(0), []
    for k in range(20):
        killed, tries = False, 0
        while not killed:  # a quick attempt may be over before its time comes
            tries += 1
            run = Run(folder / f"run-{k}-{tries}")
            if k % 2:
                # One in every tenth of them: the first and the last as well as those between.
                at = 1 + int((k // 2 + rng.random()) * len(files) / 10)
                after = rng.random() < 0.5
                word = "after" if after else "before"
                how = f"{word} file {at} of {len(files)}, {files[at - 1]}"
                child = attempt(attribute(run), lambda at=at, after=after: dying_at(at, after))
            else:
                at = rng.uniform(0, lasts / tries)
                how = f"{at:.2f} s of {lasts:.2f} s"
                child = attempt(attribute(run))
                time.sleep(at)
                os.kill(child, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        began, was_finished = run.toml.exists(), run.is_finished
        again = ["rerun", str(run.toml), "--project", project] if began else attribute(run)
        code = os.waitpid(attempt(again), 0)[1]
        found.append(
            {
                "how": how,
                "began": began,
                "was_finished": was_finished,
                "code": code,
                "same": run.is_finished and digests(run) == expected,
                "left_over": [p.name for p in run.path.rglob("*.part")],
            }
        )
    print(json.dumps({"files": len(expected), "lasts": lasts, "kills": found}))


main(Path(sys.argv[1]))
