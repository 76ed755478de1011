"""Unlearning: the model without some training examples, and how far it is from a refit.

    θ₋ = θ̂ + Δθ,     Δθ = (H + λI − (1/n) Σ_U Hᵢ)⁻¹ (1/n) Σ_U gᵢ          one Newton step
    θ ← θ − (∇²J(θ, w) + λI)⁻¹ ∇J(θ, w),   wᵢ = 0 for i ∈ U                   further steps
    Δθ = P (1/n) Σ_U gᵢ                                                      by layer: first order

J keeps its 1/n and its penalty, as every removal here does. The step is exact where J is quadratic
in θ. How near it comes is not promised but measured: a refit by the recipe stands beside it.

`Certificate` trains models that make a promise about removals (Guo et al. 2020): binary logistic
regression and least squares with an L2 penalty. For networks there is none.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.certified import Certificate as Certificate
from upweight.applications.certified import Certified as Certified
from upweight.applications.certified import Removal as Removal
from upweight.applications.labels import classes_gone
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.subject import subject_of, with_parameters
from upweight.errors import (
    AssumptionWarning,
    DataError,
    NonFinite,
    NotConverged,
    NotOffered,
    SpecError,
    listed,
)
from upweight.linalg.damping import damped
from upweight.methods.dense import DenseScorer
from upweight.methods.fitted import Fitted
from upweight.plot import axes
from upweight.runtime.resources import Resources
from upweight.runtime.selection import places
from upweight.task.data import Data, batch_size
from upweight.task.params import Layout
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.kept import kept_trainer
from upweight.training.objective import weighted_objective
from upweight.training.weights import removal_weights

__all__ = ["Certificate", "Certified", "Removal", "Unlearned", "without"]

OTHERS = (
    "the refit has its own {names}, which outputs and losses are measured with; the unlearned "
    "model keeps those of the model as it was, which know the removed examples, and distances in "
    "the parameters leave them out"
)
"""Of a refit that is more than its parameters."""

OTHERS_OF_ALL = (
    "even with all the data the recipe ends with {names} other than the model's: that part is no "
    "unlearning"
)
"""Of such a recipe that does not end at the model."""

DRIFT = 0.1
"""Share of the refit's movement that may be the recipe's own before a note says so."""


@dataclass(frozen=True)
class Change:
    """What became of outputs and losses: before, after unlearning, after the refit.

    A refit is measured with its own running statistics, unlearning with those of θ̂.

    Args:
        outputs: Change of the outputs of the queries by unlearning, `[q, c]`.
        refit_outputs: The same by the refit.
        forgotten: Mean loss of the removed examples, before and after, and after the refit.
        losses: The same of the queries.
    """

    outputs: Float[Tensor, "q c"]
    refit_outputs: Float[Tensor, "q c"] | None
    forgotten: tuple[float, float, float | None]
    losses: tuple[float, float, float | None]


@dataclass(frozen=True, eq=False)
class Unlearned(Outcome):
    """A model without some examples, beside the one that was fitted without them.

    Args:
        model: A new module at θ₋, with the running statistics that the model had; of a scikit-learn
            estimator a copy of it with these coefficients.
        parameters: θ₋, by name.
        examples: Who was removed.
        n: Training examples before.
        how: What step was taken, in words.
        layout: What the entries of θ are called.
        predicted: θ₋ − θ̂, `[p]`.
        actual: θ_refit − θ̂, `[p]`; None where nothing was fitted.
        drift: ‖θ(1) − θ̂‖: how far the recipe ends from θ̂ with all the data; None without a refit.
        gradients: ‖∇J(θ, w)‖ of the objective without the examples, at θ̂, after each step.
        refit_gradient: The same where the refit ended.
        change: What became of predictions.
        doubts: What was warned of.
    """

    model: Any = field(repr=False)
    parameters: dict[str, Tensor] = field(repr=False)
    examples: tuple[int, ...]
    n: int
    how: str
    layout: Layout = field(repr=False)
    predicted: Float[Tensor, " p"] = field(repr=False)
    actual: Float[Tensor, " p"] | None = field(repr=False)
    drift: float | None
    gradients: tuple[float, ...]
    refit_gradient: float | None
    change: Change = field(repr=False)
    doubts: tuple[str, ...] = ()

    @property
    def distance(self) -> float | None:
        """‖θ₋ − θ_refit‖."""
        return None if self.actual is None else float((self.predicted - self.actual).norm())

    @property
    def moved(self) -> float | None:
        """‖θ_refit − θ̂‖: how far the refit moved."""
        return None if self.actual is None else float(self.actual.norm())

    @property
    def remaining(self) -> float | None:
        """‖θ₋ − θ_refit‖ / ‖θ_refit − θ̂‖: 0 is the refit, 1 as far from it as θ̂ was."""
        return _ratio(self.distance, self.moved)

    @property
    def remaining_outputs(self) -> float | None:
        """The same of the outputs of the queries."""
        change = self.change
        if change.refit_outputs is None:
            return None
        distance = float((change.outputs - change.refit_outputs).norm())
        return _ratio(distance, float(change.refit_outputs.norm()))

    title = "unlearning"

    @property
    def verdict(self) -> str:
        left_out = f"Without {len(self.examples)} of {self.n} examples, {self.how}"
        many = "" if self.how.endswith("steps") else "s"
        if self.distance is None or self.moved is None:
            return (
                f"{left_out} move{many} the parameters by {float(self.predicted.norm()):.3g} and "
                f"leave{many} a gradient of {self.gradients[-1]:.2g} of {self.gradients[0]:.2g}; "
                "nothing was fitted again to hold it against."
            )
        if self.remaining is None:
            return f"{left_out} end{many} {self.distance:.2g} from the refit, which did not move."
        outputs = self.remaining_outputs
        worse = ""
        if self.remaining >= 1 or (outputs is not None and outputs >= 1):
            worse = ": no nearer than the model as it was"
        said = "" if outputs is None else f", and {_percent(outputs)} of the change in outputs"
        return (
            f"{left_out} leave{many} {_percent(self.remaining)} of the way to the refitted "
            f"parameters ({self.distance:.2g} of {self.moved:.2g}){said}{worse}."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        said = [
            *self.doubts,
            "no certificate: nothing is promised of what can still be learned about the removed "
            "examples, from these parameters or from what else was taken of all the data (scalers, "
            "vocabularies, running statistics, chosen settings)",
        ]
        if self.drift is not None and self.moved is not None and self.drift > DRIFT * self.moved:
            said.append(
                f"the recipe ends {self.drift:.2g} from the model even with all the data, of the "
                f"{self.moved:.2g} that the refit moved: that part is no unlearning"
            )
        if self.gradients[-1] > self.gradients[0]:
            said.append("the gradient without the examples has grown: the step went too far")
        return tuple(said)

    def frame(self) -> "DataFrame":
        """A row per parameter tensor, and one for all: norms of both movements, and distance."""
        parts = self.layout.unflatten(self.predicted)
        beside = None if self.actual is None else self.layout.unflatten(self.actual)
        rows = {k: _row(v, None if beside is None else beside[k]) for k, v in parts.items()}
        rows["(all)"] = _row(self.predicted, self.actual)
        columns = ["predicted", "actual", "distance", "remaining"]
        return as_table(list(rows.values()), list(rows), columns=columns)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Change of each output by unlearning against its change by the refit.

        Without a refit the changes alone, in order.
        """
        ax = axes(ax)
        outputs = self.change.outputs.flatten().cpu()
        if self.change.refit_outputs is None:
            ax.plot(outputs.sort().values.numpy())
            ax.set(xlabel="outputs of the queries, in order", ylabel="change by unlearning")
            return ax
        ax.scatter(self.change.refit_outputs.flatten().cpu().numpy(), outputs.numpy(), s=6)
        ax.axline((0.0, 0.0), slope=1.0, color="black", linewidth=0.8)
        ax.set(xlabel="change of output by the refit", ylabel="change of output by unlearning")
        return ax

    def numbers(self) -> dict[str, Any]:
        change = self.change
        return {
            **self._fields("how", "examples", "n"),
            "predicted": float(self.predicted.norm()),
            **self._fields("moved", "distance", "remaining", "remaining_outputs"),
            **self._fields("drift", "gradients", "refit_gradient"),
            "loss_of_removed": change.forgotten,
            "loss_of_queries": change.losses,
        }


