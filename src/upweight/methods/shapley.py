"""Data Shapley by retraining: what an example adds to models of all sizes.

    S[q, i] = (1/n) Σ_j ω(j) · mean over C of size j − 1 of (m_q(C ∪ {i}) − m_q(C))

with m_q(C) measured on a model that was trained on C alone.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NotConverged, SpecError
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.refits import recipe_of, require_room
from upweight.methods.scorer import BlockScorer, Scorer
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import as_measure, measured
from upweight.task.recipe import Recipe, Trained
from upweight.training.kept import kept_trainer

ALL = 40_320
"""Permutations of eight examples: more are never walked through one by one."""


@dataclass(frozen=True)
class DataShapley(Method):
    """The Shapley value of each training example for m, models being trained on coalitions.

        S[q, i] = (1/n) Σ_{j=1}^{n} ω(j) · mean over C of size j − 1 of (m_q(C ∪ {i}) − m_q(C))

    Ghorbani & Zou (2019), Eq. 1, for ω = 1; then the columns of a row add up to m_q(D) − m_q(∅).
    Beta Shapley (Kwon & Zou 2022, Eq. 5) weights the size of C:

        ω(j) = n · C(n − 1, j − 1) · B(j + β − 1, n − j + α) / B(α, β)

    where α > β looks more at small coalitions, where one example is heard above the noise; its
    values no longer add up. Estimated from random orders of the examples, each one walked through
    from ∅ to D: the marginal of the example at place j counts ω(j). `scores.error` is the standard
    error of that mean, s / √permutations with s the standard deviation over orders, which are drawn
    independently, for any ω. There is none of all orders or of one.

    Args:
        permutations: Orders walked through, each n trainings; None: all of them, for n ≤ 8, where
            the value is exact.
        alpha, beta: Of Beta Shapley; 1, 1 is Shapley.
        seed: Of the orders.

    Needs: `history=recipe`, which trains on coalitions, ∅ among them: with a penalty, or a recipe
    of a number of steps. Weights are 0 or 1 and J keeps its 1/n, so C is trained with the penalty
    of the whole.

    Raises:
        SpecError: There is no recipe, or more models than memory holds.
        NotConverged: The recipe did not train on some coalition.

    Cost: n + 1 trainings per order, of which ∅ and D are shared; a forward pass of the queries
    through each model. All θ are held: permutations × n × p numbers.

    Exact: with all orders, or any number of them where m is additive over examples. Known failure:
    noise of 1/√permutations, beside that of training.
    """

    permutations: int | None = 8
    alpha: float = 1.0
    beta: float = 1.0
    seed: int = 0

    takes_history = True
    unit = Unit.VALUE

    def __post_init__(self) -> None:
        few = self.permutations is not None and self.permutations < 1
        if few or not (self.alpha > 0 and self.beta > 0):
            raise SpecError(
                "DataShapley needs permutations ≥ 1 or None, alpha > 0 and beta > 0.",
                f"permutations={self.permutations!r}, alpha={self.alpha!r}, beta={self.beta!r}.",
                "a budget that was rounded down to nothing.",
                "DataShapley(permutations=8).",
            )

    def prepare(self, fitting: Fitting) -> Scorer:
        recipe, n = recipe_of(self, fitting), len(fitting.data)
        orders = self.orders(n)
        coalitions, places = _prefixes(orders)
        way_out = "fewer permutations or examples; or KNNShapley(), which trains nothing."
        require_room(self, fitting, len(coalitions), way_out)
        models = _trained(recipe, fitting, coalitions)
        weights = self.weights(n)

        def score(queries: Data, measure: Any, start: int, stop: int) -> Any:
            values = models.measured(fitting.task, queries, as_measure(measure))
            steps = values[places[:, 1:]] - values[places[:, :-1]]  # [r n q]
            steps = steps * weights[None, :, None].to(steps)
            each = torch.zeros_like(steps).scatter(1, orders[:, :, None].expand_as(steps), steps)
            found = each.mean(dim=0).T[:, start:stop].to(fitting.theta)
            if self.permutations is None or len(orders) == 1:  # all of them, or one alone
                return found
            error = each.std(dim=0) / math.sqrt(len(orders))
            return found, error.T[:, start:stop].to(fitting.theta)

        def total(queries: Data, measure: Any) -> Tensor:
            """m_q(D) − m_q(∅)."""
            asked = as_measure(measure)
            whole, none = (
                measured(models.task_of(fitting.task, k), models.theta[k], queries, asked)
                for k in places[0, [-1, 0]].tolist()
            )
            return whole - none

        said = f"{len(coalitions)} models of coalitions were trained, {len(orders)} orders"
        adds_up = self.alpha == self.beta == 1
        return BlockScorer(score, at_once=n, notes=(said,), owed=total if adds_up else None)

    def orders(self, n: int) -> Int[Tensor, "r n"]:
        """The orders that are walked through."""
        if self.permutations is None:
            if math.factorial(n) > ALL:
                raise SpecError(
                    "All orders of the examples are walked through for n ≤ 8.",
                    f"permutations=None with n = {n}.",
                    "a training set of ordinary size.",
                    "give a number of permutations.",
                )
            return torch.tensor(list(itertools.permutations(range(n))))
        generator = torch.Generator().manual_seed(self.seed)
        return torch.stack(
            [torch.randperm(n, generator=generator) for _ in range(self.permutations)]
        )

    def weights(self, n: int) -> Float[Tensor, " n"]:
        """ω(j), whose mean over j is 1."""
        a, b = self.alpha, self.beta
        if a == b == 1:
            return torch.ones(n, dtype=torch.float64)
        j = torch.arange(1, n + 1, dtype=torch.float64)
        size = torch.tensor(float(n), dtype=torch.float64)
        logs = (
            size.log()
            + _log_choose(size - 1, j - 1)
            + _log_beta(j + b - 1, size - j + a)
            - _log_beta(torch.tensor(a).double(), torch.tensor(b).double())
        )
        return logs.exp()


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _prefixes(orders: Int[Tensor, "r n"]) -> tuple[Float[Tensor, "c n"], Int[Tensor, "r n_1"]]:
    """Every coalition that is met, once, and where in that list the prefixes of an order are."""
    r, n = orders.shape
    inside = torch.zeros(r, n + 1, n, dtype=torch.bool)
    for j in range(n):
        inside[:, j + 1] = inside[:, j]
        inside[torch.arange(r), j + 1, orders[:, j]] = True
    found, places = inside.reshape(-1, n).unique(  # type: ignore[no-untyped-call]
        dim=0, return_inverse=True
    )
    return found.double(), places.reshape(r, n + 1)


def _trained(recipe: Recipe, fitting: Fitting, weights: Float[Tensor, "c n"]) -> Trained:
    trainer = kept_trainer(
        recipe, fitting.task, fitting.data, fitting.resources.within("coalitions")
    )
    parts: list[Trained] = []
    for start in range(0, len(weights), trainer.at_once):
        found = trainer(weights[start : start + trainer.at_once])
        if found.failures:
            row, reason = next(iter(found.failures.items()))
            size = int(weights[start + row].sum())
            raise NotConverged(
                "Every coalition must train to the recipe's tolerance.",
                f"one of {size} of {weights.shape[1]} examples did not: {reason}.",
                "a coalition on which the objective has no minimum, as without a penalty.",
                "add a penalty such as L2(1e-3), or use a recipe of a number of steps.",
            )
        parts.append(found)
    return Trained.joined(parts)
