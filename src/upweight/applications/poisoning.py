"""Poisoning: from a few inputs that misbehave to the training rows that taught it, and a clean fit.

A backdoor (Gu et al. 2017; Chen et al. 2017) is a trigger in the input that makes a model answer
with the attacker's class t, learned from a few training rows that carry both. Rows are ranked by
how much they raise the attack's output over triggered queries x′ and their clean originals x:

    m     = mean_q [ z_t(x′_q) − z_t(x_q) ],      z_t = f_t − mean_c f_c       a contrast on logits
    S[i]  = ∂m/∂wᵢ, or the score of any other method of `uw`

A loss or a log-probability is the wrong question: it is saturated on the triggered image, and its
gradient on the clean one is large. Which method: a network fits its poisoned rows until their
residuals, and so their gradients, nearly vanish; every score in ∂m/∂w is in proportion to them. The
cosine of gradients (`uw.GradientCosine()`) takes that size out, and at untrained models nothing has
been fitted yet. For models that cannot fit every row the plain product (`uw.GradientDot()`) does as
well. `suspects` takes any method, `cleanse` may be given the rankings of several and lets refits
decide.

`suspects` ranks and claims nothing. `cleanse` removes the first k rows for several k, fits again
from the start each time, chooses k on one half of the triggered images and reports on the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight._typing import Axes, Batch, DataFrame, Params
from upweight.applications.held_out import class_of
from upweight.applications.outcome import Outcome, as_table
from upweight.errors import DataError, NonFinite, NotConverged, ShapeError, SpecError
from upweight.evaluation import bootstrap, mislabel
from upweight.evaluation.bootstrap import Bootstrap, Estimate, wilson
from upweight.methods.fitted import Fitted
from upweight.methods.members import members_given
from upweight.plot import axes, reaches
from upweight.runtime.fingerprint import described, digest
from upweight.runtime.resources import Resources
from upweight.runtime.selection import is_row, places
from upweight.runtime.streams import stream
from upweight.scores import Unit
from upweight.task.data import Data, batch_size
from upweight.task.measures import Functional, as_measure
from upweight.task.recipe import Recipe, Trained
from upweight.task.task import Task
from upweight.training.kept import kept_trainer
from upweight.training.weights import removal_weights

__all__ = ["Cleansed", "Contrast", "Detected", "Removed", "Suspects", "cleanse", "suspects"]

SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
"""Of the training rows, removed in turn where no counts are given."""

SHOWN = 5
"""Rows that a verdict names."""


@dataclass(frozen=True)
class Contrast:
    """m = mean_q [z_t(x′_q) − z_t(x_q)], z_t = f_t − mean_c f_c, for the attack's class t.

    Without clean originals m = mean_q z_t(x′_q), which also raises what the class looks like. Of
    one output f of two classes z₁ = f and z₀ = −f. Adding a constant to all outputs changes
    nothing.
    """


@dataclass(frozen=True, eq=False)
class _Question:
    """The measure, averaged over the queries, as the function of a `Functional`."""

    measure: Any
    target: int
    clean: Batch | None

    def __repr__(self) -> str:
        leaves = tree_leaves(self.clean)
        told = digest(*[leaf if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves])
        return f"_Question({described(self.measure)}, target={self.target}, clean={told[:12]})"

    def __call__(self, task: Task, params: Params, queries: Any, weights: Tensor) -> Tensor:
        if not isinstance(self.measure, Contrast):
            return as_measure(self.measure)(task, params, queries).mean()
        raised = _centered(task.outputs(params, queries)[0], self.target)
        if self.clean is not None:
            raised = raised - _centered(task.outputs(params, self.clean)[0], self.target)
        return raised.mean()


@dataclass(frozen=True)
class Detected:
    """How a ranking compares with the truth, where somebody knows it.

    Args:
        auroc: P(a poisoned row is ranked above a clean one), over all rows.
        within_class: The same among the rows that carry the attack's class: of all rows, the label
            alone separates most. None where all of these, or none, are poisoned.
        precision: Share of poisoned rows among the first k, k the number of poisoned rows.
        poisoned: k.
    """

    auroc: Estimate
    within_class: Estimate | None
    precision: float
    poisoned: int

    def __str__(self) -> str:
        inside = "" if self.within_class is None else f", within the class {self.within_class}"
        return (
            f"AUROC {self.auroc}{inside}; {100 * self.precision:.0f} % of the first "
            f"{self.poisoned} rows are poisoned"
        )


@dataclass(frozen=True, eq=False)
class Suspects(Outcome):
    """Training rows, ranked by what raises the attack's output. A ranking is no proof.

    Args:
        fitted: The method, at the model that misbehaves.
        target: t, the class that the attack asks for.
        predicted: Score of each training row, `[n]`; the largest is the most suspect.
        actual: None: nothing was fitted again; `cleanse` does.
        labels: Class that each training row carries, `[n]`.
        question: The measure that was asked, as one number of the model.
        queries: The triggered queries.
        value: m at θ̂: 0 where the trigger changes nothing.
        hits: How many of the queries the model assigns to t.
        paired: Whether their clean originals were given.
        states: Other states of the model over which the scores are averaged, besides θ̂.
    """

    fitted: Fitted = field(repr=False)
    target: int
    predicted: Float[Tensor, " n"] = field(repr=False)
    labels: Int[Tensor, " n"] = field(repr=False)
    question: Functional = field(repr=False)
    queries: Data = field(repr=False)
    value: float
    hits: int
    paired: bool
    states: int = 0
    actual: None = None

    @property
    def order(self) -> Int[Tensor, " n"]:
        """Training rows, the most suspect first."""
        return self.predicted.argsort(descending=True, stable=True)

    @property
    def method(self) -> str:
        """The method that scored, as Python."""
        states = f" at θ̂ and {self.states} other states" if self.states else ""
        return f"{described(self.fitted.spec)}{states}"

    @property
    def asked(self) -> str:
        """What was asked, as Python."""
        return described(self.question.function.measure)  # type: ignore[attr-defined]

    def top(self, k: int = 20) -> list[int]:
        """The k most suspect training rows."""
        found: list[int] = self.order[:k].tolist()
        return found

    def against(
        self,
        poisoned: Sequence[int] | Bool[Tensor, " n"],
        bootstrap: Bootstrap = Bootstrap(),
    ) -> Detected:
        """The ranking against the truth, for studies that planted it.

        Args:
            poisoned: Indices of the poisoned rows, or a mask.
            bootstrap: How the intervals are made: rows are drawn.

        Raises:
            ShapeError: There is no such row.
            DataError: All rows are poisoned, or none.
        """
        n = len(self.predicted)
        at = places(poisoned, n, "Poisoned rows")
        mask = torch.zeros(n, dtype=torch.bool)
        mask[at] = True
        inside = (self.labels == self.target).cpu()
        values = self.predicted.cpu()
        whole = mislabel.auroc(values, mask, bootstrap)
        within = None
        if 0 < int(mask[inside].sum()) < int(inside.sum()):
            within = mislabel.auroc(values[inside], mask[inside], bootstrap)
        precision = float(mask[self.order.cpu()[: len(at)]].double().mean())
        return Detected(whole, within, precision, len(at))

    @property
    def title(self) -> str:
        return f"rows suspected of teaching class {self.target}"

    @property
    def verdict(self) -> str:
        beside = " beside their clean originals" if self.paired else ""
        count = len(self.queries)
        return (
            f"{len(self.predicted)} training rows are ranked by how much they raise class "
            f"{self.target} on {count} {'query' if count == 1 else 'queries'}{beside} "
            f"({self.asked} by {self.method}), rows "
            f"{', '.join(map(str, self.top(SHOWN)))} first; whether they teach the attack only a "
            "fit without them can say."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        said = []
        if self.hits < len(self.queries):
            said.append(
                f"the model assigns {self.hits} of {len(self.queries)} queries to class "
                f"{self.target}: of the others the attack does not work, and they teach nothing"
            )
        if not self.paired and self.asked == repr(Contrast()):
            said.append(
                "no clean originals: rows that merely look like the class rank high as well"
            )
        if self.fitted.spec.unit is Unit.DERIVATIVE:
            said.append(
                "rows that were fitted well have small gradients and small scores, poisoned ones "
                "too; rank by GradientCosine() as well, and let cleanse choose between the two"
            )
        return tuple(said)

    def frame(self) -> "DataFrame":
        """A row per training row, the most suspect first: its score and the class it carries."""
        order = self.order.cpu()
        columns = {"score": self.predicted.cpu()[order], "label": self.labels.cpu()[order]}
        return as_table(columns, order.numpy(), "row")

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The scores in order, those of rows that carry the attack's class marked."""
        ax = axes(ax)
        order = self.order.cpu()
        scores, inside = self.predicted.cpu()[order], self.labels.cpu()[order] == self.target
        place = torch.arange(1, len(order) + 1)
        for mask, name in ((~inside, "other rows"), (inside, f"rows of class {self.target}")):
            ax.scatter(place[mask].numpy(), scores[mask].numpy(), s=6, label=name)
        ax.set(xscale="log", xlabel="place in the ranking", ylabel="score")
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "method": self.method,
            "measure": self.asked,
            "queries": len(self.queries),
            "hits": self.hits,
            "paired": self.paired,
            "contrast": self.value,
            "first": self.top(),
        }


