"""Why could the model not be called on a batch?

Found out, not guessed: the call is bound to the signature of `forward`, inputs are converted and
tried again, the layer that complained is looked up. An error of the user's own code is left alone.
"""

import dis
import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from upweight._typing import Batch
from upweight.errors import DataError, DtypeError, ShapeError, SpecError, UpweightError, message
from upweight.task.arrays import TARGET_KEYS
from upweight.task.data import Data
from upweight.task.lent import copied
from upweight.task.task import Task, call_model

COMPLAINTS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What PyTorch raises where shapes, dtypes or arguments do not fit."""

COUNTED = 16
"""Examples looked at, at each end of the data, to tell places from targets."""

FEWEST_COUNTED = 8
"""With fewer examples, classes in order are as likely as places."""


def call_error(
    error: Exception, task: Task, theta: Float[Tensor, " p"], batch: Batch, role: str
) -> UpweightError | None:
    """An error that says why the model did not take the batch; None where the user's code does.

    Cost: a few calls on the batch, of a model that has failed.
    """
    if task.forward is call_model:
        text = _not_bound(task.model, batch)
        if text is not None:
            return ShapeError(text)
        text = _needs_targets(task, theta, batch)
        if text is not None:
            return DataError(text)
    elif not _binds(inspect.signature(task.forward), task.model, batch):
        return SpecError(
            "Task(forward=...) must be a function of the model and a batch.",
            f"one that takes {inspect.signature(task.forward)}.",
            "a function of the batch alone, or of its entries.",
            "Task(model, loss, forward=lambda model, batch: (model(batch[0]), batch[1])).",
        )
    if not isinstance(error, COMPLAINTS) or _is_users_own(error):
        return None
    dtype = _taken_dtype(task, theta, batch)
    if dtype is not None:
        return DtypeError(_other_dtype(error, task, dtype, batch, role))
    layer = _layer_of(error, task.model)
    if task.layout.dtype != torch.float32 and _runs_in_float32(task, batch):
        return DtypeError(_not_in_dtype(error, task.layout.dtype, layer))
    if layer is not None and isinstance(layer[1], nn.Embedding) and isinstance(error, IndexError):
        return DataError(_not_embedded(error, layer[0], layer[1], role))
    return ShapeError(_other_shape(error, task, batch, layer, role))


def loss_error(error: Exception, task: Task, outputs: Tensor, targets: Any) -> UpweightError | None:
    """An error that says why the loss did not take the targets; None where the user's code does."""
    if not isinstance(error, COMPLAINTS) or _is_users_own(error):
        return None
    name = str(outputs.dtype).removeprefix("torch.")
    kind: type[UpweightError] = ShapeError
    cause, way = "targets of another loss.", "give targets in the shape and dtype of training."
    trials: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("y.long()", lambda y: y.long()),
        (f"y.to(torch.{name})", lambda y: y.to(outputs.dtype)),
        ("y.squeeze(-1)", lambda y: y.squeeze(-1)),
        ("y.squeeze(-1).long()", lambda y: y.squeeze(-1).long()),
    )
    for words, convert in trials if isinstance(targets, Tensor) else ():
        try:
            fits = task.loss(outputs, convert(targets)).shape == (len(outputs),)
        except Exception:
            continue
        if fits:
            kind = ShapeError if "squeeze" in words else DtypeError
            cause = f"targets of another {'shape' if kind is ShapeError else 'dtype'}."
            way = f"convert the targets: with {words} the loss takes them."
            break
    return kind(
        "The loss must accept the model's outputs and the targets.",
        f"outputs {_shape(outputs)}, targets {_shapes(targets)} for {task.loss!r}. PyTorch "
        f"says: {_first_line(error)}",
        cause,
        way,
    )


def called_with(batch: Batch, role: str) -> str:
    """A note for an error of the user's own."""
    return f"upweight called the model with a batch of the {role}: {_shapes(batch)}"


# -- arguments ------------------------------------------------------------------------------------


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _not_bound(model: nn.Module, batch: Batch) -> str | None:
    """What is wrong with the arguments, where `forward` takes others than the batch has."""
    signature = inspect.signature(model.forward)
    name = f"{type(model).__name__}.forward{signature}"
    if not isinstance(batch, dict):
        return None if _binds(signature, *batch[:-1]) else _other_count(name, signature, batch)
    target = next(key for key in TARGET_KEYS if key in batch)
    inputs = {key: value for key, value in batch.items() if key != target}
    return None if _binds(signature, **inputs) else _other_names(name, signature, inputs, target)


