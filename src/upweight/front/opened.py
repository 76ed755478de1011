"""A task of whatever was trained: a PyTorch module, an estimator, regression results, or a task."""

from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from upweight.errors import DataError, SpecError, message
from upweight.front.batches import Batches, picked, reading_of
from upweight.task.arrays import is_array
from upweight.task.data import PREDICTED, Data, as_data, read_data
from upweight.task.losses import Bernoulli, CrossEntropy
from upweight.task.modes import evaluated, training_notes
from upweight.task.penalties import NoPenalty
from upweight.task.recipe import Recipe
from upweight.task.reduced_losses import by_example
from upweight.task.task import Task, require_task
from upweight.task.torch_losses import Rescaled


@dataclass(frozen=True, eq=False)
class Opened:
    """What was trained, and on what."""

    task: Task
    train: Data
    loss: Any
    """As the user gave it; None where it was known."""

    model: Any = None
    """What was trained, as the user gave it."""

    said: tuple[str, ...] = ()
    """What was found out in place of being asked, and what was left out."""


def is_model(value: Any) -> bool:
    """Whether it is what `opened` makes a task of, other than a task."""
    is_fitted = hasattr(value, "get_params") and hasattr(value, "fit")
    is_other = _is_of_statsmodels(value) or is_trainer(value)
    return isinstance(value, nn.Module) or is_fitted or is_other


def own_recipe(model: Any) -> Recipe | None:
    """The library's own fit of an estimator or of results; None for what has none, a network."""
    if _is_of_statsmodels(model):
        import upweight.adapters.statsmodels as smx

        return smx.recipe(model)
    if is_trainer(model):
        import upweight.adapters.transformers as hf

        return hf.from_trainer(model).recipe
    if not is_model(model) or isinstance(model, nn.Module):
        return None
    import upweight.adapters.sklearn as sk

    return sk.recipe(model)


def _is_of_statsmodels(value: Any) -> bool:
    return type(value).__module__.startswith("statsmodels.")


def is_trainer(value: Any) -> bool:
    """Whether it is a `transformers.Trainer`."""
    return any(
        each.__name__ == "Trainer" and each.__module__.startswith("transformers.")
        for each in type(value).__mro__
    )


def opened(model: Any, train: Any, loss: Any = None, penalty: Any = None) -> Opened:
    """A task and its training data.

    Args:
        model: A `torch.nn.Module`, a fitted scikit-learn estimator or Pipeline, statsmodels
            results, a `transformers.Trainer`, or a `Task`.
        train: The training set, as for `as_data`; for scikit-learn (X, y) or (X, y, sample_weight)
            as given to `fit`; of statsmodels results or a Trainer None, or what they were fitted
            on.
        loss: For a module: as for `Task`. A model of transformers whose class says by which loss it
            is trained needs none; with one, its data are read as without.
        penalty: For a module: as for `Task`.

    Raises:
        SpecError: The loss is missing or said twice.
        UnsupportedModel: There is no way to make a task of it.
        UpweightError: From the adapter.
    """
    if not is_model(model):
        require_task(model)
    if isinstance(model, Task):
        require_alone(loss, penalty, "a Task has its loss and penalty")
        data = model.training(train) if model.reads is not None else read_data(train)
        return Opened(model, data, None, model, data.notes)
    if isinstance(model, nn.Module):
        import upweight.adapters.transformers as hf

        given = NoPenalty() if penalty is None else penalty
        ready, said = evaluated(model)
        if hf.kind(model) is not None:
            task = hf.task(ready, penalty=given, loss=loss)
            loaded = _loaded(train)
            data, said = task.training(loaded).noted(said), (*said, *getattr(loaded, "notes", ()))
            return Opened(task, data, loss, model, said)
        if loss is not None:
            return _of_script(Task(ready, loss, given), train, loss, model, said)
        hf.require_own_examples(model)
        raise SpecError(_no_loss(train))
    if is_trainer(model):
        import upweight.adapters.transformers as hf

        require_alone(loss, penalty, "a Trainer's model has its own loss")
        found = hf.from_trainer(model)
        made = found.data if train is None else found.task.training(train)
        said = () if found.task.model is model.model else training_notes(model.model)
        return Opened(found.task, made.noted(found.notes), None, model, said)
    if _is_of_statsmodels(model):
        import upweight.adapters.statsmodels as smx

        require_alone(loss, penalty, "statsmodels results know their likelihood")
        task, own = smx.task(model)
        return Opened(task, own if train is None else task.training(train), None, model)
    import upweight.adapters.sklearn as sk

    require_alone(loss, penalty, "an estimator knows its objective")
    if not isinstance(train, tuple | list) or len(train) not in (2, 3):
        raise SpecError(
            "The training data of an estimator are (X, y), or (X, y, sample_weight).",
            f"a {type(train).__name__}.",
            "X alone, or a Dataset.",
            "attribute(estimator, (X, y), (X_test, y_test)), as they were given to fit.",
        )
    task, own = sk.task(model, *train)
    return Opened(task, own, None, model)


def _of_script(task: Task, train: Any, loss: Any, model: Any, said: tuple[str, ...]) -> Opened:
    """What a training script holds: how its batches and its loss are to be read is found out."""
    data = read_data(train)
    said = (*said, *data.notes)
    with task.in_step():
        reading, line = reading_of(task, data)
        if reading is not None:
            task = Task(task.model, task.loss, task.penalty, reads=Batches(reading))
            data, said = picked(data, reading), (*said, line)
        own, line = by_example(task, data)
        if line:
            task, said = Task(task.model, own, task.penalty, reads=task.reads), (*said, line)
    return Opened(
        task, data.noted(tuple(x for x in said if x not in data.notes)), loss, model, said
    )


