"""A model is lent: it is run, copied, and comes back exactly as it was.

`functional_call` puts parameters and buffers back. What forward writes into plain attributes (old
weight norm keeps the weight that it computes there, other models the features of their last call)
would stay, with a graph or with tensors that only mean something inside of `torch.func`.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, buffers, hooks and parts."""


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """The model's parameters and attributes are as before afterwards, whatever happens.

    Lists, dicts and sets in attributes get back the entries that they had. A tensor that is written
    in place is not noticed.
    """
    # `functional_call` restores a module that is registered under two names to what it lent it.
    before = [
        (module, dict(vars(module)), dict(module._parameters), _entries(module))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, parameters, entries in before:
            _restore(vars(module), attributes)
            module._parameters.update(parameters)
            for kept, copied in entries:
                _refill(kept, copied)


def _entries(module: nn.Module) -> list[tuple[Any, Any]]:
    attributes = vars(module)
    values = [attributes[name] for name in attributes.keys() - _OWN]
    return [(value, copy.copy(value)) for value in values if isinstance(value, (dict, list, set))]


def _restore(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    # The usual case, without a step of Python per attribute: this runs at every call of a model.
    if list(now) == list(before) and all(map(operator.is_, now.values(), before.values())):
        return
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        if now.get(name, now) is not value:
            now[name] = value


def _refill(kept: Any, before: Any) -> None:
    if len(kept) == len(before) and all(
        a is b for a, b in zip(_parts(kept), _parts(before), strict=True)
    ):
        return
    kept.clear()
    (kept.extend if isinstance(kept, list) else kept.update)(before)


def _parts(kept: Any) -> list[Any]:
    return [*kept, *kept.values()] if isinstance(kept, dict) else list(kept)


@contextmanager
def with_backward_pass(model: nn.Module) -> Iterator[None]:
    """Embeddings that were trained with sparse gradients give dense ones, which all can read.

    Recurrent layers on a GPU use kernels with a backward pass: cuDNN has none in eval mode.
    """
    lookups = (nn.Embedding, nn.EmbeddingBag)
    modules = list(model.modules())
    sparse = [m for m in modules if isinstance(m, lookups) and m.sparse]
    is_recurrent = any(
        isinstance(m, nn.RNNBase) and any(p.is_cuda for p in m.parameters()) for m in modules
    )
    for module in sparse:
        module.sparse = False
    try:
        with torch.backends.cudnn.flags(enabled=False) if is_recurrent else nullcontext():
            yield
    finally:
        for module in sparse:
            module.sparse = True


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model, without the graph of tensors that forward left in attributes."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def in_eval_mode(model: nn.Module) -> nn.Module:
    """A copy of the modules in eval mode, around the parameters and buffers of the model itself.

    What changes in those is seen in both; training flags and plain attributes are the copy's own.

    Raises:
        Exception: Whatever a module says that cannot be copied.
    """
    shared: dict[int, Any] = {
        id(x): x
        for module in model.modules()
        for x in (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        if isinstance(x, Tensor)
    }
    return copy.deepcopy(model, shared).eval()


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Operations that are written for speed are computed by their formulas.

    Fused attention has neither second derivatives nor a rule for vmap; the encoder's path for
    inference packs padded sequences, which has no rule either; and PyTorch's own second derivative
    of weight norm is wrong (seen in 2.13 on CPUs: the norm is taken for a constant).
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(without_fast_path())
        if any(_has_weight_norm(module) for module in model.modules()):
            stack.enter_context(_WeightNorm())
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """PyTorch's inference path for transformers, which calls no layers, is switched off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def unconverted() -> Iterator[None]:
    """`module.to(dtype)` in a forward (a router's, of Switch Transformers) is an error in here.

    It writes to parameters, which stand for several examples inside of `torch.func.vmap`: PyTorch
    would end the process by a fault of memory.
    """
    own: Any = nn.Module._apply
    inside: Any = torch._C._functorch.maybe_current_level

    def refused(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if inside() is None:  # another thread's
            return own(module, *args, **kwargs)
        raise RuntimeError(f"{type(module).__name__} is converted within the model's forward")

    nn.Module._apply = refused  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


def _has_weight_norm(module: nn.Module) -> bool:
    if type(module).__name__ == "_WeightNorm":  # of torch.nn.utils.parametrizations
        return True
    hooks = module._forward_pre_hooks
    return bool(hooks) and any(type(hook).__name__ == "WeightNorm" for hook in hooks.values())


class _WeightNorm(TorchFunctionMode):
    """w = v g/‖v‖ by this formula."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch._weight_norm:
            v, g, *rest = args
            dim = rest[0] if rest else (kwargs or {}).get("dim", 0)
            axes = [k for k in range(v.ndim) if dim == -1 or k != dim]
            return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))
        return func(*args, **(kwargs or {}))
