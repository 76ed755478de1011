"""What answers for an estimator that has no translation? It is fitted again, as the budget allows.

    each row left out           where n + 1 fits end within the budget; of a fit that draws random
                                numbers from `SEEDS` seeds or more
    random subsets              as many as end within it, `FEWEST` or more
    the same of fewer trees     of a forest, where few do: a mean over trees has the same
                                expectation whatever their number

Two fits say beforehand what one takes, whether it gives the model again, and whether it is random.
"""

import sys
from typing import Any

from upweight.errors import SpecError, UnsupportedModel
from upweight.evaluation.check import seconds_of
from upweight.front.choice import PATIENCE, Choice, Facts
from upweight.front.kept import kept_choice
from upweight.methods.method import Method
from upweight.methods.neighbours import FeatureSimilarity, KNNShapley
from upweight.methods.refits import LeaveOneOut, SubsampledInfluence
from upweight.notation import in_short
from upweight.runtime.fingerprint import digest
from upweight.runtime.resources import Resources
from upweight.task.identity import described
from upweight.task.measures import Functional
from upweight.training.kept import training_identity

FEWEST = 30
"""Subsets: each example is in some 15, and in fewer than 2 with a probability of 3e-8."""

SEEDS = 5
"""For a standard error of a random fit without each row."""

MOST_SEEDS = 20

SHARE = 10
"""Of the trees of a forest, one in how many is fitted on each half at most."""

ENOUGH = 100
"""Halves, below which a classifying forest is asked by fewer trees: its probabilities are means
over trees, so that ten halves of a tenth of the trees say more than one of all, for as long."""

FEW_ROWS = 12
"""Fewer have too few halves."""

REFITS = (LeaveOneOut, SubsampledInfluence)
NEIGHBOURS = (KNNShapley, FeatureSimilarity)


def is_refitted(model: Any, method: Method | None) -> bool:
    """Whether an estimator is asked by refits: it has no translation, or the method says so."""
    if not (hasattr(model, "get_params") and hasattr(model, "fit")):
        return False
    import upweight.adapters.sklearn as sk

    return isinstance(method, REFITS) or not sk.supports(model)


def opened_by_outputs(
    model: Any, train: Any, queries: Any, measure: Any, method: Method | None
) -> Any:
    """Its `Outputs`, or those by features where the method looks at neighbours.

    Raises:
        UnsupportedModel: The method needs gradients of the model.
        SpecError: A number of the whole model is asked for, or nothing.
        UpweightError: From the adapter.
    """
    import upweight.adapters.sklearn as sk

    name = type(model).__name__
    if isinstance(measure, Functional) or queries is None:
        raise SpecError(
            f"{name} is asked for a number of each query.",
            f"measure={measure!r}, {'no queries' if queries is None else 'queries'}.",
            "a Functional, which is a number of all parameters.",
            "attribute(estimator, (X, y), (X_test, y_test)).",
        )
    if method is not None and not (method.takes_history or isinstance(method, NEIGHBOURS)):
        raise UnsupportedModel(
            f"{type(method).__name__} needs gradients of the model.",
            f"{name}. {sk.supports(model).reason}.",
            "a model of which outputs alone are known.",
            "leave method= out, and it is fitted again without rows; or LeaveOneOut(), "
            "SubsampledInfluence(subsets=100), or KNNShapley(), which looks at no model.",
        )
    by = sk.by_features if isinstance(method, NEIGHBOURS) else sk.outputs
    return by(model, train, queries)


def of_queries(resources: Resources, rows: Any) -> Resources:
    """A folder of their own in the folder, where there is one: θ holds the outputs of each query.

    Raises:
        SpecError: The queries cannot be distinguished from others.
    """
    if resources.folder is None:
        return resources
    return resources.within(f"queries-{digest(described(rows))[:32]}")


