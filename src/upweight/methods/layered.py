"""P = ⊕ₗ Qₗ f(Λₗ) Qₗᵀ, a layer at a time: the scorer of EK-FAC and its kin, and of P = I.

Queries are solved once; the training set then streams past all of them in one pass, as the factors
of its gradients. Grosse et al. (2023), §2.3.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Batch
from upweight.curvature.layerwise import (
    BlockCurvature,
    FittedBlock,
    LayerwiseCurvature,
    Look,
    examples_at_once,
)
from upweight.errors import NonFinite, ShapeError, UpweightError
from upweight.gradients.autograd import data_gradient
from upweight.gradients.blocks import Block, Plan
from upweight.gradients.factored import Tokens, stacked
from upweight.gradients.layers import rule_for
from upweight.gradients.passes import Function, GradientPass
from upweight.gradients.source import entries
from upweight.linalg.damping import Absolute, Damping, Evidence, as_damping
from upweight.linalg.eigen import Eigen
from upweight.methods import health
from upweight.methods.fitting import Fitting
from upweight.methods.scorer import Asked, Job, Scorer, TokenScores, Work, not_offered
from upweight.notation import percent
from upweight.runtime.fingerprint import digest
from upweight.runtime.memory import working_bytes
from upweight.runtime.progress import progress
from upweight.scoring.choose import Choice
from upweight.scoring.queries import FactoredQueries, in_basis, inner, self_products
from upweight.scoring.stream import (
    Contraction,
    Gradients,
    contractions,
    of_vectors,
    queries_at_once,
    training_gradients,
    training_loss,
    unchanged,
)
from upweight.task.check import checked_batch, checked_losses
from upweight.task.data import Data
from upweight.task.gradients import require_finite_gradients
from upweight.task.identity import described, subject
from upweight.task.point import Point
from upweight.task.task import Task


@dataclass(eq=False)
class LayeredJob(Job):
    """A `Contraction` with its sign, its 1/n and a pass over the gradients."""

    scorer: "LayeredScorer"
    contraction: Contraction

    @property
    def first(self) -> int:  # type: ignore[override]
        return self.contraction.first

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return self.contraction.at_once

    def __len__(self) -> int:
        return len(self.contraction)

    @cached_property
    def _passes(self) -> GradientPass:
        return self.scorer.passes()

    def __enter__(self) -> "LayeredJob":
        self._passes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._passes.__exit__(*error)

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        part = self.contraction.block(self._passes, start, stop)
        part *= self.scorer.factor
        return part

    def by_layer(self, start: int, stop: int) -> Mapping[str, Float[Tensor, "q b"]]:
        parts = self.contraction.by_block(self._passes, start, stop)
        return {
            name: part.mul_(self.scorer.factor)
            for name, part in zip(self.scorer.layers, parts, strict=True)
        }

    def tokens(self, examples: Sequence[int]) -> TokenScores:
        return self.tokens_of(self.scorer.train.subset(examples), None)

    def tokens_of(self, data: Data, function: Function | None) -> TokenScores:
        gradients = self.scorer.gradients
        if function is not None and gradients is not unchanged:
            raise not_offered("query_tokens(...)", "gradients not divided by their norm")
        plan, theta = self.scorer.curvature.plan, self.scorer.point.theta
        passes = self.scorer.passes() if function is None else GradientPass(plan, theta)
        shares, rest = token_shares(plan, passes, data, list(self.solved()), function, gradients)
        return TokenScores(shares * self.scorer.factor, rest * self.scorer.factor)

    def scores_of(self, batch: Batch, size: int) -> Float[Tensor, "q b"]:
        loss = training_loss(self.scorer.task)
        factors = self.scorer.gradients(self._passes.of(loss, batch, size))
        return self.contraction.scores([factors]) * self.scorer.factor

    def vectors(self) -> Float[Tensor, "q p"]:
        if self.scorer.gradients is not unchanged:  # a norm changes with the example too
            raise not_offered("input_influence(...)", "gradients not divided by their norm")
        layout, found = self.scorer.task.layout, None
        for block, full in zip(self.scorer.curvature.blocks, self.solved(), strict=True):
            if found is None:
                found = full.new_empty(len(self), layout.size, dtype=layout.dtype)
            found[:, block.block.index(layout).to(full.device)] = full.flatten(1).to(found.dtype)
        assert found is not None
        return found

    def solved(self) -> Iterator[Float[Tensor, "q ..."]]:
        """V_q of each block, in θ's own coordinates and the dtype that it was solved in."""
        for q in self.contraction.queries:
            yield q.solved(slice(None)) if isinstance(q, FactoredQueries) else q.whole

    @property
    def row_sums(self) -> Float[Tensor, " q"] | None:
        penalties = self.scorer.penalty_gradients()
        shares = [inner(q, r) for q, r in zip(self.contraction.queries, penalties, strict=True)]
        return torch.stack(shares).sum(dim=0)

    @property
    def record(self) -> Choice:
        # Without its kernels, which hold the solved queries.
        return replace(self.contraction.choice, kernels=())


