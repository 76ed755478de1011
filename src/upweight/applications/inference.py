"""A coefficient, its standard error and interval, as functions of the data weights.

For a generalized linear model, η = Xβ + o, prior weights v and data weights w, with the score u and
the observed and expected information O and I of each row (`upweight.task.likelihoods`; with a
canonical link u = y − μ and O = I = V), N = Σ w and

    M(w) = Xᵀ diag(w v O) X      z = X M⁻¹ ℓ      (ℓ: the coefficient)      u below: v u

β̂(w) solves Σ wᵢ uᵢ xᵢ = 0, and the squared standard error of ℓᵀβ̂ is

    model      φ ℓᵀM⁻¹ℓ,  φ = Σ w v u²/I / (N − p), or a number that the fit was given; with I in
               place of O in M where the fit was by iteratively reweighted least squares
    HC0        Σ w z² u²                     HC1   · N/(N − p)
    HC2, HC3   Σ w z² u² / (1 − h)^(1 or 2)
    cluster    Σ_g (Σ_{i ∈ g} w z u)²   · G/(G − 1) · (N − 1)/(N − p)   (with its correction)

At weights of 0 and 1 these are the formulas of the rows that are left; in between, a row that
counts wᵢ times. The design is orthogonalized, X = Q R, so that no unit of the columns enters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.applications.regression import ASTRAY
from upweight.task.likelihoods import moments
from upweight.task.losses import Loss, SquaredError

Kind = Literal["model", "HC0", "HC1", "HC2", "HC3", "cluster"]

SINGULAR = 1e-10
"""Squared ratio of pivots of M below which the rows that are left do not determine β."""

PRODUCTS = 10_000_000
"""n p² up to which products of columns are kept: M is then one product of matrices."""

SOLVED = 1e-9
"""Newton step, in units of M^(-1/2), at which β̂(w) is reached."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """Which standard error is reported.

    Args:
        kind: The formula.
        scale: φ; None where it is estimated. Of `kind` "model" only.
        clusters: Numbers of the clusters `[n]`: of one grouping, or of two and their intersection.
        corrected: Whether clusters have the small-sample correction.
        factor: A number that the covariance is multiplied by.
        t: Whether the interval is that of Student's t.
        by_clusters: Whether its degrees of freedom are G − 1, in place of N − p.
        expected: Whether M is the expected information. Of `kind` "model" only.
    """

    kind: Kind
    scale: float | None = None
    clusters: tuple[Int[Tensor, " n"], ...] = ()
    corrected: bool = True
    factor: float = 1.0
    t: bool = False
    by_clusters: bool = False
    expected: bool = False


@dataclass(frozen=True, eq=False)
class Reported:
    """ℓᵀβ̂, its standard error, and how many of them reach from it to an end of its interval."""

    estimate: Float[Tensor, " m"]
    error: Float[Tensor, " m"]
    quantile: Float[Tensor, " m"]

    def end(self, side: int) -> Float[Tensor, " m"]:
        """The estimate (0), or the lower (−1) or upper (+1) end of its interval."""
        if side == 0:
            return self.estimate
        return self.estimate + side * self.quantile * self.error


@dataclass(frozen=True, eq=False)
class Inference:
    """What a regression reports of one coefficient, under any data weights.

    Methods take a batch of m rows of weights and return m of everything; what the rows that are
    left do not determine is NaN.

    Args:
        X: Design `[n, p]`.
        y, v, offset: Response, prior weights and o `[n]`.
        loss: `SquaredError()`, `Bernoulli()`, `Poisson()` or a `Likelihood`.
        place: Which coefficient.
        covariance: Which standard error.
        level: Of the interval.
    """

    X: Float[Tensor, "n p"]
    y: Float[Tensor, " n"]
    v: Float[Tensor, " n"]
    offset: Float[Tensor, " n"]
    loss: Loss
    place: int
    covariance: Covariance
    level: float

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(self.X)
        root = len(self.X) ** 0.5
        return q * root, r / root

    @property
    def design(self) -> Float[Tensor, "n p"]:
        """√n Q: columns of mean square 1, in which γ = R β / √n."""
        return self._factors[0]

    @cached_property
    def contrast(self) -> Float[Tensor, " p"]:
        """ℓ, with β_j = ℓᵀγ."""
        unit = torch.zeros(self.X.shape[1], dtype=self.X.dtype)
        unit[self.place] = 1
        r = self._factors[1]
        return torch.linalg.solve_triangular(r.T, unit[:, None], upper=False)[:, 0]

    def coordinates(self, beta: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """γ of β."""
        return self._factors[1] @ beta

    def moments(self, gamma: Float[Tensor, "m p"]) -> tuple[Tensor, Tensor, Tensor]:
        """u, O and I of every row `[m, n]`."""
        return moments(self.loss, gamma @ self.design.T + self.offset, self.y)

    @cached_property
    def _products(self) -> Float[Tensor, "n t"]:
        """Products of columns of the design, of the upper triangle."""
        i, j = torch.triu_indices(self.X.shape[1], self.X.shape[1])
        return self.design[:, i] * self.design[:, j]

    def information(self, curvature: Float[Tensor, "m n"]) -> Float[Tensor, "m p p"]:
        """Qᵀ diag(c) Q, for each row of c."""
        q, p = self.design, self.X.shape[1]
        if self.X.numel() * p > PRODUCTS:
            return (q.T * curvature[:, None, :]) @ q
        i, j = torch.triu_indices(p, p)
        place = torch.empty(p, p, dtype=torch.long)
        place[i, j] = place[j, i] = torch.arange(len(i))
        return (curvature @ self._products)[:, place]

    def _quadratic(self, matrices: Float[Tensor, "m p p"]) -> Float[Tensor, "m n"]:
        """qᵢᵀ A qᵢ of every row, for each symmetric A."""
        q, p = self.design, self.X.shape[1]
        if self.X.numel() * p > PRODUCTS:
            return ((q @ matrices) * q).sum(dim=2)
        i, j = torch.triu_indices(p, p)
        return (matrices[:, i, j] * (2 - (i == j).to(q.dtype))) @ self._products.T

    def solved(
        self, weights: Float[Tensor, "m n"], start: Float[Tensor, "m p"], steps: int = 30
    ) -> Float[Tensor, "m p"]:
        """γ̂(w) by Newton's method; NaN where it does not arrive within `steps`.

        One step from the leverage-corrected prediction, `steps=1`, is taken as it is: exact for
        least squares, and quadratically close otherwise.
        """
        gamma = step = start
        size = torch.full((len(weights),), torch.inf, dtype=start.dtype)
        for _ in range(1 if isinstance(self.loss, SquaredError) else steps):
            residual, variance, _ = self.moments(gamma)
            root, fine = _cholesky(self.information(weights * self.v * variance))
            pull = (weights * self.v * residual) @ self.design
            step = torch.cholesky_solve(pull[:, :, None], root)[:, :, 0]
            size = (pull * step).sum(dim=1).clamp_min(0).sqrt()
            gamma = torch.where(fine[:, None], gamma + step, torch.nan)
            if not bool((size > SOLVED).any()):
                break
        if steps == 1 or isinstance(self.loss, SquaredError):
            return gamma
        # Where classes are separated M vanishes, and η goes on by about 1 in each step.
        moved = ((step @ self.design.T).abs() * (weights > 0)).amax(dim=1)
        arrived = (size <= 1e3 * SOLVED) & (moved <= ASTRAY)
        return torch.where(arrived[:, None], gamma, torch.nan)

    def reported(self, gamma: Float[Tensor, "m p"], weights: Float[Tensor, "m n"]) -> Reported:
        """The coefficient and its standard error at γ and w; differentiable in both."""
        kind, p = self.covariance.kind, self.X.shape[1]
        residual, observed, expected = self.moments(gamma)
        known = gamma.isfinite().all(dim=1)
        curvature = self.v * (expected if self.covariance.expected else observed)
        root, fine = _cholesky(
            self.information(torch.where(known[:, None], weights * curvature, 1.0))
        )
        solved = torch.cholesky_solve(self.contrast[None, :, None].expand(len(gamma), -1, -1), root)
        rows = weights.sum(dim=1)
        freedom = rows - p
        groups = None
        if kind == "model":
            squared = (self.contrast * solved[:, :, 0]).sum(dim=1)
            if self.covariance.scale is not None:
                squared = squared * self.covariance.scale
            else:
                chi = (weights * self.v * residual.square() / expected).sum(dim=1)
                squared = squared * chi / freedom
        else:
            z = solved[:, :, 0] @ self.design.T
            pulls = z * self.v * residual
            if kind == "cluster":
                squared, groups = self._clustered(weights * pulls, weights, rows)
            else:
                if kind in ("HC2", "HC3"):
                    leverage = curvature * self._quadratic(torch.cholesky_inverse(root))
                    kept = torch.where(weights > 0, 1 - leverage, 1.0)
                    pulls = pulls / (kept.sqrt() if kind == "HC2" else kept)
                squared = (weights * pulls.square()).sum(dim=1)
                if kind == "HC1":
                    squared = squared * rows / freedom
        fine = fine & known & (squared > 0) & squared.isfinite() & (rows > p)
        squared = torch.where(fine, squared * self.covariance.factor, torch.nan)
        degrees = freedom if groups is None or not self.covariance.by_clusters else groups - 1
        quantile = self._quantile(degrees)
        return Reported(gamma @ self.contrast, squared.sqrt(), quantile)

    def _clustered(
        self, pulls: Float[Tensor, "m n"], weights: Float[Tensor, "m n"], rows: Float[Tensor, " m"]
    ) -> tuple[Tensor, Tensor]:
        """Σ_g (Σ w z u)², and the smallest number of clusters that are left."""
        p = self.X.shape[1]
        total, left = torch.zeros_like(rows), []
        for part, codes in enumerate(self.covariance.clusters):
            count = int(codes.max()) + 1
            empty = torch.zeros(len(pulls), count, dtype=pulls.dtype)
            sums = empty.index_add(1, codes, pulls)
            there = empty.index_add(1, codes, weights.detach()) > 0
            groups = there.sum(dim=1).to(pulls.dtype)
            found = sums.square().sum(dim=1)
            if self.covariance.corrected:
                found = found * groups / (groups - 1) * (rows - 1) / (rows - p)
            total = total + (-found if part == 2 else found)
            if part < 2:
                left.append(groups)
        return total, torch.stack(left).amin(dim=0)

    def _quantile(self, degrees: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        import scipy.special

        share = (1 + self.level) / 2
        if not self.covariance.t:
            return torch.full_like(degrees.detach(), float(scipy.special.ndtri(share)))
        # A line through it, so that the degrees of freedom can be differentiated.
        at = degrees.detach().numpy()
        near = 1e-3
        ends = [scipy.special.stdtrit(at + d, share) for d in (-near, 0.0, near)]
        value, slope = (torch.from_numpy(np.asarray(e)) for e in (ends[1], ends[2] - ends[0]))
        return value + slope / (2 * near) * (degrees - degrees.detach())

    def derivatives(
        self, gamma: Float[Tensor, " p"], weights: Float[Tensor, " n"], side: int
    ) -> tuple[Float[Tensor, " p"], Float[Tensor, " n"]]:
        """∂φ/∂γ and ∂φ/∂w of the estimate or an end of its interval, each with the other held."""
        at, under = gamma.clone().requires_grad_(), weights.clone().requires_grad_()
        with torch.enable_grad():
            value = self.reported(at[None], under[None]).end(side)[0]
        found: tuple[Tensor, ...] = torch.autograd.grad(
            value, (at, under), allow_unused=True, materialize_grads=True
        )
        return found[0].detach(), found[1].detach()  # zeros of PyTorch 2.6 record a graph

    def movements(
        self, gamma: Float[Tensor, " p"], weights: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n p"], Float[Tensor, " n"]]:
        """dγ̂/dwᵢ = M⁻¹ xᵢ uᵢ of every row, and its leverage hᵢ."""
        residual, variance, _ = self.moments(gamma[None])
        curvature = self.v * variance
        root, _ = _cholesky(self.information(weights * curvature))
        spread = torch.cholesky_solve(self.design.T, root[0]).T
        leverage = curvature[0] * (spread * self.design).sum(dim=1)
        return spread * (self.v * residual[0])[:, None], leverage

    def group_steps(
        self,
        gamma: Float[Tensor, " p"],
        weights: Float[Tensor, " n"],
        codes: Int[Tensor, " n"],
        count: int,
    ) -> Float[Tensor, "g p"]:
        """Δγ of leaving out all rows of a group: −(M − M_g)⁻¹ Σ_g xᵢ uᵢ; NaN where none is."""
        residual, variance, _ = self.moments(gamma[None])
        curvature, pull = ((weights * self.v * part)[0] for part in (variance, residual))
        p, q = self.X.shape[1], self.design
        inside = torch.zeros(count, p, p, dtype=q.dtype)
        for begin in range(0, len(q), 4096):
            part = slice(begin, begin + 4096)
            outer = (curvature[part, None] * q[part])[:, :, None] * q[part][:, None, :]
            inside.index_add_(0, codes[part], outer)
        root, fine = _cholesky(inside.sum(dim=0) - inside)
        pulls = torch.zeros(count, p, dtype=q.dtype).index_add(0, codes, pull[:, None] * q)
        steps = torch.cholesky_solve(-pulls[:, :, None], root)[:, :, 0]
        return torch.where(fine[:, None], steps, torch.nan)


def _cholesky(matrices: Float[Tensor, "m p p"]) -> tuple[Tensor, Tensor]:
    """L of each, and whether it is far enough from singular; of the others L is that of I."""
    root, info = torch.linalg.cholesky_ex(matrices)
    pivots = root.diagonal(dim1=-2, dim2=-1).detach().square()
    fine = (info == 0) & (pivots.amin(dim=1) > SINGULAR * pivots.amax(dim=1))
    if bool(fine.all()):
        return root, fine
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    return torch.linalg.cholesky(torch.where(fine[:, None, None], matrices, identity)), fine
