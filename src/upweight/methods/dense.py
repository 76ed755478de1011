"""P = (H + λI)⁻¹ on all of θ at once, by a solver: the scorer of exact curvatures.

One factorization (or one iterative solver) serves every question: scores, self-influence, the
movement of the parameters, removals by a Newton step. Where the model is linear in θ, gradients
keep their two factors and nothing of size p is formed per example.
"""

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.curvature import Curvature
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.curvature.layerwise import BlockCurvature, LayerwiseCurvature
from upweight.errors import DtypeError, ShapeError
from upweight.gradients.blocks import Plan
from upweight.gradients.passes import Function, GradientPass
from upweight.gradients.planning import plan
from upweight.gradients.source import (
    FactoredLinear,
    GradientSource,
    gradient_source,
    planned_jacobians,
    value_source,
)
from upweight.linalg.blockdiag import BlockDiagonal
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Absolute, Damping, as_damping, damped
from upweight.linalg.operator import LinearOperator
from upweight.linalg.solution import Solution, SolverStats
from upweight.linalg.solve import Auto
from upweight.linalg.solver import Solver
from upweight.methods import health
from upweight.methods.fitting import Fitting
from upweight.methods.layered import token_shares
from upweight.methods.leverage import LinearRemovals
from upweight.methods.scorer import Asked, Job, Scorer, TokenScores, Work, gradients_in_groups
from upweight.runtime.memory import examples_within, require_bytes, solved_bytes, working_bytes
from upweight.task.data import Data, batch_size
from upweight.task.measures import Loss
from upweight.task.point import Point
from upweight.task.task import Task

PRECONDITIONER_DAMPING = 0.1
"""λ of a preconditioner, of the mean eigenvalue of a layer, where the system has none."""

MOST_EXAMPLES = 2048
"""Examples in a batch at most."""


@dataclass(eq=False)
class FlatJob(Job):
    """Solved queries V = P ∇m, one row each."""

    scorer: "FlatScorer"
    first: int
    solution: Solution

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return self.scorer.at_once

    def __len__(self) -> int:
        return len(self.solution.value)

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        scorer, vectors = self.scorer, self.solution.value
        part = scorer.source.inner(vectors, scorer.batch(start, stop), stop - start)
        part *= -scorer.share
        return part

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        scorer = self.scorer
        rows = scorer.source.rows(scorer.batch(start, stop), stop - start)
        layout, vectors = scorer.task.layout, self.solution.value
        found = {}
        for block in scorer.plan.blocks:
            index = block.index(layout).to(rows.device)
            found[block.name] = vectors[:, index] @ rows[:, index].mT * -scorer.share
        return found

    def tokens(self, examples: Sequence[int]) -> TokenScores:
        return self.tokens_of(self.scorer.train.subset(examples), None)

    def tokens_of(self, data: Data, function: Function | None) -> TokenScores:
        scorer = self.scorer
        layout, rows = scorer.task.layout, self.solution.value
        vectors = [
            rows[:, block.index(layout).to(rows.device)].reshape(len(rows), *block.shape)
            for block in scorer.plan.blocks
        ]
        passes = GradientPass(scorer.plan, scorer.theta)
        shares, rest = token_shares(scorer.plan, passes, data, vectors, function)
        return TokenScores(shares * -scorer.share, rest * -scorer.share)

    def scores_of(self, batch: Batch, size: int) -> Float[Tensor, "q b"]:
        return self.scorer.source.inner(self.vectors(), batch, size) * -self.scorer.share

    def vectors(self) -> Float[Tensor, "q p"]:
        return self.solution.value

    @property
    def row_sums(self) -> Float[Tensor, " q"] | None:
        penalty = self.scorer.task.penalty.gradient(self.scorer.theta, self.scorer.task.layout)
        return self.solution.value @ penalty

    @property
    def record(self) -> SolverStats:
        return self.solution.stats


