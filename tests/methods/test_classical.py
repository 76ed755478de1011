"""Classical diagnostics against leaving rows out one by one, and what they refuse."""

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch.testing import assert_close

from upweight.errors import NonFinite, NotPositiveDefinite, NotStationary, ShapeError
from upweight.methods.classical import Poisson, glm_diagnostics, linear_diagnostics


def diabetes(n=60):
    X, y = load_diabetes(return_X_y=True)
    X = torch.tensor(X[:n, :4] * 10)
    return torch.cat([torch.ones(n, 1, dtype=X.dtype), X], dim=1), torch.tensor(y[:n]) / 100


def least_squares(X, y, v):
    return torch.linalg.solve(X.T @ (v[:, None] * X), X.T @ (v * y))


@pytest.mark.parametrize("weighted", [False, True])
def test_removals_are_exact_for_least_squares(weighted):
    X, y = diabetes()
    v = torch.linspace(0.5, 2, len(y), dtype=X.dtype) if weighted else torch.ones_like(y)
    ours = linear_diagnostics(X, y, v)
    beta = least_squares(X, y, v)
    assert_close(ours.beta, beta, rtol=1e-10, atol=1e-12)
    for i in range(0, len(y), 7):
        kept = torch.arange(len(y)) != i
        without = least_squares(X[kept], y[kept], v[kept])
        assert_close(ours.dfbeta[i], beta - without, rtol=1e-9, atol=1e-12)
        assert_close(ours.loo_residuals[i], y[i] - X[i] @ without, rtol=1e-9, atol=1e-12)
        rest = v[kept] * (y[kept] - X[kept] @ without) ** 2
        scale = rest.sum() / (len(y) - 1 - X.shape[1])
        t = (v[i].sqrt() * ours.residuals[i]) / (scale * (1 - ours.leverage[i])).sqrt()
        assert_close(ours.studentized_external[i], t, rtol=1e-9, atol=1e-12)
        full = torch.linalg.inv(X.T @ (v[:, None] * X)) * ours.scale
        left = torch.linalg.inv(X[kept].T @ (v[kept, None] * X[kept])) * scale
        assert_close(ours.covariance_ratio[i], left.det() / full.det(), rtol=1e-8, atol=1e-12)


def test_leverages_sum_to_p_and_cooks_distance_is_a_shift_of_the_fit():
    X, y = diabetes()
    ours = linear_diagnostics(X, y)
    assert_close(ours.leverage.sum(), torch.tensor(5.0, dtype=X.dtype))
    shift = (X @ ours.dfbeta.T).square().sum(dim=0) / (5 * ours.scale)
    assert_close(ours.cooks_distance, shift, rtol=1e-9, atol=1e-12)


def test_names_head_the_table():
    X, y = diabetes()
    table = linear_diagnostics(X, y, names=["one", "age", "sex", "bmi", "bp"]).to_pandas()
    assert len(table) == 60 and {"leverage", "cooks_distance", "dfbetas_bmi"} <= set(table.columns)
    assert "covariance" not in table.columns


@pytest.mark.parametrize(
    "spoil, error, said",
    [
        (lambda X, y: (torch.cat([X, X[:, :1]], 1), y), NotPositiveDefinite, "column 5 depends"),
        (lambda X, y: (X[:3], y[:3]), NotPositiveDefinite, "3 rows, 5 columns"),
        (lambda X, y: (X * torch.tensor([1.0, 1, 1, 1, 0]), y), NotPositiveDefinite, "zero"),
        (lambda X, y: (X, y[:, None]), ShapeError, r"y \(60, 1\)"),
        (lambda X, y: (X, y.where(y != y[3], torch.nan)), NonFinite, "y is not"),
        (
            lambda X, y: (torch.cat([X, (torch.arange(60) == 7).double()[:, None]], 1), y),
            NonFinite,
            r"leverage 1 for rows \[7\]",
        ),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(spoil, error, said):
    with pytest.raises(error, match=said):
        linear_diagnostics(*spoil(*diabetes()))


def test_coefficients_that_are_no_maximum_are_refused():
    X, y = diabetes()
    with pytest.raises(NotStationary, match="standard errors"):
        glm_diagnostics(X, y.round(), torch.zeros(5), Poisson())
