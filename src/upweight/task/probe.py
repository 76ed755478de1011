"""Is the value of an example its own?

S[q, i] asks what one example does. So ℓᵢ and m_q must be functions of θ and that example: not of
the examples beside it in a batch, of how far the batch is padded, or of the moment at which the
data set is asked. A few examples from all over the data are read twice, evaluated twice, and
evaluated alone and together.
"""

import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import NonDeterministic, ScalarLoss, ShapeError, UpweightError, message
from upweight.task import sharded
from upweight.task.batches import mapped, tensors
from upweight.task.data import Data, Subset
from upweight.task.precision import coarsest, dtypes_in, size_of
from upweight.task.task import Task

PROBE_EXAMPLES = 16

NUDGES = 4
"""Times that every parameter is changed by one rounding, to see how far a value moves by it."""

MARGIN = 1e3
"""A difference is no rounding where it is this many times what one rounding of θ does. Sums of a
million terms round by about that much; coupled examples move each other by far more."""

Evaluate: TypeAlias = Callable[[Float[Tensor, " p"], Batch], tuple[Tensor, Any]]
"""(θ, batch) to outputs and targets, with complaints translated."""


def evenly_spaced(n: int, most: int = PROBE_EXAMPLES) -> tuple[int, ...]:
    """Examples from all over the data, evenly spaced, first and last among them."""
    k = min(n, most)
    return tuple(i * (n - 1) // max(1, k - 1) for i in range(k))


@dataclass(frozen=True)
class Probe:
    """A few examples, each by itself."""

    at: tuple[int, ...]
    losses: Float[Tensor, " k"]
    notes: tuple[str, ...] = ()


def read_twice(data: Data, at: Sequence[int], role: str) -> Batch:
    """The examples at these places; a NonDeterministic where they differ when read again."""
    batch, again = data.take(at), data.take(at)
    found, expected = (tensors(b) for b in (again, batch))
    same = len(found) == len(expected) and all(map(_equal, found, expected))
    if not same:
        raise NonDeterministic(
            "Example i must be the same example each time it is asked for.",
            f"{_name(data)} ({role}), which gives {_unlike(expected, found)} when the same "
            f"{len(at)} examples are read a second time.",
            "random augmentation, masking or cropping in the data set or its collate function.",
            "pass the data without the random step, as in evaluation (of torchvision, the same "
            "data set with the transform of the test set); or keep one draw of it, "
            "[dataset[i] for i in range(len(dataset))], and attribute to that.",
        )
    return batch


def own_losses(
    task: Task,
    theta: Float[Tensor, " p"],
    data: Data,
    at: Sequence[int],
    batch: Batch,
    answer: tuple[Tensor, Any],
    evaluate: Evaluate,
    role: str,
) -> Float[Tensor, " k"]:
    """ℓᵢ of each of these examples alone, after asking that it is the same beside the others.

    Raises:
        NonDeterministic: A loss changes from call to call, with the other examples of the batch, or
            with how far it is padded.
        ShapeError: There is not one output per example, or it may be read in two ways.
    """
    outputs, targets = answer
    _require_repeated(task, batch, outputs, targets, evaluate)
    if len(outputs) != len(at):
        raise ShapeError(other_length(task, theta, data, at, len(outputs), evaluate, role))
    task.loss.check(outputs, targets)
    together = task.losses_of(outputs, targets)
    alone, unclear = [], task.loss.ambiguity(outputs, targets)
    for k, i in enumerate(at):
        single = task.to_device(data.batch(i, i + 1))
        # The only one was evaluated alone.
        f, y = evaluate(theta, single) if len(at) > 1 else answer
        if len(f) != 1:
            raise ShapeError(other_length(task, theta, data, (i,), len(f), evaluate, role))
        loss = task.losses_of(f, y)
        alone.append(loss)

        def losses(t: Tensor, single: Batch = single) -> Tensor:
            return task.losses_of(*evaluate(t, single))

        def values(t: Tensor, single: Batch = single) -> Tensor:
            return evaluate(t, single)[0]

        moved = _differs(task, theta, loss[0], together[k], losses, partial(_terms, task, f, y))
        # A loss may saturate or leave positions out. Outputs for equal inputs are equal throughout;
        # what a model answers where it was padded is its own affair.
        unpadded = _shapes(single) == _shapes(_row(batch, k, len(at)))
        if not moved and unpadded:
            moved = _differs(task, theta, f[0], outputs[k], values)
        if moved:
            seen = _Seen(i, k, loss, together, f, outputs, role)
            raise NonDeterministic(_coupled(task, data, single, batch, targets, seen))
        unclear = unclear and task.loss.ambiguity(f, y)
    if unclear:
        raise ShapeError(unclear)
    return torch.cat(alone)


def require_same_losses(
    task: Task,
    theta: Float[Tensor, " p"],
    data: Data,
    probe: Probe,
    losses: Float[Tensor, " n"],
    evaluate: Evaluate,
    role: str,
) -> None:
    """Refuse, by a NonDeterministic, a pass that gave the probe's examples other losses.

    A pass takes other batches than the probe: larger, and of neighbours.
    """
    for i, alone in zip(probe.at, probe.losses, strict=True):

        def value(t: Tensor, i: int = i) -> Tensor:
            batch = task.to_device(data.batch(i, i + 1))
            return task.losses_of(*evaluate(t, batch))[0]

        def terms(i: int = i) -> float:
            return _terms(task, *evaluate(theta, task.to_device(data.batch(i, i + 1))))

        if _differs(task, theta, alone, losses[i].to(alone), value, terms):
            raise NonDeterministic(
                "The loss of an example must not depend on the other examples of its batch, "
                "or on how far it is padded.",
                f"example {i} of the {role}: {float(alone):.6g} alone, {float(losses[i]):.6g} "
                "beside its neighbours.",
                "a model, loss or collate function that looks at the batch as a whole: its "
                "size, its longest sequence or its counts.",
                "treat examples one by one: mask padded positions, and divide by numbers that "
                "do not change with the batch.",
            )


def require_own_measurements(
    task: Task,
    theta: Float[Tensor, " p"],
    measure: Callable[..., Tensor],
    data: Data,
    values: Float[Tensor, " q"],
) -> None:
    """Ask that the measurements of some queries are the same for each of them alone.

    Raises:
        ScalarLoss: One query alone does not have one value, or all have that of the model.
        NonDeterministic: A value depends on the other queries of its batch, or is random.
    """
    singles: list[tuple[Batch, Tensor]] = []
    for i in evenly_spaced(len(data)):
        single = task.to_device(data.batch(i, i + 1))

        def value(t: Tensor, single: Batch = single) -> Tensor:
            with torch.no_grad():
                return measure(task, task.named(t), single)

        alone = value(theta)
        if alone.shape != (1,):
            raise ScalarLoss(
                "A measure must return one value for each query of the batch that it is given.",
                f"shape {tuple(alone.shape)} from {measure!r} for query {i} alone; "
                f"{len(values)} values for all {len(values)} queries.",
                "a measure that ignores its batch, such as one that returns parameters.",
                OF_THE_MODEL,
            )
        again = value(theta)
        if not _repeats(task, alone, again):
            raise NonDeterministic(
                "A measure must give the same value each time.",
                f"{float(alone[0]):.6g}, then {float(again[0]):.6g} for query {i} under "
                f"{measure!r}, where the model's outputs are the same.",
                "random numbers in the measure.",
                "take the random step out of the measure.",
            )

        def terms(single: Batch = single) -> float:
            return _terms(task, *task.call(theta, single))

        if _differs(task, theta, alone[0], values[i].to(alone), lambda t: value(t)[0], terms):
            raise NonDeterministic(
                "A measurement must not depend on the other queries of its batch.",
                f"{float(alone[0]):.6g} for query {i} alone, {float(values[i]):.6g} beside "
                f"others, under {measure!r}; the losses of the queries do not depend on it.",
                "a measure that takes a mean, a maximum or a count over the queries, or looks "
                "at the first of them only.",
                "let the value of each query depend on its own row of outputs and targets.",
            )
        singles.append((single, alone))
    if isinstance(measure, types.FunctionType):
        _require_of_the_queries(task, theta, measure, singles)


OF_THE_MODEL = (
    "ask for a number of the model as such: Coefficient(name); or Functional(lambda task, params, "
    "queries, weights: params[name].reshape(-1)), queries=None."
)


def _require_of_the_queries(
    task: Task,
    theta: Float[Tensor, " p"],
    measure: Callable[..., Tensor],
    singles: Sequence[tuple[Batch, Tensor]],
) -> None:
    """Refuse a measure that gives queries with other outputs one value with one gradient.

    Not at any θ and query would a function of the outputs do that: it reads the parameters alone.
    """
    first, value = singles[0]
    with torch.no_grad():
        outputs = task.call(theta, first)[0]
        others = [b for b, v in singles[1:] if not torch.equal(task.call(theta, b)[0], outputs)]
    if not others or not all(torch.equal(v, value) for _, v in singles):
        return

    def gradient(batch: Batch) -> Tensor | None:
        flat = theta.clone().requires_grad_()
        with torch.enable_grad():
            found = measure(task, task.named(flat), batch)
        if not found.requires_grad:
            return None
        return torch.autograd.grad(found.sum(), flat, allow_unused=True)[0]

    own = gradient(first)
    if own is None or not bool(own.any()):  # said of all queries where gradients are taken
        return
    found = (gradient(batch) for batch in others)
    if all(g is not None and torch.equal(g, own) for g in found):
        raise ScalarLoss(
            "A measure must measure each query.",
            f"{float(value[0]):.6g} from {measure!r}, with one gradient, for each of "
            f"{len(singles)} queries whose outputs differ.",
            "a measure that ignores its batch, such as one that returns a parameter: every row of "
            "scores would be the same.",
            OF_THE_MODEL,
        )


# -- is it rounding? -------------------------------------------------------------------------------


def _repeats(task: Task, a: Tensor, b: Tensor) -> bool:
    """Whether two evaluations of the same thing agree; some devices add in any order."""
    return _gap(a, b) <= MARGIN * _eps(task) * size_of(a)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where only one is NaN.

    NaN in both, and equal infinities, are left to the checks that name them.
    """
    a, b = a.double(), b.double()
    if a.shape != b.shape or bool((a.isnan() != b.isnan()).any()):
        return math.inf
    if not a.numel():  # texts of one token alone: nothing is predicted
        return 0.0
    return float(torch.where(a == b, 0.0, a - b).nan_to_num(nan=0.0).abs().max())


def _differs(
    task: Task,
    theta: Float[Tensor, " p"],
    a: Tensor,
    b: Tensor,
    value: Callable[[Float[Tensor, " p"]], Tensor],
    terms: Callable[[], float] = float,
) -> bool:
    """Whether two evaluations of one value differ by more than rounding.

    Batches of other sizes are summed in another order. How much that may do depends on what cancels
    on the way (collinear inputs), so it is not judged by the size of the result: the value is taken
    again with every parameter changed by one rounding, up or down. That does not show what cancels
    within the loss, such as two terms as large as the outputs: `terms` is their size.
    """
    gap, eps = _gap(a, b), _eps(task)
    if gap <= 10 * eps * size_of(a):
        return False
    if gap == math.inf:
        return True
    eps = max(eps, coarsest(dtypes_in(lambda: value(theta))))
    if gap <= 10 * eps * max(size_of(a), terms()):
        return False
    moved = 0.0
    for near in nudged(task, theta, eps):
        again = value(near)
        moved = max(moved, _gap(again, a.reshape(again.shape)))
    return gap > MARGIN * moved


def nudged(task: Task, theta: Float[Tensor, " p"], eps: float) -> Iterator[Float[Tensor, " p"]]:
    """θ with every parameter changed by one rounding, up or down, a few times."""
    generator = torch.Generator(device=theta.device).manual_seed(0)
    for k in range(NUDGES):
        if task.stands_in(theta):
            yield sharded.nudged(theta, eps, k)
            continue
        signs = torch.randint(0, 2, theta.shape, generator=generator, device=theta.device)
        yield theta * (1 + eps * (2 * signs - 1).to(theta))


def _terms(task: Task, outputs: Tensor, targets: Any) -> float:
    """The size of what a loss of one example adds up, or of what one output makes of it."""
    positions = max(1, outputs[..., 0].numel() if outputs.ndim > 1 else 1)
    real = [x for x in tensors(targets) if x.is_floating_point()]
    terms = positions * max(map(size_of, (outputs, *real)))
    # By rounding f a loss moves by |∂ℓ/∂f| |f|: in least squares far more than either.
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        loss = task.losses_of(f, targets).sum()
        if loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, f)
            terms = max(terms, float((slope * f).detach().double().nan_to_num().abs().sum()))
    return terms


def _eps(task: Task) -> float:
    """The relative rounding of parameters, and of what the caller's settings make of it."""
    device = task.layout.device.type
    eps = torch.finfo(task.layout.dtype).eps
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if device == "cuda" and task.layout.dtype == torch.float32 and tf32:
        eps = max(eps, 2.0**-11)
    return eps


# -- what was seen ---------------------------------------------------------------------------------


def _require_repeated(
    task: Task, batch: Batch, outputs: Tensor, targets: Any, evaluate: Evaluate
) -> None:
    """Refuse a model or a loss that answers otherwise when asked again."""
    again, _ = evaluate(task.held_theta(), batch)
    if not _repeats(task, outputs, again):
        gap = _gap(outputs, again)
        raise NonDeterministic(
            "The model must give the same outputs for the same inputs.",
            f"outputs that differ by up to {gap:.2e} between two calls.",
            "randomness inside forward (functional dropout, sampling, random augmentation).",
            "call model.eval(), and take random steps out of forward.",
        )
    if len(outputs) == 0:
        return
    task.loss.check(outputs, targets)
    once, twice = (task.losses_of(outputs, targets) for _ in range(2))
    if not _repeats(task, once, twice):
        raise NonDeterministic(
            "The loss must give the same values for the same outputs and targets.",
            f"losses that differ by up to {_gap(once, twice):.2e} between two calls of "
            f"{task.loss!r}.",
            "random numbers in the loss.",
            "take the random step out of the loss.",
        )


@dataclass(frozen=True)
class _Seen:
    """An example that is another one in a batch: place i, row k; its losses and outputs."""

    i: int
    k: int
    alone: Tensor
    together: Tensor
    output_alone: Tensor
    outputs: Tensor
    role: str

    def __str__(self) -> str:
        return (
            f"example {self.i} of the {self.role}, whose loss is {float(self.alone[0]):.6g} when "
            f"it is passed alone and {float(self.together[self.k]):.6g} beside "
            f"{len(self.together) - 1} others"
        )


def _coupled(task: Task, data: Data, single: Batch, batch: Batch, targets: Any, seen: _Seen) -> str:
    """Who is to blame: the data, the loss or the model."""
    k, size = seen.k, len(seen.together)
    row = _row(batch, k, size)
    is_padded = _shapes(single) != _shapes(row)
    if not is_padded and not all(map(_equal, tensors(single), tensors(row))):
        return message(
            "The inputs and targets of an example must not depend on the other examples of its "
            "batch.",
            f"{_name(data)}: {seen}; its inputs differ as well.",
            "a collate function that mixes, sorts or scales the examples of a batch.",
            "pass the examples with a collate function that treats each by itself.",
        )
    own, here = _loss_of_row(task, seen, targets), float(seen.together[k])
    if abs(own - here) > MARGIN * _eps(task) * (abs(own) + abs(here)):
        return message(
            "The loss of an example must not depend on the other examples of its batch.",
            f"{seen}; {task.loss!r} gives {own:.6g} for the same outputs by themselves.",
            "a loss that divides by a number counted in the batch (its size, its tokens, its "
            "classes) or compares the examples of a batch.",
            "divide by a number that does not change with the batch, such as the mean count over "
            "the training set.",
        )
    if is_padded:
        return message(
            "The outputs of an example must not depend on how far its batch is padded.",
            f"{seen}, padded from shapes {_shapes(single)} to {_shapes(row)}.",
            "a model that reads padded positions: pooling, attention or normalization without the "
            "mask, positions counted from a padded end, or a label held against a padded position.",
            "give the model the mask (and positions), set labels held against padding to −100, or "
            "pad all examples to one length.",
        )
    gap = _gap(seen.output_alone[0], seen.outputs[k])
    return message(
        "Each example's output must not depend on the other examples of its batch.",
        f"{seen}, from the same inputs: an output that moves by {gap:.2e} when its example is "
        "passed alone.",
        "a model that compares or normalizes the examples of a batch: batch statistics, attention "
        "over the batch, a contrastive model.",
        "use layers that treat examples one by one (running statistics, LayerNorm).",
    )


def _loss_of_row(task: Task, seen: _Seen, targets: Any) -> float:
    """The loss of one row of the outputs that a batch gave."""
    k, size = seen.k, len(seen.together)
    try:
        row = task.losses_of(seen.outputs[k : k + 1], _row(targets, k, size))
    except (UpweightError, RuntimeError, ValueError, IndexError, TypeError):
        row = seen.together[k : k + 1]  # targets that cannot be cut: nothing is seen of the loss
    return float(row[0])


def other_length(
    task: Task,
    theta: Float[Tensor, " p"],
    data: Data,
    at: Sequence[int],
    given: int,
    evaluate: Evaluate,
    role: str,
) -> str:
    """Why there is not one output per example: dropped by the data, or pooled by the model."""
    for i in at:
        try:
            count = len(evaluate(theta, task.to_device(data.batch(i, i + 1)))[0])
            said = f"{count} outputs"
        except (UpweightError, RuntimeError, ValueError, IndexError, TypeError) as error:
            count, said = 0, f"{type(error).__name__}: {str(error)[:80]}"
        if count != 1:
            return message(
                "The data must give one example for each index.",
                f"{given} outputs for {len(at)} {role}; example {i} alone gives {said}.",
                "a collate function that leaves out broken examples, or an item that holds several "
                "examples.",
                "leave them out before: Subset(dataset, [i for i in range(len(dataset)) if "
                "dataset[i] is not None]).",
            )
    return message(
        "The model must return one output per example.",
        f"{given} outputs for {len(at)} {role}.",
        "a model that flattens or pools over the batch axis.",
        "keep the examples on the first axis throughout.",
    )


def _row(tree: Any, k: int, size: int) -> Any:
    """Example k of a batch, for what has the examples on its first axis."""

    def cut(x: Any) -> Any:
        return x[k : k + 1] if isinstance(x, Tensor) and x.ndim and len(x) == size else x

    return mapped(cut, tree)


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in tensors(tree)]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same_nans = a.is_floating_point() and torch.equal(a.isnan(), b.isnan())
    return torch.equal(a, b) or (same_nans and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _unlike(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """How a second reading differs from the first."""
    for k, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a.shape != b.shape:
            return f"shape {tuple(b.shape)} in place of {tuple(a.shape)} in entry {k}"
        if not _equal(a, b):
            share = float((a != b).double().mean())
            return f"other numbers in {share:.0%} of entry {k}"
    return f"{len(found)} tensors in place of {len(expected)}"


def _name(data: Data) -> str:
    inner: Any = data.data if isinstance(data, Subset) else data
    return f"the data set {type(getattr(inner, 'dataset', inner)).__name__}"
