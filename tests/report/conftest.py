"""A small made-up run: ten training images, three queries, scores with known ends."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from upweight.evaluation import Estimate
from upweight.methods.facts import stated
from upweight.provenance import Provenance
from upweight.report import Display, html
from upweight.scores import Scores, Unit

HEALTH = {
    "mean_loss": 0.3,
    "convex": True,
    "gradient_norm": 1e-9,
    "decrement": 1e-17,
    "damping": 0.0,
    "solver": "Cholesky()",
    "solver_steps": 0,
    "largest_residual": 1e-14,
    "solver_condition": 812.0,
    "row_sum_excess": 1e-12,
    "row_sum_excess_relative": 1e-11,
    "beyond_first_order": [[1, 0.02], [10, 0.1]],
}


def provenance(**changes: Any) -> Provenance:
    made = Provenance(
        method="Influence(curvature=Hessian(), solver=Cholesky(), damping=0.0)",
        task="loss=CrossEntropy(), penalty=L2(0.01), params=('*',)",
        measure="Loss()",
        n=10,
        q=3,
        p=7,
        dtype="float64",
        device="cpu",
        health=HEALTH,
        seconds={"fit": 1.5, "attribute": 0.5},
        versions={"upweight": "0.1.0"},
    )
    made = replace(made, **changes)
    return replace(made, facts=stated(made.health))


NOT_DISPLAYED = {"evidence", "outcomes", "removal", "command"}


@dataclass
class Run:
    """What `html` takes, and what it wrote, parsed."""

    scores: Scores
    train: tuple[Any, Any]
    queries: tuple[Any, Any]
    path: Path
    options: dict[str, Any] = field(default_factory=dict)

    def write(self) -> str:
        named = {k: v for k, v in self.options.items() if k in NOT_DISPLAYED}
        html(self.scores, self.path, self.display, **named)
        return self.path.read_text(encoding="utf-8")

    @property
    def display(self) -> Display:
        shown = {k: v for k, v in self.options.items() if k not in NOT_DISPLAYED}
        return Display(**{"train": self.train, "queries": self.queries} | shown)

    def data(self) -> dict[str, Any]:
        found = re.search(
            r'<script type="application/json" id="data">(.*?)</script>', self.write(), re.S
        )
        assert found
        return json.loads(found[1])


@dataclass(frozen=True, eq=False)
class Removals:
    """One query of an `evaluation.LOO`, with estimates as they are wanted here."""

    label: str
    examples: Any
    predicted: torch.Tensor
    actual: torch.Tensor
    pearson: Estimate
    spearman: Estimate
    slope: Estimate
    queries: tuple[int, ...] = (0,)
    errors: torch.Tensor | None = None
    names: Any = None
    repeats: int = 1
    notes: tuple[str, ...] = ()

    def query(self, index: int) -> "Removals":
        assert index == 0
        return self


def column(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def check(query: int = 0, label: str = "first order", scale: float = 1.0) -> Removals:
    return Removals(
        label=label,
        examples=((2,), (5,), (7,)),
        predicted=column([-0.3, 0.2, 0.1]) * scale,
        actual=column([-0.31, 0.22, 0.1]),
        pearson=Estimate(0.98, 0.97, 0.99),
        spearman=Estimate(1.0, 1.0, 1.0),
        slope=Estimate(1.47, 1.4, 1.54) if scale == 1.0 else Estimate(1.01, 1.0, 1.02),
        queries=(query,),
    )


BLOCKS = {
    "0.weight": {
        "entries": 100,
        "mean_eigenvalue": 2e-3,
        "largest_eigenvalue": 1.5,
        "damping": 2e-4,
        "below_damping": 0.25,
        "mean_eigenvalue_error": 0.03,
    },
    "2.<b>weight": {
        "entries": 50,
        "mean_eigenvalue": 0.0,
        "largest_eigenvalue": 0.0,
        "damping": 1e-3,
        "below_damping": 1.0,
        "mean_eigenvalue_error": 0.0,
    },
}
LAYERWISE = {
    "mean_loss": 0.3,
    "tolerance": 0.01,
    "contraction_error": 0.004,
    "contraction_error_worst": 0.02,
    "damping": 4e-4,
    "mean_eigenvalue": 1.3e-3,
    "blocks": BLOCKS,
    "contraction": {"0.weight": "7 products (7 in bfloat16)", "2.<b>weight": "in full, float32"},
}


def sets(query: int = 0, label: str = "EK-FAC", slope: float = 0.4) -> Removals:
    """Removals of several examples together, each retrained three times."""
    return Removals(
        label=label,
        examples=((2, 5), (7, 9), (0, 1)),
        predicted=column([3.0, -2.0, 0.1]),
        actual=column([1.2, -0.8, 0.02]),
        pearson=Estimate(0.99, math.nan, math.nan),
        spearman=Estimate(1.0, math.nan, math.nan),
        slope=Estimate(slope, math.nan, math.nan),
        queries=(query,),
        errors=column([0.1, 0.2, 0.05]),
        names=["the 2 that lowered it", "the 2 that raised it", "2 at random"],
        repeats=3,
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (10, 6, 5), dtype=np.uint8)
    asked = draw.integers(0, 256, (3, 6, 5), dtype=np.uint8)
    values = torch.from_numpy(draw.normal(size=(3, 10)))
    return Run(
        Scores(values, Unit.DERIVATIVE, provenance()),
        (images, draw.integers(0, 3, 10)),
        (asked, np.array([0, 1, 2])),
        tmp_path / "report.html",
    )


@pytest.fixture
def make_check() -> Any:
    return check


@pytest.fixture
def make_sets() -> Any:
    return sets


@pytest.fixture
def layerwise(run: Run) -> Run:
    """The same run by a curvature a block at a time."""
    made = provenance(method="Influence(curvature=EKFAC())", health=LAYERWISE)
    run.scores = replace(run.scores, provenance=made)
    return run


@pytest.fixture
def make_provenance() -> Any:
    return provenance


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """A page after its script ran; complaints and requests to anywhere fail the test."""
    pages, complaints, requests = [], [], []

    def open_page(
        path: Path,
        fragment: str = "",
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
        ready: str = "html[data-ready]",
    ) -> Any:
        viewport = {"width": width, "height": height}
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        page.set_default_timeout(10_000)
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector(ready)
        pages.append(page)
        return page

    yield open_page
    errors = [page.evaluate("document.documentElement.dataset.error") for page in pages]
    for page in pages:
        page.close()
    assert complaints == []
    assert errors == [None] * len(pages)
    outside = [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == []
