"""What each layer saw and what came back: its inputs a and δ = ∂Σℓ/∂(its output).

    with Capture(task, ["body.0", "head"]) as capture:
        outputs, targets = capture.forward(batch)
        calls = capture.backward(outputs, cotangents)      # one `Call` per layer and use, in order

Parameters enter as constants, so a pass costs one forward pass and the backward pass through the
activations alone: about two thirds of what training costs, which also multiplies out every weight's
gradient. The hooks live inside the context: model, parameters and hooks come back as they were.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from upweight._typing import Batch
from upweight.errors import UnsupportedModel, message
from upweight.task.task import Task


@dataclass(frozen=True, eq=False)
class Call:
    """One use of a layer in a forward pass.

    Args:
        layer: The layer's name in the model.
        args, kwargs: What it was called with, detached.
        delta: δ, of the shape of its (first) output.
    """

    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    delta: Tensor


@dataclass(eq=False)
class _Use:
    """A call whose δ has not arrived yet."""

    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    delta: Tensor | None = None


class Capture:
    """Watches layers of the task's model while in its context.

    Args:
        task: Whose model.
        layers: Names of the layers to watch, as in `model.named_modules()`.

    Raises:
        UnsupportedModel: A watched layer runs where autograd does not record (under `no_grad`, or
            in a reentrant checkpoint).
    """

    def __init__(self, task: Task, layers: Sequence[str]) -> None:
        self.task, self.layers = task, tuple(layers)
        self._params = {k: v.detach() for k, v in task.named(task.theta()).items()}
        self._uses: list[_Use] = []
        self._anchors: list[Tensor] = []
        self._listening = False
        self._replaying = False
        self._context = ExitStack()

    def __enter__(self) -> "Capture":
        # A compiled model runs as written: compiled code does not call hooks added to it later.
        self._context.enter_context(torch.compiler.set_stance("force_eager"))
        for name in self.layers:
            module = self.task.model.get_submodule(name)
            # Before hooks of the user's own: δ must be that of what the layer itself returned.
            handle = module.register_forward_hook(self._hook(name), with_kwargs=True, prepend=True)
            self._context.callback(handle.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.close()
        self._forget()

    def forward(self, batch: Batch) -> tuple[Any, Any]:
        """The model's outputs, ready for `backward`, and the targets of a batch."""
        return self.watch(lambda params: self.task.call(params, batch))

    def watch(self, function: Callable[[Any], Any]) -> Any:
        """function(θ) for any function that calls the model, ready for `backward`.

        θ are the chosen parameters by name, constants of this pass.
        """
        self._forget()
        self._listening = True
        try:
            with torch.enable_grad():
                return function(self._params)
        finally:
            self._listening = False

    def backward(self, values: Tensor, cotangents: Tensor | None = None) -> list[Call]:
        """Each use of each watched layer with its δ = ∂⟨cotangents, values⟩/∂(its output).

        Args:
            values: What `forward` or `watch` returned, or anything made from it.
            cotangents: Of the shape of `values`; None stands for ones.

        The graph is kept, so that other cotangents may follow. Uses that do not affect `values` are
        left out: their gradient is zero.
        """
        for use in self._uses:
            use.delta = None
        if self._anchors and values.requires_grad:
            ones = torch.ones_like(values) if cotangents is None else cotangents
            self._replaying = True
            try:
                torch.autograd.grad(
                    values, self._anchors, ones, retain_graph=True, allow_unused=True
                )
            finally:
                self._replaying = False
        return [
            Call(use.layer, use.args, use.kwargs, use.delta)
            for use in self._uses
            if use.delta is not None
        ]

    def _forget(self) -> None:
        self._uses, self._anchors = [], []

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            # A checkpoint runs its layers again in the backward pass and must find the same graph.
            if not (self._listening or self._replaying):
                return output
            if not torch.is_grad_enabled():
                # A layer that autograd does not see would lose its share without a word.
                raise UnsupportedModel(_unrecorded(name))
            tensor, rest = _first(output)
            if tensor is None or not tensor.is_floating_point():
                return output
            if not tensor.requires_grad:
                # The first layers of the graph: from here on autograd has something to record. The
                # copy lets an in-place activation follow, which a leaf would not allow.
                leaf = tensor.detach().requires_grad_()
                tensor = leaf.clone()
                if self._listening:
                    self._anchors.append(leaf)
            if self._listening:
                # Not copied: a model that wrote over a layer's input could not have been trained.
                use = _Use(name, *tree_map(_detached, (args, kwargs)))
                self._uses.append(use)
                tensor.register_hook(lambda delta: _record(use, delta))  # type: ignore[no-untyped-call]
            return tensor if rest is None else (tensor, *rest)

        return hook


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _record(use: _Use, delta: Tensor) -> None:
    # A hook fires once per backward pass with the sum of all that arrives.
    use.delta = delta.detach()


def _first(output: Any) -> tuple[Tensor | None, tuple[Any, ...] | None]:
    """A layer's output tensor, and what else it returns beside it."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0], output[1:]
    return None, None


def _unrecorded(name: str) -> str:
    return message(
        "Layers with chosen parameters must run where autograd records.",
        f"{name or 'the model'} runs under torch.no_grad() or inference_mode().",
        "gradient checkpointing with use_reentrant=True, or a forward that switches gradients off.",
        "use checkpoint(..., use_reentrant=False), or leave these parameters out with "
        'Task(params="pattern").',
    )
