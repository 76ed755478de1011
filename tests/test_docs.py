"""Every Python block of the docs runs, page by page, in the order of the page.

A page starts with the names below, as its reader has them: a model, data, scores of it. A block
that needs what no test has says so in the line before: `<!-- not run: why -->`.
"""

import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?```python\n(.*?)```", re.DOTALL)
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.parent.name != "decisions" and "```python\n" in page.read_text(encoding="utf-8")
]
NOT_RUN = {"training.md": 1}  # a Dask cluster


def images(count, seed):
    """Inputs of 10 classes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 10
    return torch.randn(count, 6, generator=draw).double() + torch.eye(10, 6).double()[y], y


class Net(nn.Sequential):
    """A small network."""

    def __init__(self):
        super().__init__(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 10))
        self.double()


def network():
    """What the pages on networks start with."""
    train, queries = images(40, 0), images(8, 1)
    recipe = uw.Training(Net, uw.SGD(0.1), epochs=2, batch=10)
    task = uw.Task(recipe.trained(uw.Task(Net(), uw.CrossEntropy()), train), uw.CrossEntropy())
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
    return {
        "uw": uw,
        "torch": torch,
        "Net": Net,
        "model": task.model,
        "task": task,
        "recipe": recipe,
        "fitted": fitted,
        "scores": fitted.attribute(queries),
        "train": train,
        "queries": queries,
        "measure": uw.Loss(),
        "X": train[0],
        "y": train[1],
        "labels": train[1].tolist(),
        "X_test": queries[0],
        "y_test": queries[1],
        "n": 40,
    }


def training():
    """The network, and the direction of an adjoint."""
    return network() | {"direction": torch.ones(Net()[0].weight.numel() * 2)}


def estimators():
    """Arrays for an estimator of other libraries: counts, and two classes."""
    draw = np.random.default_rng(0)
    X = draw.normal(size=(60, 3))
    eta = X @ [0.3, -0.2, 0.1]
    return {
        "uw": uw,
        "X": X,
        "X_test": X[:5] + 0.1,
        "years": np.ones(60),
        "deaths": draw.poisson(np.exp(eta)),
    }


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Run the blocks of a page in an empty folder; its namespace."""
    monkeypatch.chdir(tmp_path)

    def run(page, names):
        module = types.ModuleType("page_of_the_docs")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(names)
        text = page.read_text(encoding="utf-8")
        blocks = list(BLOCK.finditer(text))
        assert sum(bool(b[1]) for b in blocks) == NOT_RUN.get(page.name, 0)
        for block in blocks:
            if not block[1]:
                line = text.count("\n", 0, block.start(2))
                exec(compile("\n" * line + block[2], page, "exec"), vars(module))
        return vars(module)

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_blocks_of_a_page_run(page, read):
    read(page, network())
