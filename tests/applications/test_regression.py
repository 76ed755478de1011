"""Classical diagnostics against leaving rows out one by one, and what they refuse."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch.testing import assert_close

from upweight.applications.regression import (
    glm_diagnostics,
    linear_diagnostics,
    ridge_loo_residuals,
)
from upweight.errors import (
    DataError,
    DtypeError,
    NonFinite,
    NotPositiveDefinite,
    NotStationary,
    ShapeError,
    SpecError,
)
from upweight.task.losses import Bernoulli, Poisson, SmoothHinge, SquaredError

FAMILIES = {
    SquaredError: (lambda eta: eta, torch.ones_like),
    Bernoulli: (torch.sigmoid, lambda eta: torch.sigmoid(eta) * torch.sigmoid(-eta)),
    Poisson: (torch.exp, torch.exp),
}
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def diabetes(n=60):
    X, y = load_diabetes(return_X_y=True)
    X = torch.tensor(X[:n, :4] * 10)
    return torch.cat([torch.ones(n, 1, dtype=X.dtype), X], dim=1), torch.tensor(y[:n]) / 100


def weights(y, weighted):
    return torch.linspace(0.5, 2, len(y), dtype=y.dtype) if weighted else torch.ones_like(y)


def least_squares(X, y, v):
    return torch.linalg.solve(X.T @ (v[:, None] * X), X.T @ (v * y))


def maximum_likelihood(X, y, v, loss):
    """Newton's method, on nothing but the definitions of the families."""
    mean, variance = FAMILIES[type(loss)]
    beta = torch.zeros(X.shape[1], dtype=X.dtype)
    for _ in range(50):
        eta = X @ beta
        gradient = X.T @ (v * (y - mean(eta)))
        hessian = X.T @ ((v * variance(eta))[:, None] * X)
        beta = beta + torch.linalg.solve(hessian, gradient)
    return beta


def responses(loss):
    """Diabetes progression as a proportion, a count, or itself."""
    X, y = diabetes()
    if isinstance(loss, Bernoulli):
        return X, (y > 1.3).double()
    return (X, (y * 3).round()) if isinstance(loss, Poisson) else (X, y)


def without(i, *arrays):
    kept = torch.arange(len(arrays[0])) != i
    return [array[kept] for array in arrays]


