"""S[q, i] = −(1/n) Σₗ ∇m_qᵀ (Hₗ + λₗ)⁻¹ ∇ℓᵢ: influence with a curvature a block at a time.

Koh & Liang (2017), Eq. 2, with K-FAC or EK-FAC for H as in Grosse et al. (2023). Queries are solved
once; the training set then streams past all of them in one pass.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Batch, Folder
from upweight.contraction.choose import Choice
from upweight.contraction.queries import inner, self_products
from upweight.contraction.stream import (
    Contraction,
    contractions,
    queries_at_once,
    training_loss,
)
from upweight.curvature.layerwise import (
    BlockCurvature,
    FittedBlock,
    LayerwiseCurvature,
    examples_at_once,
)
from upweight.errors import (
    NonFinite,
    ShapeError,
    SpecError,
    UpweightError,
    message,
)
from upweight.gradients.blocks import Block
from upweight.gradients.factored import Tokens, stacked
from upweight.gradients.passes import GradientPass
from upweight.linalg.damping import Absolute, Damping, Evidence, as_damping
from upweight.methods import health
from upweight.methods.checked import Checked
from upweight.runtime.checkpoint import Checkpoint
from upweight.runtime.memory import require_room, working_bytes
from upweight.runtime.progress import progress
from upweight.runtime.selection import labels_by_place, places
from upweight.runtime.shards import ScoreShards
from upweight.scores import Context, Provenance, Scores, TopScores, Unit, library_versions
from upweight.task.check import (
    checked_batch,
    checked_losses,
    checked_measurements,
    require_answerable,
    require_own_losses,
)
from upweight.task.data import Data
from upweight.task.gradients import require_finite_gradients
from upweight.task.identity import contents, described, subject
from upweight.task.measures import Loss, as_measure
from upweight.task.probe import Probe
from upweight.task.snapshot import Snapshot, written
from upweight.task.task import Task

if TYPE_CHECKING:
    from upweight.methods.influence import Influence

SHARD_BYTES = 64 * 2**20
"""Scores in one file: few enough files for a million examples, little to lose when interrupted."""

TOLERANCE = 1e-2
"""Relative error of a query's scores that the contraction may have: far below what a curvature from
sampled labels has anyway."""


def fit(
    spec: "Influence",
    task: Task,
    data: Data,
    probe: Probe,
    share: float,
    before: Snapshot,
    memory_bytes: int | None = None,
    store: Folder | None = None,
) -> "LayerwiseInfluence":
    """Learn the curvature of each block, and check the training data on the way.

    Args:
        spec: The method.
        task: What was trained, and answerable by a few of the data.
        data: The training set.
        probe: What was found of a few of them.
        share: 1/n, the weight of one example.
        before: What the task was before any pass.
        memory_bytes: What a batch may take.
        store: A folder to keep the curvature in while it grows, and to take it from.
    """
    started = time.perf_counter()
    assert isinstance(spec.curvature, LayerwiseCurvature)
    damping = as_damping(spec.damping)
    seen: dict[int, Tensor] = {}

    def watch(start: int, stop: int, batch: Batch, outputs: Tensor, targets: Any) -> None:
        places = (start, stop)
        seen[start] = checked_batch(task, data, places, batch, outputs, targets, "training data")

    try:
        curvature = spec.curvature.fit_blocks(
            task,
            data,
            # The evidence is not known before the spectrum is.
            damping=None if isinstance(damping, Evidence) else damping,
            memory_bytes=memory_bytes,
            checkpoint=None if store is None else _checkpoint(store, spec, task, data),
            watch=watch,
        )
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        # Say which example, if it is the data.
        if isinstance(error, NonFinite) or not isinstance(error, UpweightError):
            checked_losses(task, data, "training data", probe)
        if isinstance(error, NonFinite):
            require_finite_gradients(task, data)
        raise
    # The first pass has seen them all, unless it had only some of the data or went on from before.
    losses = torch.cat(list(seen.values())) if seen else task.theta()[:0]
    # Batches of other sizes may round otherwise; an interrupted fit must come to the same numbers.
    if len(losses) < len(data) or store is not None:
        losses = checked_losses(task, data, "training data", probe)
    else:
        require_own_losses(task, data, probe, losses, "training data")
    theta, layout = task.theta(), task.layout
    size = examples_at_once(curvature.cost, layout.device, memory_bytes)
    silent = _silent_blocks(curvature, damping, data, size)
    blocks = tuple(
        b
        if b.name in silent
        else _damped(b, damping, theta[b.block.index(layout).to(theta.device)], len(data))
        for b in curvature.blocks
    )
    if silent:
        # Times a gradient of zero, any λ > 0 gives zero.
        some = max(b.damping for b in blocks if b.name not in silent)
        blocks = tuple(replace(b, damping=some) if b.name in silent else b for b in blocks)
    return LayerwiseInfluence(
        spec=spec,
        task=task,
        train=data,
        curvature=replace(curvature, blocks=blocks),
        theta=task.theta(),
        snapshot=Snapshot.of(task).settled(before, written(task, data), losses),
        losses=losses,
        share=share,
        memory_bytes=memory_bytes,
        seconds={
            "fit": time.perf_counter() - started,
            **{f"fit: {stage}": took for stage, took in curvature.seconds.items()},
        },
        notes=(
            *data.notes,
            *data.form_notes,
            *probe.notes,
            *curvature.notes,
            *(
                f"{name}: curvature and gradients are 0 for all examples looked at, and so is its "
                "share of every score"
                for name in silent
            ),
            *health.precision_notes(task, data),
            *health.underflow_notes(curvature.plan, data, size),
        ),
    )


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
    heard = health.heard_blocks(curvature.plan, data, size)
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


def _checkpoint(store: Folder, spec: "Influence", task: Task, data: Data) -> Checkpoint:
    """Where the curvature is kept, under the hash of everything that it depends on."""
    settings = {"curvature": described(spec.curvature), "damping": described(spec.damping)}
    return Checkpoint.open(store, repr(settings | subject(task, data)))


@dataclass(frozen=True, eq=False)
class LayerwiseInfluence(Checked):
    """(Hₗ + λₗ)⁻¹ of every block at θ̂, ready for queries. Made by `Influence.fit`.

    Args:
        spec: The method.
        task, train: What it was fitted to.
        curvature: The blocks, with their damping.
        theta: θ̂ at the time.
        snapshot: Everything else of the task at the time.
        losses: ℓᵢ(θ̂) of every training example.
        share: 1/n.
        memory_bytes: What a batch may take; None: a share of what is free.
        seconds: Time spent, by stage; "fit: pass 1" is a part of "fit".
        notes: What was chosen or warned of on the way.
    """

    spec: "Influence"
    task: Task
    train: Data
    curvature: BlockCurvature
    theta: Float[Tensor, " p"]
    snapshot: Snapshot
    losses: Float[Tensor, " n"]
    share: float
    memory_bytes: int | None
    seconds: Mapping[str, float]
    notes: tuple[str, ...]

    # -- scores ---------------------------------------------------------------------------------

    def attribute(
        self,
        queries: Any,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        *,
        tolerance: float = TOLERANCE,
    ) -> Scores:
        """S[q, i] = ∂m_q/∂wᵢ for every query and training example.

        Args:
            queries: As for `as_data`.
            measure: What to ask of each query: `Loss()`, `Margin()`, `LogProb()`, `Logit()`, or any
                function `(outputs, targets) -> [q]`.
            tolerance: Relative error that the contraction may have, ‖Ŝ_q − S_q‖/‖S_q‖, root mean
                square over the queries; measured, and recorded in the provenance. 0 is exact.

        Raises:
            UpweightError: The queries do not pass the checks of `upweight.task.check`.
            SpecError: The tolerance is negative.

        Cost: q measure gradients and solves, then one pass over the training data (forward, and
        backward through the activations) and the products of `upweight.contraction`; memory q·n
        scores and the solved queries.
        """
        started = time.perf_counter()
        data, measure = self._asked(queries, measure, tolerance)
        require_room(
            len(data),
            len(self.train),
            self.curvature.plan.dtype,
            self.theta.device,
            "use top(queries, k) for the extremes, group(queries, labels) for totals, or "
            "write(queries, folder) for all of them on disk.",
        )
        values = torch.empty(
            len(data), len(self.train), dtype=self.curvature.plan.dtype, device=self.theta.device
        )
        choices: list[Choice] = []
        rows = _RowSums()
        for job in self._contractions(data, measure, tolerance):
            for start, stop, part in job.stream():
                part *= -self.share
                values[job.first : job.first + len(job), start:stop] = part
                rows.see(part)
            rows.end(self._penalty_shares(job))
            choices.append(job.choice)
        excess, notes = self._judged(*rows.all())
        notes += health.zero_columns(values)
        return self._scores(values, data, measure, choices, tolerance, started, excess, notes=notes)

    def top(
        self,
        queries: Any,
        k: int,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        *,
        tolerance: float = TOLERANCE,
    ) -> TopScores:
        """The k largest and k smallest scores of each query; n × q scores never exist at once.

        Args:
            queries: As for `attribute`.
            k: How many of each.
            measure: As for `attribute`.
            tolerance: As for `attribute`.

        Raises:
            SpecError: k is not a positive number of examples.
            NonFinite: A score is NaN or infinite.
        """
        started = time.perf_counter()
        if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
            raise SpecError(
                message(
                    "top keeps at least one example of each kind per query.",
                    f"k={k!r}.",
                    "a count that came out as zero, or as a fraction or a yes-or-no answer.",
                    "ask for k=1 or more; use attribute(...) for all scores.",
                )
            )
        data, measure = self._asked(queries, measure, tolerance)
        k = min(k, len(self.train))
        choices, kept, rows = [], [], _RowSums()
        for job in self._contractions(data, measure, tolerance):
            best = _Extremes(k)
            for start, _, part in job.stream():
                scores = _finite(part * -self.share, start, job.first)
                best.see(start, scores)
                rows.see(scores)
            rows.end(self._penalty_shares(job))
            choices.append(job.choice)
            kept.append(best.result())
        excess, notes = self._judged(*rows.all())
        provenance = self._provenance(data, measure, choices, tolerance, started, excess, notes)
        high_at, high, low_at, low = (torch.cat(column) for column in zip(*kept, strict=True))
        return TopScores(high_at, high, low_at, low, Unit.DERIVATIVE, provenance)

    def write(
        self,
        queries: Any,
        folder: Folder,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        *,
        tolerance: float = TOLERANCE,
    ) -> ScoreShards:
        """S[q, i] for every query and training example, on disk as they are computed.

        For scores that do not fit into memory. Interrupted, the same call solves the queries again
        and fills in what is not there; what was written is not computed again, but read and
        compared with its hash.

        Args:
            queries: As for `attribute`.
            folder: Where to; one folder for each question.
            measure: As for `attribute`.
            tolerance: As for `attribute`.

        Returns:
            The shards: `row(query)` reads the scores of one query, `Scores.load(folder)` all of
            them with their provenance.

        Raises:
            StaleStore: The folder holds the scores of something else, or a damaged file.
            SpecError: A loss or measure is an object that says nothing but its address.
            OSError: The disk is full or not writable; what was written stays readable.
            NonFinite: A score is NaN or infinite; it is not written.
        """
        started = time.perf_counter()
        data, measure = self._asked(queries, measure, tolerance)
        description = {
            "method": described(self.spec),
            "measure": described(measure),
            "tolerance": repr(tolerance),
            "queries": contents(data),
            **subject(self.task, self.train),
        }
        # Free memory decides these, and differs when an interrupted pass goes on.
        settings = {
            "memory_bytes": working_bytes(self.theta.device, self.memory_bytes),
            "queries_together": queries_at_once(self.curvature, self.memory_bytes),
        }
        shards = ScoreShards.open(folder, len(self.train), len(data), description, settings)
        shards.verify()
        if shards.header is not None and shards.is_whole:
            return shards
        memory_bytes, together = map(shards.settings.get, settings)
        choices: list[Choice] = []
        expected = []
        for job in self._contractions(data, measure, tolerance, memory_bytes, together):
            for begin, end in shards.missing(job.first, job.first + len(job)):
                held: list[Tensor] = []
                for _, stop, part in job.stream(begin):
                    held.append(_finite(part * -self.share, stop - part.shape[1], job.first).mT)
                    size = sum(x.nbytes for x in held)
                    if size >= SHARD_BYTES or stop >= end:
                        shards.append(job.first, begin, torch.cat(held))
                        begin, held = stop, []
                    if stop >= end:
                        break
            choices.append(job.choice)
            expected.append(self._penalty_shares(job))
        excess, notes = self._judged(*_sums(shards), torch.cat(expected).cpu())
        provenance = self._provenance(data, measure, choices, tolerance, started, excess, notes)
        shards.finish({"unit": Unit.DERIVATIVE.name, "provenance": asdict(provenance)})
        return shards

    def group(
        self,
        queries: Any,
        labels: Iterable[Any],
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        *,
        tolerance: float = TOLERANCE,
    ) -> Scores:
        """Scores of groups of training examples, summed as they stream; n × q never exist at once.

        Args:
            queries: As for `attribute`.
            labels: One per training example.
            measure: As for `attribute`.
            tolerance: As for `attribute`.

        Raises:
            ShapeError: There is not one label per training example.
            DataError: Labels that differ have one text, such as 1 and "1".
        """
        started = time.perf_counter()
        data, measure = self._asked(queries, measure, tolerance)
        names, at = labels_by_place(labels, len(self.train), "training example")
        where = torch.tensor(at, device=self.theta.device)
        choices, totals, rows = [], [], _RowSums()
        for job in self._contractions(data, measure, tolerance):
            total = torch.zeros(
                len(job), len(names), dtype=self.curvature.plan.dtype, device=self.theta.device
            )
            for start, stop, part in job.stream():
                part *= -self.share
                total.index_add_(1, where[start:stop], part)
                rows.see(part)
            rows.end(self._penalty_shares(job))
            choices.append(job.choice)
            totals.append(total)
        values = torch.cat(totals)
        excess, notes = self._judged(*rows.all())
        return self._scores(
            values,
            data,
            measure,
            choices,
            tolerance,
            started,
            excess,
            columns=names,
            notes=notes,
        )

    def by_layer(
        self,
        queries: Any,
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
        *,
        tolerance: float = TOLERANCE,
    ) -> Mapping[str, Scores]:
        """Each block's share of every score, by the block's name; they add up to `attribute`.

        The tolerance is relative to the whole score, not to the share. Memory: q·n per block.
        """
        started = time.perf_counter()
        data, measure = self._asked(queries, measure, tolerance)
        blocks = self.curvature.blocks
        values = [
            torch.empty(
                len(data),
                len(self.train),
                dtype=self.curvature.plan.dtype,
                device=self.theta.device,
            )
            for _ in blocks
        ]
        choices = []
        for job in self._contractions(data, measure, tolerance):
            for start, stop, parts in job.stream_blocks():
                for out, part in zip(values, parts, strict=True):
                    out[job.first : job.first + len(job), start:stop] = part * -self.share
            choices.append(job.choice)
        return {
            block.name: self._scores(out, data, measure, choices, tolerance, started, {})
            for block, out in zip(blocks, values, strict=True)
        }

    def by_token(
        self,
        queries: Any,
        examples: Sequence[int],
        measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    ) -> tuple[Float[Tensor, "q k t"], Float[Tensor, "q k"]]:
        """The scores of some training examples, position by position, and what has no position.

            S[q, i] = Σ_t share[q, i, t] + rest[q, i],    share = −(1/n) Σₗ δ_tᵀ (Hₗ+λₗ)⁻¹∇m_q a_t

        A position is where a weight was used: its share says through which tokens the example acts.
        The rest are gains, biases by themselves and weights that are not used once per position;
        for convolutions the positions are those of the coarsest resolution above one.
        Exact (`tolerance` 0). Memory: q·p for the solved queries.

        Raises:
            ShapeError: An example is out of range, or nothing is used at several positions.
        """
        chosen = places(examples, len(self.train), "Training examples", least=1, repeats=True)
        data, measure = self._asked(queries, measure, 0.0)
        positions = [t for t in self.curvature.cost.positions if t > 1]
        if not positions:
            raise ShapeError(
                message(
                    "Per-token scores need weights that are used at several positions.",
                    "a model that uses every weight once per example.",
                    "a model of images or rows, not of sequences.",
                    "use attribute(...), or by_layer(...) for another decomposition.",
                )
            )
        parts = [self._token_shares(job, chosen) for job in self._contractions(data, measure, 0.0)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _token_shares(self, job: Contraction, chosen: list[int]) -> tuple[Tensor, Tensor]:
        task = self.task
        with GradientPass(self.curvature.plan) as passes:
            parts = [
                passes.of(training_loss(task), task.to_device(batch), stop - start)
                for start, stop, batch in self.train.subset(chosen).batches(len(chosen))
            ]
            factors = [stacked(block) for block in zip(*parts, strict=True)]
        tokens = [f.positions for f in factors if isinstance(f, Tokens) and f.positions > 1]
        t = min(tokens)
        none = torch.zeros((), dtype=self.curvature.plan.dtype, device=self.theta.device)
        shares = none.repeat(len(job), len(chosen), t)
        rest = none.repeat(len(job), len(chosen))
        blocks = self.curvature.plan.blocks
        for block, part, kernel in zip(blocks, factors, job.choice.kernels, strict=True):
            vectors = getattr(kernel, "vectors", None)
            if not (
                isinstance(part, Tokens) and vectors is not None and self._is_on(block, part, t)
            ):
                kernel.add_to(rest, part)
                continue
            # A weight used twice per token has its uses one after the other.
            uses = torch.einsum("bto,qoi,bti->qbt", part.left, vectors, part.right)
            shares += uses.reshape(len(job), len(chosen), -1, t).sum(dim=2)
        return shares * -self.share, rest * -self.share

    def _is_on(self, block: Block, part: Tokens, t: int) -> bool:
        """Whether a weight was used once or several times at each of t positions."""
        plan = self.curvature.plan
        layers = [self.task.model.get_submodule(s.layer) for s in plan.sources[block.name]]
        # More positions of a convolution are those of a finer grid.
        is_grid = any(isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) for layer in layers)
        return part.positions == t or (not is_grid and part.positions % t == 0)

    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] = −(1/n) Σₗ gᵢᵀ (Hₗ + λₗ)⁻¹ gᵢ ≤ 0 of every training example, in one pass.

        Its magnitude is the memorization score of Feldman & Zhang (2020) to first order.

        Raises:
            NonFinite: A score is NaN or infinite.
        """
        self._require_same_model()
        inverses = [b.eigen.inverse(b.damping) for b in self.curvature.blocks]
        values = torch.empty(
            len(self.train), dtype=self.curvature.plan.dtype, device=self.theta.device
        )
        with GradientPass(self.curvature.plan) as passes:
            batches = self.train.batches(self._at_once)
            for start, stop, batch in progress(batches, len(self.train), "self-influence"):
                batch = self.task.to_device(batch)
                factors = passes.of(training_loss(self.task), batch, stop - start)
                shares = [
                    self_products(inverse, part)
                    for inverse, part in zip(inverses, factors, strict=True)
                ]
                total = torch.stack(shares).sum(dim=0)
                values[start:stop] = _finite(-self.share * total, start)
        return values

    # -- health ---------------------------------------------------------------------------------

    @cached_property
    def stationarity(self) -> Mapping[str, float]:
        """How far θ̂ is from a stationary point of J: ‖∇J(θ̂)‖, and what a Newton step would gain.

        Influence functions assume that both are zero. Cost: one pass over the training data.
        """
        self._require_same_model()
        blocks = self.curvature.blocks
        totals = [torch.zeros_like(b.eigen.values) for b in blocks]
        with GradientPass(self.curvature.plan) as passes:
            batches = self.train.batches(self._at_once)
            for start, stop, batch in progress(batches, len(self.train), "stationarity"):
                batch = self.task.to_device(batch)
                factors = passes.of(training_loss(self.task), batch, stop - start)
                for total, part in zip(totals, factors, strict=True):
                    total += part.total().reshape(total.shape)
        squared, decrement = 0.0, 0.0
        for block, total, penalty in zip(blocks, totals, self._penalty_gradients(), strict=True):
            gradient = total * self.share + penalty
            solution = block.eigen.inverse(block.damping).mv(gradient.flatten())
            squared += float(gradient.square().sum())
            decrement += 0.5 * float(gradient.flatten() @ solution)
        return {"gradient_norm": squared**0.5, "decrement": decrement}

    def _penalty_gradients(self) -> list[Tensor]:
        """∇R(θ̂) of each block, in the block's shape."""
        layout = self.task.layout
        flat = self.task.penalty.gradient(self.theta, layout)
        return [
            flat[b.block.index(layout).to(flat.device)]
            .reshape(b.eigen.values.shape)
            .to(b.eigen.values)
            for b in self.curvature.blocks
        ]

    def _penalty_shares(self, job: Contraction) -> Float[Tensor, " q"]:
        """∇m_qᵀ (H + λI)⁻¹ ∇R of the job's queries."""
        penalties = self._penalty_gradients()
        shares = [inner(q, r) for q, r in zip(job.queries, penalties, strict=True)]
        return torch.stack(shares).sum(dim=0)

    def _judged(
        self, sums: Float[Tensor, " q"], sizes: Float[Tensor, " q"], expected: Float[Tensor, " q"]
    ) -> tuple[dict[str, float], list[str]]:
        """Row sums as numbers, and as notes that are warned of where they deny a minimum."""
        excess = health.row_sum_excess(sums, sizes, expected)
        denied, noted = self._minimum_denied(excess)
        warned = health.warned([*denied, *health.zero_rows(sizes, self.losses)])
        return excess, [*warned, *noted]

    def _scores(
        self,
        values: Float[Tensor, "q n"],
        queries: Data,
        measure: Any,
        choices: Sequence[Choice],
        tolerance: float,
        started: float,
        judged: Mapping[str, Any],
        columns: tuple[str, ...] | None = None,
        notes: Sequence[str] = (),
    ) -> Scores:
        provenance = self._provenance(queries, measure, choices, tolerance, started, judged, notes)
        context = Context(self.task, self.train, queries, measure, self)
        return Scores(values, Unit.DERIVATIVE, provenance, columns=columns, context=context)

    def _provenance(
        self,
        queries: Data,
        measure: Any,
        choices: Sequence[Choice],
        tolerance: float,
        started: float,
        judged: Mapping[str, Any],
        denied: Sequence[str] = (),
    ) -> Provenance:
        layout = self.task.layout
        notes = [
            *denied,
            f"contraction: relative error {max(c.error for c in choices):.1e} measured "
            f"(worst of the compared queries {max(c.worst for c in choices):.1e}), "
            f"tolerance {tolerance:g}",
        ]
        if len(choices) > 1:
            notes.append(
                f"{len(choices)} passes over the training data: queries did not fit at once"
            )
        return Provenance(
            method=repr(self.spec),
            task=f"loss={self.task.loss!r}, penalty={self.task.penalty!r}, "
            f"params={self.task.params!r}",
            measure=repr(measure),
            n=len(self.train),
            q=len(queries),
            p=layout.size,
            dtype=str(layout.dtype).removeprefix("torch."),
            device=str(layout.device),
            health={
                "mean_loss": float(self.losses.double().mean()),
                **judged,
                "tolerance": tolerance,
                "contraction_error": max(c.error for c in choices),
                "contraction_error_worst": max(c.worst for c in choices),
                **health.spectrum(self.curvature),
                "contraction": {
                    block.name: words
                    for block, words in zip(self.curvature.blocks, choices[0].terms, strict=True)
                },
            },
            seconds={**self.seconds, "attribute": time.perf_counter() - started},
            versions=library_versions(),
            notes=tuple(
                dict.fromkeys(
                    (*self.notes, *self.snapshot.notes, *notes, *queries.notes, *queries.form_notes)
                )
            ),
        )

    # -- shared steps ---------------------------------------------------------------------------

    def _asked(
        self, queries: Any, measure: Callable[..., Tensor], tolerance: float
    ) -> tuple[Data, Callable[..., Tensor]]:
        """Checked queries and measure."""
        if not 0 <= tolerance < 1:
            raise SpecError(
                message(
                    "A tolerance is a relative error from 0 (exact) to below 1.",
                    f"tolerance={tolerance!r}.",
                    "a percentage, or a number of digits.",
                    "0.01 allows an error of one per cent of a query's scores.",
                )
            )
        self._require_same_model()
        data, measure = self.task.queries(queries), as_measure(measure)
        probe = require_answerable(self.task, data, "queries")
        checked_losses(self.task, data, "queries", probe)
        data = data.noted(probe.notes)
        checked_measurements(self.task, measure, data)
        return data, measure

    def _contractions(
        self,
        queries: Data,
        measure: Callable[..., Tensor],
        tolerance: float,
        memory_bytes: int | None = None,
        together: int | None = None,
    ) -> Iterator[Contraction]:
        allowed = self.memory_bytes if memory_bytes is None else memory_bytes
        return contractions(
            self.curvature,
            self.train,
            queries,
            measure,
            tolerance,
            self.losses,
            allowed,
            together,
        )

    @property
    def _at_once(self) -> int:
        """Examples whose gradients are taken together."""
        return examples_at_once(self.curvature.cost, self.theta.device, self.memory_bytes)


