"""Certified removal (Guo, Goldstein, Hannun & van der Maaten 2020), for two convex linear models.

    L_b(θ; D) = Σᵢ ℓ(θᵀxᵢ, yᵢ) + (λ n/2) ‖θ‖² + bᵀθ,     b ~ N(0, σ² I), drawn once and kept secret
    θ ← θ + H⁻¹ Δ,   Δ = λ m θ + Σ_{i ∈ M} ∇ℓᵢ(θ),        H = ∇²L_b(θ; D without M), m = |M|

The Newton step leaves a gradient of L_b on what is left, the *gradient residual*, which is all that
can tell the model from one trained without the examples. Where ℓ'' is Lipschitz with constant γ,
and d = H⁻¹Δ (Corollaries 1 and 2, the data-dependent bound),

    ‖∇L_b(θ + d; D′)‖ ≤ ‖∇L_b(θ; D)‖ + γ ‖X‖₂ ‖d‖ ‖X d‖

γ = 1/4 for the logistic loss, as in the paper; its sharp constant is 1/(6√3) = .096. γ = 0 for
least squares, whose Newton step is exact. Removal is (ε, δ)-certified while the bounds add up to
no more than σ ε / c, δ = 1.5 exp(−c²/2) (Theorem 3, Algorithm 2).

Related: Sekhari et al. (2021) certify by noise on the step instead and count what generalization
costs; Izzo et al. (2021) step at O(d) cost, without a certificate.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import with_parameters
from upweight.errors import NonFinite, NotConverged, NotOffered, SpecError, UnsupportedModel
from upweight.front.opened import opened
from upweight.plot import axes
from upweight.runtime.selection import places
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, Loss, SquaredError
from upweight.task.penalties import L2
from upweight.task.task import Task

LIPSCHITZ: dict[type[Loss], float] = {Bernoulli: 0.25, SquaredError: 0.0}
"""γ of ℓ'', by loss. The losses of the paper; another needs its own constant."""

ROUNDING = 1e-9
"""Of ‖∇L_b‖ where training begins: what may be left where no step lowers it. 1e-14 is usual."""

MOST_STEPS = 100
"""Newton steps of a training. Logistic regressions took up to 12."""


@dataclass(frozen=True)
class Certificate:
    """What is promised of a removal: (ε, δ), and the noise that it is bought with.

        P(A ∈ T) ≤ e^ε P(B ∈ T) + δ   and   P(B ∈ T) ≤ e^ε P(A ∈ T) + δ   for every set T of models

    where A is the model after removing and B one trained without the examples.

    Args:
        epsilon: ε, above 0 and at most 1: the proof for Gaussian noise ends there. At ε = 10 and
            δ = 10⁻⁴ a residual of σε/c really has δ = 2.2 · 10⁻⁴ (Balle & Wang 2018, Theorem 8).
        delta: δ, between 0 and 1.
        sigma: σ, the standard deviation of each entry of b. More buys more removals and costs
            accuracy, and matters against a sum over the data, not a mean.

    Raises:
        SpecError: One of them is out of its range.
    """

    epsilon: float = 1.0
    delta: float = 1e-4
    sigma: float = 10.0

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and 0 < self.delta < 1 and 0 < self.sigma < math.inf):
            raise SpecError(
                "A certificate by Gaussian noise needs 0 < ε ≤ 1, 0 < δ < 1 and a finite σ > 0.",
                f"{self!r}.",
                "an ε above 1, for which the proof does not hold, or no noise, which hides "
                "nothing.",
                "Certificate(epsilon=1.0, delta=1e-4, sigma=10.0), the paper's values.",
            )

    @property
    def c(self) -> float:
        """c = √(2 log(1.5/δ))."""
        return math.sqrt(2 * math.log(1.5 / self.delta))

    @property
    def budget(self) -> float:
        """σ ε / c: how large the gradient residual may be."""
        return self.sigma * self.epsilon / self.c

    def train(self, asked: Any, train: Any, *, seed: int | None = None) -> "Certified":
        """Train by objective perturbation: θ = argmin L_b(θ; D), by Newton's method in float64.

        Args:
            asked: What to train: a `Task` of an `nn.Linear` with one output, loss `Bernoulli()` or
                `SquaredError()` and penalty `L2(λ)` of all its parameters; or a fitted
                `LogisticRegression`, `Ridge` or the like, without an intercept of its own. Its own
                parameters are not used.
            train: The training data, as for the task; (X, y) of an estimator.
            seed: Of b. Who knows it can undo the noise: leave it out but in tests and studies.

        Raises:
            UnsupportedModel: The paper has no certificate for such a model.
            NotConverged: The minimum was not reached.
            UpweightError: From the adapter or the data.

        Cost: a Hessian, n p², and its Cholesky factor, p³/3, for each of about ten steps; one
        eigenvalue of XᵀX.
        """
        found = opened(asked, train)
        problem = _linear(found.task, found.train)
        return self._trained(found.task, asked, problem, torch.zeros_like(problem.b), seed)

    def _trained(
        self, task: Task, asked: Any, problem: "Problem", start: Tensor, seed: int | None
    ) -> "Certified":
        """At the minimum on all rows of a problem, with noise that is drawn for it."""
        drawn = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        b = self.sigma * torch.randn(len(start), generator=drawn, dtype=torch.float64)
        problem = replace(problem, b=b)
        rows = torch.arange(len(problem.X))
        theta = problem.minimum(rows, start)
        residual = float(problem.gradient(theta, rows).norm())
        if not residual < self.budget:
            raise NotConverged(
                "Training must leave less of a gradient than the certificate allows in all.",
                f"‖∇L_b‖ = {residual:.1e}, and a budget of {self.budget:.1e}.",
                "noise so small that rounding of float64 is as large.",
                "a larger Certificate(sigma=...).",
            )
        return Certified(self, task, asked, problem, theta, theta, residual)


@dataclass(frozen=True, eq=False)
class Problem:
    """L_b, on any rows of the data."""

    X: Float[Tensor, "n p"]
    y: Float[Tensor, " n"]
    loss: Loss
    strength: float
    b: Float[Tensor, " p"] = field(repr=False)

    @cached_property
    def spectral_norm(self) -> float:
        """‖X‖₂ of all rows: no less than that of any of them."""
        return math.sqrt(float(torch.linalg.eigvalsh(self.X.mT @ self.X)[-1].clamp_min(0)))

    def gradients(self, theta: Tensor, rows: Tensor) -> Float[Tensor, " p"]:
        """Σ ∇ℓᵢ + λ m θ over the rows: their part of ∇L_b."""
        X = self.X[rows]
        delta = self.loss.gradient((X @ theta)[:, None], self.y[rows][:, None])[:, 0]
        return X.mT @ delta + self.strength * len(rows) * theta

    def gradient(self, theta: Tensor, rows: Tensor) -> Float[Tensor, " p"]:
        """∇L_b(θ) on the rows."""
        return self.gradients(theta, rows) + self.b

    def hessian(self, theta: Tensor, rows: Tensor) -> Float[Tensor, "p p"]:
        """∇²L_b(θ) on the rows."""
        X = self.X[rows]
        curvature = self.loss.hessian((X @ theta)[:, None], self.y[rows][:, None])[:, 0, 0]
        found = X.mT @ (X * curvature[:, None])
        found.diagonal().add_(self.strength * len(rows))
        return found

    def step(self, theta: Tensor, rows: Tensor, right: Tensor) -> Float[Tensor, " p"]:
        """H⁻¹ `right`, H on the rows."""
        factor = torch.linalg.cholesky(self.hessian(theta, rows))
        return torch.cholesky_solve(right[:, None], factor)[:, 0]

    def minimum(self, rows: Tensor, start: Tensor) -> Float[Tensor, " p"]:
        """argmin L_b on the rows: Newton steps, each halved until ‖∇L_b‖ falls.

        Ends where ‖∇L_b‖ is zero to rounding: no step lowers it further.
        """
        theta, norm = start, float(self.gradient(start, rows).norm())
        small = ROUNDING * (norm + float(self.b.norm()))
        for _ in range(MOST_STEPS):
            step = -self.step(theta, rows, self.gradient(theta, rows))
            now = float(self.gradient(theta + step, rows).norm())
            while not now < norm and norm > small and bool((theta + step != theta).any()):
                step = step / 2
                now = float(self.gradient(theta + step, rows).norm())
            if not now < norm:
                break
            theta, norm = theta + step, now
        if norm <= small:
            return theta
        raise NotConverged(
            "Training must end at the minimum of the perturbed objective.",
            f"a gradient norm of {norm:.1e} after {MOST_STEPS} Newton steps.",
            "a penalty so weak that rounding decides, or inputs of very different scales.",
            "scale each row to norm 1, as the paper does, or raise L2(λ).",
            solution=theta,
        )


@dataclass(frozen=True)
class Removal:
    """One Newton step: who left, and what the bound says of it.

    Args:
        examples: Removed together.
        bound: γ ‖X‖₂ ‖d‖ ‖X d‖: what the step adds to the residual at most.
        spent: The residual at most, of all steps so far.
        residual: ‖∇L_b(θ)‖ on what is left, as measured.
    """

    examples: tuple[int, ...]
    bound: float
    spent: float
    residual: float


@dataclass(frozen=True, eq=False)
class Certified(Outcome):
    """A model trained to be unlearned from, after some removals. Immutable: removing gives another.

    Nothing here shows b. `spent` counts the gradient that training left, too.

    Args:
        certificate: What is promised.
        task: What was trained.
        asked: As the user gave it.
        problem: The perturbed objective, secret.
        trained: θ before any removal, `[p]`.
        theta: θ now.
        began: ‖∇L_b‖ that training left.
        removals: The steps so far.
        refitted: θ fitted to what is left with the same b; None before `confirm()`.
    """

    certificate: Certificate
    task: Task
    asked: Any
    problem: Problem = field(repr=False)
    trained: Float[Tensor, " p"] = field(repr=False)
    theta: Float[Tensor, " p"] = field(repr=False)
    began: float
    removals: tuple[Removal, ...] = ()
    refitted: Float[Tensor, " p"] | None = field(default=None, repr=False)

    @property
    def removed(self) -> tuple[int, ...]:
        """Every example that left, in order."""
        return tuple(i for removal in self.removals for i in removal.examples)

    @property
    def kept(self) -> Tensor:
        """Positions of what is left."""
        stays = torch.ones(len(self.problem.X), dtype=torch.bool)
        stays[list(self.removed)] = False
        return stays.nonzero()[:, 0]

    @property
    def spent(self) -> float:
        """The gradient residual at most."""
        return self.removals[-1].spent if self.removals else self.began

    @property
    def residual(self) -> float:
        """The gradient residual as measured, which the certificate does not need."""
        return self.removals[-1].residual if self.removals else self.began

    @property
    def budget(self) -> float:
        """σ ε / c."""
        return self.certificate.budget

    @cached_property
    def model(self) -> Any:
        """A new module at θ; of an estimator a copy of it with these coefficients."""
        return with_parameters(self.asked, self.task, self.theta.to(self.task.theta()))

    # -- removing ---------------------------------------------------------------------------------

    def remove(self, examples: int | Sequence[int]) -> "Certified":
        """The model without the examples, by one Newton step of what is left.

        Several together take one step, whose bound grows with their number squared (Theorem 4):
        one after the other they spend less and take longer.

        Args:
            examples: Positions in the data that it was trained on, whoever left since.

        Raises:
            ShapeError: An example is out of range or named twice.
            SpecError: It has left already, or nothing would be left.
            NotOffered: The budget does not allow it.

        Cost: a Hessian, n p², and its Cholesky factor, p³/3.
        """
        problem = self.problem
        group = places(examples, len(problem.X), "Training examples", least=1)
        kept = self._without(group)
        gone = torch.tensor(group)
        step = problem.step(self.theta, kept, problem.gradients(self.theta, gone))
        theta = self.theta + step
        bound = LIPSCHITZ[type(problem.loss)] * (
            problem.spectral_norm * float(step.norm()) * float((problem.X[kept] @ step).norm())
        )
        residual = float(problem.gradient(theta, kept).norm())
        # No less than what is measured: the bound knows nothing of rounding.
        spent = max(self.spent + bound, residual)
        if not spent <= self.budget:
            raise NotOffered(
                f"A removal is certified while its gradient residual is at most σε/c = "
                f"{self.budget:.4g}.",
                f"{self.spent:.4g} spent, and {bound:.4g} more for {_counted(len(group))}.",
                "as many removals as this noise hides, or an example with great leverage.",
                "certified.retrained(), which draws new noise for what is left and removes them "
                "with certified.retrained(without=examples); or a larger Certificate(sigma=...).",
            )
        done = Removal(tuple(group), bound, spent, residual)
        return replace(self, theta=theta, removals=(*self.removals, done), refitted=None)

    def retrained(
        self, without: int | Sequence[int] = (), *, seed: int | None = None
    ) -> "Certified":
        """Trained from the start on what is left, with new noise and the whole budget.

        Positions are those of what is left: example 5 is another than before.

        Args:
            without: Further examples to leave out, by their positions before.
            seed: As for `Certificate.train`.

        Raises:
            SpecError, ShapeError, NotConverged: As for `remove` and `Certificate.train`.
        """
        more = places(without, len(self.problem.X), "Training examples")
        kept = self._without(more)
        problem = replace(self.problem, X=self.problem.X[kept], y=self.problem.y[kept])
        return self.certificate._trained(self.task, self.asked, problem, self.trained, seed)

    def confirm(self) -> "Certified":
        """The same, with the parameters fitted again to what is left under the same noise.

        It shows how near the steps came. The certificate does not need it, and a deployment that
        can afford it needs no certificate.

        Raises:
            NotConverged: The minimum was not reached.
        """
        return replace(self, refitted=self.problem.minimum(self.kept, self.theta))

    def _without(self, group: Sequence[int]) -> Tensor:
        kept = self.kept
        gone = set(group)
        left = torch.tensor([i for i in kept.tolist() if i not in gone], dtype=torch.long)
        again = sorted(gone.intersection(self.removed))
        if again or not len(left):
            raise SpecError(
                "Each example is removed once, and something must be left.",
                f"examples {again[:5]} have left already." if again else "all that is left.",
                "a request that came twice, or positions of a data set that has shrunk since.",
                "positions in the data of certified.train(...), which certified.kept lists.",
            )
        return left

    # -- the outcome ------------------------------------------------------------------------------

    @property
    def predicted(self) -> Float[Tensor, " p"]:  # type: ignore[override]
        """How far the steps have moved θ since training."""
        return self.theta - self.trained

    @property
    def actual(self) -> Float[Tensor, " p"] | None:  # type: ignore[override]
        """How far fitting again moves it."""
        return None if self.refitted is None else self.refitted - self.trained

    @property
    def distance(self) -> float | None:
        """‖θ − θ_refit‖."""
        return None if self.refitted is None else float((self.theta - self.refitted).norm())

    @property
    def moved(self) -> float | None:
        """‖θ_refit − θ_trained‖."""
        return None if self.actual is None else float(self.actual.norm())

    title = "certified removal"

    @property
    def verdict(self) -> str:
        made = self.certificate
        said = (
            f"{_counted(len(self.removed))} of {len(self.problem.X)} removed: a gradient residual "
            f"of at most {self.spent:.3g}, within the {self.budget:.3g} of "
            f"(ε = {made.epsilon:g}, δ = {made.delta:g})-certified removal"
        )
        if self.distance is None or self.moved is None:
            return f"{said}."
        share = f", {self.distance / self.moved:.2g} of what it moved" if self.moved else ""
        return f"{said}; fitting again ends {self.distance:.2g} away{share}."

    notes = (
        "the certificate is of θ alone: statistics taken of all rows beforehand (scaling, "
        "features, choice of λ) still know them",
        "it assumes that requests do not depend on models published before, and that b stays "
        "secret",
    )

    def frame(self) -> "DataFrame":
        """A row per step: how many left, `bound`, `spent`, the measured `residual`, `budget`."""
        rows = [(len(r.examples), r.bound, r.spent, r.residual, self.budget) for r in self.removals]
        return as_table(rows, columns=["examples", "bound", "spent", "residual", "budget"])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Spent and measured residual after each step, and the budget."""
        ax = axes(ax)
        count = [0]
        for removal in self.removals:
            count.append(count[-1] + len(removal.examples))
        ax.plot(count, [self.began, *(r.spent for r in self.removals)], label="bound, spent")
        ax.plot(count, [self.began, *(r.residual for r in self.removals)], label="measured")
        ax.axhline(self.budget, color="black", linestyle="--", label="budget σε/c")
        ax.set(xlabel="examples removed", ylabel="gradient residual", yscale="log")
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        made = self.certificate
        return {
            "epsilon": made.epsilon,
            "delta": made.delta,
            "sigma": made.sigma,
            "examples": len(self.problem.X),
            "removed": len(self.removed),
            **self._fields("budget", "spent", "residual", "distance", "moved"),
        }


