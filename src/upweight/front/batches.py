"""Which entries of an example go into the model, and which one is its output held against?

    (x, y)                              model(x), y
    (x, y, place)                       model(x), y
    {"image": x, "label": y, …}         model(x), y
    ((x1, x2), y), {"x": {…}, "y": y}   model(x1, x2), y
    {"a": x1, "b": x2, "y": y}          model({"a": x1, "b": x2}), y    where it takes one argument

A place is an entry that counts the examples; that and text (file names) are left out. What else is
left over may be a weight of the objective, so it is refused. Where two readings fit the model and
the loss, both are written out in an error.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upweight.errors import SpecError, listed
from upweight.methods.perturbation import relabeled
from upweight.task.arrays import TARGET_KEYS
from upweight.task.data import ArrayData, Data, IndexedData, Subset, read_data
from upweight.task.task import Reader, Task

COUNTED = 16
"""Examples looked at, at each end of the data, to tell places from other numbers."""

FEWEST = 8
"""With fewer examples, classes in order are as likely as places."""


@dataclass(frozen=True)
class Reading:
    """How a batch of a training script is taken apart.

    Args:
        inputs: Keys or places of the entries that go into the model, in its order; of an entry
            inside of another a tuple of both.
        target: Of the entry that the output is held against.
        by_name: Whether inputs are passed by name, as `model(**inputs)`.
        as_one: Whether they are passed as one dict, `model({…})`.
    """

    inputs: tuple[Any, ...]
    target: Any
    by_name: bool = False
    as_one: bool = False

    def __str__(self) -> str:
        form = "{name}={entry}" if self.by_name else "{entry}"
        form = "{name!r}: {entry}" if self.as_one else form
        passed = ", ".join(
            form.format(name=_name(key), entry="batch" + "".join(f"[{k!r}]" for k in _path(key)))
            for key in self.inputs
        )
        if self.as_one:
            passed = f"{{{passed}}}"
        return f"model({passed}) against batch[{self.target!r}]"

    @property
    def code(self) -> str:
        """As `forward` of a Task."""
        return f"forward=lambda model, batch: ({str(self).replace(' against ', ', ')})"

    def of(self, batch: Any) -> Any:
        """(inputs…, target) of a batch, or a dict of them; others as they are."""
        keys = [_path(key)[0] for key in (*self.inputs, self.target)]
        # Queries may come as (X, y) beside a training set of dicts, or without their places.
        if isinstance(batch, dict) != isinstance(self.target, str):
            return batch
        if isinstance(batch, tuple) and len(batch) <= max(keys):
            return batch
        if self._is_read(batch):
            return batch
        inputs = {_name(key): _entry(batch, key) for key in self.inputs}
        target = batch[self.target]
        if self.by_name:
            return {**inputs, self.target if self.target in TARGET_KEYS else "target": target}
        return (inputs, target) if self.as_one else (*inputs.values(), target)

    def _is_read(self, batch: Any) -> bool:
        """Whether entries that lay in another one lie there no more."""
        inside = [_path(key)[0] for key in self.inputs if len(_path(key)) > 1]
        return any(
            (isinstance(batch, dict) and key not in batch) or isinstance(batch[key], Tensor)
            for key in inside
        )


def _path(key: Any) -> tuple[Any, ...]:
    """Where an entry is: its key, or that of the entry it lies in and its own."""
    return key if isinstance(key, tuple) else (key,)


def _name(key: Any) -> Any:
    return _path(key)[-1]


def _entry(batch: Any, key: Any) -> Any:
    for each in _path(key):
        batch = batch[each]
    return batch


@dataclass(frozen=True)
class Picked:
    """A collate function whose batches are taken apart."""

    collate: Any
    reading: Reading

    def __call__(self, examples: list[Any]) -> Any:
        return self.reading.of(_plain(self.collate(examples)))


@dataclass(frozen=True)
class Batches(Reader):
    """How data of a training script become those of a task: `Task.reads`."""

    reading: Reading

    fits_own_data = False

    def training(self, given: Any) -> Data:
        return picked(read_data(given), self.reading)

    def queries(self, given: Any) -> Data:
        return picked(read_data(given), self.reading)

    def relabeled(self, example: Any, label: Any) -> Any:
        return relabeled(example, label)


def picked(data: Data, reading: Reading) -> Data:
    """The same examples, taken apart; those that already are stay as they are."""
    if isinstance(data, Subset):
        return replace(data, data=picked(data.data, reading))
    if isinstance(data, ArrayData):
        return replace(data, arrays=reading.of(data.arrays))
    if isinstance(data, IndexedData) and not isinstance(data.collate, Picked):
        return IndexedData(data.dataset, Picked(data.collate, reading), data.notes)
    return data


def reading_of(task: Task, data: Data) -> tuple[Reading | None, str]:
    """How the batches of these data are taken apart, and a line of it.

    Returns:
        None and no line, where all entries but the last are inputs, or inputs by name, as
        `upweight.task.task.call_model` has it; and where nothing is found that is called by.

    Raises:
        SpecError: Two readings are possible, or an entry is left over.

    Cost: up to 32 examples are read, and the model is called on 16 where there is a choice.
    """
    n = len(data)
    if n == 0:
        return None, ""
    first = _plain(data.batch(0, min(COUNTED, n)))
    entries = _entries(first)
    if len(entries) < 2:
        return None, ""
    signature = inspect.signature(task.model.forward)
    places = _places(data, entries)
    texts = {key for key, value in entries.items() if _is_text(value)}
    asis = _as_it_is(first, entries, texts, signature)
    if asis is not None and _hold_others(entries, texts) and not _working([asis], task, first):
        asis = None
    if asis is not None and not places | texts:
        return None, ""
    kept = [key for key in entries if key not in places | texts]
    found = _candidates(first, kept, signature, task)
    if asis is None and not _working(found, task, first):
        found = _inside(first, kept, signature, task) or found
    if asis is not None:
        found = _working([asis, *found], task, first) or found
    if len(found) > 1:
        raise SpecError(*_several(entries, found))
    if not found:
        _require_none_left_over(first, kept, signature, entries, task)
        return None, ""
    if found[0] == asis:
        return None, ""
    why = [
        f"batch[{key!r}], {'its place in the data' if key in places else 'a text'}"
        for key in entries
        if key not in kept
    ]
    left_out = f"; left out: {' and '.join(why)}" if why else ""
    return found[0], f"of each example, {found[0]}{left_out}"


def _plain(batch: Any) -> Any:
    """A list as a tuple, a mapping as a dict."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return tuple(batch) if type(batch) is list else batch


