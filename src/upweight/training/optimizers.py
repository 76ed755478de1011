"""How does a step follow from the gradient? `torch.optim`'s update rules, for many models at once.

These rules work entry by entry, so that PyTorch's own optimizers step models that are stacked on a
leading axis as they step one. The penalty is part of J: what `torch.optim` calls weight decay is
`L2` in the task, except for `AdamW`, whose decay is no gradient.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.errors import SpecError, message


class Optimizer(abc.ABC):
    """An update rule: hyperparameters only.

    Attributes:
        lr: η₀, the learning rate that a schedule multiplies.
        memories: How many numbers are remembered per parameter.
    """

    lr: float
    memories: int

    @abc.abstractmethod
    def start(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        """PyTorch's optimizer of these leaves, before its first step."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """θ ← θ − η b, b ← μ b + g; with Nesterov's momentum θ ← θ − η (g + μ b): `torch.optim.SGD`.

    Args:
        lr: η₀.
        momentum: μ.
        nesterov: Whether the step looks ahead.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _require_rate(self, self.lr)
        if not 0 <= self.momentum < 1 or (self.nesterov and self.momentum == 0):
            raise SpecError(
                message(
                    "SGD needs 0 ≤ momentum < 1, above 0 for Nesterov's.",
                    f"{self!r}.",
                    "a percentage, or nesterov=True with the default momentum of 0.",
                    "SGD(lr=0.1, momentum=0.9, nesterov=True).",
                )
            )

    @property
    def memories(self) -> int:  # type: ignore[override]
        return int(self.momentum > 0)

    def start(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(_groups(theta), self.lr, self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class Adam(Optimizer):
    """θ ← θ − η m̂ / (√v̂ + ε) (Kingma & Ba 2015, Algorithm 1): `torch.optim.Adam`.

    Args:
        lr: η₀.
        betas: Decay of the averages m of g and v of g².
        eps: ε.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    memories = 2

    def __post_init__(self) -> None:
        _require_rate(self, self.lr)
        if not (all(0 <= beta < 1 for beta in self.betas) and self.eps > 0):
            raise SpecError(
                message(
                    "Adam needs betas in [0, 1) and eps > 0.",
                    f"{self!r}.",
                    "1 − β given for β.",
                    "betas=(0.9, 0.999).",
                )
            )

    def start(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(_groups(theta), self.lr, self.betas, self.eps)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam, and θ ← (1 − η λ) θ before each step (Loshchilov & Hutter 2019, Algorithm 2).

    Args:
        lr: η₀.
        betas: As for `Adam`.
        eps: As for `Adam`.
        decay: λ; `torch.optim.AdamW` calls it weight_decay. Of all parameters, and not part of J.
    """

    decay: float = 0.01

    def start(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            _groups(theta), self.lr, self.betas, self.eps, weight_decay=self.decay
        )


LINE = 64
"""Numbers per model of a leaf that PyTorch's fused steps may take: a multiple of any vector's."""


def _groups(theta: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Leaves [s, ...] stepped by one pass over memory (`fused`), and those that are not.

    A fused step rounds the numbers behind the last whole vector otherwise than the rest. Where they
    lie would depend on how many models train together, and so would a model's bits.
    """
    fused = [p for p in theta if p.device.type == "cpu" and p[0].numel() % LINE == 0]
    rest = [p for p in theta if all(p is not other for other in fused)]
    groups: list[dict[str, Any]] = [
        {"params": fused, "fused": True, "foreach": False},
        {"params": rest},
    ]
    return [group for group in groups if group["params"]]


def _require_rate(optimizer: Optimizer, lr: float) -> None:
    if not 0 < lr < math.inf:
        raise SpecError(
            message(
                "A learning rate is a positive number.",
                f"{optimizer!r}.",
                "0 meant as no training.",
                "give the rate that the model was trained with.",
            )
        )
