"""Every method of the package, held to the laws that others are held to; and can they fail."""

from dataclasses import dataclass

import pytest
import torch

import upweight as uw
from tests.laws.subjects import spread
from upweight.errors import ModelChanged
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, BlockScorer
from upweight.testing import check_method
from upweight.testing.problems import closed_forms, first_output

DAMPED = {"damped": True, "rtol": 1e-10}
# Full batches, and so little of them that they end where they began.
STEPS = {
    "history": uw.Training(None, uw.SGD(1e-4), epochs=3, batch=1000),
    "problems": closed_forms()[:1],
}
METHODS = [
    (uw.Influence(), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.Hessian(), uw.solvers.Cholesky()), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.GGN(), uw.solvers.CG(rtol=1e-11)), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.GGN(), uw.solvers.BlockCG(rtol=1e-11)), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.Hessian(), uw.solvers.MINRES(rtol=1e-11)), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), 0.3), DAMPED),
    (uw.Influence(uw.EmpiricalFisher(), uw.solvers.Cholesky(), uw.Relative(0.1)), DAMPED),
    (uw.Influence(uw.Fisher(2, 1), uw.solvers.Cholesky(), 0.01), DAMPED | {"deterministic": False}),
    (uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=0.1, tolerance=0), DAMPED),
    (
        uw.Influence(
            uw.KFAC(uw.labels.Expected(), uw.curvature.Reduce()), damping=0.1, tolerance=0
        ),
        DAMPED,
    ),
    (
        uw.Influence(uw.EKFAC(uw.labels.Sampled(2, 1)), damping=0.1, tolerance=0),
        DAMPED | {"deterministic": False},
    ),
    (uw.Influence(uw.GGN(), uw.solvers.CG(rtol=1e-11, preconditioner=uw.EKFAC()), 0.1), DAMPED),
    (uw.Influence(uw.GGN(), uw.solvers.Nystrom(200), 0.1), DAMPED),
    (uw.Influence(uw.Hessian(), uw.solvers.Lanczos(200), 0.1), DAMPED),
    (uw.GradientDot(), {"rtol": 1e-10}),
    (uw.GradientCosine(), {"rtol": 1e-10}),
    (uw.TracIn(), {"rtol": 1e-10} | STEPS),
    (uw.SOURCE(2, uw.GGN(), 1), {"rtol": 1e-10} | STEPS),
    (uw.LoGra(rank=None, damping=0.1), DAMPED),
    (uw.LoGra(rank=1, damping=0.1), DAMPED),
    (uw.LoGra(rank=1, damping=0.1, basis=uw.KFAC(uw.labels.Expected())), DAMPED),
    (uw.TRAK(dim=None, damping=0.1), DAMPED),
    (uw.TRAK(dim=2, damping=0.1), DAMPED),
]
FORMS = [form.name for form in closed_forms()]


def cases():
    """The derivative is asked of all closed forms; every other law of one, each in its turn."""
    for turn, (method, promises) in enumerate(METHODS):
        checks = list(check_method(method, **promises))
        some = dict(spread(checks, FORMS, turn))
        for name, check in checks:
            if name in some or name.startswith("is the derivative"):
                yield pytest.param(check, id=f"{method!r}: {name}")


@pytest.mark.parametrize("check", list(cases()))
def test_contract(check):
    check()


@pytest.mark.parametrize("problem", closed_forms(), ids=lambda p: p.name)
def test_removals_of_the_closed_forms(problem):
    if problem.removals is not None:
        fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).fit(problem.task, problem.train)
        found = fitted.removal(problem.queries, first_output).values
        torch.testing.assert_close(found, problem.removals, rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Broken(Method):
    """Influence with one defect at a time, to see that the suite can fail."""

    defect: str
    unit = uw.Unit.DERIVATIVE

    def prepare(self, fitting):
        if self.defect == "writes":
            next(fitting.task.model.parameters()).data.add_(1e-3)
        if self.defect == "random":
            torch.rand(1)
        sound = uw.Influence(uw.Hessian(), uw.solvers.Cholesky()).prepare(fitting)
        n = len(fitting.data)

        def score(queries, measure, start, stop):
            (job,) = sound.jobs(Asked(queries, measure))
            return self.spoiled(job.block(0, n))[:, start:stop]

        return BlockScorer(score, diagonal=sound.self_influence)

    def spoiled(self, values):
        n = values.shape[1]
        if self.defect == "sign":
            return -values
        if self.defect == "n":
            return values * n
        if self.defect == "first example":
            values[:, 0] *= 2
        if self.defect == "normalized":
            return values / values.norm(dim=1, keepdim=True)
        if self.defect == "across queries":
            return values / values.norm()
        if self.defect == "offset":
            return values + 1e-6
        return values


@pytest.mark.parametrize(
    "defect, caught",
    [
        ("sign", "is the derivative: ridge"),
        ("sign", "is the derivative: logistic"),
        ("n", "is the derivative: location"),
        ("n", "duplicates halve the scores: ridge"),
        ("first example", "columns follow the examples: ridge"),
        ("first example", "symmetric on the training set: logistic"),
        ("first example", "rows sum to zero without a penalty"),
        ("normalized", "linear in the measurement: ridge"),
        ("normalized", "self-influence is the diagonal: ridge"),
        ("across queries", "rows follow the queries: ridge"),
        ("offset", "an example without a gradient has score zero"),
        ("writes", "the model comes back as it was lent"),
        ("random", "the model comes back as it was lent"),
    ],
)
def test_suite_catches(defect, caught):
    broken = Broken(defect)
    checks = dict(check_method(broken, exact=True))
    with pytest.raises((AssertionError, ModelChanged)):
        checks[caught]()


def test_a_sound_method_without_a_defect_passes():
    for _, check in check_method(Broken("none"), exact=True):
        check()
