"""What an estimator of S must offer; evaluation, applications and report know no more of it."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from upweight.scores import Scores, Unit
from upweight.task.task import Task


@runtime_checkable
class Fitted(Protocol):
    """A method that has seen the task and its training data; immutable."""

    def attribute(self, queries: Any, measure: Any = ...) -> Scores:
        """S[q, i] for every query and training example."""
        ...

    def self_influence(self) -> Float[Tensor, " n"]:
        """S[i, i] with m = ℓ on the training set."""
        ...


@runtime_checkable
class Method(Protocol):
    """A spec of an estimator: hyperparameters only."""

    @property
    def unit(self) -> Unit:
        """What its scores mean."""
        ...

    def fit(self, task: Task, train: Any) -> Fitted:
        """Learn from the training data what every query needs."""
        ...
