"""Scorer: what a method supplies to `Fitted`, which does everything else once.

    for job in scorer.jobs(asked):          as many queries at a time as memory holds
        with job: job.block(start, stop)    S[q, start:stop] of these queries

A method of the formula S = −(1/n) Σ_k a_k ⟨P_k ∇m_q(θ_k), gᵢ(θ_k)⟩ gets its scorer from a
preconditioner (`points.py`); any other supplies blocks of scores: `BlockScorer`.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import NonFinite, NotDifferentiable, NotOffered
from upweight.gradients.blocks import Plan
from upweight.gradients.passes import Function
from upweight.methods.functionals import Derivatives
from upweight.runtime.memory import working_bytes
from upweight.scoring.stream import no_gradient
from upweight.task.data import Data
from upweight.task.measures import Functional
from upweight.task.rows import row_name

AT_ONCE = 512
"""Training examples in a block of scores of a method that does not say."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question to a fitted method.

    Args:
        queries: What is asked about.
        measure: m, or a `Functional` of all queries.
        memory_bytes: What a batch may take, and solved queries as much again; None: a share of
            what is free.
        together: Queries that share a pass over the training data; None: as many as fit.
        functional: The derivatives of a `Functional`.
        exact: Whether no tolerance is allowed, whatever the method's.
    """

    queries: Data | None
    measure: Any
    memory_bytes: int | None = None
    together: int | None = None
    functional: Derivatives | None = None
    exact: bool = False

    def __len__(self) -> int:
        if self.functional is not None:
            return len(self.functional.by_theta)
        assert self.queries is not None
        return len(self.queries)

    @property
    def direct(self) -> Float[Tensor, "k n"] | None:
        """∂φ/∂w, where a `Functional` depends on the weights by itself."""
        if self.functional is None or not bool(self.functional.by_weights.any()):
            return None
        return self.functional.by_weights

    def groups(self, together: int) -> Iterator[tuple[int, Data]]:
        """(first, queries), so many of them at a time."""
        assert self.queries is not None
        yield from self.queries.groups(together)


@dataclass(frozen=True, eq=False)
class Work:
    """What a method takes, for a plan before a long run.

    Args:
        passes: Over the training data, in words.
        plan: How gradients are obtained, where that is layer by layer.
        batch: Training examples in a batch; None where the method does not say.
        batch_bytes: Memory of such a batch.
        kept_bytes: On disk, where `Resources.folder` keeps something.
        operator_bytes: Memory of a matrix that is formed; 0 if none is.
    """

    passes: str = "one or more"
    plan: Plan | None = None
    batch: int | None = None
    batch_bytes: int = 0
    kept_bytes: int = 0
    operator_bytes: int = 0


class TokenScores(NamedTuple):
    """S[q, i] = Σ_t shares[q, i, t] + rest[q, i] of a few training examples i.

    A position is where a weight was used: its share says through which tokens the example acts. The
    rest are gains, biases by themselves and weights that are not used once per position.
    """

    shares: Float[Tensor, "q k t"]
    rest: Float[Tensor, "q k"]


class Job(abc.ABC):
    """Some queries, ready to meet the training examples. A context while blocks are asked for.

    Args:
        first: The place of the first of these queries among all.
        at_once: How many training examples a block holds best.
    """

    first: int
    at_once: int = AT_ONCE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many queries."""

    @abc.abstractmethod
    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        """S[q, i] for i from start to stop − 1."""

    def block_with_error(
        self, start: int, stop: int
    ) -> tuple[Float[Tensor, "q b"], Float[Tensor, "q b"] | None]:
        """The same with the standard error of each score; None where nothing was drawn."""
        return self.block(start, stop), None

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        """The same, as the shares of the layers."""
        raise not_offered("PerLayer()", "scores that are sums over parameters", "Matrix()")

    def tokens(self, examples: Sequence[int]) -> TokenScores:
        """S[q, i] of some examples, position by position, and what has no position."""
        raise not_offered("PerToken(...)", "scores that are sums over parameters", "Matrix()")

    def tokens_of(self, data: Data, function: Function | None) -> TokenScores:
        """−(1/n) ⟨P ∇m_q, ∇ function⟩ of some data, position by position, and what has none.

        Without a function it is the training loss.
        """
        raise not_offered("query_tokens(...)", "one preconditioner at θ̂")

    def scores_of(self, batch: Batch, size: int) -> Float[Tensor, "q b"]:
        """S[q, z] of examples that need not be training examples."""
        raise not_offered("relabel_influence(...)", "scores that are sums over parameters")

    def vectors(self) -> Float[Tensor, "q p"]:
        """P ∇m_q, flat."""
        raise not_offered("input_influence(...)", "one preconditioner at θ̂")

    @property
    def row_sums(self) -> Float[Tensor, " q"] | None:
        """Σᵢ S[q, i] at a minimum of J; None where the method promises none."""
        return None

    @property
    def record(self) -> Any:
        """What is left to say once the job is done, for `Scorer.summary`."""
        return None


