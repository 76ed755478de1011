"""SOURCE: training unrolled a segment at a time, each with one curvature and one gradient.

    θ̇ = −P ∇J(θ, w)      in segment k, of H̄_k, ḡ_k and the sum τ_k of its step sizes:
    D_k = exp(−τ_k P H̄_k)                          what is left of a change of θ after it
    R_k = ∫₀^τ exp(−s P H̄_k) P ds                  what ḡ does in it: (1 − e^{−τσ})/σ
    S[q, i] = −(1/n) Σ_k ∇m_q(θ_T)ᵀ D_K ⋯ D_{k+1} R_k ḡ_{k,i}

Bae, Lin, Lorraine & Grosse (2024), "Training data attribution via approximate unrolled
differentiation", §3: segments, and the response of each as a function of eigenvalues.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight.curvature.curvature import Curvature
from upweight.curvature.ekfac import EKFAC
from upweight.curvature.layerwise import LayerwiseCurvature, diagonal_in_basis
from upweight.errors import NonFinite, SpecError
from upweight.linalg.eigen import Eigen, eigenbasis
from upweight.methods import layered
from upweight.methods.fitting import Fitting
from upweight.methods.functionals import Derivatives
from upweight.methods.influence import require_curvature
from upweight.methods.layered import LayeredScorer
from upweight.methods.method import Method
from upweight.methods.points import SumOfJobs
from upweight.methods.scorer import Asked, Scorer
from upweight.methods.tracin import (
    left_out_note,
    never_seen,
    require_count,
    scale_at,
    usable_states,
)
from upweight.runtime.memory import require_bytes
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Loss
from upweight.task.point import Point
from upweight.training.history import (
    History,
    as_history,
    decay_notes,
    factors,
    is_penalty,
    rates,
    trained_on,
    unused_notes,
)
from upweight.training.optimizers import SGD, AdamW

SMALL = 1e-6
"""τσ below which (1 − e^{−τσ})/σ is τ (1 − τσ/2), to 2e-13."""


@dataclass(frozen=True)
class SOURCE(Method):
    """S[q, i] = −(1/n) Σ_k ∇m_q(θ_T)ᵀ D_K ⋯ D_{k+1} R_k ḡ_{k,i}: approximate unrolling.

    Training is cut into segments of equally many steps. In each the curvature H̄, the gradient ḡᵢ
    and the optimizer's scale are means over a few kept states, and along an eigenvector of H̄ with
    eigenvalue σ

        D = e^{−τσ}      R = (1 − e^{−τσ})/σ      τ = Σ η_t of the segment

    With momentum τ has Σ_{s ≥ t} η_s μ^{s−t} in the place of η_t, which is η/(1 − μ) but at the
    end. Adam and AdamW have P = M⁻¹, M = diag(√v̂ + ε): D = e^{−τPH̄} exactly for a curvature of all
    of θ, by P^{1/2} H̄ P^{1/2}; by layer σ = Λ_j/M_j with M_j the diagonal of M in the eigenbasis,
    the Rayleigh quotient of H̄ v = σ M v at an eigenvector of H̄. What is said of Adam is our own
    derivation, not the paper's. Entries of which Adam has seen no gradient as large as those of the
    data, by the mean M of the segment, count as not moved in it, as in `TracIn`; a note says which.
    The optimizer's weight decay is added to Λ (to P Λ for AdamW), unless the task of a recorded
    loop has it as its penalty; where groups of parameters have their own, by its diagonal in the
    eigenbasis. Steps that were clipped, or whose loss is a mean
    over tokens, count by the mean factor of their losses, as they were recorded.
    No damping is needed or added: with one segment R is (H̄ + λ)⁻¹ of influence, as
    `FromTraining()` nearly has it.

    Args:
        segments: K.
        curvature: H̄: by layer, or of all of θ where p × p numbers fit into memory (`GGN()`,
            `Hessian()`, …).
        states: States in each segment at most, in the middles of as many equal parts of it.
        discrete: Take gradient descent by its steps, D = Π_t (1 − η_t σ), in place of the flow: for
            `SGD` without momentum.
        segment: Only what examples did in this one, counted from 0: a term of the sum over k; None:
            the sum. Its terms are predictors for `Stacked`.

    Exact when: J is quadratic, with `discrete`, its own curvature, SGD without momentum and all
    examples in each batch: with a segment for each step, or with any number of them where gradients
    stand still, as at the minimum.
    Cost: a fit of the curvature and a pass over the training data for each state, and q·p numbers
    for each segment. Not kept in `Resources(folder=)`.

    A history of a subset's training, weights 0 or n/(its size), has S at these weights: H̄ is the
    subset's, and examples outside of it count as if they were in the batches.

    Raises:
        SpecError: There is no history; a segment has no kept state or is none of them; or
            `discrete` with another optimizer.
        NonFinite: A negative eigenvalue or a step that is too large for the largest one, which
            grows over a segment beyond all numbers.
    """

    segments: int = 3
    curvature: Curvature = field(default_factory=EKFAC)
    states: int = 2
    discrete: bool = False
    segment: int | None = None

    takes_history = True
    takes_run = True
    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        require_count("segments", self.segments)
        require_count("states", self.states)
        if self.segment is not None and self.segment not in range(self.segments):
            raise SpecError(
                f"Segments are counted from 0 to {self.segments - 1}.",
                f"segment={self.segment!r}.",
                "segments counted from 1.",
                "leave it out for the sum over all of them.",
            )
        require_curvature(self, self.curvature)

    def prepare(self, fitting: Fitting) -> Scorer:
        history = as_history(fitting.history, fitting.task, fitting.data, fitting.theta)
        optimizer = history.optimizer
        if self.discrete and not (isinstance(optimizer, SGD) and optimizer.momentum == 0):
            given = f" with momentum={optimizer.momentum:g}" if isinstance(optimizer, SGD) else ""
            raise SpecError(
                "discrete=True is for gradient descent without a memory.",
                f"training by {type(optimizer).__name__}{given}.",
                "momentum or Adam, whose steps are no product of 1 − ησ.",
                "leave discrete out: the flow takes momentum as η/(1 − μ), and Adam's scale.",
            )
        fitting.checked_losses()
        parts = []
        reached, moved = fitting.once("rates", fitting.history, partial(_rates, history))
        notes = [
            *decay_notes(history, fitting.task),
            *unused_notes(history, len(fitting.data)),
        ]
        left_out = torch.zeros_like(fitting.theta, dtype=torch.bool)
        first = self.segment or 0  # those before it change nothing in it
        for steps, states in segments_of(history, self.segments, self.states)[first:]:
            # Clipping shrinks gradients and not the decay: η (s H + λ) = ηs (H + λ/s).
            shrunk = float(moved[steps].sum() / reached[steps].sum())
            # A segment is one for all methods that ask for what was done in or before it.
            made, told = fitting.once(
                (replace(self, segment=None), steps),
                fitting.history,
                partial(self._segment, fitting, history, states, moved[steps], shrunk),
            )
            parts.append(made)
            notes += told
            if made.unseen is not None:
                left_out |= made.unseen
        final = layered.identity(fitting, Point(fitting.theta))
        notes = [*final.notes, *dict.fromkeys(notes), *left_out_note(fitting, left_out)]
        return SourceScorer(tuple(parts), final, self.segment is not None, tuple(notes))

    def _segment(
        self, fitting: Fitting, history: History, states: Sequence[int], reached: Tensor,
        shrunk: float,
    ) -> "tuple[Segment, tuple[str, ...]]":  # fmt: skip
        thetas = [history.state(t).theta.to(fitting.theta) for t in states]
        scales = [scale_at(history, t, fitting.theta) for t in states]
        # Of √v̂ + ε, not of its inverse: an entry that was never reached has 1/ε.
        known = [1 / scale for scale in scales if scale is not None]
        divisor = torch.stack(known).mean(dim=0) if known else None
        unseen = None
        if divisor is not None:
            found = [never_seen(fitting, history, theta, 1 / divisor) for theta in thetas]
            unseen = torch.stack(found).any(dim=0)
        decay = torch.as_tensor(history.optimizer.weight_decay).to(fitting.theta)
        counted = decay if is_penalty(history, fitting.task) else torch.zeros_like(decay)
        decay = decay / shrunk - counted  # that of the penalty is in H̄
        none = torch.zeros_like(decay)
        is_apart = isinstance(history.optimizer, AdamW)
        coupled, apart = (none, decay) if is_apart else (decay, none)
        layout, data = fitting.task.layout, _trained_on(fitting, history)
        flows: list[Flow] = []
        if isinstance(self.curvature, LayerwiseCurvature):
            fitted = self.curvature.fit_blocks(
                fitting.task, data, thetas[-1], others=thetas[:-1], plan=fitting.plan,
                memory_bytes=fitting.resources.memory_bytes,
            )  # fmt: skip
            notes = fitted.notes
            for block in fitted.blocks:
                index, eigen = block.block.index(layout).to(layout.device), block.eigen
                times: Any = 1.0
                if divisor is not None and unseen is not None:
                    times = _inverse_in_basis(eigen, divisor, ~unseen, index)
                added = _in_basis(eigen, coupled, index)
                values = times * (eigen.values + added) + _in_basis(eigen, apart, index)
                flows.append(self._flow(index, Eigen(eigen.bases, values), times, reached))
        else:
            matrix, notes = self._dense(fitting, data, thetas)
            matrix.diagonal().add_(coupled.double())
            index = torch.arange(layout.size, device=layout.device)
            root = None
            if divisor is not None and unseen is not None:
                index = index[~unseen]
                root = divisor[index].double().rsqrt()
                matrix = matrix[index][:, index] * (root[:, None] * root)
            matrix.diagonal().add_(apart.double().expand(layout.size)[index])
            values, basis = eigenbasis(matrix)
            flow = self._flow(index, Eigen((basis,), values), 1.0, reached)
            flows.append(replace(flow, root=root))
        weight = 1 / len(states)
        scorers = [layered.identity(fitting, Point(theta, weight)) for theta in thetas]
        return Segment(tuple(flows), tuple(scorers), unseen), tuple(notes)

    def _flow(self, index: Tensor, eigen: Eigen, times: Any, reached: Tensor) -> "Flow":
        decay, response = functions(eigen.values, reached, self.discrete)
        if not bool(decay.isfinite().all() and response.isfinite().all()):
            raise NonFinite(
                "What a segment of training does must be finite.",
                f"e^(−τσ) for eigenvalues from {float(eigen.values.min()):.3g} to "
                f"{float(eigen.values.max()):.3g} and steps of {float(reached.sum()):.3g} in all.",
                "a negative eigenvalue of a Hessian away from a minimum, or steps at which "
                "gradient descent on this curvature diverges.",
                "use a curvature without negative eigenvalues, GGN() or EKFAC(); or "
                "discrete=False.",
            )
        return Flow(index, replace(eigen, values=decay), replace(eigen, values=times * response))

    def _dense(
        self, fitting: Fitting, data: Data, thetas: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "p p"], tuple[str, ...]]:
        """The mean curvature over some states as a matrix."""
        layout = fitting.task.layout
        require_bytes(
            4 * self.segments * layout.size**2 * torch.float64.itemsize,
            f"curvatures of {layout.size} × {layout.size} numbers in {self.segments} segments",
            layout.device,
            "use curvature=EKFAC(), which keeps a block a layer.",
        )
        matrix = torch.zeros(layout.size, layout.size, dtype=torch.float64, device=layout.device)
        notes: tuple[str, ...] = ()
        for theta in thetas:
            made = self.curvature.fit(fitting.task, data, theta)
            made.add_to(matrix, 1 / len(thetas))
            notes = (*notes, *made.notes)
        return (matrix + matrix.mT) / 2, notes


def _rates(history: History) -> tuple[Tensor, Tensor]:
    """How far each step moved θ_T by its penalty and, with the factors of its losses, by these."""
    reached = rates(history)
    return reached, reached * factors(history)


def _trained_on(fitting: Fitting, history: History) -> Data:
    """The examples whose mean loss was minimized: H̄ is theirs."""
    present = trained_on(history)
    return fitting.data if present is None else fitting.data.subset(present)


def _in_basis(eigen: Eigen, entries: Tensor, index: Tensor) -> Tensor:
    """A diagonal matrix by its own diagonal in the basis of a block: exact where it is λI."""
    if not entries.ndim:
        return entries.to(eigen.values)
    return diagonal_in_basis(eigen, entries[index].reshape(eigen.values.shape).to(eigen.values))


def _inverse_in_basis(
    eigen: Eigen, divisor: Tensor, moves: Bool[Tensor, " p"], index: Tensor
) -> Tensor:
    """1/M_j of the part of each eigenvector that moves; 0 where none of it does."""
    mean = _in_basis(eigen, divisor * moves, index)
    if bool(moves[index].all()):
        return 1 / mean
    share = _in_basis(eigen, moves.to(divisor), index)
    return torch.where(share > 0, share, 0.0) / torch.where(share > 0, mean, 1.0)


def functions(
    sigma: Tensor, steps: Float[Tensor, " k"], discrete: bool = False
) -> tuple[Tensor, Tensor]:
    """What is left of a change after these steps, and what a constant gradient does in them."""
    if discrete:
        left, response = torch.ones_like(sigma), torch.zeros_like(sigma)
        for eta in steps.tolist():
            factor = 1 - eta * sigma
            left, response = left * factor, response * factor + eta
        return left, response
    tau = float(steps.sum())
    x = tau * sigma
    whole = torch.where(x.abs() < SMALL, 1.0, sigma)
    response = torch.where(x.abs() < SMALL, tau * (1 - x / 2), -torch.expm1(-x) / whole)
    return torch.exp(-x), response


def segments_of(history: History, count: int, states: int) -> list[tuple[slice, list[int]]]:
    """The steps of each segment, and its kept states nearest to the middles of its parts.

    Raises:
        SpecError: There are fewer steps than segments, or a segment without a kept state.
    """
    total, usable = len(history), usable_states(history)
    ends = [k * total // count for k in range(count + 1)]
    found = []
    for begin, end in itertools.pairwise(ends):
        inside = [t for t in usable if begin <= t < end]
        if not inside:
            raise SpecError(
                "Each segment of training needs a kept state in it.",
                f"{count} segments of {total} steps, and none of {usable[:8]}… in "
                f"{begin} … {end - 1}.",
                "few kept states, or more segments than steps.",
                f"keep more, every={max(1, total // (2 * count * states))}, or ask for fewer "
                "segments. (Adam's state before the first step does not count.)",
            )
        width = (end - begin) / states
        middles = [begin + (k + 0.5) * width - 0.5 for k in range(states)]
        chosen = {min(inside, key=lambda t, m=middle: (abs(t - m), t)) for middle in middles}  # type: ignore[misc]
        found.append((slice(begin, end), sorted(chosen)))
    return found


@dataclass(frozen=True, eq=False)
class Flow:
    """D and R of one block of θ.

    Args:
        index: Its entries of θ.
        decay, response: D and R, in coordinates in which both are symmetric.
        root: P^{1/2}, which leads there; None: they are those of θ.
    """

    index: Tensor
    decay: Eigen
    response: Eigen
    root: Tensor | None = None

    def decayed(self, v: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """Dᵀ v."""
        v = v.to(self.decay.dtype)
        if self.root is None:
            return self.decay.mv(v)
        return self.decay.mv(v * self.root) / self.root

    def responded(self, v: Float[Tensor, "q d"]) -> Float[Tensor, "q d"]:
        """R v."""
        v = v.to(self.response.dtype)
        if self.root is None:
            return self.response.mv(v)
        return self.response.mv(v * self.root) * self.root


@dataclass(frozen=True, eq=False)
class Segment:
    """D and R by block, and scorers of P = I at its states, whose weights add up to 1.

    Args:
        flows: The blocks.
        scorers: Of the states.
        unseen: Entries that it does not move: R is 0 there and D is 1. None: it moves them all.
    """

    flows: tuple[Flow, ...]
    scorers: tuple[LayeredScorer, ...]
    unseen: Bool[Tensor, " p"] | None = None

    def decayed(self, rows: Float[Tensor, "q p"]) -> Float[Tensor, "q p"]:
        """Dᵀ of rows."""
        out = self._by_block(rows, [flow.decayed for flow in self.flows])
        return out if self.unseen is None else torch.where(self.unseen, rows, out)

    def responded(self, rows: Float[Tensor, "q p"]) -> Float[Tensor, "q p"]:
        """R of rows."""
        out = self._by_block(rows, [flow.responded for flow in self.flows])
        return out if self.unseen is None else torch.where(self.unseen, 0.0, out)

    def _by_block(self, rows: Tensor, functions: Sequence[Any]) -> Float[Tensor, "q p"]:
        moved = rows if self.unseen is None else torch.where(self.unseen, 0.0, rows)
        out = torch.empty_like(rows)
        for flow, function in zip(self.flows, functions, strict=True):
            out[:, flow.index] = function(moved[:, flow.index]).to(out.dtype)
        return out


@dataclass(frozen=True, eq=False)
class SourceScorer(Scorer):
    """The segments in order, and P = I at θ_T, for the gradients of queries.

    Args:
        segments: Each with its D and R.
        final: P = I at θ_T.
        first_alone: Whether S is what examples did in the first of them, and not in later ones.
    """

    segments: tuple[Segment, ...]
    final: LayeredScorer
    first_alone: bool = False
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        return self.final.layers

    @property
    def dtype(self) -> torch.dtype | None:
        return self.final.dtype

    def settings(self, asked: Asked) -> dict[str, int]:
        found = self.final.settings(asked)
        held = 1 + sum(len(segment.scorers) for segment in self.segments)
        return {**found, "queries_together": max(1, found["queries_together"] // held)}

    def jobs(self, asked: Asked) -> Iterator[SumOfJobs]:
        if asked.together is None:
            asked = replace(asked, together=self.settings(asked)["queries_together"])
        for job in self.final.jobs(asked):
            rows, first, jobs = job.vectors(), job.first, []
            for k, segment in reversed(list(enumerate(self.segments))):
                if self.first_alone and k > 0:
                    rows = segment.decayed(rows)
                    continue
                vectors = segment.responded(rows)
                for scorer in segment.scorers:
                    jobs += [replace(each, contraction=replace(each.contraction, first=first))
                             for each in scorer.jobs(_of_vectors(asked, vectors))]  # fmt: skip
                if k > 0:  # nothing is before the first
                    rows = segment.decayed(rows)
            yield SumOfJobs(tuple(jobs))

    def health(self) -> dict[str, Any]:
        return {"segments": len(self.segments)}

    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] with m = ℓ at θ_T: training examples as queries, a batch at a time."""
        every, parts = Asked(self.final.train, Loss(), self.final.memory_bytes, exact=True), []
        for start, queries in every.groups(64):
            for job in self.jobs(replace(every, queries=queries)):
                begin = start + job.first
                parts.append(job.block(begin, begin + len(job)).diagonal())
        return torch.cat(parts)


def _of_vectors(asked: Asked, vectors: Float[Tensor, "q p"]) -> Asked:
    """The same question of gradients that are given."""
    none = vectors.new_zeros(len(vectors), 0)
    return replace(asked, functional=Derivatives(none.sum(dim=1), vectors, none))
