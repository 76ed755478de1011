"""Shared types, and the glossary of dimension letters.

The same letter means the same axis in every annotation, einsum and comment:

    n  training examples      b  examples in a batch      c  outputs or classes of the model
    q  queries                p  parameters               i  inputs (features) of a linear map
    k  right-hand sides       s  subsets or samples       t  tokens or positions

A `Batch` is what one call of the model needs: a tuple `(inputs..., targets)`, a dict of tensors, or
what the user's collate function makes. Tensors have the examples on their leading axis; what has
them in another way holds one example (`upweight.task.batches`).
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

Batch: TypeAlias = Any
Params: TypeAlias = Mapping[str, Tensor]
Forward: TypeAlias = Callable[[nn.Module, Batch], tuple[Any, Any]]

Folder: TypeAlias = str | os.PathLike[str]

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
else:  # packages of extras: loaded when a figure or a table is asked for
    Axes = DataFrame = Any

__all__ = ["Axes", "Batch", "DataFrame", "Folder", "Forward", "Params"]
