"""What is each contributor of data paid? A statement that adds up, with what it hangs on.

    V_c       = Σ_{i of c} v_i                              worth, as `valuation.values`
    payout_c  = budget · V_c / Σ V                          without a floor
              = max(floor, λ V_c),  λ such that Σ = budget  with one

Additive: without a floor, an account that is split into several is paid the same in sum. A floor
breaks that for accounts of which a part is below it, and the statement says whom it touches.
Efficient: payouts add up to the budget to the cent, by largest remainders: every payout is rounded
down to a cent, and the cents that are left go to the largest remainders, equal ones in the order of
names.

That data should be paid as labour is the argument of Arrieta-Ibarra et al. (2018), Should we treat
data as labor?; they give no estimator.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.right_answers import equal_examples
from upweight.applications.valuation import (
    SHOWN,
    Values,
    bars,
    columns_of,
    correlation,
    joined,
    method_name,
    values,
)
from upweight.errors import DataError, ShapeError, SpecError
from upweight.evaluation.bootstrap import Bootstrap, Estimate, estimates, means
from upweight.notation import bracketed, count, percent
from upweight.plot import axes
from upweight.provenance import Context
from upweight.runtime.resources import Resources
from upweight.runtime.selection import labels_by_place, require_labels
from upweight.scores import Scores, Unit
from upweight.task.data import Data
from upweight.task.recipe import Recipe
from upweight.training.retrain import retrain
from upweight.training.weights import removal_weights

__all__ = ["Copied", "Statement", "if_copied", "statement"]

Money = int | float | str | Decimal

AGREES = 0.5
"""The low end of r with refits from which a statement counts as confirmed: a quarter of how the
refits differ is then explained, beyond chance."""


@dataclass(frozen=True, eq=False)
class Statement(Outcome):
    """Who is paid what, and what that hangs on.

    Args:
        values: The worth of each contributor, with each validation point's share in it.
        examples: How many training examples each gave.
        budget: What is paid out, in cents.
        floor: The least that each is paid, in cents; None: payouts may be negative.
        digits: Decimals of a cent.
        shared: Of each contributor, examples that somebody else gave too; None where the data were
            not at hand.
        actual: By how much the measure gets worse without each contributor, refitted, `[q, c]`.
        bootstrap: How intervals over validation points are made.
    """

    values: Values
    examples: tuple[int, ...]
    budget: int
    floor: int | None
    digits: int
    shared: tuple[int, ...] | None
    actual: Float[Tensor, "q c"] | None
    bootstrap: Bootstrap

    @property
    def contributors(self) -> tuple[str, ...]:
        """Their names, sorted."""
        return self.values.names

    @property
    def predicted(self) -> Float[Tensor, " c"]:
        """V_c: to first order, or as a share, what the validation points lose without c."""
        return self.values.predicted

    @cached_property
    def cents(self) -> tuple[int, ...]:
        """Payouts in cents. They add up to the budget."""
        return rounded(self._paid(self.predicted[None])[0], self.budget)

    @property
    def payouts(self) -> dict[str, Decimal]:
        """Payouts by name. They add up to the budget exactly."""
        return {name: self._money(c) for name, c in zip(self.contributors, self.cents, strict=True)}

    def _money(self, cents: int) -> Decimal:
        return Decimal(cents).scaleb(-self.digits)

    def _paid(self, worth: Float[Tensor, "r c"]) -> Float[Tensor, "r c"]:
        """In cents, before rounding; NaN where nobody is worth anything."""
        return divided(worth, self.budget, self.floor)

    @cached_property
    def intervals(self) -> tuple[Estimate, ...]:
        """Of each payout, before rounding, over validation points drawn with replacement."""
        values, scale = self.values.by_point, 10**self.digits

        def statistic(counts: Float[Tensor, "r q"]) -> Float[Tensor, "r c"]:
            return self._paid(counts @ values / len(values)) / scale

        return estimates(statistic, len(values), self.bootstrap, values.shape[1])

    # -- what it hangs on -------------------------------------------------------------------------

    @cached_property
    def moved_by_point(self) -> Float[Tensor, " q"]:
        """The share of the budget that would go to others without each validation point.

        (1/2) Σ_c |payout without it − payout| over the budget; NaN for one point.
        """
        values = self.values.by_point
        if len(values) == 1:
            return torch.full((1,), torch.nan, dtype=torch.float64)
        without = (values.sum(dim=0) - values) / (len(values) - 1)
        change = self._paid(without) - self._paid(self.predicted[None])
        return change.abs().sum(dim=1) / (2 * self.budget)

    @property
    def at_floor(self) -> tuple[str, ...]:
        """Whose payout the floor raised, or cut to 0."""
        if self.floor is None:
            return ()
        free = divided(self.predicted[None], self.budget, None)[0]
        raised = self._paid(self.predicted[None])[0] <= self.floor
        return tuple(
            name
            for name, is_raised, own in zip(self.contributors, raised, free, strict=True)
            if bool(is_raised) and not float(own) == self.floor
        )

    @property
    def negative(self) -> tuple[str, ...]:
        """Who is worth less than 0."""
        pairs = zip(self.contributors, self.predicted.tolist(), strict=True)
        return tuple(name for name, worth in pairs if worth < 0)

    @cached_property
    def agreement(self) -> Estimate | None:
        """Pearson correlation over contributors of V_c with the refits."""
        if self.actual is None:
            return None
        return correlation(self.predicted, self.actual.mean(dim=0), self.bootstrap)

    @cached_property
    def actual_means(self) -> tuple[Estimate, ...] | None:
        """The refitted loss without each contributor, with its interval over validation points."""
        return None if self.actual is None else means(self.actual, self.bootstrap)

    # -- as an outcome ----------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return (
            f"{self._money(self.budget):,} shared out to "
            f"{count(len(self.contributors), 'contributor')}"
        )

    @property
    def is_confirmed(self) -> bool:
        """Whether all of the interval of the correlation with refits is above `AGREES`."""
        return self.agreement is not None and self.agreement.low > AGREES

    @property
    def verdict(self) -> str:
        best = max(range(len(self.cents)), key=lambda k: self.cents[k])
        interval = self.intervals[best]
        method = method_name(self.values.scores.provenance.method)
        ends = (
            f" [{interval.low:,.2f}, {interval.high:,.2f}]" if interval.low == interval.low else ""
        )
        least = f"; the floor decides for {len(self.at_floor)}" if self.at_floor else ""
        text = (
            f"Of {self._money(self.budget):,} {self.contributors[best]} is paid "
            f"{self._money(self.cents[best]):,}{ends}, the most of "
            f"{count(len(self.cents), 'contributor')}, by {method} over "
            f"{count(len(self.values.by_point), 'validation point')}{least}"
        )
        if self.actual is None:
            return f"{text}; no refit stands behind this."
        if self.agreement is None:
            return f"{text}; too few or equal contributors to say whether refits agree."
        word = "agree" if self.is_confirmed else "do not confirm it"
        return f"{text}; refits without each {word}, r = {bracketed(*self.agreement)}."

    @property
    def notes(self) -> tuple[str, ...]:
        moved = self.moved_by_point
        said = ["who is paid is decided by the validation points that were chosen"]
        if len(moved) > 1 and bool(moved.isfinite().all()):
            k = int(moved.argmax())
            said.append(
                f"leaving out validation point {k} alone would move {percent(float(moved[k]))} of "
                "the budget, the most of all"
            )
        if len(moved) > 1 and (lost := int((~moved.isfinite()).sum())) > 0:
            said.append(
                f"without {count(lost, 'validation point')} nobody would be worth anything, and "
                "intervals leave such draws out"
            )
        if self.negative:
            said.append(
                f"{len(self.negative)} of {len(self.cents)} are worth less than 0: "
                f"{', '.join(self.negative[:5])}{', …' if len(self.negative) > 5 else ''}"
            )
        if self.at_floor:
            said.append(
                f"the floor decides for {len(self.at_floor)}: an account of which a part is worth "
                "less than the floor may gain by a split; without a floor no split changes anything"
            )
        if self.values.scores.unit is Unit.DERIVATIVE and self.negative:
            said.append(
                "derivatives compare with the average contributor, and add up to the penalty's "
                "share of the loss only: Shapley values pay for all of it"
            )
        if self.shared is None:
            said.append("copies were not looked for: the training data were not at hand")
        elif max(self.shared):
            at = self.shared.index(max(self.shared))
            said.append(
                f"{count(sum(self.shared), 'example')} are given by somebody else too, most by "
                f"{self.contributors[at]} ({self.shared[at]}): each copy is paid"
            )
        return tuple(said)

    def frame(self) -> "DataFrame":
        """A row per contributor, the best paid first."""
        table: dict[str, Any] = {
            "payout": [float(self._money(c)) for c in self.cents],
            "low": [e.low for e in self.intervals],
            "high": [e.high for e in self.intervals],
            "examples": list(self.examples),
            "worth": self.predicted.tolist(),
        }
        if self.actual_means is not None:
            names = ("refitted without", "refitted low", "refitted high")
            table |= columns_of(self.actual_means, *names)
        if self.shared is not None:
            table["copies"] = list(self.shared)
        found = as_table(table, self.contributors, "contributor")
        return found.sort_values("payout", ascending=False, kind="stable")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Payouts with their intervals, the best paid first."""
        ax = axes(ax)
        table = self.frame().head(SHOWN)
        bars(ax, [*map(str, table.index)], table[["payout", "low", "high"]].to_numpy())
        ax.set_xlabel("payout")
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "budget": str(self._money(self.budget)),
            "payouts": {name: str(paid) for name, paid in self.payouts.items()},
            "intervals": dict(zip(self.contributors, map(vars, self.intervals), strict=True)),
            "at floor": self.at_floor,
            "worth less than 0": self.negative,
            "most moved by a validation point": float(self.moved_by_point.max()),
            "pearson with refits": self.agreement and vars(self.agreement),
        }


def statement(
    scores: Scores,
    contributors: Iterable[Any],
    budget: Money,
    floor: Money | None = 0,
    *,
    recipe: Recipe | None = None,
    better: Any = None,
    digits: int = 2,
    bootstrap: Bootstrap = Bootstrap(),
    resources: Resources | None = None,
) -> Statement:
    """Share a budget out to the contributors of training data, by what their data are worth.

    Args:
        scores: Of validation points: values or ∂m/∂w of every training example.
        contributors: Who each training example is from: one label each.
        budget: What is paid out, above 0.
        floor: The least that each is paid. 0: nobody owes anything. None: a contributor of negative
            worth has a negative payout, and no split of an account changes anything.
        recipe: How the model is fitted again, without each contributor; None: nothing is confirmed.
        better: As for `valuation.values`.
        digits: Decimals of the currency: 2, or 0 for one without cents.
        bootstrap: How intervals over validation points are made.
        resources: Of the refits: `folder` keeps them, `jobs` shares them out.

    Raises:
        SpecError: The budget is not above 0 or not whole cents, the floors are more than the
            budget, or the scores only rank.
        ShapeError: There is not one contributor per training example, or only one contributor
            where refits are asked for.
        DataError: Nobody is worth more than 0, or without a floor all together are not.
        MissingContext: A recipe is given, and the scores were loaded from disk.
        NotConverged: A refit failed; see `retrain`.

    Additive, when no floor decides: the sum over the parts of a split account is the account's,
    before rounding. Efficient: always, to the cent.
    Cost: two passes over the scores; with a recipe a training per contributor.
    """
    labels = contributors.tolist() if hasattr(contributors, "tolist") else [*contributors]
    by_example = values(scores, better=better, bootstrap=bootstrap)
    scores.require_examples()
    cents = _cents("budget", budget, digits)
    least = None if floor is None else _cents("floor", floor, digits)
    require_labels(labels, "training example")
    names, at = labels_by_place(labels, len(by_example.predicted), "training example")
    if cents <= 0 or (least is not None and not 0 <= least * len(names) <= cents):
        raise SpecError(
            "A budget is above 0, a floor not below 0, and all floors together within the budget.",
            f"budget={budget}, floor={floor}, {count(len(names), 'contributor')}.",
            "a floor per example, or a budget that was spent already.",
            f"a floor of at most {Decimal(max(cents, 0) // len(names)).scaleb(-digits)}, or None.",
        )
    worth = values(scores, contributors=labels, better=better, bootstrap=bootstrap)
    _require_worth(worth, least)
    rows: list[list[int]] = [[] for _ in names]
    for place, which in enumerate(at):
        rows[which].append(place)
    shared = _shared(scores.context, at, len(names))
    actual = None
    if recipe is not None:
        actual = worth.sign * -_changes(scores, recipe, rows, resources)
    sizes = tuple(map(len, rows))
    return Statement(worth, sizes, cents, least, digits, shared, actual, bootstrap)


