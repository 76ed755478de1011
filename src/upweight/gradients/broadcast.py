"""Parameters that meet the examples by broadcasting: scales, biases, tables of positions.

    y = x ∘ h(p)        x [b, …], ∘ elementwise, h any function of parameters alone

such as p, 1 + p, −exp(p), p.view(1, −1), or a table that is looked up at the same places for all
examples. h(p) is the same for each example, so it may be given an axis for them: the same numbers,
`expand`ed, whose gradient δᵢ = ∂ℓᵢ/∂h(p) is each example's own. Then gᵢ = J_hᵀ δᵢ.

A convolution with h(p) outside of any layer (Mamba's) becomes one of b groups, each with the h(p)
of its example.

No layer has to speak for p, wherever it is kept. Where p is used in another way (a product with a
matrix made of it), the plain gradient reaches p itself, which tells that gᵢ lacks something.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_ELEMENTWISE = frozenset("add sub mul div truediv true_divide divide multiply where lerp".split())
_CONVOLUTIONS = frozenset((torch.conv1d, torch.conv2d, torch.conv3d))
_SPREADING = frozenset(("expand", "expand_as", "broadcast_to", "repeat"))


@dataclass(eq=False)
class Met:
    """h(p) where it met the examples.

    Args:
        names: Of the parameters that h is a function of.
        value: h(p), with its graph.
        leaf: The same with the examples' axis first, of size b·k where each has k rows.
        delta: δ, of the shape of the leaf.
    """

    names: tuple[str, ...]
    value: Tensor
    leaf: Tensor
    delta: Tensor | None = None

    def by_example(self, size: int) -> Tensor:
        """δᵢ, `[b, *h(p)]`."""
        assert self.delta is not None
        return self.delta.reshape(size, -1, *self.value.shape).sum(dim=1)


@dataclass(eq=False)
class Broadcasting(TorchFunctionMode):
    """While active, what is made of the parameters alone gets an axis where it meets the examples.

    Args:
        leaves: The parameters, by name.
        size: b, at least 2. The examples come first, each perhaps in several rows.
        met: To append what was met to; None: the same replacements, not kept (for a part that a
            checkpoint runs again).
        constants: Further parameters, by identity, that are constants in the layers that run: what
            a layer makes of a watched parameter is a function of parameters, too.
    """

    leaves: Mapping[str, Tensor]
    size: int
    met: list[Met] | None
    constants: Mapping[int, Tensor] = field(default_factory=dict)
    _free: dict[int, tuple[Tensor, tuple[str, ...]]] = field(init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self._free = {id(p): (p, (name,)) for name, p in self.leaves.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args, kwargs))
        free = [x for x in tensors if id(x) in self._free]
        if not free or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        fixed = [x for x in tensors if id(x) in self.constants]
        kind = getattr(func, "__name__", "").strip("_")
        if kind.removeprefix("r") in _ELEMENTWISE or kind.removeprefix("i") in _ELEMENTWISE:
            whole, own = _broadcast(tensors), _broadcast([*free, *fixed])
            if whole != own and whole[0] % self.size == 0:
                return self._with_axes(func, args, kwargs, free, whole[0], len(whole))
            if any(x.requires_grad and id(x) not in self._free for x in tensors):
                return func(*args, **kwargs)  # no function of parameters alone
        elif func is F.scaled_dot_product_attention and not any(x is args[0] for x in free):
            query = args[0]
            return self._with_axes(func, args, kwargs, free, len(query), query.ndim)
        elif func in _CONVOLUTIONS:
            found = self._convolved(func, *args, **kwargs)
            if found is not None:
                return found
        elif kind in _SPREADING and len(free) == 1:
            spread = self._spread(free[0], func(*args, **kwargs))
            if spread is not None:
                return spread
        elif len(free) + len(fixed) < len(tensors) and func is not F.embedding:
            return func(*args, **kwargs)  # another use: the plain gradient tells of it
        out = func(*args, **kwargs)
        names = tuple(dict.fromkeys(name for x in free for name in self._free[id(x)][1]))
        for x in _tensors((out,), {}):
            if x.requires_grad:
                self._free[id(x)] = (x, names)
        return out

    def _convolved(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """A convolution of each example with a weight and a bias of its own; None: it cannot be."""
        rows = len(input)
        if id(input) in self._free or input.ndim != weight.ndim or rows % self.size:
            return None
        if id(weight) in self._free:
            own = self._with_axis(weight, rows, weight.ndim + 1).flatten(0, 1)
            apart = input.reshape(1, -1, *input.shape[2:])
            out = func(apart, own, None, stride, padding, dilation, rows * groups)
            out = out.reshape(rows, -1, *out.shape[2:])
        else:
            out = func(input, weight, None, stride, padding, dilation, groups)
        if bias is None:
            return out  # type: ignore[no-any-return]
        if id(bias) in self._free:
            bias = self._with_axis(bias, rows, 2)
        return out + bias.reshape(*bias.shape, *(1 for _ in weight.shape[2:]))

    def _with_axes(
        self, func: Any, args: Any, kwargs: Any, free: list[Tensor], rows: int, ndim: int
    ) -> Any:
        swapped = {id(x): self._with_axis(x, rows, ndim) for x in free}
        args, kwargs = tree_map(lambda x: swapped.get(id(x), x), (args, kwargs))
        return func(*args, **kwargs)

    def _with_axis(self, x: Tensor, rows: int, ndim: int) -> Tensor:
        """h(p) with the examples' axis, as a leaf; h(p) itself where it has no room for one."""
        if not x.is_floating_point():
            return x
        shape = (1,) * (ndim - x.ndim) + x.shape
        if shape[0] != 1:
            return x
        leaf = x.detach().expand(rows, *shape[1:]).requires_grad_()
        if self.met is not None:
            self.met.append(Met(self._free[id(x)][1], x, leaf))
        return leaf

    def _spread(self, x: Tensor, out: Tensor) -> Tensor | None:
        """What the model expands to the examples by itself; None where it does not."""
        room = out.ndim > x.ndim or x.shape[0] == 1
        if room and out.shape[0] == self.size:
            return self._with_axis(x, self.size, out.ndim).expand(out.shape)
        if out.shape == (self.size * x.shape[0], *x.shape[1:]):
            return self._with_axis(x, self.size, x.ndim + 1).reshape(out.shape)
        return None


