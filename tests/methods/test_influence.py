"""Influence: the formula, what moves the parameters, provenance and what is refused."""

import math
import re

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import assert_same, first_output
from tests.market import BUILDERS, draw, names, problem
from tests.reference import dense
from tests.reference.retrain import minimize, weight_derivative
from upweight.cli.spec import parse
from upweight.errors import NonFinite, NotConverged, NotPositiveDefinite, ShapeError, SpecError
from upweight.methods.facts import stated

EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())
REFERENCES = {
    "Hessian": (uw.Hessian(), dense.hessian),
    "GGN": (uw.GGN(), dense.ggn),
    "EmpiricalFisher": (uw.EmpiricalFisher(), dense.empirical_fisher),
}


# -- the formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("curvature", REFERENCES)
def test_scores_equal_the_matrix_written_out(curvature, name):
    p = problem(name)
    spec, reference = REFERENCES[curvature]
    damping = 2.0 if {"untrained", "float32"} & p.traits else 0.0
    fitted = uw.Influence(spec, uw.solvers.Cholesky(), damping).fit(p.task, p.train)
    H = reference(p.task, p.train)
    H = H + damping * torch.eye(len(H), dtype=H.dtype)
    for measure, function in ((uw.Loss(), p.task.loss), (first_output, first_output)):
        expected = dense.scores(p.task, p.train, p.queries, function, H)
        found = fitted.attribute(p.queries, measure).values
        assert_same(found, expected, 1e-3 if "float32" in p.traits else 1e-9)


@pytest.mark.parametrize("name", BUILDERS)
def test_self_influence_is_the_diagonal(name):
    p = problem(name)
    damping = 2.0 if {"untrained", "float32"} & p.traits else 0.0
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), damping).fit(p.task, p.train)
    expected = fitted.attribute(p.train).values.diagonal()
    assert_same(fitted.self_influence(), expected, 1e-4 if "float32" in p.traits else 1e-10)


# -- the parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ridge_two_outputs", "softmax", "weighted", "mlp_tanh", "tied"])
def test_parameter_influence_is_n_times_the_derivative_of_theta(name):
    p = problem(name)

    def theta(weights):
        return minimize(p.task, p.train, weights, start=p.task.theta())

    fitted = EXACT.fit(p.task, p.train)
    for example in (0, 3):
        moved = fitted.parameter_influence(example)
        assert list(moved) == list(p.task.layout.names)
        expected = p.n * weight_derivative(theta, p.n, example)
        assert_same(p.task.layout.flatten(moved), expected, 1e-6)


def test_parameter_influence_is_the_chain_rules_other_factor():
    p = problem("mlp_tanh")
    fitted = EXACT.fit(p.task, p.train)
    moved = p.task.layout.flatten(fitted.parameter_influence(2))
    m = dense.measure_gradients(p.task, p.task.loss, p.queries)
    assert_same(fitted.attribute(p.queries).values[:, 2], m @ moved / p.n, 1e-10)


@pytest.mark.parametrize("example", [17, -1])
def test_an_example_that_is_not_there(example):
    p = problem("softmax")
    with pytest.raises(ShapeError, match="0…16"):
        EXACT.fit(p.task, p.train).parameter_influence(example)


# -- provenance and health -------------------------------------------------------------------


