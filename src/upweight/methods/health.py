"""How far can these scores be trusted? Numbers to judge a computation by; none changes a score."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.layerwise import BlockCurvature
from upweight.errors import AssumptionWarning, NonFinite, listed, message
from upweight.gradients.blocks import Plan
from upweight.gradients.linear import linear_form
from upweight.gradients.passes import GradientPass
from upweight.gradients.source import FactoredLinear, GradientSource
from upweight.gradients.underflow import underflowing
from upweight.linalg.cg import most_steps
from upweight.linalg.columns import WITHIN_REACH
from upweight.linalg.damping import Damping, Relative, undamped
from upweight.linalg.lanczos import extreme_eigenvalues
from upweight.linalg.operator import LinearOperator
from upweight.linalg.solution import Solution
from upweight.linalg.solver import Solver
from upweight.methods.facts import (
    DECREMENT_LIMIT,
    RESIDUAL_LIMIT,
    ROW_SUM_LIMIT,
    residual_allowed,
)
from upweight.runtime import callers
from upweight.runtime.progress import progress
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, CrossEntropy, Loss, SquaredError
from upweight.task.precision import dtypes_in
from upweight.task.probe import evenly_spaced
from upweight.task.task import Task

UNDERFLOW_EXAMPLES = 64
"""Training examples whose gradients are asked whether they are 0, or too small for float16."""

SLOW_S = 60.0
"""Seconds that one query may take before it is said."""

LOOKS = 8
"""Products that find the largest eigenvalue of a curvature, near enough for its square root."""

NETWORK_ROW_SUM = 1 / 3
"""Overall row-sum excess from which it is noted of a network. It does not tell the untrained: they
had 0.38 to 0.62, and networks after 20 to 60 epochs of noisy SGD 0.04 to 0.61."""

BASELINE_EXAMPLES = 256, 1024
"""Training examples on which a network is held against a constant output: at least and at most; a
sixteenth of them in between."""

TARGETS_A_CLASS = 10
"""Targets a class below which their entropy says little about that of all."""


def require_finite(scores: Float[Tensor, "*q b"], start: int, first: int = 0) -> None:
    """Refuse, by a NonFinite, scores that are not finite: of training examples from `start` on.

    They are S[q, i] with queries from `first` on, or S[i, i].
    """
    if bool(scores.isfinite().all()):
        return
    *query, example = (~scores.isfinite()).nonzero()[0].tolist()
    raise NonFinite(
        "Scores must be finite.",
        f"{float(scores[*query, example])} for training example {start + example}"
        f"{f' and query {first + query[0]}' if query else ''}.",
        "a gradient that overflows in this dtype, or a square root or norm of 0.",
        "use a float64 model, or look at the gradient of that example"
        f"{' and query' if query else ''}.",
    )


def stationarity(gradient: Float[Tensor, " p"], step: Solution) -> dict[str, float]:
    """How far θ̂ is from a stationary point of J, from ∇J and (H + λI)⁻¹ ∇J.

    `gradient_norm` is ‖∇J(θ̂)‖; `decrement` is ½ ∇Jᵀ (H + λI)⁻¹ ∇J, by how much one Newton step
    would still lower J, or NaN where the solver could not tell.
    """
    gradient = gradient.double()  # whose squares may underflow
    decrement = 0.5 * float(gradient @ step.value.double()) if step.is_answer else math.nan
    return {"gradient_norm": float(gradient.norm()), "decrement": decrement}


def row_sum_excess(
    sums: Float[Tensor, " q"], sizes: Float[Tensor, " q"], expected: Float[Tensor, " q"]
) -> dict[str, float]:
    """By how much Σᵢ S[q, i] differs from ∇m_qᵀ (H + λI)⁻¹ ∇R, which it equals at a minimum.

    Upweighting everything alike changes nothing but the penalty's share (law 2). Relative to
    Σᵢ |S[q, i]| it is the largest over the queries that have any score, and overall the norm over
    the queries of the one against the norm of the other.

    Args:
        sums: Σᵢ S[q, i].
        sizes: Σᵢ |S[q, i]|.
        expected: ∇m_qᵀ (H + λI)⁻¹ ∇R.
    """
    excess, sizes = (sums - expected).abs().double(), sizes.double()  # whose squares may underflow
    relative = (excess / sizes)[sizes > 0]
    return {
        "row_sum_excess": float(excess.max()),
        "row_sum_excess_relative": float(relative.max()) if len(relative) else 0.0,
        "row_sum_excess_overall": float(excess.norm() / sizes.norm()) if len(relative) else 0.0,
    }


def mean_eigenvalue(
    damping: Damping | float, lam: float, operator: LinearOperator, source: GradientSource
) -> dict[str, float]:
    """tr(H)/p, to hold λ against, where it costs no further pass over the data."""
    if isinstance(damping, Relative) and damping.factor > 0:
        return {"mean_eigenvalue": lam / damping.factor}
    if isinstance(source, FactoredLinear):
        return {"mean_eigenvalue": float(operator.trace()) / operator.shape[1] - lam}
    return {}


def spectrum(curvature: BlockCurvature) -> dict[str, Any]:
    """Damping against the eigenvalues, for all of θ and block by block."""
    blocks = {}
    for block in curvature.blocks:
        values = block.eigenvalues
        blocks[block.name] = {
            "entries": values.numel(),
            "mean_eigenvalue": float(values.double().mean()),
            "largest_eigenvalue": float(values.max()),
            "damping": block.damping,
            "below_damping": float((values < block.damping).double().mean()),
            "mean_eigenvalue_error": block.mean_error,
        }
    entries = sum(b["entries"] for b in blocks.values())

    def mean(key: str) -> float:
        return sum(b[key] * b["entries"] for b in blocks.values()) / entries

    return {
        "damping": mean("damping"),
        "mean_eigenvalue": mean("mean_eigenvalue"),
        "blocks": blocks,
    }


class RowSums:
    """Σᵢ S[q, i] and Σᵢ |S[q, i]| of queries whose scores stream by, a job at a time."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._done: list[Tensor] = []
        self._expected: list[Tensor | None] = []

    def see(self, part: Float[Tensor, "q b"]) -> None:
        """Another block of the current job."""
        self._parts.append(torch.stack([part.sum(dim=1), part.abs().sum(dim=1)]))

    def end(self, expected: Float[Tensor, " q"] | None) -> None:
        """That was all of a job; what its row sums are at a minimum, where that is known."""
        if self._parts:
            self._done.append(torch.stack(self._parts).sum(dim=0))
        self._expected.append(expected)
        self._parts = []

    @property
    def seen(self) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]] | None:
        """Sums and sums of magnitudes; None where nothing streamed by."""
        if not self._done:
            return None
        sums, sizes = torch.cat(self._done, dim=1)
        return sums, sizes

    @property
    def expected(self) -> Float[Tensor, " q"] | None:
        """What the sums are at a minimum."""
        known = [x for x in self._expected if x is not None]
        return torch.cat(known) if known and len(known) == len(self._expected) else None


