"""What one block of θ learns from the stream of its gradients: its own eigendecomposition.

    KFACBlock       A = E[a aᵀ], G = E[δ δᵀ]            H ≈ G ⊗ A              one pass
    EKFACBlock      their eigenbases, then Λ = E[(Q_Gᵀ g Q_A)²] in them        two passes
    DenseBlock      E[g gᵀ] itself, for a small vector                         one pass
    DiagonalBlock   E[g²]                                                      one pass

George et al. (2018) show that Λ is the best diagonal in the given basis: no other eigenvalues bring
Q Λ Qᵀ closer to E[g gᵀ] in Frobenius norm, K-FAC's own products among them.
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.errors import NonFinite
from upweight.gradients.blocks import Block, MatrixBlock
from upweight.gradients.factored import Factors, Rows, Tokens
from upweight.linalg.damping import Damping
from upweight.linalg.eigen import Eigen, eigenbasis
from upweight.linalg.finite_sum import mean_of
from upweight.linalg.gram import WHEN_CLOSED, LongSum
from upweight.runtime.hardware import has_fast_bfloat16
from upweight.runtime.memory import require_bytes

TRIAL = 48
"""Gradients on which it is tried whether rounding them to bfloat16 does any harm."""

CHUNK_BYTES = 32 * 2**20
"""Memory for gradients [b, o, i] formed at once; more would leave the processor's cache."""


class Sharing(abc.ABC):
    """Which pairs (a, δ) stand for an example whose weight was used at t positions."""

    @abc.abstractmethod
    def pairs(self, tokens: Tokens) -> tuple[Float[Tensor, "m i"], Float[Tensor, "m o"]]:
        """Rows of a and of δ. The scale is that of E[δ δᵀ] per example, E[a aᵀ] per row."""


@dataclass(frozen=True)
class Expand(Sharing):
    """Every position is an example of its own: A = E_t[a_t a_tᵀ], G = E[Σ_t δ_t δ_tᵀ].

    K-FAC-expand of Eschenhagen et al. (2023), Eq. 15: exact for deep linear networks whose loss has
    a term per position, as language models have. Positions that add nothing to g, as padding does,
    are left out.
    """

    def pairs(self, tokens: Tokens) -> tuple[Float[Tensor, "m i"], Float[Tensor, "m o"]]:
        a, delta = tokens.right.flatten(0, 1), tokens.left.flatten(0, 1)
        return _those(tokens.alive.flatten(), a, delta)


def _those(
    alive: Bool[Tensor, " m"], a: Float[Tensor, "m i"], delta: Float[Tensor, "m o"]
) -> tuple[Float[Tensor, "k i"], Float[Tensor, "k o"]]:
    """The pairs that add something to g."""
    if bool(alive.all()):
        return a, delta
    where = alive.nonzero()[:, 0]
    return _rows_of(a, where), _rows_of(delta, where)


