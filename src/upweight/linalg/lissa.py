"""x ← x + (b − A_t x)/s with A_t a minibatch of A: LiSSA, stochastic Neumann series.

    E[x_t] = (1/s) Σ_{j<t} (I − A/s)ʲ b   →  A⁻¹ b        E[A_t] = A,  A_t drawn anew at each step

Agarwal, Bullins & Hazan (2017), Algorithm 1; for influence functions Koh & Liang (2017), Section 3.
Differences: s and the number of steps come from the spectrum of A and of its minibatches; damping
is part of A, in its units, and is not drawn; the mean over repeats has a standard error.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, SpecError
from upweight.linalg.columns import Columns
from upweight.linalg.damping import undamped
from upweight.linalg.finite_sum import examples_of, minibatch
from upweight.linalg.lanczos import extreme_eigenvalues
from upweight.linalg.operator import LinearOperator, square
from upweight.linalg.solution import Result, Solution
from upweight.linalg.solver import Solver

LOOKS = 10
"""Products with A, and with each of some minibatches, that the spectrum is estimated from."""

MINIBATCHES = 5
"""Minibatches whose largest eigenvalue is looked at."""

BIAS = 0.01
"""What the series may leave out, relative to x along the smallest eigenvalue, where λ is known."""

MOST_STEPS = 5000
"""Steps at most where the depth is chosen: (I − A/s)ᵗ may decay too slowly for any patience."""

GROWTH = 10.0
"""With 0 ⪯ A_t ⪯ 2s no step can make ‖x_t‖ more than t‖b‖/s; past this many times it diverges."""


@dataclass(frozen=True, eq=False)
class LiSSAState:
    """A, and the recursion that was chosen for it."""

    operator: LinearOperator
    scale: float
    depth: int
    extra: dict[str, float]
    result: Result = Result.CONVERGED


@dataclass(frozen=True)
class LiSSA(Solver[LiSSAState]):
    """x ← x + (b − A_t x)/s, averaged over repeats. Nothing has to be set.

    Args:
        batch: Examples of a minibatch, drawn without replacement at each step.
        depth: Steps t; None: so many that (1 − λ/s)ᵗ = 0.01, λ the smallest eigenvalue as far as
            damping and ten products with A tell, at most 5000.
        scale: s; None: the largest eigenvalue of A or of five minibatches, whichever is larger, by
            ten Lanczos steps. (The `scale` of Koh & Liang, in the units of A.)
        repeats: Independent runs that are averaged.
        seed: Of the minibatches.

    `solution.standard_error` is that of each entry of x, and `stats.extra` has the largest
    ‖standard error‖/‖x‖ of a right-hand side (`standard_error`), `scale`, `depth`, `bias` =
    (1 − λ/s)ᵗ where λ is known, and `products`, the cost of a solve in products with all of A.

    The result is CONVERGED where the residual is within what CG reaches, and else APPROXIMATE: no
    residual is promised, since noise along the largest eigenvalues counts most in it. DIVERGED
    where the residual is above that of x = 0, or ‖x_t‖ grows beyond what a contraction allows; x is
    then what was reached before.

    An operator without examples to draw from, or with no more than `batch`, is multiplied in full;
    then there is nothing to repeat, and the standard error is 0.

    Exact when: in expectation, as depth → ∞, if 0 ≺ A_t ≺ 2s for every minibatch.
    Cost: repeats · depth · batch/n products with A, and about 11 once for the spectrum.

    Raises:
        SpecError: A count below 1, or a scale that is not a positive number.
    """

    batch: int = 64
    depth: int | None = None
    scale: float | None = None
    repeats: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"batch": self.batch, "repeats": self.repeats}
        counts |= {} if self.depth is None else {"depth": self.depth}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SpecError(
                    f"The {name} of LiSSA is a whole number, at least 1.",
                    f"{name}={value!r}.",
                    "a share where a count is meant, or a zero.",
                    "LiSSA(), which chooses the depth; batch=64 and repeats=4 unless set.",
                )
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise SpecError(
                "The scale s of x ← x + (b − Ax)/s is a positive number, above half of the largest "
                "eigenvalue.",
                f"scale={self.scale!r}.",
                "a sign slip, or a number that overflowed.",
                "leave it out: it is then estimated.",
            )

    def init(self, A: LinearOperator) -> LiSSAState:
        square(A, "LiSSA")
        try:
            ends = extreme_eigenvalues(A, LOOKS, 1e-2, self.seed)
            largest = max(abs(ends.smallest), abs(ends.largest)) + ends.largest_error
            if self._is_drawn(A):
                generator = torch.Generator().manual_seed(self.seed)
                for _ in range(MINIBATCHES):
                    part = minibatch(A, self.batch, generator)
                    seen = extreme_eigenvalues(part, LOOKS, 1e-2, self.seed)
                    largest = max(largest, abs(seen.largest) + seen.largest_error)
        except NonFinite:
            return LiSSAState(A, 1.0, 1, {}, Result.NON_FINITE)
        scale = (largest or 1.0) if self.scale is None else self.scale
        # Of a positive semi-definite curvature, damping is a lower bound on every eigenvalue.
        floor = undamped(A)[1] if A.is_psd else 0.0
        smallest = max(floor, ends.smallest - ends.smallest_error)
        decay = math.log1p(-smallest / scale) if 0 < smallest < scale else 0.0
        depth = self.depth
        if depth is None:
            depth = MOST_STEPS
            if smallest >= scale >= largest:
                depth = 1
            elif decay < 0:
                depth = min(MOST_STEPS, math.ceil(math.log(BIAS) / decay))
        extra = {"scale": scale, "depth": float(depth)}
        if decay < 0:
            extra["bias"] = math.exp(depth * decay)
        if ends.smallest < 0:
            extra["smallest_eigenvalue"] = ends.smallest
        return LiSSAState(A, scale, depth, extra)

    def _is_drawn(self, A: LinearOperator) -> bool:
        return examples_of(A) > self.batch

    def solve(self, state: LiSSAState, b: Float[Tensor, "*k p"]) -> Solution:
        A = state.operator
        columns = Columns(A, b, None)
        columns.extra.update(state.extra)
        if state.result is not Result.CONVERGED:
            columns.close_without_answer(torch.arange(len(columns.units)), state.result)
            return columns.solution(0, repr(self))
        rows, drawn = columns.rows, self._is_drawn(A)
        repeats = self.repeats if drawn else 1
        goal = columns.units[rows]
        gone = torch.zeros(len(rows), dtype=torch.bool, device=goal.device)
        runs = []
        for repeat in range(repeats):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + repeat + 1)
            x = torch.zeros_like(goal)
            for step in range(state.depth if len(rows) else 0):
                part = minibatch(A, self.batch, generator) if drawn else A
                following = x + (goal - part.mv(x)) / state.scale
                size = torch.linalg.vector_norm(following, dim=1)
                gone |= ~(size <= GROWTH * (step + 1) / state.scale)
                if bool(gone.all()):
                    break
                x = torch.where(gone[:, None], x, following)
            runs.append(x)
        mean = torch.stack(runs).mean(dim=0)
        share = self.batch / examples_of(A) if drawn else 1.0
        columns.extra["products"] = repeats * state.depth * share
        columns.close(rows[gone], mean[gone], Result.DIVERGED)
        columns.close(rows[~gone], mean[~gone], Result.APPROXIMATE)
        if repeats == 1 and drawn:  # one run says nothing of its own error
            return columns.solution(state.depth, repr(self))
        error = torch.zeros_like(mean)
        if repeats > 1 and len(rows):
            error = torch.stack(runs).std(dim=0) / repeats**0.5
        size = torch.linalg.vector_norm(mean, dim=1)
        relative = torch.linalg.vector_norm(error, dim=1) / torch.where(size > 0, size, 1.0)
        columns.extra["standard_error"] = float(relative.max()) if len(rows) else 0.0
        solution = columns.solution(state.depth, repr(self))
        spread = torch.zeros_like(columns.x)
        spread[rows] = error * columns.norms[rows]
        return replace(solution, standard_error=spread.reshape(b.shape))
