"""Representer points: an output as a sum over the training examples, by the last layer's penalty.

    f(x_q) = Σᵢ αᵢ zᵢᵀ z_q,    αᵢ = −δᵢ/(nλ),    δ = ∂ℓ/∂f

where f = W z, the loss is penalized by (λ/2)‖W‖² and W is stationary: (1/n) Σᵢ δᵢ zᵢᵀ + λW = 0.
Yeh, Kim, Yen & Ravikumar (2018), Theorem 3.1. For a measurement m each example has the share

    S[q, i] = ⟨∂m_q/∂f, αᵢ⟩ zᵢᵀ z_q = −(1/n) ⟨∇_W m_q, (λI)⁻¹ gᵢ⟩

so it is influence on the last layer with the penalty alone for a curvature.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.errors import SpecError, UnsupportedModel
from upweight.gradients.linear import linear_form
from upweight.gradients.source import gradient_source
from upweight.linalg.matrices import DiagonalMatrix
from upweight.linalg.solution import Result, Solution, SolverStats
from upweight.methods import health
from upweight.methods.dense import FlatJob, FlatScorer
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, Scorer, not_offered
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.point import Point
from upweight.task.task import Task

STATIONARY = 1e-2
"""‖∇J‖/‖∇R‖ on the last layer past which shares miss the output by more than a per cent of ‖W‖."""


@dataclass(frozen=True)
class RepresenterPoints(Method):
    """S[q, i] = ⟨∂m_q/∂f, αᵢ⟩ zᵢᵀ z_q, an example's share of an output of the last layer.

    Args:
        layer: The `nn.Linear` whose output is the model's; None: θ if it is such a layer's, or else
            the last one in the model.

    The unit is a value: with `Logit(k)` a row adds up to output k of the query, up to a bias that
    is not penalized. With another m it adds up to ⟨∂m_q/∂f, f⟩, which is m only where m is linear
    in the outputs. A value is not what retraining would change: whatever the penalty leaves room
    for, the rest of the data makes up for a removed example.

    The provenance has `representation_error`, ‖W − Σᵢ αᵢ zᵢᵀ‖/‖W‖; past a per cent it warns.

    Raises:
        UnsupportedModel: The outputs are not linear in such a layer, or it has no penalty that is a
            multiple of ‖W‖².
        SpecError: There is no such layer.

    Exact when: the last layer is at a stationary point of the penalized objective.
    Cost: a forward pass over the training data, and inner products of gradients of the last layer.
    """

    layer: str | None = None

    unit = Unit.VALUE

    def prepare(self, fitting: Fitting) -> Scorer:
        fitting.checked_losses()
        task = self._last_layer(fitting.task, fitting.data)
        theta = task.theta()
        scorer = LastLayerScorer(
            task,
            fitting.data,
            Point(theta),
            gradient_source(task, theta, fitting.data),
            _strength(task, theta),
            memory_bytes=fitting.resources.memory_bytes,
            notes=(f"last layer: {', '.join(task.layout.names)}",),
        )
        if scorer.representation_error > STATIONARY:
            health.warned(
                [
                    "the last layer is not at a stationary point of its penalized objective: its "
                    "weights and their sum over the training examples differ by "
                    f"{scorer.representation_error:.2g} of their norm, so that shares do not add "
                    "up to the outputs. Train the last layer to convergence with its penalty, or "
                    "say the weight decay it was trained with."
                ]
            )
        return scorer

    def _last_layer(self, task: Task, data: Data) -> Task:
        """The same task with θ the penalized parameters of the last layer."""
        probe = task.to_device(data.batch(0, data.together(min(4, len(data)))))
        linear = [k for k, m in task.model.named_modules() if type(m) is nn.Linear]
        if self.layer is not None and self.layer not in linear:
            raise SpecError(
                "RepresenterPoints needs the name of an nn.Linear of the model.",
                f"layer={self.layer!r}.",
                "a misspelling, or a module that holds the layer.",
                f"one of {', '.join(map(repr, linear)) or 'none: the model has no nn.Linear'}.",
            )
        if self.layer is None and linear_form(task, task.theta(), probe) is not None:
            chosen = task
        elif linear:
            name = linear[-1] if self.layer is None else self.layer
            layer = task.model.get_submodule(name)
            prefix = f"{name}." if name else ""
            params = tuple(prefix + last for last, p in layer.named_parameters() if p.requires_grad)
            chosen = _restricted(task, params)
        else:
            raise _unsupported(task, "no nn.Linear in it")
        if linear_form(chosen, chosen.theta(), probe) is None:
            raise _unsupported(task, f"outputs that are not those of {chosen.layout.names[0]}")
        penalty: Any = chosen.penalty.curvature(chosen.theta(), chosen.layout)
        if isinstance(penalty, DiagonalMatrix):
            is_penalized = chosen.layout.unflatten(penalty.diagonal() > 0)
            kept = tuple(name for name, flags in is_penalized.items() if bool(flags.any()))
            if kept and len(kept) < len(chosen.layout.names):
                return _restricted(task, kept)
        return chosen


def _restricted(task: Task, params: tuple[str, ...]) -> Task:
    return Task(task.model, task.loss, task.penalty, params, task.forward, task.reads)


def _unsupported(task: Task, given: str) -> UnsupportedModel:
    return UnsupportedModel(
        "Representer points need outputs that a last linear layer makes.",
        f"{type(task.model).__name__} with {given}.",
        "an activation or a scaling behind the layer, a layer used twice or tied to another, or "
        "frozen parameters.",
        "move what comes behind it into the loss; RepresenterPoints(layer=...) names the layer; or "
        "use GradientDot(), or Influence(EKFAC(), …).",
    )


def _strength(task: Task, theta: Float[Tensor, " p"]) -> float:
    """λ of the penalty on the last layer."""
    penalty: Any = task.penalty.curvature(theta, task.layout)
    strengths = penalty.diagonal() if isinstance(penalty, DiagonalMatrix) else torch.zeros(1)
    lam = float(strengths[0])
    # ∇R = λθ tells a penalty around 0 from one around another point.
    slope = task.penalty.gradient(theta, task.layout)
    same = bool((strengths == strengths[0]).all()) and torch.allclose(slope, lam * theta)
    if lam > 0 and same:
        return lam
    raise UnsupportedModel(
        "Representer points need the penalty (λ/2)‖W‖² on the last layer: αᵢ = −δᵢ/(nλ).",
        f"{task.penalty!r}.",
        "a model trained without weight decay, or a task that does not say it.",
        "Task(..., penalty=L2(weight_decay)) with what it was trained with; without any, use "
        "GradientDot() of Task(..., params='LAYER.*'), which has the same order.",
    )


@dataclass(frozen=True, eq=False)
class LastLayerScorer(FlatScorer):
    """P = I/λ on the last layer."""

    strength: float

    def jobs(self, asked: Asked) -> Iterator[FlatJob]:
        if asked.functional is not None and asked.functional.by_theta.shape[1] != len(self.theta):
            raise not_offered("A Functional", "a movement of all parameters, not the last layer's")
        return super().jobs(asked)

    def _solved(self, vectors: Float[Tensor, "k p"]) -> Solution:
        stats = SolverStats(0, vectors.new_zeros(len(vectors)))
        return Solution(vectors / self.strength, Result.CONVERGED, stats)

    @property
    def representation_error(self) -> float:
        """‖W − Σᵢ αᵢ zᵢᵀ‖/‖W‖, which is ‖∇J‖/‖∇R‖."""
        slope = float((self.strength * self.theta).norm())
        left = float(self.gradient.norm())
        return left / slope if slope > 0 else (0.0 if left == 0 else float("inf"))

    def health(self) -> dict[str, Any]:
        return {
            "gradient_norm": float(self.gradient.norm()),
            "representation_error": self.representation_error,
            "penalty": self.strength,
        }
