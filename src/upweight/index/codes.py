"""Codes: rows in few bits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError


@dataclass(frozen=True)
class Codes:
    """Whole numbers of 8 bits times a scale for each row, or with 32 bits float32."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 32):
            given = f"bits={self.bits!r}."
            raise SpecError("Rows are kept in 8 or 32 bits.", given, "another size.", "use bits=8.")

    def encode(self, rows: Float[Tensor, "b K"]) -> dict[str, Tensor]:
        """Named tensors, with the examples first."""
        if self.bits == 32:
            return {"codes": rows.float()}
        scales = rows.abs().amax(dim=1).float() / 127
        codes = torch.where(scales[:, None] > 0, rows.float() / scales[:, None], 0.0)
        return {"codes": codes.round().to(torch.int8), "scales": scales}

    def decode(self, shard: Mapping[str, Tensor]) -> Float[Tensor, "b K"]:
        """The rows, but for rounding."""
        if self.bits == 32:
            return shard["codes"]
        return shard["codes"].float() * shard["scales"][:, None]

    def bytes(self, K: int) -> int:
        """Of an example."""
        return K * self.bits // 8 + (4 if self.bits == 8 else 0)
