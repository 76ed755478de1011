"""Which few rows carry a coefficient of statsmodels results? The part that asks its own fit.

sets      searched by formula (`smallest_set`)
claims    statsmodels' own fit of the rows that are left
"""

import time
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from upweight.applications.robustness_result import Finding, Fragility, OneShot, Path, Robustness
from upweight.applications.smallest_set import Crossing, Linear, Search, Units
from upweight.errors import DataError, SpecError
from upweight.notation import count
from upweight.runtime.hardware import threads

Target = Literal["sign", "significance", "both"]

SMALL = 100_000
"""Numbers in a design that one thread has multiplied before several have shared it out."""

QUESTIONS: tuple[Target, ...] = ("sign", "significance", "both")


def fragile(
    results: Any,
    coefficient: str | int,
    targets: Target | Sequence[Target] = QUESTIONS,
    *,
    level: float = 0.95,
    groups: Any = None,
    most: int | None = None,
    budget: float | None = None,
) -> Fragility:
    """The fewest rows found whose removal changes a coefficient's sign, its significance, or both.

    `amip` for each question of one coefficient, in one sentence with the names of the rows.

    Args:
        results: statsmodels results.
        coefficient: Its name or place.
        targets: One question or several; see `amip`.
        level: Of the confidence interval.
        groups: Labels of what leaves together, or a column of the formula's frame.
        most: The largest set to look for. None: a tenth of the rows, at least 100.
        budget: Seconds for each question.

    Raises:
        UpweightError: As for `amip`.

    Cost: that of `amip`, three times.

    Example:
        >>> print(fragile(results, "hs_grad"))
    """
    targets = (targets,) if isinstance(targets, str) else targets
    require(
        len(targets) > 0,
        "targets lists at least one question.",
        f"{targets!r}.",
        "targets=['sign'].",
    )
    for target in targets:
        require(
            target in QUESTIONS,
            "targets are 'sign', 'significance' and 'both'.",
            f"{target!r}.",
            "targets=['sign'].",
        )
    require_limits(most, budget, level)
    found = tuple(
        of_results(
            results, coefficient, target, "adaptive", 0.0, level, groups, most, deadline_of(budget)
        )
        for target in targets
    )
    return Fragility(found)


def of_results(
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
    """One question of one coefficient; arguments as for `upweight.applications.robustness.amip`.

    Thousands of products of small matrices follow one another. Where other programs use the same
    cores, threads that wait for each other after each made that a hundred times slower.
    """
    from upweight.adapters.statsmodels_inference import inference_of, labels_of

    size = np.size(getattr(getattr(results, "model", None), "exog", ()))
    with threads(1 if size <= SMALL else torch.get_num_threads()):
        reported = inference_of(results, coefficient, level)
        inference, n, notes = reported.inference, len(reported.rows), list(reported.notes)
        robust = inference.covariance.kind != "model"
        if robust and target != "sign":
            notes.append(
                f"the interval is that of the fit, cov_type={results.cov_type!r}, here and in "
                "refits"
            )
        names: Sequence[Hashable] = reported.rows
        if len(set(names)) < n:
            names = range(n)
            notes.append(
                "several rows of the frame have the same label: rows are named by their place in "
                "model.exog"
            )
        labels, units, unit = names, Units(torch.arange(n), n), "row"
        if groups is not None:
            unit = "group"
            labels, units = _grouped(labels_of(results, groups, reported.rows))
        start = Finding(reported.estimate.value, reported.estimate.low, reported.estimate.high)
        asked, crossing = question(target, start, value)
        gamma = inference.coordinates(torch.from_numpy(np.array(results.params, dtype=np.float64)))
        gamma = inference.solved(torch.ones(1, n, dtype=torch.float64), gamma[None])[0]
        limit = units.limit(most)
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
                    f"a set of {len(candidate)} is not given, since statsmodels' refit does not "
                    "agree" + (f": {estimate.reason}" if estimate.reason else "")
                )
        if look.lost:
            notes.append(
                f"{count(look.lost, 'removal')} on the way were set aside: without the "
                f"{unit} the coefficients are not determined, or a hyperplane separates "
                "the classes"
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
            unit=unit,
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


def require(fine: bool, required: str, given: str, way_out: str) -> None:
    """Refuse an argument."""
    if not fine:
        raise SpecError(required, given, "an argument of another question.", way_out)


def require_named(results: Any, coefficient: str | int | None) -> str | int:
    """Which coefficient of results is asked about; of a model that was not fitted there is none."""
    from upweight.adapters.statsmodels_regression import loss_of

    loss_of(results)
    if coefficient is None:
        raise SpecError(
            "Of statsmodels results a coefficient is asked about.",
            "none.",
            "an argument of another question.",
            f"coefficient={str(list(results.model.exog_names)[-1])!r}.",
        )
    return coefficient


def require_limits(most: int | None, budget: float | None, level: float) -> None:
    """Refuse limits of a search, and levels of an interval, that mean nothing."""
    require(
        most is None or (isinstance(most, int) and most >= 1),
        "most counts the rows or groups that may leave, at least 1.",
        f"{most!r}.",
        "most=50, or None.",
    )
    require(
        budget is None or budget > 0,
        "budget is in seconds.",
        f"{budget!r}.",
        "budget=2.0, or None.",
    )
    require(0 < level < 1, "level is between 0 and 1.", f"{level!r}.", "level=0.95.")


def deadline_of(budget: float | None) -> float:
    """When a budget of seconds from now ends, by `time.monotonic`."""
    return float("inf") if budget is None else time.monotonic() + budget