@dataclass(frozen=True, eq=False)
class LayeredScorer(Scorer):
    """(Hₗ + λₗ)⁻¹ of every block at a point.

    `losses` says which training examples to measure errors on: ℓᵢ(θ̂), or a guess where they were
    not looked at; these `look` checks when they are scored.
    """

    task: Task
    train: Data
    curvature: BlockCurvature
    point: Point
    losses: Float[Tensor, " n"]
    look: Look | None = None
    tolerance: float = 0.0
    memory_bytes: int | None = None
    gradients: Gradients = unchanged
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    is_quick_of_itself = True

    def passes(self) -> GradientPass:
        """Over gradients of the training loss. What one checks of a kind of batch holds for all."""
        return GradientPass(self.curvature.plan, self.point.theta, self._placed)

    @cached_property
    def _placed(self) -> set[Any]:
        return set()

    @property
    def factor(self) -> float:
        """−a/n."""
        return -self.point.weight / len(self.train)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.curvature.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.curvature.plan.dtype

    def settings(self, asked: Asked) -> dict[str, int]:
        return {
            "memory_bytes": working_bytes(self.task.layout.device, asked.memory_bytes),
            "queries_together": queries_at_once(self.curvature, asked.memory_bytes),
        }

    def jobs(self, asked: Asked) -> Iterator[LayeredJob]:
        if asked.functional is not None:
            rows = asked.functional.at(self.point.theta)
            memory, gradients = asked.memory_bytes, self.gradients
            found = of_vectors(self.curvature, self.train, rows, memory, gradients, self.look)
            yield LayeredJob(self, found)
            return
        assert asked.queries is not None
        for found in contractions(
            self.curvature,
            self.train,
            asked.queries,
            asked.measure,
            0.0 if asked.exact else self.tolerance,
            self.losses,
            asked.memory_bytes,
            asked.together,
            self.gradients,
            self.look,
        ):
            yield LayeredJob(self, found)

    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] = −(1/n) Σₗ gᵢᵀ (Hₗ + λₗ)⁻¹ gᵢ, in one pass."""
        inverses = [block.inverse() for block in self.curvature.blocks]
        parts = []
        for start, factors in self._pass("self-influence"):
            shares = [
                self_products(inverse, part)
                for inverse, part in zip(inverses, factors, strict=True)
            ]
            total = torch.stack(shares).sum(dim=0) * self.factor
            health.require_finite(total, start)
            parts.append(total)
        return torch.cat(parts)

    def solve(self, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        out = torch.empty_like(vectors)
        layout = self.task.layout
        for block in self.curvature.blocks:
            index = block.block.index(layout).to(vectors.device)
            inverse = block.inverse()
            out[:, index] = inverse.mv(vectors[:, index].to(inverse.dtype)).to(out.dtype)
        return out

    def total(self, group: Sequence[int]) -> Float[Tensor, " p"]:
        return data_gradient(self.task, self.point.theta, self.train.subset(group), self._at_once)

    def step(self, group: list[int]) -> Float[Tensor, " p"]:
        return self.solve(self.total(group)[None] / len(self.train))[0]

    def leverages(self, start: int, stop: int) -> Float[Tensor, "b c c"]:
        batch = self.task.to_device(self.train.batch(start, stop))
        rows: list[list[Tensor]] = [[] for _ in self.curvature.blocks]
        with GradientPass(self.curvature.plan, self.point.theta) as passes:
            for factors in passes.of_heads(batch, stop - start, entries):
                for found, block, part in zip(rows, self.curvature.blocks, factors, strict=True):
                    found.append(in_basis(block.eigen, part).flatten(1))
        parts = []
        for found, block in zip(rows, self.curvature.blocks, strict=True):
            j = torch.stack(found, dim=1)
            weights = block.inverse().values.flatten()
            parts.append((j * weights) @ j.mT)
        return torch.stack(parts).sum(dim=0) / len(self.train)

    @property
    def _at_once(self) -> int:
        return examples_at_once(self.curvature.cost, self.task.layout.device, self.memory_bytes)

    def stationarity(self) -> Mapping[str, float]:
        totals = [torch.zeros_like(b.eigen.values) for b in self.curvature.blocks]
        for _, factors in self._pass("stationarity"):
            for total, part in zip(totals, factors, strict=True):
                total += part.total().reshape(total.shape)
        squared, decrement = 0.0, 0.0
        for block, total, penalty in zip(
            self.curvature.blocks, totals, self.penalty_gradients(), strict=True
        ):
            gradient = total / len(self.train) + penalty
            solution = block.inverse().mv(gradient.flatten())
            squared += float(gradient.square().sum())
            decrement += 0.5 * float(gradient.flatten() @ solution)
        return {"gradient_norm": squared**0.5, "decrement": decrement}

    def penalty_gradients(self) -> list[Tensor]:
        """∇R(θ) of each block, in the block's shape."""
        layout = self.task.layout
        flat = self.task.penalty.gradient(self.task.whole(self.point.theta), layout)
        return [
            flat[b.block.index(layout).to(flat.device)]
            .reshape(b.eigen.values.shape)
            .to(b.eigen.values)
            for b in self.curvature.blocks
        ]

    def summary(self, records: Sequence[Choice]) -> tuple[dict[str, Any], tuple[str, ...]]:
        if not records:
            return {}, ()
        error, worst = max(c.error for c in records), max(c.worst for c in records)
        notes = [
            f"compressing products (contraction) changes a query's scores by {percent(error)} "
            f"(measured; worst of the compared queries {percent(worst)}); tolerance= allows "
            f"{percent(self.tolerance)}"
        ]
        if len(records) > 1:
            notes.append(
                f"{len(records)} passes over the training data: queries did not fit at once"
            )
        told = {
            "tolerance": self.tolerance,
            "contraction_error": error,
            "contraction_error_worst": worst,
            "contraction": dict(zip(self.layers, records[0].terms, strict=True)),
        }
        return told, tuple(notes)

    def health(self) -> dict[str, Any]:
        return health.spectrum(self.curvature)

    def work(self, q: int, memory_bytes: int | None) -> Work:
        batch = min(len(self.train), self._at_once)
        kept = [
            tensor
            for block in self.curvature.blocks
            for tensor in (*block.eigen.bases, block.eigen.values)
            if tensor is not None
        ]
        groups = -(-q // queries_at_once(self.curvature, memory_bytes))
        learning = f"{len(self.seconds)} for the curvature, " if self.seconds else ""
        return Work(
            passes=f"{learning}{groups} for the scores",
            plan=self.curvature.plan,
            batch=batch,
            batch_bytes=batch * self.curvature.cost.bytes_per_example,
            # Sums are kept in two parts.
            kept_bytes=2 * sum(x.nbytes for x in kept) if self.seconds else 0,
        )

    def _pass(self, what: str) -> Iterator[tuple[int, list[Any]]]:
        """The gradients of all training examples, a batch at a time."""
        with self.passes() as passes:
            batches = self.train.batches(self._at_once)
            for start, stop, batch in progress(batches, len(self.train), what):
                batch = self.task.to_device(batch)
                factors = training_gradients(passes, self.task, batch, start, stop, self.look)
                yield start, self.gradients(factors)


def token_shares(
    made: Plan,
    passes: GradientPass,
    some: Data,
    vectors: Sequence[Float[Tensor, "q ..."]],
    function: Function | None = None,
    gradients: Gradients = unchanged,
) -> TokenScores:
    """⟨V_q, gᵢ⟩ of some examples, position by position, and what has no position.

    gᵢ is the gradient of the training loss, or of another `function`.
    """
    task, examples = made.task, range(len(some))
    function = training_loss(task) if function is None else function
    with passes:
        parts = [
            passes.of(function, task.to_device(batch), stop - start)
            for start, stop, batch in some.batches(len(examples))
        ]
    factors = gradients([stacked(block) for block in zip(*parts, strict=True)])
    tokens = [
        f.positions
        for f, block in zip(factors, made.blocks, strict=True)
        if isinstance(f, Tokens) and f.positions > 1 and not _is_routed(made, block)
    ]
    if not tokens:
        raise ShapeError(
            "Per-token scores need weights that are used at several positions.",
            "a model that uses every weight once per example.",
            "a model of images or rows, not of sequences.",
            "leave into out for whole scores, or pass into=PerLayer() for other shares.",
        )
    t, q = min(tokens), len(vectors[0])
    shares = vectors[0].new_zeros(q, len(examples), t, dtype=made.dtype)
    rest = shares.new_zeros(q, len(examples))
    for block, part, v in zip(made.blocks, factors, vectors, strict=True):
        v = v.to(made.dtype)
        if isinstance(part, Tokens) and _is_on(made, block, part, t):
            # A weight used twice per token has its uses one after the other.
            uses = torch.einsum("bto,qoi,bti->qbt", part.left, v, part.right)
            shares += uses.reshape(q, len(examples), -1, t).sum(dim=2)
        else:
            rest += part.inner(v)
    return TokenScores(shares, rest)


def _is_routed(made: Plan, block: Block) -> bool:
    """Whether a block is of experts, whose positions are those of the tokens routed to them."""
    layers = {s.layer for s in made.sources.get(block.name, ())}
    rules = [rule_for(made.task.model.get_submodule(layer)) for layer in layers]
    return any(rule is not None and rule.is_stacked for rule in rules)


def _is_on(made: Plan, block: Block, part: Tokens, t: int) -> bool:
    """Whether a weight was used once or several times at each of t positions."""
    if _is_routed(made, block):
        return False
    layers = [made.task.model.get_submodule(s.layer) for s in made.sources[block.name]]
    # More positions of a convolution are those of a finer grid.
    is_grid = any(isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) for layer in layers)
    return part.positions == t or (not is_grid and part.positions % t == 0)