@pytest.mark.parametrize("weighted", [False, True])
def test_removals_are_exact_for_least_squares(weighted):
    X, y = diabetes()
    v = weights(y, weighted)
    ours = linear_diagnostics(X, y, v)
    beta = least_squares(X, y, v)
    assert_close(ours.beta, beta, rtol=1e-10, atol=1e-12)
    full = torch.linalg.inv(X.T @ (v[:, None] * X)) * ours.scale
    assert_close(ours.covariance, full, **TIGHT)
    for i in range(0, len(y), 7):
        Xi, yi, vi = without(i, X, y, v)
        left_out = least_squares(Xi, yi, vi)
        assert_close(ours.dfbeta[i], beta - left_out, **TIGHT)
        assert_close(ours.loo_residuals[i], y[i] - X[i] @ left_out, **TIGHT)
        scale = (vi * (yi - Xi @ left_out) ** 2).sum() / (len(yi) - X.shape[1])
        t = (v[i].sqrt() * ours.residuals[i]) / (scale * (1 - ours.leverage[i])).sqrt()
        assert_close(ours.studentized_external[i], t, **TIGHT)
        own = (X[i] @ full @ X[i] / ours.scale).sqrt()
        assert_close(ours.dffits[i], X[i] @ (beta - left_out) / (scale.sqrt() * own), **TIGHT)
        internal = X[i] @ (beta - left_out) / (ours.scale**0.5 * own)
        assert_close(ours.dffits_internal[i], internal, **TIGHT)
        errors = (scale * full.diagonal() / ours.scale).sqrt()
        assert_close(ours.dfbetas[i], (beta - left_out) / errors, **TIGHT)
        left = torch.linalg.inv(Xi.T @ (vi[:, None] * Xi)) * scale
        assert_close(ours.covariance_ratio[i], left.det() / full.det(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss", [Bernoulli(), Poisson()])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_step_removals_are_close_and_closer_than_the_first_order(loss, weighted):
    X, y = responses(loss)
    v = weights(y, weighted)
    beta = maximum_likelihood(X, y, v, loss)
    ours = glm_diagnostics(X, y, beta, loss, v)
    actual = torch.stack(
        [beta - maximum_likelihood(*without(i, X, y, v), loss) for i in range(len(y))]
    )

    def error(predicted):
        return (predicted - actual).norm() / actual.norm()

    # Observed: 1 to 6 %; the first order, which is the same without 1/(1 − h), has 11 to 17 %.
    assert error(ours.dfbeta) < 0.08
    assert error(ours.dfbeta) < 0.4 * error(ours.influence_curve / len(y))


@pytest.mark.parametrize("loss", [SquaredError(), Bernoulli(), Poisson()])
def test_the_influence_curve_is_the_derivative_in_a_weight(loss):
    X, y = responses(loss)
    v = weights(y, True)
    ours = glm_diagnostics(X, y, maximum_likelihood(X, y, v, loss), loss, v)
    for i in (0, 17):
        step = torch.zeros_like(v)
        step[i] = 1e-4 * v[i]
        up, down = (maximum_likelihood(X, y, v + s * step, loss) for s in (1, -1))
        # Central differences: an error of 1e-8 relative, 1e-4 were they one-sided.
        slope = (up - down) / 2e-4
        assert_close(ours.influence_curve[i] / len(y), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", [SquaredError(), Bernoulli(), Poisson()])
def test_laws_of_leverage_influence_and_the_jackknife(loss):
    X, y = responses(loss)
    v = weights(y, True)
    beta = maximum_likelihood(X, y, v, loss)
    ours = glm_diagnostics(X, y, beta, loss, v)
    assert_close(ours.leverage.sum(), torch.tensor(5.0, dtype=X.dtype), **TIGHT)
    # Upweighting everything equally changes nothing.
    size = ours.influence_curve.abs().sum(dim=0)
    assert_close(ours.influence_curve.sum(dim=0) / size, torch.zeros_like(beta), atol=1e-10, rtol=0)
    shift = torch.einsum("ni,ij,nj->n", ours.dfbeta, torch.linalg.inv(ours.covariance), ours.dfbeta)
    assert_close(ours.cooks_distance, shift / 5, rtol=1e-8, atol=1e-12)
    outer = ours.influence_curve.T @ ours.influence_curve / len(y) ** 2
    assert_close(ours.covariance_jackknife, outer, **TIGHT)
    # The same rows twice, each with half of its weight, are the same fit.
    twice = glm_diagnostics(
        torch.cat([X, X]), torch.cat([y, y]), beta, loss, torch.cat([v, v]) / 2, scale=ours.scale
    )
    assert_close(twice.leverage[: len(y)], ours.leverage / 2, **TIGHT)
    assert_close(twice.covariance, ours.covariance, **TIGHT)
    assert_close(twice.covariance_jackknife, ours.covariance_jackknife / 2, **TIGHT)


def test_a_known_scale_is_not_estimated():
    X, y = diabetes()
    free = linear_diagnostics(X, y)
    fixed = glm_diagnostics(X, y, free.beta, SquaredError(), scale=4 * free.scale)
    assert_close(fixed.studentized, free.studentized / 2)
    assert_close(fixed.cooks_distance, free.cooks_distance / 4)
    assert fixed.studentized_external is None
    assert fixed.covariance_ratio is None
    assert_close(fixed.dffits, fixed.dffits_internal)


def test_a_row_of_weight_zero_pulls_at_nothing():
    X, y = diabetes()
    v = torch.ones_like(y)
    v[9] = 0
    ours = linear_diagnostics(X, y, v)
    zero = torch.zeros(5, dtype=X.dtype)
    assert_close(ours.dfbeta[9], zero)
    assert float(ours.leverage[9]) == 0
    assert_close(ours.beta, least_squares(*without(9, X, y), torch.ones(59, dtype=X.dtype)))
    assert_close(ours.loo_residuals[9], y[9] - X[9] @ ours.beta)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_probabilities_that_round_to_one_keep_their_digits(sign):
    # 1 − μ of a row at η = 50 is 2e-22. Taken as a difference it is 0, and r = 0/√0 is NaN.
    X, y = responses(Bernoulli())
    far = sign * 50 * X[0] / (X[0] @ maximum_likelihood(X, y, torch.ones_like(y), Bernoulli()))
    X, y = torch.cat([X, far[None]]), torch.cat([y, torch.tensor([float(sign > 0)])])
    beta = maximum_likelihood(X, y, torch.ones_like(y), Bernoulli())
    ours = glm_diagnostics(X, y, beta, Bernoulli())
    eta = X[-1] @ beta
    assert 45 < sign * float(eta) < 55
    assert_close(ours.pearson[-1], sign * (-eta.abs() / 2).exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", [0.3, [0.0, 1.0, 0.0, 5.0, 2.0]])
def test_ridge_residuals_are_those_of_leaving_rows_out(weighted, penalty):
    X, y = diabetes()
    v = weights(y, weighted)
    ours = ridge_loo_residuals(X, y, penalty, v)
    P = (torch.tensor(penalty) * torch.ones(5)).double().diag()
    for i in range(0, len(y), 7):
        Xi, yi, vi = without(i, X, y, v)
        beta = torch.linalg.solve(Xi.T @ (vi[:, None] * Xi) + P, Xi.T @ (vi * yi))
        assert_close(ours[i], y[i] - X[i] @ beta, **TIGHT)


def test_ridge_residuals_are_those_of_refitted_scikit_learn():
    X, y = diabetes()
    ours = ridge_loo_residuals(X, y, [0.0, 2.0, 2.0, 2.0, 2.0])
    for i in (0, 31):
        Xi, yi = without(i, X[:, 1:], y)
        there = Ridge(alpha=2.0).fit(Xi.numpy(), yi.numpy()).predict(X[i : i + 1, 1:].numpy())
        assert_close(ours[i], y[i] - float(there[0]), rtol=1e-9, atol=1e-12)


def test_without_a_penalty_ridge_is_least_squares():
    X, y = diabetes()
    assert_close(ridge_loo_residuals(X, y, 0.0), linear_diagnostics(X, y).loo_residuals, **TIGHT)


def test_names_head_the_table():
    X, y = diabetes()
    table = linear_diagnostics(X, y, names=["one", "age", "sex", "bmi", "bp"]).to_pandas()
    assert len(table) == 60
    assert {"leverage", "cooks_distance", "dffits_internal", "dfbetas_bmi"} <= set(table.columns)
    assert not {"beta", "covariance"} & set(table.columns)


def test_labels_of_rows_index_the_table():
    X, y = diabetes()
    free = linear_diagnostics(X, y)
    assert free.to_pandas().index.tolist() == list(range(60))
    labels = [("ward", i) for i in range(60)]
    named = glm_diagnostics(X, y, free.beta, SquaredError(), rows=labels)
    table = named.to_pandas()
    assert table.index.tolist() == labels
    assert table.index.nlevels == 1
    assert float(table["leverage"].iloc[7]) == float(named.leverage[7])


def test_frames_arrays_and_tensors_give_the_same_and_stay_as_they_are():
    X, y = diabetes()
    before = X.clone()
    expected = linear_diagnostics(X, y).dfbetas
    locked = X.numpy().copy()
    locked.setflags(write=False)
    frame = pd.DataFrame(X.numpy())
    for design in (locked, frame, X.clone().requires_grad_(), X.tolist()):
        ours = linear_diagnostics(design, pd.Series(y.numpy()))
        assert_close(ours.dfbetas, expected, rtol=0, atol=0)
        assert len(ours.to_pandas()) == 60
    assert_close(X, before, rtol=0, atol=0)


def at(values, rows, value):
    changed = values.clone()
    changed[rows] = value
    return changed


COLUMN = torch.arange(60)[:, None]

BAD_FITS = {
    "a column twice": (
        lambda X, y: (torch.cat([X, X[:, :1]], 1), y), NotPositiveDefinite, "column 5 depends"),
    "few rows": (lambda X, y: (X[:3], y[:3]), NotPositiveDefinite, "3 rows, 5 columns"),
    "zero column": (
        lambda X, y: (X * torch.tensor([1.0, 1, 1, 1, 0]), y), NotPositiveDefinite, "zero"),
    "y as a column": (lambda X, y: (X, y[:, None]), ShapeError, r"y \(60, 1\)"),
    "no rows": (lambda X, y: (X[:0], y[:0]), ShapeError, r"X \(0, 5\)"),
    "complex": (lambda X, y: (X, y * 1j), DtypeError, "y of type Tensor: its entries are complex"),
    "complex array": (
        lambda X, y: (X.numpy() * 1j, y), DtypeError, "X of type ndarray: its entries are complex"),
    "text": (lambda X, y: (X, ["high"] * 60), DtypeError, "y of type list"),
    "NaN in y": (lambda X, y: (X, at(y, [3, 7], torch.nan)), NonFinite, r"nan at rows \[3, 7\]"),
    "infinite X": (lambda X, y: (at(X, 11, torch.inf), y), NonFinite, r"inf at rows \[11\]"),
    "negative weight": (
        lambda X, y: (X, y, at(torch.ones(60), 5, -1.0)), NonFinite, r"-1.0 at rows \[5\]"),
    "leverage 1": (
        lambda X, y: (torch.cat([X, (COLUMN == 7).double()], 1), y),
        NonFinite, r"leverage 1 for rows \[7\]"),
    "perfect": (lambda X, y: (X, X @ torch.arange(5.0)), DataError, "zero to rounding"),
    "constant": (lambda X, y: (X, torch.zeros(60)), DataError, "zero to rounding"),
    "perfect but for one": (
        lambda X, y: (X, at(X @ torch.arange(5.0), 4, 9.0)), NonFinite, r"without row \[4\]"),
    "no freedom": (lambda X, y: (X[:6], y[:6]), DataError, "n = 6 rows and p = 5"),
    "names": (lambda X, y: (X, y, None, ["a"]), ShapeError, "1 names for 5 columns"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, error, said", BAD_FITS.values(), ids=BAD_FITS)
def test_what_cannot_be_diagnosed_is_refused(spoil, error, said):
    with pytest.raises(error, match=said) as caught:
        linear_diagnostics(*spoil(*diabetes()))
    assert str(caught.value).count("\n  ") == 3


BAD_GLMS = {
    "no maximum": (
        lambda X, y: (X, y.round(), torch.zeros(5), Poisson()), NotStationary, "standard errors"),
    "negative count": (
        lambda X, y: (X, at(y, 2, -1.0), torch.zeros(5), Poisson()),
        DataError, r"-1.0 at rows \[2\]"),
    "counts, not proportions": (
        lambda X, y: (X, at(y / 10, 6, 3.0), torch.zeros(5), Bernoulli()),
        DataError, r"y = 3.0 at rows \[6\]"),
    "exploded": (
        lambda X, y: (X, y, torch.tensor([800.0, 0, 0, 0, 0]), Poisson()), NonFinite, "η = 800"),
    "NaN in beta": (
        lambda X, y: (X, y, torch.full((5,), torch.nan), SquaredError()),
        NonFinite, "beta has nan"),
    "beta of another model": (
        lambda X, y: (X, y, torch.zeros(4), SquaredError()), ShapeError, r"beta \(4,\)"),
    "another loss": (
        lambda X, y: (X, y, torch.zeros(5), SmoothHinge()), SpecError, "SmoothHinge"),
    "a loss by name": (
        lambda X, y: (X, y, torch.zeros(5), "poisson"), SpecError, "'poisson'"),
    "a loss's class": (lambda X, y: (X, y, torch.zeros(5), Poisson), SpecError, "Poisson"),
    "too few labels": (
        lambda X, y: (X, y, torch.zeros(5), SquaredError(), None, None, None, ["a", "b"]),
        ShapeError, "2 labels for 60 rows"),
    "scale": (
        lambda X, y: (X, y, torch.zeros(5), SquaredError(), None, None, 0.0),
        DataError, "scale = 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, error, said", BAD_GLMS.values(), ids=BAD_GLMS)
def test_what_is_no_maximum_likelihood_is_refused(spoil, error, said):
    with pytest.raises(error, match=said) as caught:
        glm_diagnostics(*spoil(*diabetes()))
    assert str(caught.value).count("\n  ") == 3


@pytest.mark.parametrize("loss", [SquaredError(), Bernoulli(), Poisson()])
def test_an_estimate_must_be_good_to_four_digits_of_its_standard_error(loss):
    X, y = responses(loss)
    beta = maximum_likelihood(X, y, torch.ones_like(y), loss)
    error = glm_diagnostics(X, y, beta, loss).covariance.diagonal().sqrt()[2]
    nudge = torch.eye(5, dtype=X.dtype)[2] * error
    glm_diagnostics(X, y, beta + 0.5e-4 * nudge, loss)
    with pytest.raises(NotStationary, match=r"2\.0e-04 standard errors"):
        glm_diagnostics(X, y, beta + 2e-4 * nudge, loss)


def test_separated_classes_are_refused_though_standard_errors_hide_them():
    x = torch.linspace(-1, 1, 20).repeat_interleave(3)
    X, y = torch.stack([torch.ones(60), x], dim=1), (x > 0).double()
    with pytest.raises(NotStationary, match="moves η by 1"):
        glm_diagnostics(X, y, torch.tensor([0.0, 400.0]), Bernoulli())


def test_an_overflow_is_named():
    X, y = responses(Poisson())
    beta = maximum_likelihood(X, y, torch.ones_like(y), Poisson())
    # η = −690 for a row that has a count all the same, and next to no weight.
    X = torch.cat([X, -690 * beta[None] / beta.square().sum()])
    y, v = torch.cat([y, torch.tensor([1e10])]), torch.cat([torch.ones(60), torch.tensor([1e-20])])
    with pytest.raises(NonFinite, match=r"loo_residuals overflows at rows \[60\]"):
        glm_diagnostics(X, y, beta, Poisson(), v)


def test_a_negative_ridge_penalty_is_refused():
    with pytest.raises(NonFinite, match=r"penalty has -1.0"):
        ridge_loo_residuals(*diabetes(), -1.0)
    with pytest.raises(ShapeError, match=r"penalty \(3,\), 5 columns"):
        ridge_loo_residuals(*diabetes(), np.ones(3))
