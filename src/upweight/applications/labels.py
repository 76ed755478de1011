"""Classes as labels: which there are, what each costs a row, and data in which some are changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from upweight._typing import Batch, Params
from upweight.errors import DataError, UnsupportedModel
from upweight.methods.perturbation import relabeled
from upweight.task.arrays import TARGET_KEYS
from upweight.task.data import ArrayData, Data
from upweight.task.losses import Bernoulli, CrossEntropy, Loss, Weighted
from upweight.task.measures import AT_ONCE, Measure
from upweight.task.rows import Rows
from upweight.task.task import Task
from upweight.task.torch_losses import Rescaled


@dataclass(frozen=True, eq=False)
class Classes:
    """The labels that a row can have.

    Args:
        names: As the user knows them.
        targets: As the loss takes them, one row per class.
        loss: ℓ(f, y) of a label alone: without weights of examples or classes, not smoothed.
    """

    names: tuple[Any, ...]
    targets: Tensor
    loss: Loss

    @classmethod
    def of(cls, task: Task, train: Data) -> "Classes":
        """Those of a task.

        Raises:
            UnsupportedModel: Its targets are no classes.
        """
        example = train.take([0])
        with torch.no_grad():
            outputs, given = task.outputs(task.theta(), task.to_device(example))
        y, loss = _unweighted(given), plain(task.loss)
        known = None if task.reads is None else task.reads.classes
        if known is not None:
            assert task.reads is not None
            rows = [task.reads.relabeled(example, name) for name in known]
            with torch.no_grad():
                found = [task.outputs(task.theta(), task.to_device(row))[1] for row in rows]
            return cls(tuple(known), torch.cat([_unweighted(each) for each in found]), loss)
        if isinstance(y, Tensor) and not y.is_floating_point() and outputs.ndim == 2 == y.ndim + 1:
            count = outputs.shape[1]
            return cls(tuple(range(count)), torch.arange(count, device=y.device).to(y), loss)
        if isinstance(loss, Bernoulli) and outputs[0].numel() == 1:
            return cls((0, 1), y.new_tensor([0.0, 1.0]).reshape(2, *y.shape[1:]), loss)
        raise UnsupportedModel(
            "Labels that may be wrong are classes: one integer per row, or one yes or no.",
            f"targets {tuple(getattr(y, 'shape', ()))} of {getattr(y, 'dtype', type(y).__name__)} "
            f"for outputs {tuple(outputs.shape)}, {task.loss!r}.",
            "a regression, a label per position, or several labels per row.",
            "for a regression rank rows by self_influence(), or by their residuals without them "
            "from loo_outputs() of the fitted method.",
        )

    def losses(self, outputs: Float[Tensor, "b *o"]) -> Float[Tensor, "b c"]:
        """ℓ(fᵢ, c) of every label."""
        b = len(outputs)
        columns = [
            self.loss(outputs, y.expand(b, *y.shape)) for y in self.targets.to(outputs.device)
        ]
        return torch.stack(columns, dim=1)

    def indices(self, targets: Any) -> Int[Tensor, " b"]:
        """Which class each target is.

        Raises:
            DataError: One is none of them: a label that is ignored, or shared between classes.
        """
        y = _unweighted(targets)
        table = self.targets.to(y.device)
        same = (y.reshape(len(y), 1, -1) == table.reshape(1, len(table), -1)).all(dim=2)
        if not bool(same.any(dim=1).all()):
            row = int((~same.any(dim=1)).nonzero()[0, 0])
            raise DataError(
                f"Every row must have one of the {len(self.names)} labels.",
                f"row {row} of a batch has the target {y[row].tolist()}.",
                "targets that are left out (ignore_index), probabilities of classes, or shares of "
                "successes (binomial counts), which are no labels.",
                "leave such rows out of the data.",
            )
        return same.int().argmax(dim=1)

    def index(self, label: Any) -> int:
        """The class that the user calls `label`.

        Raises:
            DataError: There is none.
        """
        plain = label.item() if hasattr(label, "item") else label  # a scalar of NumPy or PyTorch
        if plain not in self.names:
            raise DataError(
                "A new label must be one of the classes.",
                f"{label!r}, where the classes are {list(self.names[:10])!r}.",
                "a class that the model has never seen, or its number in place of its name.",
                "pass a label as it was given to the fit.",
            )
        return self.names.index(plain)


@dataclass(frozen=True, eq=False)
class IsRight(Measure):
    """m = 1 where the label has the least loss of all labels, else 0."""

    classes: Classes

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        outputs, targets = task.outputs(params, batch)
        best = self.classes.losses(outputs).argmin(dim=1)
        return (best == self.classes.indices(targets)).to(outputs.dtype)


def classes_gone(
    task: Task, theta: Tensor, train: Data, groups: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Any, int]]:
    """Groups of rows that hold all rows of a class: (place of the group, class, how many rows).

    None where the targets are no classes.
    """
    try:
        classes = Classes.of(task, train)
        targets = outputs_at(task, theta, train)[1]
        labels = torch.cat([classes.indices(each) for each in targets]).cpu()
    except (UnsupportedModel, DataError):  # no classes, or shares of successes
        return
    counts = torch.bincount(labels, minlength=len(classes.names))
    if int(counts[counts > 0].min()) > max(map(len, groups)):
        return
    for k, group in enumerate(groups):
        inside = torch.bincount(labels[list(group)], minlength=len(counts))
        for c in ((inside == counts) & (counts > 0)).nonzero()[:, 0].tolist():
            yield k, classes.names[c], int(counts[c])


def outputs_at(
    task: Task, theta: Float[Tensor, " p"], data: Data
) -> tuple[Float[Tensor, "n *o"], list[Any]]:
    """f(xᵢ) of every example, and the targets of each batch."""
    outputs, targets = [], []
    with torch.no_grad():
        for _, _, batch in data.batches(AT_ONCE):
            f, y = task.outputs(theta, task.to_device(batch))
            outputs.append(f)
            targets.append(y)
    return torch.cat(outputs), targets


def with_labels(task: Task, data: Data, labels: Mapping[int, Any]) -> Data:
    """The same data with new labels by row, as the user knows them; class weights go with them."""
    change = relabeled if task.reads is None else task.reads.relabeled
    rows = {i: change(data.take([i]), label) for i, label in labels.items()}
    return with_targets_of(data, rows)


def with_targets_of(data: Data, rows: Mapping[int, Batch]) -> Data:
    """The same data, in which some rows have the targets of these batches of one."""
    if isinstance(data, ArrayData):
        places = [*rows]
        return replace(data, arrays=_put(data.arrays, places, [rows[i] for i in places]))
    return Relabeled(data, rows)


@dataclass(frozen=True, eq=False)
class Relabeled(Data):
    """Other data, in which some rows have other labels: those of `rows`, batches of one."""

    data: Data
    rows: Mapping[int, Batch]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def form(self) -> Any:
        return self.data.form

    def take(self, indices: Sequence[int] | Int[Tensor, " b"]) -> Batch:
        batch, at = self.data.take(indices), [int(i) for i in indices]
        places = [k for k, i in enumerate(at) if i in self.rows]
        return _put(batch, places, [self.rows[at[k]] for k in places]) if places else batch

    @property
    def given(self) -> Rows | None:  # type: ignore[override]
        return self.data.given

    def places(self, start: int, stop: int) -> Int[Tensor, " b"]:
        return self.data.places(start, stop)


def _put(batch: Any, places: Sequence[int], rows: Sequence[Any]) -> Any:
    """A batch with the targets of some rows replaced by those of batches of one."""
    key: Any = len(batch) - 1
    if isinstance(batch, dict):
        key = next(k for k in TARGET_KEYS if k in batch)
    leaves, structure = tree_flatten(batch[key])
    leaves = [leaf.clone() for leaf in leaves]
    for place, row in zip(places, rows, strict=True):
        for leaf, value in zip(leaves, tree_leaves(row[key]), strict=True):
            leaf[place] = value[0]
    targets = tree_unflatten(leaves, structure)
    if isinstance(batch, dict):
        return {**batch, key: targets}
    parts = (*batch[:-1], targets)
    return type(batch)._make(parts) if hasattr(batch, "_make") else parts


def _unweighted(targets: Any) -> Any:
    """y of targets y or (y, v)."""
    return targets[0] if isinstance(targets, tuple | list) else targets


def plain(loss: Loss) -> Loss:
    """The loss of a label alone: without weights of examples or classes, not smoothed."""
    if isinstance(loss, Weighted):
        return plain(loss.base)
    if isinstance(loss, CrossEntropy):
        return replace(loss, weight=None, label_smoothing=0.0)
    if isinstance(loss, Bernoulli):
        return Bernoulli()
    if isinstance(loss, Rescaled) and loss.factor == 1.0:
        return plain(loss.base)  # a mean over the outputs of an example, of which labels have one
    return loss
