"""How does the step size change over a training run?

η_t = η₀ · schedule(t, T)          step t = 0 … T − 1 of T
"""

import abc
import math
from dataclasses import dataclass

from upweight.errors import SpecError


class Schedule(abc.ABC):
    """A factor on the optimizer's learning rate."""

    @abc.abstractmethod
    def __call__(self, step: int, steps: int) -> float:
        """The factor of step t of T."""


@dataclass(frozen=True)
class Constant(Schedule):
    """1 throughout."""

    def __call__(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class _Decay(Schedule):
    """A linear rise over the first `warmup`, a share of the steps, then a decay to `final`."""

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 and 0 <= self.final <= 1):
            raise SpecError(
                "A schedule needs 0 ≤ warmup < 1 and 0 ≤ final ≤ 1.",
                f"{self!r}.",
                "steps or epochs given where a share of all steps is meant.",
                "divide by their number: warmup=0.05 is a twentieth of the run.",
            )

    def __call__(self, step: int, steps: int) -> float:
        rise = self.warmup * steps
        if step < rise:
            return (step + 1) / (math.floor(rise) + 1)
        done = (step - rise) / max(1.0, steps - rise)
        return self.final + (1 - self.final) * self._left(done)

    @abc.abstractmethod
    def _left(self, done: float) -> float:
        """From 1 where the decay begins to 0 where it ends."""


@dataclass(frozen=True)
class Cosine(_Decay):
    """Half a cosine wave down to `final` (Loshchilov & Hutter 2017, Eq. 5, without restarts)."""

    def _left(self, done: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class LinearDecay(_Decay):
    """A straight line down to `final`."""

    def _left(self, done: float) -> float:
        return 1 - done


@dataclass(frozen=True)
class Stepwise(Schedule):
    """The rate falls by `factor` at each of some points of the run.

    Args:
        at: Shares of the steps.
        factor: What the rate is multiplied with.
    """

    at: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __call__(self, step: int, steps: int) -> float:
        return float(self.factor ** sum(step >= share * steps for share in self.at))
