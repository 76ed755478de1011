"""Can this task be answered on these data? Refuse, with the way out, what cannot.

Checked once per `fit` and per `attribute`, on one forward pass over the data: that the
model is deterministic and treats examples one by one, that the loss is unreduced, that targets fit
the loss, that gradients reach every chosen parameter, and that every loss is finite.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from upweight._typing import Batch
from upweight.errors import (
    DataError,
    NonDeterministic,
    NonFinite,
    NotDifferentiable,
    ScalarLoss,
    ShapeError,
    UpweightError,
    listed,
)
from upweight.runtime.progress import progress
from upweight.runtime.ranks import ALONE, Ranks
from upweight.task.arrays import TARGET_KEYS
from upweight.task.batches import tensors
from upweight.task.data import Data, batch_size
from upweight.task.failures import call_error, called_with, loss_error, require_no_places
from upweight.task.gradients import require_own_gradients, unreached_notes
from upweight.task.model_loss import loss_notes
from upweight.task.modes import acting_in_training
from upweight.task.probe import (
    PROBE_EXAMPLES,
    Probe,
    evenly_spaced,
    other_length,
    own_losses,
    read_twice,
    require_own_measurements,
    require_same_losses,
)
from upweight.task.rows import row_name
from upweight.task.sharded import own_part
from upweight.task.task import Task, call_model

CHECKED_AT_ONCE = 256
"""Examples per forward pass of the check."""


def checked_losses(
    task: Task, data: Data, role: str, probe: Probe | None = None, ranks: Ranks = ALONE
) -> Float[Tensor, " n"]:
    """ℓᵢ(θ̂) of every example, after the checks above.

    Args:
        task: What was trained.
        data: The examples.
        role: What they are called in messages: "training data" or "queries".
        probe: What `require_answerable` found of them, where it was asked already.
        ranks: The processes that make this call together, each on some of the batches.

    Raises:
        DataError: Targets are out of range.
        NonFinite: A loss is NaN or infinite.
        UpweightError: As for `require_answerable`.
    """
    probe = probe or require_answerable(task, data, role)
    size = checked_at_once(data)
    mine = range(ranks.rank * size, len(data), ranks.size * size)
    losses = checked_parts(task, data, mine, size, role)
    found = ranks.joined(losses, len(data), task.layout.device)
    require_own_losses(task, data, probe, found, role)
    return found


def checked_at_once(data: Data) -> int:
    """Examples of a forward pass of the check."""
    return data.together(_at_once(data))


def checked_parts(
    task: Task, data: Data, starts: Sequence[int], size: int, role: str
) -> dict[int, Float[Tensor, " b"]]:
    """ℓᵢ(θ̂) of the `size` examples from each start on, checked as by `checked_batch`."""
    theta, losses, evaluate = task.held_theta(), dict[int, Tensor](), partial(_outputs, task, role)
    batches = ((k, min(k + size, len(data)), None) for k in starts)
    for start, stop, _ in progress(batches, len(starts) * size, f"checking {role}"):
        batch = task.to_device(data.batch(start, stop))
        outputs, targets = evaluate(theta, batch)
        losses[start] = checked_batch(task, data, (start, stop), batch, outputs, targets, role)
    return losses


def require_own_losses(
    task: Task, data: Data, probe: Probe, losses: Float[Tensor, " n"], role: str
) -> None:
    """Refuse, by a NonDeterministic, a pass that gave the probe's examples other losses."""
    require_same_losses(
        task, task.held_theta(), data, probe, losses, partial(_outputs, task, role), role
    )


def checked_batch(
    task: Task,
    data: Data,
    places: tuple[int, int],
    batch: Batch,
    outputs: Tensor,
    targets: Any,
    role: str,
) -> Float[Tensor, " b"]:
    """ℓᵢ(θ̂) of a batch from the model's outputs, after asking that they are as they should be.

    The batch holds the examples from places[0] to places[1] − 1.

    Raises:
        DataError: Targets are out of range.
        NonFinite: A loss is NaN or infinite.
        ShapeError: There is not one output per example.
    """
    start, stop = places
    if len(outputs) != stop - start:
        at, evaluate = range(start, stop), partial(_outputs, task, role)
        raise ShapeError(
            other_length(task, task.held_theta(), data, at, len(outputs), evaluate, role)
        )
    task.loss.check(outputs, targets)
    values = _losses(task, batch, outputs, targets, role)
    _require_finite_losses(values, data, start, batch, role)
    return values


