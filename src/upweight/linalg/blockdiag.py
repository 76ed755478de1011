"""⊕ₖ Aₖ: each block acts on its own entries of a flat vector, which need not lie side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import ShapeError
from upweight.linalg.operator import LinearOperator, Tag, closed


@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(LinearOperator):
    """v[indexₖ] ↦ Aₖ v[indexₖ] for every block k.

    Raises:
        ShapeError: A block and its entries disagree, or the entries do not cover the vector.
    """

    blocks: tuple[Any, ...]
    indices: tuple[Int[Tensor, "_d"], ...]

    def __post_init__(self) -> None:
        sizes = [len(index) for index in self.indices]
        every = torch.cat(self.indices).sort().values
        covers = torch.equal(every, torch.arange(len(every), device=every.device))
        if sizes != [block.shape[1] for block in self.blocks] or not covers:
            raise ShapeError(
                "Blocks need as many entries as they are wide, and all entries exactly once.",
                f"{sizes} entries for blocks of {[b.shape[1] for b in self.blocks]}"
                f"{'' if covers else ', some of them twice or not at all'}.",
                "a parameter that is part of two blocks, or of none.",
                "build the indices from one partition of the parameters.",
            )

    @property
    def shape(self) -> tuple[int, int]:
        size = sum(len(index) for index in self.indices)
        return (size, size)

    @property
    def like(self) -> LinearOperator:
        return self.blocks[0]

    @property
    def tags(self) -> frozenset[Tag]:
        return frozenset.intersection(*(closed(block.tags) for block in self.blocks))

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        out = torch.empty_like(v)
        for block, index in zip(self.blocks, self.indices, strict=True):
            out[..., index] = block.mv(v[..., index])
        return out

    def function(self, f: Callable[[Tensor], Tensor]) -> "BlockDiagonal":
        """f(A) of blocks that know their eigenvalues."""
        return BlockDiagonal(tuple(b.function(f) for b in self.blocks), self.indices)

    def transpose(self) -> LinearOperator:
        return BlockDiagonal(tuple(b.transpose() for b in self.blocks), self.indices)

    def trace(self) -> Float[Tensor, ""]:
        return torch.stack([block.trace() for block in self.blocks]).sum()

    @property
    def trace_products(self) -> int:
        return sum(block.trace_products for block in self.blocks)