def _broadcast(tensors: Iterable[Tensor]) -> torch.Size:
    shapes = [x.shape for x in tensors]
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call,no-any-return]


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from (y for y in x if isinstance(y, Tensor))


def parameter_rows(
    met: Iterable[Met], leaves: Mapping[str, Tensor], size: int
) -> dict[str, Tensor]:
    """gᵢ of each parameter, `[b, *p]`: J_hᵀ δᵢ summed over all that was met."""
    values: dict[int, Tensor] = {}
    deltas: dict[int, Tensor] = {}
    for each in met:
        if each.delta is not None:
            key, delta = id(each.value), each.by_example(size)
            values[key] = each.value
            deltas[key] = deltas[key] + delta if key in deltas else delta
    rows = {name: p.new_zeros(size, *p.shape) for name, p in leaves.items()}
    for name, p in leaves.items():
        if id(p) in values:
            del values[id(p)]
            rows[name] = rows[name] + deltas.pop(id(p))
    if values:
        made = _pulled_back(list(values.values()), list(leaves.values()), list(deltas.values()))
        for name, more in zip(leaves, made, strict=True):
            if more is not None:
                rows[name] = rows[name] + more
    return rows


def _pulled_back(
    values: list[Tensor], leaves: list[Tensor], deltas: list[Tensor]
) -> list[Tensor | None]:
    """J_hᵀ δᵢ for each example, from the graph of h."""
    deltas = [d.to(v.dtype) for v, d in zip(values, deltas, strict=True)]

    def pull(cotangents: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            values,
            leaves,
            cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    try:
        return list(pull(deltas, True))
    except RuntimeError:  # no batching rule
        each = [pull(list(row), False) for row in zip(*deltas, strict=True)]
    return [
        None if parts[0] is None else torch.stack([p for p in parts if p is not None])
        for parts in zip(*each, strict=True)
    ]
