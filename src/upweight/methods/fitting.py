"""Fitting: what every method is given to learn from, once it is known that it can be answered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch
from upweight.errors import NonFinite, UpweightError
from upweight.gradients.blocks import Plan
from upweight.gradients.cost import Cost, cost
from upweight.gradients.planning import plan
from upweight.notation import readable
from upweight.runtime.resources import Resources
from upweight.task.check import (
    checked_at_once,
    checked_batch,
    checked_losses,
    checked_parts,
    require_own_losses,
)
from upweight.task.data import Data
from upweight.task.probe import Probe
from upweight.task.task import Task

T = TypeVar("T")

ROLE = "training data"

APIECE = 32
"""Neighbours that `TrainingLosses.of_some` looks at together."""


class TrainingLosses:
    """ℓᵢ(θ̂) of the training examples, each checked by the first pass that looks at it.

    Most methods look at all of them when they are fitted. One that learns from some of them leaves
    the others to the pass over all of them that makes its scores.

    Args:
        task, data, probe, resources: Of the fit.
    """

    def __init__(self, task: Task, data: Data, probe: Probe, resources: Resources) -> None:
        self._task, self._data, self._probe, self._ranks = task, data, probe, resources.ranks
        self._values: Tensor | None = None
        self._is_whole = False

    @property
    def known(self) -> Float[Tensor, " n"] | None:
        """Those that were looked at, NaN in the places of others; None: there is none."""
        return self._values

    def set(self, losses: Float[Tensor, " n"]) -> None:
        """What a pass over all of them found, after its checks.

        Raises:
            NonDeterministic: An example has another loss alone than beside its neighbours.
        """
        require_own_losses(self._task, self._data, self._probe, losses, ROLE)
        self._values, self._is_whole = losses, True

    def set_some(self, places: list[int], losses: Float[Tensor, " k"]) -> None:
        """What a pass over some of them found, after its checks."""
        self._put(places, losses)

    def look(self, start: int, stop: int, batch: Batch, outputs: Tensor, targets: Any) -> None:
        """Check the outputs for the examples from start to stop − 1, and keep their losses.

        Raises:
            UpweightError: As for `checked_batch`.
        """
        if not self._is_whole:
            places = (start, stop)
            self._put(
                slice(start, stop),
                checked_batch(self._task, self._data, places, batch, outputs, targets, ROLE),
            )

    def of_some(self, count: int) -> Float[Tensor, " n"]:
        """ℓᵢ of those that a pass has seen, or of about so many, evenly spaced; else their mean.

        Raises:
            UpweightError: As for `checked_losses`, of these.
        """
        n, size = len(self._data), self._data.together(APIECE)
        groups = min(-(-count // size), max(1, n // size))  # none of them twice
        starts = [n * k // groups // size * size for k in range(groups)]
        if self._values is not None:  # a pass has seen some
            starts = []
        for start, part in checked_parts(self._task, self._data, starts, size, ROLE).items():
            self._put(slice(start, start + len(part)), part)
        assert self._values is not None
        return self._values.nan_to_num(nan=float(self._values.nanmean()))

    def all(self) -> Float[Tensor, " n"]:
        """ℓᵢ of every example.

        Raises:
            UpweightError: As for `checked_losses`.

        Cost: a forward pass over those that no pass has looked at.
        """
        if self._values is None:
            found = checked_losses(self._task, self._data, ROLE, self._probe, self._ranks)
            self._values, self._is_whole = found, True
        if not self._is_whole:
            size = checked_at_once(self._data)
            unknown = self._values.isnan()
            starts = [k for k in range(0, len(unknown), size) if bool(unknown[k : k + size].any())]
            for start, part in checked_parts(self._task, self._data, starts, size, ROLE).items():
                self._put(slice(start, start + len(part)), part)
            self.set(self._values)
        return self._values

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say which example it is if the data make a pass over them fail.

        Raises:
            UpweightError: As for `all`, in the place of what PyTorch says.
        """
        try:
            yield
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, NonFinite) or not isinstance(error, UpweightError):
                self.all()
            raise

    def __str__(self) -> str:
        if self._values is None:
            return "no training loss known"
        known = self._values[~self._values.isnan()].double()
        some = "" if len(known) == len(self._values) else f" of {len(known):,} examples"
        return f"mean training loss {readable(float(known.mean()))}{some}"

    def _put(self, at: slice | list[int], losses: Tensor) -> None:
        if self._values is None:
            self._values = losses.new_full((len(self._data),), torch.nan)
        self._values[at] = losses


@dataclass(eq=False)
class Fitting:
    """A fit on its way.

    Args:
        task, data, theta, probe, resources, history: As for `Method.fit`.
        looks_later: Whether examples that the method has not learned from are first looked at when
            they are scored.
        learned: What was learned at this θ, for several methods to share; None: each method learns
            its own.
        losses: ℓᵢ(θ̂), as far as they are known.
    """

    task: Task
    data: Data
    theta: Float[Tensor, " p"]
    probe: Probe
    resources: Resources
    history: Any = None
    looks_later: bool = False
    learned: list[Any] | None = None
    losses: TrainingLosses = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.losses is None:
            self.losses = TrainingLosses(self.task, self.data, self.probe, self.resources)

    @cached_property
    def plan(self) -> Plan:
        """How gradients are obtained layer by layer, at any θ."""
        return plan(self.task, self.theta, self.data)

    @cached_property
    def cost(self) -> Cost:
        """What they take."""
        return cost(self.plan, self.theta, self.data)

    def once(self, what: Any, of: object, learn: Callable[[], T]) -> T:
        """What was learned before of the same object, if it is to be shared; else `learn()`."""
        for known, source, found in self.learned or ():
            if source is of and known == what:
                return found  # type: ignore[no-any-return]
        found = learn()
        if self.learned is not None:
            self.learned.append((what, of, found))
        return found

    def checked_losses(self) -> Float[Tensor, " n"]:
        """ℓᵢ(θ̂) of every training example, each looked at once."""
        return self.losses.all()