def _finite(part: Tensor, start: int, first: int = 0) -> Tensor:
    """The scores of some queries with some examples, refused where one is not finite."""
    bad = (~part.isfinite()).nonzero()
    if len(bad):
        *query, column = bad[0].tolist()
        where = f"training example {start + column}"
        if query:
            where += f" and query {first + query[0]}"
        raise NonFinite(
            message(
                "Scores must be finite.",
                f"{float(part[tuple(bad[0])])} for {where}.",
                "a gradient that overflows in this dtype, or a square root or norm of 0.",
                "use a float64 model, or look at the gradient of that example and query.",
            )
        )
    return part


def _sums(shards: ScoreShards) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Σᵢ S[q, i] and Σᵢ |S[q, i]| of scores on disk, which an interrupted pass wrote in parts."""
    sums = torch.zeros(shards.q, dtype=torch.float64)
    sizes = torch.zeros_like(sums)
    for first, _, part in shards.pieces():
        sums[first : first + part.shape[1]] += part.sum(dim=0)
        sizes[first : first + part.shape[1]] += part.abs_().sum(dim=0)
    return sums, sizes


class _RowSums:
    """Σᵢ S[q, i] and Σᵢ |S[q, i]| of queries whose scores stream by, a group of them at a time."""

    def __init__(self) -> None:
        self._sums, self._done = [], []  # type: ignore[var-annotated]

    def see(self, part: Float[Tensor, "q b"]) -> None:
        self._sums.append(torch.stack([part.sum(dim=1), part.abs().sum(dim=1)]))

    def end(self, expected: Float[Tensor, " q"]) -> None:
        """That was all of a group; what its row sums are at a minimum."""
        self._done.append(torch.cat([torch.stack(self._sums).sum(dim=0), expected[None]]))
        self._sums = []

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums, sums of magnitudes and what they are at a minimum, of all queries."""
        sums, sizes, expected = torch.cat(self._done, dim=1)
        return sums, sizes, expected


class _Extremes:
    """The k largest and k smallest entries of each row of a matrix seen in column blocks."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._kept: list[tuple[Tensor, Tensor]] = []

    def see(self, start: int, part: Float[Tensor, "q b"]) -> None:
        index = torch.arange(start, start + part.shape[1], device=part.device).expand_as(part)
        if not self._kept:
            empty = part[:, :0]
            self._kept = [(empty, index[:, :0])] * 2
        self._kept = [
            self._best(values, places, part, index, largest)
            for (values, places), largest in zip(self._kept, (True, False), strict=True)
        ]

    def _best(
        self, values: Tensor, places: Tensor, part: Tensor, index: Tensor, largest: bool
    ) -> tuple[Tensor, Tensor]:
        every, where = torch.cat([values, part], dim=1), torch.cat([places, index], dim=1)
        best = every.topk(min(self.k, every.shape[1]), dim=1, largest=largest)
        return best.values, where.gather(1, best.indices)

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Places and values of the largest, places and values of the smallest."""
        (high, high_at), (low, low_at) = self._kept
        return high_at, high, low_at, low
