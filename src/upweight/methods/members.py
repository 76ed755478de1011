"""The models that a method averages over, as its history says."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.errors import SpecError
from upweight.task.task import Task
from upweight.training.subset_models import SubsetModels
from upweight.training.trajectory import Trajectory


def members_given(task: Task, history: Any) -> list[Float[Tensor, " p"]]:
    """θ of every member: of models, state dicts or vectors θ, or of the kept states of a run.

    Raises:
        SpecError: There are none, or one differs from the task's model in more than θ.
    """
    given: Any = history
    if isinstance(history, Trajectory):
        given = [history.state(t).theta for t in history.kept[1:]]
    elif isinstance(history, SubsetModels):
        if names := sorted({name for some in history.others for name in some}):
            raise _another_model(task, f"members with another {names[0]!r}, which is no part of θ")
        given = list(history.theta[1.0])
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
    return [_theta(task, each) for each in given]


def _theta(task: Task, given: Any) -> Float[Tensor, " p"]:
    layout = task.layout
    if isinstance(given, Tensor) and given.shape == (layout.size,):
        return given.detach().to(layout.device, layout.dtype)
    state = given.state_dict() if isinstance(given, nn.Module) else given
    if not isinstance(state, Mapping):
        shown = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise _another_model(task, f"a member of {shown}")
    learned = {id(p) for name, p in task.model.named_parameters() if name in layout.names}
    every = task.model.named_parameters(remove_duplicate=False)
    tied = {name for name, p in every if id(p) in learned} - set(layout.names)
    for name, mine in task.model.state_dict().items():
        if name in tied:  # a second name of what is in θ
            continue
        other = state.get(name)
        if name in layout.names and (other is None or other.shape != mine.shape):
            raise _another_model(task, f"a member without {name!r} of shape {tuple(mine.shape)}")
        # What is no part of θ stays as the task's model has it.
        if name not in layout.names and other is not None and not _same(other, mine):
            raise _another_model(task, f"a member with another {name!r}, which is no part of θ")
    params = {name: state[name].detach() for name in layout.names}
    return layout.flatten(params).to(layout.device, layout.dtype).clone()


def _same(other: Tensor, mine: Tensor) -> bool:
    return other.shape == mine.shape and torch.equal(other.to(mine), mine)


def _another_model(task: Task, given: str) -> SpecError:
    return SpecError(
        "A member is the task's model with another θ: a module, a state dict, or θ [p].",
        f"{given}.",
        "models of another architecture, with running statistics of their own, or with other "
        "frozen layers.",
        f"make it as the task's model was made, or pass flat θ of {task.layout.size} numbers; "
        "average the scores of models that differ in more.",
    )