class Scorer(abc.ABC):
    """What a fitted method knows.

    Args:
        notes: What was chosen or warned of on the way.
        seconds: Time spent, by stage of the fit.
        by_refits: Whether scores are differences between trained models, and no gradients.
    """

    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = {}
    by_refits: ClassVar[bool] = False

    @abc.abstractmethod
    def jobs(self, asked: Asked) -> Iterator[Job]:
        """The queries, in as few jobs as memory allows."""

    def settings(self, asked: Asked) -> dict[str, int]:
        """What free memory decides, and a resumed pass must decide as the first did."""
        device = torch.device("cpu")
        return {
            "memory_bytes": working_bytes(device, asked.memory_bytes),
            "queries_together": len(asked),
        }

    def health(self) -> dict[str, Any]:
        """Numbers to judge every answer by."""
        return {}

    def work(self, q: int, memory_bytes: int | None) -> Work:
        """What q queries take."""
        return Work()

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Numbers and notes on the jobs of one answer."""
        return {}, ()

    @property
    def layers(self) -> tuple[str, ...]:
        """What `Job.by_layer` calls its parts."""
        return ()

    @property
    def couples_layers(self) -> bool:
        """Whether a layer's share is no score by itself, since P is no block per layer."""
        return False

    @property
    def dtype(self) -> torch.dtype | None:
        """What products are taken in; None: that of the parameters."""
        return None

    @property
    def has_self_influence(self) -> bool:
        """Whether `self_influence` is offered."""
        return type(self).self_influence is not Scorer.self_influence

    @property
    def is_quick_of_itself(self) -> bool:
        """Whether `self_influence` takes about one pass over the training data."""
        return False

    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] with m = ℓ."""
        raise not_offered("self_influence()", "scores that are sums over parameters")

    def solve(self, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """P v."""
        raise not_offered("A movement of the parameters", "one preconditioner at θ̂")

    def total(self, group: Sequence[int]) -> Float[Tensor, " p"]:
        """Σ gᵢ over a group of training examples."""
        raise not_offered("A movement of the parameters", "one preconditioner at θ̂")

    def step(self, group: list[int]) -> Float[Tensor, " p"]:
        """Δθ of removing a group of training examples together."""
        raise not_offered("A movement of the parameters", "one preconditioner at θ̂")

    def leverages(self, start: int, stop: int) -> Float[Tensor, "b c c"]:
        """K = (1/n) Jᵢ P Jᵢᵀ of training examples."""
        raise not_offered("loo_outputs()", "one preconditioner at θ̂")

    def stationarity(self) -> Mapping[str, float]:
        """‖∇J(θ̂)‖, and what a Newton step would gain."""
        raise not_offered("stationarity", "a curvature at θ̂")


DIRECT = "∂φ/∂w"
"""The share of a score that acts through no layer."""


@dataclass(frozen=True, eq=False)
class JobOf(Job):
    """A job that asks another one, and does something to its answers."""

    job: Job

    @property
    def first(self) -> int:  # type: ignore[override]
        return self.job.first

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return self.job.at_once

    def __enter__(self) -> Self:
        self.job.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.job.__exit__(*error)

    def __len__(self) -> int:
        return len(self.job)

    @property
    def record(self) -> Any:
        return self.job.record


@dataclass(frozen=True, eq=False)
class _WithDirect(JobOf):
    """The scores of a `Functional` through θ̂, and ∂φ/∂w, which goes through no parameter."""

    direct: Float[Tensor, "k n"]

    def block(self, start: int, stop: int) -> Float[Tensor, "k b"]:
        part = self.job.block(start, stop)
        return part + self.direct[:, start:stop].to(part)

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "k b"]]:
        return {**self.job.by_layer(start, stop), DIRECT: self.direct[:, start:stop]}

    def tokens(self, examples: Sequence[int]) -> TokenScores:
        shares, rest = self.job.tokens(examples)
        return TokenScores(shares, rest + self.direct[:, list(examples)].to(rest))

    @property
    def row_sums(self) -> Float[Tensor, " k"] | None:
        through = self.job.row_sums
        return None if through is None else through + self.direct.sum(dim=1).to(through)


def jobs_of(scorer: "Scorer", asked: Asked) -> Iterator[Job]:
    """The jobs of a scorer, with ∂φ/∂w where a `Functional` has one."""
    for job in scorer.jobs(asked):
        direct = asked.direct
        yield job if direct is None else _WithDirect(job, direct)


Rows = TypeVar("Rows", bound=Sequence[Tensor])


def gradients_in_groups(
    asked: Asked, together: int, gradients: Callable[[Data], Rows]
) -> Iterator[tuple[int, Rows]]:
    """(first, ∇m of some queries at one or several points), so many queries at a time.

    Raises:
        NotDifferentiable: No query's measurement depends on θ.
        NonFinite: A gradient is NaN or infinite.
    """
    depends = False
    for first, queries in asked.groups(together):
        rows = gradients(queries)
        for part in rows:
            _require_finite(part, asked, first)
        depends = depends or any(bool(part.any()) for part in rows)
        if first + len(queries) == len(asked) and not depends:
            raise NotDifferentiable(no_gradient(asked.measure, len(asked)))
        yield first, rows


def _require_finite(rows: Float[Tensor, "q d"], asked: Asked, first: int) -> None:
    """Name the query: a solver knows that one of its right-hand sides is not finite, not whose."""
    bad = ~rows.isfinite().all(dim=1)
    if not bool(bad.any()):
        return
    assert asked.queries is not None
    query = row_name(asked.queries.given, first + int(bad.nonzero()[0]), "query")
    raise NonFinite(
        "The gradient of every measurement must be finite.",
        f"{int(bad.sum())} of {len(rows)} are not, first that of {query} under {asked.measure!r}.",
        "a square root or norm of 0, or a gradient that overflows in this dtype.",
        "leave this query out, measure something else of it, or use a float64 model.",
    )


def not_offered(what: str, needs: str, here: str = "attribute(queries, measure)") -> NotOffered:
    """The error for a question that a method has no answer to."""
    return NotOffered(
        f"{what} needs {needs}.",
        "a method without.",
        "a question of influence functions, asked of another kind of method.",
        f"use {here} here; or fit Influence(GGN(), damping=…), or Influence(EKFAC(), …).",
    )


@dataclass(frozen=True, eq=False)
class Known(Job):
    """Scores that are there already.

    Args:
        values: S of some queries with all training examples.
        total: What each row adds up to; None: nothing is known of it.
    """

    values: Float[Tensor, "q n"]
    first: int = 0
    at_once: int = AT_ONCE
    total: Float[Tensor, " q"] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        return self.values[:, start:stop]

    @property
    def row_sums(self) -> Float[Tensor, " q"] | None:
        return self.total


@dataclass(frozen=True, eq=False)
class _Blocks(Job):
    score: Callable[[int, int], Tensor | tuple[Tensor, Tensor]]
    size: int
    at_once: int
    first: int = 0
    total: Float[Tensor, " q"] | None = None

    def __len__(self) -> int:
        return self.size

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        return self.block_with_error(start, stop)[0]

    def block_with_error(
        self, start: int, stop: int
    ) -> tuple[Float[Tensor, "q b"], Float[Tensor, "q b"] | None]:
        found = self.score(start, stop)
        return found if isinstance(found, tuple) else (found, None)

    @property
    def row_sums(self) -> Float[Tensor, " q"] | None:
        return self.total


@dataclass(frozen=True, eq=False)
class BlockScorer(Scorer):
    """A method that is not of the formula: it says its scores, a block at a time.

    Args:
        score: (queries, measure, start, stop) -> S[q, i], [q, stop − start], or that and its
            standard error.
        at_once: Training examples in a block.
        diagonal: () -> S[i, i] with m = ℓ, or None.
        notes: What was chosen on the way.
        owed: (queries, measure) -> what Σᵢ S[q, i] must be, or None where nothing is known of it.
    """

    score: Callable[[Data, Any, int, int], Tensor | tuple[Tensor, Tensor]]
    at_once: int = AT_ONCE
    diagonal: Callable[[], Tensor] | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    owed: Callable[[Data, Any], Tensor] | None = None

    def jobs(self, asked: Asked) -> Iterator[Job]:
        queries, measure = asked.queries, asked.measure
        if isinstance(measure, Functional) or queries is None:
            raise not_offered("A Functional", "gradients of the model's parameters")
        yield _Blocks(
            lambda start, stop: self.score(queries, measure, start, stop),
            len(queries),
            self.at_once,
            total=None if self.owed is None else self.owed(queries, measure),
        )

    @property
    def has_self_influence(self) -> bool:
        return self.diagonal is not None

    def self_influence(self) -> Float[Tensor, " n"]:
        return super().self_influence() if self.diagonal is None else self.diagonal()
