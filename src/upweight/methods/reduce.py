"""Reducers: what is kept of the scores while they stream by.

    fitted.attribute(queries, measure, into=uw.Top(10))

    Matrix()             all of them in memory                    Scores
    Top(k)               the k largest and smallest of each query TopScores
    GroupSums(labels)    sums over training examples of a label   Scores, a column per label
    Shards(folder)       all of them on disk, resumable           StoredMatrix; in upweight.shards
    PerLayer()           the share of each layer                  a mapping of Scores
    PerToken(examples)   the shares of the positions of a few     TokenScores

A reducer is a spec; `begin` makes its sink, which sees every block of scores once.
"""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import SpecError
from upweight.methods.health import require_finite, zero_columns
from upweight.methods.scorer import Job, TokenScores
from upweight.provenance import Context, Provenance
from upweight.runtime.memory import require_room
from upweight.runtime.selection import labels_by_place, places
from upweight.scores import Scores, TopScores, Unit


@dataclass(frozen=True, eq=False)
class Sweep:
    """A question whose scores are about to stream by.

    Args:
        q, n: Queries and training examples.
        dtype, device: Of the scores.
        unit: What a score means.
        layers: () -> names of the parts of `Job.by_layer`.
        description: () -> what the scores depend on, for files; reads all data once.
        settings: What free memory decided.
        meanwhile: What to do while others make something; None: nothing.
    """

    q: int
    n: int
    dtype: torch.dtype
    device: torch.device
    unit: Unit
    layers: Callable[[], tuple[str, ...]]
    description: Callable[[], Mapping[str, str]]
    settings: dict[str, int]
    meanwhile: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What is said of scores once they have streamed by.

    Args:
        unit: What a score means.
        provenance: How they came about, from more notes of the sink's own.
        context: The live objects.
    """

    unit: Unit
    provenance: Callable[[Sequence[str]], Provenance]
    context: Context

    def scores(
        self,
        values: Float[Tensor, "q m"],
        columns: tuple[str, ...] | None = None,
        notes: Sequence[str] = (),
        error: Float[Tensor, "q m"] | None = None,
    ) -> Scores:
        """Values with where they came from."""
        made = self.provenance(notes)
        return Scores(values, self.unit, made, error, columns, self.context)


class Sink(abc.ABC):
    """What one answer keeps. Sees the jobs in order, and of each its blocks in order.

    Args:
        settings: What a pass must be done with; None: as memory decides now.
    """

    settings: Mapping[str, int] | None = None

    def missing(self, job: Job, n: int) -> Iterable[tuple[int, int]]:
        """Ranges of training examples that this job has still to score, asked for one by one."""
        return [(0, n)]

    def take(self, job: Job, start: int, stop: int) -> Float[Tensor, "q b"]:
        """Ask the job for a block, keep of it what is kept, and return all of it."""
        part = job.block(start, stop)
        self.see(job, start, part)
        return part

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:  # noqa: B027
        """Keep something of a block."""

    def end(self, job: Job) -> None:  # noqa: B027
        """That was all of a job."""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to compute."""
        return False

    def row_sums(self) -> tuple[Tensor, Tensor] | None:
        """Σᵢ S[q, i] and Σᵢ |S[q, i]|, where not every block was seen in this pass."""
        return None

    def rows(self, at: Sequence[int]) -> Float[Tensor, "k n"] | None:
        """S of some queries, where not every block was seen in this pass."""
        return None

    @abc.abstractmethod
    def result(self, answer: Answer) -> Any:
        """What came of it."""


@dataclass(eq=False)
class Asked(Sink):
    """What jobs answer to another question than that of their blocks.

    Args:
        ask: What each job is asked.
        join: What came of it, from all answers.
    """

    ask: Callable[[Job], Any]
    join: Callable[[list[Any], Answer], Any]
    parts: list[Any] = field(default_factory=list)

    def missing(self, job: Job, n: int) -> list[tuple[int, int]]:
        self.parts.append(self.ask(job))
        return []

    def result(self, answer: Answer) -> Any:
        return self.join(self.parts, answer)


class Reducer(abc.ABC):
    """What to keep of the scores of a question.

    Args:
        is_exact: Whether it allows no tolerance, whatever the method's.
    """

    is_exact: ClassVar[bool] = False

    def require_room(self, sweep: Sweep) -> None:  # noqa: B027
        """Refuse what memory cannot hold, before anything is computed.

        Raises:
            SpecError: It cannot.
        """

    @abc.abstractmethod
    def begin(self, sweep: Sweep) -> Sink:
        """Make what sees the scores."""


# -- all of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix(Reducer):
    """All scores in memory, q × n.

    Raises:
        SpecError: They do not fit.
    """

    def require_room(self, sweep: Sweep) -> None:
        require_room(
            sweep.q,
            sweep.n,
            sweep.dtype,
            sweep.device,
            "ask some queries at a time, as_data(queries).subset(range(100)); or pass into=Top(k) "
            "for the extremes, into=GroupSums(labels) for totals, or into=Shards(folder) for all "
            "of them on disk.",
        )

    def begin(self, sweep: Sweep) -> Sink:
        return _Matrix(torch.empty(sweep.q, sweep.n, dtype=sweep.dtype, device=sweep.device))


@dataclass(eq=False)
class _Matrix(Sink):
    values: Float[Tensor, "q n"]
    error: Float[Tensor, "q n"] | None = None

    def take(self, job: Job, start: int, stop: int) -> Float[Tensor, "q b"]:
        part, error = job.block_with_error(start, stop)
        place = slice(job.first, job.first + len(job)), slice(start, stop)
        self.values[place] = part
        if error is not None:
            self.error = torch.empty_like(self.values) if self.error is None else self.error
            self.error[place] = error
        return part

    def result(self, answer: Answer) -> Scores:
        return answer.scores(self.values, notes=zero_columns(self.values), error=self.error)


