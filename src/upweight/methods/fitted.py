"""Fitted: a method that has seen its training data. One class, the same verbs for every method.

What differs between methods is in their `Scorer`; streaming, reducing, memory, progress, health,
provenance, and the questions that follow from scores are here.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, final, overload

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._html import card
from upweight._typing import Batch, Params
from upweight.effects import NEWTON, PLUGIN, Effects, as_groups
from upweight.errors import ModelChanged, NotOffered, SpecError
from upweight.linalg.cholesky import Cholesky
from upweight.methods import health, removal
from upweight.methods.dense import DenseScorer
from upweight.methods.facts import stated
from upweight.methods.fitting import TrainingLosses
from upweight.methods.functionals import derivatives
from upweight.methods.perturbation import every_label, gradient_products_by_input, relabeled
from upweight.methods.reduce import Answer, Matrix, Reducer, Sweep
from upweight.methods.removal import Place, Without
from upweight.methods.scorer import DIRECT, Asked, Scorer, TokenScores, jobs_of, not_offered
from upweight.notation import count, in_short
from upweight.provenance import Context, Provenance
from upweight.runtime.memory import require_room
from upweight.runtime.progress import progress
from upweight.runtime.resources import Resources
from upweight.runtime.selection import groups_by_place, places, spaced
from upweight.runtime.versions import library_versions
from upweight.scores import Unit
from upweight.task.check import checked_losses, checked_measurements, require_answerable
from upweight.task.data import Data
from upweight.task.identity import contents, described, subject
from upweight.task.measures import Functional, Loss, as_measure
from upweight.task.sharded import BY_LAYER, require_own_weights
from upweight.task.snapshot import Snapshot
from upweight.task.task import Task, in_step

if TYPE_CHECKING:
    from upweight.evaluation.check import Check
    from upweight.evaluation.tail_patch import TailPatch
    from upweight.task.recipe import Recipe
    from upweight.training.optimizers import Optimizer

QUERIES = 32
"""Training examples that stand in for queries where `check` is given none."""

LOSS = Loss()


class Spec(Protocol):
    """A method, as what it fitted knows it; its repr is Python for an equal one."""

    @property
    def unit(self) -> Unit:
        """What its scores mean."""
        ...


@final
@dataclass(frozen=True, eq=False, repr=False)
class Fitted:
    """A method at θ̂, ready for queries. Made by `Method.fit`; immutable.

    What a method cannot answer raises `NotOffered`, with what to ask instead.

    Args:
        spec: The method.
        task, train: What it was fitted to.
        theta: θ̂ at the time.
        snapshot: Everything else of the task at the time.
        looked_at: ℓᵢ(θ̂) of the training examples, as far as they are known.
        scorer: What the method knows.
        resources: What it may use.
        history: How the model was trained, where the method was told.
        seconds: Time spent, by stage; "fit: pass 1" is a part of "fit".
        notes: What was chosen or warned of on the way.
    """

    spec: Spec
    task: Task
    train: Data
    theta: Float[Tensor, " p"]
    snapshot: Snapshot
    looked_at: TrainingLosses
    scorer: Scorer
    resources: Resources
    history: Any
    seconds: Mapping[str, float]
    notes: tuple[str, ...]

    # -- at a prompt ------------------------------------------------------------------------------

    def _told(self) -> tuple[str, dict[str, str]]:
        """What it is in a line, and what else is known of it."""
        n, p = count(len(self.train), "training example"), count(self.task.layout.size, "parameter")
        took = f"{self.seconds['fit']:.2g} s" if "fit" in self.seconds else "not told"
        derives = self.spec.unit is Unit.DERIVATIVE
        verbs = {
            ".attribute(queries)": True,
            ".removal(queries)": derives,
            ".self_influence()": self.scorer.has_self_influence,
            ".check(recipe)": derives,
        }
        about = {
            "method": in_short(self.spec),
            "task": f"{in_short(self.task.loss)}, {in_short(self.task.penalty)}; {self.looked_at}",
            "fit": took + (f"; {count(len(self.notes), 'note')} in .notes" if self.notes else ""),
            "next": ", ".join(verb for verb, is_offered in verbs.items() if is_offered),
        }
        return f"Fitted: {n}, {p}, {self.task.layout.dtype}".replace("torch.", ""), about

    def __repr__(self) -> str:
        first, about = self._told()
        return "\n  ".join([first, *(f"{name}: {told}" for name, told in about.items())])

    def _repr_html_(self) -> str:
        return card(*self._told())

    @property
    def losses(self) -> Float[Tensor, " n"]:
        """ℓᵢ(θ̂) of every training example.

        Cost: nothing, or a forward pass over the examples that no pass has looked at yet.
        """
        return self.looked_at.all()

    # -- scores -----------------------------------------------------------------------------------

    @in_step
    def attribute(
        self,
        queries: Any,
        measure: Callable[..., Tensor] | Functional = LOSS,
        *,
        into: Reducer | None = None,
    ) -> Any:
        """S[q, i] = ∂m_q/∂wᵢ for every query and training example, or what is kept of it.

        Args:
            queries: As for `as_data`. None is for a `Functional` that needs none.
            measure: What to ask of each query: `Loss()`, `Margin()`, `LogProb()`, `Logit()`, or any
                function `(outputs, targets) -> [q]`; or of all of them and θ: a `Functional`.
            into: What to keep of the scores as they stream by: `Matrix()`, `Top(k)`,
                `GroupSums(labels)`, `Shards(folder)`, `PerLayer()` or `PerToken(examples)`.

        Returns:
            `Scores` for `Matrix()`, the default; see `upweight.methods.reduce` for the others.

        Raises:
            UpweightError: The queries do not pass the checks of `upweight.task.check`, or what is
                to be kept does not fit into memory.
            NotConverged: An iterative solver missed its tolerance.

        Cost: q measure gradients, what the preconditioner takes to solve them, then one pass over
        the training data for as many queries as fit into memory together.
        """
        started = time.perf_counter()
        into = Matrix() if into is None else into
        if not isinstance(into, Reducer):
            raise SpecError(
                "What to keep of the scores is said by a reducer.",
                f"into={into!r}.",
                "a class that was not called, or a folder or number in its place.",
                "Matrix(), Top(10), GroupSums(labels), Shards(folder), PerLayer() or "
                "PerToken(examples).",
            )
        self._require_same_model()
        n, scorer = len(self.train), self.scorer
        if not isinstance(measure, Functional):
            queries = self.task.queries(queries)
            into.require_room(self._sweep(Asked(queries, measure, self.resources.memory_bytes)))
        asked = replace(self._asked(queries, measure), exact=into.is_exact)
        sink = into.begin(self._sweep(asked))
        records: list[Any] = []
        sums = health.RowSums()
        rows = removal.SomeRows(self._judged_by_removal(asked), n)
        if not sink.is_done:
            if sink.settings is not None:
                asked = replace(
                    asked,
                    memory_bytes=sink.settings["memory_bytes"],
                    together=sink.settings["queries_together"],
                )
            for job in jobs_of(scorer, asked):
                size = max(1, job.at_once)
                with job:
                    blocks = (
                        (start, min(start + size, end), None)
                        for begin, end in sink.missing(job, n)
                        for start in range(begin, end, size)
                    )
                    with self.looked_at.explaining():
                        for start, stop, _ in progress(blocks, n, "scores"):
                            part = sink.take(job, start, stop)
                            sums.see(part)
                            rows.see(job, start, part)
                sink.end(job)
                sums.end(job.row_sums)
                records.append(job.record)
        seconds = {**self.seconds, "attribute": time.perf_counter() - started}

        @functools.cache  # a result of several parts is judged and warned of once; of shards, read
        def judgement() -> tuple[dict[str, Any], list[str]]:
            judged, said = self._judged(records, sink.row_sums() or sums.seen, sums.expected)
            if rows.at:
                whole = sink.rows(rows.at) if rows.whole is None else rows.whole
                if whole is not None:
                    judged["beyond_first_order"] = removal.beyond_first_order(
                        self._place, asked, rows.at, whole
                    )
            return judged, said

        def provenance(notes: Sequence[str] = ()) -> Provenance:
            judged, said = judgement()
            return self._provenance(asked, judged, (*said, *notes), seconds)

        return sink.result(Answer(self.spec.unit, provenance, self._context(asked)))

    @in_step
    def query_tokens(
        self, queries: Any, measure: Callable[..., Tensor], examples: Sequence[int]
    ) -> TokenScores:
        """S[q, i] of some training examples by the positions of the *query*, and what has none.

            share[q, i, t] = −(1/n) Σₗ d_tᵀ [(Hₗ + λₗ)⁻¹ ∇ℓᵢ] a_t,   ∇m_q = Σ_t d_t a_tᵀ

        The counterpart of `PerToken(examples)`, which goes by the positions of the example; P is
        symmetric, so both add up to the same score. Exact.

        Args:
            queries: As for `attribute`, of one length or padded together.
            measure: As for `attribute`, of single queries.
            examples: Which training examples.

        Raises:
            NotOffered: The method has no one preconditioner at θ̂.
            ShapeError: An example is out of range, or nothing is used at several positions.

        Cost: a gradient and a solve for each of the examples, a gradient for each query.
        """
        self._require_same_model()
        chosen = places(examples, len(self.train), "Training examples", least=1, repeats=True)
        data, m = self.task.queries(queries), as_measure(measure)

        def of_query(params: Params, batch: Batch) -> Tensor:
            return m(self.task, params, batch)

        asked = replace(self._asked(self.train.subset(chosen), LOSS), exact=True)
        parts = []
        for job in self.scorer.jobs(asked):
            with job:
                parts.append(job.tokens_of(data, of_query))
        shares, rest = (torch.cat(column) for column in zip(*parts, strict=True))
        return TokenScores(shares.transpose(0, 1), rest.T)

    @in_step
    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] = ∂ℓᵢ/∂wᵢ of every training example: how much its own weight lowers its loss.

            S[i, i] = −(1/n) gᵢᵀ P gᵢ  ≤ 0

        Its magnitude is the memorization score of Feldman & Zhang (2020) to first order.

        Raises:
            NonFinite: A score is NaN or infinite.

        Cost: by layer or where the model is linear in θ, one pass; otherwise n solves.
        """
        self._require_same_model()
        with self.looked_at.explaining():
            return self.scorer.self_influence()

    # -- what moves the parameters ----------------------------------------------------------------

    def parameter_influence(self, example: int) -> Mapping[str, Tensor]:
        """dθ̂/dε = −P ∇ℓᵢ, by parameter name.

        Koh & Liang (2017), Eq. 1: ε is added to the *mean* objective, (1/n) Σ ℓ + ε ℓᵢ. In terms of
        the data weight, ∂θ̂/∂wᵢ is this divided by n; removal moves θ̂ by about −(1/n) times this.

        Raises:
            ShapeError: There is no such example.
        """
        self._require_movement("parameter_influence(...)")
        row = self.scorer.total(self._group(example))
        return self.task.layout.unflatten(-self.scorer.solve(row[None])[0])

    # -- removals ---------------------------------------------------------------------------------

    def removal(
        self,
        queries: Any,
        measure: Callable[..., Tensor] | Functional = LOSS,
        groups: Sequence[int | str | Sequence[int | str]] | None = None,
        *,
        evaluate: Literal["linear", "plugin"] = "linear",
    ) -> Effects:
        """Δm of removing examples.

        With a curvature of all of θ, by one Newton step of the objective without them:

            Δm_q ≈ ∇m_qᵀ Δθ,    Δθ = (H + λI − (1/n) Σ_U Hᵢ)⁻¹ (1/n) Σ_U gᵢ

        the leverage correction 1/(1 − h) of a scalar-output linear model, its block Woodbury form
        for several outputs, and for groups. With a curvature by layer to first order, Δm_q =
        −Σ_U S[q, i], which the provenance says.

        Args:
            queries: As for `as_data`.
            measure: As for `attribute`.
            groups: What each column removes: an example or several together, by place or, where
                ids are texts, by id. None: every example by itself.
            evaluate: "linear" gives ∇m_qᵀ Δθ; "plugin" the difference itself, m_q(θ̂ + Δθ) − m_q(θ̂),
                beside it.

        Returns:
            Δm, one column per group.

        Raises:
            ShapeError: An index is out of range or repeated within its group.
            NonFinite: Without these examples the minimum is not determined (leverage 1).
            NotOffered: The method has no movement of θ to evaluate.

        Exact when: J is quadratic in θ, and m linear in it or evaluated. Otherwise one gradient at
        θ̂ + Δθ tells whether the step ended at the minimum without the examples, and the
        measurements there tell whether they are linear over the step; where not, the provenance has
        a note that is also an `AssumptionWarning` (`upweight.methods.remainder`).
        Cost: where the model is linear in θ, c solves per removed example (one inverse for all of
        them); otherwise one factorization per group; by layer that of `attribute`. "plugin"
        measures every query once per group.
        """
        started = time.perf_counter()
        self._require_movement("removal(...)")
        if evaluate not in ("linear", "plugin"):
            raise SpecError(
                'A removal is evaluated as "linear" or as "plugin".',
                f"evaluate={evaluate!r}.",
                "another word for one of them.",
                '"linear" gives ∇m · Δθ; "plugin" gives m(θ̂ + Δθ) − m(θ̂).',
            )
        ids = getattr(getattr(self.train, "given", None), "ids", None)
        chosen = as_groups(groups_by_place(groups, ids), len(self.train))
        every = [[*group] for group in chosen]
        scorer = self.scorer
        if not isinstance(scorer, DenseScorer):
            found: Effects = self.attribute(queries, measure, into=Without(chosen))
            if evaluate == "linear":
                return found
            steps = map(scorer.step, every)
            values = removal.plugin(self._place, self._asked(queries, measure), every, steps)
            made = replace(found.provenance, notes=(*found.provenance.notes, removal.MEASURED))
            return replace(found, values=values, how=PLUGIN, provenance=made, linear=found.values)
        count = 1
        if not isinstance(measure, Functional):
            queries = self.task.queries(queries)
            count = len(queries)
        require_room(
            count, len(every), self.theta.dtype, self.theta.device,
            "ask some queries at a time, as_data(queries).subset(range(100)), or some groups.",
        )  # fmt: skip
        asked = self._asked(queries, measure)
        is_measured = evaluate == "plugin"
        said = [removal.MEASURED] if is_measured else []
        linear, measured, records, doubts = removal.by_newton_step(
            self._place, asked, every, is_measured
        )
        values, how = (linear, NEWTON) if measured is None else (measured, PLUGIN)
        seconds = {**self.seconds, "attribute": time.perf_counter() - started}
        judged, told = self._judged(records, None, None)
        denied, noted = self._minimum_denied(judged)
        zero = health.zero_rows(values.abs().sum(dim=1), self.losses)
        unsolved, solved = health.solved(judged)
        warned = health.warned([*denied, *unsolved, *zero, *doubts])
        notes = [*warned, *noted, *solved, *told, *said, *health.zero_columns(values)]
        provenance = self._provenance(asked, judged, notes, seconds)
        context = self._context(asked)
        beside = None if measured is None else linear
        return Effects(values, chosen, how, provenance, beside, context)

    def removal_step(self, examples: Sequence[int]) -> Mapping[str, Tensor]:
        """Δθ of removing the examples together, by parameter name; as for `removal`.

        Warns where a Newton step does not end at the minimum without them.
        """
        self._require_movement("removal_step(...)")
        step, doubts = removal.checked_step(self.scorer, self._group(list(examples)))
        health.warned(doubts)
        return self.task.layout.unflatten(step)

    def loo_outputs(self, curvature: Literal["all", "others"] = "all") -> Float[Tensor, "n *c"]:
        """f(xᵢ) of every training example under its own removal, to first order in Δθ.

            f₋ᵢ(xᵢ) ≈ f(xᵢ) + K u,   u = (I − Λ K)⁻¹ δ,   K = (1/n) Jᵢ (H + λI)⁻¹ Jᵢᵀ

        with δ = ∂ℓ/∂f and Λ = ∂²ℓ/∂f²: approximate leave-one-out (Pregibon 1981; Rad & Maleki
        2020). Nothing of size n × n is built.

        Args:
            curvature: Of which examples H is. "others": of all but i, and u = δ. With H₋ᵢ for H
                both are the same number. An approximation by layer that is taken for "all" can
                give an example more than all of its leverage, and then u has the wrong sign; taken
                for "others" it cannot.

        Raises:
            NonFinite: Without one of them the minimum is not determined (leverage 1).
            SpecError: `curvature` is neither.

        Exact when: J is quadratic in θ and f linear in it.
        Cost: c solves (by layer, c backward passes) per example.
        """
        self._require_movement("loo_outputs()")
        return self._left_out(curvature)[0].clone()

    def leverage(self, curvature: Literal["all", "others"] = "all") -> Float[Tensor, " n"]:
        """hᵢ of every training example: the share of its own outputs that it determines.

            hᵢ = λ_max(Λᵢ Kᵢ),    Kᵢ = (1/n) Jᵢ (H + λI)⁻¹ Jᵢᵀ,   Λᵢ = ∂²ℓᵢ/∂f²

        The diagonal of the hat matrix where f has one output (Pregibon 1981). Its removal is
        corrected by 1/(1 − hᵢ): the nearer to 1, the less a Newton step says of it.

        Args:
            curvature: As for `loo_outputs`. "others": λ/(1 + λ) of λ = λ_max(Λᵢ Kᵢ), which with H₋ᵢ
                for H is the same number, and is below 1 whatever H is.

        Raises:
            NonFinite: One of them is 1: see `loo_outputs`.
            SpecError: `curvature` is neither.

        Cost: none beyond `loo_outputs`, which computes it as well.
        """
        self._require_movement("leverage()")
        return self._left_out(curvature)[1].clone()

    # -- changed inputs and labels ----------------------------------------------------------------

    def input_influence(
        self,
        example: int,
        queries: Any,
        measure: Callable[..., Tensor] = LOSS,
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
        asked = self._through_theta(queries, measure, "input_influence(...)")
        exact = replace(asked, exact=True)
        vectors = torch.cat([job.vectors() for job in self.scorer.jobs(exact)])
        batch = self._example(example)
        return -gradient_products_by_input(self.task, self.theta, vectors, batch, input) / len(
            self.train
        )

    def relabel_influence(
        self,
        example: int,
        label: Any,
        queries: Any,
        measure: Callable[..., Tensor] = LOSS,
    ) -> Float[Tensor, " q"]:
        """Δm_q of giving a training example another label, to first order.

            Δm_q ≈ −(1/n) ∇m_qᵀ P [∇ℓ(xᵢ, label) − ∇ℓ(xᵢ, yᵢ)]

        Koh & Liang (2017), §2.2.

        Raises:
            UpweightError: The label does not fit the loss: out of range, or of another shape; or
                is none that an adapter's estimator knows.
        """
        asked = self._through_theta(queries, measure, "relabel_influence(...)")
        old = self._example(example)
        reads = self.task.reads
        new = relabeled(old, label) if reads is None else reads.relabeled(old, label)
        with torch.no_grad():
            self.task.loss.check(*self.task.outputs(self.theta, new))
        parts = []
        for job in self.scorer.jobs(replace(asked, exact=True)):
            with job:
                parts.append(job.scores_of(new, 1)[:, 0] - job.scores_of(old, 1)[:, 0])
        return torch.cat(parts)

    def label_influence(
        self,
        examples: Any,
        labels: Sequence[int],
        queries: Any,
        measure: Callable[..., Tensor] | Functional = LOSS,
    ) -> Float[Tensor, "q k c"]:
        """S[q, (x, c)] of examples that are not in the training data, under each of some labels.

            S[q, (x, c)] = −(1/n) ∇m_qᵀ P ∇ℓ(x, c)

        The derivative of m_q in the weight of a further example in (1/n) Σᵢ ℓᵢ, at weight 0.

        Args:
            examples: As for `as_data`; their own targets are not used.
            labels: One number each, as the loss takes them.
            queries: As for `as_data`.
            measure: As for `attribute`.

        Raises:
            UpweightError: A label does not fit the loss, or examples have more than one each.
            NotOffered: The method's scores are of training examples only.

        Cost: one solve per query, whatever the number of examples and labels; then k c gradients.
        """
        asked = self._through_theta(queries, measure, "label_influence(...)")
        data = self.task.queries(examples)
        parts: list[Tensor] = []
        for job in self.scorer.jobs(replace(asked, exact=True)):
            blocks: list[Tensor] = []
            with job:
                for start, stop, batch in data.batches(max(1, job.at_once // len(labels))):
                    new = every_label(self.task.to_device(batch), stop - start, labels)
                    if not parts and not blocks:
                        with torch.no_grad():
                            self.task.loss.check(*self.task.outputs(self.theta, new))
                    found = job.scores_of(new, (stop - start) * len(labels))
                    blocks.append(found.reshape(len(found), stop - start, len(labels)))
            parts.append(torch.cat(blocks, dim=1))
        return torch.cat(parts)

    # -- whether to believe it --------------------------------------------------------------------

    @cached_property
    @in_step
    def stationarity(self) -> Mapping[str, float]:
        """How far θ̂ is from a stationary point of J: ‖∇J(θ̂)‖, and what a Newton step would gain.

        Influence functions assume that both are zero; see `upweight.methods.health`. Cost: one
        pass over the training data.
        """
        self._require_movement("stationarity")
        return self.scorer.stationarity()

    @overload
    def check(
        self,
        recipe: "Recipe",
        budget: str | float | None = None,
        *,
        queries: Any = None,
        measure: Callable[..., Tensor] = LOSS,
        **limits: Any,
    ) -> "Check": ...

    @overload
    def check(
        self,
        recipe: "Optimizer",
        *,
        queries: Any = None,
        measure: Callable[..., Tensor] = LOSS,
        **limits: Any,
    ) -> "TailPatch": ...

    def check(
        self,
        recipe: "Recipe | Optimizer",
        budget: str | float | None = None,
        *,
        queries: Any = None,
        measure: Callable[..., Tensor] = LOSS,
        **limits: Any,
    ) -> "Check | TailPatch":
        """Hold the scores of some queries against retraining: short for `upweight.check`.

        Args:
            recipe: How the model was trained; or an optimizer, for one step of it on each example
                that is ranked first, where retraining is out of the question.
            budget: As for `upweight.check`.
            queries: What to ask about, best held-out data. None asks about some training examples;
                whether each is in a subset itself then makes much of what is compared.
            measure: What to ask.
            limits: Further arguments of `upweight.check`: subsets, resources, …

        Raises:
            UpweightError: From `attribute` or `upweight.check`.

        Cost: the check, and one `attribute`.
        """
        from upweight.evaluation.check import check  # a short form of what stands above

        if queries is None:
            queries = self.train.subset(spaced(len(self.train), QUERIES))
        used = {"resources": self.resources.within("retrained")} | limits
        given: Any = recipe  # which of its two answers `check` gives is said above
        return check(self.attribute(queries, measure), given, budget, **used)

    # -- shared steps -----------------------------------------------------------------------------

    def _asked(self, queries: Any, measure: Any) -> Asked:
        """Checked queries and measure, with what memory allows."""
        self._require_same_model()
        memory = self.resources.memory_bytes
        if isinstance(measure, Functional):
            require_own_weights(self.task.sharded, repr(measure), "ask a measure of outputs")
            data = None if queries is None else self.task.queries(queries)
            batch = None if data is None else self.task.to_device(data.batch(0, len(data)))
            found = derivatives(measure, self.task, self.theta, batch, len(self.train))
            asked = Asked(data, measure, memory, functional=found)
            if asked.direct is not None and self.spec.unit is not Unit.DERIVATIVE:
                raise not_offered(
                    "A Functional that depends on the weights by itself",
                    "a method that says where θ̂ moves to, to add ∂φ/∂w to",
                )
            return asked
        data, measure = self.task.queries(queries), as_measure(measure)
        probe = require_answerable(self.task, data, "queries")
        checked_losses(self.task, data, "queries", probe)
        data = data.noted(probe.notes)
        if type(measure) is not Loss:  # losses have just been checked
            checked_measurements(self.task, measure, data)
        return Asked(data, measure, memory)

    def _through_theta(self, queries: Any, measure: Any, what: str) -> Asked:
        """A question of which all goes through θ̂.

        Raises:
            NotOffered: A `Functional` has ∂φ/∂w too: how it changes with an example's input or
                label is in the function alone.
        """
        require_own_weights(self.task.sharded, what, BY_LAYER)
        asked = self._asked(queries, measure)
        if asked.direct is not None:
            raise NotOffered(
                f"{what} knows a measure by its derivative in θ.",
                f"{measure!r}, which also depends on the training data by itself.",
                "a standard error, which reads inputs and labels besides θ.",
                "ask a measure of θ and the queries alone, such as Coefficient(0); or change "
                "the example, fit again and compare.",
            )
        return asked

    def _sweep(self, asked: Asked) -> Sweep:
        layout = self.task.layout
        return Sweep(
            q=len(asked),
            n=len(self.train),
            dtype=torch.promote_types(layout.dtype, self._dtype),
            device=layout.device,
            unit=self.spec.unit,
            layers=lambda: (*self.scorer.layers, *(() if asked.direct is None else (DIRECT,))),
            description=lambda: self._description(asked),
            settings=self.scorer.settings(asked),
            meanwhile=self.task.meanwhile,
        )

    def _left_out(self, curvature: str) -> tuple[Float[Tensor, "n *c"], Float[Tensor, " n"]]:
        if curvature not in ("all", "others"):
            raise SpecError(
                "The curvature is that of all examples, or of all but the one left out.",
                f"curvature={curvature!r}.",
                "a curvature such as EKFAC(), which the method was fitted with.",
                "loo_outputs(), or loo_outputs('others') for a curvature by layer.",
            )
        return self._with_own if curvature == "all" else self._without_own

    @cached_property
    def _with_own(self) -> tuple[Float[Tensor, "n *c"], Float[Tensor, " n"]]:
        return removal.without_each(self._place)

    @cached_property
    def _without_own(self) -> tuple[Float[Tensor, "n *c"], Float[Tensor, " n"]]:
        return removal.without_each(self._place, with_own=False)

    @property
    def _place(self) -> Place:
        require_own_weights(self.task.sharded, "Leaving examples out", BY_LAYER)
        return Place(self.task, self.train, self.theta, self.scorer)

    def _context(self, asked: Asked) -> Context:
        return Context(self.task, self.train, asked.queries, asked.measure, self)

    def _require_same_model(self) -> None:
        """Refuse a question about a model that is no longer the one of the fit."""
        now = self.task.held_theta()
        if self.task.stands_in(now):  # the snapshot has what this process has of it
            self.snapshot.require_same(self.task, self.train)
            return
        if now.dtype != self.theta.dtype or not torch.equal(now, self.theta):
            raise ModelChanged(health.moved(now, self.theta))
        self.snapshot.require_same(self.task, self.train)

    def _require_movement(self, what: str) -> None:
        """Refuse a question about where θ moves to, where scores are no derivatives."""
        require_own_weights(self.task.sharded, what, BY_LAYER)
        self._require_same_model()
        if self.spec.unit is not Unit.DERIVATIVE:
            raise not_offered(what, "a method that says where θ̂ moves to")

    def _example(self, index: int) -> Batch:
        return self.task.to_device(self.train.take(self._group(index)))

    def _group(self, group: int | Sequence[int]) -> list[int]:
        return places(group, len(self.train), "Training examples", least=1)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the scores: no less than the products are taken in."""
        return self.scorer.dtype or self.task.layout.dtype

    def _description(self, asked: Asked) -> dict[str, str]:
        """What the scores depend on, for files that keep them."""
        return {
            "method": described(self.spec),
            "measure": described(asked.measure),
            "queries": "none" if asked.queries is None else contents(asked.queries),
            **({} if self.history is None else {"history": described(self.history)}),
            **subject(self.task, self.train),
        }

    @cached_property
    def _is_convex(self) -> bool:
        return health.is_convex(self.task, self.theta, self.train)

    @cached_property
    def _baseline(self) -> tuple[float, float] | None:
        return health.constant_baseline(self.task, self.theta, self.train, self.losses)

    def _judged(
        self,
        records: Sequence[Any],
        seen: tuple[Tensor, Tensor] | None,
        expected: Float[Tensor, " q"] | None,
    ) -> tuple[dict[str, Any], list[str]]:
        """Numbers to judge scores by, and notes; those that deny an assumption are warned of."""
        told, notes = self.scorer.summary(records)
        judged: dict[str, Any] = {
            "mean_loss": float(self.losses.double().mean()),
            "convex": self._is_convex,
            **self.scorer.health(),
            **told,
        }
        if seen is None:
            return judged, list(notes)
        sums, sizes = seen
        denied: list[str] = []
        noted: list[str] = []
        if expected is not None:
            judged["row_sum_expected"] = float(expected.double().mean())
        if expected is not None and self.spec.unit is Unit.DERIVATIVE:
            judged |= health.row_sum_excess(sums, sizes, expected.to(sums))
            denied, noted = self._minimum_denied(judged)
        unsolved, solved = health.solved(judged)
        zero = health.zero_rows(sizes, self.losses, self.scorer.by_refits)
        return judged, [*health.warned([*denied, *unsolved, *zero]), *noted, *solved, *notes]

    def _judged_by_removal(self, asked: Asked) -> list[int]:
        """Queries whose strongest examples are removed, to hold first order against that."""
        scorer = self.scorer
        if not (
            isinstance(scorer, DenseScorer)
            and scorer.linear is not None
            and scorer.damping == 0.0  # which changes sizes by itself
            and self.spec.unit is Unit.DERIVATIVE
            and self._is_convex
        ):
            return []
        few = removal.QUERIES_LOOKED_AT if isinstance(scorer.solver, Cholesky) else 1
        return spaced(len(asked), few)

    def _minimum_denied(self, judged: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """What is warned of, and what only noted, of how far θ̂ is from a minimum."""
        if self._is_convex:
            return health.denied(judged), []
        return health.of_network(judged, lambda: self._baseline)

    def _provenance(
        self,
        asked: Asked,
        judged: Mapping[str, Any],
        notes: Sequence[str],
        seconds: Mapping[str, float],
    ) -> Provenance:
        layout, queries = self.task.layout, asked.queries
        of_queries = () if queries is None else (*queries.notes, *queries.form_notes)
        return Provenance(
            method=repr(self.spec),
            task=f"loss={self.task.loss!r}, penalty={self.task.penalty!r}, "
            f"params={self.task.params!r}",
            measure=repr(asked.measure),
            n=len(self.train),
            q=len(asked),
            p=layout.size,
            dtype=str(layout.dtype).removeprefix("torch."),
            device=str(layout.device),
            health=judged,
            facts=stated(judged),
            seconds=seconds,
            versions=library_versions(),
            threads=torch.get_num_threads(),
            notes=tuple(dict.fromkeys((*self.notes, *self.snapshot.notes, *notes, *of_queries))),
        )
