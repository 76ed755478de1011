"""Products of the examples with a parameter itself, wherever it is kept.

    y = x W       x [… i], W [i, o]           g_W = Σ_t δ_t ⊗ a_t
    y_k = x_k W_k  x [k, N, i], W [k, i, o]    the same for each of k: heads, experts

as `x @ W`, `x @ W.t()`, `W @ x`, `F.linear`, `torch.bmm` or `torch.baddbmm`: a head that is tied
by its tensor, the maps of a layer that is never called, experts or heads stacked in one parameter.
Each is a use like that of a Linear: W is a constant in it, and δ arrives at its output.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Watch = Callable[[str, Tensor, Tensor, bool], Tensor]
"""Parameter's name, x with features last and examples first, x W, whether W is [i, o]: to x W."""

_MATMUL = frozenset((torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm))
_MATMUL |= {Tensor.__matmul__}
_WITH_BIAS = frozenset((torch.addmm, torch.baddbmm))
_TURNING = frozenset(("t", "transpose", "swapaxes", "permute", "__get__"))


class Products(TorchFunctionMode):
    """While active, such products are watched.

    Args:
        weights: The parameters, by name, of two axes or three.
        watch: What is told of each product, and returns it.
    """

    def __init__(self, weights: Mapping[str, Tensor], watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._known = {id(w): (w, name, w, False) for name, w in weights.items()}
        # By the identity of a parameter, or of a view of it: that tensor, which must stay alive,
        # the name, the parameter, whether it is transposed.

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known = [self._known.get(id(x)) for x in args[:3]]
        if not any(known) or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        if known[0] is not None and getattr(func, "__name__", "") in _TURNING:
            out = func(*args, **(kwargs or {}))
            _, name, weight, turned = known[0]
            if isinstance(out, Tensor) and _is_transposed(args[0], out):
                self._known[id(out)] = (out, name, weight, not turned)
            return out
        if kwargs:
            return func(*args, **kwargs)
        found = None
        if func is F.linear and known[1] is not None:
            found = self._times(args[0], known[1], True, args[2] if len(args) > 2 else None)
        elif func in _MATMUL and known[1] is not None:
            found = self._times(args[0], known[1], False)
        elif func in _MATMUL and known[0] is not None and known[0][0].ndim == 2 < args[1].ndim:
            found = self._times(args[1].mT, known[0], True)
            found = None if found is None else found.mT
        elif func in _WITH_BIAS and known[2] is not None and known[0] is None:
            found = self._times(args[1], known[2], False, args[0])
        return func(*args) if found is None else found

    def _times(
        self, x: Tensor, known: tuple[Tensor, str, Tensor, bool], turn: bool, bias: Any = None
    ) -> Tensor | None:
        """x W + bias, W perhaps turned; None: in a shape that is not known."""
        _, name, weight, turned = known
        is_io = turned == turn
        own = weight.detach() if is_io else weight.detach().mT
        if own.ndim == 2:
            if x.ndim < 2 or id(x) in self._known:
                return None
            out = self._watch(name, x, x @ own, is_io)
            return out if bias is None else out + bias
        # Of a stack the examples come after it: they are put first, as biases need that, too.
        if x.ndim != own.ndim and x.ndim != own.ndim + 1:
            return None
        if bias is not None and bias.shape[:-1] != (len(own), 1):
            return None
        axes = (x.ndim - 3, x.ndim - 2)
        first = x.transpose(*axes)
        out = self._watch(name, first, (x @ own).transpose(*axes), is_io)
        out = out if bias is None else out + bias.transpose(0, 1)
        return out.transpose(*axes)


def _is_transposed(x: Tensor, out: Tensor) -> bool:
    """Whether `out` is x.mT."""
    turned = x.mT
    return (out.data_ptr(), out.shape, out.stride()) == (
        x.data_ptr(),
        turned.shape,
        turned.stride(),
    )
