"""Methods by layer, held to the laws that others are held to; exact where they promise it."""

from dataclasses import dataclass

import pytest
import torch

import upweight as uw
from tests.laws.subjects import assert_same
from upweight.testing import check_method
from upweight.testing.problems import closed_forms, first_output


@pytest.mark.parametrize("kind", [uw.KFAC, uw.EKFAC])
@pytest.mark.parametrize("name", ["location", "ridge"])
def test_scores_are_derivatives_where_the_curvature_is_the_hessian(name, kind):
    """One linear map, or a parameter by itself, with squared loss."""
    problem = next(p for p in closed_forms() if p.name == name)
    fitted = uw.Influence(kind(uw.labels.Expected()), tolerance=0).fit(problem.task, problem.train)
    found = fitted.attribute(problem.queries, first_output).values
    assert_same(found, problem.output_scores, 1e-10)


@dataclass(frozen=True)
class ByBatch(uw.labels.Sampled):
    """Labels with a seed for each batch, whatever its examples."""

    def heads(self, loss, outputs, targets, places, stream):
        ours = uw.labels.Sampled(self.samples, 1000 * int(places[0]) + self.seed)
        return ours.heads(loss, outputs, targets, torch.arange(len(places)), stream)


def test_the_suite_sees_labels_that_depend_on_batches():
    checks = dict(
        check_method(uw.Influence(uw.EKFAC(ByBatch()), damping=0.1, tolerance=0), rtol=1e-10)
    )
    with pytest.raises(AssertionError, match="batches matter"):
        checks["batches do not matter: ridge"]()


def test_sampled_labels_do_not_depend_on_batches():
    checks = dict(
        check_method(
            uw.Influence(uw.EKFAC(uw.labels.Sampled()), damping=0.1, tolerance=0), rtol=1e-10
        )
    )
    checks["batches do not matter: ridge"]()
