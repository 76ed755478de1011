"""Every method of the package, held to the laws that others are held to; and can they fail."""

from dataclasses import dataclass, replace

import pytest
import torch

import upweight as uw
from upweight.testing import check_method
from upweight.testing.problems import closed_forms, first_output

LOSS = uw.Loss()
DAMPED = {"damped": True, "rtol": 1e-10}
METHODS = [
    (uw.Influence(), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.Hessian(), uw.Cholesky()), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.GGN(), uw.CG(rtol=1e-11)), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.GGN(), uw.BlockCG(rtol=1e-11)), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.Hessian(), uw.MINRES(rtol=1e-11)), {"exact": True, "rtol": 1e-10}),
    (uw.Influence(uw.Hessian(), uw.Cholesky(), 0.3), DAMPED),
    (uw.Influence(uw.EmpiricalFisher(), uw.Cholesky(), uw.Relative(0.1)), DAMPED),
    (uw.Influence(uw.Fisher(2, 1), uw.Cholesky(), 0.01), DAMPED | {"deterministic": False}),
]
CASES = [
    pytest.param(check, id=f"{method!r}: {name}")
    for method, promises in METHODS
    for name, check in check_method(method, **promises)
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


@pytest.mark.parametrize("problem", closed_forms(), ids=lambda p: p.name)
def test_removals_of_the_closed_forms(problem):
    if problem.removals is not None:
        fitted = uw.Influence(uw.Hessian(), uw.Cholesky()).fit(problem.task, problem.train)
        found = fitted.removal(problem.queries, first_output).values
        torch.testing.assert_close(found, problem.removals, rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Broken:
    """Influence with one defect at a time, to see that the suite can fail."""

    defect: str
    unit = uw.Unit.DERIVATIVE

    def fit(self, task, train):
        if self.defect == "writes":
            next(task.model.parameters()).data.add_(1e-3)
        if self.defect == "random":
            torch.rand(1)
        return BrokenFit(self, uw.Influence(uw.Hessian(), uw.Cholesky()).fit(task, train))


@dataclass(frozen=True)
class BrokenFit:
    spec: Broken
    fitted: object

    def attribute(self, queries, measure=LOSS):
        scores = self.fitted.attribute(queries, measure)
        values, n = scores.values.clone(), scores.values.shape[1]
        defect = self.spec.defect
        if defect == "sign":
            values = -values
        if defect == "n":
            values = values * n
        if defect == "first example":
            values[:, 0] *= 2
        if defect == "normalized":
            values = values / values.norm(dim=1, keepdim=True)
        if defect == "across queries":
            values = values / values.norm()
        if defect == "offset":
            values = values + 1e-6
        provenance = replace(scores.provenance, method=repr(self.spec))
        unit = uw.Unit.RANK if defect == "unit" else scores.unit
        return replace(scores, values=values, provenance=provenance, unit=unit)

    def self_influence(self):
        return self.fitted.self_influence()


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
        ("unit", "scores have a unit, a shape and a source: ridge"),
        ("writes", "the model comes back as it was lent"),
        ("random", "the model comes back as it was lent"),
    ],
)
def test_suite_catches(defect, caught):
    broken = Broken(defect)
    checks = dict(check_method(broken, exact=True))
    with pytest.raises(AssertionError):
        checks[caught]()


def test_a_sound_method_without_a_defect_passes():
    for _, check in check_method(Broken("none"), exact=True):
        check()
