"""Leverage, Cook's distance and their kin: influence for regressions, in closed form.

For a generalized linear model η = Xβ (plus an offset), μ = μ(η), prior weights v, with the score
u = −∂ℓ/∂η, the observed information O = ∂²ℓ/∂η² and the expected one I = E[O] (equal for a
canonical link, where u = y − μ and O = I = V(μ)), the estimate solves Xᵀ v u = 0. With
M = Xᵀ diag(v O) X

    hᵢ       = vᵢ Oᵢ xᵢᵀ M⁻¹ xᵢ                         leverage
    rᵢ       = √vᵢ uᵢ / √Iᵢ = √vᵢ (yᵢ − μᵢ)/√V(μᵢ)      Pearson residual
    tᵢ       = rᵢ / √(φ (1 − hᵢ))                       internally studentized residual
    β̂ − β̂₋ᵢ  = M⁻¹ xᵢ vᵢ uᵢ / (1 − hᵢ)                  DFBETA: exact for least squares,
                                                        one Newton step otherwise (Pregibon 1981)
    Dᵢ       = (β̂ − β̂₋ᵢ)ᵀ M (β̂ − β̂₋ᵢ) / (φ p)           Cook's distance (Cook 1977)
    ICᵢ      = n M⁻¹ xᵢ vᵢ uᵢ                           influence curve at zᵢ (Hampel 1974)
    V_IJ     = M⁻¹ (Σ vᵢ² uᵢ² xᵢ xᵢᵀ) M⁻¹                infinitesimal jackknife (Jaeckel 1972)

For a canonical link Dᵢ = tᵢ² hᵢ / ((1 − hᵢ) p).
ICᵢ is dβ̂/dε, and ICᵢ/n is ∂β̂/∂wᵢ: what `Influence` returns for the same model. V_IJ is the sum
of their outer products, known as the sandwich or HC0. Belsley, Kuh & Welsch (1980) is the reference
for the diagnostics that leave the row out of the variance too (external studentization, DFFITS,
DFBETAS).

Refuses designs without full rank, rows of leverage 1 (removing one leaves a coefficient
undetermined), a variance of zero (a perfect fit, with all rows or without one), and coefficients
that do not solve the likelihood equations. No entry of a result is NaN or infinite.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.applications.regression_result import Diagnostics
from upweight.errors import (
    DataError,
    DtypeError,
    NonFinite,
    NotPositiveDefinite,
    NotStationary,
    ShapeError,
    SpecError,
)
from upweight.task.likelihoods import Likelihood, moments
from upweight.task.losses import Bernoulli, Loss, Poisson, SquaredError

__all__ = ["Diagnostics", "glm_diagnostics", "linear_diagnostics", "ridge_loo_residuals"]

STATIONARY = 1e-4
"""Largest Newton step that remains, in standard errors: β̂ is then good to four digits of them."""

ASTRAY = 0.1
"""Largest Newton step that remains, in η. Where classes are separable each step is about 1, however
long the fit went on, and standard errors grow so fast that `STATIONARY` alone would not notice."""


LOSSES = (SquaredError(), Bernoulli(), Poisson())
"""Negative log-likelihoods with a canonical link; others are `Likelihood`."""


def linear_diagnostics(
    X: Any, y: Any, weights: Any = None, names: Sequence[str] | None = None
) -> Diagnostics:
    """Diagnostics of a least squares fit of y on X (with a column of ones for an intercept).

    Arguments and errors as for `glm_diagnostics`.

    Exact when: always; removal of a row from least squares has this closed form.
    Cost: one QR factorization, n·p² multiply-adds; nothing of size n × n.
    """
    design, response, prior = _arrays(X, y, weights)
    root = prior.sqrt()
    q, r = _factor(design * root[:, None])
    beta = torch.linalg.solve_triangular(r, (q.T @ (root * response))[:, None], upper=True)[:, 0]
    return glm_diagnostics(design, response, beta, SquaredError(), prior, names)


def glm_diagnostics(
    X: Any,
    y: Any,
    beta: Any,
    loss: Loss,
    weights: Any = None,
    names: Sequence[str] | None = None,
    scale: float | None = None,
    rows: Sequence[Hashable] | None = None,
    offset: Any = None,
    information: Literal["observed", "expected"] = "observed",
) -> Diagnostics:
    """Diagnostics of a generalized linear model at its maximum-likelihood estimate.

    Args:
        X: Design `[n, p]`: a tensor, array or data frame; computed in float64 on the CPU.
        y: Response `[n]`; proportions for `Bernoulli` with trials as weights.
        beta: β̂ `[p]`, the solution of Xᵀ v (y − μ) = 0.
        loss: ℓ, as a function of η: `SquaredError()`, `Bernoulli()`, `Poisson()` or a `Likelihood`
            of another variance or link.
        weights: v, prior weights; 1 by default. They divide the variance of a row; they do not say
            how many rows it stands for.
        names: Of the columns.
        scale: φ, where it is known or came from elsewhere (quasi-likelihood). None: the residual
            variance for `SquaredError`, 1 otherwise.
        rows: Labels of the observations, for the table; their positions by default.
        offset: o `[n]`, where η = Xβ + o, such as the logarithm of an exposure; 0 by default.
        information: Whose inverse the covariance is, and the standard errors of DFBETAS and DFFITS:
            "expected" of a fit by iteratively reweighted least squares. They differ where the link
            is not canonical; removals are by the observed one.

    Raises:
        ShapeError: The arrays do not fit.
        DtypeError: An entry is not a real number.
        SpecError: `loss` is another.
        NonFinite: An entry is NaN or infinite, a weight is negative, a variance V underflows, a row
            has leverage 1, or the fit is perfect without it.
        NotPositiveDefinite: X has no full column rank, or M is not positive definite.
        NotStationary: β̂ does not solve the likelihood equations.
        DataError: The loss knows no such response, or there is no residual variance.

    Exact when: the loss is `SquaredError`; otherwise removals are one Newton step.
    Cost: one QR factorization, n·p² multiply-adds.
    """
    _require_loss(loss)
    design, response, prior = _arrays(X, y, weights)
    n, p = design.shape
    estimate, labels = _coefficients(beta, names, p)
    positions = tuple(range(n)) if rows is None else tuple(rows)
    _require_shape(len(positions) == n, f"{len(positions)} labels for {n} rows.")
    _require_range(loss, response)
    shift = torch.zeros_like(response) if offset is None else _float64("offset", offset)
    _require_shape(shift.shape == (n,), f"offset {tuple(shift.shape)} for {n} rows.")
    _require_numbers("offset", shift)
    eta = design @ estimate + shift
    score, observed, expected = moments(loss, eta, response)
    _require_variance(expected, eta)
    q, r = _factor(design * (prior * expected).sqrt()[:, None])
    # By the observed information: M = Rᵀ (Qᵀ diag(O/I) Q) R.
    ratio = observed / expected
    canonical = loss in LOSSES
    q2, r2 = (q, r) if canonical else _observed(q, r, ratio)
    reach = q2.square().sum(dim=1)  # v I xᵀ M⁻¹ x
    leverage = ratio * reach
    _require_leverage_below_one(leverage)
    kept = 1 - leverage
    inverse = torch.cholesky_inverse(r2.T)  # M⁻¹ = (RᵀR)⁻¹
    unscaled = inverse if information == "observed" else torch.cholesky_inverse(r.T)

    # M⁻¹ xᵢ vᵢ uᵢ = ICᵢ/n: each row's pull on β̂.
    pulls = design * (prior * score)[:, None] @ inverse
    residuals = response - loss.mean(eta) if isinstance(loss, Likelihood) else score
    root = prior.sqrt() * score / expected.sqrt()
    # The same but for its sign, where μ falls as η grows.
    pearson = root if canonical else root.abs() * residuals.sign()
    external, covariances, spread = None, None, None
    quadratic = isinstance(loss, SquaredError)
    if scale is None and quadratic:
        size = float((prior * (response.square() + shift.square())).sum())
        scale, spread = _scales(pearson, kept, p, size)
        external, covariances = pearson / (spread * kept).sqrt(), (spread / scale) ** p / kept
    phi = _given_scale(scale)
    step = pulls.sum(dim=0)
    _require_stationary(step, phi * inverse.diagonal(), design, quadratic)

    studentized = pearson / (phi * kept).sqrt()
    odds = reach.sqrt() / kept.sqrt()
    # Δη in its standard errors, √(x cov x): those of M⁻¹, or of the expected information.
    own = reach.sqrt() if information == "observed" else q.square().sum(dim=1).sqrt()
    dffits = root / (phi * kept).sqrt() * odds * torch.where(own > 0, reach.sqrt() / own, 1.0)
    dfbeta = pulls / kept[:, None]
    spreads = torch.full_like(leverage, phi) if spread is None else spread
    found = Diagnostics(
        beta=estimate,
        names=labels,
        rows=positions,
        scale=phi,
        leverage=leverage,
        residuals=residuals,
        pearson=pearson,
        studentized=studentized,
        studentized_external=external,
        loo_residuals=score / (expected * kept),
        cooks_distance=studentized.square() * odds.square() / p,
        dffits=dffits if external is None else external * odds,
        dffits_internal=dffits,
        dfbeta=dfbeta,
        dfbetas=dfbeta / (spreads[:, None] * unscaled.diagonal()).sqrt(),
        covariance_ratio=covariances,
        influence_curve=n * pulls,
        covariance=phi * unscaled,
        covariance_jackknife=pulls.T @ pulls,
    )
    _require_finite(found)
    return found


def ridge_loo_residuals(X: Any, y: Any, penalty: Any, weights: Any = None) -> Float[Tensor, " n"]:
    """yᵢ less its prediction by ridge regression without row i, for every row from one fit.

        β̂ = argmin ½ Σᵢ vᵢ (yᵢ − xᵢᵀβ)² + ½ Σⱼ λⱼ βⱼ²
        yᵢ − xᵢᵀβ̂₋ᵢ = (yᵢ − xᵢᵀβ̂) / (1 − hᵢ),    hᵢ = vᵢ xᵢᵀ (XᵀvX + diag λ)⁻¹ xᵢ

    Allen (1974). The penalty is that of the sum, as in scikit-learn's `Ridge(alpha=λ)`, and stays
    as it is when a row leaves; `L2(strength)` on the mean loss is λ = n · strength.

    Args:
        X: Design `[n, p]`; a column of ones for an intercept.
        y: Response `[n]`.
        penalty: λ ≥ 0, a number or one per column (0 leaves that column free).
        weights: v; 1 by default.

    Exact when: always. Refuses what `glm_diagnostics` does.
    Cost: one QR factorization of n + p rows.
    """
    design, response, prior = _arrays(X, y, weights)
    n, p = design.shape
    strengths = _float64("penalty", penalty)
    _require_shape(strengths.shape in ((), (p,)), f"penalty {tuple(strengths.shape)}, {p} columns.")
    _require_numbers("penalty", strengths.reshape(-1), positive=True)
    root = prior.sqrt()
    # Ridge is least squares with p more rows √λⱼ eⱼ whose response is 0 (Allen 1974).
    q, r = _factor(torch.cat([design * root[:, None], strengths.expand(p).sqrt().diag()]))
    leverage = q[:n].square().sum(dim=1)
    _require_leverage_below_one(leverage)
    beta = torch.linalg.solve_triangular(r, (q[:n].T @ (root * response))[:, None], upper=True)
    return (response - (design @ beta)[:, 0]) / (1 - leverage)


def _arrays(X: Any, y: Any, weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    design, response = _float64("X", X), _float64("y", y)
    prior = torch.ones_like(response) if weights is None else _float64("weights", weights)
    shapes = f"X {tuple(design.shape)}, y {tuple(response.shape)}, weights {tuple(prior.shape)}."
    fits = design.ndim == 2 and response.shape == prior.shape == design.shape[:1]
    _require_shape(fits and len(design) > 0, shapes)
    _require_numbers("X", design)
    _require_numbers("y", response)
    _require_numbers("weights", prior, positive=True)
    return design, response, prior


def _float64(name: str, values: Any) -> Tensor:
    """A copy, so that nothing here depends on what the user's array becomes."""
    try:
        # A conversion would drop imaginary parts and go on.
        if values.is_complex() if isinstance(values, Tensor) else np.iscomplexobj(values):
            raise TypeError("its entries are complex")
        if isinstance(values, Tensor):
            return values.detach().to("cpu", torch.float64, copy=True).contiguous()
        return torch.from_numpy(np.array(values, dtype=np.float64, order="C"))
    except (TypeError, ValueError) as error:
        raise DtypeError(
            "A regression needs arrays of real numbers.",
            f"{name} of type {type(values).__name__}: {error}.",
            "text or categories that were not encoded, or rows of different lengths.",
            "encode categories as columns of 0 and 1 first.",
        ) from error