def refit_choice(
    found: Any, budget: str | float | None, resources: Resources
) -> tuple[Choice, Facts, tuple[str, ...], Any]:
    """Which refits the budget allows, and of what; says so on standard error before they begin.

    With a folder in the resources the choice is kept in it: what was interrupted goes on with it.

    Raises:
        DataError: A fit on the data does not give the model again, though every seed is a number.
        SpecError: The budget allows too few.

    Cost: two fits.
    """
    recipe: Any = found.recipe
    n, allowed = len(found.train), PATIENCE if budget is None else seconds_of(budget)

    def about() -> dict[str, str]:
        return {**training_identity(recipe, found.task, found.train), "budget": f"{allowed:g} s"}

    told = kept_choice(resources, about, lambda: _chosen(found, budget, allowed))
    alone, why, seconds = told["alone"], told["why"], told["each"]
    method: Method = LeaveOneOut(told["count"]) if alone else SubsampledInfluence(told["count"])
    choice = Choice(in_short(method), method, why, told["seconds"])
    print(f"upweight: {choice}", file=sys.stderr)
    size, q = found.task.layout.size, len(found.queries)
    facts = Facts(
        parameters=size, outputs=size // (n + q), examples=n, queries=q,
        linear=False, convex=False, curved=False, likelihood=False,
        epoch_seconds=seconds, budget_seconds=allowed, recipe=True, training_seconds=seconds,
        half_seconds=seconds,
    )  # fmt: skip
    fitted = recipe.with_trees(told["trees"]) if told["trees"] else recipe
    return choice, facts, (str(choice), found.says, *told["notes"]), fitted


def _chosen(found: Any, budget: str | float | None, allowed: float) -> dict[str, Any]:
    """The choice as JSON."""
    recipe, n = found.recipe, len(found.train)
    seconds, noise, drift = found.tried()
    notes: tuple[str, ...] = ()
    if drift > 0:
        notes = (
            "the fit is random and has no random_state: scores are of its model from seed 0 on, "
            f"whose outputs differ from this one's by up to {drift:.2g}",
        )
    name, rounds = recipe.name, int(allowed / ((n + 1) * seconds))
    seeds = min(max(rounds, SEEDS), MOST_SEEDS) if noise > 0 else 1
    count = (n + 1) * seeds
    by_row = f"{count:,} fits, about {_told(count * seconds)}"
    random = " from random seeds" if noise > 0 else ""
    alone, trees = count * seconds <= allowed or n < FEW_ROWS, 0
    if alone:
        why, told = f"{name} is fitted again without each row{random}: {by_row}", seeds
    else:
        subsets, whole = int(allowed / seconds), seconds
        if recipe.trees > 1 and subsets < (FEWEST if found.names is None else ENOUGH):
            able = int(recipe.trees * allowed / (ENOUGH * seconds))
            trees = max(1, min(recipe.trees // SHARE, able))
            seconds = recipe.with_trees(trees).timed()
            subsets = int(allowed / seconds)
        if subsets < FEWEST:
            raise SpecError(
                f"The budget must allow {FEWEST} refits.",
                f"{_told(allowed)}, where a fit of {name} takes {_told(seconds)}.",
                "a slow fit." if budget is not None else "a slow fit, and no budget=.",
                f"budget={_said(FEWEST * seconds)!r} or more: {_said(count * whole)!r} is enough "
                "for each row by itself; or method=uw.KNNShapley(), which looks at neighbours and "
                "fits nothing.",
            )
        of_trees = f", each by {trees} of its {recipe.trees} trees" if trees else ""
        all_trees = f"; with all trees budget={_said(ENOUGH * whole)!r}" if trees else ""
        why = (
            f"{name} is fitted again on {subsets:,} random halves{of_trees}, up to "
            f"{_told(subsets * seconds)}{all_trees}; without each row{random} it would be "
            f"{by_row}: budget={_said(count * whole)!r}"
        )
        if found.chosen_from is not None:
            why += f"; {found.chosen_from}"
        count = told = subsets
        if trees:
            notes += (_of_trees(found, trees),)
    return {
        "alone": alone, "count": told, "why": why, "seconds": count * seconds, "each": seconds,
        "notes": list(notes), "trees": trees,
    }  # fmt: skip


def _of_trees(found: Any, trees: int) -> str:
    """What fewer trees mean for the scores."""
    if found.names is not None:
        return (
            f"halves were fitted by {trees} trees: a probability is a mean over trees, whose "
            "expectation is the same whatever their number; a measure that is not linear in it (a "
            f"margin) is that of {trees} trees"
        )
    return (
        f"halves were fitted by {trees} trees: their squared errors have more of the variance "
        "between trees than those of the whole forest"
    )


def _told(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _said(seconds: float) -> str:
    """A budget that allows it, rounded up."""
    return f"{int(1.1 * seconds) + 1} s" if seconds < 90 else f"{int(1.1 * seconds / 60) + 1} min"
