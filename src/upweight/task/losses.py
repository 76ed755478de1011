"""ℓ(f, y): one loss per example, never reduced over the batch.

Outputs f are `[b, ...]` and every loss returns `[b]`. Mean or sum is the objective's business
(`J = (1/n) Σ wᵢ ℓᵢ + R`); a loss that reduces over the batch is refused, because then examples can
no longer be told apart.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from upweight.errors import (
    DataError,
    DtypeError,
    ShapeError,
    SpecError,
    UnsupportedModel,
    UpweightError,
    message,
)
from upweight.runtime.fingerprint import described
from upweight.task.draws import Draws
from upweight.task.targets import (
    axes_of_classes,
    require_probabilities,
    require_range,
    require_same_shape,
    require_tensor,
)

MOST_LOST = 0.1
"""Rounding of an output, in standard deviations of the noise that makes it a label."""


class Loss(abc.ABC):
    """ℓ(f, y) per example, with what its log-likelihood allows."""

    convex: bool = False
    """Whether ℓ is convex in f, so that its curvature in f is positive semi-definite."""

    @property
    def called(self) -> str:
        """Its name in errors: that of the loss of `torch.nn` where it is the translation of one."""
        return vars(self).get("_called", type(self).__name__)

    @abc.abstractmethod
    def __call__(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """ℓ for each example of the batch."""

    def check(self, outputs: Tensor, targets: Any) -> None:  # noqa: B027  nothing to ask of any loss
        """Raise if targets do not fit the outputs; called once per batch, outside of vmap."""

    def ambiguity(self, outputs: Tensor, targets: Any) -> str | None:
        """The message for outputs and targets that fit in two ways, where all of the data do."""
        return None

    def gradient(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c"]:
        """δ = ∂ℓ/∂f per example, with f flattened to `[b, c]`."""

        def one(f: Tensor, y: Any) -> Tensor:
            return self(f[None], _with_batch_axis(y))[0]

        try:
            return _flat(torch.func.vmap(torch.func.grad(one))(outputs, targets))
        except (RuntimeError, ValueError):  # no rule for vmap
            return _flat(self._slopes(outputs, targets, create_graph=False)[1])

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
            units = torch.eye(flat.shape[1]).to(flat)[:, None].expand(-1, len(flat), -1)
            return self.hessian_product(outputs, targets, units).permute(1, 2, 0).contiguous()

    def hessian_product(
        self, outputs: Tensor, targets: Any, vectors: Float[Tensor, "k b c"]
    ) -> Float[Tensor, "k b c"]:
        """Λ u for k vectors per example, by a backward pass through δ each: Λ is not formed.

        Raises:
            UnsupportedModel: PyTorch has no second derivative of it.
        """
        f, slopes = self._slopes(outputs, targets, create_graph=True)
        if not slopes.requires_grad:
            return torch.zeros_like(vectors)
        try:
            products = [
                _flat(
                    torch.autograd.grad(
                        slopes, f, u.reshape(f.shape), retain_graph=True, materialize_grads=True
                    )[0]
                )
                for u in vectors
            ]
        except RuntimeError as error:
            raise UnsupportedModel(_no_second_derivative(self, error)) from error
        return torch.stack(products)

    def _slopes(self, outputs: Tensor, targets: Any, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Outputs as a leaf, and δ by autograd: the losses of a batch do not know of each other."""
        with torch.enable_grad():
            f = outputs.detach().clone().requires_grad_()
            (slopes,) = torch.autograd.grad(self(f, targets).sum(), f, create_graph=create_graph)
        return f, slopes

    def log_prob(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """log p(y | f)."""
        raise UnsupportedModel(_no_likelihood(self, "log p(y | f)", outputs, targets))

    def margin(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """log p(y | f) − log(1 − p(y | f)): how far the right answer is ahead."""
        raise UnsupportedModel(_no_likelihood(self, "a margin", outputs, targets))

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Any:
        """ŷ ~ p(· | f), in the places where the targets count."""
        raise UnsupportedModel(_no_likelihood(self, "samples ŷ ~ p(· | f)", outputs, targets))

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        """∂ℓ(f, ŷ)/∂f with ŷ ~ p(· | f), of the shape of the outputs; 0 where no target counts.

        A loss that can say it without ŷ should: what is left of f − ŷ in a short dtype is not the
        noise. By default `sample` is called for each example with a generator of its own, and the
        loss differentiated: labels belong to an example's place in the data, and to how many random
        numbers `sample` takes for it.
        """
        parts = []
        for i, generator in enumerate(draws.generators()):
            f, y = tree_map(_example(i), (outputs.detach(), targets))
            parts.append(self.sample(f, y, generator))
        drawn = tree_map(lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *parts)
        with torch.enable_grad():
            f = outputs.detach().requires_grad_()
            (delta,) = torch.autograd.grad(self(f, drawn).sum(), f, materialize_grads=True)
        return delta


def residual(loss: Loss, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
    """`loss.residual`, unless a subclass has another value or other samples than it knows of."""
    order = type(loss).__mro__
    first = {
        name: next(k for k, kind in enumerate(order) if name in vars(kind))
        for name in ("__call__", "sample", "residual")
    }
    is_overruled = first["residual"] > min(first["__call__"], first["sample"])
    known = Loss.residual if is_overruled else type(loss).residual
    return known(loss, outputs, targets, draws)


def _example(i: int) -> Callable[[Any], Any]:
    return lambda x: x[i : i + 1] if isinstance(x, Tensor) else x


def _with_batch_axis(targets: Any) -> Any:
    return tree_map(lambda y: y[None], targets)


def _precise(outputs: Tensor) -> torch.dtype:
    """What random numbers are compared in: float32 at least."""
    return torch.promote_types(outputs.dtype, torch.float32)


def _real(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets as numbers that can be negative: of uint8, 2·0 − 1 is 255; bool has no difference."""
    return targets if targets.is_floating_point() else targets.to(outputs.dtype)


def _require_weights(name: str, weights: tuple[float, ...] | None, field: str = "weight") -> None:
    if weights is None:
        return
    # What is no list, such as the tensor of a loss of torch.nn, has no hash by value.
    is_list = isinstance(weights, tuple | list)
    if is_list and weights and all(0 <= w < math.inf for w in weights):
        return
    raise SpecError(
        f"{name} takes weights that are numbers of at least 0, as a tuple.",
        f"{field}={weights!r:.80}.",
        "a weight that was computed by a division by 0, or a sign."
        if is_list
        else "a tensor or an array, as the losses of torch.nn have it.",
        f"{name}({field}=tuple(weights.tolist())).",
    )


def _flat(values: Float[Tensor, "b *c"]) -> Float[Tensor, "b c"]:
    """`[b, c]`, also where an example has one output and no axis for it."""
    return values.flatten(1) if values.ndim > 1 else values[:, None]


def _per_example(values: Tensor) -> Float[Tensor, " b"]:
    return values.reshape(len(values), -1).sum(dim=1)


def _no_likelihood(loss: Loss, what: str, outputs: Tensor, targets: Any) -> str:
    same, curvature = same_losses(loss, outputs, targets), "GGN() or EKFAC(labels=Observed())"
    try:
        loss.hessian(*tree_map(_example(0), (outputs.detach(), targets)))
    except UpweightError:
        curvature = "EmpiricalFisher() or EKFAC(labels=Observed())"
    return message(
        f"This needs {what}, which takes a loss that is a negative log-likelihood of that kind.",
        f"{loss!r}, which defines none.",
        "a measure or curvature that asks for more than this loss can tell."
        if same is None
        else f"a loss given as a plain function; its values here are those of upweight.{same!r}.",
        ("" if same is None else f"Task(model, upweight.{type(same).__name__}()); or ")
        + "use measure=Loss(), a measure of your own (outputs, targets) -> [q], or a curvature "
        f"that draws no labels: {curvature}.",
    )


def same_losses(loss: Loss, outputs: Tensor, targets: Any) -> Loss | None:
    """The loss of ours that has the values of this one on a batch."""
    for ours in (CrossEntropy(), Bernoulli(), SquaredError(), Poisson()):
        try:
            ours.check(outputs, targets)
            if type(ours) is not type(loss) and torch.allclose(
                ours(outputs, targets), loss(outputs, targets)
            ):
                return ours
        except Exception:
            continue
    return None


def _no_second_derivative(loss: Loss, error: Exception) -> str:
    return message(
        "This curvature needs the second derivative of the loss in the outputs.",
        f"{loss!r}. PyTorch says: {str(error).splitlines()[0]}",
        "a loss whose backward pass PyTorch cannot differentiate (CTC).",
        "use curvature=EmpiricalFisher() or EKFAC(Observed()), which are made of first "
        "derivatives.",
    )


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """ℓ = −Σ log softmax(f)[y]: classes on the last axis of f, or on another that is named.

    Outputs `[b, c]` with integer targets `[b]`; sequences `[b, t, c]` with `[b, t]` are summed over
    their positions, leaving out targets equal to `ignore_index`. Targets may also be probabilities
    of the outputs' shape.

    With weights and smoothing, as in `torch.nn.CrossEntropyLoss`, each target is spread over the
    classes first: ℓ = −Σ_c t_c log softmax(f)_c with t = w ∘ ((1 − ε) e_y + ε/C). Λ is then that of
    the plain loss times Σ_c t_c; the weights are part of the objective, not of the likelihood.

    Args:
        ignore_index: The target that does not count.
        axis: Where the classes are in the outputs: 1 for images `[b, c, h, w]` as PyTorch's own
            loss has them, −1 for the last. None: the last, unless 1 would fit as well.
        weight: w, one per class, at least 0. None: 1 each.
        label_smoothing: ε, the share of each target that is spread over all C classes.

    Raises:
        SpecError: The axis is that of the examples; a weight or the smoothing is out of range.
    """

    ignore_index: int = -100
    axis: int | None = None
    weight: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    convex = True

    def __post_init__(self) -> None:
        _require_weights("CrossEntropy", self.weight)
        if not 0 <= self.label_smoothing <= 1:
            raise SpecError(
                "CrossEntropy smooths labels by a share ε from 0 to 1.",
                f"label_smoothing={self.label_smoothing!r}.",
                "a percentage.",
                "label_smoothing=0.1 spreads a tenth of each target over all classes.",
            )
        if self.axis == 0:
            raise SpecError(
                "CrossEntropy needs the axis of the classes.",
                "axis=0, where the examples are.",
                "axes counted without that of the examples.",
                "use axis=1 for outputs [b, c, ...], axis=-1 for [b, ..., c].",
            )

    def _last(self, outputs: Tensor) -> Tensor:
        """The outputs, or probabilities of their shape, with classes last."""
        return outputs if self.axis is None else outputs.movedim(self.axis, -1)

    def ambiguity(self, outputs: Tensor, targets: Any) -> str | None:
        return (
            axes_of_classes(outputs, targets)
            if self._fits(outputs, targets) == (True, True)
            else None
        )

    def _fits(self, outputs: Tensor, targets: Tensor) -> tuple[bool, bool]:
        """Whether the classes may be on axis 1, and on the last; of two axes those are one."""
        if self.axis is not None or outputs.ndim < 3:
            return False, True
        if not targets.is_floating_point():
            second = targets.shape == (len(outputs), *outputs.shape[2:])
            return second, targets.shape == outputs.shape[:-1]
        if targets.shape != outputs.shape:
            return False, True
        second, last = (torch.allclose(s := targets.sum(dim=k), s.new_ones(())) for k in (1, -1))
        return second, last or not second

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        require_tensor("CrossEntropy", targets)
        if outputs.ndim > 1 and self._last(outputs).shape[-1] == 1:
            raise ShapeError(
                "CrossEntropy needs a logit for each of two or more classes.",
                f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}.",
                "a model with one logit for yes or no.",
                "use Bernoulli() with targets as floats in the outputs' shape: "
                "y.to(outputs.dtype).reshape(outputs.shape).",
            )
        classes = self._last(outputs).shape[-1] if outputs.ndim > 1 else 1
        if self.weight is not None and len(self.weight) != classes:
            raise ShapeError(
                "CrossEntropy needs one weight per class.",
                f"{len(self.weight)} weights, outputs {tuple(outputs.shape)}.",
                "weights of another model, or classes on another axis.",
                "give as many weights as the model has classes, in the order of its outputs.",
            )
        if targets.is_floating_point():
            moved = self._last(targets) if targets.shape == outputs.shape else targets
            require_probabilities(self._last(outputs), moved)
        if self._fits(outputs, targets) == (True, False):
            raise ShapeError(axes_of_classes(outputs, targets, is_second=True))
        if targets.is_floating_point():
            return
        given, outputs = outputs, self._last(outputs)
        if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
            cause, way = "targets of another shape.", "give one class for each row of outputs."
            if given.ndim > 2 and targets.shape == given.shape[:-1]:
                cause = f"classes on the last axis, where axis={self.axis} was said."
                way = (
                    "use upweight.CrossEntropy(), or move the axis: torch.nn has classes on axis 1."
                )
            elif outputs.shape == targets.shape and outputs.ndim > 1:
                cause = "one-hot targets of integer dtype."
                way = "give probabilities as floats, y.to(outputs.dtype); or classes, y.argmax(-1)."
            elif targets.shape == (*outputs.shape[:-1], 1):
                cause, way = "a last axis of size 1.", "squeeze the targets, y.squeeze(-1)."
            elif outputs.ndim < 2:
                cause, way = "one output per example.", "use Bernoulli() for one logit per example."
            raise ShapeError(
                "CrossEntropy needs outputs [b, ..., c] with classes last, and targets [b, ...]"
                " of class indices.",
                f"outputs {tuple(given.shape)}, targets {tuple(targets.shape)}.",
                cause,
                way,
            )
        c = outputs.shape[-1]
        kept, index = self._counted(targets)
        valid = ((index >= 0) & (index < c)) | ~kept
        require_range("CrossEntropy", targets, valid, f"in 0…{c - 1} for {c} classes")

    def _counted(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets count, and their classes, 0 where they do not.

        In int64: a comparison in a narrower dtype takes the number into it, where −100 is 156.
        """
        index = targets.long()
        kept = index != self.ignore_index
        return kept, torch.where(kept, index, 0)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(-self._token_log_probs(outputs, targets))

    def _token_log_probs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(self._last(outputs), dim=-1)
        if targets.is_floating_point() or self.label_smoothing:
            return (self._spread(log_p, targets) * log_p).sum(dim=-1)
        kept, index = self._counted(targets)
        found = log_p.gather(-1, index[..., None])[..., 0] * kept
        return found if self.weight is None else found * self._weights(log_p)[index]

    def _weights(self, like: Tensor) -> Float[Tensor, " c"]:
        return torch.tensor(self.weight, dtype=like.dtype, device=like.device)

    def _spread(self, like: Tensor, targets: Tensor) -> Tensor:
        """t, the targets as shares of the classes, which are last; 0 where one does not count."""
        if targets.is_floating_point():
            t = self._last(targets)
            counted = None
        else:
            kept, index = self._counted(targets)
            classes = torch.arange(like.shape[-1], device=index.device)
            t = (index[..., None] == classes).to(like.dtype)  # one_hot() reads numbers, under vmap
            counted = kept[..., None]
        if self.label_smoothing:
            t = (1 - self.label_smoothing) * t + self.label_smoothing / like.shape[-1]
        if self.weight is not None:
            t = t * self._weights(like)
        return t if counted is None else t * counted

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        if outputs.ndim != 2:
            return super().gradient(outputs, targets)
        p = outputs.softmax(dim=-1)
        t = self._spread(p, targets)
        return p * t.sum(dim=-1, keepdim=True) - t

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        if outputs.ndim != 2:
            return super().hessian(outputs, targets)
        p = outputs.softmax(dim=-1)
        mass = self._mass(targets).to(p.dtype)
        return mass[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -replace(self, weight=None, label_smoothing=0.0)(outputs, targets)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        if targets.is_floating_point():
            raise UnsupportedModel(
                _no_likelihood(self, "a margin of one right class", outputs, targets)
            )
        outputs = self._last(outputs)
        kept, index = self._counted(targets)
        index = index[..., None]
        right = outputs.gather(-1, index)[..., 0]
        others = outputs.scatter(-1, index, -torch.inf).logsumexp(dim=-1)
        return _per_example(torch.where(kept, right - others, 0.0))

    def _mass(self, targets: Tensor) -> Tensor:
        """What each position weighs: Σ_c t_c, which is 1 for a class, or 0."""
        if targets.is_floating_point():
            plain = self.weight is None and not self.label_smoothing
            t = self._last(targets)
            return t.sum(dim=-1) if plain else self._spread(t, targets).sum(dim=-1)
        kept, index = self._counted(targets)
        if self.weight is None:
            return kept
        weights = self._weights(torch.zeros((), dtype=torch.float64, device=targets.device))
        own = (1 - self.label_smoothing) * weights[index]
        return (own + self.label_smoothing * weights.mean()) * kept

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        _, drawn = self._drawn(self._last(outputs), targets, Draws.by(generator, len(outputs)))
        if targets.is_floating_point():
            return drawn
        return torch.where(self._counted(targets)[0], drawn, self.ignore_index)

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        p, drawn = self._drawn(self._last(outputs), targets, draws)
        ones = torch.ones_like(drawn, dtype=p.dtype)
        delta = p.scatter_add_(-1, drawn[..., None], -ones[..., None])
        # With the root of what a position weighs, E[δ δᵀ] is that many times diag(p) − p pᵀ.
        delta *= self._mass(targets).to(p.dtype).sqrt()[..., None]
        if self.axis is not None:
            delta = delta.movedim(-1, self.axis)
        return delta.to(outputs.dtype)

    def _drawn(self, outputs: Tensor, targets: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The probabilities, and a class for each position."""
        p = outputs.softmax(dim=-1, dtype=_precise(outputs))
        # By inverse CDF: multinomial() draws a random number per class, which for a language model
        # takes longer than a layer.
        cdf = p.cumsum(dim=-1)
        u = draws.counting(self._mass(targets) != 0).uniform(p.shape[1:-1], p.dtype)[..., None]
        drawn = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)[..., 0]
        return p, drawn.clamp_max_(p.shape[-1] - 1)


@dataclass(frozen=True)
class Bernoulli(Loss):
    """ℓ = log(1 + eᶠ) − y f: one logit f per yes-no answer y ∈ [0, 1], summed over outputs.

    With weights, as in `torch.nn.BCEWithLogitsLoss`: ℓ = −w [q y log σ(f) + (1 − y) log σ(−f)].

    Args:
        weight: w, one per output on the last axis, or one for all; at least 0. None: 1.
        pos_weight: q, what a yes counts beside a no; as `weight`.

    Raises:
        SpecError: A weight is negative or no number.
    """

    weight: tuple[float, ...] | None = None
    pos_weight: tuple[float, ...] | None = None
    convex = True

    def __post_init__(self) -> None:
        _require_weights("Bernoulli", self.weight)
        _require_weights("Bernoulli", self.pos_weight, "pos_weight")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        require_same_shape(self.called, outputs, targets)
        require_range(self.called, targets, (targets >= 0) & (targets <= 1), "in [0, 1]")
        last = outputs.shape[-1] if outputs.ndim > 1 else 1
        for weights in (self.weight, self.pos_weight):
            if weights is not None and len(weights) not in (1, last):
                raise ShapeError(
                    "Bernoulli needs one weight for all outputs, or one for each on the last axis.",
                    f"{len(weights)} weights, outputs {tuple(outputs.shape)}.",
                    "a weight per example, or weights of another model.",
                    "weigh examples by Weighted(Bernoulli()) with targets (y, v).",
                )

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        no, yes = self._weights(outputs)
        y = _real(targets, outputs)
        # log(1 + eᶠ) − y f would cancel: at y = 1 it is 0 from f = 37 on, and in float32 from 17.
        # By default softplus has a slope of exactly 1 from 20 on, where 1 − σ is still 2e-9.
        losses = no * (1 - y) * F.softplus(outputs, threshold=80.0)
        return _per_example(losses + yes * y * F.softplus(-outputs, threshold=80.0))

    def _weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What a no and a yes count, for each output."""
        no, more = (
            torch.tensor((1.0,) if w is None else w, dtype=like.dtype, device=like.device)
            for w in (self.weight, self.pos_weight)
        )
        return no, no * more

    def _mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What each output weighs: w (1 − y + q y)."""
        no, yes = self._weights(outputs)
        y = _real(targets, outputs)
        return (no * (1 - y) + yes * y).expand_as(outputs)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        no, yes = self._weights(outputs)
        y = _real(targets, outputs)  # σ(f) − y, without cancellation where σ is near 1
        slope = no * (1 - y) * outputs.sigmoid() - yes * y * (-outputs).sigmoid()
        return slope.reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        # 1 − σ is 0 from f = 37 on; σ(−f) keeps its digits up to f = 700.
        diagonal = self._mass(outputs, targets) * outputs.sigmoid() * (-outputs).sigmoid()
        return torch.diag_embed(diagonal.reshape(len(outputs), -1))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -Bernoulli()(outputs, targets)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example((2 * _real(targets, outputs) - 1) * outputs)

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        _, drawn = self._drawn(outputs, Draws.by(generator, len(outputs)))
        return drawn.to(outputs.dtype)

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        p, drawn = self._drawn(outputs, draws)
        delta = p - drawn.to(p.dtype)
        if self.weight is not None or self.pos_weight is not None:
            delta = delta * self._mass(outputs, targets).to(p.dtype).sqrt()
        return delta.to(outputs.dtype)

    def _drawn(self, outputs: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        p = outputs.to(_precise(outputs)).sigmoid()
        return p, draws.uniform(p.shape[1:], p.dtype) < p


def _require_real_targets(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Of a regression: one floating-point target for each output."""
    require_same_shape(name, outputs, targets)
    if not targets.is_floating_point():
        raise DtypeError(
            f"{name} needs floating-point targets.",
            f"targets of dtype {targets.dtype}.",
            "integer labels given to a regression.",
            "convert them (y.double()), or use CrossEntropy() for classes.",
        )


@dataclass(frozen=True)
class SquaredError(Loss):
    """ℓ = ½ ‖f − y‖²: the negative log-likelihood of a unit-variance Gaussian, less a constant."""

    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _require_real_targets(self.called, outputs, targets)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(0.5 * (outputs - targets) ** 2)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return (outputs - targets).reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        return torch.diag_embed(torch.ones_like(outputs.reshape(len(outputs), -1)))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self(outputs, targets)

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        lost = torch.finfo(outputs.dtype).eps * outputs.abs().max() if outputs.numel() else 0.0
        if float(lost) > MOST_LOST:
            raise DtypeError(
                "A label f + ε with ε ~ N(0, 1) must be a number of the outputs' dtype.",
                f"outputs of up to {float(outputs.abs().max()):.3g} in {outputs.dtype}, which "
                "loses the noise.",
                "targets far from zero (times, prices) that were not centred or scaled.",
                "draw in float64 (outputs.double()), or ask for residual(...), which needs no "
                "label.",
            )
        noise = Draws.by(generator, len(outputs)).normal(outputs.shape[1:])
        return outputs + noise.to(outputs.dtype)

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        # The residual is the noise: outputs + noise would lose it where outputs are large.
        return -draws.normal(outputs.shape[1:]).to(outputs.dtype)


@dataclass(frozen=True)
class Poisson(Loss):
    """ℓ = eᶠ − y f: counts y ≥ 0 with a log link, less the constant log y!.

    Args:
        full: Whether Stirling's approximation of that constant is added for counts above 1, as
            `torch.nn.PoissonNLLLoss(full=True)` does. No score depends on it.
    """

    full: bool = False
    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        require_same_shape(self.called, outputs, targets)
        require_range(self.called, targets, targets >= 0, "that are counts, at least 0")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        losses = outputs.exp() - targets * outputs
        if self.full:
            y = targets.to(outputs.dtype).clamp(min=1.0)
            constant = y * y.log() - y + 0.5 * (2 * math.pi * y).log()
            losses = losses + torch.where(targets > 1, constant, 0.0)
        return _per_example(losses)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return (outputs.exp() - targets.to(outputs.dtype)).reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        return torch.diag_embed(outputs.reshape(len(outputs), -1).exp())

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -Poisson()(outputs, targets) - _per_example(torch.lgamma(targets.to(outputs) + 1))

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        rate, left = self._drawn(outputs, Draws.by(generator, len(outputs)))
        return (rate - left).round().to(outputs.dtype)

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        return self._drawn(outputs, draws)[1].to(outputs.dtype)

    def _drawn(self, outputs: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The rate, and the rate less a count, both in float64."""
        # One random number a count, where P(Y ≤ y) passes it, by bisection. Beyond 2⁴⁰ the normal
        # distribution differs by less than 1e-6, and float64 would lose the count.
        rates, u = outputs.double().exp(), draws.uniform(outputs.shape[1:])
        is_large = rates > 2.0**40
        normal = -rates.sqrt() * torch.special.ndtri(u)
        rate = torch.where(is_large, 1.0, rates)
        low, high = torch.full_like(rate, -1.0), (2 * rate + 64).ceil()
        middle = ((low + high) / 2).floor()
        while bool(((low < middle) & (middle < high)).any()):
            is_past = torch.special.gammaincc(middle + 1, rate) > u  # P(Y ≤ middle)
            low, high = torch.where(is_past, low, middle), torch.where(is_past, middle, high)
            middle = ((low + high) / 2).floor()
        return rates, torch.where(is_large, normal, rates - high)


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
                "SmoothHinge needs a temperature above 0.",
                f"temperature={self.temperature!r}.",
                "0 meant as the hinge itself, which has no second derivative.",
                "use a small temperature, 0.001 as in Koh & Liang (2017).",
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        require_same_shape("SmoothHinge", outputs, targets)
        signs = targets.to(outputs.dtype).abs() == 1
        require_range("SmoothHinge", targets, signs, "in {−1, +1}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        excess = (1 - targets * outputs) / self.temperature
        return _per_example(self.temperature * F.softplus(excess))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        s = ((1 - targets * outputs) / self.temperature).sigmoid()
        return (-_real(targets, outputs) * s).reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        s = ((1 - targets * outputs) / self.temperature).sigmoid().reshape(len(outputs), -1)
        return torch.diag_embed(s * (1 - s) / self.temperature)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example(targets * outputs)


@dataclass(frozen=True)
class Huber(Loss):
    """ℓ = Σ ½ r² where |r| ≤ δ, and δ (|r| − δ/2) beyond, with r = f − y: outliers pull no harder.

    Huber (1964). Its density ∝ e^{−ℓ} is a normal one with exponential tails; ŷ is drawn from it,
    so the Fisher information is the mean of Λ = 1 where |r| ≤ δ, 0 beyond.

    Args:
        delta: δ > 0.

    Raises:
        SpecError: δ is not positive.
    """

    delta: float = 1.0
    convex = True

    def __post_init__(self) -> None:
        if not 0 < self.delta < math.inf:
            raise SpecError(
                "Huber needs a δ above 0, in units of the targets.",
                f"delta={self.delta!r}.",
                "0 meant as the absolute error.",
                "use AbsoluteError() for δ → 0 and SquaredError() for δ → ∞.",
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _require_real_targets(self.called, outputs, targets)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        size = (outputs - targets).abs()
        near = size.clamp(max=self.delta)
        return _per_example(near * (size - 0.5 * near))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return (outputs - targets).clamp(-self.delta, self.delta).reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        near = (outputs - targets).abs() <= self.delta
        return torch.diag_embed(near.to(outputs.dtype).reshape(len(outputs), -1))

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        noise = self._noise(Draws.by(generator, len(outputs)).uniform(outputs.shape[1:]))
        return outputs + noise.to(outputs.dtype)

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        noise = self._noise(draws.uniform(outputs.shape[1:]))
        return (-noise).clamp(-self.delta, self.delta).to(outputs.dtype)

    def _noise(self, u: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """y − f, where its distribution function passes u."""
        d, root = self.delta, math.sqrt(2 * math.pi)
        tail = math.exp(-0.5 * d * d) / d  # mass beyond δ on one side, before normalizing
        below = 0.5 * math.erfc(d / math.sqrt(2))  # of the normal distribution
        whole = root * (1 - 2 * below) + 2 * tail
        # The lower half, and the upper half turned around.
        low = torch.minimum(u, 1 - u) * whole
        beyond = ((low * d).log() - 0.5 * d * d) / d
        within = torch.special.ndtri(((low - tail) / root + below).clamp(min=below))
        noise = torch.where(low < tail, beyond, within)
        return torch.where(u < 0.5, noise, -noise)


@dataclass(frozen=True)
class AbsoluteError(Loss):
    """ℓ = Σ |f − y|: the negative log-likelihood of a Laplace distribution, less a constant.

    Λ = 0 wherever it is defined, so `Hessian()` and `GGN()` have nothing to invert; the Fisher
    information is 1 per output, E[sign²], which `Fisher(...)` and `EKFAC()` see by drawn labels.
    """

    convex = True

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _require_real_targets(self.called, outputs, targets)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return _per_example((outputs - targets).abs())

    def gradient(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c"]:
        return (outputs - targets).sign().reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "b c c"]:
        return torch.diag_embed(torch.zeros_like(outputs.reshape(len(outputs), -1)))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self(outputs, targets)

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        u = Draws.by(generator, len(outputs)).uniform(outputs.shape[1:])
        noise = torch.where(u < 0.5, (2 * u).log(), -(2 - 2 * u).log())
        return outputs + noise.to(outputs.dtype)

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        u = draws.uniform(outputs.shape[1:])
        return torch.where(u < 0.5, 1.0, -1.0).to(outputs.dtype)


@dataclass(frozen=True)
class Around(Loss):
    """A loss that is made of another one, and has its likelihood."""

    base: Loss

    @property
    def convex(self) -> bool:  # type: ignore[override]
        return self.base.convex

    def own(self, targets: Any) -> Any:
        """The targets of the other one."""
        return targets

    def ambiguity(self, outputs: Tensor, targets: Any) -> str | None:
        return self.base.ambiguity(outputs, self.own(targets))

    def log_prob(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        return self.base.log_prob(outputs, self.own(targets))

    def margin(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        return self.base.margin(outputs, self.own(targets))


@dataclass(frozen=True)
class Weighted(Around):
    """ℓ = v · base(f, y), with targets `(y, v)`: sample or class weights of the training objective.

    v is part of what was minimized; the score still differentiates in the further weight w = 1.
    Weights `[b]` are of examples; weights `[b, t]` are of their positions, and ℓ = Σ_t v_t · base_t
    (a mask of 0 and 1 leaves padding out).
    """

    def own(self, targets: Any) -> Any:
        return targets[0]

    def check(self, outputs: Tensor, targets: Any) -> None:
        if not isinstance(targets, tuple | list) or len(targets) != 2:
            raise DataError(
                "Weighted needs targets (y, v): the target and the weight of each example.",
                f"targets of type {type(targets).__name__}.",
                "data given as (X, y) without weights.",
                "give the data as (X, (y, v)) with v of shape [n].",
            )
        y, v = targets
        self.base.check(outputs, y)
        if v.ndim > 1 and getattr(self.base, "axis", None) not in (None, -1):
            raise ShapeError(
                "Weights per position need outputs with classes last.",
                f"{self.base!r}, weights {tuple(v.shape)}.",
                "outputs [b, c, h, w] as in PyTorch.",
                "move the axis: Task(forward=lambda model, batch: "
                "(model(batch[0]).movedim(1, -1), batch[1])), with CrossEntropy(axis=-1).",
            )
        if v.shape != outputs.shape[: v.ndim] or v.ndim < 1:
            raise ShapeError(
                "Weighted needs a weight per example, [b], or per position, [b, t].",
                f"weights {tuple(v.shape)} for outputs {tuple(outputs.shape)}.",
                "a last axis of size 1, or weights of another batch.",
                "reshape the weights to the first axes of the outputs.",
            )
        require_range("Weighted", v, v >= 0, "(y, v) with weights v ≥ 0")

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

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Any:
        # With √v: E[g gᵀ] is then v times that of the base, the curvature of v · base.
        y, v = targets
        return self.base.sample(outputs, y, generator), v.sqrt()

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        y, v = targets
        if v.ndim > 1:
            if type(self.base).residual is Loss.residual:  # which knows of no single positions
                return super().residual(outputs, targets, draws)
            draws = draws.counting(v != 0)
        delta = residual(self.base, outputs, y, draws)
        return delta * v.to(delta.dtype).sqrt().reshape(*v.shape, *(1,) * (delta.ndim - v.ndim))


@dataclass(frozen=True)
class CustomLoss(Loss):
    """A loss from any function `(outputs, targets) -> [b]`, differentiated automatically."""

    function: Callable[[Tensor, Any], Tensor]

    def __repr__(self) -> str:
        return f"CustomLoss({described(self.function)})"

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.function(outputs, targets)  # its shape is checked where it is used