# -- preparing it ---------------------------------------------------------------------------------


def identity(
    fitting: Fitting,
    point: Point,
    gradients: Gradients = unchanged,
    scale: Float[Tensor, " p"] | None = None,
) -> LayeredScorer:
    """P = I: gradients are multiplied as they are, or as `gradients` makes them.

    With `scale` P = diag(scale), of entries not below 0.
    """
    losses = fitting.checked_losses()
    made, layout = fitting.plan, fitting.task.layout
    values = torch.ones_like(point.theta) if scale is None else 1 / scale
    blocks = tuple(
        FittedBlock(
            block,
            Eigen(
                (None,) * len(block.shape),
                values[block.index(layout).to(layout.device)].reshape(block.shape).to(made.dtype),
            ),
        )
        for block in made.blocks
    )
    curvature = BlockCurvature(made, point.theta, fitting.cost, blocks, made.notes)
    return LayeredScorer(
        task=fitting.task,
        train=fitting.data,
        curvature=curvature,
        point=point,
        losses=losses,
        memory_bytes=fitting.resources.memory_bytes,
        gradients=gradients,
        notes=made.notes,
    )


def inverse(
    curvature: LayerwiseCurvature,
    damping: Damping | float,
    tolerance: float,
    fitting: Fitting,
    point: Point,
) -> LayeredScorer:
    """P = (Hₗ + λₗ)⁻¹ by block: learn the curvature, and check the training data on the way."""
    task, data, losses = fitting.task, fitting.data, fitting.losses
    damping = as_damping(damping)
    fitted = fitting.once(
        curvature, point.theta, lambda: _learned(curvature, damping, fitting, point)
    )
    layout = task.layout
    size = examples_at_once(fitted.cost, layout.device, fitting.resources.memory_bytes)
    silent = _silent_blocks(fitted, damping, data, size)
    blocks = tuple(
        b
        if b.name in silent
        else _damped(b, damping, point.theta[b.block.index(layout).to(layout.device)], len(data))
        for b in fitted.blocks
    )
    if silent:
        # Times a gradient of zero, any λ > 0 gives zero.
        some = max(b.damping for b in blocks if b.name not in silent)
        blocks = tuple(replace(b, damping=some) if b.name in silent else b for b in blocks)
    at = curvature.places(len(data))
    learned = len(data) if at is None else len(at)
    later = learned < len(data) and fitting.resources.ranks.size == 1 and _is_own(fitting, point)
    fitting.looks_later |= later
    return LayeredScorer(
        task=task,
        train=data,
        curvature=replace(fitted, blocks=blocks),
        point=point,
        losses=losses.of_some(learned) if later else losses.all(),
        look=losses.look if later else None,
        tolerance=tolerance,
        memory_bytes=fitting.resources.memory_bytes,
        seconds={f"fit: {stage}": took for stage, took in fitted.seconds.items()},
        notes=(
            *fitted.notes,
            *(
                f"{name}: curvature and gradients are 0 for all examples looked at, and so is its "
                "share of every score"
                for name in silent
            ),
            *health.underflow_notes(fitted.plan, point.theta, data, size),
        ),
    )


