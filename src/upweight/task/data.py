"""Examples in a fixed order: example i is the same example everywhere.

We take what users have and keep only what has an index: arrays, a map-style `Dataset`, or the
dataset and the collate function of a `DataLoader`, whose shuffling is left out and said so.
"""

import abc
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import RandomSampler, SequentialSampler

from upweight._typing import Batch
from upweight.errors import DataError, ShapeError, message
from upweight.runtime.fingerprint import item_checksum
from upweight.task.seen import Seen

_D = TypeVar("_D", bound="Data")


class Data(abc.ABC):
    """n examples in a fixed order."""

    notes: tuple[str, ...] = ()
    """What was left out of the object these data came from; shown in provenance."""

    seen: Seen | None = None
    """What each example was when it was first read; None: nobody asks."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """n."""

    @abc.abstractmethod
    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        """The examples at `indices`, in that order."""

    def batch(self, start: int, stop: int) -> Batch:
        """The examples start … stop − 1."""
        return self.take(range(start, stop))

    def batches(self, size: int, begin: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """The examples from `begin` on, as `(start, stop, batch)`; the last may be smaller."""
        for start in range(begin, len(self), size):
            stop = min(start + size, len(self))
            yield start, stop, self.batch(start, stop)

    def subset(self, indices: Sequence[int]) -> "Data":
        """The examples at `indices` as data of their own."""
        return Subset(self, tuple(int(i) for i in indices))

    def watched(self) -> "Data":
        """The same data, which raise DataChanged where an example is not what it first was.

        Data of a class of one's own are returned as they are.
        """
        return self


@dataclass(frozen=True, eq=False)
class ArrayData(Data):
    """Examples held in tensors: a tuple or dict whose leaves have n on their leading axis."""

    arrays: Any

    def __len__(self) -> int:
        n = len(tree_leaves(self.arrays)[0])
        return n if self.seen is None else self.seen.length(n)

    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        index = torch.as_tensor(np.asarray(indices), dtype=torch.long)
        taken = tree_map(lambda a: a.index_select(0, index.to(a.device)), self.arrays)
        if self.seen is not None:
            self.seen.arrays(index, tree_leaves(taken))
        return taken

    def batch(self, start: int, stop: int) -> Batch:
        taken = tree_map(lambda a: a[start:stop], self.arrays)
        if self.seen is not None:
            self.seen.arrays(torch.arange(start, min(stop, len(self))), tree_leaves(taken))
        return taken

    def watched(self) -> "ArrayData":
        return _watched(self)


@dataclass(frozen=True, eq=False)
class IndexedData(Data):
    """Examples of a map-style dataset, put together by `collate`."""

    dataset: Any
    collate: Callable[[list[Any]], Any] = default_collate
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        n = len(self.dataset)
        return n if self.seen is None else self.seen.length(n)

    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        places = [int(i) for i in indices]
        items = [self.dataset[i] for i in places]
        if self.seen is not None:  # before collate, which may pad each batch otherwise
            self.seen.require(torch.tensor(places), torch.tensor(list(map(item_checksum, items))))
        batch = self.collate(items)
        if isinstance(batch, Mapping):
            return dict(batch)
        return tuple(batch) if isinstance(batch, list) else batch

    def watched(self) -> "IndexedData":
        return _watched(self)


@dataclass(frozen=True, eq=False)
class Subset(Data):
    """Some examples of other data."""

    data: Data
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        return self.data.take([self.indices[int(i)] for i in indices])

    def watched(self) -> "Subset":
        return Subset(self.data.watched(), self.indices)


def _watched(data: _D) -> _D:
    result = copy.copy(data)
    object.__setattr__(result, "seen", Seen(len(data)))
    return result


def as_data(data: Any) -> Data:
    """Indexed data from what the user holds.

    Args:
        data: `(X, y)` as tensors or NumPy arrays (several inputs: `(X1, X2, y)`), a dict of them,
            a map-style `Dataset`, a `DataLoader`, or `Data`.

    Raises:
        DataError: The object has no index, or its examples differ from what was trained on.
        ShapeError: The arrays disagree about the number of examples.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, DataLoader):
        return _from_loader(data)
    if isinstance(data, IterableDataset):
        raise DataError(_no_index(data))
    if isinstance(data, Mapping):
        return _from_arrays(dict(data))
    if isinstance(data, tuple) and data and all(_is_array_tree(part) for part in data):
        return _from_arrays(data)
    if isinstance(data, list) and data and all(_is_array(part) for part in data):
        return _from_arrays(tuple(data))
    if isinstance(data, tuple) or (isinstance(data, list) and any(map(_is_array, data))):
        raise DataError(
            message(
                "Data given as (X, y) must be arrays or tensors, all of them.",
                f"parts of type {', '.join(type(part).__name__ for part in data) or 'none'}.",
                "targets in a Python list, or no targets.",
                "convert each part: np.asarray(y) or torch.tensor(y).",
            )
        )
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not _is_array(data):
        return IndexedData(data)
    raise DataError(_no_index(data))


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _is_array_tree(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(_is_array_tree(part) for part in value)
    return _is_array(value)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise DataError(
            message(
                "Examples must be numbers.",
                f"an array of dtype {array.dtype}.",
                "strings, categories or rows of different lengths in the data.",
                "encode them as the model was trained with, then pass the encoded arrays.",
            )
        )
    # Tensors cannot view negative strides or read-only memory without a warning.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.as_tensor(array)


def _from_arrays(arrays: Any) -> ArrayData:
    tensors = tree_map(_as_tensor, arrays)
    leaves = tree_leaves(tensors)
    sizes = [tuple(leaf.shape) for leaf in leaves]
    if not leaves or any(leaf.ndim == 0 for leaf in leaves) or len({s[0] for s in sizes}) != 1:
        raise ShapeError(
            message(
                "All arrays of the data must have the same number of examples on their first axis.",
                f"shapes {sizes}.",
                "inputs and targets of different splits, or a transposed array.",
                "pass (X, y) with X [n, ...] and y [n, ...].",
            )
        )
    return ArrayData(tensors)


def _from_loader(loader: DataLoader) -> IndexedData:  # type: ignore[type-arg]
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(_no_index(loader.dataset))
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    random = isinstance(sampler, RandomSampler)
    whole = isinstance(sampler, SequentialSampler | DistributedSampler) or (
        random and not sampler.replacement and sampler.num_samples == len(dataset)
    )
    # None: the loader does not batch, and its dataset may hold batches in place of examples.
    custom_batches = type(loader.batch_sampler) is not torch.utils.data.BatchSampler
    if not whole or custom_batches:
        raise DataError(
            message(
                "A DataLoader must visit every example of its dataset once.",
                f"one with {type(sampler).__name__} and {type(loader.batch_sampler).__name__}.",
                "a sampler that picks a subset, weights examples or groups them by size; or "
                "batch_size=None.",
                "pass the dataset itself, or Subset(dataset, indices) for the examples it visits.",
            )
        )
    notes = []
    if random or isinstance(sampler, DistributedSampler):
        notes.append(
            f"the DataLoader's {type(sampler).__name__} was left out: example i is dataset[i]"
        )
    if loader.drop_last and loader.batch_size and len(dataset) % loader.batch_size:
        notes.append("the DataLoader's drop_last was left out: every example is counted")
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=4)
    return IndexedData(dataset, loader.collate_fn, tuple(notes))


def _no_index(data: Any) -> str:
    return message(
        "Data must be indexed: example i must be the same example each time it is asked for.",
        f"an object of type {type(data).__name__}.",
        "a stream (IterableDataset or generator), or inputs without targets.",
        "pass (X, y) arrays, a dict of arrays or a map-style Dataset; for a stream, "
        "list(stream) makes a Dataset.",
    )


WORKING_BYTES = 256 * 2**20
"""Memory one pass may use for what it forms per example; larger batches gain no speed."""


def batch_size(values_per_example: int, element_bytes: int, most: int = 2048) -> int:
    """How many examples to take at once when each needs `values_per_example` numbers."""
    return max(1, min(most, WORKING_BYTES // max(1, values_per_example * element_bytes)))
