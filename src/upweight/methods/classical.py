"""Leverage, Cook's distance and their kin: influence for regressions, in closed form.

For a generalized linear model with its canonical link, η = Xβ, μ = μ(η), V = dμ/dη and prior
weights v, the estimate solves Xᵀ v (y − μ) = 0. With W = diag(v V) and M = XᵀWX

    hᵢ       = Wᵢ xᵢᵀ M⁻¹ xᵢ                           leverage, the diagonal of the hat matrix
    rᵢ       = √vᵢ (yᵢ − μᵢ) / √Vᵢ                      Pearson residual
    tᵢ       = rᵢ / √(φ (1 − hᵢ))                       internally studentized residual
    β̂ − β̂₋ᵢ  = M⁻¹ xᵢ vᵢ (yᵢ − μᵢ) / (1 − hᵢ)            DFBETA: exact for least squares,
                                                        one Newton step otherwise (Pregibon 1981)
    Dᵢ       = tᵢ² hᵢ / ((1 − hᵢ) p)                    Cook's distance (Cook 1977)
    ICᵢ      = n M⁻¹ xᵢ vᵢ (yᵢ − μᵢ)                    influence curve at zᵢ (Hampel 1974)
    V_IJ     = M⁻¹ (Σ vᵢ² (yᵢ − μᵢ)² xᵢ xᵢᵀ) M⁻¹         infinitesimal jackknife (Jaeckel 1972)

ICᵢ is dβ̂/dε, and ICᵢ/n is ∂β̂/∂wᵢ: what `Influence` returns for the same model. V_IJ is the sum
of their outer products, known as the sandwich or HC0. Belsley, Kuh & Welsch (1980) is the reference
for the diagnostics that leave the row out of the variance too (external studentization, DFFITS,
DFBETAS).

Refuses designs without full rank and rows of leverage 1, for which a removal is not defined.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import (
    DataError,
    NonFinite,
    NotPositiveDefinite,
    NotStationary,
    ShapeError,
    message,
)

if TYPE_CHECKING:
    import pandas as pd

STATIONARY = 1e-4
"""Largest Newton step that remains, in standard errors: β̂ is then good to four digits of them."""


class Family(abc.ABC):
    """A one-parameter exponential family with its canonical link."""

    estimates_scale: bool = False

    @abc.abstractmethod
    def mean(self, eta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """μ(η)."""

    @abc.abstractmethod
    def variance(self, mu: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """V(μ) = dμ/dη."""


@dataclass(frozen=True)
class Gaussian(Family):
    """μ = η, V = 1, with an estimated scale φ: least squares."""

    estimates_scale = True

    def mean(self, eta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return eta

    def variance(self, mu: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return torch.ones_like(mu)


@dataclass(frozen=True)
class Binomial(Family):
    """μ = 1/(1 + e^{−η}), V = μ(1 − μ); y is a proportion and the weight its number of trials."""

    def mean(self, eta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return eta.sigmoid()

    def variance(self, mu: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return mu * (1 - mu)


@dataclass(frozen=True)
class Poisson(Family):
    """μ = e^η, V = μ."""

    def mean(self, eta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return eta.exp()

    def variance(self, mu: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return mu


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """What each row does to a regression. One entry (or row) per observation.

    Args:
        beta: β̂, `[p]`.
        names: Of the coefficients.
        scale: φ: the residual variance for `Gaussian`, 1 otherwise.
        leverage: hᵢ, between 0 and 1; they sum to p.
        residuals: yᵢ − μᵢ.
        pearson: Pearson residuals.
        studentized: Internally studentized residuals.
        studentized_external: With the variance estimated without row i; None but for `Gaussian`.
        loo_residuals: yᵢ less its prediction without row i (PRESS), on the scale of η.
        cooks_distance: Dᵢ.
        dffits: Change of the row's own prediction in its standard errors, t √(h/(1 − h)), by the
            external residual where there is one.
        dfbeta: β̂ − β̂₋ᵢ, `[n, p]`.
        dfbetas: The same in standard errors of β̂ (without row i for `Gaussian`).
        covariance_ratio: det cov(β̂₋ᵢ)/det cov(β̂); None but for `Gaussian`.
        influence_curve: ICᵢ = dβ̂/dε, `[n, p]`.
        covariance: φ M⁻¹, the model's own covariance of β̂.
        covariance_jackknife: V_IJ, which does not trust the model's variance.
    """

    beta: Float[Tensor, " p"]
    names: tuple[str, ...]
    scale: float
    leverage: Float[Tensor, " n"]
    residuals: Float[Tensor, " n"]
    pearson: Float[Tensor, " n"]
    studentized: Float[Tensor, " n"]
    studentized_external: Float[Tensor, " n"] | None
    loo_residuals: Float[Tensor, " n"]
    cooks_distance: Float[Tensor, " n"]
    dffits: Float[Tensor, " n"]
    dfbeta: Float[Tensor, "n p"]
    dfbetas: Float[Tensor, "n p"]
    covariance_ratio: Float[Tensor, " n"] | None
    influence_curve: Float[Tensor, "n p"]
    covariance: Float[Tensor, "p p"]
    covariance_jackknife: Float[Tensor, "p p"]

    def to_pandas(self) -> "pd.DataFrame":
        """A table with a row per observation; DFBETAS in columns `dfbetas_NAME`."""
        import pandas as pd

        columns = {
            name: value.numpy()
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
            and value.shape == self.leverage.shape
            and name not in ("beta", "covariance")
        }
        for k, name in enumerate(self.names):
            columns[f"dfbetas_{name}"] = self.dfbetas[:, k].numpy()
        frame = pd.DataFrame(columns)
        frame.index.name = "row"
        return frame


def linear_diagnostics(
    X: Any, y: Any, weights: Any = None, names: Sequence[str] | None = None
) -> Diagnostics:
    """Diagnostics of a least squares fit of y on X (with a column of ones for an intercept).

    Args:
        X: Design `[n, p]`.
        y: Response `[n]`.
        weights: v, the prior weights of weighted least squares; 1 by default.
        names: Of the columns.

    Raises:
        ShapeError, NonFinite, NotPositiveDefinite, DataError: As for `glm_diagnostics`.

    Exact when: always; removal of a row from least squares has this closed form.
    Cost: one QR factorization, n·p² multiply-adds; nothing of size n × n.
    """
    design, response, prior = _arrays(X, y, weights)
    root = prior.sqrt()
    q, r = _factor(design * root[:, None])
    beta = torch.linalg.solve_triangular(r, (q.T @ (root * response))[:, None], upper=True)[:, 0]
    return glm_diagnostics(design, response, beta, Gaussian(), prior, names)


def glm_diagnostics(
    X: Any,
    y: Any,
    beta: Any,
    family: Family,
    weights: Any = None,
    names: Sequence[str] | None = None,
) -> Diagnostics:
    """Diagnostics of a generalized linear model at its maximum-likelihood estimate.

    Args:
        X: Design `[n, p]`.
        y: Response `[n]`; proportions for `Binomial` with trials as weights.
        beta: β̂ `[p]`, the solution of Xᵀ v (y − μ) = 0.
        family: `Gaussian()`, `Binomial()` or `Poisson()`, with its canonical link.
        weights: v, prior weights; 1 by default.
        names: Of the columns.

    Raises:
        ShapeError: The arrays do not fit.
        NonFinite: An entry is NaN or infinite, or a row has leverage 1.
        NotPositiveDefinite: X has no full column rank.
        NotStationary: β̂ does not solve the likelihood equations.
        DataError: There are no degrees of freedom for the scale.

    Exact when: the family is `Gaussian`; otherwise removals are one Newton step.
    Cost: one QR factorization, n·p² multiply-adds.
    """
    design, response, prior = _arrays(X, y, weights)
    estimate = torch.as_tensor(beta, dtype=torch.float64).reshape(-1)
    n, p = design.shape
    _require_shape(len(estimate) == p, f"beta has {len(estimate)} entries, X {p} columns.")
    labels = tuple(names) if names is not None else tuple(f"x{k}" for k in range(p))
    _require_shape(len(labels) == p, f"{len(labels)} names for {p} columns.")

    mu = family.mean(design @ estimate)
    variance = family.variance(mu)
    residuals = response - mu
    q, r = _factor(design * (prior * variance).sqrt()[:, None])
    leverage = q.square().sum(dim=1)
    _require_leverage_below_one(leverage)
    inverse = torch.cholesky_inverse(r.T)  # M⁻¹ = (RᵀR)⁻¹

    # M⁻¹ xᵢ vᵢ (yᵢ − μᵢ) = ICᵢ/n: each row's pull on β̂.
    pulls = design * (prior * residuals)[:, None] @ inverse
    pearson = prior.sqrt() * residuals / variance.sqrt()
    scale = 1.0
    if family.estimates_scale:
        _require_degrees_of_freedom(n - p)
        scale = float(pearson.square().sum()) / (n - p)
    _require_stationary(pulls.sum(dim=0), inverse.diagonal() * scale)

    kept = 1 - leverage
    studentized = pearson / (scale * kept).sqrt()
    external, ratio, spread = None, None, torch.full_like(leverage, scale)
    if family.estimates_scale:
        _require_degrees_of_freedom(n - p - 1)
        spread = (scale * (n - p) - pearson.square() / kept) / (n - p - 1)
        external = pearson / (spread * kept).sqrt()
        ratio = (spread / scale) ** p / kept
    dfbeta = pulls / kept[:, None]
    return Diagnostics(
        beta=estimate,
        names=labels,
        scale=scale,
        leverage=leverage,
        residuals=residuals,
        pearson=pearson,
        studentized=studentized,
        studentized_external=external,
        loo_residuals=residuals / (variance * kept),
        cooks_distance=studentized.square() * leverage / (kept * p),
        dffits=(studentized if external is None else external) * (leverage / kept).sqrt(),
        dfbeta=dfbeta,
        dfbetas=dfbeta / (spread[:, None] * inverse.diagonal()).sqrt(),
        covariance_ratio=ratio,
        influence_curve=n * pulls,
        covariance=scale * inverse,
        covariance_jackknife=pulls.T @ pulls,
    )


def _arrays(X: Any, y: Any, weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    design = torch.as_tensor(X, dtype=torch.float64)
    response = torch.as_tensor(y, dtype=torch.float64)
    prior = (
        torch.ones_like(response)
        if weights is None
        else torch.as_tensor(weights, dtype=torch.float64)
    )
    shapes = f"X {tuple(design.shape)}, y {tuple(response.shape)}, weights {tuple(prior.shape)}."
    fits = design.ndim == 2 and response.shape == prior.shape == design.shape[:1]
    _require_shape(fits and len(design) > 0, shapes)
    for name, array in (("X", design), ("y", response), ("weights", prior)):
        if not bool(array.isfinite().all()) or (name == "weights" and bool((array < 0).any())):
            row = int((~array.isfinite()).reshape(len(array), -1).any(dim=1).nonzero().sum())
            raise NonFinite(
                message(
                    "A regression needs finite numbers, and weights of at least 0.",
                    f"{name} is not, first at row {row}.",
                    "missing values.",
                    "drop or impute these rows before fitting.",
                )
            )
    return design, response, prior


def _require_shape(fits: bool, given: str) -> None:
    if not fits:
        raise ShapeError(
            message(
                "A regression needs X [n, p], y [n], weights [n] and beta [p], with n ≥ 1.",
                given,
                "a response stored as a column, or arrays of different samples.",
                "pass y.reshape(-1) and the rows that were fitted.",
            )
        )


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
        given = f"{n} rows, {p} columns" + (f", columns {zero[:5]} are zero." if zero else ".")
    raise NotPositiveDefinite(
        message(
            "The design must have full column rank, or β̂ is not determined.",
            given,
            "dummy columns for every level beside an intercept, duplicated columns, or more "
            "columns than rows.",
            "drop the dependent columns, or use Influence with a penalty.",
        )
    )


def _require_leverage_below_one(leverage: Float[Tensor, " n"]) -> None:
    full = (leverage > 1 - 1e-10).nonzero()[:, 0].tolist()
    if full:
        raise NonFinite(
            message(
                "Removal diagnostics need leverage below 1 for every row.",
                f"leverage 1 for rows {full[:5]}{' and more' if len(full) > 5 else ''}.",
                "a row that alone determines a coefficient: the only one of its category.",
                "drop that row together with its column, or add a penalty and use Influence.",
            )
        )


def _require_degrees_of_freedom(freedom: int) -> None:
    if freedom < 1:
        raise DataError(
            message(
                "A variance estimated with a row left out needs n ≥ p + 2.",
                f"{freedom} degrees of freedom left.",
                "as many coefficients as rows.",
                "use fewer columns.",
            )
        )


def _require_stationary(step: Float[Tensor, " p"], variances: Float[Tensor, " p"]) -> None:
    # A perfect fit has no variance: the step is then rounding, and nothing to judge it by.
    errors = (step.abs() / variances.sqrt().clamp_min(torch.finfo(torch.float64).tiny)).max()
    if bool((variances > 0).all()) and not float(errors) <= STATIONARY:
        raise NotStationary(
            message(
                "β̂ must solve the likelihood equations Xᵀ v (y − μ) = 0.",
                f"a Newton step of {float(errors):.1e} standard errors that remains.",
                "a fit that stopped early, was penalized, or used an offset or another link.",
                "fit with a smaller tolerance, and pass the weights that were used.",
            )
        )
