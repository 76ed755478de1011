"""Remove examples for real: one Newton step of the objective without them.

The first-order score keeps H of the full data. Without the examples U the objective is
J − (1/n) Σ_U ℓᵢ, whose Newton step from θ̂ is

    Δθ = (H + λI − (1/n) Σ_U Hᵢ)⁻¹ (1/n) Σ_U gᵢ          Δm_q ≈ ∇m_qᵀ Δθ

The objective keeps its 1/n and its penalty: removal is wᵢ = 0. Where f is linear in θ each example
contributes Hᵢ = Jᵢᵀ Λᵢ Jᵢ of rank at most c, and the push-through identity turns the step into a
correction of the output gradients (Cook & Weisberg 1982 for c = 1; Pregibon 1981 for logistic):

    Δm_q = (1/n) ∇m_qᵀ (H + λI)⁻¹ J_Uᵀ u,   u = (I − Λ K)⁻¹ δ,   K = (1/n) J_U (H + λI)⁻¹ J_Uᵀ

For one example of a scalar-output model K Λ is the leverage h and u = δ / (1 − h).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.linear import linear_term
from upweight.errors import NonFinite, message
from upweight.gradients.linear import LinearForm
from upweight.gradients.source import FactoredLinear, contract
from upweight.linalg.operator import LinearOperator
from upweight.task.data import Data, batch_size


def corrected_output_gradients(
    delta: Float[Tensor, "k c"], lambdas: Float[Tensor, "k c c"], leverage: Float[Tensor, "k c c"]
) -> Float[Tensor, "k c"]:
    """u = (I − Λ K)⁻¹ δ for each of k removals of one example.

    Args:
        delta: δ = ∂ℓ/∂f.
        lambdas: Λ = ∂²ℓ/∂f².
        leverage: K = (1/n) J (H + λI)⁻¹ Jᵀ.

    Raises:
        NonFinite: I − Λ K is singular: without that example the minimum is not determined.

    Exact when: J is quadratic in θ (it is then the exact change of θ). Otherwise one Newton step,
    wrong in second order of the step where the first-order score is wrong in first.
    """
    return solve_removal(lambdas @ leverage, delta)


def group_output_gradients(
    delta: Float[Tensor, "e c"],
    lambdas: Float[Tensor, "e c c"],
    leverage: Float[Tensor, "e c e c"],
) -> Float[Tensor, "e c"]:
    """u for the e examples of one group removed together; see `corrected_output_gradients`."""
    e, c = delta.shape
    weighted = torch.einsum("eab,ebfd->eafd", lambdas, leverage)
    return solve_removal(weighted.reshape(1, e * c, e * c), delta.reshape(1, -1)).reshape(e, c)


def largest_share(
    lambdas: Float[Tensor, "k c c"], leverage: Float[Tensor, "k c c"]
) -> Float[Tensor, " k"]:
    """h, the largest eigenvalue of Λ K of each example, which are real where K ≻ 0 or c = 1."""
    hat = torch.bmm(lambdas, leverage)
    if hat.shape[-1] == 1:
        return hat[:, 0, 0]
    working = torch.promote_types(hat.dtype, torch.float32)
    return torch.linalg.eigvals(hat.to(working)).real.amax(dim=1).to(hat.dtype)


def solve_removal(hat: Float[Tensor, "k m m"], delta: Float[Tensor, "k m"]) -> Float[Tensor, "k m"]:
    """(I − hat)⁻¹ δ; a NonFinite where an eigenvalue of `hat` reaches 1."""
    given, eps = hat.dtype, torch.finfo(hat.dtype).eps
    # Leverages carry the rounding of a solve: 1 − h below about 1e3 eps is noise. Half precision
    # would leave nothing at that; it has no LU either, so the small systems are solved in float32.
    limit = 1.0 / (1e3 * hat.shape[-1] * eps) if given.itemsize >= 4 else 1.0 / (4 * eps)
    working = torch.promote_types(given, torch.float32)
    hat, delta = hat.to(working), delta.to(working)
    identity = torch.eye(hat.shape[-1], dtype=working, device=hat.device)
    solution, info = torch.linalg.solve_ex(identity - hat, delta[..., None])
    solution = solution[..., 0].to(given)
    grown = solution.abs().amax(dim=-1) > limit * delta.abs().amax(dim=-1)
    bad = (info != 0) | ~solution.isfinite().all(dim=-1) | grown
    if bool(bad.any()):
        raise NonFinite(_not_determined(str(bad.nonzero()[:5, 0].tolist())))
    return solution


def _not_determined(removals: str) -> str:
    return message(
        "Removing examples needs a minimum that the others still determine: leverage < 1.",
        f"leverage 1 to rounding for removal {removals}.",
        "an example that alone fixes a parameter (the only one with some feature), and no penalty "
        "on it.",
        "add a penalty or damping, or leave these examples out of the groups.",
    )


@dataclass(frozen=True)
class LinearRemovals:
    """Removals from a model that is linear in θ, from the c × c leverage blocks of its examples.

    Args:
        source: The factored gradients δ ⊗ z.
        train: The training set.
        solve: v ↦ (H + λI)⁻¹ v.
        inverse: () ↦ (H + λI)⁻¹ as a matrix, or None where the solver has no factor.
        operator: H + λI.
        share: 1/n, the weight of one example in the mean.
    """

    source: FactoredLinear
    train: Data
    solve: Callable[[Float[Tensor, "k p"]], Float[Tensor, "k p"]]
    inverse: Callable[[], Float[Tensor, "p p"]] | None
    operator: LinearOperator
    share: float

    def self_influence(self) -> Float[Tensor, " n"]:
        """−(1/n) gᵢᵀ (H + λI)⁻¹ gᵢ = −δᵢᵀ Kᵢ δᵢ for every example."""
        parts = [
            -torch.einsum("ea,eab,eb->e", delta, leverage, delta)
            for delta, _, _, leverage in self._leverages(range(len(self.train)))
        ]
        return torch.cat(parts)

    def leverages(self, start: int, stop: int) -> Float[Tensor, "b c c"]:
        """K of some training examples, in order."""
        return self._leverage_of_all[start:stop]

    def each(
        self, solved: Float[Tensor, "q p"], examples: Sequence[int]
    ) -> tuple[Float[Tensor, "q e"], Float[Tensor, " e"]]:
        """Δm_q of removing each example by itself, from v_q = (H + λI)⁻¹ ∇m_q; and its length.

        The length is uᵀ K u = Δθᵀ (H + λI) Δθ times n.
        """
        vectors, values, lengths = self.source.form.matrix(solved), [], []
        for u, z, leverage in self._corrected(examples):
            values.append(contract(vectors, u, z))
            lengths.append(torch.einsum("ea,eab,eb->e", u, leverage, u))
        return self.share * torch.cat(values, dim=1), torch.cat(lengths)

    def step(self, group: list[int]) -> Float[Tensor, " p"]:
        """Δθ of removing one group together."""
        if self._is_larger_than_theta(group):
            return self._step_in_parameters(group)
        delta, lambdas, z = self._output_derivatives(group)
        u = group_output_gradients(delta, lambdas, self._jacobian_products(z))
        return self.share * self.solve(self.source.form.flatten(u.T @ z)[None])[0]

    def curvature_along(self, group: Sequence[int], step: Float[Tensor, " p"]) -> float:
        """Δθᵀ (1/n) Σ_U Hᵢ Δθ of a group and any step."""
        form = self.source.form
        matrix, size, total = form.matrix(step), batch_size(form.outputs * form.width, 8), 0.0
        for start in range(0, len(group), size):
            _, lambdas, z = self._output_derivatives(group[start : start + size])
            moved = z @ matrix.T
            total += float(torch.einsum("ea,eab,eb->", moved, lambdas, moved))
        return self.share * total

    def _is_larger_than_theta(self, group: list[int]) -> bool:
        """Whether the group has more outputs than θ has entries: p equations are then fewer."""
        return len(group) * self.source.form.outputs > self.source.task.layout.size

    def _step_in_parameters(self, group: list[int]) -> Float[Tensor, " p"]:
        """(H + λI − (1/n) Σ_U Hᵢ)⁻¹ (1/n) Σ_U gᵢ with the p × p matrix itself."""
        task, form = self.source.task, self.source.form
        some = self.train.subset(group)
        own = linear_term(task, self.source.theta, form, some).dense().to(torch.float64)
        matrix = self._matrix - self.share * own
        total = torch.zeros_like(matrix[0])
        for _, _, batch in some.batches(len(group)):
            total += self.source.total(task.to_device(batch)).to(total)
        factor, info = torch.linalg.cholesky_ex(matrix)
        smallest = factor.diagonal().min() / factor.diagonal().max()
        if bool(info) or not bool(smallest > torch.finfo(matrix.dtype).eps ** 0.5):
            raise NonFinite(_not_determined(str(group[:5])))
        found = torch.cholesky_solve(self.share * total[:, None], factor)[:, 0]
        return found.to(task.layout.dtype)

    @cached_property
    def _matrix(self) -> Float[Tensor, "p p"]:
        """H + λI in float64."""
        return self.operator.dense().to(torch.float64)

    def steps(self, examples: Sequence[int]) -> Float[Tensor, "e p"]:
        """Δθ of removing each example by itself."""
        parts = [
            self.solve(self.source.form.flatten(u[:, :, None] * z[:, None, :]))
            for u, z, _ in self._corrected(examples)
        ]
        return self.share * torch.cat(parts)

    def _corrected(self, examples: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(u, z, K) in chunks of examples."""
        for delta, lambdas, z, leverage in self._leverages(examples):
            yield corrected_output_gradients(delta, lambdas, leverage), z, leverage

    def _leverages(
        self, examples: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Float[Tensor, "e c c"]]]:
        """(δ, Λ, z, K) in chunks of examples."""
        n, form = len(self.train), self.source.form
        if len(examples) == n and list(examples) == list(range(n)):
            size = batch_size(form.outputs * form.width, 8)
            known = torch.split(self._leverage_of_all, size)
            for k, leverage in enumerate(known):
                yield *self._output_derivatives(examples[k * size : (k + 1) * size]), leverage
            return
        size, of = self._leverage_of(len(examples))
        for start in range(0, len(examples), size):
            delta, lambdas, z = self._output_derivatives(examples[start : start + size])
            yield delta, lambdas, z, of(z)

    @cached_property
    def _leverage_of_all(self) -> Float[Tensor, "n c c"]:
        """K of every training example: removals and self-influence share it."""
        n, form = len(self.train), self.source.form
        size, leverage = self._leverage_of(n)
        chunks = (range(start, min(start + size, n)) for start in range(0, n, size))
        return torch.cat(
            [leverage(form.features(self.source.task, self._batch(some))) for some in chunks]
        )

    def _leverage_of(
        self, count: int
    ) -> tuple[int, Callable[[Float[Tensor, "e i"]], Float[Tensor, "e c c"]]]:
        """How many examples at once, and z ↦ K of some, where `count` are asked about in all."""
        form = self.source.form
        c, p = form.outputs, self.source.task.layout.size
        # Solves cost 2 p² per right-hand side, the inverse (2/3) p³ once: cheaper from p/3 on.
        if self.inverse is None or count * c <= p / 3:

            def by_solves(z: Float[Tensor, "e i"]) -> Float[Tensor, "e c c"]:
                return self._jacobian_products(z).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

            return batch_size(c * p, 8), by_solves
        matrix = self.inverse()

        def by_inverse(z: Float[Tensor, "e i"]) -> Float[Tensor, "e c c"]:
            return self.share * _block_forms(form, matrix, z).to(z.dtype)

        return batch_size(c * form.width, 8), by_inverse

    def _output_derivatives(
        self, examples: Sequence[int]
    ) -> tuple[Float[Tensor, "e c"], Float[Tensor, "e c c"], Float[Tensor, "e i"]]:
        """(δ, Λ, z) of some training examples."""
        task, batch = self.source.task, self._batch(examples)
        with torch.no_grad():
            outputs, targets = task.outputs(self.source.theta, batch)
        return (
            task.output_gradient(outputs, targets),
            task.output_hessian(outputs, targets),
            self.source.form.features(task, batch),
        )

    def _batch(self, examples: Sequence[int]) -> Batch:
        return self.source.task.to_device(self.train.take(examples))

    def _jacobian_products(self, z: Float[Tensor, "e i"]) -> Float[Tensor, "e c e c"]:
        """(1/n) J (H + λI)⁻¹ Jᵀ over some examples: J has a row per example and output."""
        e, c = len(z), self.source.form.outputs
        identity = torch.eye(c, dtype=z.dtype, device=z.device)
        rows = self.source.form.flatten(identity[None, :, :, None] * z[:, None, None, :])
        jacobian = rows.reshape(e * c, -1)
        return self.share * (jacobian @ self.solve(jacobian).T).reshape(e, c, e, c)


def _block_forms(
    form: LinearForm, inverse: Float[Tensor, "p p"], z: Float[Tensor, "e i"]
) -> Float[Tensor, "e c c"]:
    """zᵀ A_ab z for each example and pair of outputs, A_ab a block of the inverse."""
    c = form.outputs
    z = z.to(inverse.dtype)
    index = form.matrix(torch.arange(len(inverse), device=z.device))
    result = z.new_empty(len(z), c, c)
    for a in range(c):
        for b in range(a, c):
            block = inverse[index[a][:, None], index[b]]
            result[:, a, b] = result[:, b, a] = ((z @ block) * z).sum(dim=1)
    return result
