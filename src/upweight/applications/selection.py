"""Which training rows to keep, and with which weights: chosen on validation, reported on test data.

    φᵢ = S[val, i] = ∂/∂wᵢ (1/q) Σ ℓ(θ̂; z_q)            φᵢ > 0: the row raises the validation loss

`subset` keeps a share of the rows and fits again without weights, as Wang et al. (2020, UIDS) do.
Its rules, for m of n rows:

    drop         the m rows with the smallest φ
    sigmoid      m rows drawn one after the other, with chances ∝ 1/(1 + exp(φᵢ / rms φ))
    iterated     `drop` in five rounds of equal shares, φ taken anew at the refitted model of each
    redundant    the m rows with the largest −S[i, i]: rows that the others already explain leave,
                 which changes the model least (Feldman & Zhang 2020; Sorscher et al. 2022)

The choice overfits the validation set, and `drop` the most. So a gain is stated only where
cross-fitting predicts one: rows are chosen on one half of the validation set, and the change of the
loss is predicted on the other, and the other way round.

`reweight` gives every row a weight instead; see `upweight.applications.reweighting`. `for_target`
chooses a small share for a target, and trains on it beside other choices; see
`upweight.applications.targeting`.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.applications.held_out import (
    Held,
    Refits,
    Splits,
    columns,
    draw_intervals,
    mean_loss_scores,
    splits,
    weighing_one,
)
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.reweighting import Weights, reweight
from upweight.applications.subject import subject_of
from upweight.applications.targeting import Target, for_target
from upweight.errors import MissingContext, SpecError
from upweight.evaluation import bootstrap as intervals
from upweight.evaluation.bootstrap import Bootstrap, Estimate
from upweight.methods.fitted import Fitted
from upweight.notation import loss_in_words
from upweight.plot import axes
from upweight.runtime.resources import Resources
from upweight.runtime.streams import stream
from upweight.scores import Scores
from upweight.task.data import Data
from upweight.task.measures import Loss, measured
from upweight.task.recipe import Recipe

__all__ = ["Choice", "Subset", "Target", "Trial", "Weights", "for_target", "reweight", "subset"]

Rule: TypeAlias = Literal["sigmoid", "drop", "iterated", "redundant"]
"""How rows are chosen."""

ROUNDS = 5
"""Rounds of `iterated`: a fifth of the way, by ratio, in each."""


@dataclass(frozen=True, eq=False)
class Subset(Outcome):
    """The rows to keep, what keeping them is predicted to do, and what it did.

    Args:
        rows: The rows kept, in order.
        n: Of how many.
        rule: How they were chosen.
        why: Why by this rule, in words.
        scores: φᵢ of every row at θ̂, on all of the validation set.
        predicted: Change of the mean validation loss, kept rows less all, each half predicted by
            what the other chose.
        level: Of the intervals.
        actual: Change of the mean test loss after fitting again; None where nothing was.
        everything, kept, random: All rows, these, and as many at random, on the test data.
        change_of_accuracy: On the test data, kept rows less all.
        notes: What went otherwise than asked.
        loss: What the loss is called.
    """

    rows: Int[Tensor, " m"]
    n: int
    rule: Rule
    why: str
    scores: Float[Tensor, " n"]
    predicted: Estimate
    level: float
    actual: Estimate | None = None
    everything: Held | None = None
    kept: Held | None = None
    random: Held | None = None
    change_of_accuracy: Estimate | None = None
    notes: tuple[str, ...] = ()  # type: ignore[assignment]
    loss: str = "of the objective"

    @property
    def expects_gain(self) -> bool:
        """Whether the interval of the predicted change lies below 0: stated before the test."""
        return self.predicted.high < 0

    @property
    def title(self) -> str:
        return f"Keep {len(self.rows)} of {self.n} rows"

    @property
    def is_confirmed(self) -> bool:
        """Whether the interval of the refit's change of the test loss says what was predicted.

        All of it is below 0 where a gain was expected, and none of it where none was.
        """
        if self.actual is None:
            return False
        return self.actual.high < 0 if self.expects_gain else self.actual.low >= 0

    @property
    def verdict(self) -> str:
        kept = f"keeping {len(self.rows)} of {self.n} rows by rule '{self.rule}'"
        told = f"{self.predicted:+.3f} of the validation loss ({self.loss})"
        if self.expects_gain:
            said = f"A gain was predicted from {kept}: {told}"
        else:
            said = f"No gain expected from {kept}: {told} predicted"
        if self.actual is None:
            return said + "; no refit has tried it."
        accuracy = self.change_of_accuracy
        points = "" if accuracy is None else f", accuracy by {100 * accuracy:+.1f} points"
        beside = ""
        if self.random is not None and self.kept is not None:
            beside = f"; as many at random have {self.random.loss.value:.3f}"
            beside += f" against {self.kept.loss.value:.3f}"
        agrees = "after refitting"
        if not self.is_confirmed:
            against = self.actual.low >= 0 if self.expects_gain else self.actual.high < 0
            agrees = "the refit does not agree:" if against else "the refit does not tell:"
        return f"{said}; {agrees} the test loss changes by {self.actual:+.3f}{points}{beside}."

    @property
    def _models(self) -> dict[str, Held | None]:
        return {"all rows": self.everything, "kept rows": self.kept, "random rows": self.random}

    def frame(self) -> "DataFrame":
        """One row per model: all rows, the rows kept, as many at random; on the test data."""
        models, counts = self._models, (self.n, len(self.rows), len(self.rows))
        each = zip(counts, models.values(), strict=True)
        return as_table([{"rows": k, **columns(model)} for k, model in each], models, "model")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Test loss of the three models with intervals, or the predicted change before a refit."""
        ax = axes(ax)
        shown = {name: m.loss for name, m in self._models.items() if m is not None}
        label = "mean test loss"
        if not shown:
            shown, label = {"predicted": self.predicted}, "change of the mean validation loss"
            ax.axvline(0, color="0.7", linewidth=1)
        draw_intervals(ax, shown, label)
        ax.set_title(self.title)
        return ax

    def numbers(self) -> dict[str, Any]:
        found = {"predicted": self.predicted, "actual": self.actual}
        found["change_of_accuracy"] = self.change_of_accuracy
        for name in ("everything", "kept", "random"):
            model: Held | None = getattr(self, name)
            found[f"{name}_loss"] = None if model is None else model.loss
            found[f"{name}_accuracy"] = None if model is None else model.accuracy
        return {
            **self._fields("rule", "why", "n", "rows", "expects_gain"),
            **intervals.summarized(found, self.level),
        }