def _entries(batch: Any) -> dict[Any, Any]:
    """The entries of a batch by key or place; none where it is neither a tuple nor a dict."""
    if isinstance(batch, dict):
        return batch if all(isinstance(key, str) for key in batch) else {}
    return dict(enumerate(batch)) if isinstance(batch, tuple) else {}


def _places(data: Data, entries: dict[Any, Any]) -> set[Any]:
    """The entries that count the examples, whose names are not those of targets."""
    n = len(data)
    if n < FEWEST:
        return set()
    start = max(0, n - COUNTED)
    last = _entries(_plain(data.batch(start, n)))
    return {
        key
        for key, value in entries.items()
        if key not in TARGET_KEYS and _counts(value, 0) and _counts(last.get(key), start)
    }


def _as_it_is(
    batch: Any, entries: dict[Any, Any], texts: set[Any], signature: inspect.Signature
) -> Reading | None:
    """As `call_model` has it, where `forward` takes the entries so."""
    if isinstance(batch, dict):
        targets = [key for key in TARGET_KEYS if key in entries]
        if len(targets) != 1:
            return None
        inputs = tuple(key for key in entries if key != targets[0])
        # A text is an input where `forward` names it, rather than taking anything.
        is_taken = not texts.intersection(inputs) or set(inputs) <= signature.parameters.keys()
        reading = Reading(inputs, targets[0], by_name=True)
        return reading if is_taken and _binds(signature, names=inputs) else None
    reading = Reading(tuple(range(len(batch) - 1)), len(batch) - 1)
    return reading if not texts and _binds(signature, len(batch) - 1) else None


def _candidates(
    batch: Any, kept: list[Any], signature: inspect.Signature, task: Task
) -> list[Reading]:
    """Readings of the entries that are kept, each of which `forward` takes."""
    if not isinstance(batch, dict):
        fits = len(kept) > 1 and _binds(signature, len(kept) - 1)
        return [Reading(tuple(kept[:-1]), kept[-1])] if fits else []
    targets = [key for key in TARGET_KEYS if key in kept]
    found = []
    for target in targets if len(targets) == 1 else kept:
        inputs = tuple(key for key in kept if key != target)
        if inputs and _binds(signature, names=inputs):
            found.append(Reading(inputs, target, by_name=True))
        elif len(inputs) == 1 and _binds(signature, 1):
            found.append(Reading(inputs, target))
    if len(targets) == 1:
        return found
    # No entry has a name that targets have: the model and the loss tell.
    return _working(found, task, batch)


