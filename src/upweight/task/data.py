"""Examples in a fixed order: example i is the same example everywhere.

We take what users have and keep only what has an index: arrays, a map-style `Dataset`, or the
dataset and the collate function of a `DataLoader`, whose shuffling is left out and said so.
"""

import abc
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from upweight._typing import Batch
from upweight.errors import DataError, message
from upweight.runtime.fingerprint import item_checksum
from upweight.runtime.selection import places
from upweight.task.arrays import arrays_of, is_array, require_columns, signed
from upweight.task.batches import Form, form
from upweight.task.collate import collate
from upweight.task.rows import Rows
from upweight.task.seen import Seen

_D = TypeVar("_D", bound="Data")

PREDICTED = "queries without labels: the class that the network predicts stands for each"
"""A note of such queries."""


class Data(abc.ABC):
    """n examples in a fixed order."""

    notes: tuple[str, ...] = ()
    """What was left out of the object these data came from; shown in provenance."""

    seen: Seen | None = None
    """What each example was when it was first read; None: nobody asks."""

    given: Rows | None = None
    """What the user calls the examples, and their values as they were given; None: not known."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """n."""

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{type(self).__name__} of {len(self)} examples{notes}"

    @abc.abstractmethod
    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        """The examples at `indices`, in that order."""

    def batch(self, start: int, stop: int) -> Batch:
        """The examples start … stop − 1."""
        return self.take(range(start, stop))

    def places(self, start: int, stop: int) -> Int[Tensor, " b"]:
        """Where the examples start … stop − 1 are in the whole data that these are taken from.

        Labels that are drawn belong to that place: also of what a removal leaves.
        """
        return torch.arange(start, stop)

    @cached_property
    def form(self) -> Form:
        """How the examples lie in a batch."""
        found = form(self.take, len(self))
        # Only `IndexedData` can tell lists of one entry per example from others as it reads them.
        return Form(uncut="lists with an entry per example") if found.listed else found

    def together(self, size: int) -> int:
        """Of `size` examples, how many may be read as one batch: all that can be told apart."""
        return size if self.form.uncut is None else 1

    @property
    def form_notes(self) -> tuple[str, ...]:
        """That examples are read one at a time, if they are."""
        if self.form.uncut is None:
            return ()
        return (
            f"examples are read one at a time, because {self.form.uncut}: slower by as many times "
            "as a batch could hold examples (tensors with the examples on their first axis would "
            "be read together)",
        )

    def batches(self, size: int, begin: int = 0) -> Iterator[tuple[int, int, Batch]]:
        """The examples from `begin` on, as `(start, stop, batch)`.

        The last may be smaller; all hold one example where those of a batch cannot be told apart.
        """
        size = self.together(size)
        for start in range(begin, len(self), size):
            stop = min(start + size, len(self))
            yield start, stop, self.batch(start, stop)

    def groups(self, size: int) -> "Iterator[tuple[int, Data]]":
        """(first, examples), so many of them at a time as data of their own."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            is_all = stop - start == len(self)
            yield start, self if is_all else self.subset(range(start, stop))

    def subset(self, indices: Sequence[int]) -> "Data":
        """The examples at `indices`, or where a mask is True, as data of their own.

        Raises:
            ShapeError: There is no such example, or the mask is of another length.
        """
        return Subset(self, tuple(places(indices, len(self), "Examples", repeats=True)))

    def noted(self, notes: tuple[str, ...]) -> "Data":
        """The same data, with more notes."""
        if not notes:
            return self
        result = copy.copy(self)
        object.__setattr__(result, "notes", (*self.notes, *notes))
        return result

    def watched(self) -> "Data":
        """The same data, which raise DataChanged where an example is not what it first was.

        Data of a class of one's own are returned as they are.
        """
        return self


@dataclass(frozen=True, eq=False, repr=False)
class ArrayData(Data):
    """Examples held in tensors: a tuple or dict whose leaves have n on their leading axis.

    A leaf may be None, which then is None in every batch.
    """

    arrays: Any
    notes: tuple[str, ...] = ()
    given: Rows | None = field(default=None, repr=False)

    def __len__(self) -> int:
        n = next(len(leaf) for leaf in tree_leaves(self.arrays) if leaf is not None)
        return n if self.seen is None else self.seen.length(n)

    @property
    def form(self) -> Form:  # type: ignore[override]
        return Form()

    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        index = torch.as_tensor(np.asarray(indices), dtype=torch.long)
        taken = tree_map(
            lambda a: None if a is None else a.index_select(0, index.to(a.device)), self.arrays
        )
        if self.seen is not None:
            self.seen.arrays(index, _held(taken))
        return taken

    def batch(self, start: int, stop: int) -> Batch:
        taken = tree_map(lambda a: None if a is None else a[start:stop], self.arrays)
        if self.seen is not None:
            self.seen.arrays(torch.arange(start, min(stop, len(self))), _held(taken))
        return taken

    def watched(self) -> "ArrayData":
        return _watched(self)


