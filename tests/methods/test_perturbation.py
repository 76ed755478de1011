"""Another input or another label for a training example."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import assert_same, first_output
from tests.market import problem
from tests.reference import dense
from upweight.errors import DataError, DtypeError, ShapeError
from upweight.methods.perturbation import relabeled

EXACT = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())


def with_input(train, key, example, value):
    """Training data in which one example has another input."""
    parts = dict(train) if isinstance(train, dict) else list(train)
    parts[key] = parts[key].clone()
    parts[key][example] = value
    return parts if isinstance(train, dict) else tuple(parts)


@pytest.mark.parametrize(
    "name, key, example",
    [
        ("ridge", 0, 2),
        ("softmax", 0, 3),
        ("mlp_tanh", 0, 1),
        ("conv", 0, 0),
        ("two_inputs", 1, 4),
        ("dict_batch", "x", 2),
        ("weighted", 0, 5),
        ("last_layer", 0, 1),
    ],
)
def test_input_influence_is_the_derivative_of_the_score_in_the_input(name, key, example):
    """H and ∇m stay as fitted: only the example's own gradient moves with its input."""
    p = problem(name)
    fitted = EXACT.fit(p.task, p.train)
    found = fitted.input_influence(example, p.queries, first_output, input=key)
    x = p.train[key][example]
    assert found.shape == (len(p.queries["x"] if name == "dict_batch" else p.queries[0]), *x.shape)
    m = dense.measure_gradients(p.task, first_output, p.queries)
    vectors = torch.linalg.solve(dense.hessian(p.task, p.train), m.T).T

    def score(value):
        moved = with_input(p.train, key, example, value)
        return -(vectors @ dense.gradients(p.task, moved)[example]) / p.n

    h, flat = 1e-4, found.reshape(len(found), -1)
    for j in range(min(3, flat.shape[1])):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[j] = h
        step = step.reshape(x.shape)
        near = (score(x + step) - score(x - step)) / (2 * h)
        far = (score(x + 2 * step) - score(x - 2 * step)) / (4 * h)
        expected = (4 * near - far) / 3
        torch.testing.assert_close(
            flat[:, j], expected, rtol=1e-7, atol=1e-8 * float(flat.abs().max())
        )


@pytest.mark.parametrize(
    "name, label",
    [
        ("softmax", "another class"),
        ("mlp_tanh", "another class"),
        ("logistic", "another class"),
        ("ridge_two_outputs", [0.3, -0.2]),
        ("weighted", "another class"),
        ("dict_batch", "another class"),
        ("padded_sequences", [0, 1, 2, -100]),
    ],
)
def test_relabel_influence_is_the_difference_of_two_scores(name, label):
    p = problem(name)
    example = 3
    fitted = EXACT.fit(p.task, p.train)
    if label == "another class":
        old = p.train["labels"] if isinstance(p.train, dict) else p.train[-1]
        old = old[0] if name == "weighted" else old
        label = (int(old[example]) + 1) % 2
    found = fitted.relabel_influence(example, label, p.queries, first_output)
    # Beside the old label, the new one for every example: two columns of one example.
    if isinstance(p.train, dict):
        new = {**p.train, "labels": torch.full_like(p.train["labels"], label)}
    elif name == "weighted":
        y, v = p.train[-1]
        new = (p.train[0], (torch.full_like(y, label), v))
    else:
        y = p.train[-1]
        new = (*p.train[:-1], torch.as_tensor(label, dtype=y.dtype).expand_as(y))
    m = dense.measure_gradients(p.task, first_output, p.queries)
    vectors = torch.linalg.solve(dense.hessian(p.task, p.train), m.T).T
    change = dense.gradients(p.task, new)[example] - dense.gradients(p.task, p.train)[example]
    assert_same(found, -(vectors @ change) / p.n, 1e-9)
    assert bool((found != 0).any())


def test_the_same_label_changes_nothing():
    p = problem("softmax")
    fitted = EXACT.fit(p.task, p.train)
    found = fitted.relabel_influence(0, p.train[1][0], p.queries)
    assert bool((found == 0).all())


def test_relabeling_to_the_padding_is_a_removal():
    p = problem("padded_sequences")
    fitted = EXACT.fit(p.task, p.train)
    found = fitted.relabel_influence(0, [-100] * 4, p.queries)
    removed = fitted.attribute(p.queries).removal().values[:, 0]
    assert_same(found, removed, 1e-10)


@pytest.mark.parametrize(
    "name, label, error",
    [
        ("softmax", 3, DataError),
        ("softmax", -1, DataError),
        ("mlp_tanh", 7, DataError),
        ("logistic", 5.0, DataError),
        ("softmax", [0, 1], ShapeError),
        ("ridge_two_outputs", 0.3, ShapeError),
        ("softmax", 1.5, DtypeError),
    ],
)
def test_labels_that_do_not_fit_are_refused(name, label, error):
    p = problem(name)
    with pytest.raises(error):
        EXACT.fit(p.task, p.train).relabel_influence(0, label, p.queries)


def test_a_dict_without_a_key_for_targets():
    """A forward of the user's own may keep its targets under any name."""
    with pytest.raises(DataError, match="labels"):
        relabeled({"x": torch.zeros(1, 2), "answer": torch.zeros(1)}, 1)


def test_a_target_may_be_moved_like_an_input():
    """∂ℓ/∂θ = (f − y) x: moving y by d moves the gradient by −d x."""
    p = problem("ridge")
    found = EXACT.fit(p.task, p.train).input_influence(4, p.queries, uw.Logit(), input=1)
    H = dense.hessian(p.task, p.train)
    expected = p.queries[0] @ torch.linalg.solve(H, p.train[0][4]) / p.n
    assert_same(found[:, 0], expected, 1e-10)


@pytest.mark.parametrize("key", [2, -1, "x"])
def test_an_input_that_is_not_there(key):
    p = problem("ridge")
    with pytest.raises(ShapeError, match="part of the example"):
        EXACT.fit(p.task, p.train).input_influence(0, p.queries, input=key)


def test_an_input_that_has_no_derivative():
    p = problem("tied")
    with pytest.raises(DtypeError, match="token ids"):
        EXACT.fit(p.task, p.train).input_influence(0, p.queries)


def test_input_influence_does_not_depend_on_the_training_flag_of_inputs():
    """Data that require grad are read, and get no gradient."""
    p = problem("ridge")
    X = p.train[0].clone().requires_grad_(True)
    fitted = EXACT.fit(p.task, (X, p.train[1]))
    fitted.input_influence(0, p.queries)
    assert X.grad is None
    assert isinstance(p.task.model, nn.Module)
