"""Several processes write the files that one writes, bit for bit, whoever is killed.

Processes of torchrun with gloo, on models so small that importing PyTorch takes most of the time.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import upweight as uw
from upweight import shards
from upweight.cli.main import cli
from upweight.runs.directory import Run
from upweight.runtime import resources
from upweight.runtime.ranks import owners

ROOT = Path(__file__).parents[2]

SECONDS = 60

PROJECT = """
import os, time
import torch
import upweight as uw
from upweight import shards
from upweight.runtime import resources

shards.SHARD, resources.EVERY_SECONDS = 40, 0.0  # several files, and a state after each block
g = torch.Generator().manual_seed(0)
dtype = torch.float32
X, y = torch.randn(403, 6, generator=g, dtype=dtype), torch.randint(3, (403,), generator=g)
layers = torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)
model = torch.nn.Sequential(*layers).to(dtype)
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g, dtype=dtype))
task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-3))
train, test = (X, y), (X[:7] + 0.1, y[:7])
method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
few = 3000  # bytes: batches of few examples
"""

ATTRIBUTE = [
    "attribute", "project.py", "--method", "Influence(EKFAC(), damping=Relative(0.1))",
    "--memory", "3kB", "--out", "run",
]  # fmt: skip

SLOW = """
import os, time
from pathlib import Path
import upweight as uw
from upweight.index.shards import Rows
from project import *

uw.Index.build.__func__.__kwdefaults__["shard"] = 32
Path(f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
make = Rows._make
def slowly(*arguments):
    time.sleep(0.3)
    make(*arguments)
Rows._make = slowly
"""

INDEX = """
import os
import torch
import torch.distributed as dist
import upweight as uw
from project import few, method, task, train

dist.init_process_group("gloo")
resources = uw.Resources(memory_bytes=few, group=dist.group.WORLD)
fitted = method.fit(task, train, resources=resources)
index = uw.Index.build(fitted, None, "index", bytes_per_example=24, shard=32)
torch.save(fitted.losses, f"losses-{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", shards.SHARD)  # which the project sets
    monkeypatch.setattr(resources, "EVERY_SECONDS", resources.EVERY_SECONDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "project.py").write_text(PROJECT)
    yield tmp_path
    sys.modules.pop("project", None)


ALONE = {}


@pytest.fixture
def alone(project):
    """What one process writes, asked once."""
    if not ALONE:
        done = CliRunner().invoke(cli, [*ATTRIBUTE[:-1], "alone"])
        assert done.exit_code == 0, done.output
        ALONE.update(numbers(project / "alone"))
    return ALONE


def numbers(folder):
    """The hash of each file of numbers."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | more


def torchrun(folder, ranks, *command):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*start, *command], cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip


@contextlib.contextmanager
def ranks(folder, count, *command):
    """Processes that find each other by what torchrun would set, without a launcher."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *command], cwd=folder,
                    env=environment(RANK=str(rank), **address),
                    stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
            )
            for rank in range(count)
        ]  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_torchrun_writes_the_files_of_one_process(project, alone):
    """Three ranks, of which the last has no block of examples in the last round of a pass."""
    done = torchrun(project, 3, "-m", "upweight", *ATTRIBUTE)
    assert done.returncode == 0, done.stderr
    assert numbers(project / "run") == alone
    assert not list((project / "run").rglob("*.claim"))
    assert done.stdout.count("run: finished") == 1  # rank 0 speaks for all
    assert done.stderr.count("starting 7 queries") == 1
    Run(project / "run").open()


