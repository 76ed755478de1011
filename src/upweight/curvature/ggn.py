"""E[Jᵀ ∇²_f ℓ J]: the generalized Gauss–Newton matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerms, mean_plus_penalty
from upweight.curvature.gauss_newton import GaussNewtonTerm, Way, Weigh, pieces, way
from upweight.curvature.linear import linear_term
from upweight.gradients.autograd import product_batch
from upweight.gradients.functional import output_jacobians
from upweight.gradients.linear import linear_form
from upweight.gradients.source import planned_jacobians
from upweight.linalg.operator import PSD, SYMMETRIC, LinearOperator
from upweight.task.batches import cut
from upweight.task.data import Data, batch_size
from upweight.task.task import Task

FORMED = 128
"""Outputs up to which Λ is formed, c² numbers per example; beyond, its products are taken."""


@dataclass(frozen=True)
class GGN:
    """G = (1/n) Σᵢ Jᵢᵀ Λᵢ Jᵢ + ∇²R(θ), with J = ∂f/∂θ and Λ = ∂²ℓ/∂f².

    The Hessian without the term in ∂²f/∂θ²; positive semi-definite whenever the loss is convex in
    f, at any θ. Schraudolph (2002); for the losses of an exponential family in its natural
    parameter it is the Fisher information (Martens 2020, §9).

    Cost: one product is two backward passes over the data; `dense()` is
    O(n·c·p²) multiply-adds from per-example Jacobians. Without `torch.func` vectors are not taken
    together, and without second derivatives a product takes c backward passes.

    Exact when: f is linear in θ, where it equals the Hessian.
    """

    def fit(
        self, task: Task, data: Data, theta: Float[Tensor, " p"], *, n: int | None = None
    ) -> LinearOperator:
        """G at θ; see `Curvature.fit`.

        Raises:
            UnsupportedModel: The loss has no second derivative, or the model no first one.
        """
        n = len(data) if n is None else n
        probe = task.to_device(data.batch(0, data.together(min(4, len(data)))))
        form = linear_form(task, theta, probe)
        if form is not None:
            term = linear_term(task, theta, form, data)
            return mean_plus_penalty(task, theta, (term,), n, term.tags)
        outputs, _ = task.outputs(theta, probe)
        tags = PSD if task.loss.convex else SYMMETRIC

        def term_of(how: Way, places: Int[Tensor, " b"], batch: Batch) -> GaussNewtonTerm:
            with torch.no_grad():
                f, targets = task.outputs(theta, batch)

            def jacobians() -> Iterator[Tensor]:
                for part, count in pieces(batch, len(places), at_once):
                    if how.plan is not None:
                        yield planned_jacobians(how.plan, theta, part, count)
                    else:
                        yield output_jacobians(task, theta, part, count)

            return GaussNewtonTerm(
                task,
                theta,
                lambda t: task.outputs(t, batch)[0].reshape(len(f), -1),
                jacobians,
                _output_curvature(task, f, targets, width),
                how,
                len(places),
                width,
                tags=tags,
            )

        width = outputs[0].numel()
        at_once = batch_size(width * (task.layout.size + width), task.layout.dtype.itemsize)
        how = way(task, theta, data, width, term_of)
        terms = BatchTerms(task, data, product_batch(how.saved), partial(term_of, how))
        return mean_plus_penalty(task, theta, terms, n, tags, how.notes)


def _output_curvature(task: Task, outputs: Tensor, targets: Any, width: int) -> Weigh:
    """(u, some) ↦ Λ u. With as many outputs as a language model has, Λ is not formed."""
    if width <= FORMED:
        lambdas = task.output_hessian(outputs, targets)
        return lambda u, some: (lambdas[some].to(u) @ u[..., None])[..., 0]

    def product(u: Float[Tensor, "k m c"], some: slice) -> Float[Tensor, "k m c"]:
        part = cut(targets, some, len(outputs))
        return task.output_hessian_product(outputs[some], part, u)

    return product
