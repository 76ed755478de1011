"""`fitted.check(recipe, budget)`: what a method says, held against retraining, in one line."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import ModelChanged, NotOffered, message
from upweight.evaluation.check import Check, check
from upweight.methods import health
from upweight.scores import Scores
from upweight.task.data import Data
from upweight.task.measures import Loss
from upweight.task.recipe import Recipe
from upweight.task.snapshot import Snapshot
from upweight.task.task import Task

QUERIES = 32
"""Training examples that stand in for queries where none are given."""


WHOLE = ("one curvature for all of θ", "Influence(GGN(), damping=…).fit(task, train)")
BY_LAYER = ("a curvature a layer at a time", "Influence(EKFAC(), damping=…).fit(task, train)")
OFFERED = {
    "removal": (*WHOLE, "scores.removal() is Δm to first order"),
    "removal_step": (*WHOLE, "scores.removal() is Δm to first order"),
    "parameter_influence": (*WHOLE, "attribute(...) says what a weight does to a measurement"),
    "input_influence": (*WHOLE, "by_token(...) says through which tokens an example acts"),
    "relabel_influence": (*WHOLE, "attribute(...) has the example's score as it is labeled"),
    "top": (*BY_LAYER, "attribute(...).top(k, query) ranks the scores of one query"),
    "write": (*BY_LAYER, "attribute(...).save(path) keeps scores on disk"),
    "group": (*BY_LAYER, "attribute(...).group(labels) adds scores up"),
    "by_layer": (*BY_LAYER, "attribute(...) has the whole scores"),
    "by_token": (*BY_LAYER, "input_influence(...) says which parts of an input matter"),
}
"""Questions that one kind of fitted method answers: what they need, how that is had, and what there
is here."""


class Checked:
    """A fitted method that can be held against retraining, and that knows what it was fitted to."""

    task: Task
    train: Data
    theta: Float[Tensor, " p"]
    snapshot: Snapshot

    def __getattr__(self, name: str) -> Any:
        if name not in OFFERED:
            return object.__getattribute__(self, name)  # its own error
        needs, other, here = OFFERED[name]
        raise NotOffered(
            message(
                f"{name}(...) needs {needs}.",
                f"a {type(self).__name__}, which has another.",
                "a question of one kind of curvature, asked of the other.",
                f"{here}; or ask {other}.",
            )
        )

    def attribute(self, queries: Any, measure: Any = ...) -> Scores:
        """S[q, i]."""
        raise NotImplementedError

    def check(
        self,
        recipe: Recipe,
        budget: str | float = "2 min",
        *,
        queries: Any = None,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        jobs: int | None = None,
        cache: Folder | None = None,
        progress: bool = True,
    ) -> Check:
        """Spend a budget on retraining, and say in words and numbers whether to believe the scores.

        Args:
            recipe: How the model was trained: `Training`, `Newton`, `FromFunction`, or what an
                adapter's `recipe` made of an estimator.
            budget: "90 s", "2 min", "1 h", or seconds.
            queries: What to ask about, best held-out data. None asks about some training examples;
                whether each is in a subset itself then makes much of what is compared.
            measure: What to ask.
            jobs: As for `evaluation.retrain`.
            cache: As for `evaluation.retrain`.
            progress: As for `evaluation.retrain`.

        Raises:
            SpecError: The budget is no time, or too short for eight subsets.
            UpweightError: From `attribute` or `evaluation.check`.

        Cost: the budget, and one `attribute`.
        """
        if queries is None:
            n = len(self.train)
            count = min(n, QUERIES)
            queries = self.train.subset([k * n // count for k in range(count)])
        scores = self.attribute(queries, measure)
        return check(scores, recipe, budget, jobs=jobs, cache=cache, progress=progress)

    @cached_property
    def _is_convex(self) -> bool:
        return health.is_convex(self.task, self.train)

    @cached_property
    def _baseline(self) -> tuple[float, float] | None:
        return health.constant_baseline(self.task, self.train)

    def _minimum_denied(self, judged: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """What is warned of, and what only noted, of how far θ̂ is from a minimum."""
        if self._is_convex:
            return health.denied(judged), []
        return health.of_network(judged, lambda: self._baseline)

    def _require_same_model(self) -> None:
        """Refuse a question about a model that is no longer the one of the fit.

        Raises:
            ModelChanged: θ̂, or another part of the model or its objective, has changed.
        """
        now = self.task.theta()
        if now.dtype != self.theta.dtype or not torch.equal(now, self.theta):
            raise ModelChanged(health.moved(now, self.theta))
        self.snapshot.require_same(self.task, self.train)
