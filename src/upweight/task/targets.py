"""Do targets fit the outputs that a loss holds them against? Refused with what they look like."""

from typing import Any

from torch import Tensor

from upweight.errors import DataError, ShapeError, message


def require_tensor(name: str, targets: Any) -> None:
    """Refuse several targets, none, and names."""
    if isinstance(targets, Tensor):
        return
    kind = type(targets).__name__
    cause = "several targets for each example, or targets that are left out (None)."
    way = (
        "say what their loss is: Task(model, loss=lambda outputs, targets: ...), one value "
        "per example; Weighted(...) takes targets (y, v)."
    )
    if isinstance(targets, list | tuple) and targets and isinstance(targets[0], str):
        cause = f"names of classes, such as {targets[0]!r}, in place of their numbers."
        way = "give classes.index(name), with classes in the order of the model's outputs."
    if isinstance(targets, dict):
        kind += f" of {', '.join(map(repr, targets))}"
    elif isinstance(targets, tuple | list):
        kind += f" of {len(targets)}"
    raise ShapeError(
        f"{name} needs its targets in one tensor.", f"targets of type {kind}.", cause, way
    )


def require_same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets that broadcasting would pair otherwise than one with each output."""
    require_tensor(name, targets)
    if targets.shape == outputs.shape:
        return
    few, many = sorted((targets.shape, outputs.shape), key=len)
    if (*few, 1) == tuple(many):
        cause = (
            "a last axis of size 1: outputs [b, 1] beside targets [b]; broadcasting them would "
            "pair every example with every other."
        )
        way = "reshape the targets to [b, 1], or squeeze the model's output."
        if len(targets.shape) == len(many):
            way = "reshape the targets to [b], or keep the last axis of the model's output."
    elif targets.shape == outputs.shape[:-1]:
        cause = f"{outputs.shape[-1]} outputs for each target."
        way = "use CrossEntropy() for classes, or a model with one output for each target."
    else:
        cause = "targets of another size than what the model gives for them."
        way = "give one target for each output, in the outputs' shape."
    raise ShapeError(
        f"{name} needs targets of the same shape as the model's outputs.",
        f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}.",
        cause,
        way,
    )


def require_probabilities(outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets of CrossEntropy that are floats but no probabilities of all classes."""
    if targets.shape == outputs.shape:
        return
    column = outputs.ndim > 1 and targets.shape == (*outputs.shape[:-1], 1)
    if column or (outputs.ndim > 1 and targets.shape == outputs.shape[:-1]):
        whole = bool((targets == targets.round()).all())
        cause = "class labels that are stored as floats."
        way = f"convert them: y{'.squeeze(-1)' if column else ''}.long() of a tensor, " + (
            "y.astype('int64')" + ("[:, 0]" if column else "") + " of an array."
        )
        if bool(targets.isnan().any()):
            cause, way = "missing labels (NaN).", "leave these examples out."
        elif not whole:
            cause = "one number for each example that is no class: a regression's target."
            way = "use SquaredError() with a model of one output, or probabilities of all classes."
    elif outputs.numel() == targets.numel():
        cause, way = "one output for each example.", "use Bernoulli() for one logit per example."
    else:
        cause = "probabilities of other classes than the model has."
        way = "give one probability for each of the model's outputs."
    values = ", ".join(f"{x:g}" for x in targets.flatten()[:3].tolist())
    raise ShapeError(
        "CrossEntropy needs classes as integers [b, ...], or class probabilities as floats of "
        "the outputs' shape.",
        f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)} of {targets.dtype}: "
        f"{values}, ...",
        cause,
        way,
    )


def axes_of_classes(outputs: Tensor, targets: Tensor, is_second: bool = False) -> str:
    """The message for classes on an axis that was not named."""
    where = "have them on axis 1" if is_second else "may be on axis 1 or on the last"
    return message(
        "CrossEntropy needs to know which axis of the outputs holds the classes.",
        f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}, which {where}.",
        "a segmentation model, whose outputs are [b, c, h, w] as in PyTorch."
        if outputs.ndim > 3 or is_second
        else "sequences as long as there are classes.",
        "CrossEntropy(axis=1) for outputs [b, c, ...]"
        + ("." if is_second else ", CrossEntropy(axis=-1) for outputs [b, ..., c]."),
    )


def require_range(name: str, targets: Tensor, valid: Tensor, required: str) -> None:
    """Refuse targets that are not valid, with some of them."""
    if not bool(valid.all()):
        bad = targets[~valid].flatten()[:5].tolist()
        raise DataError(
            f"{name} needs targets {required}.",
            f"{int((~valid).sum())} targets outside of it, for example {bad}.",
            "labels counted from 1, a missing-value code, or another loss's label convention.",
            "recode the targets, or choose the loss that was trained with; where a code stands "
            "for what does not count, CrossEntropy(ignore_index=...) leaves it out.",
        )
