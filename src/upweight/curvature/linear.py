"""Σᵢ Λᵢ ⊗ zᵢ zᵢᵀ: the curvature of a model that is linear in θ, by matrix products.

For f = W z(x) + b, softmax, logistic, Poisson and linear regression alike, the Hessian, the GGN and
the exact Fisher coincide, and block (a, c) of the Hessian is the weighted Gram matrix

    H[a, c] = (1/n) Σᵢ Λᵢ[a, c] zᵢ zᵢᵀ        Λ = ∂²ℓ/∂f²   (softmax: diag p − p pᵀ)

so at most c(c+1)/2 matrix products assemble it exactly; no backward pass is taken.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.curvature.curvature import BatchTerm
from upweight.gradients.linear import LinearForm
from upweight.linalg.operator import PSD, SYMMETRIC
from upweight.runtime.memory import require_bytes
from upweight.task.data import Data, batch_size
from upweight.task.task import Task

PANEL = 256
"""Columns of z per product. A Gram matrix is symmetric: only panels on or above its diagonal are
multiplied, which saves up to half, and products this wide still run at full speed."""

AT_ONCE = 4_000_000
"""Numbers that the Gram matrices made together may take on the way."""


@dataclass(frozen=True, eq=False, repr=False)
class LinearTerm(BatchTerm):
    """Σᵢ Λᵢ ⊗ zᵢ zᵢᵀ over all examples. Memory: n·(i + c²) numbers."""

    form: LinearForm
    z: Float[Tensor, "n i"]
    lambdas: Float[Tensor, "n c c"]

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        matrix = self.form.matrix(v)
        projected = torch.einsum("...ci,ni->...nc", matrix, self.z)
        weighted = torch.einsum("...nc,ncd->...nd", projected, self.lambdas)
        return self.form.flatten(weighted.transpose(-1, -2) @ self.z)

    @property
    def examples(self) -> int:
        """How many are summed."""
        return len(self.z)

    def some(self, indices: Int[Tensor, " m"]) -> "LinearTerm":
        """The sum over these examples alone."""
        return replace(self, z=self.z[indices], lambdas=self.lambdas[indices])

    def add_to(self, out: Float[Tensor, "p p"], scale: float = 1.0) -> None:
        """Blocks go straight to their places, some of a row at once: small ones cost their calls.

        Nothing else of size p × p is formed.
        """
        c, weights = self.form.outputs, scale * self.lambdas.to(out.dtype)
        width = self.z.shape[1]
        at_once = max(1, AT_ONCE // max(1, width * (len(self.z) + width)))
        invariant = self._shift_invariant
        diagonal = self.z.new_zeros(c, width, width, dtype=out.dtype)
        for a in range(c):
            for start in range(a + 1, c, at_once):
                some = slice(start, min(start + at_once, c))
                grams = self._grams(weights[:, a, some])
                self._place(out, a, some, grams)
                self._place(out, a, some, grams, transposed=True)
                if invariant:
                    diagonal[a] -= grams.sum(dim=0)
                    diagonal[some] -= grams
        for start in range(0, c if not invariant else 0, at_once):
            some = slice(start, min(start + at_once, c))
            diagonal[some] = self._grams(weights.diagonal(dim1=1, dim2=2)[:, some])
        for a in range(c):
            self._place(out, a, slice(a, a + 1), diagonal[a : a + 1])

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

    def _grams(self, weights: Float[Tensor, "n k"]) -> Float[Tensor, "k i i"]:
        """Σᵢ weights[i, k] zᵢ zᵢᵀ for each k, in the dtype of the weights."""
        n, width = self.z.shape
        if width > PANEL:
            return torch.stack([self._gram(column) for column in weights.unbind(dim=1)])
        z = self.z.to(weights.dtype)
        weighted = (weights[:, :, None] * z[:, None]).reshape(n, -1)
        return (z.T @ weighted).reshape(width, -1, width).transpose(0, 1)

    def _place(
        self,
        out: Float[Tensor, "p p"],
        a: int,
        some: slice,
        grams: Float[Tensor, "k i i"],
        transposed: bool = False,
    ) -> None:
        """Add the rows of output a and columns of outputs `some`, where the layout of [W | b] is.

        Transposed, the rows of `some` and columns of a; a Gram matrix is its own transpose.
        """
        out = out.T if transposed else out
        c, bias = self.form.outputs, self.form.bias is not None
        inputs = self.form.width - (1 if bias else 0)
        weights, rows = slice(0, c * inputs), slice(a * inputs, (a + 1) * inputs)
        if inputs:
            columns = out[rows, weights].view(inputs, c, inputs)
            columns[:, some] += grams[:, :inputs, :inputs].transpose(0, 1)
        if bias:
            biases = slice(c * inputs + some.start, c * inputs + some.stop)
            row = c * inputs + a
            out[rows, biases] += grams[:, :inputs, inputs].T
            if inputs:
                out[row, weights].view(c, inputs)[some] += grams[:, inputs, :inputs]
            out[row, biases] += grams[:, inputs, inputs]


def linear_term(task: Task, theta: Float[Tensor, " p"], form: LinearForm, data: Data) -> LinearTerm:
    """The term of all examples at θ, from one forward pass over them.

    Raises:
        SpecError: n·(i + c²) numbers do not fit into memory.
    """
    numbers = len(data) * (form.width + form.outputs**2)
    require_bytes(
        numbers * task.layout.dtype.itemsize,
        f"the curvature of {len(data)} examples in {form.outputs} outputs",
        task.layout.device,
        "use curvature=EKFAC(), which keeps no outputs of single examples.",
    )
    z, lambdas = [], []
    for _, _, batch in data.batches(batch_size(form.width + form.outputs**2, 8)):
        batch = task.to_device(batch)
        with torch.no_grad():
            outputs, targets = task.outputs(theta, batch)
        z.append(form.features(task, batch))
        lambdas.append(task.output_hessian(outputs, targets))
    tags = PSD if task.loss.convex else SYMMETRIC
    return LinearTerm(task, theta, form, torch.cat(z), torch.cat(lambdas), tags=tags)
