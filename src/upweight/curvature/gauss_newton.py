"""Σ_b Jᵇᵀ Λᵇ Jᵇ: the product form shared by the GGN and both Fishers.

For a map F(θ) with one row per example, Jᵢ = ∂Fᵢ/∂θ and a small symmetric Λᵢ,

    A v = Σᵢ Jᵢᵀ Λᵢ (Jᵢ v)

costs two reverse-mode passes per vector. The GGN takes F = f and Λ = ∂²ℓ/∂f²; the Fishers take F =
ℓ and Λ = 1, which is Σ gᵢ gᵢᵀ.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.curvature import BatchTerm
from upweight.linalg.operator import Tag
from upweight.task.task import Task


class GaussNewtonTerm(BatchTerm):
    """Σᵢ Jᵢᵀ Λᵢ Jᵢ over one batch.

    Args:
        task: What was trained.
        function: θ ↦ F(θ), `[p] -> [b, c]`.
        jacobians: () ↦ J, `[b, c, p]`; called only to write the matrix out.
        lambdas: Λ, or None for the identity.
    """

    def __init__(
        self,
        task: Task,
        function: Callable[[Tensor], Float[Tensor, "b c"]],
        jacobians: Callable[[], Float[Tensor, "b c p"]],
        lambdas: Float[Tensor, "b c c"] | None,
        tags: frozenset[Tag],
    ) -> None:
        super().__init__(task, tags)
        self.function, self.jacobians, self.lambdas = function, jacobians, lambdas

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        if v.numel() == 0:  # vmap needs at least one vector
            return v.clone()
        values, pullback = torch.func.vjp(self.function, self.task.theta())  # type: ignore[misc]
        # u ↦ Jᵀu is linear, so its own pullback at v is J v. Unlike forward mode this needs only
        # operations that have a backward pass (fused encoder layers have no forward mode), and the
        # forward pass is shared by all vectors.
        pushforward = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(values))[1]

        def one(direction: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
            jv = pushforward(direction)[0]
            if self.lambdas is not None:
                jv = (self.lambdas @ jv[:, :, None])[:, :, 0]
            return pullback(jv)[0]

        flat = v.reshape(-1, v.shape[-1])
        return torch.func.vmap(one, chunk_size=16)(flat).reshape(v.shape)

    def add_to(self, out: Float[Tensor, "p p"], scale: float = 1.0) -> None:
        j, weighted = self._factors()
        out.addmm_(j.flatten(0, 1).T.to(out), weighted.flatten(0, 1).to(out), alpha=scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        j, weighted = self._factors()
        return (j * weighted).sum(dim=(0, 1))

    def _factors(self) -> tuple[Float[Tensor, "b c p"], Float[Tensor, "b c p"]]:
        j = self.jacobians()
        return j, j if self.lambdas is None else self.lambdas @ j
