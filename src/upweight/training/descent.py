"""argmin J(θ, w) for many w at once: L-BFGS, from a factorized Hessian where there is one.

    θ ← θ − t B ∇J(θ, w)

B starts as P⁻¹, with P a Hessian nearby (or as a multiple of the identity where there is none yet),
and is updated from the last `memory` steps of each model by the two-loop recursion (Nocedal &
Wright 2006, Algorithm 7.4; the multiple is their Eq. 7.20). All models take their steps together:
one product with P⁻¹ and one gradient per step serve every model that has not arrived. Each has its
own step length and leaves when ‖∇J‖ ≤ tol.

For strictly convex J. Near the minimum J changes by less than its rounding; there a step is judged
by its slope, as in the approximate Wolfe condition of Hager & Zhang (2005), Eq. 4.1.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.training.objective import WeightedObjective

HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Minima:
    """Where the descents ended.

    Args:
        theta: One model a row.
        gradient_norms: ‖∇J‖ there.
        stuck: Models for which no step length lowered J, short of the tolerance.
        steps: Steps taken by the slowest.
    """

    theta: Float[Tensor, "s p"]
    gradient_norms: Float[Tensor, " s"]
    stuck: Bool[Tensor, " s"]
    steps: int


def descend(
    objective: WeightedObjective,
    weights: Float[Tensor, "s n"],
    start: Float[Tensor, "s p"],
    precondition: Callable[[Float[Tensor, "a p"]], Float[Tensor, "a p"]] | None,
    *,
    tol: float,
    max_steps: int,
    memory: int,
) -> Minima:
    """Minimize J(·, w_s) for each row of weights. Stops early where `tol` is out of reach.

    Args:
        objective: J and ∇J.
        weights: One row a model.
        start: Where each begins.
        precondition: v ↦ P⁻¹ v, positive definite. None: γI, with γ from the last step.
        tol: Largest ‖∇J‖ that counts as a minimum.
        max_steps: Steps at most.
        memory: Pairs of vectors kept per model.
    """
    theta = start.clone()
    value, gradient = objective(theta, weights)
    norms = torch.linalg.vector_norm(gradient, dim=1)
    stuck = ~norms.isfinite()
    active = torch.arange(len(theta), device=theta.device)
    pairs = _Pairs(memory)
    step = 0
    for step in range(max_steps + 1):
        left = ~(norms[active] <= tol) & ~stuck[active]
        if step == max_steps or not bool(left.any()):
            break
        if not bool(left.all()):
            active = active[left]
            pairs.keep(left)
        direction = -pairs.apply(gradient[active], precondition)
        point = _Point(theta[active], value[active], gradient[active])
        new, found = _line_search(objective, weights[active], point, direction)
        stuck[active] = ~found & ~pairs.any(len(active), found.device)
        pairs.add(new.theta - point.theta, new.gradient - point.gradient, found)
        theta[active], value[active], gradient[active] = new.theta, new.value, new.gradient
        norms[active] = torch.linalg.vector_norm(new.gradient, dim=1)
    return Minima(theta, norms, stuck, step)


@dataclass(frozen=True, eq=False)
class _Point:
    theta: Float[Tensor, "a p"]
    value: Float[Tensor, " a"]
    gradient: Float[Tensor, "a p"]


def _line_search(
    objective: WeightedObjective,
    weights: Float[Tensor, "a n"],
    at: _Point,
    direction: Float[Tensor, "a p"],
) -> tuple[_Point, Bool[Tensor, " a"]]:
    """The first of t = 1, ½, ¼, … that lowers J enough, for each model by itself.

    Models without one keep their place, and are told apart by the mask.
    """
    theta, value, gradient = at.theta.clone(), at.value.clone(), at.gradient.clone()
    slope = (at.gradient * direction).sum(dim=1)
    found = torch.zeros_like(slope, dtype=torch.bool)
    pending: Int[Tensor, " b"] = (slope < 0).nonzero()[:, 0]
    # J carries the rounding of a sum over the data; below this a difference says nothing.
    noise = 1e3 * torch.finfo(value.dtype).eps * at.value.abs()
    length = 1.0
    for _ in range(HALVINGS):
        if len(pending) == 0:
            break
        trial = at.theta[pending] + length * direction[pending]
        f, g = objective(trial, weights[pending])
        new_slope = (g * direction[pending]).sum(dim=1)
        decreased = f <= at.value[pending] + 1e-4 * length * slope[pending]
        level = (f <= at.value[pending] + noise[pending]) & (
            new_slope.abs() <= 0.9 * slope[pending].abs()
        )
        good = (decreased | level) & g.isfinite().all(dim=1)
        rows = pending[good]
        theta[rows], value[rows], gradient[rows] = trial[good], f[good], g[good]
        found[rows] = True
        pending = pending[~good]
        length /= 2
    return _Point(theta, value, gradient), found


class _Pairs:
    """The last steps s and gradient changes y of each model, with ρ = 1/(sᵀy).

    A model whose step failed, or whose sᵀy drowned in rounding, has ρ = 0 there: the pair does
    nothing to it.
    """

    def __init__(self, memory: int) -> None:
        self._kept: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=memory)

    def apply(
        self, gradient: Float[Tensor, "a p"], precondition: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, "a p"]:
        """B ∇J by the two-loop recursion."""
        vector, alphas = gradient.clone(), []
        for s, y, rho in reversed(self._kept):
            alpha = rho * (s * vector).sum(dim=1)
            vector.addcmul_(alpha[:, None], y, value=-1)
            alphas.append(alpha)
        vector = self._scaled(vector) if precondition is None else precondition(vector)
        for (s, y, rho), alpha in zip(self._kept, reversed(alphas), strict=True):
            beta = rho * (y * vector).sum(dim=1)
            vector = torch.addcmul(vector, (alpha - beta)[:, None], s)
        return vector

    def _scaled(self, vector: Float[Tensor, "a p"]) -> Float[Tensor, "a p"]:
        """γ v with γ = sᵀy / yᵀy of the last step; a step of at most length 1 without one."""
        gamma = 1.0 / torch.linalg.vector_norm(vector, dim=1).clamp_min(1.0)
        if self._kept:
            _, y, rho = self._kept[-1]
            curvature = rho * (y * y).sum(dim=1)
            gamma = torch.where(rho > 0, 1.0 / torch.where(rho > 0, curvature, 1.0), gamma)
        return gamma[:, None] * vector

    def add(self, s: Tensor, y: Tensor, found: Bool[Tensor, " a"]) -> None:
        """Remember a step; forget everything about models whose step failed."""
        for kept in self._kept:
            kept[2].mul_(found)
        product = (s * y).sum(dim=1)
        scale = torch.linalg.vector_norm(s, dim=1) * torch.linalg.vector_norm(y, dim=1)
        usable = found & (product > torch.finfo(s.dtype).eps * scale)
        rho = torch.where(usable, 1.0 / torch.where(usable, product, 1.0), 0.0)
        self._kept.append((s, y, rho))

    def any(self, models: int, device: torch.device) -> Bool[Tensor, " a"]:
        """Whether a model remembers any step: if not, its direction was −P⁻¹ ∇J."""
        has = torch.zeros(models, dtype=torch.bool, device=device)
        for _, _, rho in self._kept:
            has |= rho > 0
        return has

    def keep(self, rows: Bool[Tensor, " a"]) -> None:
        """Drop the models that are done."""
        self._kept = deque(
            [(s[rows], y[rows], rho[rows]) for s, y, rho in self._kept], maxlen=self._kept.maxlen
        )