@dataclass(frozen=True, eq=False)
class FlatScorer(Scorer):
    """P at a point, for any P that is applied to vectors of all of θ."""

    task: Task
    train: Data
    point: Point
    source: GradientSource
    memory_bytes: int | None = field(default=None, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    vectors_per_query: ClassVar[int] = 2
    """Vectors of length p that solving a query keeps: its gradient, its solution, and others."""

    @property
    def theta(self) -> Float[Tensor, " p"]:
        """Where."""
        return self.point.theta

    @property
    def share(self) -> float:
        """a/n: the weight of one example in the mean."""
        return self.point.weight / len(self.train)

    # -- scores -----------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.plan.blocks)

    @property
    def couples_layers(self) -> bool:
        return True

    @cached_property
    def plan(self) -> Plan:
        """How gradients are obtained layer by layer, for shares of layers and positions."""
        return plan(self.task, self.theta, self.train)

    @cached_property
    def at_once(self) -> int:
        """Training examples in a batch."""
        values, itemsize = self.source.values_per_example, self.theta.element_size()
        if self.memory_bytes is None:
            return self.train.together(batch_size(values, itemsize))
        allowed = working_bytes(self.theta.device, self.memory_bytes)
        return self.train.together(examples_within(allowed, values * itemsize, MOST_EXAMPLES))

    def settings(self, asked: Asked) -> dict[str, int]:
        device = self.theta.device
        each = self.vectors_per_query * len(self.theta) * self.theta.element_size()
        return {
            "memory_bytes": working_bytes(device, asked.memory_bytes),
            "queries_together": max(1, solved_bytes(device, asked.memory_bytes) // each),
        }

    def jobs(self, asked: Asked) -> Iterator[FlatJob]:
        if asked.functional is not None:
            yield FlatJob(self, 0, self._solved(asked.functional.at(self.theta)))
            return
        assert asked.queries is not None
        together = asked.together or self.settings(asked)["queries_together"]
        held = min(together, len(asked))
        require_bytes(
            self.vectors_per_query * held * len(self.theta) * self.theta.element_size(),
            f"gradients and solutions of {held} queries in {len(self.theta)} parameters",
            self.theta.device,
            "use curvature=EKFAC(), which keeps the factors of a query's gradient.",
        )
        source = self._measure_source(asked.measure, asked.queries)
        for first, (rows,) in gradients_in_groups(asked, together, lambda q: (source.rows_of(q),)):
            yield FlatJob(self, first, self._solved(rows))

    def _measure_source(self, measure: Any, queries: Data) -> GradientSource:
        # ∇m = ∇ℓ, for which the source may have a closed form.
        if isinstance(measure, Loss) and isinstance(self.source, FactoredLinear):
            return self.source
        task = self.task
        return value_source(task, self.theta, queries, lambda p, b: measure(task, p, b), self.train)

    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] = −(1/n) gᵢᵀ P gᵢ: n solves."""
        parts = [(rows * self._solved(rows).value).sum(dim=1) for _, rows in self.rows()]
        return -self.share * torch.cat(parts)

    def rows(self) -> Iterator[tuple[int, Float[Tensor, "b p"]]]:
        """gᵢ of all training examples, a batch at a time: from which on, and the rows."""
        for start, stop, batch in self.train.batches(self.at_once):
            yield start, self.source.rows(self.task.to_device(batch), stop - start)

    def solve(self, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        return self._solved(vectors).value

    @abc.abstractmethod
    def _solved(self, vectors: Float[Tensor, "k p"]) -> Solution:
        """P v, or the error that says why it was not reached."""

    def batch(self, start: int, stop: int) -> Batch:
        """Training examples on the device of the parameters."""
        return self.task.to_device(self.train.batch(start, stop))

    def total(self, group: Sequence[int]) -> Float[Tensor, " p"]:
        batches = self.train.subset(group).batches(min(len(group), self.at_once))
        parts = [self.source.total(self.task.to_device(batch)) for _, _, batch in batches]
        return torch.stack(parts).sum(dim=0)

    def step(self, group: list[int]) -> Float[Tensor, " p"]:
        """Δθ of removing a group, to first order."""
        return self.solve(self.total(group)[None] * self.share)[0]

    def stationarity(self) -> Mapping[str, float]:
        found = self._solved(self.gradient[None])
        return health.stationarity(self.gradient, replace(found, value=found.value[0]))

    @cached_property
    def gradient(self) -> Float[Tensor, " p"]:
        """∇J(θ) = (1/n) Σ gᵢ + ∇R."""
        total = torch.zeros_like(self.theta)
        for _, _, batch in self.train.batches(self.at_once):
            total += self.source.total(self.task.to_device(batch))
        return total / len(self.train) + self.task.penalty.gradient(self.theta, self.task.layout)


@dataclass(frozen=True, eq=False)
class DenseScorer(FlatScorer):
    """(H + λI)⁻¹ at a point."""

    curvature: Curvature
    chosen: Solver[Any]
    damped_by: Damping
    operator: LinearOperator
    solver: Solver[Any]
    state: Any
    damping: float

    @property
    def is_quick_of_itself(self) -> bool:
        return self.linear is not None

    def self_influence(self) -> Float[Tensor, " n"]:
        # One inverse where f is linear in θ.
        return super().self_influence() if self.linear is None else self.linear.self_influence()

    def _solved(self, vectors: Float[Tensor, "k p"]) -> Solution:
        solution = self.solver.solve(self.state, vectors)
        if not solution.is_answer:  # training data written to since leave a residual: say so
            for _ in self.train.batches(self.at_once):
                pass
        return solution.throw()

    # -- removals ---------------------------------------------------------------------------------

    @property
    def linear_removals(self) -> LinearRemovals | None:
        """The fast path, where an example's share of H is Jᵀ Λ J: not for the Fishers' g gᵀ."""
        return self.linear if isinstance(self.curvature, Hessian | GGN) else None

    @cached_property
    def linear(self) -> LinearRemovals | None:
        """Leverages and removals, where the model is linear in θ."""
        if not isinstance(self.source, FactoredLinear):
            return None
        inverse = None
        if isinstance(self.solver, Cholesky):
            inverse = functools.partial(self.solver.inverse_dense, self.state)
        return LinearRemovals(
            self.source, self.train, self.solve, inverse, self.operator, self.share
        )

    def step(self, group: list[int]) -> Float[Tensor, " p"]:
        linear = self.linear_removals
        return self.newton_step(group) if linear is None else linear.step(group)

    def steps(self, groups: Sequence[list[int]]) -> Float[Tensor, "e p"]:
        """Δθ of removing each group; a SpecError where they do not fit into memory."""
        what, each = "steps of the parameters", self.theta.nbytes
        require_bytes(
            len(groups) * each,
            f"{len(groups)} {what} of {len(self.theta)} numbers",
            self.theta.device,
            "ask some groups at a time.",
        )
        return torch.stack([self.step(group) for group in groups])

    def leverages(self, start: int, stop: int) -> Float[Tensor, "b c c"]:
        if self.linear is not None:
            return self.linear.leverages(start, stop)
        batch, size = self.batch(start, stop), stop - start
        j = planned_jacobians(self.plan, self.theta, batch, size)
        solved = self.solve(j.flatten(0, 1)).reshape(j.shape)
        return j @ solved.mT / len(self.train)

    def newton_step(self, group: list[int]) -> Float[Tensor, " p"]:
        """Δθ of removing a group, with the curvature of what is kept factorized anew."""
        n, gone = len(self.train), set(group)
        if len(gone) == n:
            raise ShapeError(
                "Something must be left of the training set.",
                f"a removal of all {n} examples.",
                "a group that holds the whole data set.",
                "remove fewer.",
            )
        kept = self.train.subset([i for i in range(n) if i not in gone])
        operator = damped(self.curvature.fit(self.task, kept, self.theta, n=n), self.damping)
        total = self.total(group)
        solver = self.solver  # with its preconditioner, which what was removed hardly changes
        return solver.solve(solver.init(operator), total * self.share).throw().value

    # -- health -----------------------------------------------------------------------------------

    def stationarity(self) -> Mapping[str, float]:
        return health.stationarity(self.gradient, self.solver.solve(self.state, self.gradient))

    @cached_property
    def _health(self) -> dict[str, Any]:
        return {
            **self.stationarity(),
            "damping": self.damping,
            **health.mean_eigenvalue(self.damped_by, self.damping, self.operator, self.source),
        }

    def health(self) -> dict[str, Any]:
        return self._health

    def work(self, q: int, memory_bytes: int | None) -> Work:
        size = len(self.theta) ** 2 * self.theta.element_size()
        return Work("one or more for the curvature, one for the scores", operator_bytes=size)

    def summary(self, records: Sequence[SolverStats]) -> tuple[dict[str, Any], tuple[str, ...]]:
        if not records:
            return {}, ()
        worst = max(records, key=lambda stats: float(stats.residuals.max()))
        told = {
            # As it was asked for: a preconditioner that was fitted has no short repr.
            "solver": repr(self.solver if isinstance(self.chosen, Auto) else self.chosen),
            "solver_steps": max(stats.steps for stats in records),
            "largest_residual": float(worst.residuals.max()),
            **{f"solver_{key}": value for key, value in worst.extra.items()},
        }
        # What each solve saw of one spectrum: together they saw the most.
        for key, end in (("smallest_ritz", min), ("largest_ritz", max), ("condition", max)):
            seen = [stats.extra[key] for stats in records if key in stats.extra]
            if seen:
                told[f"solver_{key}"] = end(seen)
        return told, ()


def inverse(
    curvature: Curvature,
    chosen: Solver[Any],
    damping: Damping | float,
    fitting: Fitting,
    point: Point,
) -> DenseScorer:
    """P = (H + λI)⁻¹: check the training data, then factorize or set up the solver.

    Raises:
        NotPositiveDefinite: The solver needs H + λI ≻ 0 and it is not.
        DtypeError: A layerwise curvature of a model in half precision.
        SpecError: The matrix that the solver factorizes does not fit into memory.
    """
    task, data = fitting.task, fitting.data
    fitting.checked_losses()
    if isinstance(curvature, LayerwiseCurvature) and task.layout.dtype.itemsize < 4:
        raise DtypeError(
            "A named solver needs curvature and gradients of one dtype.",
            f"{curvature!r} with {chosen!r} on parameters of {task.layout.dtype}: a curvature "
            "by layer is kept in torch.float32.",
            "a solver left from another curvature, on a model in half precision.",
            "leave the solver out: Auto() inverts each block in float32; or use model.float().",
        )
    made = curvature.fit(task, data, point.theta)
    lam, of_damping = as_damping(damping).chosen(made, point.theta, len(data))
    operator = damped(made, lam)
    solver = chosen.select(operator) if isinstance(chosen, Auto) else chosen
    solver, told = preconditioned(solver, fitting, point, lam)
    source = gradient_source(task, point.theta, data)
    if isinstance(solver, Cholesky):
        p = task.layout.size
        require_bytes(
            p * p * torch.float64.itemsize,
            f"a curvature of {p} × {p} numbers for {solver!r}",
            task.layout.device,
            "use curvature=EKFAC(), which keeps a block a layer, or curvature=GGN() with "
            "solver=CG(), which keeps vectors only.",
        )
    state = solver.init(operator)
    # Raise now, before any query, what no right-hand side could be solved with.
    solver.solve(state, torch.zeros_like(point.theta)).throw()
    return DenseScorer(
        curvature=curvature,
        chosen=chosen,
        damped_by=as_damping(damping),
        task=task,
        train=data,
        point=point,
        operator=operator,
        solver=solver,
        state=state,
        source=source,
        damping=lam,
        memory_bytes=fitting.resources.memory_bytes,
        notes=(
            *made.notes,
            *of_damping,
            *told,
            *source.notes,
            *health.duration_notes(operator, solver, point.theta),
        ),
    )


def preconditioned(
    solver: Solver[Any], fitting: Fitting, point: Point, lam: float
) -> tuple[Solver[Any], tuple[str, ...]]:
    """The solver with its preconditioner made, where that is a curvature by layer; and a note.

    A preconditioner changes how many steps a solver takes, not what it converges to. λ of the
    system damps it too; where that is 0, a tenth of the mean eigenvalue of each layer does.
    """
    spec = getattr(solver, "preconditioner", None)
    if not isinstance(spec, LayerwiseCurvature):
        return solver, ()
    fitted = spec.fit_blocks(
        fitting.task,
        fitting.data,
        point.theta,
        damping=Absolute(lam) if lam > 0 else None,
        memory_bytes=fitting.resources.memory_bytes,
        plan=fitting.plan,
    )
    means = [float(block.eigen.values.double().mean()) for block in fitted.blocks]
    lams = [lam if lam > 0 else PRECONDITIONER_DAMPING * mean or 1.0 for mean in means]
    operator = inverse_by_layer(fitted, lams)
    note = f"preconditioner {spec!r}, damped by " + (
        f"{lam:.3g}" if lam > 0 else f"{PRECONDITIONER_DAMPING:g} of each layer's mean eigenvalue"
    )
    return replace(solver, preconditioner=operator), (note,)  # type: ignore[type-var]


def inverse_by_layer(fitted: BlockCurvature, lams: Sequence[float]) -> BlockDiagonal:
    """(Hₗ + λₗI)⁻¹ of every layer, in place of the damping that it was fitted with.

    Raises:
        NotPositiveDefinite: An eigenvalue and λₗ do not add up to more than 0.
    """
    layout = fitted.plan.task.layout
    made = tuple(b.eigen.inverse(lam) for b, lam in zip(fitted.blocks, lams, strict=True))
    return BlockDiagonal(
        made, tuple(b.block.index(layout).to(layout.device) for b in fitted.blocks)
    )
