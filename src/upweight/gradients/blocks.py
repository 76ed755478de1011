"""θ in blocks, a block per weight: where each lies in θ and which layers give its gradients.

    MatrixBlock    W [o, i], its bias (if any) as one more column       gᵢ as `Tokens`
    VectorBlock    biases, gains, and parameters without a rule         gᵢ as `Rows`

`planning.py` makes the plan, `passes.py` follows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from upweight.task.params import Layout
from upweight.task.task import Task


@dataclass(frozen=True)
class MatrixBlock:
    """A weight [o, i] and its bias, one more column, where both are used together.

    Args:
        name: What to call it: the weight, and which of its rows where there are several blocks.
        weight: The weight's name in the layout.
        bias: The bias's name, or None.
        shape: (o, i), i counting the bias.
        rows: Which rows of the weight (and entries of the bias) belong to the block: all, but for a
            group of a convolution.
        is_transposed: Whether the layer keeps the weight as [i, o]; the block is [o, i] all the
            same.
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    rows: tuple[int, int]
    is_transposed: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the layout."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def index(self, layout: Layout) -> Int[Tensor, " d"]:
        """Where the block's entries lie in θ, row by row."""
        first, stop = self.rows
        inputs = self.shape[1] - (self.bias is not None)
        start = layout.slices[self.weight].start + first * inputs
        count = (stop - first) * inputs
        if self.is_transposed:
            index = torch.arange(start, start + count).reshape(inputs, stop - first).T
        else:
            index = torch.arange(start, start + count).reshape(stop - first, inputs)
        if self.bias is not None:
            where = layout.slices[self.bias].start
            index = torch.cat([index, torch.arange(where + first, where + stop)[:, None]], dim=1)
        return index.flatten()


@dataclass(frozen=True)
class VectorBlock:
    """Parameters taken together as one vector of d entries."""

    parameters: tuple[str, ...]
    shape: tuple[int]

    @property
    def name(self) -> str:
        """What to call it."""
        return " + ".join(self.parameters)

    def index(self, layout: Layout) -> Int[Tensor, " d"]:
        """Where the block's entries lie in θ."""
        slices = layout.slices
        return torch.cat([torch.arange(slices[k].start, slices[k].stop) for k in self.parameters])


Block: TypeAlias = MatrixBlock | VectorBlock


@dataclass(frozen=True)
class Source:
    """Where a parameter's gradient comes from: a role in a layer, once per layer that uses it."""

    layer: str
    role: str


@dataclass(frozen=True)
class Plan:
    """How each block's gradients are obtained. Made by `plan`.

    Args:
        task: Whose parameters.
        blocks: All of θ, each parameter in one block.
        layers: The layers to watch, with the axis on which each sees the examples.
        sources: By block name and parameter: where its gradient comes from.
        by_function: Parameters left to `torch.func`.
        broadcast: Parameters that meet the examples by broadcasting, without a layer's rule.
        notes: What fell back and why.
        repeated: The layers whose output is the same for every example and is copied for each, and
            whether it has an axis of size 1 for that.
        one_by_one: Whether examples are taken one at a time, because neither the layers nor
            `torch.func` can tell those of a batch apart.
        products: Parameters that the examples are multiplied with outside of any layer's rule, and
            whether as [i, o]: their calls go by their own name.
        scattered: Layers that see rows of the examples in another order or number, as experts do:
            whose each is, is told by further backward passes.
        computes_in: The dtypes in which the layers pass gradients on, autocast's among them.
    """

    task: Task
    blocks: tuple[Block, ...]
    layers: Mapping[str, int]
    sources: Mapping[str, tuple[Source, ...]]
    by_function: tuple[str, ...]
    notes: tuple[str, ...] = ()
    repeated: Mapping[str, bool] = field(default_factory=dict)
    one_by_one: bool = False
    broadcast: tuple[str, ...] = ()
    products: Mapping[str, bool] = field(default_factory=dict)
    scattered: frozenset[str] = frozenset()
    computes_in: frozenset[torch.dtype] = frozenset()

    @property
    def dtype(self) -> torch.dtype:
        """What factors are formed in: float64 for a float64 model, else float32."""
        return torch.promote_types(self.task.layout.dtype, torch.float32)
