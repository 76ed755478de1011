"""(1/n) Σ gᵢ gᵢᵀ: the empirical Fisher, and why it is not the Fisher.

It takes the labels of the data where the Fisher takes labels drawn from the model. The two agree
only where the model is right about the label distribution; near an interpolating solution gᵢ → 0
and the empirical Fisher vanishes while the Fisher need not (Kunstner, Balles & Hennig 2019, §3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerms, mean_plus_penalty
from upweight.curvature.gauss_newton import GaussNewtonTerm, Way, pieces, way
from upweight.gradients.autograd import product_batch
from upweight.gradients.functional import value_gradients
from upweight.gradients.source import planned_rows
from upweight.linalg.operator import PSD, LinearOperator
from upweight.task.data import Data, batch_size
from upweight.task.task import Task


def outer_products(
    task: Task, theta: Float[Tensor, " p"], how: Way, batch: Any, size: int
) -> GaussNewtonTerm:
    """Σᵢ gᵢ gᵢᵀ over one batch of `size` examples, with the gradients of its own targets."""
    at_once = batch_size(task.layout.size, task.layout.dtype.itemsize)

    def rows() -> Iterator[Tensor]:
        for part, count in pieces(batch, size, at_once):
            if how.plan is not None:
                yield planned_rows(how.plan, theta, task.losses, part, count)[:, None]
            else:
                yield value_gradients(task.losses, theta, part, count)[:, None]

    return GaussNewtonTerm(
        task, theta, lambda t: task.losses(t, batch)[:, None], rows, None, how, size, 1, tags=PSD
    )


@dataclass(frozen=True)
class EmpiricalFisher:
    """F̂ = (1/n) Σᵢ gᵢ gᵢᵀ + ∇²R(θ), with gᵢ = ∇ℓᵢ(θ) on the data's own targets.

    Positive semi-definite, of rank at most n before the penalty. Scales as c² when the loss is
    multiplied by c, where the Hessian scales as c.

    Cost: one product is two backward passes over the data; `dense()` is O(n·p²).

    Exact when: the model's conditional distribution is the data's, in expectation.
    """

    def fit(
        self, task: Task, data: Data, theta: Float[Tensor, " p"], *, n: int | None = None
    ) -> LinearOperator:
        """F̂ at θ; see `Curvature.fit`."""

        def term_of(how: Way, places: Int[Tensor, " b"], batch: Batch) -> LinearOperator:
            return outer_products(task, theta, how, batch, len(places))

        how = way(task, theta, data, 1, term_of)
        terms = BatchTerms(task, data, product_batch(how.saved), partial(term_of, how))
        n = len(data) if n is None else n
        return mean_plus_penalty(task, theta, terms, n, PSD, how.notes)
