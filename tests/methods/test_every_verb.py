"""Every method of the registry × every verb: a right answer, or an error with a way out.

A method enters by its word in `upweight.cli.spec`. One whose arguments have no defaults finds
values for them in `ARGUMENTS`, by name. What a method answers is held to its own matrix of scores.
"""

import copy
import inspect
from functools import cache, partial

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.cli.spec import REGISTRY
from upweight.errors import UpweightError
from upweight.methods.dense import DenseScorer

N, Q = 14, 3  # the batches of 4 do not divide 14; 14 examples have enough halves
DOUBLE = {"dtype": torch.float64}

ARGUMENTS = {
    "damping": 0.1,
    "method": uw.GradientDot(),
    "methods": (uw.GradientDot(),),
    "step": 1e-4,
    "localization": 10.0,
}
"""Values for arguments without a default."""

CHEAP = {
    "members": 2, "subsets": 8, "seeds": 2, "permutations": 2, "epochs": 3, "draws": 5,
    "chains": 2, "burn_in": 1, "thinning": 1, "dim": 8, "rank": 2, "states": 2,
    "segments": 1,
}  # fmt: skip
"""Small values for what a method does many times."""

FITTED_TO_QUERIES = (uw.Stacked,)
"""Their coefficients are fitted to the queries asked, so that rows depend on each other."""


def spec_of(method):
    fields = inspect.signature(method).parameters
    own = {
        uw.SubsampledInfluence: {"subsets": 20},  # in two, out of two
        uw.Averaged: {"methods": (uw.GradientDot(), uw.TracIn())},
    }
    small = CHEAP | own.get(method, {})
    return method(**{k: v for k, v in (ARGUMENTS | small).items() if k in fields})


METHODS = [spec_of(method) for method in REGISTRY["method"]]
each_method = pytest.mark.parametrize("spec", METHODS, ids=lambda spec: type(spec).__name__)
pytestmark = pytest.mark.filterwarnings("ignore")


class Tokens(nn.Module):
    """A class for a sequence of tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3, **DOUBLE)
        self.out = nn.Linear(3, 2, **DOUBLE)

    def forward(self, ids):
        return self.out(self.embed(ids).tanh().mean(dim=1))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(3, 3, **DOUBLE) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


def network():
    return nn.Sequential(nn.Linear(3, 4, **DOUBLE), nn.Tanh(), nn.Linear(4, 2, **DOUBLE))


def data(of, n):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n + Q, 3, generator=generator, **DOUBLE)
    if of is Tokens:
        X = torch.randint(5, (n + Q, 4), generator=generator)
    y = torch.arange(n + Q) % 2
    return (X[:n], y[:n]), (X[n:], y[n:])


def problem(of=network, n=N):
    """(task, train, queries, recipe): a model that the recipe made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = of()
    train, queries = data(of, n)
    recipe = uw.Training(partial(copy.deepcopy, model), uw.SGD(0.1), epochs=2, batch=4)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-2))
    return task.moved_to(recipe.trajectory(task, train).theta), train, queries, recipe


def history_of(spec, recipe):
    return recipe if spec.takes_history and not spec.history_is_optional else None


@cache
def fitted_of(spec):
    """The method on the first problem that it is for, its queries and its scores."""
    for of in (network, Tokens):
        task, train, queries, recipe = problem(of)
        try:
            fitted = spec.fit(task, train, history=history_of(spec, recipe))
        except UpweightError as error:
            refused = error
            continue
        return fitted, train, queries, recipe, fitted.attribute(queries).values
    raise refused


def answer(ask):
    """What `ask` returns; None where it is refused, as it should be."""
    try:
        return ask()
    except UpweightError as error:
        refused = str(error)
    assert "Way out:" in refused
    return None


def close(found, expected, rtol=1e-8):
    torch.testing.assert_close(
        found.to(expected), expected, rtol=rtol, atol=rtol * float(expected.abs().max())
    )


@each_method
def test_scores_and_what_is_kept_of_them(spec, tmp_path):
    fitted, train, queries, _, values = fitted_of(spec)
    assert values.shape == (Q, N)
    assert bool(values.isfinite().all())
    assert bool((values != 0).any())
    if not isinstance(spec, FITTED_TO_QUERIES):
        close(fitted.attribute((queries[0][:1], queries[1][:1])).values, values[:1])
    top = fitted.attribute(queries, into=uw.Top(2))
    close(top.raises_by, values.topk(2, dim=1).values)
    close(top.lowers_by, values.topk(2, dim=1, largest=False).values)
    sums = fitted.attribute(queries, into=uw.GroupSums([i % 3 for i in range(N)])).values
    close(sums, torch.stack([values[:, k::3].sum(dim=1) for k in range(3)], dim=1))
    kept = fitted.attribute(queries, into=uw.Shards(tmp_path / "kept"))
    close(torch.stack([torch.as_tensor(kept.row(q)) for q in range(Q)]), values)
    layers = answer(lambda: fitted.attribute(queries, into=uw.PerLayer()))
    if layers is not None:
        close(sum(part.values for part in layers.values()), values)
    tokens = answer(lambda: fitted.attribute(queries, into=uw.PerToken([2, 0])))
    if tokens is not None:
        close(tokens.shares.sum(dim=2) + tokens.rest, values[:, [2, 0]])
    own = answer(fitted.self_influence)
    assert (".self_influence()" in repr(fitted)) == (own is not None)
    if own is not None:
        close(own, fitted.attribute(train).values.diagonal())


