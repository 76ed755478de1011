"""Task: what was trained.

    J(θ, w) = (1/n) Σᵢ wᵢ ℓ(f(θ, xᵢ), yᵢ) + R(θ)

A `Task` binds the model f, the loss ℓ, the penalty R and the choice of parameters θ. It is frozen,
and the model is only ever called functionally: it comes back exactly as it was lent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Batch, Forward, Params
from upweight.errors import DataError, ScalarLoss, message
from upweight.task.batches import mapped
from upweight.task.lent import copied, differentiable, lent, with_backward_pass
from upweight.task.losses import Loss, as_loss
from upweight.task.params import Layout
from upweight.task.penalties import Penalty, as_penalty

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def call_model(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Outputs and targets of a batch, as most models take it.

    A tuple `(x1, ..., y)` is `model(x1, ...)` against y. A dict is `model(**inputs)` against its
    one key among labels, label, targets, target, y. An output with `.logits` stands for its logits.
    """
    if isinstance(batch, dict):
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) != 1:
            raise DataError(
                message(
                    f"A dict batch must hold its targets under exactly one of {TARGET_KEYS}.",
                    f"the keys {sorted(batch)}.",
                    "another name for the targets.",
                    "rename the key, or say how to call the model with "
                    "Task(forward=lambda model, batch: (outputs, targets)).",
                )
            )
        inputs = {key: value for key, value in batch.items() if key != keys[0]}
        outputs, targets = model(**inputs), batch[keys[0]]
    elif isinstance(batch, tuple) and len(batch) >= 2:
        outputs, targets = model(*batch[:-1]), batch[-1]
    else:
        raise DataError(
            message(
                "A batch must be (inputs..., targets) or a dict.",
                f"a {type(batch).__name__}{_length(batch)}.",
                "inputs without targets.",
                "give the data as (X, y), or say how to call the model with Task(forward=...).",
            )
        )
    return getattr(outputs, "logits", outputs), targets


def _length(batch: Any) -> str:
    return f" of {len(batch)}" if isinstance(batch, tuple) else ""


@dataclass(frozen=True)
class Task:
    """What was trained: the model, its loss and penalty, and which parameters.

    Args:
        model: The trained model, in eval mode. Never changed.
        loss: ℓ(outputs, targets) -> [b], unreduced: one of ours or any function.
        penalty: R(θ), added to the mean loss. `L2(λ)` is (λ/2) ‖θ‖².
        params: Globs of parameter names that make up θ. Frozen parameters are never part of it.
        forward: How to get `(outputs, targets)` from `(model, batch)`; see `call_model`.

    Raises:
        UnsupportedModel: No trainable parameter is chosen.
        DtypeError: The chosen parameters differ in dtype.

    Example:
        >>> task = Task(model, loss=CrossEntropy(), penalty=L2(0.01))
    """

    model: nn.Module
    loss: Loss
    penalty: Penalty
    params: tuple[str, ...]
    forward: Forward
    layout: Layout = field(repr=False)

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Callable[[Tensor, Any], Tensor],
        penalty: Penalty | Callable[[Params], Tensor] | None = None,
        params: str | tuple[str, ...] = "*",
        forward: Forward | None = None,
    ) -> None:
        patterns = (params,) if isinstance(params, str) else tuple(params)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "loss", as_loss(loss))
        object.__setattr__(self, "penalty", as_penalty(penalty))
        object.__setattr__(self, "params", patterns)
        object.__setattr__(self, "forward", forward or call_model)
        object.__setattr__(self, "layout", Layout.of(model, patterns))

    def theta(self) -> Float[Tensor, " p"]:
        """θ̂: a copy of the model's chosen parameters as one flat vector."""
        named = dict(self.model.named_parameters())
        return self.layout.flatten({name: named[name].detach() for name in self.layout.names})

    def moved_to(self, theta: Float[Tensor, " p"]) -> "Task":
        """The same task with a copy of its model at θ."""
        model = copied(self.model)
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.layout.unflatten(theta).items():
                named[name].copy_(value)
        return Task(model, self.loss, self.penalty, self.params, self.forward)

    def named(self, params: Params | Float[Tensor, " p"]) -> Params:
        """Parameters by name, from either form."""
        return self.layout.unflatten(params) if isinstance(params, Tensor) else params

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the device of the parameters; dtypes are left as they are."""
        device = self.layout.device
        # Packed sequences and batches of graphs are no tensors but move as they do.
        moved: Batch = mapped(
            lambda x: x.to(device) if callable(getattr(x, "to", None)) else x, batch
        )
        return moved

    def outputs(self, params: Params | Float[Tensor, " p"], batch: Batch) -> tuple[Any, Any]:
        """f(θ, x) and the targets of a batch, for derivatives of any kind and order."""
        with differentiable(self.model):
            return self.call(params, batch)

    def call(self, params: Params | Float[Tensor, " p"], batch: Batch) -> tuple[Any, Any]:
        """As `outputs`, with whatever kernels PyTorch prefers: for plain first derivatives.

        Buffers are read, never written, and what forward writes into attributes is undone.
        """
        chosen = self.named(params)
        names = {id(p): name for name, p in self.model.named_parameters()}
        values: dict[str, Tensor] = {}
        # By place, each once: `functional_call` restores a module that is registered under two
        # names to the tensors it was lent, so it must not be left to find the names by itself.
        for path, module in self.model.named_modules(prefix="model"):
            for last, p in module._parameters.items():
                if p is not None:
                    values[f"{path}.{last}"] = chosen.get(names[id(p)], p.detach())
            for last, b in module._buffers.items():
                if b is not None:
                    # Copies: a module that updates one in place must not touch the user's.
                    values[f"{path}.{last}"] = b.detach().clone()
        with lent(self.model), with_backward_pass(self.model):
            return torch.func.functional_call(
                _Call(self.model, self.forward), values, (batch,), tie_weights=False
            )

    def losses(self, params: Params | Float[Tensor, " p"], batch: Batch) -> Float[Tensor, " b"]:
        """ℓ of each example of a batch, unreduced.

        Raises:
            ScalarLoss: The loss did not return one value per example.
        """
        return self.losses_of(*self.outputs(params, batch))

    def losses_of(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """ℓ of each example, from the model's outputs.

        Raises:
            ScalarLoss: The loss did not return one value per example.
        """
        losses = self.loss(outputs, targets)
        size = len(outputs)
        if losses.shape != (size,):
            raise ScalarLoss(
                message(
                    f"A loss must return one value per example: shape ({size},).",
                    f"{self.loss!r} returned shape {tuple(losses.shape)}.",
                    "a loss that takes the mean or sum over the batch.",
                    'use upweight.CrossEntropy() and its kin, or reduction="none" and a sum over '
                    "every axis but the first.",
                )
            )
        return losses

    def objective(
        self, theta: Float[Tensor, " p"], batch: Batch, weights: Float[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """J(θ, w) when the batch is the whole training set."""
        params = self.named(theta)
        mean = (weights * self.losses(params, batch)).mean()
        return mean + self.penalty(params, self.layout)


class _Call(nn.Module):
    """Lets `functional_call` reach a user's `forward(model, batch)`."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, batch: Batch) -> tuple[Any, Any]:
        return self._forward(self.model, batch)
