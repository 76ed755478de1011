"""E[Jᵀ ∇²_f ℓ J]: the generalized Gauss–Newton matrix."""

from dataclasses import dataclass

import torch

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerms, mean_plus_penalty
from upweight.curvature.gauss_newton import GaussNewtonTerm
from upweight.curvature.linear import linear_term
from upweight.gradients.functional import output_jacobians
from upweight.gradients.linear import linear_form
from upweight.linalg.operator import LinearOperator, Tag
from upweight.task.data import Data, batch_size
from upweight.task.task import Task


@dataclass(frozen=True)
class GGN:
    """G = (1/n) Σᵢ Jᵢᵀ Λᵢ Jᵢ + ∇²R(θ̂), with J = ∂f/∂θ and Λ = ∂²ℓ/∂f².

    The Hessian without the term in ∂²f/∂θ²; positive semi-definite whenever the loss is convex in
    f, at any θ. Schraudolph (2002); for the losses of an exponential family in its natural
    parameter it is the Fisher information (Martens 2020, §9).

    Cost: one product is two backward passes over the data; `dense()` is
    O(n·c·p²) multiply-adds from per-example Jacobians.

    Exact when: f is linear in θ, where it equals the Hessian.
    """

    def fit(self, task: Task, data: Data, *, n: int | None = None) -> LinearOperator:
        """G at θ̂; see `Curvature.fit`."""
        n = len(data) if n is None else n
        probe = task.to_device(data.batch(0, min(4, len(data))))
        form = linear_form(task, probe)
        if form is not None:
            term = linear_term(task, form, data)
            return mean_plus_penalty(task, (term,), n, term.tags)
        outputs, _ = task.outputs(task.theta(), probe)
        tags = frozenset({Tag.SYMMETRIC, Tag.PSD} if task.loss.convex else {Tag.SYMMETRIC})

        def term_of(_: int, batch: Batch) -> GaussNewtonTerm:
            with torch.no_grad():
                f, targets = task.outputs(task.theta(), batch)
            return GaussNewtonTerm(
                task,
                lambda t: task.outputs(t, batch)[0].reshape(len(f), -1),
                lambda: output_jacobians(task, task.theta(), batch),
                task.output_hessian(f, targets),
                tags,
            )

        values = outputs[0].numel() * (task.layout.size + outputs[0].numel())
        size = batch_size(values, task.layout.dtype.itemsize)
        return mean_plus_penalty(task, BatchTerms(task, data, size, term_of), n, tags)