def _needed(signature: inspect.Signature) -> list[str]:
    """The arguments of `forward` without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in kinds
    ]


def _other_names(
    forward: str, signature: inspect.Signature, inputs: dict[str, Any], target: str
) -> str:
    taken = [key for key in inputs if key in signature.parameters]
    other = [key for key in inputs if key not in signature.parameters]
    needed = [key for key in _needed(signature) if key not in inputs]
    # What forward still needs are the entries it has no name for, in their order.
    tensors = [key for key in other if isinstance(inputs[key], Tensor)]
    chosen = {**{key: key for key in taken}, **dict(zip(needed, tensors, strict=False))}
    by_place = list(chosen) == list(signature.parameters)[: len(chosen)]
    passed = ", ".join(
        f"{'' if by_place else f'{name}='}batch[{key!r}]" for name, key in chosen.items()
    )
    return message(
        "The model's forward must take the entries of a dict batch by name, all but the targets.",
        f"entries {list(inputs)} beside the targets {target!r}, for {forward}.",
        f"entries that are no argument of forward: {', '.join(map(repr, other))}."
        if other
        else f"arguments of forward that the batch does not hold: {', '.join(needed)}.",
        "say which entries are passed: Task(model, loss, forward=lambda model, batch: "
        f"(model({passed or '...'}), batch[{target!r}])).",
    )


def _other_count(name: str, signature: inspect.Signature, batch: tuple[Any, ...]) -> str:
    count = max(1, len(_needed(signature)))
    given = f"batches of {len(batch)} entries, {_shapes(batch)}; all but the last are passed to "
    if len(batch) - 1 > count:
        cause = (
            f"more than inputs and targets in each example: entry {count} is passed as an input, "
            f"and the last one, {len(batch) - 1}, stands for the targets."
        )
        if _is_counting(batch[-1], 0):
            cause = cause[:-1] + ", although it is each example's place in the data."
    else:
        cause = "an input that the data do not hold."
    inputs = ", ".join(f"batch[{k}]" for k in range(count))
    return message(
        "The model's forward must take all entries of a batch but the last, the targets.",
        f"{given}{name}.",
        cause,
        "say which entries are inputs and which the targets: Task(model, loss, forward=lambda "
        f"model, batch: (model({inputs}), batch[{count}])).",
    )


def require_no_places(data: Data) -> None:
    """Refuse batches whose last entry counts the examples: it would be taken for the targets.

    Raises:
        DataError: The entry is each example's place, and the one before it may be the targets.
    """
    n = len(data)
    first = data.batch(0, min(COUNTED, n))
    # Of a handful of examples, classes may count them too.
    if not isinstance(first, tuple) or len(first) < 3 or n < FEWEST_COUNTED:
        return
    start = max(0, n - COUNTED)
    end: Any = data.batch(start, n)
    if not _is_counting(first[-1], 0) or not _is_counting(end[-1], start):
        return
    count = len(first) - 2
    inputs = ", ".join(f"batch[{k}]" for k in range(count))
    raise DataError(
        "The last entry of an example is its targets.",
        f"batches of {len(first)} entries, {_shapes(first)}, whose last is each example's "
        "place in the data.",
        "a data set of (inputs, targets, index).",
        "say which entries are inputs and which the targets: Task(model, loss, forward=lambda "
        f"model, batch: (model({inputs}), batch[{count}])).",
    )


def _is_counting(values: Any, start: int) -> bool:
    if not isinstance(values, Tensor) or values.ndim != 1 or values.is_floating_point():
        return False
    return torch.equal(values.cpu().long(), torch.arange(start, start + len(values)))


def _needs_targets(task: Task, theta: Tensor, batch: Batch) -> str | None:
    """That a model runs only where it is given its targets too, if that is so."""
    if not isinstance(batch, dict):
        return None
    target = next((key for key in TARGET_KEYS if key in batch), "")
    if target not in inspect.signature(task.model.forward).parameters:
        return None

    def whole(model: nn.Module, entries: dict[str, Any]) -> tuple[Any, Any]:
        return model(**entries).logits, entries[target]

    if not _runs(task, theta, batch, whole):
        return None
    return message(
        "The model must run without its targets, which are taken out of the batch.",
        f"{type(task.model).__name__}, which runs with {target!r} and not without.",
        "a model that makes inputs of its targets: an encoder with a decoder.",
        "pass the whole batch: Task(model, loss, forward=lambda model, batch: "
        f"(model(**batch).logits, batch[{target!r}])).",
    )


# -- dtypes ---------------------------------------------------------------------------------------


def _runs(task: Task, theta: Tensor, batch: Batch, forward: Callable[..., Any]) -> bool:
    try:
        with torch.no_grad():
            task.called(forward).call(theta, batch)
    except Exception:
        return False
    return True


def _taken_dtype(task: Task, theta: Tensor, batch: Batch) -> torch.dtype | None:
    """The dtype in which the model takes the inputs of the batch, if it is another."""
    dtype = task.layout.dtype

    def floats(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    def integers(x: Tensor) -> Tensor:
        return x if x.is_floating_point() or x.is_complex() else x.to(dtype)

    def places(x: Tensor) -> Tensor:
        return x.long() if x.is_floating_point() and bool((x == x.round()).all()) else x

    trials = ((dtype, floats), (dtype, integers), (dtype, lambda x: integers(floats(x))),
              (torch.int64, places))  # fmt: skip
    for found, convert in trials:
        changed = tree_map(lambda x, to=convert: to(x) if isinstance(x, Tensor) else x, batch)
        same = all(a is b for a, b in zip(tree_leaves(changed), tree_leaves(batch), strict=True))
        if not same and _runs(task, theta, changed, task.forward):
            return found
    return None


def _runs_in_float32(task: Task, batch: Batch) -> bool:
    """Whether a copy of the model takes the batch, both of them in float32."""
    model = copied(task.model).float()
    single = Task(model, task.loss, task.penalty, task.params, task.forward)
    floats = tree_map(
        lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, batch
    )
    return _runs(single, single.held_theta(), floats, task.forward)


def _not_in_dtype(error: Exception, dtype: torch.dtype, layer: tuple[str, nn.Module] | None) -> str:
    return message(
        f"The model must run in the dtype of its parameters, {dtype}.",
        f"PyTorch says{'' if layer is None else f' in {_layer(*layer)}'}: {_first_line(error)}",
        f"an operation that PyTorch does not have for {dtype}, or a tensor of another dtype that "
        "forward makes itself: in torch.float32 the model runs.",
        "convert the model, model.float(); or choose an implementation of that layer that keeps "
        "the dtype (of experts in transformers: config._experts_implementation = 'eager').",
    )


def _other_dtype(error: Exception, task: Task, dtype: torch.dtype, batch: Batch, role: str) -> str:
    name = str(dtype).removeprefix("torch.")
    is_half = dtype in (torch.float16, torch.bfloat16)
    return message(
        f"The model must accept the {role}; its parameters are {task.layout.dtype}.",
        f"a batch of {_shapes(batch)}. PyTorch says: {_first_line(error)}",
        f"inputs of another dtype: as {dtype} the model takes them"
        + (
            " (of mixed precision the checkpoint may be kept in half)."
            if is_half
            else " (NumPy's default is float64, images are often uint8)."
            if dtype == task.layout.dtype
            else "."
        ),
        ("model.float(), whose scores carry 7 digits in place of 2 or 3; or " if is_half else "")
        + f"convert the inputs: X.astype('{name}') of an array or table, X.to(torch.{name}) of a "
        "tensor or in the data set.",
    )


# -- shapes ---------------------------------------------------------------------------------------


def _other_shape(
    error: Exception, task: Task, batch: Batch, layer: tuple[str, nn.Module] | None, role: str
) -> str:
    at = "" if layer is None else f" in {_layer(*layer)}"
    last = _frames(error)[-1]
    own = last.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "upweight")
    if own:
        at += f" ({Path(last.tb_frame.f_code.co_filename).name}, line {last.tb_lineno})"
    return message(
        f"The model must accept the {role}; its parameters are {task.layout.dtype}.",
        f"a batch of {_shapes(batch)}. PyTorch says{at}: {_first_line(error)}",
        "inputs of another shape than in training, or without an axis that training had (channels, "
        "positions)" + ("; or that line itself." if own else "."),
        "give the inputs the shape that the model was trained on, or say how to call it with "
        "Task(forward=lambda model, batch: (outputs, targets)).",
    )


POSITIONS = ("wpe", "position_embeddings", "embed_positions")
"""What models of transformers call the embedding of a place in the text."""


def _not_embedded(error: Exception, name: str, layer: nn.Embedding, role: str) -> str:
    given = (
        f"indices outside of 0…{layer.num_embeddings - 1} for {_layer(name, layer)}. PyTorch says: "
        f"{_first_line(error)}"
    )
    if name.rpartition(".")[2] in POSITIONS:
        return message(
            f"The model must accept the {role}.",
            given,
            "an example of more tokens than the model has positions.",
            f"cut them as in training: text(dataset, tokenizer, length={layer.num_embeddings}), or "
            f"tokenizer(texts, truncation=True, max_length={layer.num_embeddings}).",
        )
    return message(
        f"The model must accept the {role}.",
        given,
        "another vocabulary or tokenizer than in training, or padding by −100 or −1 in the inputs.",
        "encode them as in training, with padding by an index that the layer has.",
    )


def _layer(name: str, layer: nn.Module) -> str:
    return f"{name or 'the model'}, {type(layer).__name__}({layer.extra_repr()})"


def _layer_of(error: Exception, model: nn.Module) -> tuple[str, nn.Module] | None:
    """The innermost layer of the model that was running, with its name."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame in _frames(error):
        running = frame.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and id(running) in names:
            found = names[id(running)], running
    return found


def _is_users_own(error: Exception) -> bool:
    """Whether a `raise` or an assertion outside of PyTorch is where the error comes from.

    What PyTorch's own functions say of their arguments has no such statement, or one inside of it.
    """
    if isinstance(error, NotImplementedError | torch.OutOfMemoryError):
        return True
    last = _frames(error)[-1]
    if last.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "upweight"):
        return "allocate" in str(error)
    if dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] in ("RAISE_VARARGS", "RERAISE"):
        return True
    # A line of Python's that failed without one: by PyTorch's functions, or by Python itself.
    indexed = isinstance(error, IndexError) and any(w in str(error) for w in ("imension", "tensor"))
    return not (type(error) is RuntimeError or indexed)


def _frames(error: Exception) -> list[types.TracebackType]:
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at)
        at = at.tb_next
    return frames


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shapes(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_shape(value)}" for key, value in batch.items())
    return ", ".join(_shape(leaf) for leaf in tree_leaves(batch))


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__
