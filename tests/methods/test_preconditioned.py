"""EK-FAC as the preconditioner of CG: the same answer in fewer steps, for a model of any size."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import upweight as uw
from tests.laws.subjects import assert_same
from tests.market import draw, names, problem
from upweight.errors import SpecError, UpweightError

RTOL = 1e-11
SOLVERS = {"CG": uw.solvers.CG, "BlockCG": uw.solvers.BlockCG}
PRECONDITIONERS = {
    "EKFAC": uw.EKFAC(uw.labels.Observed()),
    "KFAC": uw.KFAC(uw.labels.Observed(), uw.curvature.Reduce()),
    "Diagonal": uw.Diagonal(uw.labels.Observed()),
}


NAMES = names(without=("float32", "untrained"))
# A block of vectors is the business of the solver, whatever the model: on some.
BLOCKS = ["ridge", "softmax", "mlp_tanh", "conv", "tied"]


@pytest.mark.parametrize(
    "solver, name", [("CG", name) for name in NAMES] + [("BlockCG", name) for name in BLOCKS]
)
def test_equals_the_factorization(solver, name):
    p = problem(name)
    exact = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=0.05).fit(p.task, p.train)
    made = SOLVERS[solver](rtol=RTOL, preconditioner=PRECONDITIONERS["EKFAC"])
    found = uw.Influence(uw.GGN(), made, damping=0.05).fit(p.task, p.train)
    assert_same(found.attribute(p.queries).values, exact.attribute(p.queries).values, 10 * RTOL)
    assert any(note.startswith("preconditioner EKFAC(") for note in found.notes)


@pytest.mark.parametrize("curvature", [uw.GGN(), uw.Hessian()], ids=repr)
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_whatever_the_preconditioner(damping, curvature):
    p = problem("mlp_tanh")
    exact = uw.Influence(curvature, uw.solvers.Cholesky(), damping=damping).fit(p.task, p.train)
    expected = exact.attribute(p.queries).values
    moved = p.task.layout.flatten(exact.parameter_influence(1))
    for preconditioner in PRECONDITIONERS.values():
        made = uw.solvers.CG(rtol=RTOL, preconditioner=preconditioner)
        fitted = uw.Influence(curvature, made, damping=damping).fit(p.task, p.train)
        assert_same(fitted.attribute(p.queries).values, expected, 1e-8)
        # The verbs of a dense solver are there.
        assert_same(p.task.layout.flatten(fitted.parameter_influence(1)), moved, 1e-8)


def ill_conditioned(n=60, dtype=torch.float64):
    """Inputs whose scales range over four orders of magnitude."""
    g = torch.Generator().manual_seed(3)
    X = draw(g, n, 8) * torch.logspace(-2, 2, 8, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * draw(g, *parameter.shape))
        model[0].weight.div_(torch.logspace(-2, 2, 8, dtype=torch.float64))
    y = torch.arange(n) % 3
    return uw.Task(model.eval(), uw.CrossEntropy()), (X, y), (X[:5], y[:5])


@pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")
@pytest.mark.parametrize("solver", SOLVERS)
def test_fewer_steps_where_layers_are_ill_conditioned(solver):
    task, train, queries = ill_conditioned()
    steps, values = {}, {}
    for name, preconditioner in (("without", None), ("with", uw.EKFAC(uw.labels.Expected()))):
        made = SOLVERS[solver](rtol=1e-9, max_steps=5000, preconditioner=preconditioner)
        fitted = uw.Influence(uw.GGN(), made, damping=1e-3).fit(task, train)
        scores = fitted.attribute(queries)
        steps[name], values[name] = scores.provenance.health["solver_steps"], scores.values
    exact = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=1e-3).fit(task, train)
    expected = exact.attribute(queries).values
    for found in values.values():
        assert_same(found, expected, 1e-5)
    # A block of five reaches past the four worst eigenvalues by itself.
    assert steps["with"] < steps["without"] * (0.5 if solver == "CG" else 0.7), steps


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.itemsize)
        return out


@pytest.mark.filterwarnings("ignore:CG.. takes up to:UserWarning")
@pytest.mark.parametrize("curvature", [uw.GGN(), uw.Hessian()], ids=repr)
def test_a_large_model_takes_vectors_only(curvature):
    """p = 2e5: neither p × p nor n × p numbers are made on the way to P∇m."""
    g = torch.Generator().manual_seed(0)
    n = 600
    X, y = torch.randn(n, 300, generator=g, dtype=torch.float32), torch.arange(n) % 2
    model = nn.Sequential(nn.Linear(300, 512), nn.Tanh(), nn.Linear(512, 80), nn.Tanh())
    model.append(nn.Linear(80, 2)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(g, *parameter.shape) / parameter.shape[-1] ** 0.5)
    task = uw.Task(model, uw.CrossEntropy())
    p = task.layout.size
    assert p > 190_000
    solver = uw.solvers.CG(rtol=1e-3, preconditioner=uw.EKFAC())
    with Largest() as largest:
        fitted = uw.Influence(curvature, solver, damping=3.0).fit(task, (X, y))
        moved = fitted.parameter_influence(3)
    assert largest.numbers < n * p / 4
    v = -task.layout.flatten(moved)
    H = curvature.fit(task, fitted.train, fitted.theta)
    row = fitted.scorer.total([3])
    assert float((H.mv(v) + 3.0 * v - row).norm() / row.norm()) < 2e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_spec_outside_of_a_method_is_refused(solver):
    p = problem("softmax")
    H = uw.GGN().fit(p.task, uw.as_data(p.train), p.task.theta())
    with pytest.raises(SpecError) as caught:
        SOLVERS[solver](preconditioner=uw.EKFAC()).init(H)
    assert isinstance(caught.value, UpweightError) and "Influence(" in str(caught.value)


def test_no_jacobian_is_formed_for_a_damping_that_is_relative(monkeypatch):
    """Of a model with an output for every word at every position it would not fit into memory."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 30, (12, 6), generator=g)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Tanh(), nn.Linear(8, 30)).double()
    task = uw.Task(model, uw.CrossEntropy())
    train = (tokens[:, :-1], tokens[:, 1:])
    method = uw.Influence(uw.GGN(), uw.solvers.CG(preconditioner=uw.EKFAC()), uw.Relative(0.1))
    exact = method.fit(task, train)
    for module in ("task.data", "curvature.gauss_newton"):
        monkeypatch.setattr(f"upweight.{module}.WORKING_BYTES", 10_000)
    for formed in ("output_jacobians", "planned_jacobians"):
        monkeypatch.setattr(f"upweight.curvature.ggn.{formed}", None)  # fails where it is called
    p = task.layout.size
    monkeypatch.setattr("upweight.linalg.damping.EXACT", p - 1)
    found = method.fit(task, train)
    (note,) = [note for note in found.notes if "estimated as" in note]
    assert found.scorer.damping == pytest.approx(exact.scorer.damping, rel=0.2), note
    assert found.attribute(train).values.isfinite().all()
