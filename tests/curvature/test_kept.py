"""Gradients kept from the first pass: the same curvature, for fewer forward passes."""

import pytest
import torch

import upweight as uw
from tests.market import problem
from upweight.curvature import estimators
from upweight.curvature.labels import Expected
from upweight.task.data import as_data

NAMES = ("mlp_tanh", "conv", "tied", "layer_norm", "padded_sequences", "mlp_float32")
LARGE, SMALL = uw.Absolute(1e3), uw.Absolute(1e-12)


@pytest.fixture
def fitted(monkeypatch):
    """Fit in batches of four within a budget; the blocks, and how many forward passes it took."""
    monkeypatch.setattr("upweight.curvature.layerwise.MOST_EXAMPLES", 4)
    monkeypatch.setattr(estimators, "has_fast_bfloat16", lambda _: True)
    monkeypatch.setattr(estimators, "TRIAL", 4)
    monkeypatch.setattr("upweight.curvature.kept.TRIAL", 4)

    def fit(name, budget, damping=None, curvature=None):
        monkeypatch.setattr("upweight.curvature.layerwise.kept_bytes", lambda *_: budget)
        p, seen = problem(name), []
        hook = p.task.model.register_forward_hook(lambda *_: seen.append(1))
        curvature = uw.EKFAC() if curvature is None else curvature
        blocks = curvature.fit_blocks(
            p.task, as_data(p.train), p.task.theta(), damping=damping
        ).blocks
        hook.remove()
        return blocks, len(seen)

    return fit


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        for p, q in zip(a.eigen.bases, b.eigen.bases, strict=True):
            assert (p is None and q is None) or torch.equal(p, q)


def batches(name):
    return -(-problem(name).n // 4)


@pytest.mark.parametrize("curvature", [uw.EKFAC(), uw.EKFAC(labels=Expected())], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_what_would_be_computed(name, curvature, fitted):
    expected, twice = fitted(name, 0, curvature=curvature)
    found, once = fitted(name, 2**30, curvature=curvature)
    assert_equal(found, expected)
    assert twice - once >= batches(name)


def held(name):
    """Bytes of all gradients."""
    sizes = []

    class Watched(uw.curvature.kept.Kept):
        def add(self, start, factors):
            super().add(start, factors)
            sizes.append(self._bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upweight.curvature.layerwise.Kept", Watched)
        patch.setattr("upweight.curvature.layerwise.MOST_EXAMPLES", 4)
        patch.setattr("upweight.curvature.layerwise.kept_bytes", lambda *_: 2**30)
        p = problem(name)
        uw.EKFAC().fit_blocks(p.task, as_data(p.train), p.task.theta())
    return sizes[-1]


def test_where_only_half_fits_it_is_rounded_if_rounding_does_no_harm(fitted):
    name = "mlp_float32"
    budget = int(0.8 * held(name))
    expected, twice = fitted(name, 0, LARGE)
    found, once = fitted(name, budget, LARGE)
    assert_equal(found, expected)
    assert twice - once == batches(name)


def test_where_rounding_does_harm_gradients_are_taken_again(fitted):
    name = "mlp_float32"
    budget = int(0.8 * held(name))
    expected, twice = fitted(name, 0, SMALL)
    found, again = fitted(name, budget, SMALL)
    assert_equal(found, expected)
    assert twice - again == 1, "the first batch is kept as it is, for the trial"


@pytest.mark.parametrize("damping", [None, LARGE])
def test_what_does_not_fit_is_not_kept(damping, fitted):
    name = "mlp_float32"
    expected, twice = fitted(name, 0, damping)
    found, again = fitted(name, int(0.3 * held(name)), damping)
    assert_equal(found, expected)
    assert again == twice


def test_slices_of_the_data_count_for_nothing(fitted):
    name = "mlp_float32"
    _, twice = fitted(name, 0)
    _, once = fitted(name, held(name))
    assert twice - once == batches(name)