def _counted(count: int) -> str:
    return f"{count} example{'' if count == 1 else 's'}"


def _linear(task: Task, train: Data) -> Problem:
    """The problem of a linear model that the paper certifies, without noise."""
    model, loss, penalty = task.model, task.loss, task.penalty
    against = ""
    if type(model) is not nn.Linear or model.out_features != 1:
        against = f"a {type(model).__name__}" + (
            f" with {model.out_features} outputs" if isinstance(model, nn.Linear) else ""
        )
    elif loss not in (Bernoulli(), SquaredError()):
        against = f"the loss {loss!r}"
    elif task.layout.size != sum(p.numel() for p in model.parameters()):
        against = "frozen parameters"
    elif not (isinstance(penalty, L2) and penalty.strength > 0):
        against = f"the penalty {penalty!r}"
    elif bool(task.layout.mask(penalty.exclude).any()):
        against = f"the penalty {penalty!r}, which leaves out a parameter"
    batch = train.batch(0, len(train)) if len(train) else None
    is_pair = isinstance(batch, tuple) and len(batch) == 2
    if not against and not (is_pair and batch is not None and batch[0].ndim == 2):
        against = "data other than (X, y) of at least one row, with X of shape [n, d]"
    elif not against and not _is_as_called(task, batch):
        against = "outputs other than W x + b"
    if against:
        raise UnsupportedModel(
            "Certified removal is for binary logistic regression and least squares with an L2 "
            "penalty on every parameter: one linear output, unweighted.",
            f"{against}.",
            "a network or a softmax, which have no certificate; or an intercept without a penalty, "
            "for which L is not strongly convex.",
            "uw.Task(nn.Linear(d, 1), uw.Bernoulli(), uw.L2(1e-3)), one class against the rest; of "
            "scikit-learn fit_intercept=False, with a column of ones; else "
            "unlearning.without(...), which promises nothing.",
        )
    assert isinstance(batch, tuple) and isinstance(penalty, L2)
    X, y = (part.double().cpu().clone() for part in batch)
    ones = X.new_ones(len(X), 1)
    # In the order of θ.
    X = torch.cat([X if name == "weight" else ones for name in task.layout.names], dim=1)
    task.loss.check(X[:, :1], y.reshape(-1, 1))
    if not bool(X.isfinite().all() and y.isfinite().all()):
        raise NonFinite(
            "Inputs and targets must be finite.",
            f"{int((~X.isfinite()).sum())} inputs and {int((~y.isfinite()).sum())} targets that "
            "are not.",
            "missing values, or a division by the norm of an empty row.",
            "leave those rows out, or fill them in, before training.",
        )
    return Problem(X, y.reshape(-1), loss, penalty.strength, torch.zeros_like(X[0]))


def _is_as_called(task: Task, batch: Any) -> bool:
    """Whether the task's outputs are the module's own on its inputs: no other forward, no hook."""
    few = task.to_device(tuple(part[:8] for part in batch))
    model = task.model
    assert isinstance(model, nn.Linear)
    with torch.no_grad():
        outputs, targets = task.outputs(task.theta(), few)
        plain = nn.functional.linear(few[0], model.weight, model.bias)
    return torch.equal(targets, few[1]) and torch.allclose(outputs, plain, equal_nan=True)
