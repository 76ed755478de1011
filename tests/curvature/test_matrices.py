"""Every curvature on the whole market: against loops over autograd, and against itself."""

import functools

import pytest
import torch

import upweight as uw
from tests.market import BUILDERS, draw, names, problem
from tests.reference import dense
from upweight.curvature.empirical_fisher import EmpiricalFisher
from upweight.linalg import Tag
from upweight.task.data import as_data
from upweight.testing import check_operator

REFERENCES = {
    "Hessian": (uw.Hessian(), dense.hessian),
    "GGN": (uw.GGN(), dense.ggn),
    "EmpiricalFisher": (uw.EmpiricalFisher(), dense.empirical_fisher),
}
SAMPLED = uw.Fisher(samples=2, seed=3)
CONVEX = {True: frozenset({Tag.SYMMETRIC, Tag.PSD}), False: frozenset({Tag.SYMMETRIC})}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("curvature", REFERENCES)
def test_equals_the_reference(curvature, name):
    p = problem(name)
    spec, reference = REFERENCES[curvature]
    A, expected = spec.fit(p.task, as_data(p.train), p.task.theta()), reference(p.task, p.train)
    torch.testing.assert_close(A.dense(), expected, **p.tolerance)
    torch.testing.assert_close(A.diagonal(), expected.diagonal(), **p.tolerance)
    torch.testing.assert_close(A.trace(), expected.trace(), **p.tolerance)
    v = draw(torch.Generator().manual_seed(0), 2, 3, len(expected)).to(expected.dtype)
    torch.testing.assert_close(A.mv(v), v @ expected, **p.tolerance)


OPERATOR_CHECKS = [
    pytest.param(name, spec, number, id=f"{spec!r}, {name}: {what}")
    for name in ["softmax", "mlp_tanh", "padded_sequences", "softmax_float32"]
    for spec in [uw.Hessian(), uw.GGN(), uw.EmpiricalFisher(), SAMPLED]
    for number, what in enumerate(
        ["is linear", "acts on the last axis", "accepts an empty batch", "agrees with its matrix",
         "adds itself to a matrix", "has its transpose", "leaves its input alone",
         "answers twice the same", "refuses another length", "refuses another dtype",
         "has its diagonal and trace", "has true tags"]
    )
]  # fmt: skip


@functools.cache
def operator_checks(name, spec):
    p = problem(name)
    return list(check_operator(spec.fit(p.task, as_data(p.train), p.task.theta())))


@pytest.mark.parametrize("name, spec, number", OPERATOR_CHECKS)
def test_is_an_operator(name, spec, number):
    checks = operator_checks(name, spec)
    assert len(checks) == 12
    checks[number][1]()


@pytest.mark.parametrize("name", names(without=("float32",)))
def test_tags_say_what_is_known(name):
    """A sum with a penalty whose sign is unknown is only symmetric."""
    p = problem(name)
    own = name in {"custom_penalty"}
    ggn = uw.GGN().fit(p.task, as_data(p.train), p.task.theta())
    assert ggn.is_symmetric
    assert ggn.is_psd == (p.task.loss.convex and not own)
    hessian = uw.Hessian().fit(p.task, as_data(p.train), p.task.theta())
    assert hessian.is_symmetric
    assert hessian.is_psd == (name in names("linear") and p.task.loss.convex and not own)
    assert EmpiricalFisher().fit(p.task, as_data(p.train), p.task.theta()).is_psd == (not own)


@pytest.mark.parametrize("spec", [uw.Hessian(), uw.GGN(), uw.EmpiricalFisher()], ids=repr)
@pytest.mark.parametrize("name", ["softmax", "mlp_gelu"])
def test_a_part_of_the_data_may_keep_the_n_of_all(spec, name):
    """(1/n) Σ over the kept: what group removal asks for. The penalty is not scaled."""
    p = problem(name)
    kept = list(range(2, p.n))
    part = spec.fit(p.task, as_data(p.train).subset(kept), p.task.theta(), n=p.n).dense()
    R = dense.penalty_hessian(p.task)
    whole = spec.fit(p.task, as_data(p.train).subset(kept), p.task.theta()).dense()
    torch.testing.assert_close(part, (whole - R) * len(kept) / p.n + R, rtol=1e-10, atol=1e-10)


def test_nothing_is_summed_twice_where_batches_are_uneven(monkeypatch):
    """n is not divisible by the batch: 13 = 4 + 4 + 4 + 1."""
    p = problem("mlp_gelu")
    expected = dense.hessian(p.task, p.train)
    monkeypatch.setattr("upweight.curvature.hessian.product_batch", lambda _: 4)
    A = uw.Hessian().fit(p.task, as_data(p.train), p.task.theta())
    mean, _penalty = A.terms
    assert [len(term.batch[0]) for term in mean.terms] == [4, 4, 4, 1]
    torch.testing.assert_close(A.dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 5])
def test_jacobians_come_some_examples_at_a_time(at_once, monkeypatch):
    p = problem("mlp_gelu")
    for spec, module in ((uw.GGN(), "ggn"), (uw.EmpiricalFisher(), "empirical_fisher")):
        whole = spec.fit(p.task, as_data(p.train), p.task.theta())
        expected, diagonal = whole.dense(), whole.diagonal()
        with monkeypatch.context() as patch:
            patch.setattr(f"upweight.curvature.{module}.batch_size", lambda *_: at_once)
            A = spec.fit(p.task, as_data(p.train), p.task.theta())
            torch.testing.assert_close(A.dense(), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(A.diagonal(), diagonal, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", [uw.Hessian(), uw.GGN(), uw.EmpiricalFisher()], ids=repr)
def test_products_are_the_same_one_by_one_and_together(spec, monkeypatch):
    p = problem("mlp_gelu")
    A = spec.fit(p.task, as_data(p.train), p.task.theta())
    v = torch.randn(3, p.task.layout.size, dtype=torch.float64)
    together = A.mv(v)
    monkeypatch.setattr("upweight.gradients.autograd.LARGE_BYTES", 0)
    for products in (A.mv(v), torch.stack([A.mv(row) for row in v])):
        torch.testing.assert_close(products, together, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together, v @ A.dense(), rtol=1e-10, atol=1e-12)


def test_a_wide_linear_model_is_summed_by_panels(monkeypatch):
    """The Gram matrices of a linear model are multiplied by panels of columns: all of them."""
    monkeypatch.setattr("upweight.curvature.linear.PANEL", 2)
    for name in ("softmax", "ridge_two_outputs", "last_layer", "bias_only"):
        p = problem(name)
        A = uw.Hessian().fit(p.task, as_data(p.train), p.task.theta())
        torch.testing.assert_close(
            A.dense(), dense.hessian(p.task, p.train), rtol=1e-10, atol=1e-10
        )


def test_float32_sums_are_as_good_as_float64_allows():
    """A solver that factorizes in float64 asks for the matrix in float64."""
    p = problem("softmax_float32")
    A = uw.Hessian().fit(p.task, as_data(p.train), p.task.theta())
    out = torch.zeros(A.shape, dtype=torch.float64)
    A.add_to(out)
    torch.testing.assert_close(out.float(), A.dense(), rtol=1e-5, atol=1e-6)
