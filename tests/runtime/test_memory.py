"""A memory budget becomes a number of examples, and never none."""

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


def test_free_memory_elsewhere_is_half_of_what_is_installed(monkeypatch):
    """Where there is no /proc/meminfo, or it does not say."""
    monkeypatch.setattr(memory.Path, "exists", lambda self: False)
    monkeypatch.setattr(
        memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__
    )
    assert free_bytes(CPU) == 4096 * 500
