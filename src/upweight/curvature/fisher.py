"""E_ŷ[g gᵀ] with ŷ ~ p(· | f): the Fisher information, by sampling labels from the model."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerms, mean_plus_penalty
from upweight.curvature.empirical_fisher import outer_products
from upweight.curvature.gauss_newton import Way, way
from upweight.curvature.labels import Sampled
from upweight.gradients.autograd import product_batch
from upweight.linalg.operator import PSD, LinearOperator
from upweight.task.data import Data
from upweight.task.task import Task


@dataclass(frozen=True)
class Fisher:
    """F ≈ (1/n) Σᵢ (1/s) Σₛ g(ŷₛ) g(ŷₛ)ᵀ + ∇²R(θ), with s labels ŷ ~ p(· | f(xᵢ)) per example.

    Unbiased for the Fisher information, which for exponential families in their natural parameter
    equals the GGN. The labels are those of `Sampled(samples, seed)`: the same for every product,
    whatever the batches.

    Cost: s times the empirical Fisher's.

    Exact when: in expectation over seeds, or samples → ∞. Amari (1998); Martens (2020), §5.
    """

    samples: int = 1
    seed: int = 0

    def fit(
        self, task: Task, data: Data, theta: Float[Tensor, " p"], *, n: int | None = None
    ) -> LinearOperator:
        """F at θ; see `Curvature.fit`.

        Raises:
            SpecError: Not at least one sample.
            UnsupportedModel: The loss is not a negative log-likelihood one can sample from.
        """
        labels = Sampled(self.samples, self.seed)

        def term_of(how: Way, places: Int[Tensor, " b"], batch: Batch) -> LinearOperator:
            with torch.no_grad():
                outputs, targets = task.outputs(theta, batch)
            heads = labels.heads(task.loss, outputs, targets, places, 0)
            first, *others = [
                _relabeled(task, theta, how, batch, len(places), *head) for head in heads
            ]
            return (1.0 / self.samples) * sum(others, start=first)

        how = way(task, theta, data, 1, term_of)
        terms = BatchTerms(task, data, product_batch(how.saved), partial(term_of, how))
        n = len(data) if n is None else n
        return mean_plus_penalty(task, theta, terms, n, PSD, how.notes)


def _relabeled(
    task: Task,
    theta: Float[Tensor, " p"],
    how: Way,
    batch: Batch,
    size: int,
    head: Any,
    extra: Tensor,
) -> LinearOperator:
    """Σᵢ gᵢ gᵢᵀ of the values of a head."""

    # What was drawn travels with the batch, so that both are mapped over.
    def forward(model: nn.Module, pair: Any) -> tuple[Any, Any]:
        return task.forward(model, pair[0])[0], pair[1]

    def loss(f: Tensor, drawn: Tensor) -> Tensor:
        return head(f, None, drawn)  # type: ignore[no-any-return]

    relabeled = Task(task.model, loss, task.penalty, task.params, forward=forward)
    return outer_products(relabeled, theta, how, (batch, extra), size)