@dataclass(frozen=True, eq=False, repr=False)
class IndexedData(Data):
    """Examples of a map-style dataset, put together by `collate`."""

    dataset: Any
    collate: Callable[[list[Any]], Any] = collate
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        n = len(self.dataset)
        return n if self.seen is None else self.seen.length(n)

    @cached_property
    def form(self) -> Form:
        return form(self._read, len(self))

    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        batch: Batch = self.form.marked(self._read(indices))
        return batch

    def _read(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Any:
        at = [int(i) for i in indices]
        items = [self.dataset[i] for i in at]
        if self.seen is not None:  # before collate, which may pad each batch otherwise
            self.seen.require(torch.tensor(at), torch.tensor(list(map(item_checksum, items))))
        batch = self.collate(items)
        if isinstance(batch, Mapping):
            batch = dict(batch)
        return tree_map(signed, tuple(batch) if isinstance(batch, list) else batch)

    def watched(self) -> "IndexedData":
        return _watched(self)


@dataclass(frozen=True, eq=False, repr=False)
class Subset(Data):
    """Some examples of other data."""

    data: Data
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def form(self) -> Form:  # type: ignore[override]
        return self.data.form

    @property
    def given(self) -> Rows | None:  # type: ignore[override]
        """Those of the whole at these indices: without names of their own, their places in it."""
        whole = self.data.given
        return None if whole is None else whole.take(self.indices)

    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        return self.data.take([self.indices[int(i)] for i in indices])

    def places(self, start: int, stop: int) -> Int[Tensor, " b"]:
        return torch.cat([self.data.places(i, i + 1) for i in self.indices[start:stop]])

    def watched(self) -> "Subset":
        return Subset(self.data.watched(), self.indices)


@dataclass(frozen=True, eq=False)
class Joined(Data):
    """Two data sets, one after the other: all that a model is asked at once."""

    first: Data
    second: Data

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def take(self, indices: Any) -> Batch:
        n = len(self.first)
        at = [int(i) for i in indices]
        if all(i < n for i in at):
            return self.first.take(at)
        if all(i >= n for i in at):
            return self.second.take([i - n for i in at])
        return tree_map(lambda *parts: torch.cat(parts), *(self.take([i]) for i in at))

    def batches(self, size: int, begin: int = 0) -> Any:
        """Batches of one of the two: nothing of one need fit beside the other."""
        for offset, data in ((0, self.first), (len(self.first), self.second)):
            if begin < offset + len(data):
                for start, stop, batch in data.batches(size, max(0, begin - offset)):
                    yield start + offset, stop + offset, batch


def _held(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if leaf is not None]


def _watched(data: _D) -> _D:
    result = copy.copy(data)
    object.__setattr__(result, "seen", Seen(len(data)))
    return result


def as_data(data: Any) -> Data:
    """Indexed data from what the user holds.

    Args:
        data: `(X, y)` as tensors or NumPy arrays (several inputs: `(X1, X2, y)`), a dict of them,
            a map-style `Dataset` or list of examples, a `DataLoader`, or `Data`. Tables of numbers
            and of True and False are arrays.

    What is left out of it is a warning and a note of the data.

    Raises:
        DataError: The object has no index, its parts are no numbers, or it holds other examples
            than what was trained on.
        ShapeError: The arrays disagree about the number of examples.
    """
    found = read_data(data)
    if found is not data:
        for note in found.notes:
            warnings.warn(note, UserWarning, stacklevel=3)
    return found


def read_data(data: Any) -> Data:
    """As `as_data`, without warnings: for who says the notes."""
    if isinstance(data, Data):
        return data
    if isinstance(data, DataLoader):
        return _from_loader(data)
    if isinstance(data, IterableDataset):
        raise DataError(_no_index(data))
    if isinstance(data, Mapping):
        return _from_arrays(dict(data))
    if isinstance(data, list) and any(map(is_array, data)):
        require_columns(data)
        return _from_arrays(tuple(data))
    if isinstance(data, tuple):
        return _from_arrays(data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not is_array(data):
        return IndexedData(data)
    raise DataError(_no_index(data))


def _from_arrays(arrays: Any) -> ArrayData:
    tensors, notes = arrays_of(arrays)
    parts = arrays if isinstance(arrays, tuple) else ()
    rows = Rows.of(parts[0], parts[-1] if len(parts) > 1 else None) if parts else None
    return ArrayData(tensors, notes, rows)


def _visited(sampler: Any) -> str:
    """What to pass in place of a loader with this sampler."""
    whole = "pass the dataset itself, or Subset(dataset, indices) for the examples it visits."
    if isinstance(sampler, SubsetRandomSampler):
        return "torch.utils.data.Subset(loader.dataset, sorted(loader.sampler.indices))."
    if not isinstance(sampler, WeightedRandomSampler):
        return whole
    return (
        "the dataset itself for the objective that counts every example alike. For the one that "
        "was trained, upweight.Weighted(loss) takes targets (y, v), with v[i] = n times "
        "sampler.weights[i] / sampler.weights.sum(), how often an epoch of n draws takes "
        "example i: attribute(model, (X, (y, v)), queries, upweight.Weighted(loss))."
    )


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
            "A DataLoader must visit every example of its dataset once.",
            f"one with {type(sampler).__name__} and {type(loader.batch_sampler).__name__}.",
            "a sampler that picks a subset, weights examples or groups them by size; or "
            "batch_size=None.",
            _visited(sampler),
        )
    notes = []
    if random or isinstance(sampler, DistributedSampler):
        notes.append(
            f"the DataLoader's shuffling ({type(sampler).__name__}) was left out: example i is "
            "dataset[i]"
        )
    if loader.drop_last and loader.batch_size and len(dataset) % loader.batch_size:
        notes.append("the DataLoader's drop_last was left out: every example is counted")
    own = loader.collate_fn is not default_collate
    return IndexedData(dataset, loader.collate_fn if own else collate, tuple(notes))


def _no_index(data: Any) -> str:
    if isinstance(data, Iterator):
        return message(
            "Data must be indexed: example i must be the same example each time it is asked for.",
            f"an object of type {type(data).__name__}, which can be read once.",
            "iter(loader), or a generator.",
            "the DataLoader or the data set itself; of a stream of examples list(stream), of a "
            "stream of batches [x for batch in stream for x in zip(*batch)].",
        )
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
