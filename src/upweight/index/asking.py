"""A question to a fitted method, answered from an index.

The method checks the queries and solves them, as for any question; then their rows meet those of
the index in place of the training gradients. Each is a reducer of `Fitted.attribute`:

    Scanned(…, into)       any reducer, over the products with all rows
    Compared(…, examples)  the method's own scores of some examples, from their gradients, and the
                           products of their rows
    ByToken(…, examples)   the scores from gradients, position by position
    Nearest(…, count)      the same, of the examples that the scan puts first for one query
    Best(…, count, k)      the k largest and smallest scores from gradients, of those examples
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from upweight.index.scan import Scan
from upweight.index.shards import SUMS, Rows, Shard, filled, require_same
from upweight.index.transform import Transform
from upweight.methods.health import require_finite
from upweight.methods.reduce import Answer, Asked, Reducer, Sink, Sweep, strongest, token_scores
from upweight.methods.scorer import Job, TokenScores
from upweight.provenance import Provenance
from upweight.scores import TopScores, Unit
from upweight.task.data import Data

Told = Callable[[Provenance], Provenance]
"""Adds to a provenance what is known of the index."""


@dataclass(eq=False)
class ScanJob(Job):
    """u_q of some queries, which meet the rows of an index a shard at a time."""

    first: int
    scan: Scan
    rows: Rows
    n: int
    dtype: torch.dtype

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return self.rows.size

    def __len__(self) -> int:
        return len(self.scan.queries)

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        found = []
        for shard in self.rows.shards(self.n, start, stop):
            part = slice(max(start, shard.start) - shard.start, min(stop, shard.stop) - shard.start)
            found.append(self._products(shard, part))
        return torch.cat(found, dim=1)

    def picked(self, examples: Sequence[int]) -> Float[Tensor, "q k"]:
        """S[q, i] of some examples in ascending order."""
        every = self.rows.holding(examples, self.n)
        return torch.cat([self._products(shard, at - shard.start) for shard, at in every], dim=1)

    @cached_property
    def _stay(self) -> bool:
        return self.rows.fit(self.n, self.scan.queries.shape[1])

    def _products(self, shard: Shard, part: slice | Tensor) -> Float[Tensor, "q b"]:
        kept = self.rows.read(shard, self._stay)
        chosen = {key: each[part] for key, each in kept.items() if key != SUMS}
        return self.scan.products(chosen).to(self.dtype)


@dataclass(frozen=True, eq=False)
class FromIndex(Reducer):
    """What the reducers here share: the rows on disk, n of them, and how a query becomes one."""

    rows: Rows
    transform: Transform
    n: int
    told: Told
    is_exact = True  # of the queries' side: the job's own products are not asked for

    def job(self, job: Job, dtype: torch.dtype) -> ScanJob:
        """The same queries, for the rows of the index."""
        scan = Scan(filled(self.transform.of_query(job).cpu()), self.rows.codes)
        return ScanJob(job.first, scan, self.rows, self.n, dtype)


@dataclass(frozen=True, eq=False)
class Scanned(FromIndex):
    """What a reducer keeps of the products with all rows.

    Args:
        into: The reducer.
        description: What the rows are, for scores that are kept on disk.
        train: The indexed examples, where they are at hand and no others.
        unit: What a product means.
    """

    into: Reducer
    description: Mapping[str, str]
    train: Data | None
    unit: Unit

    def require_room(self, sweep: Sweep) -> None:
        self.into.require_room(self._wider(sweep))

    def begin(self, sweep: Sweep) -> Sink:
        return _Scanned(self, self.into.begin(self._wider(sweep)), sweep.dtype)

    def _wider(self, sweep: Sweep) -> Sweep:
        def description() -> Mapping[str, str]:
            return {**sweep.description(), **self.description}

        cpu = torch.device("cpu")
        return replace(sweep, n=self.n, device=cpu, layers=lambda: (), description=description)


@dataclass(eq=False)
class _Scanned(Sink):
    asked: Scanned
    sink: Sink
    dtype: torch.dtype

    @property
    def settings(self) -> Mapping[str, int] | None:  # type: ignore[override]
        return self.sink.settings

    @property
    def is_done(self) -> bool:
        return self.sink.is_done

    def missing(self, job: Job, n: int) -> list[tuple[int, int]]:
        scan = self.asked.job(job, self.dtype)
        for begin, end in self.sink.missing(scan, scan.n):
            for start in range(begin, end, scan.at_once):
                self.sink.take(scan, start, min(start + scan.at_once, end))
        self.sink.end(scan)
        return []  # of the training gradients

    def result(self, answer: Answer) -> Any:
        def provenance(notes: Sequence[str]) -> Provenance:
            return self.asked.told(answer.provenance(notes))

        train = self.asked.train
        context = replace(answer.context, train=train) if train is not None else None
        return self.sink.result(
            replace(answer, unit=self.asked.unit, provenance=provenance, context=context)  # type: ignore[arg-type]
        )


@dataclass(frozen=True, eq=False)
class Exact(FromIndex):
    """What asks for S[q, i] of some examples in ascending order, from their gradients.

    `parts` are the indexed data, each with its first row.

    Raises:
        StaleStore: An example is not what its row was made of.
    """

    examples: Sequence[int]
    parts: Sequence[tuple[int, Data]]

    def scores(self, job: Job) -> Float[Tensor, "q k"]:
        """Of one job's queries."""
        task, found, size = self.transform.plan.task, list[Tensor](), self.rows.at_once
        for offset, data in self.parts:
            local = [i - offset for i in self.examples if offset <= i < offset + len(data)]
            for start in range(0, len(local), data.together(size)):
                at = local[start : start + data.together(size)]
                batch = task.to_device(data.take(at))
                self._require_same(data, at, offset)
                part = job.scores_of(batch, len(at)).cpu()
                require_finite(part, at[0] + offset, job.first)
                found.append(part)
        return torch.cat(found, dim=1)

    def _require_same(self, data: Data, local: Sequence[int], offset: int) -> None:
        for shard, at in self.rows.holding([i + offset for i in local], self.n):
            kept = self.rows.read(shard)[SUMS][at - shard.start]
            require_same(kept, data, (at - offset).tolist(), offset, self.rows)


@dataclass(frozen=True, eq=False)
class Compared(Exact):
    """The scores from gradients, and the products of the rows: [q, k, 2]."""

    def begin(self, sweep: Sweep) -> Sink:
        def both(job: Job) -> Float[Tensor, "q k two"]:
            scores = self.scores(job)
            products = self.job(job, sweep.dtype).picked(self.examples)
            return torch.stack([scores, products.to(scores)], dim=2)

        return Asked(both, lambda parts, _: torch.cat(parts))


@dataclass(frozen=True, eq=False)
class ByToken(Exact):
    """The scores from gradients, position by position: `TokenScores`."""

    def begin(self, sweep: Sweep) -> Sink:
        return Asked(self.shares, token_scores)

    def shares(self, job: Job) -> tuple[Float[Tensor, "q k t"], Float[Tensor, "q k"]]:
        """Of one job's queries."""
        shares, rests = list[Tensor](), list[Tensor]()
        for offset, data in self.parts:
            local = [i - offset for i in self.examples if offset <= i < offset + len(data)]
            if local:
                part, rest = job.tokens_of(data.subset(local), None)
                self._require_same(data, local, offset)
                whole = part.sum(dim=2) + rest
                require_finite(whole.cpu(), local[0] + offset, job.first)
                shares.append(part.cpu())
                rests.append(rest.cpu())
        longest = max(part.shape[2] for part in shares)
        padded = [F.pad(part, (0, longest - part.shape[2])) for part in shares]
        return torch.cat(padded, dim=1), torch.cat(rests, dim=1)


@dataclass(frozen=True, eq=False)
class Nearest(ByToken):
    """The same, with their places, of the first `count` examples of one query's scan.

    Those with the largest products where `raises`, else with the smallest.
    """

    count: int = 1
    raises: bool = False

    def begin(self, sweep: Sweep) -> Sink:
        def nearest(job: Job) -> tuple[list[int], TokenScores]:
            found = self.job(job, sweep.dtype).block(0, self.n)
            require_finite(found, 0, job.first)
            (row,) = found
            best = row.topk(min(self.count, self.n), largest=self.raises)
            places = sorted(best.indices.tolist())
            return places, TokenScores(*replace(self, examples=places).shares(job))

        return Asked(nearest, lambda parts, _: parts[0])  # of one query there is one job


@dataclass(frozen=True, eq=False)
class Best(Exact):
    """The k largest and smallest scores from gradients of what the scans of some queries put first.

    Args:
        count: How many at each end of each query's scan are candidates, for all queries that are
            solved together.
        k: How many of each.
        at_hand: Raises where the data of some examples, in ascending order, are not.
    """

    count: int = 1
    k: int = 1
    at_hand: Callable[[Sequence[int]], Sequence[int]] = list

    def begin(self, sweep: Sweep) -> Sink:
        def best(job: Job) -> tuple[Sequence[int], tuple[Tensor, ...]]:
            chosen = self.at_hand(self.candidates(self.job(job, sweep.dtype)))
            values = replace(self, examples=chosen).scores(job)
            at, k = torch.tensor(chosen), min(self.k, len(chosen))
            high, low = values.topk(k, dim=1), values.topk(k, dim=1, largest=False)
            return chosen, (at[high.indices], high.values, at[low.indices], low.values)

        return Asked(best, self._top)

    def candidates(self, scan: ScanJob) -> list[int]:
        """In ascending order."""
        high: tuple[Tensor, Tensor] | None = None
        low: tuple[Tensor, Tensor] | None = None
        for start in range(0, self.n, scan.at_once):
            stop = min(start + scan.at_once, self.n)
            part = scan.block(start, stop)
            require_finite(part, start, scan.first)
            at = torch.arange(start, stop).expand_as(part)
            high = strongest(high, part, at, self.count, largest=True)
            low = strongest(low, part, at, self.count, largest=False)
        return sorted({i for x in (high, low) if x is not None for i in x[1].flatten().tolist()})

    def _top(self, parts: Sequence[tuple[Any, Any]], answer: Answer) -> TopScores:
        chosen, ends = zip(*parts, strict=True)
        note = (
            f"{len(set().union(*chosen))} candidates, the first {min(self.count, self.n)} at each "
            "end of each query's scan, scored from their gradients"
        )
        provenance = self.told(answer.provenance((note,)))
        high_at, high, low_at, low = map(torch.cat, zip(*ends, strict=True))
        return TopScores(high_at, high, low_at, low, answer.unit, provenance)
