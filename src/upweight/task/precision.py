"""How coarsely does a model compute?

The dtypes of parameters and outputs do not tell: autocast inside of forward computes in bfloat16,
and may cast its result back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upweight.task.batches import tensors


class _Seen(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Notes the floating dtype of every result.

    Of functions, not of the operators below them: the mode for those takes a second to import.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.dtypes |= {x.dtype for x in tensors(result) if x.is_floating_point()}
        return result


def dtypes_in(function: Callable[[], Any]) -> set[torch.dtype]:
    """The floating dtypes of what a call computes on its way."""
    with _Seen() as seen:
        function()
    return seen.dtypes


def coarsest(dtypes: set[torch.dtype]) -> float:
    """The relative rounding of the coarsest of these; 0 for none."""
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def size_of(x: Tensor) -> float:
    """The largest finite entry by magnitude."""
    return float(x.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0