def moved(now: Tensor, then: Tensor) -> str:
    """The message for a model that is no longer what the method was fitted to."""
    if now.dtype != then.dtype:
        return message(
            "The model must still have the parameters that the method was fitted to.",
            f"parameters of {now.dtype}, fitted as {then.dtype}.",
            "model.float(), .half(), .bfloat16(), .double() or .to(dtype) was called after fit.",
            "fit again, or fit to a copy: copy.deepcopy(model).",
        )
    return message(
        "The model must still have the parameters that the method was fitted to.",
        f"parameters that differ by up to {float((now - then).abs().max()):.2e}.",
        "training went on, or weights were loaded, after fit.",
        "fit again, or fit to a copy: copy.deepcopy(model).",
    )


def heard_blocks(plan: Plan, theta: Float[Tensor, " p"], data: Data, batch_size: int) -> set[str]:
    """Blocks in which some training example has a gradient that is not 0.

    Asked of some training examples, evenly spaced.
    """
    found: set[str] = set()
    some = data.subset(evenly_spaced(len(data), UNDERFLOW_EXAMPLES))
    with GradientPass(plan, theta) as gradients:
        for start, stop, batch in some.batches(batch_size):
            parts = gradients.of(plan.task.losses, plan.task.to_device(batch), stop - start)
            for block, part in zip(plan.blocks, parts, strict=True):
                if bool(part.absolute().total().any()):
                    found.add(block.name)
    return found


def warned(notes: list[str]) -> list[str]:
    """The notes, each also a warning at the line of the user's that asked."""
    for note in notes:
        callers.warn(note, AssumptionWarning)
    return notes


def is_convex(task: Task, theta: Float[Tensor, " p"], train: Data) -> bool:
    """Whether J is known to be convex: a convex loss of a model that is linear in θ."""
    if task.stands_in(theta):  # a linear model need not be split over processes
        return False
    probe = task.to_device(train.batch(0, min(4, len(train))))
    return task.loss.convex and linear_form(task, theta, probe) is not None