def queries_of(task: Task, queries: Any, train: Data | None = None) -> Data:
    """Queries of a task; of inputs alone the classes that a network predicts stand for each.

    Args:
        task: What was trained.
        queries: As for `as_data`; or one example, as a data set returns it.
        train: Training data, which tell one input from several.

    Raises:
        DataError: There are no labels, and the loss is of no classes.
        UpweightError: As from `Task.queries`.
    """
    is_alone = isinstance(queries, Tensor | np.ndarray)
    is_single = isinstance(queries, tuple | list) and len(queries) == 1 and is_array(queries[0])
    if task.reads is not None and not isinstance(task.reads, Batches):
        return task.queries(_loaded(queries))
    if not (is_alone or is_single):
        given = [queries] if _is_one_example(queries, task, train) else queries
        return read_data(given) if task.reads is None else task.queries(given)
    inputs = torch.as_tensor(queries if is_alone else queries[0])
    if train is not None and _is_one_input(inputs, train):
        inputs = inputs[None]
    loss = task.loss.base if isinstance(task.loss, Rescaled) else task.loss
    found = None
    if isinstance(loss, CrossEntropy | Bernoulli):
        alone = Task(task.model, loss)
        with torch.no_grad(), alone.in_step():
            outputs, _ = alone.call(alone.held_theta(), alone.to_device((inputs, None)))
        if isinstance(loss, CrossEntropy) and outputs.ndim == 2:
            found = outputs.argmax(dim=1)
        elif isinstance(loss, Bernoulli) and outputs[:1].numel() == 1:
            found = (outputs > 0).to(outputs.dtype)
    if found is None:
        raise DataError(
            f"Queries of a network with {loss!r} need their targets.",
            f"inputs alone, of shape {tuple(inputs.shape)}.",
            "predictions for which no target is known yet.",
            "pass (X, y); to ask about the predictions themselves any y, such as zeros, with "
            "measure=upweight.Logit(0), which does not look at it.",
        )
    return as_data((inputs, found.cpu())).noted((PREDICTED,))


def _loaded(given: Any) -> Any:
    """A `DataLoader` as data, whose notes are said in place of warnings; others as they are."""
    return read_data(given) if isinstance(given, DataLoader) else given


def _is_one_example(given: Any, task: Task, train: Data | None) -> bool:
    """Whether it is an example as a data set returns it, rather than arrays of examples.

    A part that is a number tells; else every part has an axis less than in a batch of training
    data. A model of sequences may take the wrong one of the two without a word.
    """
    if not isinstance(given, tuple | dict):
        return False
    parts = given.values() if isinstance(given, dict) else given
    if any(isinstance(part, Number) or (is_array(part) and np.ndim(part) == 0) for part in parts):
        return True
    if train is None or not len(train):
        return False
    read = task.reads.reading.of(given) if isinstance(task.reads, Batches) else given
    batch = train.batch(0, 1)
    if isinstance(read, dict) and isinstance(batch, dict) and set(read) >= set(batch):
        read = {key: read[key] for key in batch}
    axes, expected = ([np.ndim(x) for x in tree_leaves(each) if is_array(x)]
                      for each in (read, batch))  # fmt: skip
    return bool(axes) and [k + 1 for k in axes] == expected


def _is_one_input(inputs: Tensor, train: Data) -> bool:
    """Whether it has the shape of the input of one training example, without an axis for more."""
    batch = train.batch(0, 1)
    first = batch[0] if isinstance(batch, tuple) else None
    return isinstance(first, Tensor) and inputs.shape == first.shape[1:] != inputs.shape[1:]


def require_alone(loss: Any, penalty: Any, why: str) -> None:
    """Refuse, by a SpecError, a loss or penalty of a model that has its own."""
    if loss is None and penalty is None:
        return
    name, given = ("loss", loss) if loss is not None else ("penalty", penalty)
    if is_array(given) or hasattr(given, "columns"):
        raise SpecError(
            "Rows and their labels are one argument: attribute(model, (X, y), (X_test, y_test)).",
            f"a {type(given).__name__} as the fourth argument, which is the loss of a network.",
            "X, y and X_test given one after the other.",
            "attribute(model, (X, y), (X_test, y_test)), or (X, y), X_test without labels; of "
            "statsmodels results attribute(results, None, frame).",
        )
    raise SpecError(
        "A loss and a penalty are said of a torch.nn.Module only.",
        f"{name}={given!r:.80}, where {why}.",
        "an argument left from a network.",
        f"leave {name}= out.",
    )


def _no_loss(train: Any) -> str:
    targets = train[-1] if isinstance(train, tuple) and train else None
    dtype = str(getattr(targets, "dtype", ""))
    seen = f", with targets of {dtype}" if dtype else ""
    return message(
        "The loss that a network was trained with must be said: its scores are derivatives of "
        "where that loss is least.",
        f"no loss{seen}.",
        "a module, which does not hold the loss that it was trained with.",
        "attribute(model, train, queries, loss): nn.CrossEntropyLoss() for classes, "
        "nn.BCEWithLogitsLoss() for yes or no, nn.MSELoss() for numbers, with the weights and the "
        "smoothing of training; or any function (outputs, targets) -> [b].",
    )