def _require_worth(worth: Values, floor: int | None) -> None:
    total, best = float(worth.predicted.sum()), float(worth.predicted.max())
    if best <= 0 or (floor is None and total <= 0):
        raise DataError(
            "A budget is shared out by worth above 0"
            + ("." if floor is not None else ", and without a floor their sum is above 0."),
            f"worth between {float(worth.predicted.min()):.3g} and {best:.3g}, {total:.3g} in all.",
            "a measure that is better the other way, validation points of another distribution, "
            "or derivatives, which add up to the penalty's share only.",
            'better="higher" if the measure is one of success; floor=0; or KNNShapley() scores.',
        )


def _changes(
    scores: Scores, recipe: Recipe, rows: Sequence[list[int]], resources: Resources | None
) -> Float[Tensor, "q c"]:
    """m without each contributor, less m with all, refitted."""
    context = scores.require_context()
    if len(rows) < 2:
        raise ShapeError(
            "A refit without a contributor needs others to fit to.",
            "one contributor.",
            "labels of which a filter left one, or a constant column.",
            "labels of at least two contributors, or no recipe.",
        )
    weights = removal_weights(len(context.train), rows)
    found = retrain(
        recipe, context.task, context.train, weights, context.queries, context.measure,
        resources=resources,
    )  # fmt: skip
    return found.change.T.cpu()