def _rows_of(x: Float[Tensor, "m d"], where: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
    """x[where], read as x lies in memory."""
    return x.index_select(0, where) if x.is_contiguous() else x.mT.index_select(1, where).mT


@dataclass(frozen=True)
class Reduce(Sharing):
    """Positions are added up first: A = E[ā āᵀ] with ā = mean_t a_t, G = E[(Σ_t δ_t)(Σ_t δ_t)ᵀ].

    K-FAC-reduce of Eschenhagen et al. (2023), Eq. 22: exact for deep linear networks that average
    over positions before the loss, as vision transformers and many convolutional networks do.
    Positions that add nothing to g are none of them: ā is the mean of the others.
    """

    def pairs(self, tokens: Tokens) -> tuple[Float[Tensor, "m i"], Float[Tensor, "m o"]]:
        alive = tokens.alive
        counts = alive.sum(dim=1)
        sums = (alive.to(tokens.right.dtype)[:, None, :] @ tokens.right)[:, 0]
        a = sums / counts.clamp_min(1)[:, None]
        return _those(counts > 0, a, tokens.left.sum(dim=1))


class Estimator(abc.ABC):
    """Learns one block. Gradients come in passes over the data; `finish` closes a pass.

    Everything that is learned in a pass is in `sums`. Several processes may each see some of the
    gradients: one of them, which owns the block, has the totals, and finishes.
    """

    passes: int = 1

    damping: Damping | None = None
    """What the inverse will be damped with, where that is known; set before the first pass."""

    _trial: "_ShortTrial | None" = None
    """Of gradients in bfloat16 in a pass after the first; None: they are taken as they are."""

    def __init__(self, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.shape, self.dtype, self.device = block.name, block.shape, dtype, device
        self.has_bfloat16 = has_fast_bfloat16(device)
        self.sums: dict[str, LongSum] = {}

    @property
    def may_round(self) -> bool:
        """Whether a pass after the first may turn out to take gradients in bfloat16."""
        return self._trial is not None and self._trial.able

    @property
    def is_trying(self) -> bool:
        """Whether that is still to be found out, from the first examples of that pass."""
        return self._trial is not None and self._trial.open

    @property
    def rounding(self) -> float | None:
        """The change of scores that taking them so was measured to make; None: it does not."""
        trial = self._trial
        return trial.change if trial is not None and trial.passed else None

    @abc.abstractmethod
    def see(self, stage: int, factors: Factors) -> None:
        """The gradients of one batch, in pass number `stage`."""

    def finish(self, stage: int) -> None:  # noqa: B027  most have nothing to do
        """All batches of a pass have been seen."""

    def learned(self, stage: int) -> tuple[Tensor, ...]:
        """What the next pass needs of `finish`, for the processes that do not own the block."""
        return ()

    def adopt(self, stage: int, learned: tuple[Tensor, ...]) -> None:  # noqa: B027
        """Take what the owner's `learned` gave, in place of `finish`."""

    @abc.abstractmethod
    def result(self, count: int | float) -> Eigen:
        """The curvature, with sums over gradients divided by their number."""

    def tensors(self) -> dict[str, Tensor]:
        """What was learned so far, to go on from later."""
        return {k: v for name, total in self.sums.items() for k, v in named(name, total).items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        for name, total in self.sums.items():
            restore_named(name, total, tensors)

    def _sum(self, *shape: int) -> LongSum:
        require_bytes(
            math.prod(shape) * (8 + self.dtype.itemsize),
            f"sums of {' × '.join(map(str, shape))} numbers for the curvature of {self.name}",
            self.device,
            "use curvature=Diagonal(), which keeps a number per parameter; or leave this layer "
            "out with Task(params=…).",
        )
        return LongSum(shape, self.dtype, self.device, WHEN_CLOSED)

    def _without_rounding(self, values: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Eigenvalues of a covariance, with those that rounding moved off zero back at zero."""
        floor = len(values) * torch.finfo(self.dtype).eps * values.max()
        return torch.where(values > floor, values, 0.0)

    def _finite(self, values: Tensor) -> Tensor:
        if not bool(values.isfinite().all()):
            raise NonFinite(
                "Gradients must be finite to be averaged.",
                f"NaN or infinity in the curvature of {self.name}.",
                "activations or gradients that overflow in this dtype.",
                "use model.float(), or look for infinite values in the data.",
            )
        return values


def named(name: str, sum_: LongSum) -> dict[str, Tensor]:
    """The tensors of a sum under a name."""
    return {f"{name}.{key}": value for key, value in sum_.tensors().items()}


def restore_named(name: str, sum_: LongSum, tensors: Mapping[str, Tensor]) -> None:
    """Let a sum go on from the tensors under a name."""
    sum_.restore({key: tensors[f"{name}.{key}"] for key in ("total", "recent", "count")})


class KFACBlock(Estimator):
    """G ⊗ A as an eigendecomposition: Q_G ⊗ Q_A with the products of their eigenvalues."""

    def __init__(
        self, block: MatrixBlock, dtype: torch.dtype, device: torch.device, sharing: Sharing
    ) -> None:
        super().__init__(block, dtype, device)
        o, i = block.shape
        count = LongSum((), torch.float64, device, WHEN_CLOSED)
        self.sums = {"left": self._sum(o, o), "right": self._sum(i, i), "rows": count}
        self.sharing = sharing

    def see(self, stage: int, factors: Factors) -> None:
        assert isinstance(factors, Tokens)
        for part in factors.chunks():
            a, delta = self.sharing.pairs(part)
            self.sums["right"].add_gram(a)
            self.sums["left"].add_gram(delta)
            self.sums["rows"].add(torch.tensor(len(a)))

    def result(self, count: int | float) -> Eigen:
        right, left = self.sums["right"].gram, self.sums["left"].gram
        rows = int(self.sums["rows"].total)
        alpha, right = eigenbasis(self._finite(mean_of(right, max(1, rows))))
        gamma, left = eigenbasis(self._finite(mean_of(left, count)))
        values = self._without_rounding(gamma)[:, None] * self._without_rounding(alpha)
        return Eigen((left.to(self.dtype), right.to(self.dtype)), values.to(self.dtype))


class EKFACBlock(KFACBlock):
    """K-FAC's eigenbases, and the second moments of the gradients in them."""

    passes = 2

    _trial: "_ShortTrial"

    def __init__(
        self, block: MatrixBlock, dtype: torch.dtype, device: torch.device, sharing: Sharing
    ) -> None:
        super().__init__(block, dtype, device, sharing)
        self._bases: tuple[Tensor, Tensor] | None = None
        self._moments = self._sum(*block.shape)
        self._trial = _ShortTrial(self)

    def see(self, stage: int, factors: Factors) -> None:
        if stage == 0:
            super().see(stage, factors)
            return
        assert isinstance(factors, Tokens) and self._bases is not None
        factors = factors.compact()
        if self._trial.passed:
            add_second_moments(self._moments, factors.rounded(torch.bfloat16), *self._short_bases)
            return
        add_second_moments(self._moments, factors, *self._bases)
        if self._trial.open:
            short = factors.rounded(torch.bfloat16)
            add_second_moments(self._trial.moments, short, *self._short_bases)
            self._trial.judge(self._moments.now, len(factors))

    @cached_property
    def _short_bases(self) -> tuple[Tensor, Tensor]:
        assert self._bases is not None
        left, right = self._bases
        return left.to(torch.bfloat16), right.to(torch.bfloat16)

    def finish(self, stage: int) -> None:
        if stage > 0:
            return
        # The scale of a covariance does not change its eigenbasis.
        _, left = eigenbasis(self._finite(self.sums["left"].gram), self.dtype)
        _, right = eigenbasis(self._finite(self.sums["right"].gram), self.dtype)
        self._rotate(left.to(self.dtype), right.to(self.dtype))

    def learned(self, stage: int) -> tuple[Tensor, ...]:
        return (self._bases or ()) if stage == 0 else ()

    def adopt(self, stage: int, learned: tuple[Tensor, ...]) -> None:
        if stage == 0:
            self._rotate(*learned)

    def _rotate(self, left: Tensor, right: Tensor) -> None:
        """The second moments take the place of the covariances."""
        self._bases, self.sums = (left, right), {"moments": self._moments}

    def result(self, count: int | float) -> Eigen:
        assert self._bases is not None
        values = mean_of(self._finite(self._moments.total), count)
        return Eigen(self._bases, values.to(self.dtype))

    def tensors(self) -> dict[str, Tensor]:
        if self._bases is None:
            return super().tensors()
        bases = dict(zip(("left_basis", "right_basis"), self._bases, strict=True))
        return {**bases, **Estimator.tensors(self), **self._trial.tensors()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if "left_basis" not in tensors:
            super().restore(tensors)
            return
        self._rotate(tensors["left_basis"], tensors["right_basis"])
        Estimator.restore(self, tensors)
        self._trial.restore(tensors)


class _ShortTrial:
    """May the second moments be taken in bfloat16? Both ways on a few examples, then a verdict.

    Rounding adds about 3e-6 of the mean eigenvalue to each Λ, which matters where damping is
    smaller still. The verdict is by what it does to scores: with E[g̃²] = Λ for queries and
    training examples alike, the relative change of a score is

        √(Σ Λ² (M' − M)² / Σ Λ² M²),    M = 1/(Λ + λ)

    Only with a damping, in float32, and on hardware with products in bfloat16.
    """

    # Most of the change over so few is chance, which shrinks with the square root of the examples;
    # what 48 labels draw differs by some tens of per cent from what 48 others do.
    MOST = 5e-3

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator
        self.moments = estimator._sum(*estimator.shape)
        self.seen = 0
        self.change: float | None = None

    @property
    def able(self) -> bool:
        """Whether there is anything to try."""
        e = self.estimator
        return e.damping is not None and e.dtype == torch.float32 and e.has_bfloat16

    @property
    def open(self) -> bool:
        """Whether a trial is under way."""
        return self.able and self.change is None

    @property
    def passed(self) -> bool:
        """Whether the second moments may go on in bfloat16."""
        return self.change is not None and self.change <= self.MOST

    def judge(self, full: Tensor, examples: int) -> None:
        """Compare the two sums once they hold enough examples."""
        self.seen += examples
        if self.seen < TRIAL:
            return
        exact, rounded = mean_of(full, self.seen), mean_of(self.moments.now, self.seen)
        damping = self.estimator.damping
        assert damping is not None
        lam = damping.of(Eigen((None,) * exact.ndim, exact)) if bool(exact.any()) else 0.0
        if lam == 0:
            self.change = math.inf
            return
        m = 1 / (exact + lam)
        off = (exact * (1 / (rounded + lam) - m)).norm() / (exact * m).norm()
        self.change = float(off)

    def tensors(self) -> dict[str, Tensor]:
        """To go on from later."""
        change = math.nan if self.change is None else self.change
        sums = named("trial", self.moments) if self.open else {}
        return {
            **sums,
            "trial_seen": torch.tensor(self.seen),
            "trial_change": torch.tensor(change, dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.seen = int(tensors["trial_seen"])
        change = float(tensors["trial_change"])
        self.change = None if math.isnan(change) else change
        if "trial.total" in tensors:
            restore_named("trial", self.moments, tensors)


def add_second_moments(
    moments: LongSum,
    tokens: Tokens,
    left: Float[Tensor, "o o"],
    right: Float[Tensor, "i i"],
) -> None:
    """Add Σ_b (leftᵀ g_b right)², elementwise, to a sum [o, i].

    With one position per example it is one product of squares, (δ leftᵀ)²ᵀ (a right)²: nothing of
    size o·i per example. Otherwise g is formed either from rotated factors or to be rotated itself,
    whichever takes fewer multiply-adds.
    """
    t, o, i = tokens.positions, len(left), len(right)
    if t == 1:
        rotated = tokens.projected(left, right).to(moments.dtype)
        moments.add_product(rotated.left[:, 0].square(), rotated.right[:, 0].square())
        return
    factors_first = t * (o * o + i * i) <= o * i * (o + i)
    size = max(1, CHUNK_BYTES // (o * i * tokens.dtype.itemsize))
    for start in range(0, len(tokens), size):
        part = tokens.take(slice(start, start + size))
        if factors_first:
            g = part.projected(left, right).matrices()
        else:
            g = (left.mT @ part.matrices()) @ right
        moments.add(g.to(moments.dtype).square_().sum(dim=0))


class DenseBlock(Estimator):
    """E[g gᵀ] of a small vector, decomposed: exact within its block."""

    def __init__(self, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(block, dtype, device)
        size = math.prod(block.shape)
        self.sums["gram"] = self._sum(size, size)

    def see(self, stage: int, factors: Factors) -> None:
        rows = factors.values if isinstance(factors, Rows) else factors.matrices().flatten(1)
        self.sums["gram"].add_gram(rows)

    def result(self, count: int | float) -> Eigen:
        values, basis = eigenbasis(self._finite(mean_of(self.sums["gram"].gram, count)))
        return Eigen((basis.to(self.dtype),), self._without_rounding(values).to(self.dtype))


class DiagonalBlock(Estimator):
    """E[g²], entry by entry."""

    def __init__(self, block: Block, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(block, dtype, device)
        self.sums["squares"] = self._sum(*block.shape)

    def see(self, stage: int, factors: Factors) -> None:
        squares = self.sums["squares"]
        if isinstance(factors, Rows):
            squares.add(factors.values.square().sum(dim=0))
        elif factors.positions == 1:
            squares.add_product(factors.left[:, 0].square(), factors.right[:, 0].square())
        else:
            size = max(1, CHUNK_BYTES // (math.prod(self.shape) * factors.left.element_size()))
            for start in range(0, len(factors), size):
                part = factors.take(slice(start, start + size))
                squares.add(part.matrices().square_().sum(dim=0))

    def result(self, count: int | float) -> Eigen:
        values = mean_of(self._finite(self.sums["squares"].total), count)
        return Eigen((None,) * values.ndim, values.to(self.dtype))