def denied(judged: Mapping[str, Any]) -> list[str]:
    """What the numbers deny of what the scores of a convex objective assume: a minimum.

    θ̂ can be had there, so the limits are those of the report's page.

    Args:
        judged: `provenance.health`.
    """
    if not _is_off(judged):
        return []
    return [
        f"θ̂ is not at a minimum of the objective: {'; '.join(_measured(judged))}. Usual causes: a "
        "penalty, loss or data other than the model was trained with; training that stopped "
        "early or has not begun"
    ]


def _is_off(judged: Mapping[str, Any]) -> bool:
    """Whether a number is past what it may be at a minimum."""
    gain = 0.0
    if "decrement" in judged:
        decrement, loss = judged["decrement"], abs(judged["mean_loss"])
        gain = decrement / loss if loss else (math.inf if decrement else 0.0)
    # `not <=`: a NaN denies it as well.
    return not (
        gain <= DECREMENT_LIMIT and judged.get("row_sum_excess_overall", 0.0) <= ROW_SUM_LIMIT
    )


def _measured(judged: Mapping[str, Any]) -> list[str]:
    said = []
    if "decrement" in judged:
        said.append(
            f"‖∇J‖ = {judged['gradient_norm']:.2g}, and a Newton step would lower J by "
            f"{judged['decrement']:.2g} (mean loss {judged['mean_loss']:.2g})"
        )
    if judged.get("row_sum_excess_overall"):
        said.append(
            f"{judged['row_sum_excess_overall']:.1%} of the scores is an effect of all examples "
            "alike, and at a minimum none is (row-sum excess)"
        )
    return said


def of_network(
    judged: Mapping[str, Any], baseline: Callable[[], tuple[float, float] | None]
) -> tuple[list[str], list[str]]:
    """What is to be warned of a network that is far from a minimum, and what only noted.

    Networks are stopped before a minimum, so the distance alone accuses none. A mean loss that a
    constant output reaches does: it is noted of any that is not at a minimum, and warned of where
    much of the scores is an effect of all examples alike.

    Args:
        judged: `provenance.health`.
        baseline: From `constant_baseline`; asked only where it decides.
    """
    if not _is_off(judged):
        return [], []
    is_far = judged.get("row_sum_excess_overall", 0.0) > NETWORK_ROW_SUM
    said, found = "; ".join(_measured(judged)), baseline()
    if found is not None and not found[0] < found[1]:
        words = [
            f"θ̂ is not at a minimum of the objective: {said}; and the mean loss {found[0]:.3g} is "
            f"not below {found[1]:.3g}, that of the best constant output. Usual causes: training "
            "that has not begun; a loss or data other than the model was trained with"
        ]
        return (words, []) if is_far else ([], words)
    if not is_far:
        return [], []
    return [], [
        f"θ̂ is not at a minimum of the objective: {said}. The last steps of noisy SGD, early "
        "stopping, or a penalty told wrongly do this"
    ]