def test_provenance_says_what_was_done():
    p = problem("softmax")
    method = uw.Influence(uw.GGN(), uw.solvers.CG(rtol=1e-8), uw.Relative(0.1))
    scores = method.fit(p.task, p.train).attribute(p.queries, uw.Margin())
    found = scores.provenance
    assert parse(found.method) == method
    assert parse(found.measure) == uw.Margin()
    assert (found.n, found.q, found.p, found.dtype) == (17, 5, 12, "float64")
    assert "L2(strength=0.03" in found.task and "CrossEntropy" in found.task
    health = found.health
    mean = float(torch.linalg.eigvalsh(dense.ggn(p.task, p.train)).mean())
    assert health["damping"] == pytest.approx(0.1 * mean)
    assert 0 < health["solver_steps"] <= 12 and 0 < health["largest_residual"] <= 1e-8
    assert parse(health["solver"]) == uw.solvers.CG(rtol=1e-8)
    # Four of the eigenvalues are of shifts that all classes share; no gradient has a part there
    seen = (torch.linalg.eigvalsh(dense.ggn(p.task, p.train)) + health["damping"])[3:-1]
    assert health["solver_smallest_ritz"] == pytest.approx(float(seen[0]), rel=1e-6)
    assert health["solver_largest_ritz"] == pytest.approx(float(seen[-1]), rel=1e-6)
    assert health["solver_condition"] == pytest.approx(float(seen[-1] / seen[0]), rel=1e-6)
    damping = next(fact for fact in stated(health) if fact.name == "Damping")
    assert "smallest Ritz value of H + λI" in damping.meaning
    losses = nn.functional.cross_entropy(p.task.model(p.train[0]), p.train[1])
    assert health["mean_loss"] == pytest.approx(float(losses.detach()))
    assert set(found.seconds) == {"fit", "attribute"} and found.versions["torch"]
    assert scores.context.measure == uw.Margin() and scores.context.fitted.task is p.task


def test_the_default_solver_is_named_and_not_auto():
    p = problem("softmax")
    health = uw.Influence().fit(p.task, p.train).attribute(p.queries).provenance.health
    assert health["solver"].startswith("Cholesky(")
    p = problem("mlp_tanh")
    health = uw.Influence().fit(p.task, p.train).attribute(p.queries).provenance.health
    assert health["solver"].startswith("MINRES(")  # an exact Hessian is only known symmetric


def test_a_float16_model_is_warned_about_and_noted():
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    train = (torch.ones(4, 2).bfloat16(), torch.arange(4.0)[:, None].bfloat16())
    task = uw.Task(model, uw.SquaredError(), uw.L2(1.0))
    with pytest.warns(UserWarning, match="bfloat16.*about 2 digits"):
        fitted = uw.Influence().fit(task, train)
    assert any("bfloat16" in note for note in fitted.attribute(train).provenance.notes)


@pytest.mark.parametrize("name", names("float32"))
def test_float32_scores_are_close_to_float64(name):
    p = problem(name)
    method = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), 0.1)
    single = method.fit(p.task, p.train).attribute(p.queries).values
    assert single.dtype == torch.float32
    model = dense.Replica(p.task, p.train).model.requires_grad_(True).double()
    task = uw.Task(model, p.task.loss, p.task.penalty)

    def double(data):
        return tuple(x.double() if x.is_floating_point() else x for x in data)

    expected = method.fit(task, double(p.train)).attribute(double(p.queries)).values
    assert_same(single.double(), expected, 1e-4)


# -- specs --------------------------------------------------------------------------------------


def test_specs_compare_hash_and_print():
    specs = [
        uw.Influence(),
        uw.Influence(uw.GGN(), uw.solvers.CG(rtol=1e-4), 0.1),
        uw.Influence(uw.Fisher(samples=3, seed=2), uw.solvers.MINRES(), uw.Relative(0.1)),
        uw.Influence(uw.EmpiricalFisher(), uw.solvers.BlockCG(), uw.Absolute(1.0)),
    ]
    for spec in specs:
        assert parse(repr(spec)) == spec
        assert spec.unit is uw.Unit.DERIVATIVE
    assert len(set(specs)) == len(specs)


# -- what is refused ----------------------------------------------------------------------------