def _coefficients(beta: Any, names: Sequence[str] | None, p: int) -> tuple[Tensor, tuple[str, ...]]:
    estimate = _float64("beta", beta)
    _require_shape(estimate.shape == (p,), f"beta {tuple(estimate.shape)}, X with {p} columns.")
    _require_numbers("beta", estimate)
    labels = tuple(names) if names is not None else tuple(f"x{k}" for k in range(p))
    _require_shape(len(labels) == p, f"{len(labels)} names for {p} columns.")
    return estimate, labels


def _listed(rows: Tensor) -> str:
    """The first rows for which the mask holds, as text."""
    found = sorted(set(rows.nonzero()[:, 0].tolist()))
    return f"{found[:5]}{' and more' if len(found) > 5 else ''}"


def _require_numbers(name: str, array: Tensor, *, positive: bool = False) -> None:
    bad = ~array.isfinite() | (array < 0) if positive else ~array.isfinite()
    rows = bad.reshape(len(array), -1).any(dim=1)
    if bool(rows.any()):
        raise NonFinite(
            f"{name} must be finite{' and at least 0' if positive else ''}.",
            f"{name} has {float(array[bad][0])} at rows {_listed(rows)}.",
            "missing values, or a transformation such as log(0).",
            "drop or impute these rows before fitting.",
        )