def subset(
    asked: Any,
    keep: float = 0.7,
    rule: Rule | None = None,
    *,
    validation: Any = None,
    train: Any = None,
    test: Any = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    bootstrap: Bootstrap = Bootstrap(),
    resources: Resources | None = None,
) -> Subset:
    """Choose the rows to keep for a validation set, predict what that does, and fit again.

    For a rule c and the halves A and B of the validation set, with U_A the rows that c leaves out
    for A:

        predicted = mean over z in B of [ℓ(z; θ̂ + Δθ(U_A)) − ℓ(z; θ̂)], and A by U_B

    with Δθ a Newton step (`fitted.removal(evaluate="plugin")`); of `iterated` the change up to the
    refitted model of its last round but one, and such a step from there. The interval draws
    validation examples. The rows themselves are chosen on all of the validation set. The refit
    has wᵢ = 0 for the rows that leave: the objective keeps its 1/n and its penalty, as everywhere.
    A refit is measured, and "iterated" fits the method to it, with running statistics of its own;
    a Newton step keeps those from where it starts.

    Args:
        asked: What `Method.fit` gave; a fitted scikit-learn estimator or statsmodels results; or
            `Scores` of validation examples that still know their model.
        keep: The share of the rows to keep.
        rule: How. None: "iterated" where cross-fitting predicts that it lowers the loss. Otherwise
            no gain is expected, and it is "redundant", unless that is predicted to raise the loss
            more than "iterated" does, by the whole of both intervals.
        validation: Held-out examples that choose. Of `Scores` their queries.
        train: The training data of an estimator, as given to its `fit`.
        test: Held-out examples that report, which nothing has seen. None: nothing is confirmed.
        recipe: How the model is fitted again; an estimator's own where None. "iterated", and any
            confirmation, need one.
        seed: Of the halves, of `sigmoid` and of the random rows.
        bootstrap: How intervals are made.
        resources: With a `folder`, which keeps the refits: an interrupted call resumes. None:
            those of the fitted method.

    Raises:
        SpecError: `keep` or the rule cannot be meant, or there is no recipe where one is needed.
        DataError: Two of the three splits hold the same examples, or there is no validation set.
        NotOffered: The method has no movement of θ to predict with.
        MissingContext: Scores that were read from a file do not know their model.
        StaleStore: The folder keeps the refits of something else.
        UpweightError: From the adapter, the method or the recipe.

    Cost: "drop", "sigmoid": 3 solves and 2 factorizations; "redundant": one `self_influence` and 2
    factorizations; "iterated" and None: 12 trainings and fits of the method. With a test set 3
    trainings.

    Wang, Huang & Chang (2020), Less is better: unweighted data subsampling via influence function.
    """
    if isinstance(asked, Scores):
        asked, validation = _of_scores(asked, validation)
    subject = subject_of(asked, train, recipe)
    fitted = subject.fitted
    using = (fitted.resources if resources is None else resources).within("subset")
    refits = Refits(subject, "A selection of rows", using)
    n = len(fitted.train)
    m = _count(keep, n, rule)
    split = splits(fitted, validation, test, seed)
    if test is not None or rule in (None, "iterated"):
        refits.subject.require_recipe(refits.what)

    trial = Trial(refits, m, seed)
    if rule is None:
        used, predicted, why = _picked(trial, split, bootstrap)
    else:
        used, why = rule, "as asked"
        predicted = intervals.mean(trial.cross_fitted(rule, split), bootstrap)

    choice = trial.chosen(used, split.validation)
    scores = mean_loss_scores(fitted, split.validation)
    found = Subset(
        rows=choice.rows,
        n=n,
        rule=used,
        why=why,
        scores=scores,
        predicted=predicted,
        level=bootstrap.level,
        notes=(*((why,) if rule is None else ()), *trial.notes),
        loss=loss_in_words(fitted.task.loss),
    )
    return found if split.test is None else _confirmed(found, refits, split.test, seed, bootstrap)


