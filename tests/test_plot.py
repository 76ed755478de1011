"""Figures hold the numbers they are of."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.report.conftest import LAYERWISE, provenance
from upweight.errors import DataError, ShapeError
from upweight.scores import Scores, Unit


@pytest.fixture
def scores():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 30)))
    return Scores(values, Unit.DERIVATIVE, provenance())


def test_a_histogram_counts_every_score(scores):
    ax = scores.plot.histogram(query=2)
    assert sum(patch.get_height() for patch in ax.patches) == 30
    with pytest.raises(ShapeError, match="query=4"):
        scores.plot.histogram(query=4)


def test_predicted_stands_over_actual(scores):
    ax = scores.plot.agreement([1.0, 2.0], [1.5, 2.5])
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[1.5, 1.0], [2.5, 2.0]])
    with pytest.raises(ShapeError, match="1 predicted, 2 actual"):
        scores.plot.agreement([1.0], [1.0, 2.0])


def test_value_is_sorted_and_whole(scores):
    (line,) = scores.plot.value().lines
    expected = scores.values.abs().sum(dim=0).sort(descending=True).values
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_the_class_matrix_holds_means_over_pairs(scores):
    train, queries = torch.arange(30) % 3, ["b", "a", "b", "b"]
    ax = scores.plot.classes(train, queries)
    matrix = ax.images[0].get_array()
    own = scores.values[[0, 2, 3]][:, 1::3].mean()
    assert matrix[1, 1] == pytest.approx(float(own))
    with pytest.raises(ShapeError, match="4 and 30"):
        scores.plot.classes(train[:3], queries)


def test_a_spectrum_needs_blocks_and_draws_on_given_axes(scores):
    with pytest.raises(DataError, match="no blocks"):
        scores.plot.spectrum()
    layerwise = replace(scores, provenance=provenance(health=LAYERWISE))
    ax = scores.plot.value()
    assert layerwise.plot.spectrum(ax) is ax
    mean = np.asarray(ax.collections[0].get_offsets())
    assert mean[0].tolist() == [2e-3, 0]
    assert np.isnan(mean[1, 0])


def test_names_that_no_encoding_holds_are_drawn(tmp_path):
    cut = "cut \ud83d"
    values = torch.arange(8.0).reshape(2, 4)
    ax = Scores(values, Unit.DERIVATIVE, provenance()).plot.classes(
        [cut, "b", cut, "b"], [cut, "b"]
    )
    ax.figure.savefig(tmp_path / "classes.svg")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["b", "cut \ufffd"]
