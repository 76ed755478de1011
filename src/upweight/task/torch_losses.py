"""Losses as users hold them: ours, those of `torch.nn` translated, or any function.

    torch.nn                        ℓᵢ                                      ours
    CrossEntropyLoss                −Σ_c t_c log softmax(f)_c               CrossEntropy(…)
    NLLLoss                         the same of f that are log p            LogProbabilities(…)
    BCEWithLogitsLoss               −w [q y log σ(f) + (1 − y) log σ(−f)]   Bernoulli(…)
    MultiLabelSoftMarginLoss        the same, mean over classes             Bernoulli(…)
    MSELoss                         (f − y)², with no ½                     2 · SquaredError()
    L1Loss                          |f − y|                                 AbsoluteError()
    HuberLoss(δ), SmoothL1Loss(β)   Huber; Huber with δ = β, over β         Huber(δ)
    PoissonNLLLoss                  eᶠ − y f, + Stirling's term if full     Poisson(…)

`reduction` says how losses became one number, which here is the affair of the objective: J is a
mean over examples. What the reduction leaves of that is the loss of one example with several
outputs: their mean for "mean" (but positions of classes are summed, see `reduction_note`), their
sum otherwise.
"""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss

from upweight.errors import DataError, SpecError, UnsupportedModel
from upweight.task.draws import Draws
from upweight.task.losses import (
    AbsoluteError,
    Around,
    Bernoulli,
    CrossEntropy,
    CustomLoss,
    Huber,
    Loss,
    Poisson,
    SquaredError,
    Weighted,
    residual,
)

NORMALIZED = 1e-2
"""How far Σ_c e^f of log-probabilities may be from 1: rounding of half precision."""


def as_loss(loss: Loss | Callable[[Tensor, Any], Tensor]) -> Loss:
    """A loss from what the user holds: ours, one of `torch.nn`, or any `(outputs, targets) -> [b]`.

    A loss of `torch.nn` has the values of its `reduction="none"`, one for each example; see
    `translated`. So has a function of `torch.nn.functional`, also as a `functools.partial`.

    Raises:
        SpecError: It is a name or a class, not a loss.
        UnsupportedModel: It is a loss of `torch.nn` without a translation, with the way out.
    """
    if isinstance(loss, type) or not callable(loss):
        raise SpecError(
            "A loss is an object such as upweight.CrossEntropy() or torch.nn.CrossEntropyLoss(), "
            "or a function (outputs, targets) -> [b].",
            f"{loss!r}.",
            "a class that was not called." if isinstance(loss, type) else "a name.",
            "CrossEntropy(), Bernoulli(), SquaredError(), Poisson() or Weighted(...).",
        )
    if isinstance(loss, Weighted) and not isinstance(loss.base, Loss):
        return replace(loss, base=as_loss(loss.base))
    if isinstance(loss, Loss):
        return loss
    loss = as_module(loss)
    kind = type(loss)
    is_batch = kind in REDUCED and getattr(loss, "reduction", "") != "none"
    is_known = kind in TRANSLATIONS or kind in REFUSED
    return translated(loss) if is_known or is_batch else CustomLoss(loss)


def as_module(loss: Any) -> Any:
    """The loss of `torch.nn` that a function of `torch.nn.functional` is; others as they are."""
    function, options = loss, {}
    if isinstance(loss, functools.partial) and not loss.args:
        function, options = loss.func, loss.keywords
    kind = FUNCTIONS.get(function) if isinstance(function, types.FunctionType) else None
    try:
        return loss if kind is None else kind(**options)
    except TypeError:  # an argument of the function alone: size_average
        return loss


def translated(loss: Any) -> Loss:
    """One of ours with the values, derivatives and likelihood of a loss of `torch.nn`.

    Raises:
        UnsupportedModel: It has no translation, with the way out.
    """
    kind = type(loss)
    if kind not in TRANSLATIONS:
        given, cause, way_out = (REFUSED.get(kind) or REDUCED[kind])(loss)
        raise UnsupportedModel(
            "A loss of torch.nn is translated where it is a function of logits, means or log-rates "
            "and of targets.",
            f"{loss!r}, {given}.",
            cause,
            _named(way_out),
        )
    made = TRANSLATIONS[kind](loss)
    own = made.base if isinstance(made, Rescaled) else made
    object.__setattr__(own, "_called", kind.__name__)  # of frozen dataclasses; no field
    return made