# -- choosing -------------------------------------------------------------------------------------


def _picked(trial: "Trial", split: Splits, bootstrap: Bootstrap) -> tuple[Rule, Estimate, str]:
    """The rule of the library's own, what is predicted of it, and why it was picked."""
    iterated = intervals.mean(trial.cross_fitted("iterated", split), bootstrap)
    told = f"'iterated' is predicted to change the validation loss by {iterated:+.3f}"
    if iterated.high < 0:
        return "iterated", iterated, told
    redundant = intervals.mean(trial.cross_fitted("redundant", split), bootstrap)
    if iterated.high < redundant.low:
        # The rows that the others explain least are few, hard or wrong: alone they may say little.
        told += f", which is no gain, and 'redundant' by {redundant:+.3f}"
        return "iterated", iterated, told
    return "redundant", redundant, f"{told}, which is no gain; rows that the others explain leave"


@dataclass(frozen=True, eq=False)
class Choice:
    """Rows kept, and the last step towards them.

    Args:
        rows: In order.
        before: The method at the model from which the last rows left.
        left: Which these were.
    """

    rows: Int[Tensor, " m"]
    before: Fitted
    left: list[int]


class Trial:
    """Choices of m rows, by rule and by validation set, and what is predicted of them."""

    def __init__(self, refits: Refits, m: int, seed: int) -> None:
        self.refits, self.m, self.seed = refits, m, seed
        self.notes: list[str] = []

    @cached_property
    def _redundancy(self) -> Float[Tensor, " n"]:
        return self.refits.fitted.self_influence().cpu().double()

    def cross_fitted(self, rule: Rule, split: Splits) -> Float[Tensor, " q"]:
        """Δℓ of every validation example, predicted from what the other half chose."""
        a, b = split.halves
        return torch.cat([self.predicted(rule, b, a), self.predicted(rule, a, b)])

    def predicted(self, rule: Rule, guide: Data, queries: Data) -> Float[Tensor, " q"]:
        """Δℓ of the queries for the rows that the guide chooses."""
        fitted, choice = self.refits.fitted, self.chosen(rule, guide)
        before = choice.before
        asked = queries if before is fitted else weighing_one(before, queries)
        steps = before.removal(asked, Loss(), [choice.left], evaluate="plugin")
        # `before` may have running statistics of its own, in its task.
        here, start = (
            measured(at.task, at.theta, data, Loss()).cpu()
            for at, data in ((before, asked), (fitted, queries))
        )
        return steps.values[:, 0].cpu().double() + here - start

    def chosen(self, rule: Rule, guide: Data) -> Choice:
        """The rows that a rule keeps for a validation set."""
        fitted = self.refits.fitted
        if rule == "iterated":
            return self._iterated(guide)
        if rule == "redundant":
            kept = self._redundancy.argsort(stable=True)[: self.m]
        else:
            phi = mean_loss_scores(fitted, guide)
            kept = phi.argsort(stable=True)[: self.m] if rule == "drop" else self._drawn(phi)
        return _choice(fitted, torch.arange(len(fitted.train)), kept)

    def _drawn(self, phi: Float[Tensor, " n"]) -> Int[Tensor, " m"]:
        spread = phi.square().mean().sqrt()
        scaled = phi / spread if spread > 0 else phi  # all zero: every row alike
        generator = stream("sigmoid", self.seed)
        # Gumbel's maxima draw without replacement as `multinomial` does, for any number of rows.
        noise = -(-torch.rand(len(phi), generator=generator, dtype=phi.dtype).log()).log()
        return (torch.nn.functional.logsigmoid(-scaled) + noise).topk(self.m).indices

    def _iterated(self, guide: Data) -> Choice:
        here, n = self.refits.fitted, len(self.refits.fitted.train)
        rows, asked = torch.arange(n), guide
        for k in range(1, ROUNDS + 1):
            # wᵢ is 1 for the rows that are left: wᵢ ∂L/∂wᵢ is φᵢ.
            order = rows[mean_loss_scores(here, asked)[rows].argsort(stable=True)]
            kept = order[: round(n * (self.m / n) ** (k / ROUNDS))].sort().values
            if k == ROUNDS or len(kept) == self.m:
                break
            weights = _only(n, kept)
            model = self.refits.attempted(weights)
            if isinstance(model, str):
                self.notes.append(
                    f"round {k} of {ROUNDS} did not train ({model}): the rows still to leave were "
                    "chosen by the scores of the round before"
                )
                break
            here, rows = self.refits.at_weights(model, weights, None), kept
            asked = weighing_one(here, guide)
        return _choice(here, rows, order[: self.m])