def _require_shape(fits: bool, given: str) -> None:
    if not fits:
        raise ShapeError(
            "A regression needs X [n, p], y [n], weights [n] and beta [p], with n ≥ 1.",
            given,
            "a response stored as a column, or arrays of different samples.",
            "pass y.reshape(-1) and the rows that were fitted.",
        )


def _require_loss(loss: Any) -> None:
    if loss not in LOSSES and not isinstance(loss, Likelihood):
        raise SpecError(
            "loss must be SquaredError(), Bernoulli(), Poisson() or a Likelihood, of one output.",
            f"{loss!r}.",
            "a name or a class in place of an object, or a family of statsmodels.",
            "use upweight.Bernoulli() and its like; for statsmodels results use "
            "upweight.adapters.statsmodels.diagnostics(results).",
        )


def _require_range(loss: Loss, response: Float[Tensor, " n"]) -> None:
    if isinstance(loss, Likelihood):
        loss.possible(response)
        return
    highest = {Bernoulli(): 1.0, Poisson(): torch.inf}.get(loss)
    bad = torch.zeros_like(response) if highest is None else (response < 0) | (response > highest)
    if bool(bad.any()):
        raise DataError(
            f"Responses must be possible for {loss!r}: between 0 and {highest}.",
            f"y = {float(response[bad][0])} at rows {_listed(bad)}.",
            "counts of successes in place of proportions, or another loss.",
            "for Bernoulli pass y = successes/trials and weights = trials.",
        )


