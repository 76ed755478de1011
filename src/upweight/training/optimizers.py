"""How does a step follow from the gradient? The update rules of `torch.optim`, as pure functions.

    state₀ = optimizer.init(θ₀)
    θ_{t+1}, state_{t+1} = optimizer.step(θ_t, ∇J_B(θ_t), state_t, η_t)

Nothing is changed in place, so any θ_t and state_t can be kept and gone on from. The rules work
entry by entry: θ may be one flat vector or many models on leading axes. They are differentiable in
θ, the gradient and the state, which differentiates training itself.

`update_` does the same in place, by the kernels of `torch.optim`: one pass over memory where the
formulas take five, which is a third of the time of a step of Adam on a wide layer.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from upweight.errors import SpecError

Parts: TypeAlias = list[Tensor]
Memories: TypeAlias = Mapping[str, list[Tensor]]


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """What an optimizer remembers of the steps before."""

    steps: int = 0
    memories: Mapping[str, Tensor] = field(default_factory=dict)


class Optimizer(abc.ABC):
    """An update rule: hyperparameters only. It works entry by entry, which `adjoint.py` counts on.

    Attributes:
        lr: η₀, the learning rate that a schedule multiplies.
        weight_decay: λ of the optimizer's own decay of θ: a number; of a recorded run whose groups
            of parameters differ, one for each entry of θ.
        memories: The names of what is remembered per parameter.
    """

    lr: float
    weight_decay: float | Float[Tensor, " p"]
    memories: tuple[str, ...]

    def init(self, theta: Float[Tensor, "*s p"]) -> OptimizerState:
        """The state before the first step."""
        return OptimizerState(0, {name: torch.zeros_like(theta) for name in self.memories})

    @abc.abstractmethod
    def step(
        self,
        theta: Float[Tensor, "*s p"],
        grad: Float[Tensor, "*s p"],
        state: OptimizerState,
        lr: float,
    ) -> tuple[Float[Tensor, "*s p"], OptimizerState]:
        """θ and the state after one step at the learning rate η."""

    def reached(self, rates: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """How far the gradient of each step moves θ_T in all, over `scale`; of all η in order."""
        return rates

    def scale(self, state: OptimizerState) -> Float[Tensor, " p"] | None:
        """What entries of a gradient are multiplied with beside η; None: 1."""
        return None

    def update_(
        self,
        theta: Sequence[Tensor],
        grads: Sequence[Tensor],
        memories: Mapping[str, Sequence[Tensor]],
        steps: int,
        lr: float,
        models: int = 1,
    ) -> None:
        """The same in place, to rounding, of parts of θ that are each contiguous.

        Raises:
            SpecError: The weight decay is no number.
        """
        if isinstance(self.weight_decay, Tensor):
            raise SpecError(
                "Training has one weight decay for all parameters.",
                f"one for each of {self.weight_decay.numel()} numbers.",
                "the optimizer of a recorded run, whose groups of parameters differ.",
                "weight_decay=0.01; or FromFunction(train) with the loop that was recorded.",
            )
        fused = [_may_be_fused(x, models) for x in theta]
        for kind in set(fused):
            places = [k for k, f in enumerate(fused) if f is kind]
            some = {name: [each[k] for k in places] for name, each in memories.items()}
            self._update_(
                [theta[k] for k in places], [grads[k] for k in places], some, steps, lr, kind
            )

    @abc.abstractmethod
    def _update_(
        self, theta: Parts, grads: Parts, memories: Memories, steps: int, lr: float, fused: bool
    ) -> None: ...


@dataclass(frozen=True)
class SGD(Optimizer):
    """θ ← θ − η b, b ← μ b + (1 − τ) g; with Nesterov's momentum θ ← θ − η (g + μ b).

    `torch.optim.SGD`. The first step has b = g.

    Args:
        lr: η₀.
        momentum: μ.
        nesterov: Whether the step looks ahead.
        dampening: τ.
        weight_decay: λ: g is the gradient + λθ, of all parameters. It is the penalty `L2(λ)`, but
            only a task's penalty is part of J and known to scores.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    weight_decay: float | Float[Tensor, " p"] = 0.0

    def __post_init__(self) -> None:
        _require_numbers(self, self.lr, self.weight_decay)
        plain = self.momentum > 0 and self.dampening == 0
        if not (0 <= self.momentum < 1 and 0 <= self.dampening <= 1 and plain >= self.nesterov):
            raise SpecError(
                "SGD needs 0 ≤ momentum < 1 and 0 ≤ dampening ≤ 1; Nesterov's needs "
                "momentum > 0 and no dampening.",
                f"{self!r}.",
                "a percentage, or nesterov=True with the default momentum of 0.",
                "SGD(lr=0.1, momentum=0.9, nesterov=True).",
            )

    @property
    def memories(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("momentum",) if self.momentum > 0 else ()

    def step(
        self, theta: Tensor, grad: Tensor, state: OptimizerState, lr: float
    ) -> tuple[Tensor, OptimizerState]:
        grad = _with_decay(grad, theta, self.weight_decay)
        memories = {}
        if self.momentum:
            share = 1 - self.dampening if state.steps else 1.0
            average = torch.mul(state.memories["momentum"], self.momentum).add_(grad, alpha=share)
            memories = {"momentum": average}
            grad = torch.add(grad, average, alpha=self.momentum) if self.nesterov else average
        return torch.add(theta, grad, alpha=-lr), OptimizerState(state.steps + 1, memories)

    def reached(self, rates: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        carried = _carried(rates, self.momentum)
        if self.nesterov:
            return rates + self.momentum * carried
        # The first step has no dampening.
        return torch.cat([carried[:1], (1 - self.dampening) * carried[1:]])

    def _update_(
        self, theta: Parts, grads: Parts, memories: Memories, steps: int, lr: float, fused: bool
    ) -> None:
        kept = memories.get("momentum", [])
        # None: the first step, which has no dampening.
        averages: list[Tensor | None] = [*kept] if kept and steps else [None] * len(theta)
        sgd(
            theta, grads, averages, lr=lr, momentum=self.momentum, nesterov=self.nesterov,
            dampening=self.dampening, weight_decay=float(self.weight_decay), maximize=False,
            foreach=False, fused=fused,
        )  # fmt: skip
        if not steps:
            for x, average in zip(kept, averages, strict=False):
                assert average is not None
                x.copy_(average)


@dataclass(frozen=True)
class Adam(Optimizer):
    """θ ← θ − η m̂ / (√v̂ + ε) (Kingma & Ba 2015, Algorithm 1): `torch.optim.Adam`.

    Args:
        lr: η₀.
        betas: Decay of the averages m of g and v of g².
        eps: ε.
        weight_decay: λ: g is the gradient + λθ. As for `SGD`.
        amsgrad: Whether v̂ never falls (Reddi, Kale & Kumar 2018, Algorithm 2).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Float[Tensor, " p"] = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _require_numbers(self, self.lr, self.weight_decay)
        if not (all(0 <= beta < 1 for beta in self.betas) and self.eps > 0):
            raise SpecError(
                "Adam needs betas in [0, 1) and eps > 0.",
                f"{self!r}.",
                "1 − β given for β.",
                "betas=(0.9, 0.999).",
            )

    @property
    def memories(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("mean", "square", "largest") if self.amsgrad else ("mean", "square")

    def step(
        self, theta: Tensor, grad: Tensor, state: OptimizerState, lr: float
    ) -> tuple[Tensor, OptimizerState]:
        theta, grad = self._decayed(theta, grad, lr)
        (b1, b2), t = self.betas, state.steps + 1
        memories = {
            "mean": torch.lerp(state.memories["mean"], grad, 1 - b1),
            "square": torch.mul(state.memories["square"], b2).addcmul_(grad, grad, value=1 - b2),
        }
        square = memories["square"]
        if self.amsgrad:
            square = memories["largest"] = torch.maximum(state.memories["largest"], square)
        # √v̂ + ε = (√v + ε √(1 − β₂ᵗ)) / √(1 − β₂ᵗ)
        correction = math.sqrt(1 - b2**t)
        root = _root(square).add_(self.eps * correction)
        rate = lr * correction / (1 - b1**t)
        moved = torch.addcdiv(theta, memories["mean"], root, value=-rate)
        return moved, OptimizerState(t, memories)

    def reached(self, rates: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        b1 = self.betas[0]
        corrected = rates / (1 - b1 ** torch.arange(1, len(rates) + 1, dtype=rates.dtype))
        return (1 - b1) * _carried(corrected, b1)

    def scale(self, state: OptimizerState) -> Float[Tensor, " p"] | None:
        """1/(√v̂ + ε), after a step at least."""
        square = state.memories["largest" if self.amsgrad else "square"]
        corrected = square / (1 - self.betas[1] ** state.steps)
        return 1 / (corrected.sqrt() + self.eps)

    def _update_(
        self, theta: Parts, grads: Parts, memories: Memories, steps: int, lr: float, fused: bool
    ) -> None:
        rule = adamw if isinstance(self, AdamW) else adam
        rule(
            theta, grads, memories["mean"], memories["square"], memories.get("largest", []),
            [torch.tensor(float(steps)) for _ in theta],
            lr=lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
            weight_decay=float(self.weight_decay), amsgrad=self.amsgrad, maximize=False,
            foreach=False, fused=fused,
        )  # fmt: skip

    def _decayed(self, theta: Tensor, grad: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        return theta, _with_decay(grad, theta, self.weight_decay)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam, and θ ← (1 − η λ) θ before each step (Loshchilov & Hutter 2019, Algorithm 2).

    Args:
        lr: η₀.
        betas, eps, amsgrad: As for `Adam`.
        weight_decay: λ, of all parameters. It is no gradient, and not part of J.
    """

    weight_decay: float | Float[Tensor, " p"] = 0.01

    def _decayed(self, theta: Tensor, grad: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        return theta * (1 - lr * self.weight_decay), grad


def _carried(rates: Float[Tensor, " T"], share: float) -> Float[Tensor, " T"]:
    """Σ_{s ≥ t} η_s shareˢ⁻ᵗ of each t."""
    found, sum_ = rates.clone(), 0.0
    for t in range(len(rates) - 1, -1, -1):
        sum_ = float(rates[t]) + share * sum_
        found[t] = sum_
    return found


LINE = 64
"""Numbers per model of a part that PyTorch's fused steps may take: a multiple of any vector's."""


def _may_be_fused(part: Tensor, models: int) -> bool:
    """A fused step rounds the numbers behind the last whole vector otherwise than the rest.

    Where they lie would depend on how many models train together, and so would a model's bits.
    """
    return part.device.type == "cpu" and (models == 1 or part.numel() // models % LINE == 0)


def _root(square: Tensor) -> Tensor:
    """√v in new memory. Its derivative is 0 at v = 0, where m is 0 as well: m/(√v + ε) is smooth.

    A gradient that was 0 at every step, as of a unit that never fires, would give 0 · ∞ there.
    """
    if not (torch.is_grad_enabled() and square.requires_grad):
        return square.sqrt()
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _with_decay(grad: Tensor, theta: Tensor, decay: float | Tensor) -> Tensor:
    """g + λθ."""
    if isinstance(decay, Tensor):
        return grad + decay * theta
    return torch.add(grad, theta, alpha=decay) if decay else grad


def _require_numbers(optimizer: Optimizer, lr: float, weight_decay: float | Tensor) -> None:
    least, most = weight_decay, weight_decay
    if isinstance(weight_decay, Tensor):
        least, most = float(weight_decay.min()), float(weight_decay.max())
    if not (0 < lr < math.inf and 0 <= least and most < math.inf):
        raise SpecError(
            "A learning rate is a positive number, and a weight decay not a negative one.",
            f"{optimizer!r}.",
            "0 meant as no training.",
            "give the rate that the model was trained with.",
        )
