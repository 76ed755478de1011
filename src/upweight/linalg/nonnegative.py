"""min over x ≥ 0 of ½ xᵀAx − bᵀx, for a few unknowns.

An active set method: unknowns leave zero one at a time, and go back to it where a solution without
bounds would make them negative (Lawson & Hanson 1974, ch. 23; in terms of A and b Bro & de Jong
1997).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight.errors import NotConverged

STEPS = 30
"""Unknowns that change sides, per unknown, before it is given up."""


def nonnegative(matrix: Float[Tensor, "k k"], rhs: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """argmin over x ≥ 0 of ½ xᵀAx − bᵀx.

    At the minimum x ≥ 0, Ax − b ≥ 0 and one of each pair is zero, to rounding.

    Args:
        matrix: A, symmetric positive definite.
        rhs: b.

    Raises:
        NotConverged: A is singular to rounding.

    Cost: about k solves of at most k unknowns.
    """
    x = torch.zeros_like(rhs)
    free = torch.zeros_like(rhs, dtype=torch.bool)
    noise = 1e3 * torch.finfo(rhs.dtype).eps * rhs.abs().max()
    for _ in range(STEPS * len(rhs)):
        slope = rhs - matrix @ x
        slope[free] = -torch.inf
        entering = int(slope.argmax())
        if not bool(slope[entering] > noise):
            return x
        free[entering] = True
        x = _within_bounds(matrix, rhs, x, free)
    raise NotConverged(
        "Non-negative least squares needs a matrix that is positive definite.",
        f"one of {len(rhs)} unknowns with which no set of bounds was found to hold.",
        "predictors that are copies of each other.",
        "leave one of them out.",
        solution=x,
    )


def _within_bounds(
    matrix: Float[Tensor, "k k"],
    rhs: Float[Tensor, " k"],
    x: Float[Tensor, " k"],
    free: Bool[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """The minimum over the free unknowns, of which those that would turn negative are fixed."""
    while True:
        found = torch.zeros_like(x)
        found[free] = torch.linalg.solve(matrix[free][:, free], rhs[free])
        negative = free & (found <= 0)
        if not bool(negative.any()):
            return found
        # One that is on its bound already has no way to go.
        way = torch.where(x > 0, x / (x - found), 0.0)
        length = way[negative].min()
        x = x + length * (found - x)
        free &= ~(negative & (x <= torch.finfo(x.dtype).eps * x.abs().max()))
        x[~free] = 0.0
