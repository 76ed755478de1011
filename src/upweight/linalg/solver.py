"""The contract of a solver: how to undo A, whatever A is.

    state = solver.init(A)               depends on A only: factor once
    solution = solver.solve(state, b)    then solve for many b

A solver is a frozen bag of hyperparameters that has never seen an A.
"""

import abc
from typing import Generic, TypeVar

from jaxtyping import Float
from torch import Tensor

from upweight.linalg.operator import LinearOperator
from upweight.linalg.solution import Solution

State = TypeVar("State")


class Solver(abc.ABC, Generic[State]):
    """How to undo A. Subclasses are frozen dataclasses of hyperparameters."""

    @abc.abstractmethod
    def init(self, A: LinearOperator) -> State:
        """What depends on A only. Never raises for numbers: a failed factorization is recorded.

        Raises:
            ShapeError: A is not square.
        """

    @abc.abstractmethod
    def solve(self, state: State, b: Float[Tensor, "*k p"]) -> Solution:
        """Solve A x = b for each right-hand side along the leading axes.

        Never raises for a numerical failure: it is `Solution.result`.

        Raises:
            ShapeError: The last axis of b is not p.
            DtypeError: b has another dtype than A.
        """