def solved(judged: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is to be warned of the solves, and what only noted: a residual that was asked for."""
    residual = judged.get("largest_residual", 0.0)
    if residual <= RESIDUAL_LIMIT:
        return [], []
    if residual <= residual_allowed(judged):
        return [], [
            f"solves end at a residual of {residual:.1e} of their right side, as "
            f"rtol={judged['solver_rtol']:g} allows: a smaller one makes the scores exact"
        ]
    return [
        f"a solve was left with a residual of {residual:.1e} of its right side: a smaller "
        "tolerance of the solver, or more of its steps or a higher rank, makes the scores exact"
    ], []


def constant_baseline(
    task: Task, theta: Float[Tensor, " p"], data: Data, losses: Float[Tensor, " n"]
) -> tuple[float, float] | None:
    """The mean training loss, and that of the best output that is the same for all examples.

    Of cross-entropy that is the entropy of the labels' frequencies, of the squared error half the
    variance. None where the loss has no such constant, or the targets are too few or of several
    shapes. Both are of at most `BASELINE_EXAMPLES` evenly spaced examples.

    Args:
        task: What was trained.
        theta: θ̂.
        data: The training data.
        losses: ℓᵢ(θ̂) of every training example, after the checks of `upweight.task.check`.

    Cost: one example's forward pass where targets are read from the batch (`Task.targets`), and one
    over all of these examples where `forward` of the user's own makes them.
    """
    if not isinstance(task.loss, CrossEntropy | Bernoulli | SquaredError):
        return None
    least, most = BASELINE_EXAMPLES
    at = evenly_spaced(len(data), min(max(least, len(data) // 16), most))
    some, shapes, targets = data.subset(at), [], []
    with torch.no_grad():
        shape_of = _shape_of_outputs(task, theta, task.to_device(some.batch(0, 1)))
        for _, _, batch in progress(some.batches(16), len(some), "loss of a constant output"):
            batch = task.to_device(batch)
            if shape_of is None:
                outputs, wanted = task.call(theta, batch)
                shapes.append(outputs.shape)
            else:
                wanted = task.targets(batch)
                shapes.append(shape_of(wanted))
            targets.append(wanted)
        constant = _best_constant(task.loss, shapes, targets)
        if constant is None:
            return None
        of_constant = [
            task.losses_of(constant.expand(shape), wanted)
            for shape, wanted in zip(shapes, targets, strict=True)
        ]
    return float(losses[list(at)].double().mean()), float(torch.cat(of_constant).mean())


def _shape_of_outputs(
    task: Task, theta: Float[Tensor, " p"], example: Batch
) -> Callable[[Tensor], torch.Size] | None:
    """The shape of the outputs that belong to some targets; None where only the model can tell.

    It is that of the targets, with one more axis where they are classes. One example is asked.
    """
    outputs, wanted = task.call(theta, example)
    loss, classes = task.loss, _axis(task.loss, outputs.ndim)

    def shape(targets: Tensor) -> torch.Size:
        if not isinstance(loss, CrossEntropy) or targets.is_floating_point():
            return targets.shape
        return torch.Size(
            [*targets.shape[:classes], outputs.shape[classes], *targets.shape[classes:]]
        )

    is_read = task.targets(example) is not None
    return shape if is_read and shape(wanted) == outputs.shape else None


def _axis(loss: Loss, ndim: int) -> int:
    """Where the classes are."""
    axis = loss.axis if isinstance(loss, CrossEntropy) else None
    return (-1 if axis is None else axis) % ndim


def _best_constant(
    loss: CrossEntropy | Bernoulli | SquaredError,
    shapes: Sequence[torch.Size],
    targets: Sequence[Tensor],
) -> Tensor | None:
    """An output that broadcasts over examples, and over positions where classes are counted."""
    if not isinstance(loss, CrossEntropy):
        if len({shape[1:] for shape in shapes}) > 1:
            return None
        mean = torch.cat([y.reshape(s) for y, s in zip(targets, shapes, strict=True)])
        mean = mean.double().mean(dim=0)
        return torch.logit(mean, eps=1e-9) if isinstance(loss, Bernoulli) else mean
    ndim = len(shapes[0])
    axis = _axis(loss, ndim)
    classes = shapes[0][axis]
    counts = torch.zeros(classes, dtype=torch.float64, device=targets[0].device)
    for y in targets:
        if y.is_floating_point():
            counts += y.movedim(axis, -1).reshape(-1, classes).double().sum(dim=0)
        else:
            index = y.long()
            counts += torch.bincount(index[index != loss.ignore_index], minlength=classes)
    if counts.sum() <= TARGETS_A_CLASS * int((counts > 0).sum()):
        return None
    tiny = torch.finfo(counts.dtype).tiny
    logits = (counts / counts.sum()).clamp_min(tiny).log()  # of no target: never asked
    return logits.reshape([classes if k == axis else 1 for k in range(ndim)])


def zero_rows(
    sizes: Float[Tensor, " q"], losses: Float[Tensor, " n"] | float, by_refits: bool = False
) -> list[str]:
    """Which queries have no score but 0, and so no ranking.

    Args:
        sizes: Σᵢ |S[q, i]|.
        losses: Of the training examples, or their mean.
        by_refits: Whether scores are differences between trained models.
    """
    none = (sizes == 0).nonzero()[:, 0].tolist()
    if not none:
        return []
    if by_refits:
        which = "" if len(none) == len(sizes) else f" of {_named('query', none, len(sizes))}"
        return [f"all scores{which} are exactly 0: no refit changed what is measured"]
    if len(none) < len(sizes):
        return [
            f"all scores of {_named('query', none, len(sizes))} are exactly 0, which is no "
            "ranking: its measurement has no gradient, as where all its targets are ignored by "
            "the loss or its value is saturated"
        ]
    zero = not bool(torch.as_tensor(losses).any())
    why = (
        "the loss of every training example is 0, as where it ignores all their targets, or they "
        "are too small for the dtype of the model"
        if zero
        else "gradients are 0, or too small for the dtype of the model"
    )
    return [f"all scores are exactly 0, which is no ranking: {why}"]


def zero_columns(values: Float[Tensor, "q n"]) -> list[str]:
    """Which training examples have no effect at all, where others have one."""
    any_effect = (values != 0).any(dim=0)
    none = (~any_effect).nonzero()[:, 0].tolist()
    if not none or not bool(any_effect.any()):
        return []
    return [
        f"all scores of {_named('training example', none, len(any_effect))} are exactly 0: no "
        "gradient, as where all targets of an example are ignored by the loss or its loss is "
        "saturated; or, of refits and neighbours, it changes no measurement"
    ]


def _named(what: str, places: Sequence[int], of: int) -> str:
    more = ", …" if len(places) > 5 else ""
    return f"{what} {', '.join(map(str, places[:5]))}{more} ({len(places)} of {of})"


def underflow_notes(
    plan: Plan, theta: Float[Tensor, " p"], data: Data, batch_size: int
) -> tuple[str, ...]:
    """A warning, kept as a note, where gradients on the way to some layer are below float16.

    Asked of some training examples, evenly spaced.
    """
    if torch.float16 not in plan.computes_in:
        return ()
    m = min(len(data), UNDERFLOW_EXAMPLES)
    found: dict[str, int] = {}
    for start, stop, batch in data.subset(evenly_spaced(len(data), m)).batches(batch_size):
        some = underflowing(plan, theta, plan.task.to_device(batch), stop - start)
        for name, count in some.items():
            found[name] = found.get(name, 0) + count
    if not found:
        return ()
    blocks = listed([f"{name} ({count} of {m})" for name, count in found.items()])
    note = (
        f"float16: underflow takes more than a tenth of some examples' gradients, down to all of "
        f"it, in {blocks}; model.float() and model.bfloat16() have the range"
    )
    warnings.warn(note, UserWarning, stacklevel=3)
    return (note,)


def precision_notes(task: Task, data: Data) -> tuple[str, ...]:
    """A warning, kept as a note, where parameters or the model's computations are short."""
    is_short = task.layout.dtype.itemsize < 4
    seen = {task.layout.dtype}
    if not is_short:
        batch = task.to_device(data.batch(0, 1))
        with torch.no_grad():
            seen = dtypes_in(lambda: task.call(task.held_theta(), batch))
    short = max(seen, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    if short.itemsize >= 4:
        return ()
    name = str(short).removeprefix("torch.")
    note = (
        f"{'parameters are' if is_short else 'the model computes in'} {name}: gradients and scores "
        f"carry about {-math.log10(torch.finfo(short).eps):.0f} digits; "
        f"{'model.float() gives' if is_short else 'without autocast there are'} 7"
    )
    warnings.warn(note, UserWarning, stacklevel=3)
    return (note,)


def duration_notes(
    operator: LinearOperator, solver: Solver[Any], theta: Float[Tensor, " p"]
) -> tuple[str, ...]:
    """A warning, kept as a note, where one query may take minutes of products with the data.

    Cost: one product, where the solver takes many; a few more where these would take minutes and
    damping or a penalty bounds how many are needed.
    """
    steps = getattr(solver, "max_steps", None)
    if steps is None:
        return ()
    started = time.perf_counter()
    operator.mv(theta)
    seconds, steps = time.perf_counter() - started, min(steps, len(theta))
    smallest = undamped(operator)[1] if operator.is_psd else 0.0
    if smallest > 0 and seconds * steps >= SLOW_S:
        ends = extreme_eigenvalues(operator, LOOKS)
        rtol = solver.rtol or WITHIN_REACH.get(operator.dtype, 1e-2)  # type: ignore[attr-defined]
        needed = most_steps((ends.largest + ends.largest_error) / smallest, rtol)
        steps = min(steps, needed)
    if seconds * steps < SLOW_S:
        return ()
    note = (
        f"{type(solver).__name__}() takes up to {steps} products with the curvature for each query "
        f"and one took {seconds:.2g} s: up to {seconds * steps / 60:.0f} min a query; "
        "curvature=EKFAC() takes a few passes over the data for all of them"
    )
    warnings.warn(note, UserWarning, stacklevel=3)
    return (note,)
