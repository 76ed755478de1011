"""What each layer saw and what came back: its inputs a and δ = ∂Σℓ/∂(its output).

    with Capture(task, theta, {"body.0": ("weight", "bias"), "head": ("weight",)}) as capture:
        outputs, targets = capture.forward(batch)
        calls = capture.backward(outputs, cotangents)      # one `Call` per layer and use, in order

A watched layer computes with its parameters as constants, so a pass costs one forward pass and the
backward pass through the activations alone: about two thirds of what training costs, which also
multiplies out every weight's gradient. Whatever else uses those parameters (a measure of the
weights, `x @ layer.weight`) is noticed and named in `bypassed`: no layer would account for it.

An embedding of another class (of shifted places, or scaled afterwards) is watched inside, where it
looks up its weight. Parameters without a layer may be watched by themselves, where they are
multiplied with (`products.py`) or broadcast (`broadcast.py`).

The hooks live inside the context: model, parameters and hooks come back as they were.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from upweight._typing import Batch, Params
from upweight.errors import UnsupportedModel
from upweight.gradients.broadcast import Broadcasting, Met, parameter_rows
from upweight.gradients.functional import as_dense
from upweight.gradients.products import Products
from upweight.task.gradients import require_recording
from upweight.task.lent import lent, without_fast_path
from upweight.task.sharded import is_split
from upweight.task.task import Task

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Call:
    """One use of a layer in a forward pass.

    Args:
        layer: The layer's name in the model.
        args, kwargs: What it was called with, detached.
        delta: δ, of the shape of its (first) output.
        made: What was made from the inputs alone: the same for every δ of a forward pass.
    """

    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    delta: Tensor
    made: dict[str, Tensor] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, from the first time that it was asked for."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


@dataclass(eq=False)
class _Use:
    """A call whose δ has not arrived yet."""

    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    delta: Tensor | None = None
    made: dict[str, Tensor] = field(default_factory=dict)


class Capture:
    """Watches layers of the task's model while in its context.

    Args:
        task: Whose model.
        theta: θ, which it computes with.
        layers: Names of the layers to watch, as in `model.named_modules()`, and which of their
            parameters the calls of each account for.
        repeated: Watched layers whose output is the same for every example (embedded positions):
            here they give one copy per example, each with its own δ. The value says whether the
            output has an axis of size 1 for the copies; otherwise they get a new first axis.
        broadcast: Parameters to watch where they meet the examples by broadcasting.
        others: Parameters whose plain gradient is of interest, see `plain`.
        products: Parameters to watch where the examples are multiplied with them, outside of
            watched layers: each such use is a call under the parameter's name.

    Raises:
        NotDifferentiable: Entered inside `torch.inference_mode()`.
        UnsupportedModel: A watched layer runs where autograd does not record (under `no_grad`, or
            in a reentrant checkpoint).
    """

    def __init__(
        self,
        task: Task,
        theta: Float[Tensor, " p"],
        layers: Mapping[str, Sequence[str]],
        repeated: Mapping[str, bool] | None = None,
        broadcast: Sequence[str] = (),
        others: Sequence[str] = (),
        products: Sequence[str] = (),
    ) -> None:
        self.task, self.layers = task, dict(layers)
        self.bypassed: tuple[str, ...] = ()
        """Watched parameters that the last `backward` found in use elsewhere."""
        self.plain: dict[str, Tensor] = {}
        """The gradients that the last `backward` found for parameters themselves: of all that is
        watched none, but for broadcast ones in a batch of one example, which are that example's."""
        self._repeated = dict(repeated or {})
        self._broadcast = tuple(broadcast)
        self._watched = {*_accounted(task, self.layers), *self._broadcast, *products}
        names = {*self._watched, *others}
        given = dict(task.named(theta))
        if task.sharded is not None:  # what is looked at by itself must be there
            every = dict(task.model.named_parameters())
            given |= {
                k: task.sharded.whole(k, every[k]).clone()
                for k in (*self._broadcast, *products, *others)
            }
        self.params = {k: v.detach().requires_grad_(k in names) for k, v in given.items()}
        """θ by name: leaves where they are watched or of interest, constants elsewhere."""
        self._products = {name: self.params[name] for name in products}
        self.turned: dict[str, set[bool]] = {}
        """Of each parameter that the last `watch` found multiplied with: whether as [i, o]."""
        self._constants: dict[int, Tensor] = {}
        """Parameters as constants of the layers that run, by identity."""
        self._size = 0
        self.met: list[Met] = []
        """Where broadcast parameters met the examples."""
        self._looking_up: list[tuple[str, nn.Module]] = []
        self._uses: list[_Use] = []
        self._anchors: list[Tensor] = []
        self._taken: list[tuple[nn.Module, list[tuple[nn.Module, str, Any]]]] = []
        self._looks_up_inside = False
        self._listening = False
        self._replaying = False
        self._context = ExitStack()

    def __enter__(self) -> "Capture":
        require_recording()
        self._context.enter_context(lent(self.task.model))
        self._context.enter_context(as_written())
        self._context.enter_context(without_fast_path())
        for name, roles in self.layers.items():
            module = self.task.model.get_submodule(name)
            if looks_up_inside(module):
                self._looks_up_inside = True
                self._context.callback(module.register_forward_pre_hook(self._enters(name)).remove)
                self._context.callback(
                    module.register_forward_hook(self._leaves, always_call=True).remove
                )
                continue
            # Around the layer itself, within hooks of the user's own: what it was called with and
            # what it returned.
            for handle in (
                module.register_forward_pre_hook(self._before(roles)),
                module.register_forward_hook(
                    self._after(name), with_kwargs=True, prepend=True, always_call=True
                ),
            ):
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

    def forward(self, batch: Batch, size: int | None = None) -> tuple[Any, Any]:
        """The model's outputs, ready for `backward`, and the targets of a batch."""
        return self.watch(lambda params: self.task.call(params, batch), size)

    def watch(self, function: Callable[[Any], Any], size: int | None = None) -> Any:
        """function(θ), θ by name, for any function that calls the model, ready for `backward`.

        With `repeated` layers or `broadcast` parameters it needs the number of examples.
        """
        self._forget()
        self._size = size or 0
        self._listening = True
        try:
            with torch.enable_grad(), self._inside_calls(self.met):
                return function(self.params)
        finally:
            self._listening = False
            self._taken.clear()
            self._looking_up.clear()

    @contextmanager
    def _inside_calls(self, met: list[Met] | None) -> Iterator[None]:
        """What no hook sees, watched by mode: lookups inside of layers, and broadcasting."""
        with ExitStack() as stack:
            if self._looks_up_inside:
                stack.enter_context(_Lookups(self))
            if self._broadcast and self._size > 1:
                leaves = {name: self.params[name] for name in self._broadcast}
                stack.enter_context(Broadcasting(leaves, self._size, met, self._constants))
            if self._products:  # asked first: a bias that it adds meets the examples
                stack.enter_context(Products(self._products, self.multiplied))
            yield

    def backward(self, values: Tensor, cotangents: Tensor | None = None) -> list[Call]:
        """Each use of each watched layer with its δ = ∂⟨cotangents, values⟩/∂(its output).

        The graph is kept, so that other cotangents may follow. Uses that do not affect `values` are
        left out: their gradient is zero.
        """
        for use in self._uses:
            use.delta = None
        for each in self.met:
            each.delta = None
        self.bypassed, self.plain = (), {}
        leaves = {name: p for name, p in self.params.items() if p.requires_grad}
        sources = [*self._anchors, *(m.leaf for m in self.met), *leaves.values()]
        if sources and values.requires_grad:
            ones = torch.ones_like(values) if cotangents is None else cotangents
            self._replaying = True
            try:
                with self._inside_calls(None):
                    found = inside(
                        self.task,
                        self.params,
                        lambda: torch.autograd.grad(
                            values, sources, ones, retain_graph=True, allow_unused=True
                        ),
                    )
            finally:
                self._replaying = False
                self._taken.clear()
                self._looking_up.clear()
            found = found[len(self._anchors) :]
            for each, delta in zip(self.met, found[: len(self.met)], strict=True):
                each.delta = delta
            direct = zip(leaves, found[len(self.met) :], strict=True)
            self.plain = {name: as_dense(g) for name, g in direct if g is not None}
            fine = self._broadcast if self._size == 1 else ()
            self.bypassed = tuple(
                name for name in self.plain if name in self._watched and name not in fine
            )
        return [
            Call(use.layer, use.args, use.kwargs, use.delta, use.made)
            for use in self._uses
            if use.delta is not None
        ]

    @property
    def met_calls(self) -> list[Call]:
        """What was met, each as a call of the parameter's name with δ `[b·k, d]`."""
        return [
            Call(m.names[0], (), {}, m.delta.flatten(1) if m.delta.ndim > 1 else m.delta[:, None])
            for m in self.met
            if m.delta is not None
        ]

    def broadcast_rows(self) -> dict[str, Tensor]:
        """gᵢ of each broadcast parameter, `[b, *p]`, after `backward`."""
        leaves = {name: self.params[name] for name in self._broadcast}
        if self._size == 1:
            return {k: self.plain.get(k, torch.zeros_like(p))[None] for k, p in leaves.items()}
        return parameter_rows(self.met, leaves, self._size)

    def _forget(self) -> None:
        self._uses, self._anchors, self.met, self.turned = [], [], [], {}
        self._constants.clear()

    def _enters(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, _: Any) -> None:
            self._looking_up.append((name, module))

        return hook

    def _leaves(self, module: nn.Module, *_: Any) -> None:
        if self._looking_up and self._looking_up[-1][1] is module:
            self._looking_up.pop()

    def looks_up(self, weight: Any = None, **_: Any) -> bool:
        """Whether a weight is that of the layer that runs."""
        return bool(self._looking_up) and weight is self._looking_up[-1][1]._parameters["weight"]

    def lookup(self, input: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
        """A lookup in the weight of the layer that runs: the layer's use."""
        out = F.embedding(input, weight.detach(), *rest, **more)
        return self._watched_output(self._looking_up[-1][0], (input,), {}, out)

    def multiplied(self, name: str, x: Tensor, product: Tensor, is_io: bool) -> Tensor:
        """A product with a parameter: the parameter's use."""
        self.turned.setdefault(name, set()).add(is_io)
        return self._watched_output(name, (x,), {}, product)

    def _before(self, roles: Sequence[str]) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, _: Any) -> None:
            if not (self._listening or self._replaying):
                return
            taken = []
            for role in roles:
                path, _, last = role.rpartition(".")
                owner = module.get_submodule(path)
                value = owner._parameters[last]
                taken.append((owner, last, value))
                constant = None if value is None else value.detach()
                if constant is not None and self._broadcast:
                    self._constants[id(constant)] = constant
                owner._parameters[last] = constant  # type: ignore[assignment]
            self._taken.append((module, taken))

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            # A checkpoint runs its layers again in the backward pass and must find the same graph.
            if not (self._listening or self._replaying):
                return output
            if self._taken and self._taken[-1][0] is module:
                for owner, last, value in self._taken.pop()[1]:
                    # Of a split model it holds the whole weight.
                    self._constants.pop(id(owner._parameters[last]), None)
                    owner._parameters[last] = value
            if output is None:  # the layer raised, or a checkpoint has run as far as it needs
                return output
            if not torch.is_grad_enabled():
                # A layer that autograd does not see would lose its share without a word.
                raise UnsupportedModel(
                    "Layers with chosen parameters must run where autograd records.",
                    f"{name or 'the model'} runs under torch.no_grad() or inference_mode().",
                    "gradient checkpointing with use_reentrant=True, or a forward that switches "
                    "gradients off.",
                    "use checkpoint(..., use_reentrant=False), or leave these parameters out with "
                    'Task(params="pattern").',
                )
            tensor, rest = _first(output)
            if tensor is None or not tensor.is_floating_point():
                return output
            tensor = self._watched_output(name, args, kwargs, tensor)
            return tensor if rest is None else (tensor, *rest)

        return hook

    def _watched_output(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
    ) -> Tensor:
        """The output of a layer, whose δ will be recorded."""
        if name in self._repeated:
            on_axis = self._repeated[name]
            tensor = _copies(tensor, self._size, on_axis)
            args, kwargs = tree_map(lambda x: _copies(x, self._size, on_axis), (args, kwargs))
        if not tensor.requires_grad:
            # The first layers of the graph: from here on autograd has something to record. The
            # copy lets an in-place activation follow, which a leaf would not allow.
            leaf = tensor.detach().requires_grad_()
            tensor = leaf.clone()
            if self._listening:
                self._anchors.append(leaf)
        elif tensor._is_view():
            # What is written over a view (a Linear's output with its bias is one) takes its place
            # in the graph, and δ would not come by the hook below.
            tensor = tensor.clone()
        if self._listening:
            # Not copied: a model that wrote over a layer's input could not have been trained.
            use = _Use(name, *tree_map(_detached, (args, kwargs)))
            self._uses.append(use)
            tensor.register_hook(lambda delta: _record(use, delta))  # type: ignore[no-untyped-call]
        return tensor


