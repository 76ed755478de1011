"""S[q, i] = −(1/n) ⟨(Ĝ + λI)⁻¹ P∇m_q, P∇fᵢ⟩ ∂ℓᵢ/∂f: the scorer of methods that project gradients.

    Ĝ = (1/n) Σᵢ P∇fᵢ (P∇fᵢ)ᵀ

of the training examples, by layer (LoGra: f = ℓ) or of all of θ (TRAK: f an output). P∇fᵢ is taken
once, and kept in memory or in `Resources(folder=...)`; where neither holds it, it is taken again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import SpecError, UpweightError
from upweight.gradients.autograd import data_gradient
from upweight.gradients.passes import Function, GradientPass
from upweight.gradients.places import Gradients, Projected
from upweight.gradients.projections import Projection, TwoSided
from upweight.linalg.cholesky import Cholesky, CholeskyState
from upweight.linalg.damping import Damping
from upweight.linalg.gram import LongSum
from upweight.linalg.matrices import Dense
from upweight.linalg.operator import PSD
from upweight.methods import health
from upweight.methods.fitting import Fitting
from upweight.methods.scorer import (
    Asked,
    Job,
    Scorer,
    Work,
    gradients_in_groups,
    not_offered,
)
from upweight.runtime.fingerprint import digest
from upweight.runtime.memory import (
    examples_within,
    kept_bytes,
    require_bytes,
    solved_bytes,
    working_bytes,
)
from upweight.runtime.progress import progress
from upweight.runtime.resources import Resources
from upweight.scoring.stream import kernels_for, measured_by, training_loss
from upweight.task.data import Data
from upweight.task.identity import subject
from upweight.task.task import Task

MOST_EXAMPLES = 512
"""Examples in a batch of gradients at most."""

FILE_NUMBERS = 2**23
"""Of projected gradients in a file at most, if it is not one row."""

ROWS = 1024
"""Projected gradients that are multiplied at once."""


@dataclass(frozen=True, eq=False)
class Held:
    """Projected gradients in memory."""

    values: Float[Tensor, "n d"]

    def rows(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        return self.values[start:stop]


@dataclass(frozen=True, eq=False)
class Part:
    """Ĝ + λI of some entries of P g, factorized.

    Args:
        name: Of the layer.
        entries: Which.
        damping: λ.
        mean_eigenvalue: tr(Ĝ)/d, the penalty's share included.
        state: The factorization; None where every example's gradient is 0 there, and so is the
            share of every score.
    """

    name: str
    entries: slice
    damping: float
    mean_eigenvalue: float
    state: CholeskyState | None


@dataclass(frozen=True, eq=False)
class Member:
    """One point: projected gradients of the training examples there, and (Ĝ + λI)⁻¹.

    Args:
        theta: θ_k.
        gradients: P∇fᵢ.
        parts: Ĝ + λI.
        slopes: ∂ℓᵢ/∂f; None where f = ℓ.
    """

    theta: Float[Tensor, " p"]
    gradients: Gradients
    parts: tuple[Part, ...]
    slopes: Float[Tensor, " n"] | None = None

    def solve(self, rows: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """(Ĝ + λI)⁻¹ of each row."""
        out = torch.zeros_like(rows)
        for part in self.parts:
            if part.state is not None:
                b = rows[:, part.entries].double()
                out[:, part.entries] = Cholesky().solve(part.state, b).throw().value.to(out.dtype)
        return out


@dataclass(eq=False)
class ProjectedJob(Job):
    """Solved queries (Ĝ + λI)⁻¹ P∇m of every member."""

    scorer: "ProjectedScorer"
    first: int
    solved: tuple[Float[Tensor, "q d"], ...]
    at_once: int = ROWS

    def __len__(self) -> int:
        return len(self.solved[0])

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        every = zip(self.solved, self.scorer.members, strict=True)
        parts = [v @ m.gradients.rows(start, stop).to(v).mT for v, m in every]
        return self.scorer.scaled(torch.stack(parts).mean(dim=0), start, stop)

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        if not self.scorer.layers:
            return super().by_layer(start, stop)
        ((v,), (m,)) = self.solved, self.scorer.members
        rows = m.gradients.rows(start, stop).to(v)
        return {
            part.name: self.scorer.scaled(
                v[:, part.entries] @ rows[:, part.entries].mT, start, stop
            )
            for part in m.parts
        }

    def scores_of(self, batch: Batch, size: int) -> Float[Tensor, "q b"]:
        if len(self.solved) > 1:
            return super().scores_of(batch, size)
        scorer, (v,) = self.scorer, self.solved
        with GradientPass(scorer.projection.plan, scorer.members[0].theta) as passes:
            rows = scorer.projection(passes.of(training_loss(scorer.task), batch, size))
        return v @ rows.mT * scorer.factor

    def vectors(self) -> Float[Tensor, "q p"]:
        projection = self.scorer.projection
        if len(self.solved) > 1 or not isinstance(projection, TwoSided):
            return super().vectors()
        return projection.adjoint(self.solved[0])


@dataclass(frozen=True, eq=False)
class ProjectedScorer(Scorer):
    """One or several members.

    Args:
        task, train: What was trained.
        projection: P, the same for all members.
        members: Their slopes and their products are averaged apart (Park et al. 2023, §3.2).
        layers: What the parts are called, where a score is a sum over them.
        threshold: Scores are moved towards 0 by so much.
        memory_bytes: What a batch may take.
        at_once: Examples in a batch of gradients.
        notes: What was chosen on the way.
    """

    task: Task
    train: Data
    projection: Projection
    members: tuple[Member, ...]
    layers: tuple[str, ...] = ()
    threshold: float = 0.0
    memory_bytes: int | None = None
    at_once: int = MOST_EXAMPLES
    notes: tuple[str, ...] = ()
    _mean_slopes: Float[Tensor, " n"] | None = field(init=False, repr=False)

    is_quick_of_itself = True

    def __post_init__(self) -> None:
        slopes = [m.slopes for m in self.members if m.slopes is not None]
        mean = torch.stack(slopes).mean(dim=0) if slopes else None
        object.__setattr__(self, "_mean_slopes", mean)

    @property
    def factor(self) -> float:
        """−1/n."""
        return -1 / len(self.train)

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.plan.dtype

    def scaled(self, products: Float[Tensor, "... b"], start: int, stop: int) -> Tensor:
        """S from the products of solved queries with P∇fᵢ, i from start to stop − 1."""
        scores = products * self.factor
        if self._mean_slopes is not None:
            scores = scores * self._mean_slopes[start:stop].to(scores)
        if self.threshold > 0:
            scores = scores.sign() * (scores.abs() - self.threshold).clamp_min(0.0)
        return scores

    def settings(self, asked: Asked) -> dict[str, int]:
        device = self.task.layout.device
        each = 2 * len(self.members) * self.projection.width * self.dtype.itemsize
        return {
            "memory_bytes": working_bytes(device, asked.memory_bytes),
            "queries_together": max(1, solved_bytes(device, asked.memory_bytes) // each),
        }

    def jobs(self, asked: Asked) -> Iterator[ProjectedJob]:
        if asked.functional is not None:
            if len(self.members) > 1:
                raise not_offered("A Functional", "one preconditioner at θ̂")
            (member,) = self.members
            rows = self.projection.of_vectors(asked.functional.at(member.theta))
            yield ProjectedJob(self, 0, (member.solve(rows),))
            return
        together = asked.together or self.settings(asked)["queries_together"]

        def gradients(queries: Data) -> list[Tensor]:
            return [self._measured(m, queries, asked.measure) for m in self.members]

        for first, every in gradients_in_groups(asked, together, gradients):
            solved = (m.solve(rows) for m, rows in zip(self.members, every, strict=True))
            yield ProjectedJob(self, first, tuple(solved))

    def _measured(self, member: Member, queries: Data, measure: Any) -> Float[Tensor, "q d"]:
        """P∇m of every query."""
        function = measured_by(self.task, measure)
        source = Projected(queries, member.theta, function, self.projection, self.at_once)
        with kernels_for(measure):
            return source.rows(0, len(queries))

    def self_influence(self) -> Float[Tensor, " n"]:
        n, found = len(self.train), []
        for start in range(0, n, ROWS):
            stop = min(start + ROWS, n)
            products = []
            for m in self.members:
                rows = m.gradients.rows(start, stop).to(self.task.layout.device)
                own = (m.solve(rows) * rows).sum(dim=1)
                products.append(own if m.slopes is None else own * m.slopes[start:stop].to(own))
            total = self.scaled(torch.stack(products).mean(dim=0), start, stop)
            health.require_finite(total, start)
            found.append(total)
        return torch.cat(found)

    # -- movements of θ, of a derivative ----------------------------------------------------------

    def solve(self, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        projection = self.projection
        if len(self.members) > 1 or not isinstance(projection, TwoSided):
            return super().solve(vectors)
        return projection.adjoint(self.members[0].solve(projection.of_vectors(vectors)))

    def total(self, group: Sequence[int]) -> Float[Tensor, " p"]:
        some = self.train.subset(group)
        return data_gradient(self.task, self.members[0].theta, some, self.at_once)

    def step(self, group: list[int]) -> Float[Tensor, " p"]:
        return self.solve(self.total(group)[None] / len(self.train))[0]

    # -- what to judge it by ----------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        every = [part for m in self.members for part in m.parts]
        sizes = torch.tensor([part.entries.stop - part.entries.start for part in every]).double()
        shares = sizes / sizes.sum()

        def mean(values: Sequence[float]) -> float:
            return float(torch.tensor(values, dtype=torch.float64) @ shares)

        return {
            "members": len(self.members),
            "projected_to": self.projection.width,
            "damping": mean([part.damping for part in every]),
            "mean_eigenvalue": mean([part.mean_eigenvalue for part in every]),
        }

    def work(self, q: int, memory_bytes: int | None) -> Work:
        each = self.projection.width * self.dtype.itemsize
        stored = [m for m in self.members if not isinstance(m.gradients, Held | Projected)]
        return Work(
            passes=f"{len(self.members)} for the projected gradients",
            plan=self.projection.plan,
            batch=min(len(self.train), self.at_once),
            kept_bytes=len(stored) * len(self.train) * each,
            operator_bytes=sum(
                8 * (part.entries.stop - part.entries.start) ** 2
                for m in self.members
                for part in m.parts
            ),
        )


# -- preparing it ---------------------------------------------------------------------------------


def member(
    fitting: Fitting,
    theta: Float[Tensor, " p"],
    function: Function,
    projection: Projection,
    damping: Damping,
    entries: Mapping[str, slice],
    *,
    kept_as: str,
    slopes: Float[Tensor, " n"] | None = None,
    penalty: Mapping[str, Float[Tensor, "d d"]] | None = None,
) -> tuple[Member, int, tuple[str, ...]]:
    """A member, the size of its batches, and notes.

    Args:
        fitting: The task and its data.
        theta: θ_k.
        function: f, one value per example.
        projection: P.
        damping: λ.
        entries: The parts of P g that Ĝ is taken of, by name.
        kept_as: What tells these gradients from others, in a folder.
        slopes: ∂ℓᵢ/∂f.
        penalty: What the penalty adds to Ĝ, by name.

    Raises:
        NotPositiveDefinite: Ĝ + λI is singular.
        SpecError: Matrices of d × d do not fit into memory.
        StaleStore: The folder holds other gradients.

    Cost: one pass over the training data, n d² for Ĝ and d³/3 to factorize it.
    """
    task, data, resources = fitting.task, fitting.data, fitting.resources
    device, itemsize, n = task.layout.device, projection.plan.dtype.itemsize, len(data)
    require_bytes(
        3 * 8 * sum((s.stop - s.start) ** 2 for s in entries.values()),
        f"Gram matrices of {projection.width} projected numbers",
        device,
        "project on fewer: a smaller rank= or dim=.",
    )
    spent = fitting.cost
    allowed = working_bytes(device, resources.memory_bytes)
    each = spent.bytes_per_example + projection.bytes_per_example(spent.positions)
    at_once = data.together(examples_within(allowed, each, MOST_EXAMPLES))
    source = Projected(data, theta, function, projection, at_once)
    gradients = _stored(resources, source, fitting, kept_as)
    sums = {
        name: LongSum((s.stop - s.start,) * 2, projection.plan.dtype, device)
        for name, s in entries.items()
    }
    room = kept_bytes(device, resources.memory_bytes, allowed)
    holds = resources.folder is None and n * projection.width * itemsize <= room
    held = torch.empty(n if holds else 0, source.width, dtype=projection.plan.dtype, device=device)
    places = ((start, min(start + ROWS, n), None) for start in range(0, n, ROWS))
    for start, stop, _ in progress(places, n, "projected gradients"):
        rows = gradients.rows(start, stop).to(device)
        for name, s in entries.items():
            sums[name].add_gram(rows[:, s])
        if holds:
            held[start:stop] = rows
    parts, notes = [], []
    for name, s in entries.items():
        share = (penalty or {}).get(name)
        parts.append(_part(name, s, sums[name].gram / n, share, damping, n))
        if parts[-1].state is None:
            notes.append(f"{name}: gradients are 0 for all examples, and so is its share of scores")
    found = Member(theta, Held(held) if holds else gradients, tuple(parts), slopes)
    return found, at_once, tuple(notes)


def _part(
    name: str,
    entries: slice,
    gram: Float[Tensor, "d d"],
    penalty: Float[Tensor, "d d"] | None,
    damping: Damping,
    n: int,
) -> Part:
    """Ĝ + λI with its λ; raises now, by its name, what every query would meet."""
    if not bool(gram.any()):
        return Part(name, entries, 0.0, 0.0, None)
    if penalty is not None:
        gram = gram + penalty
    try:
        lam = damping.of(Dense(gram, PSD), None, n)
        mean = float(gram.diagonal().mean())
        gram.diagonal().add_(lam)
        solver = Cholesky()
        state = solver.init(Dense(gram, PSD))
        solver.solve(state, gram.new_zeros(len(gram))).throw()
    except UpweightError as error:
        error.args = (f"{name}: {error}",)
        raise
    return Part(name, entries, lam, mean, state)


def _stored(resources: Resources, source: Projected, fitting: Fitting, kept_as: str) -> Gradients:
    """The same gradients, read from a folder that is filled where it is not yet."""
    theta = digest(source.theta)
    kept = resources.matrix(
        f"gradients-{theta[:16]}",
        (len(source), source.width),
        lambda: {"gradients": kept_as, "theta": theta, **subject(fitting.task, fitting.data)},
        {"at_once": source.at_once},
    )
    if kept is None:
        return source
    source.at_once = kept.begun["at_once"]  # batches of other sizes round otherwise
    size = max(1, FILE_NUMBERS // source.width)
    missing = [
        (start, min(start + size, end), None)
        for begin, end in kept.missing_rows()
        for start in range(begin, end, size)
    ]
    if missing:
        for start, stop, _ in progress(iter(missing), len(source), "gradients", missing[0][0]):
            kept.append(start, 0, source.rows(start, stop).cpu())
    return kept


def require_count(name: str, value: object, method: str) -> None:
    """Refuse, by a SpecError, what is no whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(
            f"{method} needs a whole number of directions, 1 or more.",
            f"{name}={value!r}.",
            "a share of the parameters in place of a number, or 0.",
            f"{name}=64 keeps 64; {name}=None keeps all.",
        )
