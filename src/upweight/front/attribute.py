"""From a trained model to scores in one call."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from upweight.errors import (
    InUse,
    NotConverged,
    NotPositiveDefinite,
    NotWritten,
    SpecError,
    UpweightError,
)
from upweight.evaluation.check import seconds_of
from upweight.front.answer import Attribution
from upweight.front.arguments import explained
from upweight.front.choice import PATIENCE, Choice, Facts, alike, choose, given, named
from upweight.front.facts import facts_of
from upweight.front.kept import kept_choice
from upweight.front.opened import Opened, opened, queries_of, require_alone
from upweight.front.refits import is_refitted, of_queries, opened_by_outputs, refit_choice
from upweight.methods.fitted import LOSS
from upweight.methods.method import Method
from upweight.methods.reduce import Reducer
from upweight.methods.stacked import Stacked
from upweight.runtime.progress import duration
from upweight.runtime.resources import Resources
from upweight.scores import Scores
from upweight.task.check import require_answerable
from upweight.task.data import Data
from upweight.task.measures import Functional
from upweight.task.task import Task
from upweight.task.torch_losses import reduction_note
from upweight.training.function import FromFunction, as_recipe
from upweight.training.kept import training_identity

KNOWN = {
    "history": "trajectory=history, of upweight.record or Training.trajectory; or recipe=training",
    "damping": "method=upweight.Influence(upweight.EKFAC(), damping=0.1)",
    "curvature": "method=upweight.Influence(upweight.EKFAC(), damping=0.1)",
    "solver": "method=upweight.Influence(upweight.GGN(), upweight.solvers.CG(), damping=0.1)",
    "k": "into=upweight.Top(10)",
    "top": "into=upweight.Top(10)",
    "folder": "resources=upweight.Resources(folder=…)",
    "weight_decay": "penalty=upweight.L2(weight_decay)",
    "criterion": "loss=criterion",
    "loss_fn": "loss=loss_fn",
    "test": "queries=test",
    "dataset": "train=dataset",
    "metric": "measure=metric",
    "device": "model.to(device), where it is asked then,",
    "tokenizer": "upweight.adapters.transformers.task(model, tokenizer) as the model,",
}
"""What other names of arguments are called here."""


TIMED = "trains on half of the data by the function, to know how long that takes"
"""What is said before it, since that may be long."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question in live objects, with the method for it.

    Args:
        opened: What was trained, and on what.
        queries: As data, or None for a `Functional`.
        measure: What is asked of them.
        facts: What is known; None where the method was given.
        choice: The method, and why.
        recipe: How the model was trained, for methods that train it again.
        trajectory: The steps of that, for methods that look at them.
        resources: What may be used.
        notes: What a loss's reduction means.
    """

    opened: Opened
    queries: Data | None
    measure: Any
    facts: Facts | None
    choice: Choice
    recipe: Any
    trajectory: Any
    resources: Resources
    notes: tuple[str, ...] = ()
    is_given: bool = False
    said: tuple[str, ...] = ()
    """Of the model and the data, for who reads along; it is in their notes already."""

    refit: Any = None
    """What is fitted again in place of the recipe: the same estimator with fewer trees."""

    @property
    def history(self) -> Any:
        """What the method is fitted with."""
        if not self.choice.method.takes_history:
            return None
        if self.refit is not None:
            return self.refit
        return history_of(self.choice.method, self.recipe, self.trajectory)

    @property
    def line(self) -> str:
        """The choice, and how long it may take where that is longer than it was given."""
        if self.facts is None or self.choice.seconds <= self.facts.budget_seconds:
            return str(self.choice)
        return f"{self.choice}; it takes about {duration(self.choice.seconds)}"

    def otherwise(self, error: UpweightError, seconds: float) -> "Asked":
        """The same with the next method, where this one failed.

        It gets what is left of the budget, and no less than who gives none.
        """
        assert self.facts is not None
        names = (self.choice.name,) if isinstance(error, NotConverged) else alike(self.choice)
        budget = self.facts.budget_seconds
        left = max(budget - seconds, min(budget, PATIENCE))
        failed = (*self.facts.failed, *names)
        facts = replace(self.facts, failed=failed, budget_seconds=left)
        first = str(error).partition("\n\n")[0]
        notes = (*self.notes, f"{self.choice.name} could not be used: {first}")
        return replace(self, facts=facts, choice=choose(facts), notes=notes)


def asked(
    model: Any,
    train: Any,
    queries: Any,
    loss: Any = None,
    *,
    penalty: Any = None,
    measure: Any = None,
    recipe: Any = None,
    trajectory: Any = None,
    budget: str | float | None = None,
    method: Method | None = None,
    resources: Resources | None = None,
) -> Asked:
    """The live objects of a question, and the method chosen for it. As for `attribute`."""
    if method is not None and not isinstance(method, Method):
        raise SpecError(
            "A method is an object such as upweight.Influence(upweight.EKFAC(), damping=0.1).",
            f"method={method!r}.",
            "a name, a class that was not called, or a curvature in its place.",
            "leave it out, and it is chosen; or pass upweight.Influence(...).",
        )
    if is_refitted(model, method):
        return _by_refits(model, train, queries, loss, penalty, measure, recipe or trajectory,
                          budget, method, resources)  # fmt: skip
    found = opened(model, train, loss, penalty)
    measure = LOSS if measure is None else measure
    chosen = (
        None
        if isinstance(measure, Functional) and queries is None
        else queries_of(found.task, queries, found.train)
    )
    return of_opened(found, chosen, measure, recipe, trajectory, budget, method, resources)


def of_opened(
    found: Opened,
    chosen: Data | None,
    measure: Any,
    recipe: Any = None,
    trajectory: Any = None,
    budget: str | float | None = None,
    method: Method | None = None,
    resources: Resources | None = None,
) -> Asked:
    """The same of a task, its training data and queries, which are there already."""
    seconds = PATIENCE if budget is None else seconds_of(budget)
    task, data = found.task, found.train
    resources = Resources() if resources is None else resources
    recipe = as_recipe(recipe)
    if recipe is None:
        recipe = getattr(trajectory, "recipe", None)
    facts: Facts | None = None
    unused: tuple[str, ...] = ()
    with task.in_step():
        if method is None:
            if isinstance(recipe, FromFunction) and seconds > PATIENCE:
                print(f"upweight: {TIMED}", file=sys.stderr)
            count = 1 if chosen is None or isinstance(measure, Functional) else len(chosen)
            facts = facts_of(
                task, data, count, recipe, trajectory, seconds, resources.memory_bytes,
                by_query=not isinstance(measure, Functional),
            )  # fmt: skip
            choice = _kept(facts, task, data, recipe, resources)
            unused = _unused(facts, choice, recipe, trajectory)
        else:
            require_answerable(task, data, "training data")
            choice = Choice(type(method).__name__, method, "it was given")
        batch = task.to_device(data.batch(0, min(2, len(data))))
        with torch.no_grad():
            said = reduction_note(found.loss, *task.call(task.held_theta(), batch))
    notes = (*((said,) if said else ()), *unused)
    more = () if chosen is None else (*chosen.notes, *_turned_round(len(data), len(chosen)))
    return Asked(
        found, chosen, measure, facts, choice, recipe, trajectory, resources, notes,
        method is not None, tuple(dict.fromkeys((*found.said, *more))),
    )  # fmt: skip


def _unused(facts: Facts, choice: Choice, recipe: Any, trajectory: Any) -> tuple[str, ...]:
    """What was said of training, and why nothing came of it; nothing where something did."""
    if facts.refused and not facts.linear:
        return (f"the recipe does not train this model. {facts.refused}",)
    is_said = recipe is not None or trajectory is not None
    if facts.linear or facts.resolved is not None or choice.method.takes_history or not is_said:
        return ()
    why = "the method that was chosen looks at the trained model alone; a longer budget= may help"
    if recipe is not None and not (facts.recipe or facts.function):
        why = (
            "models are trained again by an upweight.Training with init= or a function, and this "
            f"is a {type(recipe).__name__}; scores.check(recipe) takes it"
        )
    return (f"what is said of training did not count: {why}",)


def _turned_round(n: int, q: int) -> tuple[str, ...]:
    """A hint where there are more queries than training examples."""
    if q <= n:
        return ()
    return (
        f"more queries ({q:,}) than training examples ({n:,}). If they were given the wrong way "
        "round: it is attribute(model, train, queries)",
    )


def _kept(facts: Facts, task: Task, data: Data, recipe: Any, resources: Resources) -> Choice:
    """The choice of the first call with the folder of the resources, where there is one."""

    def about() -> dict[str, str]:
        known = {"recipe": facts.recipe, "trajectory": facts.trajectory, "rows": facts.by_query}
        allowed = {
            "budget": f"{facts.budget_seconds:g} s",
            "queries": str(facts.queries),
            "memory": repr(resources.memory_bytes),  # as given: what is free is another each time
        }
        return {**training_identity(recipe, task, data), "known": repr(known), **allowed}

    def chosen() -> dict[str, str]:
        choice = choose(facts)
        return {"row": choice.name, "why": choice.why}

    told = kept_choice(resources, about, chosen)
    return named(told["row"], told["why"], facts)


def _by_refits(
    model: Any, train: Any, queries: Any, loss: Any, penalty: Any, measure: Any, recipe: Any,
    budget: Any, method: Method | None, resources: Resources | None,
) -> Asked:  # fmt: skip
    """The question to an estimator that is fitted again."""
    require_alone(loss, penalty, "an estimator knows its objective")
    if recipe is not None:
        raise SpecError(
            "An estimator is fitted again by its own fit.",
            f"a {type(recipe).__name__}.",
            "a recipe or trajectory left from a network.",
            "leave it out.",
        )
    found = opened_by_outputs(model, train, queries, measure, method)
    made = Opened(found.task, found.train, None)
    measure = LOSS if measure is None else measure
    used = Resources() if resources is None else resources
    refit = found.recipe
    if method is None:
        choice, facts, notes, refit = refit_choice(found, budget, used)
    else:
        facts = Facts(found.task.layout.size, 1, len(found.train), len(found.queries), False, False)
        choice, notes = given(method, facts), ()
    used = of_queries(used, found.recipe.rows)
    return Asked(
        made, found.queries, measure, facts, choice, found.recipe, None, used, notes, True,
        refit=refit,
    )  # fmt: skip


@explained(KNOWN)
def attribute(
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
    into: Reducer | None = None,
    method: Method | None = None,
    resources: Resources | None = None,
) -> Any:
    """S[q, i] = ∂m_q/∂wᵢ for every query and training example, with the method chosen for you.

    What was chosen and why is one line on standard error, and a note of the scores.

    Args:
        model: What was trained: a `torch.nn.Module` in eval mode, a fitted scikit-learn estimator
            or Pipeline, statsmodels results, a `transformers.Trainer`, or a `Task`.
        train: The training set: (X, y), a data set, or a `DataLoader`. For scikit-learn (X, y) as
            given to `fit`; of statsmodels results or a Trainer None.
        queries: What to ask about, in the same form; of a classifier also inputs alone: the class
            that it predicts then stands for each.
        loss: What a module was trained with: a loss of `torch.nn`, one of ours, or any function
            (outputs, targets) -> [b].
        penalty: What a module was trained with beside it: `L2(λ)` for weight decay λ.
        measure: m, as for `Fitted.attribute`. None: the loss of each query.
        recipe: How the model was trained, a `Training`: more is known, so a better method may be
            chosen. Where it does not lead to this model, the next method is taken, and a note says
            why. Or a function from data weights to the trained model, for budgets above 10 s: it is
            timed by training on half of the data.
        trajectory: Its steps, from `Training.trajectory` or a loop with `upweight.record`.
        budget: What the answer may take, roughly: "30 s", "2 min", or seconds. None: 10 s. With a
            longer one and a recipe, models of halves of the data are trained where it suffices.
        into: What to keep of the scores, as for `Fitted.attribute`: `Top(10)` for large data.
        method: Choose yourself; nothing else is tried then.
        resources: What may be used. With a `folder` the choice and whatever is trained again are
            kept in it, and an interrupted call resumes.

    Returns:
        `Scores` that can also be checked against retraining, looked through for wrong labels, and
        shown: `.top()`, `.table()`, `.suspects()`, `.check(recipe)`, `.report(path)`. Or what the
        reducer makes.

    Raises:
        SpecError: The loss is missing, or an argument is none of its kind.
        UnsupportedModel: The model has no translation, with what can be done instead.
        UpweightError: As for `Method.fit` and `Fitted.attribute`.

    Example:
        >>> scores = attribute(model, (X, y), (X_test, y_test), nn.CrossEntropyLoss())
        >>> scores.top(query=0)
    """
    question = asked(
        model, train, queries, loss, penalty=penalty, measure=measure, recipe=recipe,
        trajectory=trajectory, budget=budget, method=method, resources=resources,
    )  # fmt: skip
    for line in question.said:
        print(f"upweight: {line}", file=sys.stderr)
    while True:
        if not question.is_given:
            print(f"upweight: {question.line}", file=sys.stderr)
        started = time.monotonic()
        try:
            return answered(question, into)
        except UpweightError as error:
            if question.is_given or not is_unusable(question.choice.method, error):
                raise
            question = question.otherwise(error, time.monotonic() - started)


def answered(question: Asked, into: Reducer | None = None) -> Any:
    """The scores of a question by its method, with a note of what was chosen."""
    choice, found = question.choice, question.opened
    fitted = choice.method.fit(
        found.task, found.train, history=question.history, resources=question.resources
    )
    said = (*question.notes,) if question.is_given else (str(choice), *question.notes)
    fitted = replace(fitted, notes=(*said, *fitted.notes))
    found = fitted.attribute(question.queries, question.measure, into=into)
    if type(found) is not Scores:
        return found
    why = "" if question.is_given else choice.why
    return Attribution.of(found, why, question.recipe, question.opened.model)


def history_of(method: Method, recipe: Any, trajectory: Any) -> Any:
    """Which of the two a method is fitted with: a trajectory is of one model, a recipe of any."""
    is_of_many = isinstance(method, Stacked) and recipe is not None
    return recipe if is_of_many or trajectory is None else trajectory


def is_unusable(method: Method, error: UpweightError) -> bool:
    """Whether an error says that another method would do: not where it is the disk that failed.

    A method that looks at training may fail for any reason that lies in what is said of it.
    """
    if isinstance(error, NotWritten | InUse):
        return False
    return isinstance(error, NotPositiveDefinite | NotConverged) or method.takes_history


def at_the_end(question: Asked) -> Asked:
    """A choice among the methods that look at the trained model alone, for several processes."""
    assert question.facts is not None
    if not question.choice.method.takes_history:
        return question
    facts = replace(question.facts, recipe=False, function=False, trajectory=False)
    told = f"{question.choice.name}: not shared by processes, so it is taken where it is named"
    notes = (*question.notes, told)
    return replace(question, facts=facts, choice=choose(facts), notes=notes)


def solvable(question: Asked) -> Asked:
    """A choice that can solve its systems, for who must name the method before it is fitted.

    Cost: a fit, where a Hessian is not damped.
    """
    while getattr(question.choice.method, "damping", None) == 0.0:
        started = time.monotonic()
        try:
            question.choice.method.fit(question.opened.task, question.opened.train)
            break
        except NotPositiveDefinite as error:
            question = question.otherwise(error, time.monotonic() - started)
    return question
