"""A memory budget becomes a number of examples, and never none."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from upweight.errors import SpecError
from upweight.runtime import memory
from upweight.runtime.memory import examples_within, free_bytes, working_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("budget", [1, 999, 1000, 1999, 4000, 10**9])
@pytest.mark.parametrize("each", [0, 1, 1000])
@pytest.mark.parametrize("most", [1, 7, 512])
def test_examples_are_the_largest_power_of_two_that_fits(budget, each, most):
    found = examples_within(budget, each, most)
    assert found == 1 << (found.bit_length() - 1)
    assert 1 <= found <= most
    assert found * max(1, each) <= budget or found == 1
    assert 2 * found > most or 2 * found * max(1, each) > budget


def test_a_budget_is_kept_and_none_is_a_share_of_what_is_free(monkeypatch):
    assert working_bytes(CPU, 12345) == 12345
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert working_bytes(CPU, None) == 250
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**50)
    assert working_bytes(CPU, None) == memory.ENOUGH


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(SpecError, match=rf"memory_bytes={budget}\.(.|\n)*2 \* 2\*\*30"):
        working_bytes(CPU, budget)


def test_free_memory_is_what_this_machine_says():
    """Of the order of what is installed, on any machine that runs tests."""
    assert 2**24 < free_bytes(CPU) < 2**45


# -- limits of the container and of the process ---------------------------------------------------

MEMORY_V1 = "5:cpu,cpuacct:/\n4:memory:/job/step\n0::/\n"


def group(folder, limit, used, stat="", names=("memory.max", "memory.current")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{stat}\n")


def machine(monkeypatch, folder, groups):
    """A machine with 1 TB free, whose control groups and process are described in a folder."""
    (folder / "cgroup").write_text(groups)
    monkeypatch.setattr(memory, "CGROUPS", folder / "groups")
    monkeypatch.setattr(memory, "PROCESS", folder)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(memory, "_process_bytes", list)
    assert free_bytes(CPU) == 10**12


@pytest.mark.parametrize("path", ["/", "/slice/job", "/not/mounted/here"])
def test_groups_of_version_2(tmp_path, monkeypatch, path):
    machine(monkeypatch, tmp_path, f"0::{path}\n")
    root = tmp_path / "groups"
    group(root, 8000, 3000, "inactive_file 500")
    assert free_bytes(CPU) == 8000 - 3000 + 500
    if path == "/slice/job":
        group(root / "slice", "max", 100)
        assert free_bytes(CPU) == 5500
        group(root / "slice/job", 2000, 1900)
        assert free_bytes(CPU) == 100
        group(root / "slice", 50, 10)  # the limit of a parent binds its children
        assert free_bytes(CPU) == 40


@pytest.mark.parametrize("inner", ["", "job/step"], ids=["container", "host"])
def test_groups_of_version_1(tmp_path, monkeypatch, inner):
    machine(monkeypatch, tmp_path, MEMORY_V1)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder = tmp_path / "groups/memory" / inner
    group(folder, 6000, 2000, "inactive_file 7\ntotal_inactive_file 1000", names)
    assert free_bytes(CPU) == 5000
    group(folder, 2**63 - 4096, 2000, "", names)  # how a group without a limit says so
    assert free_bytes(CPU) == 10**12


def test_a_limit_that_is_used_up_leaves_nothing(tmp_path, monkeypatch):
    machine(monkeypatch, tmp_path, "0::/\n")
    group(tmp_path / "groups", 1000, 1200)
    assert free_bytes(CPU) == 0


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_this_process_is_seen_before_it_is_met(limit):
    """In a process of its own: less than the limit is free, and a larger matrix is refused by
    name, where PyTorch would say that it cannot allocate."""
    resource = pytest.importorskip("resource")
    assert hasattr(resource, limit)
    code = f"""
import resource, torch
from upweight.errors import SpecError
from upweight.runtime.memory import free_bytes, require_room
cpu = torch.device("cpu")
before = free_bytes(cpu)
most = 2 * 2**30 + int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.{limit}, (most, resource.RLIM_INFINITY))
free = free_bytes(cpu)
assert free < min(before, most) and free > 2**20, (free, before, most)
try:
    require_room(2**16, 2**16, torch.float64, cpu, "take fewer")
    raise AssertionError("not refused")
except SpecError as error:
    print(error)
try:
    torch.empty(2**16, 2**16, dtype=torch.float64)
    raise AssertionError("allocated")
except RuntimeError:
    pass
torch.empty(free // 2, dtype=torch.uint8)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "65536 × 65536 scores, 34.4 GB" in done.stdout
