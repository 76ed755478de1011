"""Σᵢ Λᵢ ⊗ zᵢ zᵢᵀ: the curvature of a model that is linear in θ, by matrix products.

For f = W z(x) + b, softmax, logistic, Poisson and linear regression alike, the Hessian, the GGN and
the exact Fisher coincide, and block (a, c) of the Hessian is the weighted Gram matrix

    H[a, c] = (1/n) Σᵢ Λᵢ[a, c] zᵢ zᵢᵀ        Λ = ∂²ℓ/∂f²   (softmax: diag p − p pᵀ)

so at most c(c+1)/2 matrix products assemble it exactly; no backward pass is taken.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.curvature import BatchTerm
from upweight.gradients.linear import LinearForm
from upweight.linalg.operator import Tag
from upweight.task.data import Data, batch_size
from upweight.task.task import Task

PANEL = 256
"""Columns of z per product. A Gram matrix is symmetric: only panels on or above its diagonal are
multiplied, which saves up to half, and products this wide still run at full speed."""


class LinearTerm(BatchTerm):
    """Σᵢ Λᵢ ⊗ zᵢ zᵢᵀ over all examples. Memory: n·(i + c²) numbers."""

    def __init__(
        self,
        task: Task,
        form: LinearForm,
        z: Float[Tensor, "n i"],
        lambdas: Float[Tensor, "n c c"],
    ) -> None:
        tags = {Tag.SYMMETRIC, Tag.PSD} if task.loss.convex else {Tag.SYMMETRIC}
        super().__init__(task, frozenset(tags))
        self.form, self.z, self.lambdas = form, z, lambdas

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        matrix = self.form.matrix(v)
        projected = torch.einsum("...ci,ni->...nc", matrix, self.z)
        weighted = torch.einsum("...nc,ncd->...nd", projected, self.lambdas)
        return self.form.flatten(weighted.transpose(-1, -2) @ self.z)

    def add_to(self, out: Float[Tensor, "p p"], scale: float = 1.0) -> None:
        """Block (a, d) goes straight to its place: nothing else of size p × p is formed."""
        c, weights = self.form.outputs, scale * self.lambdas.to(out.dtype)
        diagonal = [self.z.new_zeros((), dtype=out.dtype)] * c
        for a in range(c):
            for d in range(a + 1, c):
                gram = self._gram(weights[:, a, d])
                self._place(out, a, d, gram)
                self._place(out, d, a, gram)
                diagonal[a], diagonal[d] = diagonal[a] - gram, diagonal[d] - gram
        for a in range(c):
            gram = diagonal[a] if self._shift_invariant else self._gram(weights[:, a, a])
            self._place(out, a, a, gram)

    @property
    def _shift_invariant(self) -> bool:
        """Whether Λ 1 = 0, as for a softmax: H[a, a] is then −Σ_d H[a, d], without a product.

        The terms of that sum have one sign for a softmax, so no digits cancel.
        """
        rows = self.lambdas.sum(dim=2).abs().max()
        return self.form.outputs > 1 and bool(
            rows <= 100 * torch.finfo(self.lambdas.dtype).eps * self.lambdas.abs().max()
        )

    def diagonal(self) -> Float[Tensor, " p"]:
        curvature = self.lambdas.diagonal(dim1=1, dim2=2)
        return self.form.flatten(curvature.T @ self.z.square())

    def _gram(self, weights: Float[Tensor, " n"]) -> Float[Tensor, "i i"]:
        """Σᵢ weightsᵢ zᵢ zᵢᵀ, in the dtype of the weights."""
        z = self.z.to(weights.dtype)
        weighted = weights[:, None] * z
        width = z.shape[1]
        gram = z.new_empty(width, width)
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            panel = weighted[:, start:stop].T @ z[:, start:]
            gram[start:stop, start:] = panel
            gram[start:, start:stop] = panel.T
        return gram

    def _place(self, out: Float[Tensor, "p p"], a: int, d: int, gram: Float[Tensor, "i i"]) -> None:
        """Add rows and columns over `[W | b]` of outputs a, d where the layout keeps them."""
        inputs = self.form.width - (1 if self.form.bias else 0)
        rows, columns = slice(a * inputs, (a + 1) * inputs), slice(d * inputs, (d + 1) * inputs)
        out[rows, columns] += gram[:inputs, :inputs]
        if self.form.bias:
            biases = self.form.outputs * inputs
            out[rows, biases + d] += gram[:inputs, inputs]
            out[biases + a, columns] += gram[inputs, :inputs]
            out[biases + a, biases + d] += gram[inputs, inputs]


def linear_term(task: Task, form: LinearForm, data: Data) -> LinearTerm:
    """The term of all examples, from one forward pass over them."""
    theta = task.theta()
    z, lambdas = [], []
    for _, _, batch in data.batches(batch_size(form.width + form.outputs**2, 8)):
        batch = task.to_device(batch)
        with torch.no_grad():
            outputs, targets = task.outputs(theta, batch)
        z.append(form.features(task, batch))
        lambdas.append(task.output_hessian(outputs, targets))
    return LinearTerm(task, form, torch.cat(z), torch.cat(lambdas))
