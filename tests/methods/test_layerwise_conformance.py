"""Methods by layer, held to the laws that others are held to; exact where they promise it."""

from dataclasses import dataclass, replace

import pytest
import torch

import upweight as uw
from tests.laws.subjects import assert_same
from upweight.curvature.layerwise import LayerwiseCurvature
from upweight.testing import check_method
from upweight.testing.problems import closed_forms, first_output

LOSS = uw.Loss()
FACTOR = 0.1


@dataclass(frozen=True)
class Exactly:
    """Influence by layer without the approximation of products."""

    curvature: LayerwiseCurvature
    damping: float = FACTOR
    unit = uw.Unit.DERIVATIVE

    def fit(self, task, train):
        return Fitted(self, uw.Influence(self.curvature, damping=self.damping).fit(task, train))


@dataclass(frozen=True)
class Fitted:
    spec: Exactly
    fitted: object

    def attribute(self, queries, measure=LOSS):
        scores = self.fitted.attribute(queries, measure, tolerance=0)
        return replace(scores, provenance=replace(scores.provenance, method=repr(self.spec)))

    def self_influence(self):
        return self.fitted.self_influence()


METHODS = [
    (Exactly(uw.EKFAC(uw.Observed())), {}),
    (Exactly(uw.KFAC(uw.Expected(), uw.Reduce())), {}),
    (Exactly(uw.EKFAC(uw.Sampled(2, 1))), {"deterministic": False}),
]
CASES = [
    pytest.param(check, id=f"{method.curvature!r}: {name}")
    for method, promises in METHODS
    for name, check in check_method(method, damped=True, rtol=1e-10, **promises)
]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    check()


@pytest.mark.parametrize("kind", [uw.KFAC, uw.EKFAC])
@pytest.mark.parametrize("name", ["location", "ridge"])
def test_scores_are_derivatives_where_the_curvature_is_the_hessian(name, kind):
    """One linear map, or a parameter by itself, with squared loss."""
    problem = next(p for p in closed_forms() if p.name == name)
    fitted = Exactly(kind(uw.Expected()), 0.0).fit(problem.task, problem.train)
    found = fitted.attribute(problem.queries, first_output).values
    assert_same(found, problem.output_scores, 1e-10)


@dataclass(frozen=True)
class ByBatch(uw.Sampled):
    """Labels with a seed for each batch, whatever its examples."""

    def heads(self, loss, outputs, targets, places, stream):
        ours = uw.Sampled(self.samples, 1000 * int(places[0]) + self.seed)
        return ours.heads(loss, outputs, targets, torch.arange(len(places)), stream)


def test_the_suite_sees_labels_that_depend_on_batches():
    checks = dict(check_method(Exactly(uw.EKFAC(ByBatch())), rtol=1e-10))
    with pytest.raises(AssertionError, match="batches matter"):
        checks["batches do not matter: ridge"]()


def test_sampled_labels_do_not_depend_on_batches():
    checks = dict(check_method(Exactly(uw.EKFAC(uw.Sampled())), rtol=1e-10))
    checks["batches do not matter: ridge"]()