def without(
    asked: Any,
    examples: int | Sequence[int],
    train: Any = None,
    *,
    queries: Any = None,
    steps: int = 1,
    recipe: Recipe | None = None,
    confirm: bool = True,
    resources: Resources | None = None,
) -> Unlearned:
    """The model without some training examples, and how far it is from a refit.

    A step moves θ alone: running statistics of batch normalization stay those of the model as it
    was. A refit by a function has its own, which its outputs and losses are measured with; ‖·‖ is
    of θ alone.

    Args:
        asked: A fitted method; or a fitted scikit-learn estimator, or statsmodels results.
        examples: Who is removed, together.
        train: Of an estimator, (X, y) as given to its `fit`.
        queries: What the change in predictions is measured on; None: the training examples.
        steps: Newton steps at most, each with the curvature of what is left at the parameters
            reached; they end when the gradient no longer falls. More than one needs a curvature
            of all of θ, and is for models at a minimum: it goes on to the minimum without the
            examples, whatever training had left.
        recipe: How to fit again. None: the library's own fit where it is its model; a fitted
            method is then not held against a refit.
        confirm: Whether to fit again at all where the recipe is known.
        resources: With a `folder`, which keeps the refits: an interrupted call resumes. None:
            those of the fitted method.

    Returns:
        The model and what was measured. What was lent is unchanged.

    Raises:
        SpecError: `steps` is below 1.
        ShapeError: An example is out of range or named twice, or nothing would be left.
        DataError: Of a library's classifier, no example of a class would be left.
        NotOffered: The method has no movement of θ; or more steps of a curvature by layer.
        NotConverged: The refit failed; `.solution` is the outcome without it.
        StaleStore: The folder holds refits of another model, recipe or training set.
        UpweightError: From the fit, the adapter or the queries.

    Exact when: J is quadratic in θ, in one step; at the minimum of a convex J after a few.
    Cost: a removal step for each step (one factorization, p³/3, with a curvature of all of θ);
    two fits by the recipe; three passes over the queries.
    """
    if not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1):
        raise SpecError(
            "Unlearning takes one step or more.",
            f"steps={steps!r}.",
            "0 meant as 'until it converges'.",
            "steps=1, or steps=10, which end when the gradient no longer falls.",
        )
    subject = subject_of(asked, train, recipe)
    fitted, task, data = subject.fitted, subject.fitted.task, subject.fitted.train
    group = places(examples, len(data), "Training examples", least=1)
    if not isinstance(asked, Fitted):
        _require_classes(fitted, group)
    weights = removal_weights(len(data), [group]).to(fitted.theta)
    theta, gradients, how, doubts = _stepped(fitted, group, weights, steps)
    _require_finite(theta)
    asked_of = data if queries is None else task.queries(queries)
    removed = data.subset(group)

    def outcome(
        refit: tuple[Task, Tensor] | None, drift: float | None, norm: float | None
    ) -> Unlearned:
        return Unlearned(
            model=with_parameters(asked, task, theta),
            parameters=dict(task.named(theta)),
            examples=tuple(group),
            n=len(data),
            how=how,
            layout=task.layout,
            predicted=theta - fitted.theta,
            actual=None if refit is None else refit[1] - fitted.theta,
            drift=drift,
            gradients=tuple(gradients),
            refit_gradient=norm,
            change=_change(task, asked_of, removed, fitted.theta, theta, refit),
            doubts=tuple(doubts),
        )

    if subject.recipe is None or not confirm:
        return outcome(None, None, None)
    both = torch.cat([torch.ones_like(weights), weights])
    using = (fitted.resources if resources is None else resources).within("unlearning")
    trainer = kept_trainer(subject.recipe, task, data, using)
    made = [trainer(both[k : k + 1]) for k in range(2)]
    failed = [made[k].failures[0] for k in range(2) if made[k].failures]
    if failed:
        raise NotConverged(
            "Holding a model against a refit needs fits that end.",
            f"a fit that did not: {failed[0]}.",
            "too few examples of a class left, or a recipe that diverges.",
            "the outcome without a refit is in error.solution, or pass confirm=False.",
            solution=outcome(None, None, None),
        )
    full, refit = (each.theta[0].to(fitted.theta) for each in made)
    for each, said in zip(made, (OTHERS_OF_ALL, OTHERS), strict=True):
        if each.others:
            doubts.append(said.format(names=listed(list(each.others[0]))))
    norm = float(made[1].gradient_norms[0])
    drift = float((full - fitted.theta).norm())
    own = made[1].task_of(task, 0)
    return outcome((own, refit), drift, norm if norm == norm else None)


