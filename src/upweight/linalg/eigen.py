"""A = Q Λ Qᵀ with Q = Q₁ ⊗ Q₂ ⊗ …, and functions of it: f(A) = Q f(Λ) Qᵀ.

A vector is laid out as an array with one axis per factor, and each Q acts on its own axis; nothing
of size p × p is formed. One factor is an eigendecomposition, two are K-FAC and EK-FAC, none at all
(every basis None) is a diagonal matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NotPositiveDefinite, ShapeError
from upweight.linalg.operator import PSD, SYMMETRIC, SymmetricOperator, Tag
from upweight.linalg.products import product


@dataclass(frozen=True, eq=False, repr=False)
class Eigen(SymmetricOperator):
    """Q diag(values) Qᵀ with Q a Kronecker product of orthogonal bases, one for each axis.

    A basis has its eigenvectors in columns; None stands for the identity.

    Raises:
        ShapeError: The bases do not fit the array of eigenvalues.
    """

    bases: tuple[Tensor | None, ...]
    values: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        sizes = tuple(
            self.values.shape[k] if q is None else q.shape[0] for k, q in enumerate(self.bases)
        )
        if sizes != tuple(self.values.shape):
            raise ShapeError(
                "Eigenvalues need one axis per basis, each as long as its basis.",
                f"eigenvalues {tuple(self.values.shape)} for bases of sizes {sizes}.",
                "factors in the wrong order, or a bias column on one of them only.",
                "give the bases in the order of the axes of the eigenvalues.",
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.numel(), self.values.numel())

    @property
    def like(self) -> Tensor:
        return self.values

    @property
    def tags(self) -> frozenset[Tag]:
        psd = bool((self.values >= 0).all())
        return PSD if psd else SYMMETRIC

    def rotated(self, array: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
        """Qᵀ v for arrays v [*k, d₁, d₂, …]."""
        return self._along_axes(array, transposed=False)

    def unrotated(self, array: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
        """Q v for arrays v [*k, d₁, d₂, …]."""
        return self._along_axes(array, transposed=True)

    def _along_axes(self, array: Tensor, transposed: bool) -> Tensor:
        for k, q in enumerate(self.bases):
            if q is None:
                continue
            q = (q.mT if transposed else q).to(array.dtype)
            axis = k - len(self.bases)
            if axis == -2:  # without moving the axis: qᵀ acts from the left
                array = q.mT @ array
            else:
                array = product(array.movedim(axis, -1), q).movedim(-1, axis)
        return array

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        array = v.reshape(*v.shape[:-1], *self.values.shape)
        return self.unrotated(self.rotated(array) * self.values).reshape(v.shape)

    def trace(self) -> Float[Tensor, ""]:
        return self.values.sum()

    def function(self, f: Callable[[Tensor], Tensor]) -> "Eigen":
        """f(A) = Q f(Λ) Qᵀ."""
        return Eigen(self.bases, f(self.values))

    def inverse(self, damping: float) -> "Eigen":
        """(A + λI)⁻¹.

        Raises:
            NotPositiveDefinite: An eigenvalue of A + λI is zero or negative.
        """
        smallest, floor = float(self.values.min()) + damping, self._rounding()
        if not smallest > floor:
            zeros = int((self.values + damping <= floor).sum())
            raise NotPositiveDefinite(
                "The inverse needs every eigenvalue of A + λI above zero.",
                f"{zeros} of {math.prod(self.values.shape)} eigenvalues that are not; the "
                f"smallest is {smallest:.3g} (λ = {damping:.3g}).",
                "directions in which the training data say nothing (an input that is always "
                "zero, a unit that never fires), with no damping and no penalty.",
                "set damping: Relative(0.1) is the usual choice, Absolute(λ) the λ of an "
                "L2 penalty that was trained with.",
                smallest=smallest,
            )
        return self.function(lambda values: 1.0 / (values + damping))

    def _rounding(self) -> float:
        """What an eigenvalue of zero may look like."""
        machine = torch.finfo(self.dtype)
        # Below the smallest normal number the inverse overflows or has no digits.
        floor = float(machine.tiny)
        if any(q is not None for q in self.bases):
            # A basis is off by ε, and a second moment along it by ε². Observed for a singular
            # direction: 1e-32 of the largest in float64, 1e-15 in float32.
            largest = float(self.values.abs().max())
            floor = max(floor, machine.eps**2 * max(self.values.shape) * largest)
        return floor


TIED = 64
"""How many ε of themselves two eigenvalues may be apart that are equal but for rounding."""


def eigenbasis(
    matrix: Float[Tensor, "d d"], dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues and eigenvectors of a symmetric matrix, decomposed in float64 on the CPU.

    In float32 the small eigenvalues of a covariance, which damping is compared to, are noise. Of
    equal ones (of words that a text has as often as others) any basis of their space would do, and
    rounding would choose: it is that of a fixed diagonal matrix within the space.

    Args:
        matrix: Its entries.
        dtype: What they were computed in, by whose ε eigenvalues are equal; None: its own.
    """
    values, vectors = torch.linalg.eigh(matrix.double().cpu())
    # LAPACK's are stored by columns; in one layout, products round the same whatever the source.
    vectors = _settled(values, vectors.contiguous(), dtype or matrix.dtype)
    return values.to(matrix.device), vectors.to(matrix.device)


def _settled(
    values: Float[Tensor, " d"], vectors: Float[Tensor, "d d"], dtype: torch.dtype
) -> Float[Tensor, "d d"]:
    """The eigenvectors, with one basis for each run of equal eigenvalues above zero."""
    d, eps = len(values), torch.finfo(values.dtype).eps
    if d < 2 or not bool(values.isfinite().all()):
        return vectors
    largest = float(values.abs().max())
    slack = torch.finfo(dtype).eps * values[1:]
    is_equal = (values.diff() <= TIED * slack) & (values[:-1] > d * eps * largest)
    runs = F.pad((~is_equal).cumsum(0), (1, 0))
    counts = torch.unique_consecutive(runs, return_counts=True)[1]
    weights, stop = torch.arange(1, d + 1, dtype=values.dtype).cos(), 0
    for count in counts.tolist():
        start, stop = stop, stop + count
        own = vectors[:, start:stop]
        # Unit vectors, as of a diagonal matrix, are that basis.
        if count > 1 and not bool((own.abs().amax(dim=0) > 1 - d * eps).all()):
            _, turn = torch.linalg.eigh(own.mT @ (weights[:, None] * own))
            vectors[:, start:stop] = own @ turn
    return vectors