def suspects(
    fitted: Fitted,
    triggered: Any,
    clean: Any = None,
    measure: Any = Contrast(),
    *,
    target: int | None = None,
    history: Any = None,
) -> Suspects:
    """Rank training rows by what raises the attack's output on queries that misbehave.

    Args:
        fitted: A method fitted to the model that misbehaves: `uw.GradientCosine()` or any other.
        triggered: Inputs on which the model misbehaves, (x′, y); a few are enough. Their labels
            are not used by `Contrast()`.
        clean: The same inputs without the trigger, in the same order, where they are known.
        measure: `Contrast()`; or any measure, of which the mean over `triggered` is asked.
        target: The class that the attack asks for. None: what the model answers most often.
        history: Other states of the model, such as those of its training: a `Trajectory`, or a list
            of models, state dicts or vectors θ. The method is fitted at each of them too, a model
            with its own running statistics, and the ranking is by the mean of S_k/‖S_k‖ over these
            states and θ̂.

    Returns:
        The ranking. Its rows are suspects, not poison: see `cleanse`.

    Raises:
        DataError: The model's outputs are no logits of classes, or there is no query.
        ShapeError: There are not as many clean inputs as triggered ones, or no such class.
        UpweightError: From the method.

    Cost: one gradient, one solve and one pass over the training data, whatever the number of
    queries; one forward pass over the training data. As much again, and a fit, for each state of
    the history.
    """
    task = fitted.task
    queries = task.queries(triggered)
    beside = None if clean is None else task.queries(clean)
    _require_pairs(queries, beside)
    answers, classes = _answers(task, fitted.theta, queries)
    if target is None:
        target = int(answers.mode().values)
    if not is_row(target, classes):
        raise ShapeError(
            f"The attack's class is one of 0…{classes - 1}.",
            f"target={target!r}.",
            "a class counted from 1, or its name.",
            "leave target out: it is then what the model answers most often.",
        )
    target, labels = int(target), _classes(task, fitted.theta, fitted.train)
    batch = None if beside is None else task.to_device(beside.batch(0, len(beside)))
    question = Functional(_Question(measure, target, batch))
    values = fitted.attribute(queries, question).values[0]
    states = 0
    if history is not None:
        spec: Any = fitted.spec
        parts = [values]
        for member in members_given(task, history):
            at = spec.fit(task.moved_to(*member), fitted.train)
            parts.append(at.attribute(queries, question).values[0])
        values, states = torch.stack([_unit(part) for part in parts]).mean(dim=0), len(parts) - 1
    return Suspects(
        fitted=fitted,
        target=target,
        predicted=values,
        labels=labels,
        question=question,
        queries=queries,
        value=_value(task, fitted.theta, queries, question),
        hits=int((answers == target).sum()),
        paired=beside is not None,
        states=states,
    )