def _choice(before: Fitted, rows: Int[Tensor, " r"], kept: Int[Tensor, " m"]) -> Choice:
    """`kept` are some of `rows`, which are what `before` was fitted to."""
    left = _only(len(before.train), rows) - _only(len(before.train), kept)
    return Choice(kept.sort().values, before, left.nonzero()[:, 0].tolist())


def _of_scores(scores: Scores, validation: Any) -> tuple[Fitted, Any]:
    context = scores.context
    if context is None or context.fitted is None:
        raise MissingContext(
            "A selection predicts and refits with the model that was scored.",
            "scores without it.",
            "scores that were read from a file.",
            "pass what Method.fit gave, and validation=….",
        )
    return context.fitted, context.queries if validation is None else validation


def _count(keep: float, n: int, rule: Any) -> int:
    """m, with the rule checked."""
    if rule is not None and rule not in get_args(Rule):
        raise SpecError(
            f"A rule is one of {', '.join(map(repr, get_args(Rule)))}, or None.",
            f"rule={rule!r}.",
            "another name for it.",
            "rule=None, which picks one and says why.",
        )
    m = round(keep * n) if 0 < keep < 1 else 0
    if not 0 < m < n:
        raise SpecError(
            "The share to keep lies between 0 and 1, and keeps some rows but not all.",
            f"keep={keep} of {n} rows.",
            "a percentage, a number of rows, or very few data.",
            "keep=0.7 keeps seven of ten.",
        )
    return m


# -- fitting again --------------------------------------------------------------------------------


def _only(n: int, rows: Int[Tensor, " m"]) -> Float[Tensor, " n"]:
    """w = 1 for these rows and 0 for others: the objective keeps its 1/n and its penalty."""
    return torch.zeros(n, dtype=torch.float64).index_fill_(0, rows, 1.0)


def _confirmed(
    found: Subset, refits: Refits, test: Data, seed: int, bootstrap: Bootstrap
) -> Subset:
    """The same, with the three models fitted again and measured on the test data."""
    n, m = found.n, len(found.rows)
    drawn = torch.randperm(n, generator=stream("random rows", seed))[:m]
    plans = {
        "everything": ("all rows", torch.ones(n, dtype=torch.float64)),
        "kept": ("the kept rows", _only(n, found.rows)),
        "random": ("the random rows", _only(n, drawn)),
    }
    models: dict[str, Any] = {}
    notes = list(found.notes)
    for name, (words, weights) in plans.items():
        model = refits.attempted(weights)
        if isinstance(model, str):
            notes.append(f"the refit on {words} did not train: {model}")
        else:
            models[name] = refits.held(model, test, bootstrap)
    found = replace(found, notes=tuple(notes), **models)
    if found.kept is None or found.everything is None:
        return found
    return replace(
        found,
        actual=found.kept.change_of_loss(found.everything, bootstrap),
        change_of_accuracy=found.kept.change_of_accuracy(found.everything, bootstrap),
    )
