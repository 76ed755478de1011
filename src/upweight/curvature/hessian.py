"""∇²J: the Hessian of the mean loss plus the penalty."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerm, BatchTerms, mean_plus_penalty
from upweight.curvature.linear import linear_term
from upweight.gradients.linear import linear_form
from upweight.linalg.operator import LinearOperator, Tag
from upweight.task.data import Data, batch_size
from upweight.task.task import Task


class HessianTerm(BatchTerm):
    """Σᵢ ∇²ℓᵢ(θ̂) over one batch, applied by reverse mode over reverse mode.

    A Hessian is symmetric, so the pullback of v through ∇ℓ is H v; unlike forward over reverse this
    needs only operations that have a backward pass.
    """

    def __init__(self, task: Task, batch: Batch) -> None:
        super().__init__(task, frozenset({Tag.SYMMETRIC}))
        self.batch = batch

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        gradient = torch.func.grad(lambda t: self.task.losses(t, self.batch).sum())
        pullback = torch.func.vjp(gradient, self.task.theta())[1]
        if v.numel() == 0:  # vmap needs at least one vector
            return v.clone()
        flat = v.reshape(-1, v.shape[-1])
        rows = torch.func.vmap(lambda u: pullback(u)[0], chunk_size=16)(flat)
        return rows.reshape(v.shape)


@dataclass(frozen=True)
class Hessian:
    """H = (1/n) Σᵢ ∇²ℓᵢ(θ̂) + ∇²R(θ̂), exact.

    Symmetric; positive definite at a strict minimum, usually indefinite elsewhere. A model that is
    one linear map of fixed features (softmax, logistic, Poisson, linear regression, or a last
    layer) is recognized and assembled by matrix products.

    Cost: one product is two backward passes over the data; `dense()` takes p of them, or
    O(n·c²·i²) multiply-adds for a linear model.

    Exact when: always. Koh & Liang (2017), §2.
    """

    def fit(self, task: Task, data: Data, *, n: int | None = None) -> LinearOperator:
        """∇²J at θ̂; see `Curvature.fit`."""
        n = len(data) if n is None else n
        form = linear_form(task, task.to_device(data.batch(0, min(4, len(data)))))
        if form is not None:
            term = linear_term(task, form, data)
            return mean_plus_penalty(task, (term,), n, term.tags)
        size = batch_size(task.layout.size, task.layout.dtype.itemsize)
        terms = BatchTerms(task, data, size, lambda _, batch: HessianTerm(task, batch))
        return mean_plus_penalty(task, terms, n, frozenset({Tag.SYMMETRIC}))