def _learned(
    curvature: LayerwiseCurvature, damping: Damping, fitting: Fitting, point: Point
) -> BlockCurvature:
    """The curvature before any damping, from a pass that checks the training data on the way."""
    task, data, probe, resources = (
        fitting.task, fitting.data, fitting.probe, fitting.resources
    )  # fmt: skip
    seen: dict[int, Tensor] = {}
    is_own, is_shared = _is_own(fitting, point), fitting.learned is not None

    def watch(start: int, stop: int, batch: Batch, outputs: Tensor, targets: Any) -> None:
        places = (start, stop)
        seen[start] = checked_batch(task, data, places, batch, outputs, targets, "training data")

    settings = {"curvature": described(curvature), "damping": described(damping)}
    if not is_own:
        settings["theta"] = digest(point.theta)
        resources = resources.within(settings["theta"][:16])
    try:
        fitted = curvature.fit_blocks(
            task,
            data,
            point.theta,
            # The evidence is not known before the spectrum is, nor what is to be shared.
            damping=None if isinstance(damping, Evidence) or is_shared else damping,
            memory_bytes=resources.memory_bytes,
            checkpoint=resources.checkpoint(lambda: settings | subject(task, data)),
            watch=watch if is_own else None,
            plan=fitting.plan,
            ranks=resources.ranks,
        )
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        # Say which example, if it is the data.
        if isinstance(error, NonFinite) or not isinstance(error, UpweightError):
            checked_losses(task, data, "training data", probe)
        if isinstance(error, NonFinite):
            require_finite_gradients(task, data)
        raise
    # The first pass has seen them all, unless it had only some of the data or resumed. Batches of
    # other sizes may round otherwise, and an interrupted fit must come to the same numbers.
    if is_own and resources.folder is None:
        at = curvature.places(len(data))
        if at is None:
            fitting.losses.set(resources.ranks.joined(seen, len(data), task.layout.device))
        elif resources.ranks.size == 1:
            fitting.losses.set_some(at, torch.cat([*seen.values()]))
    return fitted