def _require_variance(variance: Float[Tensor, " n"], eta: Float[Tensor, " n"]) -> None:
    bad = ~((variance >= torch.finfo(torch.float64).tiny) & variance.isfinite())
    if bool(bad.any()):
        raise NonFinite(
            "Every row needs a variance V = dμ/dη that float64 can hold.",
            f"V = {float(variance[bad][0]):.1e} at η = {float(eta[bad][0]):.4g}, "
            f"rows {_listed(bad)}.",
            "coefficients on their way to infinity, or of another design.",
            "check that the fit converged, and that X has the columns beta belongs to.",
        )


def _require_finite(found: Diagnostics) -> None:
    for name, value in vars(found).items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise NonFinite(
                "Diagnostics must be finite.",
                f"{name} overflows at rows {_listed(~value.isfinite())}.",
                "variances or columns of extreme size.",
                "scale the columns, and leave out rows far outside of the others.",
            )


def require_full_rank(X: Any, weights: Any) -> None:
    """Refuse a design whose columns depend on each other over the rows that count."""
    _factor(_float64("X", X) * _float64("weights", weights).sqrt()[:, None])


def _factor(weighted: Float[Tensor, "n p"]) -> tuple[Tensor, Tensor]:
    """Q R of √W X, refusing columns that depend on each other."""
    n, p = weighted.shape
    lengths = torch.linalg.vector_norm(weighted, dim=0)
    if n >= p and bool((lengths > 0).all()):
        q, r = torch.linalg.qr(weighted)
        pivots = r.diagonal().abs() / lengths
        if float(pivots.min()) > max(n, p) * torch.finfo(torch.float64).eps:
            return q, r
        given = f"column {int(pivots.argmin())} depends on those before it ({n} rows, {p} columns)."
    else:
        zero = (lengths == 0).nonzero()[:, 0].tolist()
        if len(zero) == p and p > 0:
            raise DataError(
                "Some row must count.",
                f"{n} rows, all of weight 0.",
                "weights of another subset, or a column that holds zeros alone.",
                "pass the weights of the fit, or leave them out.",
            )
        given = f"{n} rows, {p} columns" + (f", columns {zero[:5]} are zero." if zero else ".")
    raise NotPositiveDefinite(
        "The design must have full column rank, or β̂ is not determined.",
        given,
        "dummy columns for every level beside an intercept, duplicated columns, or more "
        "columns than rows.",
        "drop the dependent columns, or use Influence with a penalty.",
    )