# -- less than all --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Top(Reducer):
    """The k largest and the k smallest scores of each query; n × q scores never exist at once.

    Args:
        k: How many of each.

    Raises:
        SpecError: k is not a positive number of examples.
        NonFinite: A score is NaN or infinite.
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, Integral) or isinstance(self.k, bool) or self.k < 1:
            raise SpecError(
                "Top keeps at least one example of each kind per query.",
                f"k={self.k!r}.",
                "a count that came out as zero, or as a fraction or a yes-or-no answer.",
                "ask for Top(1) or more; leave into out for all scores.",
            )

    def begin(self, sweep: Sweep) -> Sink:
        return _Top(min(self.k, sweep.n))


@dataclass(eq=False)
class _Top(Sink):
    k: int
    done: list[tuple[Tensor, ...]] = field(default_factory=list)
    high: tuple[Tensor, Tensor] | None = None
    low: tuple[Tensor, Tensor] | None = None

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:
        require_finite(part, start, job.first)
        index = torch.arange(start, start + part.shape[1], device=part.device).expand_as(part)
        self.high = strongest(self.high, part, index, self.k, largest=True)
        self.low = strongest(self.low, part, index, self.k, largest=False)

    def end(self, job: Job) -> None:
        assert self.high is not None and self.low is not None
        self.done.append((self.high[1], self.high[0], self.low[1], self.low[0]))
        self.high = self.low = None

    def result(self, answer: Answer) -> TopScores:
        high_at, high, low_at, low = map(torch.cat, zip(*self.done, strict=True))
        return TopScores(
            high_at, high, low_at, low, answer.unit, answer.provenance(()), answer.context
        )


@dataclass(frozen=True)
class GroupSums(Reducer):
    """Scores of groups of training examples, summed as they stream: one column per label.

    Args:
        labels: One per training example.

    Raises:
        ShapeError: There is not one label per training example.
        DataError: Labels that differ have one text, such as 1 and "1".
    """

    labels: Iterable[Any]

    def begin(self, sweep: Sweep) -> Sink:
        names, at = labels_by_place(self.labels, sweep.n, "training example")
        total = torch.zeros(sweep.q, len(names), dtype=sweep.dtype, device=sweep.device)
        return _GroupSums(names, torch.tensor(at, device=sweep.device), total)


@dataclass(eq=False)
class _GroupSums(Sink):
    names: tuple[str, ...]
    where: Tensor
    total: Float[Tensor, "q g"]

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:
        rows = self.total[job.first : job.first + len(job)]
        rows.index_add_(1, self.where[start : start + part.shape[1]], part)

    def result(self, answer: Answer) -> Scores:
        return answer.scores(self.total, self.names)


# -- parts of a score -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PerLayer(Reducer):
    """Each layer's share of every score, by the layer's name; they add up to the score.

    Of a `Functional` that depends on the weights by itself, ∂φ/∂w stands under "∂φ/∂w".

    A tolerance is relative to the whole score, not to the share. Memory: q·n per layer.
    """

    def require_room(self, sweep: Sweep) -> None:
        size = sweep.q * max(1, len(sweep.layers()))
        way_out = "ask some queries at a time: as_data(queries).subset(range(100))."
        require_room(size, sweep.n, sweep.dtype, sweep.device, way_out)

    def begin(self, sweep: Sweep) -> Sink:
        shape = (sweep.q, sweep.n)
        empty = {
            name: torch.empty(shape, dtype=sweep.dtype, device=sweep.device)
            for name in sweep.layers()
        }
        return _PerLayer(empty)


@dataclass(eq=False)
class _PerLayer(Sink):
    values: dict[str, Tensor]

    def take(self, job: Job, start: int, stop: int) -> Float[Tensor, "q b"]:
        parts = job.by_layer(start, stop)
        for name, part in parts.items():
            self.values[name][job.first : job.first + len(job), start:stop] = part
        return torch.stack(list(parts.values())).sum(dim=0)

    def result(self, answer: Answer) -> dict[str, Scores]:
        return {name: answer.scores(values) for name, values in self.values.items()}


@dataclass(frozen=True)
class PerToken(Reducer):
    """The scores of some training examples, position by position; see `TokenScores`.

        share[q, i, t] = −(1/n) Σₗ δ_tᵀ (Hₗ + λₗ)⁻¹ ∇m_q a_t

    For convolutions the positions are those of the coarsest resolution above one. Exact.

    Args:
        examples: Which training examples.

    Raises:
        ShapeError: An example is out of range, or nothing is used at several positions.
    """

    examples: Sequence[int]
    is_exact = True

    def begin(self, sweep: Sweep) -> Sink:
        chosen = places(self.examples, sweep.n, "Training examples", least=1, repeats=True)
        return Asked(lambda job: job.tokens(chosen), token_scores)


def token_scores(parts: Sequence[tuple[Tensor, Tensor]], _: Answer) -> TokenScores:
    """Of all queries, from those of each job."""
    return TokenScores(*map(torch.cat, zip(*parts, strict=True)))


# -- shared ---------------------------------------------------------------------------------------


def strongest(
    kept: tuple[Tensor, Tensor] | None,
    part: Float[Tensor, "q b"],
    index: Int[Tensor, "q b"],
    k: int,
    *,
    largest: bool,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The k largest or smallest of each query, and where they are, of those kept and more."""
    if kept is not None:
        part, index = torch.cat([kept[0], part], dim=1), torch.cat([kept[1], index], dim=1)
    best = part.topk(min(k, part.shape[1]), dim=1, largest=largest)
    return best.values, index.gather(1, best.indices)