def reduction_note(given: Any, outputs: Tensor, targets: Any) -> str:
    """What `reduction` of a loss of `torch.nn` means for J; empty where nothing needs to be said.

    Args:
        given: The loss as the user holds it.
        outputs: Of a batch: they tell how many an example has.
        targets: Of the same batch.
    """
    given = as_module(given)
    if not isinstance(given, _Loss) or type(given) not in TRANSLATIONS:
        return ""
    per_class = isinstance(given, nn.CrossEntropyLoss | nn.NLLLoss)
    several = outputs.ndim > 2 if per_class else outputs[:1].numel() > 1
    mean = "J here is the mean over the n examples"
    if given.reduction == "sum":
        return (
            f"reduction='sum': {mean}, yours their sum; for batches of b examples a weight decay λ "
            "beside it is L2(λ/b), a learning rate η of SGD in a recipe ηb, and a recorded loop "
            "has factors=b"
        )
    if given.reduction == "none":
        return f"reduction='none': an example's loss is the sum over its outputs; {mean}" * several
    if per_class and several:
        return (
            f"reduction='mean' over positions: an example's loss is the sum over its positions; "
            f"{mean}. Yours is that divided by the mean number of positions that count, so a "
            "weight decay λ beside it is L2(λ × that number), a learning rate η of SGD in a recipe "
            "η / that number, and a recorded loop has factors=1 / that of the batch"
        )
    if per_class and given.weight is not None:
        return (
            f"reduction='mean' with class weights: {mean}, yours that divided by the mean weight "
            "of a label, so a weight decay λ beside it is L2(λ × that weight), a learning rate η "
            "of SGD in a recipe η / that weight, and a recorded loop has factors=1 / that of the "
            "batch"
        )
    if several and not isinstance(given, nn.MultiLabelSoftMarginLoss):
        return f"reduction='mean': an example's loss is the mean over its outputs; {mean}"
    return ""


def draws_labels(loss: Loss) -> bool:
    """Whether labels ŷ ~ p(· | f) can be drawn for a loss."""
    if isinstance(loss, Around):
        return draws_labels(loss.base)
    kind = type(loss)
    return kind.sample is not Loss.sample or kind.residual is not Loss.residual