def _observed(
    q: Float[Tensor, "n p"], r: Float[Tensor, "p p"], ratio: Float[Tensor, " n"]
) -> tuple[Tensor, Tensor]:
    """Q L⁻ᵀ and Lᵀ R with L Lᵀ = Qᵀ diag(O/I) Q: M = (LᵀR)ᵀ(LᵀR)."""
    root, info = torch.linalg.cholesky_ex((q * ratio[:, None]).T @ q)
    if int(info) != 0:
        raise NotPositiveDefinite(
            "The observed information must be positive definite at an estimate.",
            "one with a direction along which the likelihood does not fall.",
            "a fit that stopped at a saddle of a likelihood that is not concave.",
            "fit again from other start_params, or with method='newton'.",
        )
    return torch.linalg.solve_triangular(root, q.T, upper=False).T, root.T @ r


def _require_leverage_below_one(leverage: Float[Tensor, " n"]) -> None:
    full = leverage > 1 - 1e-10
    if bool(full.any()):
        raise NonFinite(
            "Removal diagnostics need leverage below 1 for every row.",
            f"leverage 1 for rows {_listed(full)}.",
            "a row that alone determines a coefficient: the only one of its category.",
            "drop that row together with its column, or add a penalty and use Influence.",
        )


def _scales(
    pearson: Float[Tensor, " n"], kept: Float[Tensor, " n"], p: int, size: float
) -> tuple[float, Float[Tensor, " n"]]:
    """φ = RSS/(n − p), and φ₋ᵢ without each row; Σ v y² = `size` tells rounding from residuals."""
    n = len(pearson)
    if n < p + 2:
        raise DataError(
            "A variance estimated with a row left out needs n ≥ p + 2.",
            f"n = {n} rows and p = {p} columns.",
            "as many coefficients as rows.",
            "use fewer columns, or pass scale= to glm_diagnostics.",
        )
    eps = torch.finfo(torch.float64).eps
    rounding = (10 * n**0.5 * eps) ** 2 * size
    total = float(pearson.square().sum())
    if total <= rounding:
        raise DataError(
            "Standardized diagnostics need residuals: their variance is the unit.",
            f"a residual sum of squares of {total:.1e}, zero to rounding.",
            "a response that is a linear function of the columns.",
            "leave out the column that holds the response, or pass scale= to glm_diagnostics.",
        )
    rest = total - pearson.square() / kept
    perfect = rest <= rounding + 100 * eps * total
    if bool(perfect.any()):
        raise NonFinite(
            "The fit without any one row must leave residuals to measure that row by.",
            f"the fit is perfect without row {_listed(perfect)}.",
            "a response that is a linear function of the columns but for that row.",
            "look at that row: it is the only one that departs; or pass scale= to glm_diagnostics.",
        )
    return total / (n - p), rest / (n - p - 1)


def _given_scale(scale: float | None) -> float:
    phi = 1.0 if scale is None else float(scale)
    if not (phi > 0 and np.isfinite(phi)):
        raise DataError(
            "The scale φ must be positive and finite.",
            f"scale = {phi}.",
            "a dispersion estimated from a perfect fit.",
            "pass scale=None for the family's own.",
        )
    return phi


def _require_stationary(
    step: Float[Tensor, " p"],
    variances: Float[Tensor, " p"],
    design: Float[Tensor, "n p"],
    quadratic: bool,
) -> None:
    errors = float((step.abs() / variances.sqrt()).max())
    moved = 0.0 if quadratic else float((design @ step).abs().max())
    if not (errors <= STATIONARY and moved <= ASTRAY):
        raise NotStationary(
            "β̂ must solve the likelihood equations Xᵀ v (y − μ) = 0.",
            f"a Newton step of {errors:.1e} standard errors that remains"
            + (f", and moves η by {moved:.1e}." if moved else "."),
            "a fit that stopped early, was penalized, or used another offset or link; or "
            "classes that a hyperplane separates, for which there is no solution.",
            "fit with a smaller tolerance, and pass the weights that were used.",
        )