def _is_own(fitting: Fitting, point: Point) -> bool:
    """Whether losses at the point are those of the trained model."""
    # A placeholder for θ has no values.
    own = fitting.task.stands_in(point.theta)
    return own or torch.equal(point.theta, fitting.theta)


def _silent_blocks(
    curvature: BlockCurvature, damping: Damping, data: Data, size: int
) -> tuple[str, ...]:
    """Blocks that no example reaches: an expert that is never asked, a fresh adapter.

    No fraction of their mean eigenvalue is a damping, and none is needed. Where squares underflow
    and gradients do not, a block is not silent.
    """
    zero = [b.name for b in curvature.blocks if not bool(b.eigen.values.any())]
    if not zero or len(zero) == len(curvature.blocks) or isinstance(damping, Absolute):
        return ()
    heard = health.heard_blocks(curvature.plan, curvature.theta, data, size)
    return tuple(name for name in zero if name not in heard)


def _damped(block: FittedBlock, damping: Damping, theta: Tensor, n: int) -> FittedBlock:
    """The block with its λ; raises now, by its name, what every query would meet."""
    try:
        lam = damping.of(block.eigen, theta, n)
        block.eigen.inverse(lam)
    except UpweightError as error:
        error.args = (f"{block.name}: {error}",)
        raise
    return replace(block, damping=lam)
