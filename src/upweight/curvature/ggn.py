"""E[Jᵀ ∇²_f ℓ J]: the generalized Gauss–Newton matrix."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerms, mean_plus_penalty
from upweight.curvature.gauss_newton import TOGETHER, GaussNewtonTerm, Way, way
from upweight.curvature.linear import linear_term
from upweight.gradients.functional import output_jacobians
from upweight.gradients.linear import linear_form
from upweight.gradients.source import planned_jacobians
from upweight.linalg.operator import LinearOperator, Tag
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
        total, tags, notes = self.sums(task, data, theta)
        return mean_plus_penalty(task, theta, total(data), n, tags, notes)

    def sums(
        self, task: Task, data: Data, theta: Float[Tensor, " p"]
    ) -> tuple[Callable[[Data], Sequence[LinearOperator]], frozenset[Tag], tuple[str, ...]]:
        """Σᵢ Jᵢᵀ Λᵢ Jᵢ over any part of the data, as terms that are made when they are asked for.

        How products are taken is found out once, so that minibatches cost their products only.

        Returns:
            The function from a part of the data to its terms; what is known of them; and notes.

        Raises:
            UnsupportedModel: As for `fit`.
        """
        probe = task.to_device(data.batch(0, data.together(min(4, len(data)))))
        form = linear_form(task, theta, probe)
        if form is not None:
            known = frozenset({Tag.SYMMETRIC, Tag.PSD} if task.loss.convex else {Tag.SYMMETRIC})
            return lambda part: (linear_term(task, theta, form, part),), known, ()
        outputs, _ = task.outputs(theta, probe)
        width = outputs[0].numel()
        tags = frozenset({Tag.SYMMETRIC, Tag.PSD} if task.loss.convex else {Tag.SYMMETRIC})
        whole = batch_size(width * (task.layout.size + width), task.layout.dtype.itemsize)

        def term_of(how: Way, places: range, batch: Batch) -> GaussNewtonTerm:
            with torch.no_grad():
                f, targets = task.outputs(theta, batch)

            def jacobians() -> Tensor:
                if how.plan is not None:
                    return planned_jacobians(how.plan, theta, batch, len(places))
                return output_jacobians(task, theta, batch, len(places))

            def parts() -> Iterator[GaussNewtonTerm]:
                for start in range(0, len(places), whole):
                    some = slice(start, start + whole)
                    yield term_of(how, places[some], cut(batch, some, len(places)))

            return GaussNewtonTerm(
                task,
                theta,
                lambda t: task.outputs(t, batch)[0].reshape(len(f), -1),
                jacobians,
                _output_curvature(task, f, targets, width),
                tags,
                how.products,
                parts if len(places) > whole else None,
            )

        how = way(task, theta, data, width, term_of)
        # What a product keeps per vector: outputs, and activations by a guess from p.
        values = TOGETHER * (task.layout.size + 4 * width)
        size = batch_size(values, task.layout.dtype.itemsize)
        made = partial(term_of, how)
        return lambda part: BatchTerms(task, part, size, made), tags, how.notes


def _output_curvature(
    task: Task, outputs: Tensor, targets: Any, width: int
) -> Callable[[Float[Tensor, "k b c"]], Float[Tensor, "k b c"]]:
    """u ↦ Λ u. With as many outputs as a language model has, Λ is not formed."""
    if width > FORMED:
        return partial(task.output_hessian_product, outputs, targets)
    lambdas = task.output_hessian(outputs, targets)
    return lambda u: (lambdas @ u[..., None])[..., 0]
