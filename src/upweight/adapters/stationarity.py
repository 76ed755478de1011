"""How far a fitted model is from the minimum of the objective it was translated to.

    distance = √(∇Jᵀ H⁻¹ ∇J) / rmsᵢ (1/n) √(∇ℓᵢᵀ H⁻¹ ∇ℓᵢ)

is the Newton step to the minimum in units of the step that removing one example makes, both in the
norm of H: no unit of features or losses enters. At a distance of 1, stopping early has moved the
model as much as any one of its examples does.

Where classes are separated, or all counts of a group are 0, J has no minimum: it falls for ever
along some direction, and every Newton step goes about 1 further in the outputs. Gradients shrink on
the way as those of the examples do, so the distance says nothing there. It is asked for first.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.hessian import Hessian
from upweight.errors import NotConverged, NotStationary
from upweight.gradients.source import gradient_source
from upweight.linalg.cholesky import Cholesky, CholeskyState
from upweight.linalg.operator import LinearOperator
from upweight.methods.dense import DenseScorer
from upweight.methods.fitted import Fitted
from upweight.runtime import callers
from upweight.task.check import checked_losses
from upweight.task.data import Data, batch_size
from upweight.task.losses import SmoothHinge, SquaredError
from upweight.task.task import Task
from upweight.training.newton import Newton
from upweight.training.objective import weighted_objective

EXAMPLES = 64
"""How many examples, evenly spaced, tell what a typical removal does."""

SILENT = 0.1
"""The part of the tolerance that is not worth a word."""

COSTS = ((0.5, "1 %"), (3.0, "7 %"))
"""How far scores (in norm) were from exact ones, up to a distance, where that was measured."""

ASTRAY = 0.1
"""Largest change of an output by the Newton step that remains, where J may have no minimum."""

FAR = 100.0
"""How many Newton steps away the slope of J is that it has for ever."""

LEVEL = 1e-3
"""The slope of J there, in units of the largest change of an output, that is none."""

ROUNDING = 1e-12
"""‖∇J‖ relative to ‖Hθ‖ below which it is rounding, however small the examples' gradients are."""

