"""What every method owes its users, as named checks: the laws of scores.

    for name, check in check_method(MyMethod(...), exact=True): check()

The checks know a method only by `fit`, `attribute` and `self_influence`, and take their truth from
the closed forms of `problems.py` or from the method itself: from what it says of the same question
asked in another way. Laws that need another spec (large damping, the scale of the loss) are left to
the method's own tests.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import upweight
from upweight.methods.fitted import Fitted
from upweight.methods.method import Method
from upweight.methods.reduce import GroupSums, Top
from upweight.scores import Scores, Unit
from upweight.task.data import as_data
from upweight.task.losses import SquaredError, Weighted
from upweight.task.task import Task
from upweight.testing.problems import ClosedForm, Problem, closed_forms, first_output, ridge

Check = Callable[[], None]


def check_method(
    method: Method,
    *,
    problems: Sequence[Problem] | None = None,
    exact: bool = False,
    damped: bool = False,
    symmetric: bool = True,
    deterministic: bool = True,
    rtol: float = 1e-8,
    history: Any = None,
) -> Iterator[tuple[str, Check]]:
    """Yield (name, check) pairs; a check raises `AssertionError` where a law is broken.

    Args:
        method: The spec to hold to the laws.
        problems: Tasks to ask about; None: the closed forms.
        exact: Whether it promises ∂m/∂w itself where f is linear in θ and θ̂ a minimum.
        damped: Whether it damps, so that even without a penalty its rows need not sum to zero.
        symmetric: Whether S is symmetric for m = ℓ on the training set, as with any symmetric H.
        deterministic: Whether its scores do not depend on batches and on the order of the data.
            False for methods that draw at random by batch, or that model batches.
        rtol: What scores may be off by, relative to the largest of them; 10 × an iterative
            solver's own rtol.
        history: What `fit` takes as `history=` on every task, such as a recipe with init=None.
    """
    suite = _Suite(method, rtol, history)
    for problem in closed_forms() if problems is None else problems:
        laws: dict[str, Callable[[Any], None]] = {
            "scores have a unit, a shape and a source": suite.labelled,
            "rows follow the queries": suite.query_subset,
            "self-influence is the diagonal": suite.diagonal,
            "reducers keep what the matrix has": suite.reduced,
        }
        if method.unit is Unit.DERIVATIVE:
            laws["linear in the measurement"] = suite.linear
        if symmetric:
            laws["symmetric on the training set"] = suite.symmetric
        if deterministic:
            laws["columns follow the examples"] = suite.order
            laws["batches do not matter"] = suite.batches
            if method.unit is Unit.DERIVATIVE:
                laws["duplicates halve the scores"] = suite.duplicates
        if exact and isinstance(problem, ClosedForm):
            laws["is the derivative"] = suite.exact
        for name, law in laws.items():
            yield f"{name}: {problem.name}", partial(law, problem)
    yield "an example without a gradient has score zero", suite.zero
    if exact and not damped:
        yield "rows sum to zero without a penalty", suite.row_sum
    yield "the model comes back as it was lent", suite.untouched
    yield "answers twice the same", suite.repeatable
    yield "is a spec", suite.spec


class _Suite:
    """The checks, with one method, fitted once to each problem unless a law asks of another fit."""

    def __init__(self, method: Method, rtol: float, history: Any) -> None:
        self.method, self.rtol, self.history = method, rtol, history
        self.fits: dict[Problem, Fitted] = {}

    def fitted(self, problem: Problem) -> Fitted:
        if problem not in self.fits:
            self.fits[problem] = self.method.fit(problem.task, problem.train, history=self.history)
        return self.fits[problem]

    def anew(self, task: Task, train: Any, queries: Any) -> Tensor:
        found: Scores = self.method.fit(task, train, history=self.history).attribute(queries)
        return found.values

    def of(self, problem: Problem, *measure: Any) -> Tensor:
        found: Scores = self.fitted(problem).attribute(problem.queries, *measure)
        return found.values

    def same(self, actual: Tensor, expected: Tensor, what: str) -> None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            actual,
            expected.to(actual),
            rtol=self.rtol,
            atol=self.rtol * scale,
            msg=lambda text: f"{self.method!r}: {what}\n{text}",
        )

    def labelled(self, problem: Problem) -> None:
        scores = self.fitted(problem).attribute(problem.queries)
        assert isinstance(scores, Scores)
        n, q = len(as_data(problem.train)), len(as_data(problem.queries))
        assert scores.values.shape == (q, n), f"{self.method!r}: {tuple(scores.values.shape)}"
        assert scores.unit is self.method.unit, f"{self.method!r}: {scores.unit}"
        found = scores.provenance
        assert (found.n, found.q, found.p) == (n, q, problem.task.layout.size)
        assert found.method == repr(self.method), f"{self.method!r} is called {found.method}"
        assert scores.context is not None and scores.context.task is problem.task

    def query_subset(self, problem: Problem) -> None:
        rows = self.of(problem)
        subset = as_data(problem.queries).subset([1, 0])
        found = self.fitted(problem).attribute(subset).values
        self.same(found, rows[[1, 0]], "a query's scores depend on the other queries")

    def diagonal(self, problem: Problem) -> None:
        fitted = self.fitted(problem)
        expected = fitted.attribute(problem.train).values.diagonal()
        self.same(fitted.self_influence(), expected, "self_influence() is not the diagonal of S")

    def linear(self, problem: Problem) -> None:
        def second(outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.reshape(len(outputs), -1).square().sum(dim=1)

        def both(outputs: Tensor, targets: Tensor) -> Tensor:
            return 2.0 * first_output(outputs, targets) - 3.0 * second(outputs, targets)

        one, two = self.of(problem, first_output), self.of(problem, second)
        # What cancels in 2a − 3b may be larger than what is left.
        scale = float((2 * one).abs().max() + (3 * two).abs().max())
        found = self.of(problem, both)
        gap = float((found - (2.0 * one - 3.0 * two)).abs().max())
        assert gap <= self.rtol * scale, f"{self.method!r}: not linear in m, by {gap:.1e}"

    def symmetric(self, problem: Problem) -> None:
        values = self.fitted(problem).attribute(problem.train).values
        self.same(values, values.T.contiguous(), "S is not symmetric on the training set")
        if self.method.unit is Unit.DERIVATIVE:
            rising = values.diagonal() > 0
            assert not bool(rising.any()), f"{self.method!r}: more weight raises an own loss"

    def order(self, problem: Problem) -> None:
        n = len(as_data(problem.train))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        shuffled = as_data(problem.train).subset(order.tolist())
        found = self.anew(problem.task, shuffled, problem.queries)
        self.same(found, self.of(problem)[:, order], "columns do not follow the examples")

    def batches(self, problem: Problem) -> None:
        expected = self.of(problem)
        # The memory that one pass may use: enough for one example, and for a few.
        for budget in (1, 150):
            with (
                mock.patch("upweight.task.data.WORKING_BYTES", budget),
                mock.patch("upweight.runtime.memory.ENOUGH", budget),
            ):
                found = self.anew(problem.task, problem.train, problem.queries)
                self.same(found, expected, f"batches matter ({budget} bytes)")

    def duplicates(self, problem: Problem) -> None:
        once = self.of(problem)
        n = once.shape[1]
        twice = as_data(problem.train).subset([*range(n), *range(n)])
        found = self.anew(problem.task, twice, problem.queries)
        self.same(found, torch.cat([once, once], dim=1) / 2, "two copies do not share a score")

    def reduced(self, problem: Problem) -> None:
        fitted = self.fitted(problem)
        values = fitted.attribute(problem.queries).values
        n = values.shape[1]
        k = min(3, n)
        top = fitted.attribute(problem.queries, into=Top(k))
        for found, largest in ((top.raises_by, True), (top.lowers_by, False)):
            expected = values.topk(k, dim=1, largest=largest).values
            self.same(found, expected, "Top keeps other scores than the extremes")
        labels = [i % 3 for i in range(n)]
        sums = fitted.attribute(problem.queries, into=GroupSums(labels))
        by_hand = [values[:, label::3].sum(dim=1) for label in range(min(3, n))]
        # Scores of a group may cancel.
        gap = float((sums.values - torch.stack(by_hand, dim=1)).abs().max())
        largest_sum = float(values.abs().sum(dim=1).max())
        assert gap <= self.rtol * largest_sum, f"{self.method!r}: groups do not add up, by {gap}"

    def exact(self, problem: ClosedForm) -> None:
        found = self.of(problem, first_output)
        self.same(found, problem.output_scores, "S is not the derivative in the weights")

    def zero(self) -> None:
        """One example has weight 0 in the loss, so that its gradient is zero at any θ."""
        problem = ridge()
        X, Y = problem.train
        v = torch.ones(len(X), dtype=X.dtype)
        v[3] = 0.0
        queries = (problem.queries[0], (problem.queries[1], torch.ones(4, dtype=X.dtype)))
        task = Task(problem.task.model, Weighted(SquaredError()), problem.task.penalty)
        values = self.anew(task, (X, (Y, v)), queries)
        assert bool((values[:, 3] == 0).all()), f"{self.method!r}: a zero gradient has a score"
        assert bool((values[:, 4] != 0).any()), f"{self.method!r}: all scores are zero"

    def row_sum(self) -> None:
        generator = torch.Generator().manual_seed(3)
        X = torch.randn(15, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(15, 1, generator=generator, dtype=torch.float64)
        model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        model.weight.data.copy_(torch.linalg.lstsq(X, y).solution.T)
        values = self.anew(Task(model, SquaredError()), (X, y), (X, y))
        largest = float(values.abs().sum(dim=1).max())
        excess = float(values.sum(dim=1).abs().max())
        assert excess <= self.rtol * largest, f"{self.method!r}: rows sum to {excess:.1e}, not to 0"

    def untouched(self) -> None:
        problem = ridge()
        model = problem.task.model
        model.register_buffer("kept", torch.ones(1))
        before = copy.deepcopy(model.state_dict())
        lent = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
        mode, random = [m.training for m in model.modules()], torch.get_rng_state()
        self.anew(problem.task, problem.train, problem.queries)
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before), "the model has changed"
        assert lent == [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
        assert mode == [m.training for m in model.modules()], "the training mode has changed"
        assert torch.equal(random, torch.get_rng_state()), "the global generator was used"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def repeatable(self) -> None:
        problem = ridge()
        one, two = (self.anew(problem.task, problem.train, problem.queries) for _ in range(2))
        assert torch.equal(one, two), f"{self.method!r}: two answers"

    def spec(self) -> None:
        names = {name: getattr(upweight, name) for name in upweight.__all__}
        names |= {type(part).__name__: type(part) for part in _parts(self.method)}
        again = eval(repr(self.method), names)
        assert again == self.method, f"repr is not Python for an equal spec: {self.method!r}"
        assert hash(again) == hash(self.method)


def _parts(spec: Any) -> Iterator[Any]:
    """A spec and the specs in its fields: somebody else's may be among them."""
    yield spec
    if dataclasses.is_dataclass(spec):
        for field in dataclasses.fields(spec):
            yield from _parts(getattr(spec, field.name))
