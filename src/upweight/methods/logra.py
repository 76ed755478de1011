"""S[q, i] = −(1/n) Σₗ ⟨(Ĝₗ + λₗI)⁻¹ Pₗ∇m_q, Pₗgᵢ⟩: influence in some directions of each layer.

Choe et al. (2024), "What is your data worth to GPT?", §3.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.ekfac import EKFAC
from upweight.curvature.kfac import KFAC
from upweight.errors import SpecError
from upweight.gradients.projections import Sides, TwoSided, two_sided
from upweight.linalg.damping import Damping, Relative, as_damping
from upweight.linalg.matrices import DiagonalMatrix
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.projected import ProjectedScorer, member, require_count
from upweight.runtime.memory import require_bytes
from upweight.scores import Unit
from upweight.scoring.stream import training_loss


@dataclass(frozen=True)
class LoGra(Method):
    """Influence with the empirical Fisher of each layer, within a few of its directions.

        S[q, i] = −(1/n) Σₗ ⟨(Ĝₗ + λₗI)⁻¹ Pₗ∇m_q, Pₗgᵢ⟩
        Ĝₗ = (1/n) Σᵢ Pₗgᵢ (Pₗgᵢ)ᵀ + Pₗ∇²R Pₗᵀ,   Pₗ = (Q_o ⊗ Q_i)ᵀ

    Choe et al. (2024), Eq. 5. Q_o [o, k] and Q_i [i, k] have orthonormal columns, so that λ keeps
    the unit of the eigenvalues of H.

    Args:
        rank: k; a side no longer than that is kept whole. None: P = I, for small layers.
        damping: λ as for `Influence`; of each layer. `Relative(0.1)` as in the paper.
        basis: `KFAC()` or `EKFAC()`: Q are the leading eigenvectors of its two factors (the paper's
            PCA). None: random.
        seed: Of the random Q.

    Unit: `RANK`, since most of what moves θ is projected away; `DERIVATIVE` for `rank=None`.
    Exact when: P = I and θ is one layer: then it is `Influence(EmpiricalFisher(), ...)`.
    Cost: one pass over the training data (and those of the basis), n k⁴ products a layer for Ĝₗ and
    k² numbers an example and layer to keep; then q n k² a layer.

    Raises:
        SpecError: The rank is no positive number, or the basis has no two factors.
    """

    rank: int | None = 32
    damping: Damping | float = field(default_factory=lambda: Relative(0.1))
    basis: KFAC | EKFAC | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        as_damping(self.damping)
        if self.rank is not None:
            require_count("rank", self.rank, "LoGra")
        if self.basis is not None and not isinstance(self.basis, KFAC | EKFAC):
            raise SpecError(
                "LoGra takes its directions from the two factors of K-FAC, or at random.",
                f"basis={self.basis!r}.",
                "another curvature, or a class that was not called.",
                "basis=upweight.KFAC(), or None.",
            )

    @property
    def unit(self) -> Unit:  # type: ignore[override]
        return Unit.DERIVATIVE if self.rank is None else Unit.RANK

    def prepare(self, fitting: Fitting) -> ProjectedScorer:
        task = fitting.task
        fitting.checked_losses()
        projection, notes = self._projection(fitting)
        names = tuple(block.name for block in projection.plan.blocks)
        entries = dict(zip(names, projection.parts, strict=True))
        found, at_once, told = member(
            fitting,
            fitting.theta,
            training_loss(task),
            projection,
            as_damping(self.damping),
            entries,
            kept_as=f"losses, two sides of {self.rank}, {self.basis!r}, seed {self.seed}",
            penalty=_penalty(projection, fitting),
        )
        return ProjectedScorer(
            task=task,
            train=fitting.data,
            projection=projection,
            members=(found,),
            layers=names,
            memory_bytes=fitting.resources.memory_bytes,
            at_once=at_once,
            notes=(*notes, *told),
        )

    def _projection(self, fitting: Fitting) -> tuple[TwoSided, tuple[str, ...]]:
        task, data, theta = fitting.task, fitting.data, fitting.theta
        if self.basis is None or self.rank is None:
            made = fitting.plan
            return two_sided(made, self.rank, self.seed), made.notes
        memory, ranks = fitting.resources.memory_bytes, fitting.resources.ranks
        fitted = self.basis.fit_blocks(
            task, data, theta, memory_bytes=memory, plan=fitting.plan, ranks=ranks
        )
        bases = []
        for block in fitted.blocks:
            values, sides = block.eigen.values, list[Tensor | None]()
            for axis, basis in enumerate(block.eigen.bases):
                others = [k for k in range(values.ndim) if k != axis]
                order = (values.sum(dim=others) if others else values).argsort(descending=True)
                sides.append(None if basis is None else basis[:, order])
            bases.append(sides)
        return two_sided(fitted.plan, self.rank, self.seed, bases), fitted.notes


def _penalty(projection: TwoSided, fitting: Fitting) -> dict[str, Float[Tensor, "d d"]]:
    """Pₗ∇²R Pₗᵀ by the name of the layer."""
    task, made = fitting.task, projection.plan
    curvature = task.penalty.curvature(fitting.theta, task.layout)
    if curvature is None:
        return {}
    found = {}
    if not isinstance(curvature, DiagonalMatrix):
        p, d = task.layout.size, projection.width
        require_bytes(
            2 * 8 * d * p,
            f"the penalty of {p} parameters in {d} directions",
            task.layout.device,
            "use L2(...), whose curvature is a diagonal; or a smaller rank=.",
        )
        rows = projection.adjoint(torch.eye(d, dtype=fitting.theta.dtype).to(fitting.theta.device))
        whole = (curvature.mv(rows) @ rows.mT).double()
        every = zip(made.blocks, projection.parts, strict=True)
        return {block.name: whole[part, part] for block, part in every}
    diagonal = curvature.diagonal().double()
    for block, m, shape in zip(made.blocks, projection.maps, projection.shapes, strict=True):
        entries = diagonal[block.index(task.layout).to(diagonal.device)]
        if bool((entries == entries[0]).all()):  # P Pᵀ = I
            found[block.name] = entries[:1].expand(math.prod(shape)).diag()
        elif isinstance(m, Sides):
            left, right = (_products(q.double()) for q in (m.left, m.right))
            both = left.mT @ entries.reshape(block.shape) @ right  # of two rows, of two columns
            twice = [kept for kept in shape for _ in range(2)]
            d = math.prod(shape)
            found[block.name] = both.reshape(twice).permute(0, 2, 1, 3).reshape(d, d)
        else:
            kept = entries if m is None else m.squared(entries)
            found[block.name] = kept.diag()
    return found


def _products(q: Float[Tensor, "o k"]) -> Float[Tensor, "o kk"]:
    """The products of two entries of each row."""
    return (q[:, :, None] * q[:, None, :]).flatten(1)