class _Lookups(TorchFunctionMode):
    """Tells a capture when the layer that runs looks up its own weight."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding and self._capture.looks_up(*args[1:2], **kwargs):
            return self._capture.lookup(*args, **kwargs)
        return func(*args, **kwargs)


def looks_up_inside(module: nn.Module) -> bool:
    """Whether an embedding does more than that: shifts its places, scales what it looked up."""
    return isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward


def as_written() -> AbstractContextManager[Any]:
    """Compiled models run as their Python code: compiled code calls no hooks added to it later."""
    # Loading the compiler takes a second; until somebody does, nothing is compiled.
    is_loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()


def inside(task: Task, params: Params, function: Callable[[], _T]) -> _T:
    """function(), with θ in the model as `Task.call` puts it there.

    For backward passes: a checkpoint runs its layers again in them, and must find the same tensors
    that need gradients as in the forward pass. And for rules of layers that read their parameters.
    """
    names = {id(p): name for name, p in task.model.named_parameters()}
    with lent(task.model), task.backwards(params):
        for module in task.model.modules():
            for last, parameter in module._parameters.items():
                if parameter is None or (task.sharded is not None and is_split(parameter)):
                    continue
                value = params.get(names[id(parameter)])
                if value is None or task.stands_in(value):
                    value = parameter.detach()
                module._parameters[last] = value  # type: ignore[assignment]
        return function()


def _accounted(task: Task, layers: Mapping[str, Sequence[str]]) -> set[str]:
    """Names in the layout of the parameters that the watched layers account for."""
    model = task.model
    names = {id(p): name for name, p in model.named_parameters()}
    found = set()
    for layer, roles in layers.items():
        for role in roles:
            path, _, last = role.rpartition(".")
            parameter = model.get_submodule(layer).get_submodule(path)._parameters[last]
            found.add(names[id(parameter)])
    return found


def _copies(x: Any, size: int, on_axis: bool) -> Any:
    """A copy per example, on the first axis of size 1 or on a new one."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    return x.expand(size, *(x.shape[1:] if on_axis else x.shape))


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
