"""What `attribute` returns: scores that can also be checked, looked through for labels, and shown.

These verbs need more of the library than `Scores` may know: applications, evaluation, the report.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from upweight._html import card
from upweight._typing import DataFrame
from upweight.errors import MissingContext, SpecError
from upweight.evaluation.check import Check, check
from upweight.front.opened import own_recipe
from upweight.methods.fitted import Fitted
from upweight.notation import count
from upweight.notation import readable as readable_number
from upweight.provenance import Context
from upweight.scores import Scores
from upweight.task.recipe import Recipe
from upweight.task.task import Task

if TYPE_CHECKING:
    from upweight.applications.debugging import Suspects
    from upweight.report import Display

NEXT = '.top(), .table(), {suspects}.check({recipe}), .report("page.html")'

NO_RECIPE = "no recipe: "
"""How a note begins that a model of an adapter cannot be trained again."""

SHOWN = 10
"""Examples of a ranking that is printed."""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Scores):
    """`Scores` with what they were made from, and what follows from it. Made by `attribute`.

    Args:
        why: The method, and why it was chosen; empty where it was given.
        recipe: How the model was trained, where `attribute` was told.
        model: What was trained, as `attribute` was given it.
    """

    why: str = ""
    recipe: Any = None
    model: Any = None

    @classmethod
    def of(
        cls, scores: Scores, why: str = "", recipe: Any = None, model: Any = None
    ) -> "Attribution":
        """The same scores."""
        held = {each.name: getattr(scores, each.name) for each in fields(Scores)}
        return cls(**held, why=why, recipe=recipe, model=model)

    def _told(self) -> tuple[str, dict[str, str]]:
        first, about = super()._told()
        if self.why:
            about["method"] = f"{about['method']}; {self.why}"
        checked = f"{self.checks[-1].verdict}" if self.checks else "not checked against retraining"
        about["health"] += f"; {checked}"
        is_known = self.recipe is not None or not isinstance(self.model, nn.Module | Task)
        is_known &= not any(note.startswith(NO_RECIPE) for note in self.provenance.notes)
        suspects = ".suspects(), " if self._has_suspects else ""
        about["next"] = NEXT.format(suspects=suspects, recipe="" if is_known else "recipe")
        return first.replace(type(self).__name__, Scores.__name__, 1), about

    @property
    def _has_suspects(self) -> bool:
        """Whether `suspects` has an answer: labels are classes, and the method moves θ."""
        from upweight.applications.debugging import has_suspects

        fitted = None if self.context is None else self.context.fitted
        return isinstance(fitted, Fitted) and has_suspects(fitted)

    def _fitted(self) -> Fitted:
        """The fitted method behind the scores."""
        fitted = self.require_context().fitted
        if not isinstance(fitted, Fitted):
            raise MissingContext(
                "This asks the fitted method that made the scores.",
                "scores without one.",
                "scores that were put together from others.",
                "ask again: upweight.attribute(model, train, queries, …).",
            )
        return fitted

    def suspects(self, validation: Any = None, **options: Any) -> "Suspects":
        """Training rows whose labels may be wrong: short for `upweight.applications.suspects`.

        A row is suspected where a model without it favours another label; that is the cut-off. With
        `validation`, held-out rows that you trust, they are ranked by the harm that they do.

        Raises:
            UpweightError: From `upweight.applications.debugging.suspects`: of a regression, which
                has no labels, or of a method that only ranks.

        Cost: outputs of a model without each row in turn; see there.
        """
        from upweight.applications.debugging import suspects

        if "recipe" not in options:
            options["recipe"] = self._recipe()
        return suspects(self._fitted(), None, validation, **options)

    def _recipe(self) -> Any:
        """How the model was trained, as was told or as its library fits it; None: not known."""
        return own_recipe(self.model) if self.recipe is None else self.recipe

    def check(self, recipe: Recipe | Callable[..., Any] | str | None = None,
              budget: str | float | None = None, **limits: Any) -> Check:  # fmt: skip
        """Hold the scores against retraining: short for `upweight.check`.

        Args:
            recipe: How the model was trained; also a function from data weights to the trained
                model. None: as `attribute` was told; a scikit-learn estimator and statsmodels
                results have their own `fit`. A time, as "5 min", is the budget.
            budget: As for `upweight.check`.
            limits: Further arguments of it. Without `resources` those of `attribute`: its folder
                keeps the refits.

        Raises:
            SpecError: Nobody said how the model was trained.
            UpweightError: From `upweight.check`.
        """
        if isinstance(recipe, str) and budget is None:
            recipe, budget = None, recipe
        known: Any = self._recipe() if recipe is None else recipe
        if known is None:
            why = [note for note in self.provenance.notes if note.startswith(NO_RECIPE)]
            raise SpecError(
                "A check trains the model again, and must know how.",
                f"{why[0] if why else 'no recipe'}.",
                "a network, which does not say how it was trained.",
                "check(recipe): an upweight.Training(...), or a function of data weights that "
                "returns a trained model.",
            )
        fitted = self.require_context().fitted
        if isinstance(fitted, Fitted):
            limits = {"resources": fitted.resources.within("retrained")} | limits
        return check(self, known, budget, **limits)

    def self_influence(self) -> "SelfInfluence":
        """How much each training example lowers its own loss: rare or mislabeled ones first.

            −S[i, i] = −∂ℓᵢ/∂wᵢ ≥ 0

        Raises:
            UpweightError: From `Fitted.self_influence`.

        Cost: as written there.
        """
        fitted = self._fitted()
        return SelfInfluence(-fitted.self_influence(), self.require_context())

    def report(self, path: str | Path, display: "Display | None" = None, **options: Any) -> Path:
        """Write the page, one HTML file that opens offline: short for `upweight.report.html`.

        What the last `check` found is on it.

        Args:
            path: The file.
            display: How examples are shown. None: by the names, ids and values that they came with.
            options: Further arguments of `upweight.report.html`.

        Raises:
            UpweightError: From there.
        """
        from upweight.report import Display, html

        return html(self, path, Display() if display is None else display, **options)


@dataclass(frozen=True, eq=False, repr=False)
class SelfInfluence:
    """−S[i, i] of every training example: how far its own loss would rise without it.

    Args:
        values: `[n]`, at least 0; in units of the loss.
        context: The live data.
    """

    values: Float[Tensor, " n"]
    context: Context

    def __len__(self) -> int:
        return len(self.values)

    @property
    def order(self) -> list[int]:
        """Places of the examples, the largest first."""
        return self.values.argsort(descending=True, stable=True).tolist()

    def top(self, k: int = SHOWN) -> "DataFrame":
        """The k largest, with the id in the index of the data or else the place, and the label."""
        from upweight.runtime.tables import pd

        at = self.order[:k]
        columns: dict[str, Any] = {"place": at, "self_influence": self.values[at].cpu().numpy()}
        labels = self.context.labels("train", at)
        if labels is not None:
            columns["label"] = labels
        rows = self.context.rows("train")
        ids: Any = at if rows is None else rows.take(at).ids
        return pd.DataFrame(columns, index=pd.Index(ids, name="example", tupleize_cols=False))

    def _lines(self) -> list[tuple[str, str, str]]:
        at = self.order[:SHOWN]
        labels = self.context.labels("train", at) or [""] * len(at)
        names = [self.context.name("train", i) for i in at]
        values = [readable_number(float(self.values[i])) for i in at]
        return [*zip(names, map(str, labels), values, strict=True)]

    @property
    def _title(self) -> str:
        n = count(len(self), "training example")
        return f"Self-influence of {n}: how far the loss of each would rise without it"

    def __repr__(self) -> str:
        lines = self._lines()
        wide = [max(len(line[k]) for line in lines) for k in (0, 1)]
        rows = (f"  {name:>{wide[0]}}  {label:<{wide[1]}}  {v}" for name, label, v in lines)
        return "\n".join([self._title, *rows, "  next: .top(k), .values"])

    def _repr_html_(self) -> str:
        header = ("training example", "label", "rise of its loss")
        return card(self._title, {}, header, self._lines(), ".top(k), .values")