def divided(worth: Float[Tensor, "r c"], budget: int, floor: int | None) -> Float[Tensor, "r c"]:
    """Payouts in cents of each row of worth, before rounding; NaN where there is no way.

    Without a floor in proportion. With one max(floor, λ V): those whom λ V leaves below get the
    floor, and λ is found anew for the others, until nobody is left below.
    """
    if floor is None:
        total = worth.sum(dim=1, keepdim=True)
        return budget * worth / torch.where(total > 0, total, torch.nan)
    above = worth > 0
    while True:
        left = budget - floor * (~above).sum(dim=1, keepdim=True)
        total = torch.where(above, worth, 0.0).sum(dim=1, keepdim=True)
        rate = left / torch.where(total > 0, total, torch.nan)
        stay = above & ~(rate * worth < floor)
        if bool((stay == above).all()):
            break
        above = stay
    return torch.where(above, rate * worth, torch.where(rate.isnan(), torch.nan, float(floor)))


def rounded(paid: Float[Tensor, " c"], budget: int) -> tuple[int, ...]:
    """Whole cents that add up to the budget, by largest remainders; equal ones in order."""
    down = paid.floor()
    cents = [int(c) for c in down.tolist()]
    order = (paid - down).argsort(descending=True, stable=True).tolist()
    left = budget - sum(cents)
    for k in order[:left] if left >= 0 else order[left:]:
        cents[k] += 1 if left > 0 else -1
    return tuple(cents)


def _cents(what: str, money: Money, digits: int) -> int:
    """An amount in whole cents.

    Raises:
        SpecError: It is no finite amount, or a fraction of a cent.
    """
    try:
        amount = Decimal(str(money)).scaleb(digits)
        whole = int(amount) if amount.is_finite() else None
    except InvalidOperation:
        whole = None
    if whole is None or whole != amount:
        raise SpecError(
            f"A {what} is a whole number of cents ({digits} decimals).",
            f"{what}={money!r}.",
            "a division that left fractions, NaN, or another currency.",
            f"round it: {what}=1000, or '999.99'; digits=0 for a currency without cents.",
        )
    return whole


# -- copies ---------------------------------------------------------------------------------------


def _shared(context: Context | None, at: Sequence[int], count_: int) -> tuple[int, ...] | None:
    """Of each contributor, how many examples another one gave too, to the last bit."""
    if context is None:
        return None
    shared = [0] * count_
    for rows in equal_examples(context.train):
        if len({at[i] for i in rows}) > 1:
            for i in rows:
                shared[at[i]] += 1
    return tuple(shared)