def require_answerable(task: Task, data: Data, role: str) -> Probe:
    """Refuse, by a few examples, what no pass over the data could answer.

    Raises:
        DataError: There are no examples.
        NonDeterministic: The model is in a training mode that matters; the data, the model or the
            loss answer differently twice; or the examples of a batch affect each other.
        NotDifferentiable: No gradient reaches any chosen parameter.
        UnsupportedModel: A reentrant checkpoint.
        NonFinite: A parameter is NaN or infinite.
        ShapeError: The model does not accept the examples.
        DtypeError: The model and the examples differ in dtype.
        ScalarLoss: The loss is reduced over the batch.
        SpecError: The model computes another loss itself; see `upweight.task.model_loss`.
    """
    _require_examples(data, role)
    if task.forward is call_model:
        require_no_places(data)
    _require_eval_mode(task.model)
    theta = task.held_theta()
    _require_finite_parameters(task)
    at = evenly_spaced(len(data))
    batch = task.to_device(read_twice(data, at, role))
    evaluate = partial(_outputs, task, role)
    outputs, targets = evaluate(theta, batch)
    if len(outputs) == len(at):
        task.loss.check(outputs, targets)
        _losses(task, batch, outputs, targets, role)  # raises with the cause, where the loss fails
    losses = own_losses(task, theta, data, at, batch, (outputs, targets), evaluate, role)
    notes = (
        *loss_notes(task, theta, data, at, losses),
        *unreached_notes(task, theta, batch, at, role),
    )
    require_own_gradients(task, theta, data, batch, at, role)
    return Probe(at, losses, notes)


def require_targets(task: Task, data: Data, role: str) -> None:
    """Refuse, by the first few examples, targets that the loss would broadcast or misread.

    What `require_answerable` asks of a trained model, before one is trained: its outputs do not
    count, their shape does.

    Raises:
        DataError: There are no examples, or targets are out of range.
        ShapeError: They do not fit the outputs, or the model does not accept the examples.
    """
    _require_examples(data, role)
    batch = task.to_device(data.batch(0, min(len(data), PROBE_EXAMPLES)))
    devices = range(torch.cuda.device_count())
    with torch.no_grad(), torch.random.fork_rng(devices=devices):  # dropout draws
        outputs, targets = _outputs(task, role, task.held_theta(), batch)
    task.loss.check(outputs, targets)


def checked_measurements(
    task: Task, measure: Callable[..., Tensor], data: Data
) -> Float[Tensor, " q"]:
    """m_q(θ̂) of every query, after asking that there is one finite value for each.

    Raises:
        ScalarLoss: The measure does not return one value per query.
        NonFinite: A measurement is NaN or infinite.
    """
    params, values = task.named(task.held_theta()), []
    for start, stop, batch in data.batches(_at_once(data)):
        with torch.no_grad():
            part = measure(task, params, task.to_device(batch))
        if not isinstance(part, Tensor) or part.shape != (stop - start,):
            shape = (
                f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            )
            raise ScalarLoss(
                f"A measure must return one value per query: shape ({stop - start},).",
                f"{measure!r} returned {shape}.",
                "a mean or sum over the queries, or one value per output.",
                "reduce over every axis but the first.",
            )
        if not bool(part.isfinite().all()):
            first = int((~part.isfinite()).nonzero()[0])
            raise NonFinite(
                "Every measurement must be finite.",
                f"{float(part[first])} for {row_name(data.given, start + first, 'query')} under "
                f"{measure!r}.",
                "a logarithm of 0 or a division by 0 in the measure.",
                "measure in log space, or leave this query out.",
            )
        values.append(part)
    found = torch.cat(values)
    require_own_measurements(task, task.held_theta(), measure, data, found)
    return found


def _at_once(data: Data) -> int:
    # What a layer makes of an input may be a hundred times as large, and is not known here.
    inputs = sum(x.numel() for x in tensors(data.batch(0, 1)))
    return batch_size(inputs + 1, 8, most=CHECKED_AT_ONCE)


def _require_examples(data: Data, role: str) -> None:
    if len(data) == 0:
        raise DataError(
            f"The {role} must hold at least one example.",
            "0 examples.",
            "a filter that matched nothing, or an empty split.",
            f"check len(...) of what you pass as the {role}.",
        )


def _require_eval_mode(model: nn.Module) -> None:
    acting = acting_in_training(model)
    if acting:
        raise NonDeterministic(
            "The model must be in eval mode: θ̂ is one fixed function of each example.",
            f"{len(acting)} layers that answer otherwise in training mode, first {acting[0]}.",
            "model.eval() was not called after training; dropout is then random and BatchNorm "
            "mixes the examples of a batch.",
            "call model.eval() before making the Task.",
        )
    coupled = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    if coupled:
        raise NonDeterministic(
            "Each example's output must not depend on the other examples of its batch.",
            f"{len(coupled)} layers that take mean and variance from the batch at hand, first "
            f"{coupled[0]}.",
            "BatchNorm(track_running_stats=False), which couples examples in eval mode too.",
            "train with running statistics, or use layers that treat examples one by one "
            "(LayerNorm, GroupNorm).",
        )


