"""E_ŷ[g gᵀ] with ŷ ~ p(· | f): the Fisher information, by sampling labels from the model."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerms, mean_plus_penalty
from upweight.curvature.empirical_fisher import PSD, outer_products
from upweight.curvature.gauss_newton import Way, way
from upweight.linalg.operator import LinearOperator
from upweight.task.data import Data, batch_size
from upweight.task.task import Task


@dataclass(frozen=True)
class Fisher:
    """F ≈ (1/n) Σᵢ (1/s) Σₛ g(ŷₛ) g(ŷₛ)ᵀ + ∇²R(θ̂), with s labels ŷ ~ p(· | f(xᵢ)) per example.

    Unbiased for the Fisher information, which for exponential families in their natural parameter
    equals the GGN. The labels are drawn anew from the seed for every product, so each product sees
    the same ones.

    Args:
        samples: s, labels drawn per example.
        seed: Seed of the draws.

    Cost: s times the empirical Fisher's.

    Exact when: in expectation over seeds, or samples → ∞. Amari (1998); Martens (2020), §5.
    """

    samples: int = 1
    seed: int = 0

    def fit(self, task: Task, data: Data, *, n: int | None = None) -> LinearOperator:
        """F at θ̂; see `Curvature.fit`.

        Raises:
            UnsupportedModel: The loss is not a negative log-likelihood one can sample from.
        """

        def term_of(how: Way, places: range, batch: Batch) -> LinearOperator:
            generator = torch.Generator(device=task.layout.device)
            generator.manual_seed(self.seed * 1_000_003 + places.start)
            terms = [
                self._one(task, how, batch, len(places), generator) for _ in range(self.samples)
            ]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            return (1.0 / self.samples) * total

        size = batch_size(task.layout.size, task.layout.dtype.itemsize)
        how = way(task, data, 1, term_of)
        terms = BatchTerms(task, data, size, partial(term_of, how))
        return mean_plus_penalty(task, terms, len(data) if n is None else n, PSD, how.notes)

    @staticmethod
    def _one(
        task: Task, how: Way, batch: Batch, size: int, generator: torch.Generator
    ) -> LinearOperator:
        with torch.no_grad():
            outputs, targets = task.outputs(task.theta(), batch)
        # The drawn labels travel with the batch, so that both are mapped over.
        drawn = task.loss.sample(outputs, targets, generator)

        def forward(model: nn.Module, pair: Any) -> tuple[Any, Any]:
            return task.forward(model, pair[0])[0], pair[1]

        relabeled = Task(
            task.model,
            task.loss,
            task.penalty,
            task.params,
            forward=forward,
        )
        return outer_products(relabeled, how, (batch, drawn), size)
