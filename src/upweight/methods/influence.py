"""S[q, i] = −(1/n) ∇m_qᵀ (H + λI)⁻¹ ∇ℓᵢ: influence functions.

Hampel (1974); Cook & Weisberg (1982); for neural networks Koh & Liang (2017), Eq. 2. One
factorization (or one iterative solver) serves every question here: scores, self-influence, the
movement of the parameters, removals by a Newton step, and changes of inputs and labels.

This is one of the two places of the library that divide by n: the weight's share of the mean.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Folder
from upweight.curvature.curvature import Curvature
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.curvature.layerwise import LayerwiseCurvature
from upweight.errors import (
    DtypeError,
    NotDifferentiable,
    ShapeError,
    SpecError,
    message,
)
from upweight.gradients.source import (
    FactoredLinear,
    GradientSource,
    gradient_source,
    value_source,
)
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Damping, as_damping, damped
from upweight.linalg.operator import LinearOperator
from upweight.linalg.solution import Solution
from upweight.linalg.solve import Auto, Solver
from upweight.methods import health, layerwise, remainder
from upweight.methods.checked import Checked
from upweight.methods.perturbation import gradient_products_by_input, relabeled
from upweight.methods.removal import LinearRemovals
from upweight.runtime.memory import require_bytes, require_room
from upweight.runtime.selection import places
from upweight.scores import Context, Provenance, Scores, Unit, library_versions
from upweight.task.check import checked_losses, checked_measurements, require_answerable
from upweight.task.data import Data, batch_size
from upweight.task.measures import Loss, as_measure
from upweight.task.modes import require_modules
from upweight.task.snapshot import Snapshot, written
from upweight.task.task import Task, require_task

CURVATURES = ("EKFAC", "KFAC", "Diagonal", "GGN", "Hessian", "Fisher", "EmpiricalFisher")
SOLVERS = ("Auto", "Cholesky", "CG", "MINRES")


def influence_scores(
    query_grads: Float[Tensor, "q p"],
    train_grads: Float[Tensor, "n p"],
    inverse: LinearOperator,
    n: int,
) -> Float[Tensor, "q n"]:
    """First-order effect of each training weight on each measurement.

        S[q, i] = ∂m_q/∂wᵢ = −(1/n) ∇m_qᵀ (H + λI)⁻¹ ∇ℓᵢ

    Koh & Liang (2017), Eq. 2, with ε = (wᵢ − 1)/n.

    Args:
        query_grads: ∇m_q(θ), in units of m per θ.
        train_grads: ∇ℓᵢ(θ), unreduced: not divided by n.
        inverse: (H + λI)⁻¹, where H is the Hessian of the *mean* loss plus penalty.
        n: Size of the training set that defined H; may exceed the rows of `train_grads`.

    Returns:
        S in units of m per unit weight. Removing example i changes m_q by about −S[q, i].

    Raises:
        ShapeError: The gradients and the operator disagree about p.

    Exact when: J is quadratic in θ (for removal: to first order in 1/n).
    Cost: q solves, then q·n·p multiply-adds.
    """
    return -(inverse.mv(query_grads) @ train_grads.T) / n


@dataclass(frozen=True)
class Influence:
    """Influence functions: which H, how to invert it, how much to damp it.

    Args:
        curvature: H: `Hessian()`, `GGN()`, `Fisher()`, `EmpiricalFisher()`, or by layer `EKFAC()`,
            `KFAC()`, `Diagonal()`, `Blockwise(...)`.
        solver: How (H + λI)⁻¹ is applied; `Auto()` goes by size and definiteness.
        damping: λ as a number, `Absolute(λ)` or `Relative(factor)`. 0.0 adds nothing.

    Exact when: J is at a strict minimum with its exact Hessian and λ = 0; then S is the derivative
    itself, whatever the model.

    Raises:
        SpecError: The curvature or solver is a name or a class, not an object.
    """

    curvature: Curvature = field(default_factory=Hessian)
    solver: Solver[Any] = field(default_factory=Auto)
    damping: Damping | float = 0.0

    def __post_init__(self) -> None:
        _require_kind("curvature", self.curvature, Curvature, CURVATURES)
        _require_kind("solver", self.solver, Solver, SOLVERS)

    @property
    def unit(self) -> Unit:
        """Derivatives of the measurement."""
        return Unit.DERIVATIVE

    @property
    def is_by_layer(self) -> bool:
        """Whether (H + λI)⁻¹ is had a layer at a time, which takes the keywords of `fit`."""
        return isinstance(self.curvature, LayerwiseCurvature) and isinstance(self.solver, Auto)

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        memory_bytes: int | None = None,
        store: Folder | None = None,
    ) -> Any:
        """Check the task on its training data, and prepare (H + λI)⁻¹.

        A curvature a block at a time (`EKFAC()` and its kin) with `Auto()` is inverted in its own
        eigenbases and gives a `LayerwiseInfluence`; any other gives a `FittedInfluence`.

        Args:
            task: What was trained.
            train: The training set, as for `as_data`.
            memory_bytes: What one batch may take, for layerwise curvatures; None: a share of what
                is free.
            store: For layerwise curvatures, a folder: the curvature is kept there while it grows,
                an interrupted fit goes on from it, and a finished one is read back at once.

        Raises:
            UpweightError: One of the checks of `upweight.task.check`, with the way out.
            NotPositiveDefinite: The solver needs H + λI ≻ 0 and it is not.
            StaleStore: The store belongs to another model, data or settings.
            SpecError: A store with a loss that is an object that says nothing but its address.
            DtypeError: A named solver for a layerwise curvature of a model in half precision.
            SpecError: The matrix that the solver factorizes does not fit into memory.

        Cost: two passes over the data and the solver's preparation (Cholesky: p³/3).
        """
        started = time.perf_counter()
        require_task(task)
        require_modules(task.model)
        data, before = task.training(train), Snapshot.of(task)
        # Of the data as they come, so that a random data set meets a message that knows the cause.
        probe = require_answerable(task, data, "training data")
        for note in probe.notes:
            warnings.warn(note, UserWarning, stacklevel=2)
        data = data.watched()
        if self.is_by_layer:
            share = 1.0 / len(data)
            return layerwise.fit(self, task, data, probe, share, before, memory_bytes, store)
        if store is not None:
            raise SpecError(
                message(
                    "A store is for curvatures that are learned a layer at a time.",
                    f"store={store!r} with {self.curvature!r} and {self.solver!r}.",
                    "a store given out of habit.",
                    "leave it out, or use curvature=EKFAC() with the solver Auto().",
                )
            )
        losses = checked_losses(task, data, "training data", probe)
        if isinstance(self.curvature, LayerwiseCurvature) and task.layout.dtype.itemsize < 4:
            raise DtypeError(
                message(
                    "A named solver needs curvature and gradients of one dtype.",
                    f"{self!r} on parameters of {task.layout.dtype}: a curvature by layer is kept "
                    "in torch.float32.",
                    "a solver left from another curvature, on a model in half precision.",
                    "leave the solver out: Auto() inverts each block in float32; or use "
                    "model.float().",
                )
            )
        curvature = self.curvature.fit(task, data)
        damping = as_damping(self.damping).of(curvature, task.theta(), len(data))
        operator = damped(curvature, damping)
        solver = self.solver.select(operator) if isinstance(self.solver, Auto) else self.solver
        source = gradient_source(task, data)
        if isinstance(solver, Cholesky):
            p = task.layout.size
            require_bytes(
                p * p * torch.float64.itemsize,
                f"a curvature of {p} × {p} numbers for {solver!r}",
                task.layout.device,
                "use curvature=EKFAC(), which keeps a block a layer, or curvature=GGN() with "
                "solver=CG(), which keeps vectors only.",
            )
        fitted = FittedInfluence(
            spec=self,
            task=task,
            train=data,
            operator=operator,
            solver=solver,
            state=solver.init(operator),
            source=source,
            theta=task.theta(),
            snapshot=Snapshot.of(task).settled(before, written(task, data), losses),
            damping=damping,
            mean_loss=float(losses.double().mean()),
            seconds={},
            notes=(
                *data.notes,
                *data.form_notes,
                *probe.notes,
                *curvature.notes,
                *source.notes,
                *health.precision_notes(task, data),
                *health.duration_notes(operator, solver, task.theta()),
            ),
        )
        self._require_operator(fitted)
        fitted.seconds["fit"] = time.perf_counter() - started
        return fitted

    @staticmethod
    def _require_operator(fitted: "FittedInfluence") -> None:
        """Raise now, before any query, what no right-hand side could be solved with."""
        zero = fitted.task.theta().zero_()
        fitted.solver.solve(fitted.state, zero).throw()


def _require_kind(name: str, given: Any, kind: type, known: Sequence[str]) -> None:
    """Refuse a name, a class or another argument in the place of a curvature or solver."""
    if isinstance(given, kind) and not isinstance(given, type):
        return
    called = given.__name__ if isinstance(given, type) else str(given)
    meant = [word for word in known if word.lower() == called.lower()]
    raise SpecError(
        message(
            f"Influence takes its {name} as an object.",
            f"{name}={given!r}.",
            "a class that was not called."
            if isinstance(given, type)
            else "a name in its place."
            if isinstance(given, str)
            else "an argument in another's place.",
            f"Influence({name}=upweight.{meant[0]}())."
            if meant
            else f"Influence({name}=...) with one of {', '.join(f'{word}()' for word in known)}.",
        )
    )


@dataclass(frozen=True, eq=False)
class FittedInfluence(Checked):
    """(H + λI)⁻¹ at θ̂, ready for queries. Made by `Influence.fit`.

    Args:
        spec: The method.
        task, train: What it was fitted to.
        operator: H + λI.
        solver, state: How it is inverted.
        source: Where training gradients come from.
        theta: θ̂ at the time.
        snapshot: Everything else of the task at the time.
        damping: λ.
        mean_loss: (1/n) Σ ℓᵢ(θ̂).
        seconds: Time spent, by stage.
        notes: What was chosen or warned of on the way.
    """

    spec: Influence
    task: Task
    train: Data
    operator: LinearOperator
    solver: Solver[Any]
    state: Any
    source: GradientSource
    theta: Float[Tensor, " p"]
    snapshot: Snapshot
    damping: float
    mean_loss: float
    seconds: dict[str, float]
    notes: tuple[str, ...]

    # -- scores ---------------------------------------------------------------------------------

    def attribute(
        self,
        queries: Any,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    ) -> Scores:
        """S[q, i] = ∂m_q/∂wᵢ for every query and training example.

        Args:
            queries: As for `as_data`.
            measure: What to ask of each query: `Loss()`, `Margin()`, `LogProb()`, `Logit()`, or any
                function `(outputs, targets) -> [q]`.

        Raises:
            UpweightError: The queries do not pass the checks of `upweight.task.check`.
            NotConverged: An iterative solver missed its tolerance.
            SpecError: The scores, or the gradients of all queries, do not fit into memory.

        Cost: q measure gradients, q solves, one pass over the training data.
        """
        started = time.perf_counter()
        data, measure, gradients = self._measured(queries, measure, len(self.train))
        solution = self._solve(gradients)
        values = solution.value.new_empty(len(data), len(self.train))
        stop = 0
        for batch, size in self._batches():
            start, stop = stop, stop + size
            values[:, start:stop] = self.source.inner(solution.value, batch, size) * -self.share
        return self._scores(values, Unit.DERIVATIVE, data, measure, solution, started)

    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] = ∂ℓᵢ/∂wᵢ for every training example: how much its own weight lowers its loss.

            S[i, i] = −(1/n) gᵢᵀ (H + λI)⁻¹ gᵢ  ≤ 0

        Its magnitude is the memorization score of Feldman & Zhang (2020) to first order.

        Cost: n solves, or one inverse where the model is linear in θ.
        """
        self._require_same_model()
        if self._linear is not None:
            return self._linear.self_influence()
        parts = []
        for batch, size in self._batches():
            rows = self.source.rows(batch, size)
            parts.append(-self.share * (rows * self._solve(rows).value).sum(dim=1))
        return torch.cat(parts)

    # -- what moves the parameters ----------------------------------------------------------------

    def parameter_influence(self, example: int) -> Mapping[str, Tensor]:
        """dθ̂/dε = −(H + λI)⁻¹ ∇ℓᵢ, by parameter name.

        Koh & Liang (2017), Eq. 1: ε is added to the *mean* objective, (1/n) Σ ℓ + ε ℓᵢ. In terms of
        the data weight, ∂θ̂/∂wᵢ is this divided by n; removal moves θ̂ by about −(1/n) times this.

        Raises:
            ShapeError: There is no such example.
        """
        self._require_same_model()
        row = self.source.rows(self._example(example), 1)
        return self.task.layout.unflatten(-self._solve(row).value[0])

    # -- removals ---------------------------------------------------------------------------------

    def removal(
        self,
        queries: Any,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        groups: Sequence[int | Sequence[int]] | None = None,
    ) -> Scores:
        """Δm of removing examples, by one Newton step of the objective without them.

            Δm_q ≈ ∇m_qᵀ (H + λI − (1/n) Σ_U Hᵢ)⁻¹ (1/n) Σ_U gᵢ

        Where `Scores.removal()` keeps the curvature of the full data, this takes the removed
        examples' own curvature out: the leverage correction 1/(1 − h) of a scalar-output linear
        model, its block Woodbury form for several outputs, the Newton step for groups.

        Args:
            queries: As for `as_data`.
            measure: As for `attribute`.
            groups: What each column removes: an example or several together. None: every example
                by itself.

        Returns:
            Δm, one column per group, in unit DIFFERENCE.

        Raises:
            ShapeError: An index is out of range or repeated within its group.
            NonFinite: Without these examples the minimum is not determined (leverage 1).

        Exact when: J is quadratic in θ and m linear in it. Otherwise one gradient at θ̂ + Δθ tells
        whether the step ended at the minimum without the examples, and the measurements there tell
        whether they are linear over the step. Where not, Δm may be further off than −S, and the
        provenance has a note that is also an `AssumptionWarning`. See
        `upweight.methods.remainder` for which removals are looked at.
        Cost: where the model is linear in θ, c solves per removed example (one inverse for all of
        them); otherwise one factorization per group. For the check, a gradient per removal.
        """
        started = time.perf_counter()
        named = None if groups is None else [self._group(group) for group in groups]
        if named is not None and not named:
            raise ShapeError(
                message(
                    "A removal needs something to remove.",
                    "groups=[], no group at all.",
                    "a filter that matched nothing.",
                    "leave groups out to remove each example by itself, or pass groups=[[0, 1]].",
                )
            )
        every = [[i] for i in range(len(self.train))] if named is None else named
        data, measure, gradients = self._measured(queries, measure, len(every))
        solution = self._solve(gradients)
        linear = self.linear_removals
        steps: Float[Tensor, "e p"] | None = None
        lengths: Float[Tensor, " e"] | None = None
        if linear is None:
            steps = torch.stack([self._newton_step(group) for group in every])
            values = gradients @ steps.T
        elif all(len(group) == 1 for group in every):
            values, lengths = linear.each(solution.value, [group[0] for group in every])
        else:
            parts = [linear.together(solution.value, group) for group in every]
            values = torch.stack(parts, dim=1)
        columns = None if named is None else tuple(",".join(map(str, g)) for g in named)
        at, moves = remainder.looked_at(self, every, steps, lengths)
        some, count = [every[k] for k in at], len(every)
        doubts = (
            *remainder.missed(self, some, moves, count),
            *remainder.curved(self, data, measure, values[:, at], some, moves, count),
        )
        return self._scores(
            values, Unit.DIFFERENCE, data, measure, solution, started, columns, doubts
        )

    def removal_step(self, examples: Sequence[int]) -> Mapping[str, Tensor]:
        """Δθ of removing the examples together by one Newton step, by parameter name.

        Warns where the step does not end at the minimum without them, as `removal` notes.
        """
        self._require_same_model()
        group = self._group(list(examples))
        linear = self.linear_removals
        step = self._newton_step(group) if linear is None else linear.step(group)
        health.warned(remainder.missed(self, [group], step[None], 1), 3)
        return self.task.layout.unflatten(step)

    @property
    def linear_removals(self) -> LinearRemovals | None:
        """The fast path, where an example's share of H is Jᵀ Λ J: not for the Fishers' g gᵀ."""
        return self._linear if isinstance(self.spec.curvature, Hessian | GGN) else None

    @cached_property
    def _linear(self) -> LinearRemovals | None:
        if not isinstance(self.source, FactoredLinear):
            return None
        inverse = None
        if isinstance(self.solver, Cholesky):
            inverse = functools.partial(self.solver.inverse_dense, self.state)
        return LinearRemovals(
            self.source, self.train, lambda v: self._solve(v).value, inverse, self.share
        )

    def _newton_step(self, group: list[int]) -> Float[Tensor, " p"]:
        """Δθ of removing a group, with the curvature of what is kept factorized anew."""
        n, gone = len(self.train), set(group)
        if len(gone) == n:
            raise ShapeError(
                message(
                    "Something must be left of the training set.",
                    f"a removal of all {n} examples.",
                    "a group that holds the whole data set.",
                    "remove fewer.",
                )
            )
        kept = self.train.subset([i for i in range(n) if i not in gone])
        operator = damped(self.spec.curvature.fit(self.task, kept, n=n), self.damping)
        batches = self.train.subset(group).batches(len(group))
        parts = [self.source.total(self.task.to_device(batch)) for _, _, batch in batches]
        total = torch.stack(parts).sum(dim=0)
        solver = self.spec.solver
        return solver.solve(solver.init(operator), total * self.share).throw().value

    # -- changed inputs and labels ----------------------------------------------------------------

    def input_influence(
        self,
        example: int,
        queries: Any,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        input: int | str = 0,
    ) -> Float[Tensor, "q *x"]:
        """∂S[q, i]/∂xᵢ: how the score changes with the training example's own input.

        Koh & Liang (2017), Eq. 5 (I_pert,loss), divided by n as every score is. Moving xᵢ by a
        small d while keeping its weight changes m_q by about the inner product with d.

        Args:
            example: Which training example.
            queries: As for `as_data`.
            measure: As for `attribute`.
            input: Which input, where the model has several: its place or its name.

        Returns:
            One array of the input's shape per query.

        Raises:
            DtypeError: The input is not floating point.
        """
        _, _, gradients = self._measured(queries, measure)
        vectors = self._solve(gradients).value
        products = gradient_products_by_input(self.task, vectors, self._example(example), input)
        return -products * self.share

    def relabel_influence(
        self,
        example: int,
        label: Any,
        queries: Any,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    ) -> Float[Tensor, " q"]:
        """Δm_q of giving a training example another label, to first order.

            Δm_q ≈ −(1/n) ∇m_qᵀ (H + λI)⁻¹ [∇ℓ(xᵢ, label) − ∇ℓ(xᵢ, yᵢ)]

        Koh & Liang (2017), §2.2.

        Raises:
            UpweightError: The label does not fit the loss: out of range, or of another shape; or
                is none that an adapter's estimator knows.
        """
        _, _, gradients = self._measured(queries, measure)
        vectors = self._solve(gradients).value
        old = self._example(example)
        reads = self.task.reads
        new = relabeled(old, label) if reads is None else reads.relabeled(old, label)
        with torch.no_grad():
            self.task.loss.check(*self.task.outputs(self.task.theta(), new))
        change = self.source.inner(vectors, new, 1) - self.source.inner(vectors, old, 1)
        return -change[:, 0] * self.share

    # -- health -----------------------------------------------------------------------------------

    @cached_property
    def stationarity(self) -> Mapping[str, float]:
        """How far θ̂ is from a stationary point of J: ‖∇J(θ̂)‖, and what a Newton step would gain.

        Influence functions assume that both are zero; see `upweight.methods.health`.
        """
        return health.stationarity(self.gradient, self.solver.solve(self.state, self.gradient))

    @cached_property
    def _mean_eigenvalue(self) -> Mapping[str, float]:
        return health.mean_eigenvalue(self.spec.damping, self.damping, self.operator, self.source)

    @cached_property
    def gradient(self) -> Float[Tensor, " p"]:
        """∇J(θ̂) = (1/n) Σ gᵢ + ∇R."""
        parts = [self.source.total(batch) for batch, _ in self._batches()]
        total = torch.stack(parts).sum(dim=0)
        penalty = self.task.penalty.gradient(self.task.theta(), self.task.layout)
        return total * self.share + penalty

    def _scores(
        self,
        values: Float[Tensor, "q n"],
        unit: Unit,
        queries: Data,
        measure: Any,
        solution: Solution,
        started: float,
        columns: tuple[str, ...] | None = None,
        doubts: Sequence[str] = (),
    ) -> Scores:
        judged: dict[str, Any] = {
            "mean_loss": self.mean_loss,
            "convex": self._is_convex,
            **self.stationarity,
            "damping": self.damping,
            **self._mean_eigenvalue,
            **health.solve_quality(self.solver, solution),
        }
        sizes = values.abs().sum(dim=1)
        if unit is Unit.DERIVATIVE:
            penalty = self.task.penalty.gradient(self.theta, self.task.layout)
            judged |= health.row_sum_excess(values.sum(dim=1), sizes, solution.value @ penalty)
        denied, noted = self._minimum_denied(judged)
        denied = [
            *denied,
            *health.solved(judged),
            *health.zero_rows(sizes, self.mean_loss),
            *doubts,
        ]
        seconds = {**self.seconds, "attribute": time.perf_counter() - started}
        layout = self.task.layout
        provenance = Provenance(
            method=repr(self.spec),
            task=f"loss={self.task.loss!r}, penalty={self.task.penalty!r}, "
            f"params={self.task.params!r}",
            measure=repr(measure),
            n=len(self.train),
            q=len(queries),
            p=layout.size,
            dtype=str(layout.dtype).removeprefix("torch."),
            device=str(layout.device),
            health=judged,
            seconds=seconds,
            versions=library_versions(),
            notes=tuple(
                dict.fromkeys(
                    (
                        *self.notes,
                        *self.snapshot.notes,
                        *queries.notes,
                        *queries.form_notes,
                        *health.warned(denied),
                        *noted,
                        *health.zero_columns(values),
                    )
                )
            ),
        )
        context = Context(self.task, self.train, queries, measure, self)
        return Scores(values, unit, provenance, columns=columns, context=context)

    @property
    def share(self) -> float:
        """1/n, the weight of one example in the mean: the only division by n in the methods."""
        return 1.0 / len(self.train)

    # -- shared steps -----------------------------------------------------------------------------

    def _measured(
        self, queries: Any, measure: Callable[..., Tensor], columns: int = 0
    ) -> tuple[Data, Callable[..., Tensor], Float[Tensor, "q p"]]:
        """Checked queries and the gradient of each measurement; `columns` scores will be of each.

        Raises:
            SpecError: The scores and gradients do not fit into memory.
        """
        self._require_same_model()
        data, measure = self.task.queries(queries), as_measure(measure)
        q, p, dtype = len(data), self.task.layout.size, self.task.layout.dtype
        way_out = "ask some queries at a time: as_data(queries).subset(range(100))."
        if columns:
            way_out = (
                "ask some queries at a time, as_data(queries).subset(range(100)); or use "
                "curvature=EKFAC(), whose top(queries, k) and write(queries, folder) never hold "
                "all scores."
            )
            require_room(q, columns, dtype, self.task.layout.device, way_out)
        require_bytes(
            2 * q * p * dtype.itemsize,
            f"gradients and solutions of {q} queries in {p} parameters",
            self.task.layout.device,
            way_out,
        )
        probe = require_answerable(self.task, data, "queries")
        checked_losses(self.task, data, "queries", probe)
        data = data.noted(probe.notes)
        checked_measurements(self.task, measure, data)
        layout = self.task.layout
        source = self._measure_source(measure, data)
        rows = [
            source.rows(self.task.to_device(batch), stop - start)
            for start, stop, batch in data.batches(batch_size(layout.size, layout.dtype.itemsize))
        ]
        gradients = torch.cat(rows)
        if not bool(gradients.any()):
            raise NotDifferentiable(
                message(
                    "Some measurement must depend on θ through differentiable steps.",
                    f"gradients of exactly 0 for all {len(data)} queries under {measure!r}.",
                    "a measure that counts (accuracy, argmax, a threshold), or targets that the "
                    "loss ignores: the derivative is 0.",
                    "use Margin(), LogProb() or Loss(), which move before the decision does.",
                )
            )
        return data, measure, gradients

    def _measure_source(self, measure: Any, queries: Data) -> GradientSource:
        # ∇m = ∇ℓ, for which the source may have a closed form.
        if isinstance(measure, Loss) and isinstance(self.source, FactoredLinear):
            return self.source
        task = self.task
        return value_source(task, queries, lambda p, b: measure(task, p, b), self.train)

    def _solve(self, vectors: Float[Tensor, "k p"]) -> Solution:
        return self.solver.solve(self.state, vectors).throw()

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        """The training examples in order, with how many there are in each batch."""
        size = batch_size(self.source.values_per_example, self.task.layout.dtype.itemsize)
        batches = self.train.batches(size)
        return ((self.task.to_device(batch), stop - start) for start, stop, batch in batches)

    def _example(self, index: int) -> Any:
        return self.task.to_device(self.train.take(self._group(index)))

    def _group(self, group: int | Sequence[int]) -> list[int]:
        return places(group, len(self.train), "Training examples", least=1)
