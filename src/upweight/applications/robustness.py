"""Robustness of a finding: which few rows carry it?

    ψᵢ = dφ/dwᵢ = ∂φ/∂wᵢ + ∂φ/∂θ · dθ̂/dwᵢ       φ: β_j, or an end of its confidence interval

The smallest set of rows whose removal changes the sign of a coefficient, its significance, or both
(Broderick, Giordano & Meager 2020), or that takes a prediction of a network across a value. Sets
are looked for by linearization, once or again after every removal; whatever is claimed, the model
was fitted again without the rows: by statsmodels itself, or by the recipe of the network.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upweight.applications.robustness_fitted import Lead, flip
from upweight.applications.robustness_result import (
    Finding,
    OneShot,
    Path,
    Robustness,
    RobustnessTable,
)
from upweight.applications.smallest_set import Crossing, Linear, Search, Units
from upweight.applications.subject import subject_of
from upweight.errors import DataError, SpecError
from upweight.notation import count
from upweight.runtime.resources import Resources
from upweight.task.measures import Functional
from upweight.task.recipe import Recipe

__all__ = ["Lead", "Robustness", "RobustnessTable", "amip", "table"]

Target = Literal["sign", "significance", "both"]

QUESTIONS: tuple[Target, ...] = ("sign", "significance", "both")


def amip(
    asked: Any,
    coefficient: str | int | None = None,
    *,
    target: Target | Functional = "sign",
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
    _require(
        search in ("adaptive", "one-shot"),
        "search is 'adaptive' or 'one-shot'.",
        f"{search!r}.",
        "search='adaptive'.",
    )
    _require(
        isinstance(target, Functional) or target in QUESTIONS,
        "target is 'sign', 'significance', 'both' or a Functional.",
        f"{target!r}.",
        "target='sign'.",
    )
    _require(
        most is None or (isinstance(most, int) and most >= 1),
        "most counts the rows or groups that may leave, at least 1.",
        f"{most!r}.",
        "most=50, or None.",
    )
    _require(
        budget is None or budget > 0,
        "budget is in seconds.",
        f"{budget!r}.",
        "budget=2.0, or None.",
    )
    _require(np.isfinite(value), "value is a finite number.", f"{value!r}.", "value=0.0.")
    deadline = float("inf") if budget is None else time.monotonic() + budget
    whole = isinstance(target, Functional)
    if not _is_of_statsmodels(asked) or whole or queries is not None or measure is not None:
        _require(
            coefficient is None,
            "A coefficient by its name, with its standard error, is asked of statsmodels results.",
            f"coefficient={coefficient!r}, beside queries or a Functional, or of a "
            f"{type(asked).__name__}.",
            "target=uw.Coefficient('weight[0, 2]') for an entry of θ of a fitted method.",
        )
        _require(
            whole or target == "sign",
            "A measurement of a fitted method has no standard error: it passes a value.",
            f"target={target!r}.",
            "target='sign' with queries=, or pass statsmodels results and a coefficient.",
        )
        _require(
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
    _require(
        coefficient is not None,
        "Of statsmodels results a coefficient is asked about.",
        "none.",
        f"coefficient={_last_name(asked)!r}.",
    )
    _require(0 < level < 1, "level is between 0 and 1.", f"{level!r}.", "level=0.95.")
    assert coefficient is not None and not isinstance(target, Functional)
    return _of_results(
        asked, coefficient, target, search, float(value), level, groups, most, deadline
    )


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
                answer = amip(
                    found,
                    coefficient,
                    target=target,
                    search=search,
                    level=level,
                    groups=groups,
                    most=most,
                    budget=budget,
                )
                name = coefficient if isinstance(coefficient, str) else names[coefficient]
                lines.append((str(model), name, answer))
    return RobustnessTable(tuple(lines))


def _of_results(
    results: Any,
    coefficient: str | int,
    target: Target,
    search: str,
    value: float,
    level: float,
    groups: Any,
    most: int | None,
    deadline: float,
) -> Robustness:
    from upweight.adapters.statsmodels_inference import inference_of, labels_of

    reported = inference_of(results, coefficient, level)
    inference, n, notes = reported.inference, len(reported.rows), list(reported.notes)
    names: Sequence[Hashable] = reported.rows
    if len(set(names)) < n:
        names = range(n)
        notes.append(
            "several rows of the frame have the same label: rows are named by their place in "
            "model.exog"
        )
    labels = names
    units = Units(torch.arange(n), n)
    if groups is not None:
        labels, units = _grouped(labels_of(results, groups, reported.rows))
    start = Finding(reported.estimate.value, reported.estimate.low, reported.estimate.high)
    asked, crossing = question(target, start, value)
    gamma = inference.coordinates(torch.from_numpy(np.array(results.params, dtype=np.float64)))
    gamma = inference.solved(torch.ones(1, n, dtype=torch.float64), gamma[None])[0]
    limit = _most(most, units.count)
    look = Search(inference, crossing, units, gamma, limit, deadline)
    linear = look.linear()

    def refit(members: Sequence[int]) -> Any:
        return reported.refit(look.units.weights([members])[0].numpy() > 0)

    def crossed(estimate: Any) -> bool:
        number = (estimate.low, estimate.value, estimate.high)[crossing.side + 1]
        return bool(number > value if crossing.upward else number < value)

    end, before, fewest, k = None, None, None, None
    members: list[int] = []
    first = None if linear.predicted is None else linear.order[: linear.predicted]
    own = None if first is None else refit(first)
    holds = None if own is None else crossed(own)
    if search == "one-shot":
        if own is not None and first is not None:
            members, end = first, own
            k = len(first) if holds else None
            if own.reason:
                notes.append(f"of the refit without the {len(first)}: {own.reason}")
    else:
        try:
            fewest = look.along(linear.order, linear.predicted)
            look.adaptive()
            look.smaller()
        except KeyboardInterrupt:
            notes.append("the search was interrupted: a longer one may find a smaller set")
        except TimeoutError:
            notes.append("the budget ran out: a longer search may find a smaller set")
        for candidate in reversed(look.kept):
            estimate = refit(candidate)
            if crossed(estimate):
                k, members, end = len(candidate), candidate, estimate
                break
            notes.append(
                f"a set of {len(candidate)} is not given, since statsmodels' refit does not agree"
                + (f": {estimate.reason}" if estimate.reason else "")
            )
    if look.lost:
        notes.append(
            f"{count(look.lost, 'removal')} on the way were set aside: without the {_unit(groups)} "
            "the coefficients are not determined, or a hyperplane separates the classes"
        )
    if k is not None and k > 1:
        again = refit(members[:-1])
        before = None if again.reason else Finding(again.value, again.low, again.high)
    usable = end is not None and not end.reason
    gone = look.units.weights([members])[0] == 0
    return Robustness(
        about=f"coefficient of {reported.name}",
        asked=asked,
        value=value,
        level=level,
        n=n,
        units=units.count,
        unit=_unit(groups),
        start=start,
        one_shot=OneShot(linear.predicted, holds, fewest),
        k=k,
        rows=tuple(label for label, out in zip(names, gone.tolist(), strict=True) if out),
        left_out=tuple(labels[u] for u in members),
        end=Finding(end.value, end.low, end.high) if end is not None and usable else None,
        before=before,
        tried=max(look.tried, len(members), 1 if look.best is None else len(look.best)),
        path=_path(look, linear, members or linear.order[: min(limit, 50)], labels, start),
        by="statsmodels",
        said=tuple(dict.fromkeys(notes)),
    )


def question(target: Target, start: Finding, value: float) -> tuple[str, Crossing]:
    """Which end of the interval passes the value, and in which direction.

    Raises:
        SpecError: The estimate is the value: it has no sign to change.
    """
    above = start.value > value
    if start.value == value:
        raise SpecError(
            "An estimate equal to the value is on neither side of it.",
            f"an estimate of {start.value}, value={value}.",
            "a column without variation, or a coefficient that was constrained.",
            "ask with another value.",
        )
    near = -1 if above else 1
    if target == "sign":
        return "sign", Crossing(0, not above, value)
    if target == "both":
        return "both", Crossing(-near, not above, value)
    if start.low > value or start.high < value:
        return "lose significance", Crossing(near, not above, value)
    return "gain significance", Crossing(near, above, value)


def _path(
    look: Search, linear: Linear, members: Sequence[int], labels: Sequence[Hashable], start: Finding
) -> Path:
    """Every prefix of the set: by the linearization at the start, and fitted again."""
    steps = _steps(len(members))
    effects = torch.stack([linear.effects[side] for side in (0, -1, 1)], dim=1)[list(members)]
    sums = torch.cat([effects.new_zeros(1, 3), -effects.cumsum(dim=0)])[steps]
    begin = torch.tensor([start.value, start.low, start.high], dtype=torch.float64)
    refitted = look.findings([members[:k] for k in steps])
    last = [None if k == 0 or k - 1 not in steps else labels[members[k - 1]] for k in steps]
    return Path(tuple(steps), tuple(last), (begin + sums).numpy(), refitted.numpy())


def _steps(k: int) -> list[int]:
    """Each number up to 200, and a hundred of more."""
    return (
        list(range(k + 1)) if k <= 200 else sorted({*np.linspace(0, k, 100).astype(int).tolist()})
    )


def _grouped(labels: Sequence[Hashable]) -> tuple[list[Hashable], Units]:
    numbers: dict[Hashable, int] = {}
    codes = [numbers.setdefault(label, len(numbers)) for label in labels]
    if len(numbers) < 2:
        raise DataError(
            "Groups that may leave must be at least two.",
            f"{count(len(numbers), 'group')} of {count(len(codes), 'row')}.",
            "a column without variation.",
            "pass a label per row, or leave groups out.",
        )
    return list(numbers), Units(torch.tensor(codes), len(numbers))


def _most(most: int | None, units: int) -> int:
    """A tenth of them, at least 100; never all."""
    return min(max(100, units // 10) if most is None else most, units - 1)


def _unit(groups: Any) -> str:
    return "row" if groups is None else "group"


def _is_of_statsmodels(value: Any) -> bool:
    return type(value).__module__.startswith("statsmodels.")


def _last_name(results: Any) -> str:
    return str(list(results.model.exog_names)[-1])


def _require(fine: bool, required: str, given: str, way_out: str) -> None:
    if not fine:
        raise SpecError(required, given, "an argument of another question.", way_out)
