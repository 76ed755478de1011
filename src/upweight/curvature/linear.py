"""Σᵢ Λᵢ ⊗ zᵢ zᵢᵀ: the curvature of a model that is linear in θ, by matrix products.

For f = W z(x) + b, softmax, logistic, Poisson and linear regression alike, the Hessian, the GGN and
the exact Fisher coincide, and block (a, c) of the Hessian is the weighted Gram matrix

    H[a, c] = (1/n) Σᵢ Λᵢ[a, c] zᵢ zᵢᵀ        Λ = ∂²ℓ/∂f²   (softmax: diag p − p pᵀ)

so c(c+1)/2 matrix products assemble it exactly; no backward pass is taken.
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
        c = self.form.outputs
        for a in range(c):
            for d in range(a, c):
                gram = self._gram(self.lambdas[:, a, d].to(out.dtype) * scale, out.dtype)
                self._place(out, a, d, gram)
                if a != d:
                    self._place(out, d, a, gram)

    def diagonal(self) -> Float[Tensor, " p"]:
        curvature = self.lambdas.diagonal(dim1=1, dim2=2)
        return self.form.flatten(curvature.T @ self.z.square())

    def _gram(self, weights: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "i i"]:
        """Σᵢ weightsᵢ zᵢ zᵢᵀ."""
        z = self.z.to(dtype)
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
        lambdas.append(task.loss.hessian(outputs, targets))
    return LinearTerm(task, form, torch.cat(z), torch.cat(lambdas))
