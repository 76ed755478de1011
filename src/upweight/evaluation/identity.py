"""What a retrained number depends on: recipe, task, data, question."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from upweight.scores import library_versions
from upweight.task.data import Data
from upweight.task.identity import contents, described, subject
from upweight.task.task import Task


def identity(
    recipe: Any, task: Task, train: Data, queries: Data, measure: Callable[..., Tensor]
) -> dict[str, str]:
    """Everything a retrained measurement depends on but the weights.

    Raises:
        SpecError: A part cannot be told from another of its kind.
    """
    # A class or function that makes a model is told by its name and code, but not by what it calls:
    # what it makes says the rest.
    untrained = getattr(recipe, "untrained", None)
    start = {} if untrained is None else {"untrained": described(untrained(task).model)}
    about = subject(task, train)
    return {
        **start,
        **about,
        "recipe": described(recipe),
        "measure": described(measure),
        "train": f"{len(train)} examples {about['train']}",
        "queries": f"{len(queries)} examples {contents(queries)}",
        "versions": repr({k: v for k, v in library_versions().items() if k != "python"}),
    }