def _hold_others(entries: dict[Any, Any], texts: set[Any]) -> bool:
    """Whether an entry is a tuple, list or dict of entries."""
    return any(
        isinstance(value, Mapping | tuple | list) and key not in texts
        for key, value in entries.items()
    )


def _inside(batch: Any, kept: list[Any], signature: inspect.Signature, task: Task) -> list[Reading]:
    """Readings of entries that lie in one entry, and of entries that `forward` takes as one dict.

    Those with which the model and the loss can be called.
    """
    is_dict, found = isinstance(batch, dict), []
    named = [key for key in TARGET_KEYS if key in kept]
    for target in (named if len(named) == 1 else kept) if is_dict else kept[-1:]:
        inputs = tuple(key for key in kept if key != target)
        whole = batch[inputs[0]] if len(inputs) == 1 else None
        if isinstance(whole, Mapping) and _binds(signature, names=list(whole)):
            found.append(Reading(tuple((inputs[0], k) for k in whole), target, by_name=True))
        elif isinstance(whole, list | tuple) and _binds(signature, len(whole)):
            found.append(Reading(tuple((inputs[0], k) for k in range(len(whole))), target))
        elif is_dict and _binds(signature, 1):
            found.append(Reading(inputs, target, as_one=True))
    return _working(found, task, batch)


def _working(readings: Sequence[Reading], task: Task, batch: Any) -> list[Reading]:
    """Those that the model and the loss take; of several with the same losses the first."""
    found: list[tuple[Reading, Any]] = []
    for reading in readings:
        try:
            with torch.no_grad():
                read = task.to_device(reading.of(batch))
                outputs, targets = task.call(task.held_theta(), read)
                task.loss.check(outputs, targets)
                losses = task.loss(outputs, targets)
        except Exception:
            continue
        if any(torch.equal(losses, others) for _, others in found):
            continue
        if isinstance(outputs, Tensor) and outputs.ndim > 0:
            found.append((reading, losses))
    return [reading for reading, _ in found]


def _several(entries: dict[Any, Any], found: Sequence[Reading]) -> tuple[str, ...]:
    ways = "; or ".join(each.code for each in found)
    return (
        "Which entries of an example go into the model, and which is its target, must be clear.",
        f"batches of {_told(entries)}, of which {len(found)} readings fit the model and the loss: "
        f"{'; '.join(map(str, found))}.",
        "an entry that counts the examples, or names that do not say which is the target.",
        f"say which: attribute(upweight.Task(model, loss, {ways}), train, queries).",
    )


def _require_none_left_over(
    batch: Any, kept: list[Any], signature: inspect.Signature, entries: dict[Any, Any], task: Task
) -> None:
    """Refuse an entry beside one input and the target, if these are clear: it may be a weight."""
    is_dict = isinstance(batch, dict)
    targets = [key for key in TARGET_KEYS if key in kept]
    if len(kept) < 3 or not _binds(signature, 1) or (is_dict and len(targets) != 1):
        return
    readings = [
        Reading((key,), target)
        for target in (targets if is_dict else kept[1:])
        for key in (kept if is_dict else kept[:1])
        if key != target
    ]
    able = _working(readings, task, batch)
    if len(able) != 1:
        return
    reading, target = able[0], f"batch[{able[0].target!r}]"
    extra = [key for key in kept if key not in (*reading.inputs, reading.target)]
    weighted = reading.code.replace(f"{target})", f"({target}, batch[{extra[0]!r}]))")
    raise SpecError(
        "Every entry of an example must be an input, the target, its place, or a text.",
        f"batches of {_told(entries)}: beside {reading}, "
        f"{listed([f'batch[{key!r}]' for key in extra])} is left over.",
        "a weight of each example in the loss, which changes the scores; or an entry that training "
        "did not use.",
        f"if training did not use it, attribute(upweight.Task(model, loss, {reading.code}), train, "
        "queries); if it is a weight, attribute(upweight.Task(model, upweight.Weighted(loss), "
        f"{weighted}), train, queries).",
    )


def _told(entries: dict[Any, Any]) -> str:
    return ", ".join(f"[{key!r}] {_shape(value)}" for key, value in entries.items())


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return "text" if _is_text(value) else type(value).__name__


def _binds(signature: inspect.Signature, count: int = 0, names: Sequence[str] = ()) -> bool:
    try:
        signature.bind(*range(count), **dict.fromkeys(map(str, names)))
    except TypeError:
        return False
    return True


def _counts(values: Any, start: int) -> bool:
    if not isinstance(values, Tensor) or values.ndim != 1 or values.is_floating_point():
        return False
    return torch.equal(values.cpu().long(), torch.arange(start, start + len(values)))


def _is_text(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and isinstance(values[0], str)