def _stepped(
    fitted: Fitted, group: list[int], weights: Tensor, steps: int
) -> tuple[Tensor, list[float], str, list[str]]:
    """θ₋, ‖∇J(θ, w)‖ before and after each step, what was done, and what was warned of."""
    task, data, scorer = fitted.task, fitted.train, fitted.scorer
    dense = isinstance(scorer, DenseScorer)
    if steps > 1 and not dense:
        raise NotOffered(
            "Further Newton steps need the curvature of all of θ without the examples.",
            f"steps={steps} of {fitted.spec!r}.",
            "a curvature by layer, which is learned from all the data.",
            "steps=1, a step to first order; or uw.Influence(uw.GGN()) of a smaller model.",
        )
    objective = weighted_objective(task, data)

    def gradient(theta: Tensor) -> Tensor:
        return objective(theta[None], weights)[1][0]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        theta = fitted.theta + task.layout.flatten(fitted.removal_step(group))
    doubts = []
    for warned in told:
        # One step that misses is mended by the next; what remains is measured in any case.
        if steps > 1 and issubclass(warned.category, AssumptionWarning):
            continue
        doubts.append(str(warned.message))
        warnings.warn(warned.message, stacklevel=3)
    norms = [float(gradient(at).norm()) for at in (fitted.theta, theta)]
    taken = 1
    if steps > 1:
        assert isinstance(scorer, DenseScorer)
        gone = set(group)
        kept = data.subset([i for i in range(len(data)) if i not in gone])
        while taken < steps:
            curvature = scorer.curvature.fit(task, kept, theta, n=len(data))
            solver = scorer.solver
            state = solver.init(damped(curvature, scorer.damping))
            right = gradient(theta)[None]
            moved = theta - solver.solve(state, right).throw().value[0]
            norm = float(gradient(moved).norm())
            if not norm < norms[-1]:
                break
            theta, taken = moved, taken + 1
            norms.append(norm)
    if not dense:
        return theta, norms, "a first-order step by layer", doubts
    return theta, norms, "one Newton step" if taken == 1 else f"{taken} Newton steps", doubts