TEMPERATURES = (1.0, 0.1, 0.03, 0.01, 0.003)
"""The way down to a small temperature: from each minimum the next is near."""


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a model stands: ∇J, H and the factor of H, each computed once.

    Args:
        task: At θ̂.
        train: Its training data.
        scorer: Of the undamped Hessian by `Cholesky`, where it is known.
    """

    task: Task
    train: Data
    scorer: DenseScorer | None = None

    @cached_property
    def theta(self) -> Float[Tensor, " p"]:
        return self.task.theta()

    @cached_property
    def gradient(self) -> Float[Tensor, " p"]:
        if self.scorer is not None:
            return self.scorer.gradient
        ones = self.theta.new_ones(1, len(self.train))
        return weighted_objective(self.task, self.train)(self.theta[None], ones)[1][0]

    @cached_property
    def hessian(self) -> LinearOperator:
        if self.scorer is not None:
            return self.scorer.operator
        return Hessian().fit(self.task, self.train, self.theta)

    @cached_property
    def state(self) -> CholeskyState:
        if self.scorer is not None:
            state: CholeskyState = self.scorer.state
            return state
        return Cholesky().init(self.hessian)

    @cached_property
    def step(self) -> Float[Tensor, " p"] | None:
        """H⁻¹ ∇J, or None where H is singular to rounding."""
        solution = Cholesky().solve(self.state, self.gradient)
        return solution.value if solution.converged else None

    def solve(self, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """H⁻¹ v where there is a step; what is left of v is not asked for, which takes passes."""
        assert self.state.factor is not None
        return torch.cholesky_solve(vectors.double().mT, self.state.factor).mT.to(vectors)


def distance(at: Standing) -> tuple[float, float]:
    """The distance defined above and ‖∇J‖; without H where H is singular."""
    gradient, task, train = at.gradient, at.task, at.train
    norm = float(gradient.norm())
    if norm <= ROUNDING * float(at.hessian.mv(at.theta).norm()):
        return 0.0, norm
    chosen = torch.linspace(0, len(train) - 1, min(EXAMPLES, len(train))).round().long()
    batch = task.to_device(train.take(chosen))
    rows = gradient_source(task, at.theta, train).rows(batch, len(chosen))
    rows, step = rows / len(train), at.step
    solved = rows if step is None else at.solve(rows)
    typical = (rows * solved).sum(dim=1).mean()
    return float((gradient @ (gradient if step is None else step) / typical).sqrt()), norm


def judged(
    task: Task, train: Data, tolerance: float, name: str, fitted: Fitted | None = None
) -> list[str]:
    """Nothing, a note that is warned of, or an error: by the distance from the minimum.

    Args:
        task: At θ̂.
        train: Its training data.
        tolerance: The largest distance.
        name: Of what was fitted, for messages.
        fitted: The Hessian of the task by `Cholesky`, where it is known; its losses are checked.

    Raises:
        NotStationary: The distance exceeds the tolerance, or J has no minimum.
    """
    if fitted is None:
        checked_losses(task, train, "training data")
        at = Standing(task, train)
    else:
        assert isinstance(fitted.scorer, DenseScorer)
        at = Standing(fitted.task, fitted.train, fitted.scorer)
    require_minimum(at)
    far, norm = distance(at)
    said = (
        f"{name} is {far:.2g} typical removals of one example away from the minimum of its "
        f"objective (‖∇J‖ = {norm:.2g})"
    )
    if not far <= tolerance:
        raise NotStationary(
            "The estimator must be at the minimum of its objective, or nearly.",
            f"{said}; the tolerance is {tolerance:g}.",
            "a fit that stopped early (tol, max_iter, SGD), or data, labels or sample weights "
            "other than it was fitted on.",
            "fit with a smaller tol and larger max_iter on scaled features; or move θ to the "
            "minimum with task(..., minimize=True); or accept it with task(..., tolerance=...)",
        )
    if far <= SILENT * tolerance:
        return []
    told = f"the fit stopped a little early: {said}; {_cost(far)}"
    callers.warn(f"{told}; fit with a smaller tol, as tol=1e-8, for exact scores")
    return [told]


def _cost(far: float) -> str:
    """What a distance did to scores where that was measured (`docs/adapters/sklearn.md`)."""
    within = next((share for most, share in COSTS if far <= most), None)
    if within is None:
        return "scores may be off by a fifth, and single queries altogether"
    return f"where this was measured, scores were within {within} of exact ones"


def require_minimum(at: Standing) -> None:
    """Refuse, by a NotStationary, what falls for ever along the Newton step that remains.

    Asked of the slope of each example's loss a hundred steps on; a penalty that bends along the
    step has the last word. Where H is singular to rounding the way from 0 to θ̂ is looked at in
    place of the step.
    """
    task, train, theta, gradient = at.task, at.train, at.theta, at.gradient
    loss: Any = getattr(task.loss, "base", task.loss)
    if isinstance(loss, SquaredError):  # a parabola has a minimum
        return
    if not bool(gradient.any()):
        return
    step = _newton_step(at.hessian.dense(), gradient) if at.step is None else -at.step
    step = theta if step is None else step
    changes, slopes = [], []
    for _, _, batch in train.batches(batch_size(len(theta), 8)):
        with torch.no_grad():
            here, targets = task.outputs(theta, batch)
            change = (task.outputs(theta + step, batch)[0] - here).flatten(1)
            beyond = (here + FAR * change.reshape(here.shape)).clamp(-(FAR**2), FAR**2)
            slopes.append((task.loss.gradient(beyond, targets) * change).sum(dim=1))
        changes.append(change.abs().amax(dim=1))
    moved, slope = torch.cat(changes), torch.cat(slopes)
    largest = float(moved.max())
    pulls = [task.penalty.gradient(t, task.layout) @ step for t in (theta, theta + FAR * step)]
    is_bounded = float(pulls[1] - pulls[0]) > torch.finfo(step.dtype).eps * float(step @ step)
    if is_bounded or largest <= ASTRAY or float(slope.max()) > LEVEL * largest:
        return
    endless = moved > ASTRAY
    raise NotStationary(
        "The objective must have a minimum.",
        f"one that falls for ever: the outputs of {int(endless.sum())} of {len(train)} "
        f"examples (first {endless.nonzero()[:5, 0].tolist()}) grow without end, and no "
        "example's loss rises. The fit stopped on the way, where the next step moves an output "
        f"by {largest:.2g}.",
        "classes that a hyperplane separates, or a group whose responses are all alike.",
        "leave out the column that tells these examples apart, or them; or fit with a penalty: "
        "scikit-learn's LogisticRegression(C=1.0) or PoissonRegressor(alpha=1.0).",
    )


def _newton_step(
    hessian: Float[Tensor, "p p"], gradient: Float[Tensor, " p"]
) -> Float[Tensor, " p"] | None:
    """−H⁻¹ ∇J, or None where H is singular to rounding.

    Rows and columns are scaled to a diagonal of 1: a group of counts 0 has a variance of e⁻²⁵
    beside others near 1, and is no less determined for that.
    """
    scale = hessian.diagonal().clamp_min(torch.finfo(hessian.dtype).tiny).rsqrt()
    factor, info = torch.linalg.cholesky_ex(scale[:, None] * hessian * scale)
    if int(info) != 0:
        return None
    return -scale * torch.cholesky_solve((scale * gradient)[:, None], factor)[:, 0]


def minimized(task: Task, train: Data) -> tuple[Task, str]:
    """The task at the minimum of J, and how far away that was.

    Raises:
        NotConverged, NotPositiveDefinite: From `Newton`.
        NotStationary: J has no minimum.
    """
    checked_losses(task, train, "training data")
    start = task.theta()
    theta = start
    loss: Any = getattr(task.loss, "base", task.loss)
    if isinstance(loss, SmoothHinge):
        for temperature in TEMPERATURES:
            if temperature > loss.temperature:
                warm = SmoothHinge(temperature)
                whole = warm if loss is task.loss else type(task.loss)(warm)  # type: ignore[call-arg]
                smooth = Task(task.model, whole, task.penalty, task.params, task.forward)
                theta = _minimum(smooth.moved_to(theta), train, 1e-6)
    theta = _minimum(task.moved_to(theta), train, 1e-10)
    found = task.moved_to(theta)
    require_minimum(Standing(found, train))
    moved, size = float((theta - start).norm()), float(start.norm())
    return found, f"θ was moved to the minimum of J by ‖Δθ‖ = {moved:.3g} (‖θ‖ was {size:.3g})"


def _minimum(task: Task, train: Data, tol: float) -> Float[Tensor, " p"]:
    try:
        return Newton(tol=tol, max_steps=500).prepare(task, train).center
    except NotConverged as error:
        if tol < 1e-8:
            raise
        return error.solution.theta[0]
