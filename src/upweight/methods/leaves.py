"""Predictions of trees from the training rows that share a leaf, with the splits held.

    f(x) = Σᵢ Wᵢ(x) yᵢ          of trees that are averaged, or fitted to residuals one by one
    p(x) = softmax F(x)         of boosted classifiers, with Newton steps of the log loss as leaves

and their derivatives in the weight of a row, with which its leaf's value is taken. Numbers alone:
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


QUERIES_AT_ONCE = 16
"""Whose derivatives are taken together: each takes as much memory as the boosting itself."""

NO_CURVATURE = 1e-150
"""A leaf of less has the value 0, by scikit-learn's own rule."""


@dataclass(frozen=True, eq=False)
class BoostedClasses:
    """A boosted classifier, boosted again with the leaf of every row held.

        F⁰ₖ = link of the share of class k, Σᵢ wᵢbᵢ yᵢₖ / Σᵢ wᵢbᵢ;   or 0
        Fₖ(x) += η c Σ_{i in the leaf of x} wᵢbᵢ (yᵢₖ − pᵢₖ) / (Σ wᵢbᵢ pᵢₖ(1 − pᵢₖ) + λ)

    with p of the F before, for every class of an iteration (Friedman 2001, Algorithms 5 and 6). Of
    two classes there is one F, the log-odds of the second.

    Args:
        places: By iteration and class, the leaf of every row, the training rows first.
        weights: bᵢ, the sample weights.
        rate: η.
        factor: c; (K − 1)/K of K classes in `GradientBoostingClassifier`, otherwise 1.
        ridge: λ.
        centred: Whether F⁰ is that of the shares.
    """

    places: Sequence[Sequence[Int[Tensor, " r"]]]
    weights: Float[Tensor, " n"]
    rate: float
    factor: float = 1.0
    ridge: float = 0.0
    centred: bool = True

    def outputs(
        self, rows: Int[Tensor, " q"], y: Float[Tensor, "n c"], w: Float[Tensor, " n"]
    ) -> Float[Tensor, "q c"]:
        """p of some rows, boosted with weights w of the training rows."""
        n, b, several = len(y), w * self.weights, y.shape[1] > 2
        own = y if several else y[:, 1:]
        shares = (b @ own) / b.sum()
        start = (shares.log() - shares.log().mean()) if several else (shares / (1 - shares)).log()
        F = (start if self.centred else torch.zeros_like(start)).expand(n, -1)
        at = F[:1].expand(len(rows), -1)
        for iteration in self.places:
            p = F.softmax(dim=1) if several else F.sigmoid()
            steps, asked = [], []
            for k, place in enumerate(iteration):
                count = int(place.max()) + 1
                pulls = _sums(b * (own[:, k] - p[:, k]), place[:n], count)
                curvature = _sums(b * p[:, k] * (1 - p[:, k]), place[:n], count) + self.ridge
                known = curvature.abs() > NO_CURVATURE
                value = torch.where(known, pulls / torch.where(known, curvature, 1.0), 0.0)
                steps.append(self.rate * self.factor * value[place[:n]])
                asked.append(self.rate * self.factor * value[place[rows]])
            F, at = F + torch.stack(steps, dim=1), at + torch.stack(asked, dim=1)
        if several:
            return at.softmax(dim=1)
        return torch.cat([(-at).sigmoid(), at.sigmoid()], dim=1)

    def weight_derivatives(
        self, rows: Int[Tensor, " q"], y: Float[Tensor, "n c"], slopes: Float[Tensor, "q c"]
    ) -> Float[Tensor, "q n"]:
        """Σ_c slopes[q, c] ∂p_c(x_q)/∂wᵢ at w = 1, back through all trees.

        Cost: T (n + q) for each query, and as much memory for some of them together.
        """
        parts: list[Tensor] = []
        for start in range(0, len(rows), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            with torch.enable_grad():
                w = torch.ones(len(y), dtype=y.dtype, requires_grad=True)
                values = (slopes[some] * self.outputs(rows[some], y, w)).sum(dim=1)
            each = torch.eye(len(values), dtype=y.dtype)
            parts += torch.autograd.grad(values, w, each, is_grads_batched=True)
        return torch.cat(parts)


def _sums(values: Tensor, place: Int[Tensor, " n"], count: int) -> Tensor:
    """Σ over the rows of each leaf."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, place, values)