@dataclass(frozen=True)
class Rescaled(Around):
    """ℓ = factor · base(f, y), divided by the number of outputs of an example where `mean` says so.

    Λ is as many times that of the base, and the gradients of drawn labels are √ of that times those
    of the base, so that E[δ δᵀ] = Λ stays true; log p(y | f) is that of the base.

    Args:
        base: ℓ without the factor.
        factor: Above 0.
        mean: Whether it is a mean over outputs.

    Raises:
        SpecError: The factor is not positive.
    """

    factor: float = 1.0
    mean: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            raise SpecError(
                "A loss is rescaled by a factor above 0.",
                f"factor={self.factor!r}.",
                "a sign, or a loss that was meant to be left out.",
                "Rescaled(SquaredError(), 2.0) is the squared error without its ½.",
            )

    def scale(self, outputs: Tensor) -> float:
        """How many times ℓ is the base."""
        return self.factor / (outputs[0].numel() if self.mean and len(outputs) else 1)

    def check(self, outputs: Tensor, targets: Any) -> None:
        self.base.check(outputs, targets)

    def __call__(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        return self.base(outputs, targets) * self.scale(outputs)

    def gradient(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c"]:
        return self.base.gradient(outputs, targets) * self.scale(outputs)

    def hessian(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c c"]:
        return self.base.hessian(outputs, targets) * self.scale(outputs)

    def sample(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Any:
        return self.base.sample(outputs, targets, generator)

    def residual(self, outputs: Tensor, targets: Any, draws: Draws) -> Tensor:
        return residual(self.base, outputs, targets, draws) * self.scale(outputs) ** 0.5


@dataclass(frozen=True)
class LogProbabilities(CrossEntropy):
    """ℓ = −f[y] of outputs that are log-probabilities: those of a model that ends in log softmax.

    log softmax leaves log-probabilities as they are, so this is `CrossEntropy`, the same function
    of θ. Its Λ is that of logits, diag(p) − p pᵀ, with which JᵀΛJ is the GGN in the logits; −f[y]
    itself is linear in f and has none.

    Raises:
        DataError: The outputs of an example are no log-probabilities.
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        super().check(outputs, targets)
        sums = self._last(outputs).double().logsumexp(dim=-1)
        low, high = float(sums.min()), float(sums.max())
        if max(-low, high) > NORMALIZED:
            raise DataError(
                "NLLLoss needs outputs that are log-probabilities: Σ_c e^f_c = 1.",
                f"outputs with log Σ_c e^f_c from {low:.3g} to {high:.3g}.",
                "a model that returns logits, or probabilities.",
                "use CrossEntropyLoss() for logits; for probabilities take the logarithm on the "
                "way: Task(..., forward=lambda model, batch: (model(batch[0]).log(), batch[1])).",
            )


def _written(loss: Any, kind: str = "", without: tuple[str, ...] = (), **changed: str) -> str:
    """The Python that makes a loss of `torch.nn` again, of another class or with other options.

    Numbers are written out; what cannot be written (a tensor, a function) is read off `loss`.

    Args:
        loss: The loss.
        kind: The class instead; it is asked for those options that it knows.
        without: Options that are left at their defaults.
        changed: Options that are other ones.
    """
    kind = kind or type(loss).__name__
    options = {}
    for name, p in inspect.signature(getattr(nn, kind)).parameters.items():
        value = getattr(loss, name, p.default)
        if name in without or name in changed or value is None or value is p.default:
            continue
        if not isinstance(value, int | float | str):
            options[name] = f"loss.{name}"
        elif value != p.default:
            options[name] = repr(value)
    said = ", ".join(f"{name}={value}" for name, value in (options | changed).items())
    return f"torch.nn.{kind}({said})"


def _named(way_out: str) -> str:
    """The same, and what `loss` is where a way out reads from it."""
    return f"{way_out} Here `loss` is the one given." if "loss." in way_out else way_out


def _row(weights: Tensor | None, loss: Any) -> tuple[float, ...] | None:
    """Weights of classes or outputs as a tuple."""
    if weights is None:
        return None
    if weights.ndim > 1:
        outputs = weights[0].numel()
        each = f"v / {outputs}" if outputs > 1 and loss.reduction == "mean" else "v"
        raise UnsupportedModel(
            "Weights of a loss are one number, or one for each output on the last axis.",
            f"{loss!r} with weights of shape {tuple(weights.shape)}.",
            "a weight for each example of a batch, which has no place in a data set.",
            _named(
                "give each example its weights v beside its target: "
                f"Task(model, upweight.Weighted({_written(loss, without=('weight',))})) with data "
                f"(X, (y, {each})), v of shape {'[n, …], as y' if outputs > 1 else '[n]'}."
            ),
        )
    return tuple(weights.flatten().tolist())


def _of_classes(kind: type[CrossEntropy]) -> Callable[[Any], Loss]:
    def translate(loss: Any) -> Loss:
        smoothing = float(getattr(loss, "label_smoothing", 0.0))
        return kind(loss.ignore_index, 1, _row(loss.weight, loss), smoothing)

    return translate


def _of_answers(loss: Any) -> Loss:
    pos_weight = getattr(loss, "pos_weight", None)
    return Bernoulli(_row(loss.weight, loss), _row(pos_weight, loss))


def _scaled(base: Loss, factor: float, mean: bool) -> Loss:
    return Rescaled(base, factor, mean) if mean or factor != 1 else base


def _poisson(loss: nn.PoissonNLLLoss) -> Loss:
    if not loss.log_input:
        raise UnsupportedModel(
            "A Poisson loss is translated for outputs that are logarithms of the rate.",
            f"{loss!r} with log_input=False.",
            "a model that ends in exp or softplus and returns the rate itself.",
            f"take the logarithm on the way: Task(model, {_written(loss, without=('log_input',))}, "
            "forward=lambda model, batch: (model(batch[0]).log(), batch[1])); it is the same "
            "function of θ, up to eps.",
        )
    return Poisson(full=loss.full)


def _smooth(loss: nn.SmoothL1Loss) -> Loss:
    mean = _averages(loss)
    if loss.beta == 0:
        return _scaled(AbsoluteError(), 1.0, mean)
    return _scaled(Huber(loss.beta), 1.0 / loss.beta, mean)


def _averages(loss: Any) -> bool:
    return loss.reduction == "mean"


TRANSLATIONS: dict[type, Callable[[Any], Loss]] = {
    nn.CrossEntropyLoss: _of_classes(CrossEntropy),
    nn.NLLLoss: _of_classes(LogProbabilities),
    nn.NLLLoss2d: _of_classes(LogProbabilities),  # the same under an old name
    nn.BCEWithLogitsLoss: lambda loss: _scaled(_of_answers(loss), 1.0, _averages(loss)),
    nn.MultiLabelSoftMarginLoss: lambda loss: _scaled(_of_answers(loss), 1.0, True),
    nn.MSELoss: lambda loss: _scaled(SquaredError(), 2.0, _averages(loss)),
    nn.L1Loss: lambda loss: _scaled(AbsoluteError(), 1.0, _averages(loss)),
    nn.HuberLoss: lambda loss: _scaled(Huber(loss.delta), 1.0, _averages(loss)),
    nn.SmoothL1Loss: _smooth,
    nn.PoissonNLLLoss: lambda loss: _scaled(_poisson(loss), 1.0, _averages(loss)),
}
"""What is made of each loss of `torch.nn`; of exactly that class, since a subclass may differ."""

FUNCTIONS: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.gaussian_nll_loss: nn.GaussianNLLLoss,
    functional.kl_div: nn.KLDivLoss,
    functional.soft_margin_loss: nn.SoftMarginLoss,
    functional.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    functional.multi_margin_loss: nn.MultiMarginLoss,
    functional.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    functional.cosine_embedding_loss: nn.CosineEmbeddingLoss,
    functional.margin_ranking_loss: nn.MarginRankingLoss,
    functional.triplet_margin_loss: nn.TripletMarginLoss,
    functional.triplet_margin_with_distance_loss: nn.TripletMarginWithDistanceLoss,
    functional.ctc_loss: nn.CTCLoss,
}
"""The classes of the same losses as functions, with the same arguments."""


def _by_hand(loss: Any, call: str, parts: str = "") -> str:
    """A task whose loss calls that of `torch.nn` unreduced; `parts` are what `forward` returns."""
    made = _written(loss, reduction="'none'")
    forward = f", forward=lambda model, batch: ({parts})" if parts else ""
    return f"Task(model, lambda f, y: {made}{call}{forward})"


def _per_output(loss: Any) -> str:
    """From the losses of outputs to that of an example, as `reduction` has it."""
    return f".reshape(len(f), -1).{'mean' if _averages(loss) else 'sum'}(1)"


def _of_batch(loss: Any, way_out: str) -> tuple[str, str, str]:
    return f"which reduces over the batch by {loss.reduction!r}", "a loss of batches.", way_out


def _of_outputs(loss: Any) -> tuple[str, str, str]:
    return _of_batch(loss, _by_hand(loss, f"(f, y){_per_output(loss)}") + ".")


def _of_ranks(loss: Any) -> tuple[str, str, str]:
    made = _written(loss, reduction="'none'")
    return _of_batch(
        loss,
        f"Task(model, {made}). PyTorch has no second derivative of it: curvature=EKFAC(Observed()) "
        "and EmpiricalFisher() need none.",
    )


def _of_pairs(loss: Any) -> tuple[str, str, str]:
    each = "" if isinstance(loss, nn.CosineEmbeddingLoss) else _per_output(loss)
    parts = "torch.stack([model(batch[0]), model(batch[1])], dim=1), batch[2]"
    return (
        "which takes two outputs for a target",
        "examples that are pairs.",
        "put both on one axis, with data (X1, X2, y): "
        + _by_hand(loss, f"(f[:, 0], f[:, 1], y){each}", parts)
        + ".",
    )


def _of_triplets(loss: Any) -> tuple[str, str, str]:
    return (
        "which takes three outputs and no target",
        "examples that are triplets.",
        "put the three on one axis, with data (anchors, positives, negatives): "
        + _by_hand(
            loss,
            "(f[:, 0], f[:, 1], f[:, 2])",
            "torch.stack([model(x) for x in batch], dim=1), None",
        )
        + ".",
    )


def _of_paths(loss: nn.CTCLoss) -> tuple[str, str, str]:
    each = " / y[2].clamp(min=1)" if _averages(loss) else ""
    return (
        "which takes lengths beside the outputs, and these by time first",
        "examples that are sequences.",
        "for a model that returns log-probabilities [b, t, c], with data (X, (labels, lengths of "
        "outputs, lengths of labels)): "
        + _by_hand(loss, f"(f.transpose(0, 1), *y){each}")
        + ". PyTorch has no second derivative of it: curvature=EKFAC(Observed()) and "
        "EmpiricalFisher() need none.",
    )


def _of_probabilities(loss: nn.BCELoss) -> tuple[str, str, str]:
    return (
        "whose outputs are probabilities",
        "a model that ends in a sigmoid, which saturates: no curvature is left of an example "
        "whose probability is rounded to 1.",
        "leave the sigmoid out and use BCEWithLogitsLoss(), or undo it: Task(model, "
        f"{_written(loss, 'BCEWithLogitsLoss')}, forward=lambda model, batch: "
        "(model(batch[0]).logit(), batch[1])).",
    )


def _of_variances(loss: nn.GaussianNLLLoss) -> tuple[str, str, str]:
    return (
        "which takes a variance beside the outputs",
        "a model that returns a mean and a variance.",
        "put both on one axis and write the loss: "
        + _by_hand(
            loss,
            f"(f[..., 0], y, f[..., 1]){_per_output(loss)}",
            "torch.stack(model(batch[0]), dim=-1), batch[1]",
        )
        + "; with a constant variance it is MSELoss().",
    )


def _with_a_layer(loss: Any) -> tuple[str, str, str]:
    last = f", torch.nn.Unflatten(1, {(loss.num_classes, *loss.out_features)})"
    layers = f"model, loss.linear{last if loss.out_features else ''}"
    return (
        "which has parameters of its own",
        "a last layer that is part of the loss, to save memory in training.",
        f"make it a layer of the model: Task(torch.nn.Sequential({layers}).eval(), "
        f"{_written(loss, 'CrossEntropyLoss')}).",
    )


REFUSED: dict[type, Callable[[Any], tuple[str, str, str]]] = {
    nn.BCELoss: _of_probabilities,
    nn.GaussianNLLLoss: _of_variances,
    nn.CosineEmbeddingLoss: _of_pairs,
    nn.MarginRankingLoss: _of_pairs,
    nn.TripletMarginLoss: _of_triplets,
    nn.TripletMarginWithDistanceLoss: _of_triplets,
    nn.CTCLoss: _of_paths,
}
"""What each loss that is always refused is, why, and the way out."""
if hasattr(nn, "LinearCrossEntropyLoss"):  # from PyTorch 2.13 on
    REFUSED[nn.LinearCrossEntropyLoss] = _with_a_layer

REDUCED: dict[type, Callable[[Any], tuple[str, str, str]]] = {
    nn.KLDivLoss: _of_outputs,
    nn.SoftMarginLoss: _of_outputs,
    nn.HingeEmbeddingLoss: _of_outputs,
    nn.MultiMarginLoss: _of_ranks,
    nn.MultiLabelMarginLoss: _of_ranks,
}
"""The same of those that are taken as plain functions with reduction="none"."""
