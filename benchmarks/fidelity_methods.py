"""What a contender of `fidelity.py` is: made from a problem, fitted, asked for scores.

Peers are imported inside their functions, so that only the one that runs must be there.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fidelity_networks import Problem, measured
from torch import Tensor


class Method(abc.ABC):
    """One way to score, of one library."""

    def __init__(self, problem: Problem, folder: Path) -> None:
        self.problem, self.folder = problem, folder

    @abc.abstractmethod
    def fit(self) -> None:
        """What does not depend on queries."""

    @abc.abstractmethod
    def scores(self, measure: str) -> Tensor:
        """S = ∂m/∂w `[q, n]` of a measurement, or what is proportional to it."""

    def self_scores(self) -> Tensor:
        """One number per training example, the larger the sooner it is inspected."""
        raise NotImplementedError


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    make: Callable[[Problem, Path], Method]
    library: str
    settings: str
    refusal: Callable[[Problem], str | None] = lambda problem: None
    """Why it cannot be asked about this task."""
    measures: Callable[[Problem], tuple[str, ...]] = lambda problem: problem.measures
    calibrated: bool = True
    """Whether the scores claim a size, so that a slope means something."""
    detects: Callable[[Problem], bool] = lambda problem: True
    """Whether it has a self-influence that can be afforded."""
    predicts: bool = True
    """Whether it has scores of queries; a ranking alone has none."""


def chunks(problem: Problem, size: int) -> list[tuple[Tensor, Tensor]]:
    """Training data a part at a time."""
    return list(zip(problem.X.split(size), problem.y.split(size), strict=True))


def log_odds(problem: Problem) -> Tensor:
    """∂ℓ/∂f of each query, with f the model output that TRAK predicts: what turns f into the loss.

    classes   f = log p/(1 − p)      ℓ = log(1 + e^−f)      −(1 − p)
    number    f the output           ℓ = ½ (f − y)²         f − y
    text      f = log p              ℓ = −f                 −1
    """
    with torch.no_grad():
        outputs = problem.model(problem.Xq)
    if problem.kind == "number":
        return (outputs - problem.yq)[:, 0]
    if problem.kind == "text":
        return -torch.ones(len(outputs))
    # In float64: p of a query that the model is sure of is 1 in float32.
    return -measured("classes", "margin", outputs.double(), problem.yq).neg().sigmoid()