@dataclass(frozen=True, eq=False)
class Copied(Outcome):
    """What somebody would be paid who gave another's data once more under a name of their own.

    Args:
        who: Whose data are copied.
        before, after: The statements without and with the copy.
        copier: The name of the copy.
        refitted: Whether the model was fitted to the data with the copy.
    """

    who: str
    before: Statement
    after: Statement
    copier: str
    refitted: bool

    @property
    def predicted(self) -> dict[str, Decimal]:
        """Payouts without the copy."""
        return self.before.payouts

    @property
    def actual(self) -> dict[str, Decimal]:
        """Payouts with it, valued again."""
        return self.after.payouts

    @property
    def title(self) -> str:
        return f"If the data of {self.who} were given twice"

    @property
    def is_confirmed(self) -> bool:
        """Whether the data with the copy were really valued again: always."""
        return True

    @property
    def verdict(self) -> str:
        before, after = self.before.payouts, self.after.payouts
        both = after[self.who] + after[self.copier]
        return (
            f"Whoever copies {self.who} is paid {after[self.copier]:,} for nothing new; "
            f"{self.who} is paid {after[self.who]:,} in place of {before[self.who]:,}, both "
            f"together {both:,}."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "valued again with the copy in the data"
            + (", and the model fitted to them" if self.refitted else ""),
        )

    def frame(self) -> "DataFrame":
        """Payouts without and with the copy."""
        before, after = self.before.payouts, self.after.payouts
        columns = {
            "without the copy": [float(before.get(name, 0)) for name in after],
            "with it": [float(paid) for paid in after.values()],
        }
        return as_table(columns, list(after), "contributor")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Payouts with the copy against those without."""
        ax = axes(ax)
        table = self.frame()
        ax.scatter(table["without the copy"], table["with it"], s=16)
        end = float(table.to_numpy().max())
        ax.plot([0, end], [0, end], color="0.6", linewidth=0.8)
        ax.set(xlabel="payout without the copy", ylabel="payout with it")
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "before": {name: str(paid) for name, paid in self.before.payouts.items()},
            "after": {name: str(paid) for name, paid in self.after.payouts.items()},
        }


def if_copied(
    scores: Scores,
    contributors: Iterable[Any],
    budget: Money,
    who: Any,
    floor: Money | None = 0,
    *,
    recipe: Recipe | None = None,
    better: Any = None,
    digits: int = 2,
) -> Copied:
    """What a copy of one contributor's data under another name would be paid.

    The data with the copy are valued by the same method. Values of neighbours need no model; of
    other methods the model is first fitted to the data with the copy, by the recipe.

    Args:
        scores: As for `statement`, with the data that they were made from.
        contributors: As for `statement`.
        budget: As for `statement`.
        who: Whose data are copied.
        floor: As for `statement`.
        recipe: Of methods that look at the model.
        better: As for `statement`.
        digits: As for `statement`.

    Raises:
        SpecError: There is no such contributor, or no recipe for a method that looks at the model.
        MissingContext: The scores were loaded from disk.
        DataError: The examples are no tensors of one form; or as for `statement`.
    """
    context = scores.require_context()
    given = contributors.tolist() if hasattr(contributors, "tolist") else [*contributors]
    require_labels(given, "training example")
    labels = [str(label) for label in given]
    before = statement(scores, labels, budget, floor, better=better, digits=digits)
    rows = [place for place, label in enumerate(labels) if label == str(who)]
    spec = context.fitted.spec
    looks_at_model = not method_name(repr(spec)) == "KNNShapley"
    if not rows or (looks_at_model and recipe is None):
        raise SpecError(
            "A copy is of a contributor, and is valued by a method, of a model fitted with it.",
            f"who={who!r} among {sorted(set(labels))[:5]}, "
            f"{method_name(repr(spec))} with recipe={'given' if recipe else None}.",
            "a name that was not among the labels, or a network that does not say how it was "
            "trained.",
            "a label of contributors=; recipe=uw.Training(...) or uw.training.Newton(); or scores "
            "of KNNShapley().",
        )
    both: Data = joined(context.train, context.train.subset(rows))
    task = context.task
    if recipe is not None:
        trained = recipe.prepare(task, both)(torch.ones(1, len(both), dtype=torch.float64))
        task = trained.task_of(task, 0).moved_to(trained.theta[0])
    copier = f"copy of {who}"
    history = {"history": recipe} if spec.takes_history else {}
    again = spec.fit(task, both, **history).attribute(context.queries, context.measure)
    after = statement(
        again, [*labels, *([copier] * len(rows))], budget, floor, better=better, digits=digits
    )
    return Copied(str(who), before, after, copier, recipe is not None)