@each_method
def test_measures_and_functionals(spec):
    fitted, _, queries, _, values = fitted_of(spec)
    for measure in (uw.Margin(), lambda outputs, targets: outputs[:, 0]):
        found = answer(lambda m=measure: fitted.attribute(queries, m).values)
        assert found is None or (found.shape == (Q, N) and bool(found.isfinite().all()))

    def losses(task, params, queries, weights):
        return task.losses(params, queries)

    # The same question in another form.
    found = answer(lambda: fitted.attribute(queries, uw.Functional(losses)).values)
    if found is not None:
        close(found, values)


@each_method
def test_removals_and_movement(spec):
    fitted, _, queries, _, values = fitted_of(spec)
    groups = [(0,), (1, 2, 3)]
    found = answer(lambda: fitted.removal(queries, groups=groups).values)
    if found is not None and not isinstance(fitted.scorer, DenseScorer):
        close(found, -torch.stack([values[:, 0], values[:, 1:4].sum(dim=1)], dim=1))
    found = answer(lambda: fitted.removal(queries, groups=groups, evaluate="plugin").values)
    assert found is None or bool(found.isfinite().all())
    for ask in (lambda: fitted.removal_step([0, 1]), lambda: fitted.parameter_influence(0)):
        step = answer(ask)
        assert step is None or all(bool(part.isfinite().all()) for part in step.values())
    outputs = answer(fitted.loo_outputs)
    assert outputs is None or (outputs.shape == (N, 2) and bool(outputs.isfinite().all()))
    found = answer(lambda: fitted.stationarity)
    assert found is None or found["gradient_norm"] > 0


@each_method
def test_changed_examples(spec):
    fitted, train, queries, _, values = fitted_of(spec)
    (x, y), i = train, 1
    same = answer(lambda: fitted.relabel_influence(i, y[i], queries))
    assert same is None or float(same.abs().max()) <= 1e-12 * float(values.abs().max())
    other = answer(lambda: fitted.relabel_influence(i, 1 - y[i], queries))
    assert other is None or bool((other != 0).any())
    moved = answer(lambda: fitted.input_influence(i, queries))
    if moved is not None:
        asked, d, parts = fitted._asked(queries, uw.Loss()), 1e-5, []
        for step in (d, -d):
            near = x[i : i + 1].clone()
            near[0, 0] += step
            (job,) = fitted.scorer.jobs(asked)
            with job:
                parts.append(job.scores_of((near, y[i : i + 1]), 1)[:, 0])
        close(moved[:, 0], (parts[0] - parts[1]) / (2 * d), rtol=1e-6)


@each_method
def test_check(spec):
    fitted, _, queries, recipe, _ = fitted_of(spec)
    answer(lambda: fitted.check(recipe, queries=queries, subsets=8))


@each_method
def test_little_memory(spec):
    fitted, train, queries, recipe, values = fitted_of(spec)
    small, history = uw.Resources(memory_bytes=1), history_of(spec, recipe)
    refit = answer(lambda: spec.fit(fitted.task, train, history=history, resources=small))
    found = None if refit is None else answer(lambda: refit.attribute(queries).values)
    if found is not None:
        close(found, values, rtol=1e-5)  # an exact curvature is then solved by iteration


@each_method
def test_no_history_or_something_else(spec):
    """Where one is needed, an error, and never another method's number."""
    fitted, train, *_ = fitted_of(spec)
    if spec.takes_history and not spec.history_is_optional:
        assert answer(lambda: spec.fit(fitted.task, train)) is None
    for history in (3, "recipe", fitted.task.model, []):
        assert answer(lambda h=history: spec.fit(fitted.task, train, history=h)) is None


def with_batch_norm():
    """Frozen up to there."""
    parts = (nn.Linear(3, 4, **DOUBLE), nn.BatchNorm1d(4, **DOUBLE), nn.Linear(4, 2, **DOUBLE))
    parts[0].requires_grad_(False)
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("case", ["one example", "batch norm", "tied"])
@each_method
def test_models(spec, case):
    of = {"batch norm": with_batch_norm, "tied": Tied}.get(case, network)
    if isinstance(spec, uw.BM25):
        of = Tokens  # what it is for
    task, train, queries, recipe = problem(of, 1 if case == "one example" else N)
    history = history_of(spec, recipe)
    found = answer(lambda: spec.fit(task, train, history=history).attribute(queries).values)
    assert found is None or bool(found.isfinite().all())


@each_method
def test_an_example_that_is_no_number(spec):
    fitted, (x, y), _, recipe, _ = fitted_of(spec)
    if x.is_floating_point():
        x = x.clone()
        x[5] = torch.nan
        with pytest.raises(UpweightError, match="Way out"):
            spec.fit(fitted.task, (x, y), history=history_of(spec, recipe))


@each_method
def test_a_model_that_changed_after_the_fit(spec):
    fitted, _, queries, *_ = fitted_of(spec)
    parameter = next(fitted.task.model.parameters())
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.add_(0.1)
        for ask in (lambda: fitted.attribute(queries), fitted.self_influence):
            assert answer(ask) is None
    finally:
        with torch.no_grad():
            parameter.copy_(before)


@each_method
def test_a_caller_under_no_grad_gets_the_same_scores(spec):
    fitted, train, queries, recipe, values = fitted_of(spec)
    with torch.no_grad():
        again = spec.fit(fitted.task, train, history=history_of(spec, recipe))
        found = again.attribute(queries).values
    torch.testing.assert_close(found, values, rtol=1e-10, atol=1e-12)