def _require_finite_parameters(task: Task) -> None:
    named = dict(task.model.named_parameters())
    made = [k for k, p in task.model.named_parameters() if p.is_inference()]
    if made:
        raise NotDifferentiable(
            "Parameters must be tensors of which autograd can record what is done with them.",
            f"{listed(made)}, made inside torch.inference_mode().",
            "a model that was built or loaded inside of it.",
            "build the model outside of it and load its weights into that: "
            "fresh.load_state_dict(model.state_dict()).",
        )
    bad = [k for k in task.layout.names if not bool(own_part(named[k]).isfinite().all())]
    if bad:
        raise NonFinite(
            "The model's parameters must be finite.",
            f"NaN or infinity in {', '.join(bad[:5])}.",
            "training diverged.",
            "train again with a smaller learning rate, or load an earlier checkpoint.",
        )


def _outputs(task: Task, role: str, theta: Float[Tensor, " p"], batch: Batch) -> tuple[Tensor, Any]:
    """The model's outputs; what PyTorch says is explained, what the user's code says is kept."""
    try:
        with torch.no_grad():
            called = task.call(theta, batch)
    except UpweightError:
        raise
    except Exception as error:
        explained = call_error(error, task, theta, batch, role)
        if explained is None:
            error.add_note(called_with(batch, role))
            raise
        raise explained from error
    if not isinstance(called, tuple | list) or len(called) != 2:
        raise ShapeError(
            "Task(forward=...) must return two things: (outputs, targets).",
            f"{type(called).__name__}"
            f"{f' of {len(called)}' if isinstance(called, tuple | list) else ''}.",
            "a function that returns the outputs alone.",
            "Task(model, loss, forward=lambda model, batch: (model(batch[0]), batch[1])).",
        )
    outputs, targets = called
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise ShapeError(
            "The model must return one tensor [b, ...] with the examples on its first axis.",
            f"{_returned(outputs)}.",
            "a model that returns several tensors, or its own loss.",
            "say how to get the outputs with upweight.Task(model, loss, forward=lambda model, "
            f"batch: {_taken(batch, outputs)}) in place of model and loss.",
        )
    return outputs, targets


def _returned(outputs: object) -> str:
    """What a model returned that is no tensor of examples."""
    name = type(outputs).__name__
    if isinstance(outputs, Tensor):
        return f"{name} of shape ()"
    if isinstance(outputs, Mapping):
        return f"{name} with {', '.join(map(repr, outputs))}"
    return f"{name} of {len(outputs)}" if isinstance(outputs, tuple | list) else name


def _taken(batch: Batch, outputs: object) -> str:
    """Code that takes one tensor of what the model returned."""
    target: Any
    if isinstance(batch, dict):
        target = next((key for key in TARGET_KEYS if key in batch), None)
        inputs = ", ".join(f"{key}=batch[{key!r}]" for key in batch if key != target)
    else:
        target = len(batch) - 1
        inputs = ", ".join(f"batch[{k}]" for k in range(target))
    if isinstance(outputs, Tensor) or target is None:
        return "(outputs, targets)"
    several = isinstance(outputs, Mapping | tuple | list) and len(outputs) > 0
    key = next(iter(outputs)) if isinstance(outputs, Mapping) and several else 0
    return f"(model({inputs}){f'[{key!r}]' if several else ''}, batch[{target!r}])"


def _losses(
    task: Task, batch: Batch, outputs: Tensor, targets: Any, role: str
) -> Float[Tensor, " b"]:
    """ℓ of each example; what PyTorch says is explained, what the user's code says is kept."""
    try:
        return task.losses_of(outputs, targets)
    except UpweightError:
        raise
    except Exception as error:
        explained = loss_error(error, task, outputs, targets)
        if explained is None:
            error.add_note(called_with(batch, role))
            raise
        raise explained from error


def _require_finite_losses(
    losses: Float[Tensor, " b"], data: Data, start: int, batch: Batch, role: str
) -> None:
    bad = (~losses.isfinite()).nonzero()[:, 0]
    if len(bad):
        first = int(bad[0])
        held = [x for x in tensors(batch) if x.is_floating_point()]
        inputs = [x[first] if x.ndim > 0 and len(x) == len(losses) else x for x in held]
        from_data = any(not bool(x.isfinite().all()) for x in inputs)
        raise NonFinite(
            f"Every loss over the {role} must be finite.",
            f"{len(bad)} losses in this batch are not; the first is "
            f"{row_name(data.given, start + first)}, loss {float(losses[first])}"
            f"{', whose inputs or targets hold NaN or infinity' if from_data else ''}.",
            "missing values in the data." if from_data else "overflow, or log or division by 0.",
            "remove or impute these examples."
            if from_data
            else "compute the loss from logits (log_softmax), or use float64.",
        )
