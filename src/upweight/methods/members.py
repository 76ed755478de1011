"""The models that a method averages over, as its history says."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from upweight.errors import SpecError
from upweight.task.task import Task
from upweight.training.function import others_of, state_of
from upweight.training.subset_models import SubsetModels
from upweight.training.trajectory import Trajectory

Member = tuple[Float[Tensor, " p"], Mapping[str, Tensor]]
"""θ, and what else of a model is another than the task's, by name: running statistics."""


def members_given(task: Task, history: Any) -> list[Member]:
    """Every member: of models, state dicts or vectors θ, or of the kept states of a run.

    A vector θ and a state of a run are read with what else the task's model has.

    Raises:
        SpecError: There are none, or one is no model of the task's kind.
    """
    given: Any = history
    if isinstance(history, Trajectory):
        given = [history.state(t).theta for t in history.kept[1:]]
    elif isinstance(history, SubsetModels):
        ends = history.theta[1.0]
        others: Sequence[Mapping[str, Tensor]] = history.others or [{}] * len(ends)
        return [(_theta(task, theta), each) for theta, each in zip(ends, others, strict=True)]
    elif isinstance(history, Tensor) and history.ndim == 2:
        given = list(history)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise SpecError(
            "The members of a mean are several models.",
            f"history={'None' if history is None else type(history).__name__}.",
            "history left out, an empty list, or one model that is not in a list.",
            "pass a list of models, of state dicts or of vectors θ, or a Trajectory; models that a "
            "recipe trains are uw.training.subset_models(recipe, task, train, 5, 1.0).",
        )
    return [_member(task, each) for each in given]


def thetas_given(task: Task, history: Any) -> list[Float[Tensor, " p"]]:
    """θ of every member, for a method that takes the rest of each model to be the task's.

    Raises:
        SpecError: As for `members_given`, or a member differs in more than θ.
    """
    members = members_given(task, history)
    for _, others in members:
        if others:
            raise SpecError(
                "Here a member is the task's model with another θ, and nothing else of it differs.",
                f"a member with another {min(others)!r}, which is no part of θ.",
                "running statistics of its own, or other frozen layers.",
                f"pass flat θ of {task.layout.size} numbers, to be read with what else the task's "
                "model has; or average the scores of these models.",
            )
    return [theta for theta, _ in members]


def _member(task: Task, given: Any) -> Member:
    if isinstance(given, Tensor) and given.shape == (task.layout.size,):
        return _theta(task, given), {}
    state = state_of(given) if isinstance(given, nn.Module) else given
    if not isinstance(state, Mapping):
        shown = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise _another_model(task, f"a member of {shown}")
    for name, mine in state_of(task.model).items():
        other, is_learned = state.get(name), name in task.layout.names
        if (other is None and is_learned) or (other is not None and other.shape != mine.shape):
            raise _another_model(task, f"a member without {name!r} of shape {tuple(mine.shape)}")
    theta = task.layout.flatten({name: state[name] for name in task.layout.names})
    return _theta(task, theta).clone(), others_of(task, state)


def _theta(task: Task, given: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    return given.detach().to(task.layout.device, task.layout.dtype)


def _another_model(task: Task, given: str) -> SpecError:
    return SpecError(
        "A member is the task's model with another θ: a module, a state dict, or θ [p].",
        f"{given}.",
        "models of another architecture.",
        f"make it as the task's model was made, or pass flat θ of {task.layout.size} numbers; "
        "average the scores of models that differ in more.",
    )
