"""Choosing for a target: the planted half is chosen and trained on, and nothing is claimed else."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import selection
from upweight.errors import DataError, SpecError
from upweight.evaluation.bootstrap import Bootstrap

FEW = Bootstrap(resamples=200)
NEWTON = uw.training.Newton(tol=1e-7)
pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")


def rows(n, seed, sign=1, noise=0.0):
    """y is the sign of the first coordinate, or its opposite, but for a share of noise."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    wrong = torch.rand(n, generator=draw) < noise
    return X, ((sign * X[:, 0] > 0) ^ wrong).long()


def fitted(train, recipe=NEWTON):
    model = nn.Linear(4, 2).double()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.01))
    theta = recipe.prepare(task, task.training(train)).center
    return uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task.moved_to(theta), train)


@pytest.fixture(scope="module")
def mixed():
    """80 rows of the target, and 120 that say the opposite."""
    parts = zip(rows(80, 0), rows(120, 1, sign=-1), strict=True)
    return tuple(torch.cat(pair) for pair in parts)


def test_the_planted_half_is_chosen_and_better_than_the_others(mixed, tmp_path):
    of = fitted(mixed)
    found = holds(selection.for_target(
        of, rows(40, 2), 0.2, test=rows(80, 3), recipe=NEWTON, bootstrap=FEW,
        against={"embedding": uw.FeatureSimilarity()},
    ))  # fmt: skip
    assert (found.rows < 80).double().mean() > 0.9
    assert found.is_confirmed and set(found.helps) == {"random", "embedding", "all data"}
    assert found.predicted < 0 and "no seed" in found.notes[0]
    # by the definition: θ of w = (n/m) 1[chosen], on the test data
    weights = torch.zeros(1, 200, dtype=torch.float64)
    weights[0, found.rows] = 200 / 40
    theta = NEWTON.prepare(of.task, of.train)(weights).theta[0]
    X, y = rows(80, 3)
    outputs = of.task.moved_to(theta).model(X)
    torch.testing.assert_close(
        found.losses["chosen"][0], nn.functional.cross_entropy(outputs, y, reduction="none")
    )
    index = uw.Index.build(of, None, tmp_path / "index", bits=32)
    again = selection.for_target(index, rows(40, 2), 0.2)
    assert again.rows.tolist() == found.rows.tolist() and not holds(again).is_confirmed


def test_where_nothing_can_be_learned_nothing_is_claimed():
    """A seed for each training; BM25 is left out with a note."""
    recipe = uw.Training(lambda: nn.Linear(4, 2).double(), uw.SGD(0.1), epochs=2, batch=50)
    train = rows(200, 4, noise=0.5)
    found = holds(selection.for_target(
        fitted(train), rows(40, 5, noise=0.5), 0.9, test=rows(80, 6, noise=0.5),
        recipe=recipe, seeds=2, bootstrap=FEW,
    ))  # fmt: skip
    assert found.losses["chosen"].shape == (2, 80)
    assert not found.is_confirmed and "is not shown to help" in found.verdict
    assert "BM25 is left out" in " ".join(found.notes)


def test_a_method_that_ranks_predicts_no_change_of_the_loss(mixed):
    of, guide = fitted(mixed), rows(40, 2)
    ranked = selection.for_target(uw.GradientDot().fit(of.task, of.train), guide, 0.3)
    assert ranked.predicted is None and selection.for_target(of, guide, 0.3).predicted < 0
    holds(ranked)


def test_what_cannot_be_meant_is_refused(mixed):
    of, guide = fitted(mixed), rows(40, 2)
    with pytest.raises(SpecError, match=r"share=0\.05"):
        selection.for_target(of, guide, 5)
    with pytest.raises(SpecError, match="recipe="):
        selection.for_target(of, guide, 0.3, test=rows(80, 3))
    with pytest.raises(DataError, match="three splits"):
        selection.for_target(of, guide, 0.3, test=guide, recipe=NEWTON)
