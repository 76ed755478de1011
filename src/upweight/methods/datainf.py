"""DataInf: each example's gᵢgᵢᵀ + λI inverted by itself, and the inverses averaged.

    P_l = (1/n) Σᵢ (gᵢgᵢᵀ + λ_l I)⁻¹ = (1/λ_l) [I − (1/n) Σᵢ gᵢgᵢᵀ/(λ_l + ‖gᵢ‖²)]

layer by layer, with gᵢ the layer's part of the gradient. Kwon, Wu, Wu & Zou (2024), §3, Eq. 4–5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DtypeError, NonFinite, NotPositiveDefinite, UnsupportedModel
from upweight.gradients.source import gradient_source
from upweight.linalg.damping import Damping, as_damping
from upweight.linalg.matrices import DiagonalMatrix
from upweight.linalg.solution import Result, Solution, SolverStats
from upweight.methods.dense import FlatScorer
from upweight.methods.fitting import Fitting
from upweight.methods.points import PointMethod, Preconditioner
from upweight.methods.scorer import Scorer
from upweight.notation import readable
from upweight.scores import Unit
from upweight.task.point import Point

SMALL = 0.1
"""Mean ‖gᵢ‖²/λ up to which the mean of inverses and the inverse of the mean differ by less."""


@dataclass(frozen=True)
class DataInf(PointMethod):
    """S[q, k] = −(1/n) Σ_l ∇m_qᵀ [(1/n) Σᵢ (gᵢgᵢᵀ + λ_l I)⁻¹] g_k, in closed form.

    Args:
        damping: λ_l. `Relative(0.1)` is the paper's: a tenth of the layer's mean squared gradient,
            (1/(n d_l)) Σᵢ ‖gᵢ‖², the mean eigenvalue of its empirical Fisher matrix. `Absolute(λ)`
            is the same for every layer. A penalty's curvature is part of it, as everywhere.

    Known failure: the mean of inverses is not the inverse of the mean. Each summand differs from
    I/λ in one direction only, so that as soon as ‖gᵢ‖² ≫ λ and examples differ, P is close to
    (1/λ)(I − a matrix of trace 1): the scores are those of gradient products divided by λ, in
    order and mostly in size. On networks with the paper's λ they are 70 to 400 000 times too large,
    of which the swap of mean and inverse makes a factor of about 100; a note says where. The larger
    λ, the nearer to influence with an empirical Fisher.

    Raises:
        NotPositiveDefinite: λ_l is 0 in a layer: gᵢgᵢᵀ by itself has no inverse.
        DtypeError: Parameters in half precision.
        NonFinite: A gradient is NaN or infinite.
        UnsupportedModel: The penalty's curvature is no multiple of the identity on a layer.

    Exact when: all gradients are alike, as with n = 1, for the empirical Fisher matrix of one
    layer; and as λ → ∞.
    Cost: a pass over the training gradients for λ, one for the queries and one for the scores; two
    vectors of length p per query.
    """

    damping: Damping | float

    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        as_damping(self.damping)

    @property
    def preconditioner(self) -> Preconditioner:
        return MeanOfInverses(as_damping(self.damping))


@dataclass(frozen=True)
class MeanOfInverses(Preconditioner):
    """P_l = (1/n) Σᵢ (gᵢgᵢᵀ + λ_l I)⁻¹.

    Args:
        damping: As for `DataInf`.
    """

    damping: Damping

    def prepare(self, fitting: Fitting, point: Point) -> Scorer:
        task, data = fitting.task, fitting.data
        fitting.checked_losses()
        if task.layout.dtype.itemsize < 4:
            raise DtypeError(
                "DataInf needs parameters in float32 or float64.",
                f"{task.layout.dtype}, in which sums of squared gradients lose their digits.",
                "a model in half precision.",
                "use model.float(), or EKFAC(), whose sums are in float32.",
            )
        made = fitting.plan
        source = gradient_source(task, point.theta, data)
        scorer = MeanOfInversesScorer(
            task,
            data,
            point,
            source,
            tuple((b.name, b.index(task.layout).to(task.layout.device)) for b in made.blocks),
            {},
            {},
            memory_bytes=fitting.resources.memory_bytes,
            notes=(*made.notes, *source.notes),
        )
        return replace(scorer, notes=(*scorer.notes, *scorer.choose(self.damping)))


@dataclass(frozen=True, eq=False)
class MeanOfInversesScorer(FlatScorer):
    """P_l with its λ_l, by layer."""

    blocks: tuple[tuple[str, Tensor], ...]
    lambdas: dict[str, float]
    lengths: dict[str, float]

    @property
    def couples_layers(self) -> bool:
        return False

    def choose(self, damping: Damping) -> tuple[str, ...]:
        """λ_l of every layer, the penalty's curvature included.

        A layer whose gradients are 0 for every example (a fresh adapter) has λ = ∞: its share of
        every score is 0 whatever λ is.

        Returns:
            A note for each such layer.

        Cost: a pass over the training gradients, if λ is relative to them or not.
        """
        squares = torch.zeros_like(self.theta)
        for start, rows in self.rows():
            squares += rows.square().sum(dim=0)
            if not bool(squares.isfinite().all()):
                raise NonFinite(
                    "Gradients must be finite, and their squares too.",
                    f"a NaN or infinity in training examples {start} to {start + len(rows) - 1}.",
                    "a loss or an activation that overflows, or a square root or norm of 0.",
                    "look at the gradients of these examples one at a time, or use float64.",
                )
        squares /= len(self.train)
        penalty: Any = self.task.penalty.curvature(self.theta, self.task.layout)
        added = torch.zeros_like(squares) if penalty is None else penalty.diagonal()
        exact = penalty is None or isinstance(penalty, DiagonalMatrix)
        for name, index in self.blocks:
            strengths = added[index]
            if not exact or bool((strengths != strengths[0]).any()):
                raise UnsupportedModel(
                    "DataInf needs a penalty that is a multiple of ‖θ‖² on each layer.",
                    f"{self.task.penalty!r} on {name}.",
                    "biases left out of the penalty, or a penalty of your own.",
                    "use Influence(EmpiricalFisher(), damping=…) or Influence(EKFAC(), …).",
                )
            mean = DiagonalMatrix(squares[index] + strengths)
            if not bool(mean.diagonal().any()):
                self.lambdas[name] = math.inf
                continue
            lam = damping.of(mean, self.theta[index], len(self.train)) + float(strengths[0])
            if not lam > 0:
                raise NotPositiveDefinite(
                    "DataInf inverts gᵢgᵢᵀ + λI, of which only λ makes an inverse.",
                    f"λ = {lam:g} for {name}.",
                    "damping of 0, which influence functions with a curvature of full rank allow.",
                    "DataInf(damping=Relative(0.1)), as in the paper.",
                )
            self.lambdas[name] = lam
            self.lengths[name] = float(squares[index].sum())
        return tuple(
            f"{name}: gradients are 0 for all examples, and so is its share of scores"
            for name, lam in self.lambdas.items()
            if lam == math.inf
        )

    def _solved(self, vectors: Float[Tensor, "k p"]) -> Solution:
        # Sherman–Morrison: what every example takes away of v along its own gradient.
        taken = torch.zeros_like(vectors)
        for _, rows in self.rows():
            for name, index in self.blocks:
                g = rows[:, index]
                shares = vectors[:, index] @ g.T / (self.lambdas[name] + g.square().sum(dim=1))
                taken[:, index] += shares @ g
        out = torch.empty_like(vectors)
        for name, index in self.blocks:
            left = vectors[:, index] - taken[:, index] / len(self.train)
            out[:, index] = left / self.lambdas[name]
        return Solution(out, Result.CONVERGED, SolverStats(0, vectors.new_zeros(len(vectors))))

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        ratio = max((v / self.lambdas[name] for name, v in self.lengths.items()), default=0.0)
        if len(self.train) == 1 or ratio <= SMALL:
            return {}, ()
        against = (
            "a mean of inverses is not the inverse of the mean where λ is below ‖gᵢ‖², whose mean "
            f"is up to {readable(ratio, 2)} λ in a layer; on networks that made scores 70 to "
            "400 000 times too large"
        )
        note = f"of these scores read the order and not the size: {against}"
        return {"against_sizes": against}, (note,)

    def health(self) -> dict[str, Any]:
        return {
            **self.stationarity(),
            "dampings": {k: lam for k, lam in self.lambdas.items() if lam < math.inf},
        }
