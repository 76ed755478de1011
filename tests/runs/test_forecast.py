"""What a run would take: counted on a clock that only examples move."""

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.linalg.cg import CG
from upweight.linalg.minres import MINRES
from upweight.runs.forecast import FEWEST, forecast
from upweight.runs.question import Question
from upweight.task.data import as_data
from upweight.task.measures import Loss

N, EACH = 256, 1e-3
"""Examples, and seconds that one takes in a forward pass."""


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def question(clock, method):
    """An MLP of 65 parameters, whose GGN is singular with few examples and not with all."""

    class Timed(nn.Linear):
        def forward(self, x):
            clock[0] += EACH * len(x)
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Timed(6, 8), nn.Tanh(), nn.Linear(8, 1))
    X = torch.randn(N + 4, 6)
    task = uw.Task(model, uw.SquaredError())
    data = as_data((X, X[:, :1].sin()))
    return Question(task, data.subset(range(N)), data.subset(range(N, N + 4)), method, Loss())


@pytest.mark.parametrize("solver", [CG(rtol=1e-2), MINRES(rtol=1e-2)])
def test_products_that_few_examples_do_not_tell_are_not_forecast(solver, clock):
    """They are counted as a few examples take them, with λ where these are singular."""
    asked = question(clock, uw.Influence(uw.GGN(), solver))
    made = forecast(asked, None)
    said = made.products
    assert said is not None and said.most == solver.max_steps
    assert said.seconds == pytest.approx(N * EACH, rel=0.1)
    rest = made.seconds["attribute"] - said.counted * said.seconds
    began = clock[0]
    scores = asked.method.fit(asked.task, asked.train).attribute(asked.queries)
    steps, took = scores.provenance.health["solver_steps"], clock[0] - began
    plan = uw.plan(
        asked.task.model, asked.train, asked.queries, asked.task.loss, method=asked.method
    )
    assert "at least" in str(plan) and f"up to {solver.max_steps:,} in" in str(plan)
    assert steps > 5 * said.counted  # so that a forecast of about as long would be far off
    # Once for the queries, and once for the gradient of the objective; each with its check.
    assert 1 <= (took - made.seconds["fit"] - rest) / (steps * said.seconds) <= 3


@pytest.mark.parametrize(
    ("method", "n"),
    [(uw.Influence(uw.GGN(), damping=0.1), N), (uw.Influence(uw.GGN(), CG(), 0.1), FEWEST)],
)
def test_seconds_are_told_where_the_products_are_known(method, n, clock):
    """By a factorization; and where all examples are timed."""
    asked = question(clock, method)
    few = Question(asked.task, asked.train.subset(range(n)), asked.queries, method, asked.measure)
    made = forecast(few, None)
    assert made.products is None
    began = clock[0]
    method.fit(few.task, few.train).attribute(few.queries)
    assert sum(made.seconds.values()) == pytest.approx(clock[0] - began, rel=0.1)
