"""Robustness of a finding: which few rows carry it?

    ψᵢ = dφ/dwᵢ = ∂φ/∂wᵢ + ∂φ/∂θ · dθ̂/dwᵢ       φ: β_j, or an end of its confidence interval

The smallest set of rows whose removal changes the sign of a coefficient, its significance, or both
(Broderick, Giordano & Meager 2020), or that takes a prediction of a network across a value. Sets
are looked for by linearization, once or again after every removal; whatever is claimed, the model
was fitted again without the rows: by statsmodels itself, or by the recipe of the network.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from upweight.applications.robustness_coefficient import (
    QUESTIONS,
    Target,
    deadline_of,
    fragile,
    of_results,
    require,
    require_limits,
    require_named,
)
from upweight.applications.robustness_fitted import Lead, flip
from upweight.applications.robustness_result import Fragility, Robustness, RobustnessTable
from upweight.applications.subject import subject_of
from upweight.errors import nearest
from upweight.runtime.resources import Resources
from upweight.task.measures import Functional
from upweight.task.recipe import Recipe

__all__ = ["Fragility", "Lead", "Robustness", "RobustnessTable", "amip", "fragile", "table"]


def amip(
    asked: Any,
    coefficient: str | int | None = None,
    target: Target | Functional = "sign",
    *,
    search: Literal["adaptive", "one-shot"] = "adaptive",
    value: float = 0.0,
    level: float = 0.95,
    groups: Any = None,
    most: int | None = None,
    budget: float | None = None,
    queries: Any = None,
    measure: Callable[..., Tensor] | Functional | None = None,
    train: Any = None,
    recipe: Recipe | None = None,
    resources: Resources | None = None,
) -> Robustness:
    """The smallest set found whose removal changes a conclusion, with the refit that confirms it.

    Of statsmodels results (OLS, WLS, Logit, Poisson, GLM with canonical link) a coefficient, with
    the standard error that they report: nonrobust, HC0 to HC3, or cluster, with t or normal
    quantiles as they use. Of a fitted method or an estimator, a measurement of one query or a
    `Functional`.

    Args:
        asked: statsmodels results; or what `Method.fit` gave, or a fitted estimator.
        coefficient: Its name or place; of results only.
        target: "sign": β_j passes `value`. "significance": it is lost where the interval leaves
            `value` out, else gained on the side where the estimate is. "both": the interval comes
            to lie on the other side. Or a `Functional`, which passes `value`.
        search: "adaptive" linearizes again after each removal, exchanges members at the end, and
            gives this set or the fewest along the one-shot order, whichever is smaller; of a fitted
            method it looks for the fewest along the order. "one-shot" gives the set that one
            linearization predicts, and whether it holds when refitted.
        value: What is passed.
        level: Of the confidence interval.
        groups: Labels of what leaves together, one for each row; a Series is paired by its index,
            and a name is a column of the data frame of a formula. None: rows leave one by one.
        most: The largest set to look for, in rows or groups. None: a tenth of them, at least 100.
        budget: Seconds after which to stop searching, and keep what was found.
        queries: Of a fitted method: one query; its measurement passes `value`.
        measure: What is measured of it: `Lead()` unless given, which passes 0 where the
            prediction flips.
        train: Of an estimator, (X, y).
        recipe: How a fitted method's model is fitted again.
        resources: For the refits by `recipe`; a `folder` keeps them.

    Raises:
        SpecError: A coefficient, target or number that means nothing here.
        UnsupportedModel: A model or standard error without a formula here.
        DataError, ShapeError: `groups` do not fit the rows.
        NotOffered: The method cannot predict removals.

    Exact when: never a proof that a smaller set does not exist; what is given was refitted.
    Cost: about k regressions and a shortlist of 16 in each, for n·p² of a few hundred thousand well
    below a second; of a fitted method one question, and about 2 log₂ k trainings.

    Broderick, Giordano & Meager (2020), An automatic finite-sample robustness metric, §2;
    re-linearization as Kuschnig, Zens & Crespo Cuaresma (2021).
    """
    require(
        search in ("adaptive", "one-shot"),
        "search is 'adaptive' or 'one-shot'.",
        f"{search!r}.",
        "search='adaptive'.",
    )
    require(
        isinstance(target, Functional) or target in QUESTIONS,
        "target is 'sign', 'significance', 'both' or a Functional.",
        f"{target!r}.",
        f"target={nearest(target, QUESTIONS)!r}.",
    )
    require_limits(most, budget, level)
    require(np.isfinite(value), "value is a finite number.", f"{value!r}.", "value=0.0.")
    deadline = deadline_of(budget)
    whole = isinstance(target, Functional)
    of_statsmodels = type(asked).__module__.startswith("statsmodels.")
    if not of_statsmodels or whole or queries is not None or measure is not None:
        require(
            coefficient is None,
            "A coefficient by its name, with its standard error, is asked of statsmodels results.",
            f"coefficient={coefficient!r}, beside queries or a Functional, or of a "
            f"{type(asked).__name__}.",
            "target=uw.Coefficient('weight[0, 2]') for an entry of θ of a fitted method.",
        )
        require(
            whole or target == "sign",
            "A measurement of a fitted method has no standard error: it passes a value.",
            f"target={target!r}.",
            "target='sign' with queries=, or pass statsmodels results and a coefficient.",
        )
        require(
            not whole or measure is None,
            "What passes the value is said once.",
            "a Functional as target, and a measure.",
            "leave measure out.",
        )
        subject = subject_of(asked, train, recipe)
        chosen = target if isinstance(target, Functional) else measure
        return flip(
            subject,
            queries,
            Lead() if chosen is None else chosen,
            float(value),
            search,
            None if groups is None else np.asarray(groups),
            most,
            deadline,
            resources,
        )
    named = require_named(asked, coefficient)
    assert not isinstance(target, Functional)
    return of_results(asked, named, target, search, float(value), level, groups, most, deadline)


def table(
    results: Any,
    coefficients: Sequence[str | int] | None = None,
    *,
    targets: Sequence[Target] = QUESTIONS,
    search: Literal["adaptive", "one-shot"] = "adaptive",
    level: float = 0.95,
    groups: Any = None,
    most: int | None = None,
    budget: float | None = None,
) -> RobustnessTable:
    """`amip` of several coefficients and questions: a line of a paper's robustness table each.

    Args:
        results: statsmodels results, or several by name: {"OLS": …, "with controls": …}.
        coefficients: Which; None: all of the fit but its constant. Those that a model does not
            have are left out of its lines.
        targets: Which questions.
        search: As for `amip`, like the next three.
        level: Of the confidence interval.
        groups: Labels of what leaves together.
        most: The largest set to look for.
        budget: Seconds for each question.

    Raises:
        UpweightError: As for `amip`.
    """
    options: dict[str, Any] = {
        "search": search, "level": level, "groups": groups, "most": most, "budget": budget,
    }  # fmt: skip
    models = dict(results) if isinstance(results, Mapping) else {"": results}
    lines = []
    for model, found in models.items():
        names = [str(name) for name in getattr(found.model, "exog_names", ())]
        chosen = [n for n in names if n not in ("const", "Intercept")]
        if coefficients is not None:
            alone = len(models) == 1
            chosen = [c for c in coefficients if alone or not isinstance(c, str) or c in names]  # type: ignore[misc]
        for coefficient in chosen:
            for target in targets:
                answer = amip(found, coefficient, target, **options)
                name = coefficient if isinstance(coefficient, str) else names[coefficient]
                lines.append((str(model), name, answer))
    return RobustnessTable(tuple(lines))
