"""How the examples of a data set become a batch, where the user's loader does not say.

PyTorch's own rule, with three additions: a list of numbers inside an example is an array (the
default format of `datasets.Dataset`), an entry that is None in every example stays None, and
examples that do not fit together are named.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from upweight.errors import DataError, message
from upweight.task.arrays import is_listed_numbers, ragged


def collate(examples: list[Any]) -> Any:
    """A batch of examples, each a tuple or dict of arrays and numbers.

    Raises:
        DataError: Their entries differ in number, name or shape, or are nothing to compute with.
    """
    first = examples[0]
    if isinstance(first, Mapping):
        keys = list(first)
        for example in examples[1:]:
            if not isinstance(example, Mapping) or set(example) != set(keys):
                raise DataError(_unlike(first, example))
        return {key: _entry(f"entry {key!r}", [e[key] for e in examples]) for key in keys}
    if type(first) in (tuple, list):
        for example in examples[1:]:
            if not isinstance(example, Sequence) or len(example) != len(first):
                raise DataError(_unlike(first, example))
        return tuple(_entry(f"entry {k}", [e[k] for e in examples]) for k in range(len(first)))
    return _entry("the examples", examples)


def _entry(name: str, values: list[Any]) -> Any:
    if all(value is None for value in values):
        return None
    if all(isinstance(value, list) and is_listed_numbers(value) for value in values):
        values = [_listed(name, value, values) for value in values]
    if all(isinstance(value, Tensor | np.ndarray) for value in values):
        if len({tuple(value.shape) for value in values}) > 1:
            raise DataError(ragged(f"{name} of a batch", values, range(len(values))))
    if all(isinstance(value, np.unsignedinteger) for value in values):
        return torch.as_tensor(np.asarray(values))  # PyTorch makes no tensor of a list of uint64
    try:
        return default_collate(values)
    except (TypeError, RuntimeError) as error:
        kinds = sorted({type(value).__name__ for value in values})
        raise DataError(
            "Examples must hold tensors, arrays and numbers.",
            f"{name} of type {', '.join(kinds)}. PyTorch says: {str(error).splitlines()[0]}",
            "some examples lack this entry."
            if len(kinds) > 1 and "NoneType" in kinds
            else "objects (images, None, text among numbers) that a transform or a collate "
            "function of training turns into tensors.",
            "give the data set that transform, or pass a DataLoader with collate_fn=.",
        ) from error


def _listed(name: str, value: list[Any], values: list[Any]) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(value))
    except ValueError as error:
        raise DataError(ragged(f"{name} of a batch", values, range(len(values)))) from error


def _unlike(first: Any, other: Any) -> str:
    return message(
        "All examples of a data set must have the same entries.",
        f"one example of {_entries(first)} and one of {_entries(other)}.",
        "entries that only some examples have.",
        "fill them in the data set, or pass a DataLoader with collate_fn=.",
    )


def _entries(example: Any) -> str:
    if isinstance(example, Mapping):
        return f"keys {sorted(map(str, example))}"
    if isinstance(example, Sequence):
        return f"{len(example)} entries"
    return f"type {type(example).__name__}"