def test_an_indefinite_hessian_says_its_smallest_eigenvalue_at_fit():
    p = problem("attention")
    smallest = float(torch.linalg.eigvalsh(dense.hessian(p.task, p.train))[0])
    assert smallest < 0
    with pytest.raises(NotPositiveDefinite, match=f"{smallest:.1e}".replace("-0", "-0?")) as caught:
        EXACT.fit(p.task, p.train)
    assert caught.value.smallest == pytest.approx(smallest, rel=1e-6)
    with pytest.raises(NotPositiveDefinite, match=r"curvature=GGN\(\)"):
        uw.Influence(uw.Hessian(), uw.solvers.CG()).fit(p.task, p.train).attribute(p.queries)


def test_an_indefinite_hessian_is_solved_by_minres():
    p = problem("attention")
    H = dense.hessian(p.task, p.train)
    found = uw.Influence(uw.Hessian(), uw.solvers.MINRES(rtol=1e-10)).fit(p.task, p.train)
    expected = dense.scores(p.task, p.train, p.queries, p.task.loss, H)
    assert_same(found.attribute(p.queries).values, expected, 1e-6)


def test_a_singular_hessian_is_refused_and_not_damped():
    """A softmax with free biases is flat along their common shift."""
    p = problem("softmax")
    task = uw.Task(p.task.model, p.task.loss, uw.L2(0.03, exclude=("bias",)))
    with pytest.raises(NotPositiveDefinite, match="softmax with unpenalized biases"):
        EXACT.fit(task, p.train)


def test_a_solver_that_runs_out_of_steps_is_refused():
    p = problem("mlp_tanh")
    method = uw.Influence(uw.GGN(), uw.solvers.CG(rtol=1e-10, max_steps=2))
    with pytest.raises(NotConverged, match="after 2 steps") as caught:
        method.fit(p.task, p.train).attribute(p.queries)
    assert caught.value.solution.value.shape == (4, p.task.layout.size)


@pytest.mark.parametrize("damping", [-0.1, math.nan, math.inf])
def test_a_damping_that_means_nothing(damping):
    p = problem("softmax")
    with pytest.raises(ValueError, match="finite number ≥ 0"):
        uw.Influence(damping=damping).fit(p.task, p.train)


# -- what does not fit into memory ----------------------------------------------------------------


def free(monkeypatch, number):
    monkeypatch.setattr("upweight.runtime.memory.free_bytes", lambda device: number)


def test_a_factor_that_does_not_fit_is_refused_before_it_is_asked_for(monkeypatch):
    p = problem("mlp_tanh")
    size = p.task.layout.size
    free(monkeypatch, size**2 * 8 - 1)
    with pytest.raises(SpecError, match=rf"{size} × {size}(.|\n)*EKFAC\(\)(.|\n)*CG\(\)"):
        uw.Influence(uw.GGN(), damping=0.1).fit(p.task, p.train)
    for way in (
        uw.Influence(uw.EKFAC(), damping=0.1),
        uw.Influence(uw.GGN(), solver=uw.solvers.CG(), damping=0.1),
    ):
        fitted = way.fit(p.task, p.train)
        free(monkeypatch, 10**9)  # what is asked of it is another matter
        assert bool(fitted.attribute(p.queries).values.isfinite().all())
        free(monkeypatch, size**2 * 8 - 1)


def test_scores_that_do_not_fit_are_refused_before_anything_is_computed(monkeypatch):
    p = problem("softmax")
    train = uw.as_data(p.train).subset([*range(p.n)] * 5)
    fitted = uw.Influence(damping=0.1).fit(p.task, train)
    whole = fitted.attribute(p.queries).values
    q, n = whole.shape
    free(monkeypatch, q * n * 8 - 1)
    monkeypatch.setattr("upweight.methods.fitted.checked_losses", None)  # not called
    for ask in (fitted.attribute, fitted.removal):
        with pytest.raises(SpecError, match=rf"{q} × {n} scores(.|\n)*some queries at a time"):
            ask(p.queries)
    monkeypatch.undo()
    free(monkeypatch, (q - 1) * n * 8)
    some = uw.as_data(p.queries).subset(range(q - 1))
    torch.testing.assert_close(fitted.attribute(some).values, whole[: q - 1])


