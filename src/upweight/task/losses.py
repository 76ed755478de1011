"""ℓ(f, y): one loss per example, never reduced over the batch.

Outputs f are `[b, ...]` and every loss returns `[b]`. Mean or sum is the objective's business
(`J = (1/n) Σ wᵢ ℓᵢ + R`); a loss that reduces over the batch is refused, because then examples can
no longer be told apart.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from upweight.errors import (
    DataError,
    DtypeError,
    ShapeError,
    SpecError,
    UnsupportedModel,
    message,
)
from upweight.runtime.fingerprint import described


class Loss(abc.ABC):
    """ℓ(f, y) per example, with what its log-likelihood allows."""

    convex: bool = False
    """Whether ℓ is convex in f, so that its curvature in f is positive semi-definite."""

    @abc.abstractmethod
    def __call__(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """ℓ for each example of the batch."""

    def check(self, outputs: Tensor, targets: Any) -> None:  # noqa: B027  nothing to ask of any loss
        """Raise if targets do not fit the outputs; called once per batch, outside of vmap."""

    def gradient(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c"]:
        """δ = ∂ℓ/∂f per example, with f flattened to `[b, c]`."""

        def one(f: Tensor, y: Any) -> Tensor:
            return self(f[None], _with_batch_axis(y))[0]

        try:
            return torch.func.vmap(torch.func.grad(one))(outputs, targets).flatten(1)
        except (RuntimeError, ValueError):  # no rule for vmap
            return self._slopes(outputs, targets, create_graph=False)[1].flatten(1)

    def hessian(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c c"]:
        """Λ = ∂²ℓ/∂f² per example, with f flattened to `[b, c]`.

        Raises:
            UnsupportedModel: PyTorch has no second derivative of it.
        """
        shape = outputs.shape[1:]

        def one(f: Tensor, y: Any) -> Tensor:
            return self(f.reshape(1, *shape), _with_batch_axis(y))[0]

        flat = outputs.reshape(len(outputs), -1)
        try:
            return torch.func.vmap(torch.func.jacrev(torch.func.jacrev(one)))(flat, targets)
        except (RuntimeError, ValueError):  # no rule for vmap
            return self._double_backward(outputs, targets)

    def _slopes(self, outputs: Tensor, targets: Any, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Outputs as a leaf, and δ by autograd: the losses of a batch do not know of each other."""
        with torch.enable_grad():
            f = outputs.detach().clone().requires_grad_()
            (slopes,) = torch.autograd.grad(self(f, targets).sum(), f, create_graph=create_graph)
        return f, slopes

    def _double_backward(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c c"]:
        f, slopes = self._slopes(outputs, targets, create_graph=True)
        flat, columns = slopes.flatten(1), []
        try:
            for c in range(flat.shape[1]):
                if not flat.requires_grad:
                    columns.append(torch.zeros_like(flat))
                    continue
                total = flat[:, c].sum()
                (column,) = torch.autograd.grad(
                    total, f, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                columns.append(column.flatten(1))
        except RuntimeError as error:
            raise UnsupportedModel(
                message(
                    "This curvature needs the second derivative of the loss in the outputs.",
                    f"{self!r}. PyTorch says: {str(error).splitlines()[0]}",
                    "a loss whose backward pass PyTorch cannot differentiate (CTC).",
                    "use curvature=EmpiricalFisher() or EKFAC(Observed()), which are made of first "
                    "derivatives.",
                )
            ) from error
        return torch.stack(columns, dim=2)

    def log_prob(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """log p(y | f)."""
        raise UnsupportedModel(_no_likelihood(self, "log p(y | f)"))

    def margin(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """log p(y | f) − log(1 − p(y | f)): how far the right answer is ahead."""
        raise UnsupportedModel(_no_likelihood(self, "a margin"))

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        """ŷ ~ p(· | f), in the places where the targets count."""
        raise UnsupportedModel(_no_likelihood(self, "samples ŷ ~ p(· | f)"))


def _with_batch_axis(targets: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda y: y[None], targets)


def _per_example(values: Tensor) -> Float[Tensor, " b"]:
    return values.reshape(len(values), -1).sum(dim=1)


def _no_likelihood(loss: Loss, what: str) -> str:
    return message(
        f"This needs {what}, which takes a loss that is a negative log-likelihood of that kind.",
        f"{loss!r}, which defines none.",
        "a measure or curvature that asks for more than this loss can tell.",
        "use measure=Loss(), a measure of your own (outputs, targets) -> [q], or curvature=GGN().",
    )


def _require_same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        given = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ShapeError(
            message(
                f"{name} needs targets of the same shape as the model's outputs.",
                f"outputs {tuple(outputs.shape)}, targets {given}.",
                "a last axis of size 1: outputs [b, 1] beside targets [b]; broadcasting them would "
                "pair every example with every other.",
                "reshape the targets to [b, 1], or squeeze the model's output.",
            )
        )


def _require_range(name: str, targets: Tensor, valid: Tensor, required: str) -> None:
    if not bool(valid.all()):
        bad = targets[~valid].flatten()[:5].tolist()
        raise DataError(
            message(
                f"{name} needs targets {required}.",
                f"{int((~valid).sum())} targets outside of it, for example {bad}.",
                "labels counted from 1, a missing-value code, or another loss's label convention.",
                "recode the targets, or choose the loss that was trained with.",
            )
        )


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """ℓ = −Σ log softmax(f)[y]: classes on the last axis of f.

    Outputs `[b, c]` with integer targets `[b]`; sequences `[b, t, c]` with `[b, t]` are summed over
    their positions, leaving out targets equal to `ignore_index`. Targets may also be probabilities
    of the outputs' shape.
    """

    ignore_index: int = -100
    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            _require_same_shape("CrossEntropy with class probabilities", outputs, targets)
            return
        if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
            raise ShapeError(
                message(
                    "CrossEntropy needs outputs [b, ..., c] with classes last, and targets [b, ...]"
                    " of class indices.",
                    f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}.",
                    "targets of shape [b, 1], one-hot targets of integer dtype, or a model with "
                    "one output per example.",
                    "squeeze the targets, give probabilities as floats, or use Bernoulli() for one "
                    "logit per example.",
                )
            )
        c = outputs.shape[-1]
        valid = ((targets >= 0) & (targets < c)) | (targets == self.ignore_index)
        _require_range("CrossEntropy", targets, valid, f"in 0…{c - 1} for {c} classes")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(-self._token_log_probs(outputs, targets))

    def _token_log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(outputs, dim=-1)
        if targets.is_floating_point():
            return (targets * log_p).sum(dim=-1)
        kept = targets != self.ignore_index
        index = torch.where(kept, targets, 0).long()
        return log_p.gather(-1, index[..., None])[..., 0] * kept

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        if outputs.ndim != 2:
            return super().gradient(outputs, targets)
        p = outputs.softmax(dim=-1)
        if targets.is_floating_point():
            return p * targets.sum(dim=-1, keepdim=True) - targets
        kept = targets != self.ignore_index
        one_hot = F.one_hot(torch.where(kept, targets, 0).long(), outputs.shape[-1])
        return (p - one_hot) * kept[:, None]

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        if outputs.ndim != 2:
            return super().hessian(outputs, targets)
        p = outputs.softmax(dim=-1)
        mass = (
            targets.sum(dim=-1)
            if targets.is_floating_point()
            else (targets != self.ignore_index).to(p.dtype)
        )
        return mass[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self(outputs, targets)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        if targets.is_floating_point():
            raise UnsupportedModel(_no_likelihood(self, "a margin of one right class"))
        kept = targets != self.ignore_index
        index = torch.where(kept, targets, 0).long()[..., None]
        right = outputs.gather(-1, index)[..., 0]
        others = outputs.scatter(-1, index, -torch.inf).logsumexp(dim=-1)
        return _per_example(torch.where(kept, right - others, 0.0))

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        p = outputs.softmax(dim=-1)
        # By inverse CDF: multinomial() draws a random number per class, which for a language model
        # takes longer than a layer.
        cdf = p.to(torch.promote_types(p.dtype, torch.float32)).cumsum(dim=-1)
        u = torch.rand((*p.shape[:-1], 1), generator=generator, dtype=cdf.dtype, device=cdf.device)
        drawn = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)[..., 0]
        drawn = drawn.clamp_max_(p.shape[-1] - 1)
        if targets.is_floating_point():
            return drawn
        return torch.where(targets == self.ignore_index, targets, drawn)


@dataclass(frozen=True)
class Bernoulli(Loss):
    """ℓ = log(1 + eᶠ) − y f: one logit f per yes-no answer y ∈ [0, 1], summed over outputs."""

    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _require_same_shape("Bernoulli", outputs, targets)
        _require_range("Bernoulli", targets, (targets >= 0) & (targets <= 1), "in [0, 1]")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(F.softplus(outputs) - targets * outputs)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return (
            (outputs.sigmoid() - targets).flatten(1)
            if outputs.ndim > 1
            else (outputs.sigmoid() - targets)[:, None]
        )

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        p = outputs.reshape(len(outputs), -1).sigmoid()
        return torch.diag_embed(p * (1 - p))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self(outputs, targets)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example((2 * targets - 1) * outputs)

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(outputs.sigmoid(), generator=generator)


@dataclass(frozen=True)
class SquaredError(Loss):
    """ℓ = ½ ‖f − y‖²: the negative log-likelihood of a unit-variance Gaussian, less a constant."""

    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _require_same_shape("SquaredError", outputs, targets)
        if not targets.is_floating_point():
            raise DtypeError(
                message(
                    "SquaredError needs floating-point targets.",
                    f"targets of dtype {targets.dtype}.",
                    "integer labels given to a regression.",
                    "convert them (y.double()), or use CrossEntropy() for classes.",
                )
            )

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(0.5 * (outputs - targets) ** 2)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return (outputs - targets).reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        return torch.diag_embed(torch.ones_like(outputs.reshape(len(outputs), -1)))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self(outputs, targets)

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(outputs).normal_(generator=generator)
        return outputs + noise


@dataclass(frozen=True)
class Poisson(Loss):
    """ℓ = eᶠ − y f: counts y ≥ 0 with a log link, less the constant log y!."""

    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _require_same_shape("Poisson", outputs, targets)
        _require_range("Poisson", targets, targets >= 0, "that are counts, at least 0")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(outputs.exp() - targets * outputs)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return (outputs.exp() - targets).reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        return torch.diag_embed(outputs.reshape(len(outputs), -1).exp())

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self(outputs, targets) - _per_example(torch.lgamma(targets.to(outputs) + 1))

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        # One random number a count, unlike torch.poisson, whose rejections would make an example's
        # draw depend on the counts before it. The count is where P(Y ≤ y) passes u, by bisection.
        rate = outputs.double().exp()
        u = torch.rand(rate.shape, generator=generator, dtype=rate.dtype, device=rate.device)
        low, high = torch.full_like(rate, -1.0), (2 * rate + 64).ceil()
        middle = ((low + high) / 2).floor()
        while bool(((low < middle) & (middle < high)).any()):
            is_past = torch.special.gammaincc(middle + 1, rate) > u  # P(Y ≤ middle)
            low, high = torch.where(is_past, low, middle), torch.where(is_past, middle, high)
            middle = ((low + high) / 2).floor()
        return high.to(outputs)


@dataclass(frozen=True)
class SmoothHinge(Loss):
    """ℓ = T log(1 + exp((1 − y f)/T)), y ∈ {−1, +1}: the hinge as temperature T → 0.

    Koh & Liang (2017), §4.2: the hinge has no second derivative; a small T gives one.
    """

    temperature: float = 0.001
    convex = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SpecError(
                message(
                    "SmoothHinge needs a temperature above 0.",
                    f"temperature={self.temperature!r}.",
                    "0 meant as the hinge itself, which has no second derivative.",
                    "use a small temperature, 0.001 as in Koh & Liang (2017).",
                )
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _require_same_shape("SmoothHinge", outputs, targets)
        _require_range("SmoothHinge", targets, targets.abs() == 1, "in {−1, +1}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        excess = (1 - targets * outputs) / self.temperature
        return _per_example(self.temperature * F.softplus(excess))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        s = ((1 - targets * outputs) / self.temperature).sigmoid()
        return (-targets * s).reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        s = ((1 - targets * outputs) / self.temperature).sigmoid().reshape(len(outputs), -1)
        return torch.diag_embed(s * (1 - s) / self.temperature)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(targets * outputs)


@dataclass(frozen=True)
class Weighted(Loss):
    """ℓ = v · base(f, y), with targets `(y, v)`: sample or class weights of the training objective.

    v is part of what was minimized; the score still differentiates in the further weight w = 1.
    Weights `[b]` are of examples; weights `[b, t]` are of their positions, and ℓ = Σ_t v_t · base_t
    (a mask of 0 and 1 leaves padding out).
    """

    base: Loss

    @property
    def convex(self) -> bool:  # type: ignore[override]
        return self.base.convex

    def check(self, outputs: Tensor, targets: Any) -> None:
        if not isinstance(targets, tuple | list) or len(targets) != 2:
            raise DataError(
                message(
                    "Weighted needs targets (y, v): the target and the weight of each example.",
                    f"targets of type {type(targets).__name__}.",
                    "data given as (X, y) without weights.",
                    "give the data as (X, (y, v)) with v of shape [n].",
                )
            )
        y, v = targets
        self.base.check(outputs, y)
        if v.shape != outputs.shape[: v.ndim] or v.ndim < 1:
            raise ShapeError(
                message(
                    "Weighted needs a weight per example, [b], or per position, [b, t].",
                    f"weights {tuple(v.shape)} for outputs {tuple(outputs.shape)}.",
                    "a last axis of size 1, or weights of another batch.",
                    "reshape the weights to the first axes of the outputs.",
                )
            )
        _require_range("Weighted", v, v >= 0, "(y, v) with weights v ≥ 0")

    def __call__(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        y, v = targets
        if v.ndim == 1:
            return v * self.base(outputs, y)
        # Every position as an example of its own.
        last = v.ndim - 1
        each = self.base(outputs.flatten(0, last), y.flatten(0, last))
        return _per_example(v * each.reshape(v.shape))

    def gradient(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c"]:
        y, v = targets
        if v.ndim > 1:
            return super().gradient(outputs, targets)
        return v[:, None] * self.base.gradient(outputs, y)

    def hessian(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c c"]:
        y, v = targets
        if v.ndim > 1:
            return super().hessian(outputs, targets)
        return v[:, None, None] * self.base.hessian(outputs, y)

    def log_prob(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        return self.base.log_prob(outputs, targets[0])

    def margin(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        return self.base.margin(outputs, targets[0])

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Any:
        # With √v: E[g gᵀ] is then v times that of the base, the curvature of v · base.
        y, v = targets
        return self.base.sample(outputs, y, generator), v.sqrt()


@dataclass(frozen=True)
class CustomLoss(Loss):
    """A loss from any function `(outputs, targets) -> [b]`, differentiated automatically."""

    function: Callable[[Tensor, Any], Tensor]

    def __repr__(self) -> str:
        return f"CustomLoss({described(self.function)})"

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.function(outputs, targets)  # its shape is checked where it is used


def as_loss(loss: Loss | Callable[[Tensor, Any], Tensor]) -> Loss:
    """A loss from what the user holds: ours, or any unreduced `(outputs, targets) -> [b]`."""
    return loss if isinstance(loss, Loss) else CustomLoss(loss)
