"""Predictions of trees as sums over the training rows that share a leaf, with the splits held.

    f(x) = Σᵢ Wᵢ(x) yᵢ          of trees that are averaged, or fitted to residuals one by one

and their derivatives in the weight of a row, with which its leaf's mean is taken. Numbers alone:
the leaves come from an adapter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Leaves:
    """The leaf of every row in every tree, the training rows first.

    Args:
        places: By tree, numbered from 0.
        weights: bᵢ, how often each training row counts in each tree: sample weight times draws.
        rate: η of boosting; None: the trees are averaged.
        ridge: λ that is added to Σ bᵢ of each leaf of a boosted tree.
        centred: Whether boosting starts at the mean of y; at 0 otherwise.
    """

    places: Sequence[Int[Tensor, " r"]]
    weights: Sequence[Float[Tensor, " n"]]
    rate: float | None = None
    ridge: float = 0.0
    centred: bool = True

    def label_weights(self, rows: Int[Tensor, " q"]) -> Float[Tensor, "q n"]:
        """Wᵢ(x) of some rows: ∂f(x)/∂yᵢ with the splits held."""
        if self.rate is None:
            return sum(self._trees(rows), torch.zeros(())) / len(self.places)
        n, b = len(self.weights[0]), self.weights[0]
        first = b / b.sum() if self.centred else torch.zeros_like(b)
        A, of = first.repeat(n, 1), first.repeat(len(rows), 1)
        for place, b in zip(self.places, self.weights, strict=True):
            total = self._total(place[:n], b) + self.ridge
            inside = torch.zeros(len(total), n, dtype=b.dtype)
            inside[place[:n], torch.arange(n)] = b
            leaf = (inside - _sums(b[:, None] * A, place[:n], len(total))) / total[:, None]
            A, of = A + self.rate * leaf[place[:n]], of + self.rate * leaf[place[rows]]
        return of

    def weight_derivatives(
        self, rows: Int[Tensor, " q"], y: Float[Tensor, "n c"], slopes: Float[Tensor, "q c"]
    ) -> Float[Tensor, "q n"]:
        """Σ_c slopes[q, c] ∂f_c(x_q)/∂wᵢ at w = 1, where row i counts wᵢ bᵢ and splits are held.

            averaged    (1/T) Σ_t bᵢ 1[i in leaf] (yᵢ − f_t(x)) / Σ b
            boosted     by recursion: each leaf's mean of residuals moves with its rows' weights,
                        and with the residuals that the trees before it leave

        Cost: T q n; boosted T n (n + q), and n² numbers.
        """
        if self.rate is not None:
            return slopes * self._boosted(rows, y[:, 0], self.rate)
        found = torch.zeros(len(rows), len(y), dtype=y.dtype)
        pulls = slopes @ y.T
        for shares in self._trees(rows):
            here = (slopes * (shares @ y)).sum(dim=1, keepdim=True)
            found += shares * (pulls - here)
        return found / len(self.places)

    def _trees(self, rows: Int[Tensor, " q"]) -> Iterator[Float[Tensor, "q n"]]:
        """bᵢ 1[same leaf] / Σ b of each tree."""
        for place, b in zip(self.places, self.weights, strict=True):
            n = len(b)
            total = self._total(place[:n], b)
            same = place[rows][:, None] == place[:n]
            yield same * b / total[place[rows]][:, None]

    def _boosted(
        self, rows: Int[Tensor, " q"], y: Float[Tensor, " n"], rate: float
    ) -> Float[Tensor, "q n"]:
        n, b = len(y), self.weights[0]
        F = (b @ y / b.sum() if self.centred else y.new_zeros(())).repeat(n)
        first = b * (y - F) / b.sum() if self.centred else torch.zeros_like(y)
        D, of = first.repeat(n, 1), first.repeat(len(rows), 1)
        for place, b in zip(self.places, self.weights, strict=True):
            at = place[:n]
            total, residual = self._total(at, b) + self.ridge, y - F
            value = _sums(b * residual, at, len(total)) / total
            own = torch.zeros(len(total), n, dtype=y.dtype)
            own[at, torch.arange(n)] = b * (residual - value[at])
            leaf = (own - _sums(b[:, None] * D, at, len(total))) / total[:, None]
            D, of = D + rate * leaf[at], of + rate * leaf[place[rows]]
            F = F + rate * value[at]
        return of

    def _total(self, place: Int[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, " l"]:
        return _sums(b, place, int(place.max()) + 1)


def _sums(values: Tensor, place: Int[Tensor, " n"], count: int) -> Tensor:
    """Σ over the rows of each leaf."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, place, values)