def test_gradients_of_the_queries_that_do_not_fit_are_refused(monkeypatch):
    p = problem("mlp_tanh")
    fitted = uw.Influence(uw.GGN(), damping=0.1).fit(p.task, p.train)
    size, whole = p.task.layout.size, fitted.attribute(p.queries).values
    free(monkeypatch, 2 * 2 * size * 8)  # half of it for one query at a time
    torch.testing.assert_close(fitted.attribute(p.queries).values, whole)
    free(monkeypatch, 2 * size * 8 - 1)  # no room for one, though for its scores
    one = uw.as_data(p.queries).subset([0])
    with pytest.raises(SpecError, match=rf"gradients and solutions of 1 queries in {size} param"):
        fitted.attribute(one)


def test_a_solver_that_may_take_minutes_says_so_before_it_starts(monkeypatch):
    p = problem("mlp_tanh")
    size = p.task.layout.size
    uw.Influence(damping=2.0).fit(p.task, p.train)  # no word where it is quick
    monkeypatch.setattr("upweight.methods.health.SLOW_S", 0.0)
    with pytest.warns(UserWarning, match=rf"MINRES\(\) takes up to {size} products.*EKFAC\(\)"):
        fitted = uw.Influence(damping=2.0).fit(p.task, p.train)
    assert any("min a query" in note for note in fitted.attribute(p.queries).provenance.notes)
    uw.Influence(uw.GGN(), damping=2.0).fit(p.task, p.train)  # a factor is had once


@pytest.mark.parametrize(
    "method",
    [
        uw.Influence(uw.Hessian(), uw.solvers.Cholesky()),
        uw.Influence(uw.Hessian(), uw.solvers.CG()),
        uw.LoGra(3, damping=0.1),
    ],
    ids=repr,
)
def test_a_query_whose_gradient_is_infinite_is_named(method):
    """√|f| is 0 where f is, and its slope is not finite."""
    g = torch.Generator().manual_seed(0)
    X, y = draw(g, 20, 3), draw(g, 20, 1)
    inputs, targets = draw(g, 4, 3), draw(g, 4, 1)
    inputs[2] = 0
    task = uw.Task(nn.Linear(3, 1, bias=False).double(), uw.SquaredError(), uw.L2(0.1))
    ones = torch.ones(1, 20).double()
    theta = uw.training.Newton().prepare(task, uw.as_data((X, y)))(ones).alone()
    fitted = method.fit(task.moved_to(theta), (X, y))

    def root(outputs, _):
        return outputs[:, 0].abs().sqrt()

    with pytest.raises(NonFinite, match=r"(?s)1 of 4 are not, first that of query 2.*leave this"):
        fitted.attribute((inputs, targets), root)
    left = [0, 1, 3]
    assert bool(fitted.attribute((inputs[left], targets[left]), root).values.isfinite().all())


def test_damping_bounds_the_products_that_are_warned_of(monkeypatch):
    """2√κ ((√κ − 1)/(√κ + 1))^k ≤ rtol: known where λ is the least that an eigenvalue can be."""
    p = problem("mlp_tanh")
    monkeypatch.setattr("upweight.methods.health.SLOW_S", 0.0)
    method = uw.Influence(uw.GGN(), uw.solvers.CG(rtol=1e-2), damping=0.5)
    with pytest.warns(UserWarning, match=r"takes up to \d+ products") as said:
        fitted = method.fit(p.task, p.train)
    told = int(re.search(r"up to (\d+) products", str(said[0].message))[1])
    ends = torch.linalg.eigvalsh(fitted.scorer.operator.dense())
    root = float(ends[-1] / 0.5) ** 0.5
    exact = math.log(2 * root / 1e-2) / math.log((root + 1) / (root - 1))
    assert exact <= told <= 1.1 * exact + 1
    assert told < p.task.layout.size
    assert fitted.attribute(p.queries).provenance.health["solver_steps"] <= told