def _change(
    task: Task,
    queries: Data,
    removed: Data,
    before: Tensor,
    after: Tensor,
    refit: tuple[Task, Tensor] | None,
) -> Change:
    """Outputs and losses at each θ."""
    at = [(task, before), (task, after)] + ([] if refit is None else [refit])
    outputs, losses = zip(*(_measured(*model, queries) for model in at), strict=True)
    forgotten = [_measured(*model, removed)[1] for model in at]
    return Change(
        outputs[1] - outputs[0],
        None if refit is None else outputs[2] - outputs[0],
        (forgotten[0], forgotten[1], None if refit is None else forgotten[2]),
        (losses[0], losses[1], None if refit is None else losses[2]),
    )


def _measured(task: Task, theta: Tensor, data: Data) -> tuple[Float[Tensor, "q c"], float]:
    """Outputs, one row a query, and the mean loss."""
    rows, losses = [], []
    with torch.no_grad():
        for _, _, batch in data.batches(batch_size(task.layout.size, theta.element_size())):
            outputs, targets = task.outputs(theta, task.to_device(batch))
            rows.append(outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None])
            losses.append(task.losses_of(outputs, targets))
    return torch.cat(rows), float(torch.cat(losses).double().mean())


def _require_classes(fitted: Fitted, group: Sequence[int]) -> None:
    """Without all of a class intercepts, which libraries do not penalize, have no limit."""
    for _, name, count in classes_gone(fitted.task, fitted.theta, fitted.train, [group]):
        raise DataError(
            "Some examples of every class must stay, or there is no model without the others.",
            f"all {count} of class {name!r} among the {len(group)}.",
            "a filter by label.",
            "fit an estimator of the other classes, or leave one of the examples in.",
        )


def _require_finite(theta: Tensor) -> None:
    if not bool(theta.isfinite().all()):
        raise NonFinite(
            "The step must end at finite parameters.",
            f"{int((~theta.isfinite()).sum())} of {len(theta)} are not.",
            "a curvature that is singular without these examples.",
            "remove fewer, or give the method a damping.",
        )


def _row(predicted: Tensor, actual: Tensor | None) -> tuple[float | None, ...]:
    norm = float(predicted.norm())
    if actual is None:
        return norm, None, None, None
    distance, moved = float((predicted - actual).norm()), float(actual.norm())
    return norm, moved, distance, _ratio(distance, moved)


def _ratio(distance: float | None, moved: float | None) -> float | None:
    return distance / moved if distance is not None and moved else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
