"""Effects: what removals do, Δm_q when the examples of a group are taken out together.

Δm[q, e] = m_q without group e − m_q            to first order −Σ_{i ∈ e} S[q, i]
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upweight.errors import NonFinite, ShapeError
from upweight.notation import count
from upweight.provenance import Answered, Context, Provenance
from upweight.runtime.selection import places

Groups = tuple[tuple[int, ...], ...]

NEWTON, FIRST_ORDER, PLUGIN = "Newton step", "first order", "plug-in"

Derivatives = TypeVar("Derivatives", Tensor, NDArray[np.float64])


def without(derivatives: Derivatives) -> Derivatives:
    """Δm without examples, to first order, from ∂m/∂w or a sum of it: w goes from 1 to 0, so −S."""
    return -derivatives


def reweighted(
    derivatives: Float[Tensor, "q n"], weights: Float[Tensor, " n"]
) -> Float[Tensor, " q"]:
    """Δm where the data weights become w, to first order: Σᵢ S[q, i] (wᵢ − 1).

    Raises:
        ShapeError: There is not one weight per column.
        NonFinite: A weight is NaN or infinite.
    """
    n = derivatives.shape[1]
    if tuple(weights.shape) != (n,):
        raise ShapeError(
            f"Data weights have one entry per column: shape ({n},).",
            f"shape {tuple(weights.shape)}.",
            "weights of another data set.",
            "start from torch.ones(n) and change entries.",
        )
    if not bool(weights.isfinite().all()):
        first = int((~weights.isfinite()).nonzero()[0])
        raise NonFinite(
            "Data weights must be finite.",
            f"{float(weights[first])} for column {first}.",
            "a weight computed by a division by 0, or missing in a table.",
            "give 0 to what is left out and 1 to what stays as it is.",
        )
    return derivatives @ (weights.to(derivatives) - 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Answered):
    """Δm[q, e]: the change of every measurement when each group is removed.

    Args:
        values: One row per query, one column per group.
        groups: The training examples that each column removes together.
        how: What predicted it: "Newton step", "first order", or "plug-in", m(θ̂ + Δθ) − m(θ̂).
        provenance: How it was made.
        linear: ∇m · Δθ of the same groups, beside "plug-in".
        context: The live task and data.

    Raises:
        ShapeError: `values` or `linear` is no matrix with one column per group.
        NonFinite: An entry is NaN or infinite.
    """

    values: Float[Tensor, "q e"]
    groups: Groups
    how: str
    provenance: Provenance
    linear: Float[Tensor, "q e"] | None = None
    context: Context | None = None

    def __post_init__(self) -> None:
        linear = self.values if self.linear is None else self.linear
        if self.values.shape != (*self.values.shape[:1], len(self.groups)) or (
            linear.shape != self.values.shape
        ):
            raise ShapeError(
                "Effects are a matrix [q, e] with a column for each group.",
                f"values {tuple(self.values.shape)}, linear {tuple(linear.shape)}, "
                f"{len(self.groups)} groups.",
                "effects put together by hand.",
                "use the Effects that removal(...) returns.",
            )
        bad = (~(self.values.isfinite() & linear.isfinite())).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NonFinite(
                "Effects must be finite.",
                f"{float(self.values[row, column])} for query {row}, group {column}.",
                "a measurement that overflows once the group is gone.",
                "use a float64 model, or look at that group by itself.",
            )

    def __len__(self) -> int:
        return len(self.values)

    def _shape_and_unit(self) -> tuple[str, str]:
        shape = f"{count(len(self), 'query')} × {count(len(self.groups), 'removal')}"
        return shape, f"Δm, {self.how}"

    def of(self, groups: Iterable[Any] | None = None) -> "Effects":
        """The effects of some of the groups, in the order asked for. None: each example by itself.

        Raises:
            ShapeError: A group was not removed.
        """
        asked = as_groups(groups, self.provenance.n)
        place = {frozenset(group): k for k, group in enumerate(self.groups)}
        missing = [group for group in asked if frozenset(group) not in place]
        if missing:
            raise ShapeError(
                "Effects are known of the groups that were removed.",
                f"asked for {missing[:5]}, not among {len(self.groups)} groups that start with "
                f"{list(self.groups[:5])}.",
                "removals of other examples.",
                "use fitted.removal(queries, measure, groups=...) with these groups.",
            )
        at = [place[frozenset(group)] for group in asked]
        linear = None if self.linear is None else self.linear[:, at]
        return Effects(self.values[:, at], asked, self.how, self.provenance, linear, self.context)


def as_groups(groups: Iterable[Any] | None, n: int) -> Groups:
    """Groups of n training examples: each an index, several, or a mask. None: each by itself.

    Raises:
        ShapeError: There is no group, or an index is out of range or repeated within its group.
    """
    if groups is None:
        return tuple((i,) for i in range(n))
    found = tuple(tuple(places(g, n, "Training examples", least=1)) for g in groups)
    if not found:
        raise ShapeError(
            "A removal needs something to remove.",
            "groups=[], no group at all.",
            "a filter that matched nothing.",
            "leave groups out to remove each example by itself, or pass groups=[[0, 1]].",
        )
    return found


def first_order(
    derivatives: Float[Tensor, "q n"], groups: Sequence[Sequence[int]]
) -> Float[Tensor, "q e"]:
    """−Σ_{i ∈ e} S[q, i] of every group."""
    if all(len(group) == 1 for group in groups):
        return without(derivatives[:, [group[0] for group in groups]])
    return without(torch.stack([derivatives[:, list(g)].sum(dim=1) for g in groups], dim=1))