def _unit(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """S/‖S‖; scores that are all 0 stay as they are."""
    norm = values.norm()
    return values / norm if float(norm) else values


@dataclass(frozen=True)
class Removed:
    """A fit without the first rows of a ranking.

    Args:
        method: Which ranking; "all rows" and "random rows of the class" stand beside them.
        count: How many rows were removed.
        chosen_on: Attack success on the half of the triggered images that chooses the count.
        success: Attack success on the other half, with its 95 % interval (Wilson 1927).
        accuracy: On the clean test data.
        lost: Accuracy lost against the fit with all rows, paired, with its interval.
        predicted: Change of the measure that the scores predict, −Σ S; None for ranks.
        actual: The change in the refit.
        rows: Who was removed.
    """

    method: str
    count: int
    chosen_on: Estimate
    success: Estimate
    accuracy: float
    lost: Estimate
    predicted: float | None
    actual: float
    rows: tuple[int, ...] = field(repr=False, default=())


@dataclass(frozen=True, eq=False)
class Cleansed(Outcome):
    """The removal curve of an attack: its success and the clean accuracy, each refitted.

    Args:
        target: The attack's class.
        limit: Attack success below which a model counts as clean.
        before: The fit with all rows, by the same recipe.
        curve: A fit for each ranking and count.
        chosen: The one that the rule chose.
        control: As many random rows of the attack's class removed.
        failed: Fits that did not end, in words.
        sizes: Triggered images that chose, and that report; clean ones.
        theta: θ of the chosen fit.
        others: What else of it is its own, by name: running statistics and frozen layers. The model
            is `task.moved_to(found.theta, found.others).model`.
    """

    target: int
    limit: float
    before: Removed
    curve: tuple[Removed, ...]
    chosen: Removed
    control: Removed | None
    failed: tuple[str, ...]
    sizes: tuple[int, int, int]
    theta: Float[Tensor, " p"] = field(repr=False)
    others: Mapping[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def predicted(self) -> list[float | None]:
        """Change of the measure that the scores predict, for each fit of the curve."""
        return [each.predicted for each in self.curve]

    @property
    def actual(self) -> list[float]:
        """The same, in the refits."""
        return [each.actual for each in self.curve]

    @property
    def is_attacked(self) -> bool:
        """Whether the attack works on a fit with all rows: its interval lies above the limit."""
        return self.before.success.low > self.limit

    @property
    def is_confirmed(self) -> bool:
        """Whether the attack worked, and its success in the refit lies below the limit."""
        return self.is_attacked and self.chosen.success.high <= self.limit

    @property
    def title(self) -> str:
        return f"removing an attack on class {self.target}"

    @property
    def verdict(self) -> str:
        was = _interval(self.before.success)
        if not self.is_attacked:
            return (
                f"There is no attack to remove: a fit with all rows answers class {self.target} on "
                f"{was} of the triggered images, and the limit is {100 * self.limit:g} %."
            )
        now, count = _interval(self.chosen.success), self.chosen.count
        cost = f"at {100 * self.chosen.lost:.2f} points of clean accuracy"
        begin, still, end = "Cleansed", "", ""
        if not self.is_confirmed:
            begin, still, end = "Not cleansed", "still ", f"; the limit is {100 * self.limit:g} %"
        return (
            f"{begin}: without {count} rows (ranked by {self.chosen.method}) a fit from the start "
            f"{still}answers class {self.target} on {now} of the triggered images, {was} before, "
            f"{cost}{end}."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        choosing, reporting, clean = self.sizes
        said = [
            f"{choosing} triggered images chose the count (the fewest rows whose refit has an "
            f"interval of success below the limit, else the lowest success); {reporting} others "
            f"and {clean} clean ones report; those of class {self.target} are left out",
            "another trigger is another attack: nothing is said of it",
        ]
        if self.control is not None:
            said.append(
                f"removing {self.control.count} random rows of the class instead leaves "
                f"{_interval(self.control.success)}"
            )
        return (*said, *(f"a fit did not end: {each}" for each in self.failed))

    def frame(self) -> "DataFrame":
        """A row per fit: success and accuracy, with intervals."""
        fits = [self.before, *self.curve, *([] if self.control is None else [self.control])]
        return as_table([_flat(each) for each in fits])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Attack success, with its interval, and clean accuracy against the rows removed."""
        ax = axes(ax)
        for method in dict.fromkeys(each.method for each in self.curve):
            found = [self.before, *(each for each in self.curve if each.method == method)]
            counts = [each.count for each in found]
            values = [each.success.value for each in found]
            spread = reaches(each.success for each in found)
            ax.errorbar(counts, values, yerr=spread, marker="o", label=f"success, {method}")
            clean = [each.accuracy for each in found]
            ax.plot(counts, clean, "--", marker=".", label=f"clean accuracy, {method}")
        ax.axhline(self.limit, color="black", linewidth=0.8)
        ax.axvline(self.chosen.count, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="rows removed", ylabel="share of the images", ylim=(-0.02, 1.02))
        ax.legend()
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "limit": self.limit,
            "before": _flat(self.before),
            "curve": [_flat(each) for each in self.curve],
            "chosen": _flat(self.chosen) | {"rows": self.chosen.rows},
            "control": None if self.control is None else _flat(self.control),
            **self._fields("failed", "predicted", "actual"),
        }


def cleanse(
    recipe: Recipe,
    suspects: Suspects | Sequence[Suspects],
    triggered: Any,
    clean: Any,
    counts: Sequence[int] | None = None,
    *,
    limit: float = 0.05,
    seed: int = 0,
    bootstrap: Bootstrap = Bootstrap(),
    resources: Resources | None = None,
) -> Cleansed:
    """Fit again without the first rows of a ranking, and say what is left of the attack.

    The number of rows is chosen without the truth: the fewest whose refit has the upper end of the
    interval of attack success below `limit` on one half of `triggered`; where there is none, the
    one with the lowest success. What is reported is measured on the other half, each model with
    running statistics of its own where the recipe is a function that trains them.

    Args:
        recipe: How the model was trained; from the start, not from θ̂.
        suspects: A ranking, or several of one attack: the rule chooses among them too.
        triggered: (x′, y): triggered images other than those that were ranked by, with their
            *true* classes. Images that are of the attack's class already are left out.
        clean: (x, y): test data without the trigger.
        counts: Numbers of rows to remove. None: .5, 1, 2, 3, 5 and 10 % of the training rows.
        limit: Attack success at which a model counts as clean; of a clean model it is how often
            the class is answered by mistake.
        seed: Of the halves, and of the control.
        bootstrap: How the interval of the lost accuracy is made.
        resources: With a `folder`, which keeps the refits: an interrupted call resumes. None:
            those of the fitted method.

    Returns:
        The curve, and the fit that was chosen. It is called cleansed only if the interval of its
        success, on images that chose nothing, lies below the limit.

    Raises:
        SpecError: A count is not between 1 and n − 1, or the limit not between 0 and 1; the
            rankings are of several attacks.
        DataError: Fewer than two triggered images are of another class, or there is no clean one.
        NonFinite: The model's answer to an image is NaN or infinite.
        NotConverged: The fit with all rows, or every other, failed.
        StaleStore: The folder holds refits of another model, recipe or training set.

    Cost: a training for each ranking and count, one with all rows, and one for the control.
    """
    rankings = list(suspects) if isinstance(suspects, Sequence) else [suspects]
    fitted, target = _one_attack(rankings)
    task, train, n = fitted.task, fitted.train, len(fitted.train)
    tried = _counts(counts, n, limit)
    halves = _halves(task, fitted.theta, task.queries(triggered), target, seed)
    tests = task.queries(clean)
    if not len(tests):
        raise DataError(
            "What a refit costs is measured on test data without the trigger.",
            "no example.",
            "a filter that left nothing.",
            "pass clean=(x, y), some hundred of them.",
        )
    using = (fitted.resources if resources is None else resources).within("cleanse")
    trainer = kept_trainer(recipe, task, train, using)
    failed: list[str] = []

    def fit(name: str, rows: Sequence[int]) -> Trained | None:
        weights = removal_weights(n, [list(rows)]) if rows else torch.ones(1, n)
        made = trainer(weights.to(fitted.theta))
        if made.failures:
            failed.append(f"{name}, {len(rows)} rows: {made.failures[0]}")
            return None
        return made

    def model(made: Trained) -> tuple[Task, Float[Tensor, " p"]]:
        return made.task_of(task, 0), made.theta[0].to(fitted.theta)

    start = fit("all rows", ())
    if start is None:
        raise _no_fit(failed)
    whole, first = model(start), rankings[0]
    right = _right(*whole, tests)
    nothing = Estimate(0.0, 0.0, 0.0)

    def measured(name: str, rows: Sequence[int], made: Trained, ranking: Suspects) -> Removed:
        here = model(made)
        now = _right(*here, tests)
        choosing, success = (_success(*here, half, target) for half in halves)
        at = _value(*here, ranking.queries, ranking.question)
        was = _value(*whole, ranking.queries, ranking.question)
        predicted = None
        if ranking.fitted.spec.unit is Unit.DERIVATIVE and not ranking.states:
            predicted = -float(ranking.predicted[list(rows)].sum())
        lost = _mean(right - now, bootstrap) if rows else nothing
        clean_accuracy = float(now.mean())
        kept = tuple(rows)
        return Removed(
            name, len(kept), choosing, success, clean_accuracy, lost, predicted, at - was, kept
        )

    before = measured("all rows", (), start, first)
    curve: list[Removed] = []
    models: list[Trained] = []
    for ranking in rankings:
        order = ranking.order.tolist()
        for count in tried:
            made = fit(ranking.method, order[:count])
            if made is not None:
                curve.append(measured(ranking.method, order[:count], made, ranking))
                models.append(made)
    if not curve:
        raise _no_fit(failed)
    place = _chosen(curve, limit)
    chosen = curve[place]
    rows = (first.labels == target).nonzero()[:, 0].cpu()
    rows = rows if len(rows) > chosen.count else torch.arange(n)
    drawn = torch.randperm(len(rows), generator=stream("cleanse control", seed))
    random = sorted(rows[drawn[: chosen.count]].tolist())
    name = "random rows of the class" if len(rows) < n else "random rows"
    made = fit(name, random)
    control = None if made is None else measured(name, random, made, first)
    sizes = (len(halves[0]), len(halves[1]), len(tests))
    kept = models[place]
    return Cleansed(
        target, limit, before, tuple(curve), chosen, control, tuple(failed), sizes,
        kept.theta[0].to(fitted.theta), kept.others[0] if kept.others else {},
    )  # fmt: skip


def _chosen(curve: Sequence[Removed], limit: float) -> int:
    """The fewest rows with an interval of success below the limit, else the lowest success."""
    enough = [k for k, each in enumerate(curve) if each.chosen_on.high <= limit]
    if enough:
        return min(enough, key=lambda k: (curve[k].count, curve[k].chosen_on.value))
    return min(range(len(curve)), key=lambda k: (curve[k].chosen_on.value, curve[k].count))


def _answers(task: Task, theta: Float[Tensor, " p"], data: Data) -> tuple[Int[Tensor, " n"], int]:
    """The class that the model answers, and how many classes there are."""
    answers, classes = [], 0
    with torch.no_grad():
        for start, _, batch in data.batches(batch_size(task.layout.size, theta.element_size())):
            outputs, _ = task.outputs(theta, task.to_device(batch))
            _require_logits(outputs)
            if not bool(outputs.isfinite().all()):  # argmax would take the first for the answer
                bad = (~outputs.reshape(len(outputs), -1).isfinite().all(dim=1)).nonzero()[:, 0]
                raise NonFinite(
                    "The class that a model answers is read from finite logits.",
                    f"{len(bad)} examples with others, first {start + int(bad[0])}.",
                    "missing values in the inputs, or training that diverged.",
                    "leave these examples out, or fill their missing values.",
                )
            classes = max(2, outputs.shape[1] if outputs.ndim == 2 else 1)
            flat = outputs.reshape(len(outputs), -1)
            answers.append((flat[:, 0] > 0).long() if flat.shape[1] == 1 else flat.argmax(dim=1))
    return torch.cat(answers), classes


def _classes(task: Task, theta: Float[Tensor, " p"], data: Data) -> Int[Tensor, " n"]:
    """The class in the data of each example.

    Raises:
        DataError: The targets are no classes.
    """
    found = []
    with torch.no_grad():
        for _, _, batch in data.batches(batch_size(task.layout.size, theta.element_size())):
            outputs, targets = task.outputs(theta, task.to_device(batch))
            _require_logits(outputs)
            classes = class_of(task.loss, outputs, targets)
            found.append(_whole(outputs, targets) if classes is None else classes)
    return torch.cat(found)


def _whole(outputs: Tensor, targets: Any) -> Int[Tensor, " b"]:
    """The classes of a loss that has no margin: whole numbers beside several logits.

    Raises:
        DataError: The targets are none.
    """
    y, b = tree_leaves(targets)[0], len(outputs)
    whole = isinstance(y, Tensor) and not y.is_floating_point() and y.numel() == b
    if not whole or outputs.numel() == b:
        raise DataError(
            "An attack is on a classifier whose examples have one class each.",
            f"targets {tuple(y.shape)} of {y.dtype}, of a loss that does not say which class.",
            "class probabilities, one-hot vectors, or a regression on -1 and 1.",
            "pass classes counted from 0 as whole numbers, with CrossEntropy() on their logits or "
            "Bernoulli() on one.",
        )
    return y.reshape(-1).long()


def _centered(outputs: Float[Tensor, "q *c"], target: int) -> Float[Tensor, " q"]:
    """f_t − mean_c f_c; of one output f of two classes, f or −f."""
    flat = outputs.reshape(len(outputs), -1)
    if flat.shape[1] == 1:
        return flat[:, 0] if target == 1 else -flat[:, 0]
    return flat[:, target] - flat.mean(dim=1)


def _value(task: Task, theta: Float[Tensor, " p"], queries: Data, question: Functional) -> float:
    """m(θ)."""
    batch = task.to_device(queries.batch(0, len(queries)))
    with torch.no_grad():
        return float(question(task, task.named(theta), batch, theta.new_ones(0)))


def _right(task: Task, theta: Float[Tensor, " p"], data: Data) -> Float[Tensor, " q"]:
    right = _answers(task, theta, data)[0] == _classes(task, theta, data)
    return right.double().cpu()


def _success(task: Task, theta: Float[Tensor, " p"], data: Data, target: int) -> Estimate:
    answers = _answers(task, theta, data)[0]
    return wilson(int((answers == target).sum()), len(answers))


def _mean(values: Float[Tensor, " q"], how: Bootstrap) -> Estimate:
    if len(values) == 1:  # nothing to draw from: the whole range
        return Estimate(float(values), -1.0, 1.0)
    if not bool(values.any()):  # none of n was lost or won, which is not to say that none ever is
        most = wilson(0, len(values)).high
        return Estimate(0.0, -most, most)
    return bootstrap.mean(values, how)


def _halves(
    task: Task, theta: Float[Tensor, " p"], data: Data, target: int, seed: int
) -> tuple[Data, Data]:
    """Triggered images of other classes: those that choose, and those that report."""
    others = (_classes(task, theta, data) != target).nonzero()[:, 0].cpu()
    if len(others) < 2:
        raise DataError(
            "The success of an attack is measured on images of other classes than its own.",
            f"{len(others)} of {len(data)} triggered images are not of class {target}.",
            "triggered images that carry the attack's label in place of their true one.",
            "pass triggered=(x′, y) with the true classes y, some hundred of them.",
        )
    order = others[torch.randperm(len(others), generator=stream("triggered halves", seed))]
    middle = len(order) // 2
    return data.subset(order[:middle].tolist()), data.subset(order[middle:].tolist())


def _one_attack(rankings: Sequence[Suspects]) -> tuple[Fitted, int]:
    alike = {
        (id(each.fitted.task), len(each.predicted), each.target)
        for each in rankings
        if isinstance(each, Suspects)
    }
    if len(alike) != 1 or not all(isinstance(each, Suspects) for each in rankings):
        raise SpecError(
            "The rankings that are compared are of one model and one attack.",
            f"{len(rankings)} of {len(alike)} models or attacks.",
            "rankings of several triggers, or of methods that were fitted to other tasks.",
            "cleanse one attack at a time, with what poisoning.suspects(...) returned.",
        )
    return rankings[0].fitted, rankings[0].target


def _counts(counts: Sequence[int] | None, n: int, limit: float) -> list[int]:
    if not 0 < limit < 1:
        raise SpecError(
            "The limit is a share of the triggered images, between 0 and 1.",
            f"limit={limit}.",
            "a limit in percent.",
            "limit=0.05.",
        )
    if counts is None:
        counts = [max(1, round(share * n)) for share in SHARES]
    given = list(counts)
    tried = sorted({int(count) for count in given if is_row(count, n)} - {0})
    if not tried or not all(is_row(count, n) and count for count in given):
        raise SpecError(
            f"Counts are numbers of rows to remove, each between 1 and {n - 1}.",
            f"counts={given}.",
            "shares of the data in place of numbers of rows.",
            f"counts=[{max(1, n // 100)}, {max(1, n // 50)}], or none for shares of 0.5 to 10 %.",
        )
    return tried


def _require_pairs(queries: Data, clean: Data | None) -> None:
    if not len(queries):
        raise DataError(
            "Suspects are asked for by queries that misbehave.",
            "no query.",
            "a filter that left nothing.",
            "pass at least one triggered input, (x, y) with the first axis kept.",
        )
    if clean is not None and len(clean) != len(queries):
        raise ShapeError(
            "Every triggered input stands beside its clean original, in the same order.",
            f"{len(queries)} triggered and {len(clean)} clean inputs.",
            "clean test data in place of the originals of these queries.",
            "pass the originals, or leave clean out.",
        )


def _require_logits(outputs: Any) -> None:
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2):
        raise DataError(
            "An attack is on a classifier with one row of logits per example.",
            f"outputs of shape {shape}.",
            "a model of sequences or of several tasks.",
            "pass forward= to Task, so that it returns the logits that are attacked.",
        )


def _no_fit(failed: Sequence[str]) -> NotConverged:
    return NotConverged(
        "What a removal does is read from fits that end.",
        f"{len(failed)} that did not: {'; '.join(failed[:3])}.",
        "a recipe that diverges, or that was not the one of the model.",
        "check it on all rows first: recipe.trained(task, train).",
    )


def _interval(found: Estimate) -> str:
    value, low, high = 100 * found
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _flat(found: Removed) -> dict[str, Any]:
    return {
        "method": found.method,
        "removed": found.count,
        "success": found.success.value,
        "success_low": found.success.low,
        "success_high": found.success.high,
        "success_choosing": found.chosen_on.value,
        "accuracy": found.accuracy,
        "accuracy_lost": found.lost.value,
        "lost_low": found.lost.low,
        "lost_high": found.lost.high,
        "predicted": found.predicted,
        "actual": found.actual,
    }