def test_torchrun_builds_the_index_of_one_process_and_asks_it_of_one(project):
    build = ["index", "build", "project.py:task", "--train", "project.py:train", "--bytes", "64"]
    done = CliRunner().invoke(cli, [*build, "--out", "alone"])
    assert done.exit_code == 0, done.output
    together = torchrun(project, 2, "-m", "upweight", *build, "--out", "index")
    assert together.returncode == 0, together.stderr
    assert numbers(project / "index") == numbers(project / "alone")
    assert together.stdout.count("403 rows of") == 1  # rank 0 speaks for all
    top = ["index", "top", "index", "--project", "project.py", "--queries", "project.py:test"]
    asked = CliRunner().invoke(cli, top)
    assert asked.exit_code == 0, asked.output
    refused = torchrun(project, 2, "-m", "upweight", *top)
    assert refused.returncode != 0
    assert "index top is the work of one process" in refused.stderr


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_of_torchrun_that_is_killed_says_how_to_resume_the_index(project, killed):
    """The launcher ends the other, which says so; the same command makes what is missing."""
    (project / "slow.py").write_text(SLOW)
    build = ["-m", "upweight", "index", "build", "slow.py:task", "--train", "slow.py:train"]
    build += ["--bytes", "64", "--out", "index"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *build]
    with subprocess.Popen(
        start, cwd=project, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as launcher:  # fmt: skip
        deadline = time.monotonic() + SECONDS
        while len(list((project / "index").glob("rows-*.safetensors"))) < 3:
            assert time.monotonic() < deadline and launcher.poll() is None, launcher.communicate()
            time.sleep(0.01)
        os.kill(int((project / f"pid-{killed}").read_text()), signal.SIGKILL)
        _, said = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode != 0
    assert "told to end (SIGTERM)\nFinished work is kept. To resume: the same" in said
    kept = numbers(project / "index")
    again = torchrun(project, 2, *build)
    assert again.returncode == 0, again.stderr
    alone = [sys.executable, *build[:-1], "alone"]  # not here, where other tests would be slow
    subprocess.run(alone, cwd=project, env=environment(), check=True, timeout=SECONDS)
    made = numbers(project / "index")
    assert made == numbers(project / "alone")
    assert kept.items() < made.items()


def test_ranks_that_call_from_python_build_one_index(project):
    (project / "index.py").write_text(INDEX)
    with ranks(project, 2, "index.py") as both:
        said = [process.communicate(timeout=SECONDS) for process in both]
    assert [process.returncode for process in both] == [0, 0], said

    from project import few, method, task, train

    fitted = method.fit(task, train, resources=uw.Resources(memory_bytes=few))
    uw.Index.build(fitted, None, "alone", bytes_per_example=24, shard=32)
    assert numbers(project / "index") == numbers(project / "alone")
    for rank in range(2):
        assert torch.equal(torch.load(f"losses-{rank}.pt"), fitted.losses)


def test_a_rank_that_is_killed_while_scoring_is_taken_over(project, alone):
    """Without a launcher that would stop the others. Rank 0 fits with it and ends without it."""
    chosen = random.Random(time.time_ns()).randint(1, len(alone) - 4)
    with ranks(project, 2, "-m", "upweight", *ATTRIBUTE) as (first, second):
        deadline = time.monotonic() + SECONDS
        while len(list((project / "run").glob("scores/tile-*"))) < chosen:
            assert time.monotonic() < deadline and first.poll() is None, first.communicate()
            time.sleep(0.001)
        second.kill()
        said = first.communicate(timeout=SECONDS)
    assert first.returncode == 0, said
    assert numbers(project / "run") == alone, f"killed at {chosen} files"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root and ip",
)
def test_two_machines_write_the_files_of_one(project, alone):
    """Two network namespaces, joined by a pair of virtual Ethernet devices."""
    names = [f"uw{os.getpid()}{side}" for side in "ab"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=SECONDS)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", address, "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    try:
        both = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "upweight", *ATTRIBUTE],
                cwd=project,
                env=environment(
                    GLOO_SOCKET_IFNAME=name, MASTER_ADDR="10.77.0.1", MASTER_PORT="29501",
                    RANK=str(node), WORLD_SIZE="2",
                ),  # what torchrun would set on each
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for node, name in enumerate(names)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=SECONDS) for process in both]
        finally:
            for process in both:
                process.kill()
        assert [process.returncode for process in both] == [0, 0], said
        assert numbers(project / "run") == alone
    finally:
        for name in names:
            ip("netns", "del", name)


def test_parts_that_do_not_talk_make_one_run(project, alone):
    """As the jobs of an array do, in any order; the last ends it."""
    for part in ("2/3", "3/3", "1/3"):
        assert not (project / "run").exists() or not Run(project / "run").is_finished
        done = CliRunner().invoke(cli, [*ATTRIBUTE, "--shards", part])
        assert done.exit_code == 0, done.output
    assert numbers(project / "run") == alone
    for options, expected in (
        (["--shards", "0/3"], "from 1 to m"),
        (["--method", "Influence(KFAC(), damping=1.0)", "--shards", "1/3"], "method is"),
    ):
        refused = CliRunner().invoke(cli, [*ATTRIBUTE, *options])
        assert refused.exit_code == 1 and expected in refused.output


def test_layers_are_dealt_by_the_work_that_they_are():
    costs, loads = [1.0, 8.0, 5.0, 4.0], [0.0, 0.0]
    for cost, owner in zip(costs, owners(costs, 2), strict=True):
        loads[owner] += cost
    assert loads == [9.0, 9.0]
