"""One curvature given to both floors: by layer, and as an operator on all of θ to a solver.

Influence(EKFAC(Expected()), tolerance=0)          block by block, in the eigenbases
Influence(EKFAC(Expected()), solver=Cholesky())    its operator written out and factorized
"""

import functools

import pytest
import torch

import upweight as uw
from tests.laws.subjects import assert_same, first_output
from tests.market import names, problem
from tests.reference import dense

CURVATURE, DAMPING = uw.EKFAC(uw.labels.Observed()), 0.1
NAMES = names(without=("float32",))
RTOL = 1e-10


@functools.cache
def floors(name):
    p = problem(name)
    layered = uw.Influence(CURVATURE, damping=DAMPING, tolerance=0).fit(p.task, p.train)
    return layered, uw.Influence(CURVATURE, uw.solvers.Cholesky(), damping=DAMPING).fit(
        p.task, p.train
    )


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_what_is_kept_of_them(name):
    p = problem(name)
    layered, whole = floors(name)
    for measure in (uw.Loss(), first_output):
        found, expected = (f.attribute(p.queries, measure) for f in (layered, whole))
        assert_same(found.values, expected.values, RTOL)
    k, labels = min(3, p.n), [i % 2 for i in range(p.n)]
    tops = [f.attribute(p.queries, into=uw.Top(k)) for f in (layered, whole)]
    assert_same(tops[0].raises_by, tops[1].raises_by, RTOL)
    sums = [f.attribute(p.queries, into=uw.GroupSums(labels)).values for f in (layered, whole)]
    assert_same(sums[0], sums[1], RTOL)
    parts = [f.attribute(p.queries, into=uw.PerLayer()) for f in (layered, whole)]
    assert set(parts[0]) == set(parts[1])
    scale = float(found.values.abs().max())
    for layer, scores in parts[0].items():
        other = parts[1][layer].values
        torch.testing.assert_close(scores.values, other, rtol=RTOL, atol=RTOL * max(scale, 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_other_verbs(name):
    p = problem(name)
    layered, whole = floors(name)
    flat = p.task.layout.flatten
    assert_same(layered.self_influence(), whole.self_influence(), RTOL)
    moved = [flat(f.parameter_influence(0)) for f in (layered, whole)]
    assert_same(moved[0], moved[1], RTOL)
    for key in ("gradient_norm", "decrement"):
        one, other = layered.stationarity[key], whole.stationarity[key]
        assert one == pytest.approx(other, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("name", ["tied", "padded_sequences", "attention"])
def test_positions(name):
    p = problem(name)
    layered, whole = floors(name)
    found, expected = (f.attribute(p.queries, into=uw.PerToken([1, 0])) for f in (layered, whole))
    assert_same(found.shares, expected.shares, RTOL)
    total = layered.attribute(p.queries).values[:, [1, 0]]
    assert_same(found.shares.sum(dim=2) + found.rest, total, RTOL)
    assert_same(expected.shares.sum(dim=2) + expected.rest, total, RTOL)


@pytest.mark.parametrize("name", ["ridge", "softmax", "mlp_tanh"])
def test_changed_inputs_and_labels(name):
    p = problem(name)
    layered, whole = floors(name)
    label = p.queries[1][0]
    found, expected = (f.relabel_influence(1, label, p.queries) for f in (layered, whole))
    assert_same(found, expected, RTOL)
    found, expected = (f.input_influence(1, p.queries) for f in (layered, whole))
    assert_same(found, expected, RTOL)


@pytest.mark.parametrize("name", NAMES)
def test_the_identity_is_the_gradients_written_out(name):
    p = problem(name)
    m, g = dense.measure_gradients(p.task, p.task.loss, p.queries), dense.gradients(p.task, p.train)
    fitted = uw.GradientDot().fit(p.task, p.train)
    assert_same(fitted.attribute(p.queries).values, -(m @ g.T) / p.n, RTOL)
    assert_same(fitted.self_influence(), -g.square().sum(dim=1) / p.n, RTOL)
