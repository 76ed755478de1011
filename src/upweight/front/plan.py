"""What would `attribute` choose, what would it cost, and how good was that on the benchmark?"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upweight.errors import SpecError
from upweight.front.arguments import explained
from upweight.front.attribute import KNOWN, Asked, asked
from upweight.front.choice import PATIENCE, Choice, Facts, given
from upweight.front.facts import facts_of
from upweight.front.fidelity import Fidelity, fidelity_of
from upweight.methods.method import Method
from upweight.runs.forecast import Forecast, forecast
from upweight.runs.question import Question
from upweight.runtime.resources import Resources
from upweight.task.measures import Functional, as_measure


@dataclass(frozen=True, eq=False)
class AttributionPlan:
    """What `attribute` would do.

    Args:
        choice: The method, and why.
        facts: What it was chosen by.
        forecast: What it takes, timed on some examples; None for a method that learns from the
            whole of training, of which some examples say little.
        fidelity: How near to retraining the method came on the standing benchmark.
        notes: What is to be known of the loss.
    """

    choice: Choice
    facts: Facts
    forecast: Forecast | None
    fidelity: tuple[Fidelity, ...]
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> Method:
        """To hand to `attribute(..., method=)`."""
        return self.choice.method

    @property
    def seconds(self) -> float:
        """Expected, of fit and scores; NaN: of a method that looks at training, not known.

        A lower bound where `forecast.products` is not None.
        """
        if self.forecast is None:
            return self.choice.seconds
        return sum(self.forecast.seconds.values())

    @property
    def epochs(self) -> float:
        """The same in plain forward and backward passes over the training data."""
        return self.seconds / self.facts.epoch_seconds

    @property
    def bytes(self) -> int:
        """Of memory, for a batch and for what is formed as a matrix, roughly; 0: not known."""
        made = self.forecast
        if made is None:
            return int(self.choice.bytes)
        return max(0 if made.batch is None else made.batch_bytes, made.operator_bytes)

    def __str__(self) -> str:
        f = self.facts
        lines = [
            str(self.choice),
            f"  {f.examples:,} training examples, {f.queries:,} queries, "
            f"{f.parameters:,} parameters",
            f"  {self._cost}",
            *(f"  note: {note}" for note in self.notes),
        ]
        if self.fidelity:
            lines.append("  on the standing benchmark, against retraining on random halves:")
            lines += [f"    {each}" for each in self.fidelity]
        else:
            lines.append("  not measured on the standing benchmark")
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def _cost(self) -> str:
        f = self.facts
        if math.isnan(self.seconds):
            said, one = "not timed: it looks at how the model was trained", f.training_seconds
            return f"{said}; one training takes about {one:.2g} s" if 0 < one < math.inf else said
        memory = f"; {self.bytes / 1e6:.3g} MB" if self.bytes else ""
        products = None if self.forecast is None else self.forecast.products
        about, also = ("about", "") if products is None else ("at least", f"; {products}")
        return (
            f"{about} {self.seconds:.2g} s, as {self.epochs:.2g} plain epochs of "
            f"{f.epoch_seconds:.2g} s{memory}{also}"
        )


@explained(KNOWN)
def plan(
    model: Any,
    train: Any,
    queries: Any,
    loss: Any = None,
    *,
    penalty: Any = None,
    measure: Callable[..., Any] | None = None,
    recipe: Any = None,
    trajectory: Any = None,
    budget: str | float | None = None,
    method: Method | None = None,
    resources: Resources | None = None,
) -> AttributionPlan:
    """What `attribute` would choose, and what that costs; nothing is kept.

    Arguments and errors are those of `attribute`.

    Returns:
        The method and why, seconds, plain epochs, bytes, and the LDS of the method on each task of
        the standing benchmark, with its ceiling. Printed, it says all of it.

    Cost: a few seconds, see `upweight.runs.forecast`; and with a function as the recipe and a
    budget above 10 s a training on half of the data.

    Example:
        >>> print(plan(model, (X, y), (X_test, y_test), nn.CrossEntropyLoss()))
    """
    question = asked(
        model, train, queries, loss, penalty=penalty, measure=measure, recipe=recipe,
        trajectory=trajectory, budget=budget, method=method, resources=resources,
    )  # fmt: skip
    if isinstance(question.measure, Functional) or question.queries is None:
        raise SpecError(
            "A plan times the measure of single queries.",
            f"measure={question.measure!r}.",
            "a Functional, which is one number of all of them.",
            "leave the measure out: a Functional takes about as long as one query.",
        )
    return planned(question)


def planned(question: Asked) -> AttributionPlan:
    """The plan of a question with its method."""
    choice, found = question.choice, question.opened
    facts, made, method = question.facts, None, choice.method
    if facts is None:  # the method was given
        assert question.queries is not None
        facts = facts_of(
            found.task, found.train, len(question.queries), question.recipe, question.trajectory,
            budget_seconds=math.inf if method.takes_history else PATIENCE,
            memory_bytes=question.resources.memory_bytes,
        )  # fmt: skip
        choice = given(method, facts)
    if not method.takes_history or (method.history_is_optional and question.history is None):
        assert question.queries is not None
        live = Question(
            found.task, found.train, question.queries, choice.method, as_measure(question.measure)
        )
        made = forecast(live, question.resources.memory_bytes)
    fidelity = fidelity_of(choice.measured_as)
    return AttributionPlan(choice, facts, made, fidelity, question.notes)
