"""Few rows, or groups of rows, whose removal takes a reported number across a value.

    gap(S) = ± (φ(θ̂(w_S), w_S) − value)       w_S: 0 for the rows of S, else 1; crossed where > 0

`along` sorts once by dφ/dw (Broderick, Giordano & Meager 2020, §2) and looks for the shortest
prefix that crosses. `adaptive` fits again after every removal and linearizes there, since what a
row does depends on who has left (Kuschnig, Zens & Crespo Cuaresma 2021; Hu et al. 2024). `smaller`
exchanges members of a set. All are searches: a set they give crosses, and one that they do not give
may exist.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.applications.inference import Inference, Reported

SHORTLIST = 16
"""Units whose removal is evaluated by itself at each step: the best by first order."""

STEPS = 100
"""Steps a search takes before several units leave in each: from twice as many units on."""

ROUNDS = 12
"""Exchanges tried before a size is given up."""

ENTRIES = 4_000_000
"""Numbers in a matrix at a time."""


@dataclass(frozen=True)
class Crossing:
    """What is to happen: the estimate (0) or an end (±1) of its interval passes a value."""

    side: int
    upward: bool
    value: float

    @property
    def sign(self) -> float:
        """+1 where it is to rise, else −1."""
        return 1.0 if self.upward else -1.0

    def gap(self, reported: Reported) -> Float[Tensor, " m"]:
        """How far past it is; −∞ where there is no number."""
        past = self.sign * (reported.end(self.side) - self.value)
        return torch.nan_to_num(past, nan=-torch.inf)


@dataclass(frozen=True, eq=False)
class Units:
    """What may leave: rows one by one, or groups; `codes` has the unit of each row, from 0."""

    codes: Int[Tensor, " n"]
    count: int

    def limit(self, most: int | None) -> int:
        """The largest set to look for: as asked, or a tenth of them, at least 100; never all."""
        return min(max(100, self.count // 10) if most is None else most, self.count - 1)

    def weights(self, sets: Sequence[Sequence[int]]) -> Float[Tensor, "m n"]:
        """w_S of each set of units."""
        kept = torch.ones(len(sets), self.count, dtype=torch.float64)
        for row, members in zip(kept, sets, strict=True):
            row[list(members)] = 0
        return kept[:, self.codes]

    def sums(self, values: Float[Tensor, "n *k"]) -> Float[Tensor, "g *k"]:
        """Sums over the rows of each unit."""
        empty = torch.zeros(self.count, *values.shape[1:], dtype=values.dtype)
        return empty.index_add(0, self.codes, values)


@dataclass(frozen=True, eq=False)
class Linear:
    """One linearization at w = 1.

    Args:
        order: Units, the most effective first.
        effects: dφ/dw summed over each unit, for the estimate and the ends of its interval.
        predicted: Units of `order` that must leave by first order; None if none of them do.
    """

    order: list[int]
    effects: dict[int, Float[Tensor, " g"]]
    predicted: int | None


@dataclass(eq=False)
class Search:
    """A search that can be stopped, and is at the deadline: what it has is kept.

    `gamma` is γ̂ of all rows, and `deadline` by `time.monotonic`.
    """

    inference: Inference
    crossing: Crossing
    units: Units
    gamma: Float[Tensor, " p"]
    most: int
    deadline: float = float("inf")
    kept: list[list[int]] = field(default_factory=list)
    """Sets that cross, each smaller than the one before, in the order in which they left."""
    tried: int = 0
    """The largest set that the adaptive search reached."""
    lost: int = field(default=0)
    """Units that could not leave: without them β is not determined, or infinite."""

    @property
    def best(self) -> list[int] | None:
        """The smallest so far."""
        return self.kept[-1] if self.kept else None

    def linear(self) -> Linear:
        """One linearization of everything reported."""
        w = self._ones()
        moves, _ = self.inference.movements(self.gamma, w)
        effects = {}
        for side in (-1, 0, 1):
            by_gamma, by_w = self.inference.derivatives(self.gamma, w, side)
            effects[side] = self.units.sums(moves @ by_gamma + by_w)
        helps = -self.crossing.sign * effects[self.crossing.side]
        order = helps.argsort(descending=True, stable=True)
        start = self.crossing.gap(self.inference.reported(self.gamma[None], w[None]))
        hit = (start + helps[order].cumsum(0) > 0).nonzero()
        predicted = int(hit[0]) + 1 if len(hit) else None
        return Linear(order.tolist(), effects, predicted)

    def gaps(self, sets: Sequence[Sequence[int]]) -> Float[Tensor, " m"]:
        """The gap of each set, fitted again."""
        return torch.cat([self.crossing.gap(found) for found in self._refitted(sets)])

    def findings(self, sets: Sequence[Sequence[int]]) -> Float[Tensor, "m 3"]:
        """The estimate and the ends of its interval without each set."""
        parts = [[found.end(side) for side in (0, -1, 1)] for found in self._refitted(sets)]
        return torch.cat([torch.stack(part, dim=1) for part in parts])

    def _refitted(self, sets: Sequence[Sequence[int]]) -> Iterator[Reported]:
        for begin in range(0, len(sets), self._at_once()):
            w = self.units.weights(sets[begin : begin + self._at_once()])
            gamma = self.inference.solved(w, self.gamma.expand(len(w), -1))
            yield self.inference.reported(gamma, w)

    def along(self, order: Sequence[int], first: int | None) -> int | None:
        """The fewest units of an order that cross, by bisection below a prefix that does."""

        def crossed(sizes: Sequence[int]) -> list[bool]:
            past = (self.gaps([order[:k] for k in sizes]) > 0).tolist()
            if any(past):
                self._keep(order[: sizes[past.index(True)]])
            return past

        most = min(self.most, len(order))
        return shortest(crossed, min(most, max(1, first or most)), most, self.deadline)

    def adaptive(self) -> None:
        """Leave out the best unit, fit again, and so on until the value is crossed."""
        chosen: list[int] = []
        gamma, w = self.gamma, self._ones()
        limit = self.most if self.best is None else min(self.most, len(self.best) - 1)
        together = max(1, (limit + 1) // STEPS)
        while len(chosen) < limit:
            _pause(self.deadline)
            found = self._next(gamma, w, set(chosen), min(together, limit - len(chosen)))
            if found is None:
                return
            added, gamma, w, gap = found
            chosen += added
            self.tried = max(self.tried, len(chosen))
            if gap > 0:
                self._keep(chosen)
                self._shorten(chosen, len(chosen) - len(added))
                return

    def smaller(self) -> None:
        """Look for a set one smaller by leaving one member in, and by exchanges; while it finds."""
        while self.best is not None and len(self.best) > 1:
            value, current = self._without_one(self.best)
            seen: set[frozenset[int]] = set()
            for _ in range(ROUNDS):
                if value > 0 or frozenset(current) in seen:
                    break
                _pause(self.deadline)
                seen.add(frozenset(current))
                w = self.units.weights([current])
                gamma = self.inference.solved(w, self.gamma[None])[0]
                found = self._next(gamma, w[0], set(current), 1)
                if found is None:
                    break
                better, exchanged = self._without_one(current + found[0])
                if not better > value:
                    break
                value, current = better, exchanged
            if not value > 0:
                return
            self._keep(current)

    def _next(
        self, gamma: Tensor, w: Tensor, gone: set[int], together: int
    ) -> tuple[list[int], Tensor, Tensor, float] | None:
        """Units to leave next: the best of those whose removal was evaluated by itself.

        Where several leave together they are the best by first order.
        """
        steps, direct = self._steps(gamma, w)
        by_gamma, by_w = self.inference.derivatives(gamma, w, self.crossing.side)
        helps = self.crossing.sign * (steps @ by_gamma - self.units.sums(by_w * direct))
        helps = torch.nan_to_num(helps, nan=-torch.inf)
        helps[list(gone)] = -torch.inf
        if together > 1:
            added = helps.topk(together).indices
            weights = w * self._kept(added).prod(dim=0)
            moved = self.inference.solved(weights[None], gamma[None])
            gap = float(self.crossing.gap(self.inference.reported(moved, weights[None])))
            if gap > -torch.inf:
                return added.tolist(), moved[0], weights, gap
        count = min(SHORTLIST, self.units.count - len(gone))
        listed = helps.topk(count).indices
        listed = listed[helps[listed] > -torch.inf]
        scores, after = [], []
        for part in torch.split(listed, self._at_once()):
            weights = w * self._kept(part)
            moved = self.inference.solved(weights, gamma + steps[part], steps=1)
            scores.append(self.crossing.gap(self.inference.reported(moved, weights)))
            after.append(moved)
        gaps, starts = torch.cat(scores), torch.cat(after)
        self.lost += int((gaps == -torch.inf).sum())
        for at in gaps.argsort(descending=True, stable=True).tolist():
            if gaps[at] == -torch.inf:
                return None
            weights = w * self._kept(listed[at : at + 1])[0]
            moved = self.inference.solved(weights[None], starts[at][None])
            gap = float(self.crossing.gap(self.inference.reported(moved, weights[None])))
            if gap > -torch.inf:
                return [int(listed[at])], moved[0], weights, gap
            self.lost += 1
        return None

    def _steps(self, gamma: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Δγ of each unit's removal, and what its direct part is multiplied by."""
        if self.units.count < len(self.units.codes):  # groups
            found = self.inference.group_steps(gamma, w, self.units.codes, self.units.count)
            return found, torch.ones_like(w)
        moves, leverage = self.inference.movements(gamma, w)
        kept = torch.where((leverage < 1 - 1e-9) | (w == 0), 1 - leverage, torch.nan)
        return -moves / kept[:, None], 1 / kept

    def _kept(self, units: Int[Tensor, " m"]) -> Float[Tensor, "m n"]:
        return (self.units.codes != units[:, None]).to(torch.float64)

    def _without_one(self, members: Sequence[int]) -> tuple[float, list[int]]:
        """The best of the sets that leave one member in: those that cost least by first order."""
        places = torch.arange(len(members))
        if len(members) > 2 * SHORTLIST:
            w = self.units.weights([members])
            gamma = self.inference.solved(w, self.gamma[None])[0]
            moves, _ = self.inference.movements(gamma, w[0])
            by_gamma, by_w = self.inference.derivatives(gamma, w[0], self.crossing.side)
            gains = self.crossing.sign * self.units.sums(moves @ by_gamma + by_w)[list(members)]
            places = gains.topk(SHORTLIST).indices
        sets = [[*members[:k], *members[k + 1 :]] for k in places.tolist()]
        gaps = self.gaps(sets)
        at = int(gaps.argmax())
        return float(gaps[at]), sets[at]

    def _shorten(self, chosen: Sequence[int], low: int) -> None:
        """Within the last step, where several left at once."""
        for k in range(low + 1, len(chosen)):
            if float(self.gaps([chosen[:k]])) > 0:
                self._keep(chosen[:k])
                return

    def _keep(self, members: Sequence[int]) -> None:
        if self.best is None or len(members) < len(self.best):
            self.kept.append(list(members))

    def _ones(self) -> Float[Tensor, " n"]:
        return torch.ones(len(self.units.codes), dtype=torch.float64)

    def _at_once(self) -> int:
        return max(1, ENTRIES // self.inference.X.numel())


def shortest(
    crossed: Callable[[Sequence[int]], Sequence[bool]], first: int, most: int, deadline: float
) -> int | None:
    """The fewest of an order that cross, by bisection below a number that does; None without one.

    `crossed` says of some numbers whether they do; `first` is asked first, and none beyond `most`.
    It ends with a `TimeoutError` at the deadline, by `time.monotonic`.
    """
    low, high = 0, first
    while not crossed([high])[0]:
        if high == most:
            return None
        low, high = high, min(most, high + max(1, high // 2))
        _pause(deadline)
    while high - low > 1:
        _pause(deadline)
        # A refit of several together is cheaper: three in each round.
        inside = sorted({low + (high - low) * part // 4 for part in (1, 2, 3)} - {low, high})
        for k, past in zip(inside, crossed(inside), strict=True):
            if past:
                high = k
                break
            low = k
    return high


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError
