"""What an application is asked about: a fitted method or a library's model, and its own fit."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from upweight.curvature.hessian import Hessian
from upweight.errors import SpecError
from upweight.front.opened import is_model, opened, own_recipe
from upweight.linalg.cholesky import Cholesky
from upweight.methods.dense import DenseScorer
from upweight.methods.fitted import Fitted
from upweight.methods.influence import Influence
from upweight.task.recipe import Recipe
from upweight.task.task import Task
from upweight.training.function import as_recipe


@dataclass(frozen=True, eq=False)
class Subject:
    """A fitted method, and how its model is fitted again under other data weights.

    Args:
        fitted: At θ̂.
        recipe: The learning algorithm; None where nobody said it.
    """

    fitted: Fitted
    recipe: Recipe | None

    def require_recipe(self, what: str) -> Recipe:
        """The recipe, which `what` needs.

        Raises:
            SpecError: There is none.
        """
        if self.recipe is None:
            raise SpecError(
                f"{what} fits the model again, and must know how.",
                "a fitted method and no recipe.",
                "a network, which does not say how it was trained.",
                "recipe=uw.Training(...), or uw.training.Newton() for a convex objective.",
            )
        return self.recipe


def subject_of(asked: Any, train: Any = None, recipe: Recipe | None = None) -> Subject:
    """A fitted method of whatever was asked about.

    Args:
        asked: What `Method.fit` gave; or a fitted scikit-learn estimator, or statsmodels results,
            to which the exact Hessian of their own objective is fitted.
        train: Of an estimator (X, y) or (X, y, sample_weight), as given to its `fit`.
        recipe: How to fit again. None: the library's own fit where it is its model.

    Raises:
        SpecError: It is none of these, or training data are given beside what has its own.
        UpweightError: From the adapter, or from the fit.
    """
    recipe = as_recipe(recipe)
    if isinstance(asked, Fitted):
        if train is not None:
            raise SpecError(
                "What a method was fitted to is its training data.",
                "a fitted method, and training data beside it.",
                "an argument left from a scikit-learn estimator.",
                "leave the training data out, or fit the method to them.",
            )
        return Subject(asked, recipe)
    if not is_model(asked) or hasattr(asked, "parameters"):
        raise SpecError(
            "An application asks about a fitted method, a fitted scikit-learn estimator, or "
            "statsmodels results.",
            f"a {type(asked).__module__}.{type(asked).__qualname__}.",
            "a network or a task, whose curvature must be chosen, or the class of an estimator.",
            "fit a method to it: fitted = uw.Influence(uw.Hessian()).fit(task, train).",
        )
    found = opened(asked, train)
    fitted = Influence(Hessian(), Cholesky()).fit(found.task, found.train)
    return Subject(fitted, own_recipe(asked) if recipe is None else recipe)


def with_parameters(asked: Any, task: Task, theta: Float[Tensor, " p"]) -> Any:
    """A copy of what was asked about, at other parameters; what was lent is not touched.

    Of a scikit-learn estimator a copy with these coefficients; else the task's module at θ.
    """
    if hasattr(asked, "get_params"):
        import upweight.adapters.sklearn as sk

        return sk.with_parameters(asked, task.named(theta))
    return task.moved_to(theta).model


def curvature_left_out(fitted: Fitted) -> Literal["all", "others"]:
    """Of which examples H is taken when each is left out: for `Fitted.loo_outputs`.

    By layer H may give an example more than all of its leverage; taken for the curvature of the
    others it cannot.
    """
    return "all" if isinstance(fitted.scorer, DenseScorer) else "others"
