"""Newton: the learning algorithm that minimizes J exactly.

    θ(w) = argmin_θ J(θ, w)          ‖∇J(θ(w), w)‖ ≤ tol

H at θ(1) is factorized once. Every other w is a minimization from θ(1), preconditioned by that
factor: one Newton step of the full data's curvature, then quasi-Newton corrections of it. All
models of a call train together. Nocedal & Wright (2006), §§3.3 and 7.2.

Refuses objectives that are not strictly convex where it meets them: their minimum is not a function
of w.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.hessian import Hessian
from upweight.errors import DtypeError, NotConverged, SpecError, message
from upweight.linalg.cholesky import Cholesky
from upweight.task.check import require_targets
from upweight.task.data import Data
from upweight.task.recipe import Trained
from upweight.task.task import Task
from upweight.training.descent import Minima, descend
from upweight.training.objective import WeightedObjective, weighted_objective

APPROACH = 1e-4
"""By how much ‖∇J‖ falls before the first factorization: steps without one are far cheaper where
the model was not trained yet, and a factor from far away helps little."""

RENEWAL = 12
"""Steps on one factor towards θ(1). Near the minimum half as many do; needing more says that the
factor is of a place too far away, and a new one costs less than going on."""


@dataclass(frozen=True)
class Newton:
    """Minimize J to a gradient norm of `tol`, for twice differentiable strictly convex J.

    Args:
        tol: Largest ‖∇J(θ(w), w)‖, absolute.
        max_steps: Steps before a model counts as not converged.
        memory: Steps that the quasi-Newton correction remembers.

    Exact when: always, to `tol`; for quadratic J with unchanged curvature after one step.
    Cost: one Hessian and its Cholesky factor (p³/3); then, for each step of s models, 2 p² s
    multiply-adds and one gradient of each model over the data. Memory: p² numbers.
    """

    tol: float = 1e-10
    max_steps: int = 200
    memory: int = 10

    def __post_init__(self) -> None:
        if not (self.tol > 0 and self.max_steps >= 1 and self.memory >= 1):
            raise SpecError(
                "Newton needs tol > 0, max_steps ≥ 1 and memory ≥ 1.",
                f"{self!r}.",
                "0 meant as 'as far as it goes', which rounding never reaches.",
                "use tol=1e-12 for the last digits of float64.",
            )

    def prepare(self, task: Task, train: Data) -> "NewtonTrainer":
        """Find θ(1) from the task's own parameters, and factorize the Hessian there.

        Parameters that already minimize J cost one gradient. Others may start anywhere.

        Raises:
            DtypeError: `tol` is below the precision of the parameters.
            NotPositiveDefinite: J is not strictly convex where it was looked at.
            NotConverged: θ(1) was not reached.
            ShapeError: The targets do not fit the outputs.
            DataError: There are no examples, or targets are out of range, as far as a few examples
                say.
        """
        _require_precision(self.tol, task)
        require_targets(task, train, "training data")
        objective = weighted_objective(task, train)
        ones = task.theta().new_ones(1, len(train))
        here = self._approach(objective, ones, task.theta())
        taken = 0
        while True:
            trainer = NewtonTrainer(self, objective, here, _factor(task, train, here))
            center = trainer.minima(ones, min(RENEWAL, self.max_steps - taken))
            taken += center.steps
            here = center.theta[0]
            if bool(center.gradient_norms[0] <= self.tol):
                return NewtonTrainer(self, objective, here, trainer.factor)
            if bool(center.stuck[0]) or taken >= self.max_steps:
                raise NotConverged(_unconverged(self, center), solution=center)

    def _approach(
        self, objective: WeightedObjective, ones: Float[Tensor, "1 n"], theta: Float[Tensor, " p"]
    ) -> Float[Tensor, " p"]:
        """A point near the minimum, without any factorization. It may fall short."""
        norm = float(torch.linalg.vector_norm(objective(theta[None], ones)[1]))
        if norm <= self.tol:
            return theta
        tol = max(self.tol, APPROACH * norm)
        limits = {"max_steps": self.max_steps, "memory": self.memory}
        return descend(objective, ones, theta[None], None, tol=tol, **limits).theta[0]


@dataclass(frozen=True, eq=False)
class NewtonTrainer:
    """w ↦ argmin J(θ, w), ready. Made by `Newton.prepare`."""

    spec: Newton
    objective: WeightedObjective
    center: Float[Tensor, " p"]
    factor: Float[Tensor, "p p"]

    @property
    def at_once(self) -> int:
        """How many models train together in one call."""
        return self.objective.at_once

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """θ(w) for each row, with the reason for each row that has none.

        Raises:
            ShapeError: There is not one weight per training example.
        """
        minima = self.minima(weights.to(self.center), self.spec.max_steps)
        bad = (~(minima.gradient_norms <= self.spec.tol)).nonzero()[:, 0].tolist()
        failures = {row: _reason(self.spec, minima, row) for row in bad}
        return Trained(minima.theta, minima.gradient_norms, failures)

    def minima(self, weights: Float[Tensor, "s n"], max_steps: int) -> Minima:
        """Where the descents from θ(1) end after at most `max_steps`."""
        return descend(
            self.objective,
            weights,
            self.center.expand(len(weights), -1),
            self._solve,
            tol=self.spec.tol,
            max_steps=max_steps,
            memory=self.spec.memory,
        )

    def _solve(self, vectors: Float[Tensor, "a p"]) -> Float[Tensor, "a p"]:
        """(L Lᵀ)⁻¹ v for each row."""
        right = vectors.to(self.factor.dtype).mT
        half = torch.linalg.solve_triangular(self.factor, right, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return whole.mT.to(vectors.dtype)


def _factor(task: Task, train: Data, theta: Float[Tensor, " p"]) -> Float[Tensor, "p p"]:
    """L with L Lᵀ = H at θ, or the solver's own error."""
    solver = Cholesky()
    state = solver.init(Hessian().fit(task, train, theta))
    if state.factor is None:
        solver.solve(state, theta).throw()
    assert state.factor is not None
    return state.factor


def _require_precision(tol: float, task: Task) -> None:
    eps = torch.finfo(task.layout.dtype).eps
    if tol < eps:
        raise DtypeError(
            f"Training to a gradient norm of {tol:.1e} needs parameters of that precision.",
            f"{task.layout.dtype} parameters, whose precision is {eps:.1e}.",
            "a float32 model: the effect of one example would drown in its rounding.",
            "convert model and data to float64, or raise Newton(tol=...).",
        )


def _reason(spec: Newton, minima: Minima, row: int) -> str:
    norm = float(minima.gradient_norms[row])
    if bool(minima.stuck[row]):
        return f"‖∇J‖ = {norm:.1e} > {spec.tol:.1e}, and no step lowers J further"
    return f"‖∇J‖ = {norm:.1e} > {spec.tol:.1e} after {spec.max_steps} steps"


def _unconverged(spec: Newton, minima: Minima) -> str:
    return message(
        f"{spec!r} must reach its tolerance on the full data.",
        f"{_reason(spec, minima, 0)}.",
        "an objective that is not strictly convex, features of very different scales, or a "
        "tolerance below what rounding allows.",
        "scale the features, raise tol or max_steps, or use a recipe of your own.",
    )
