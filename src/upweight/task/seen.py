"""Are the examples still those that were read first?

A method that was fitted reads its training data again for every question. What an array or a data
set holds may have changed in between: in place, under a NumPy view, or at random.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from upweight.errors import DataChanged
from upweight.runtime.fingerprint import COMBINE, row_checksums


class Seen:
    """A checksum of each of n examples, taken when it is first read.

    Cost: one more reading of each batch in memory. Memory: 9 bytes per example.
    """

    def __init__(self, n: int) -> None:
        self.sums = torch.zeros(n, dtype=torch.int64)
        self.known = torch.zeros(n, dtype=torch.bool)

    def length(self, n: int) -> int:
        """n, if there are still so many; else a DataChanged."""
        if n != len(self.sums):
            raise DataChanged(
                f"The training data must still be the {len(self.sums)} examples that the "
                "method was fitted to.",
                f"{n} examples.",
                "a data set that was appended to, or filtered, after fit.",
                "fit again, or fit to a copy of the data.",
            )
        return n

    def arrays(self, indices: Int[Tensor, " b"], leaves: Sequence[Tensor]) -> None:
        """Examples from tensors that have them on their leading axis; see `require`."""
        sums = torch.zeros(len(indices), dtype=torch.int64)
        for leaf in leaves:
            if leaf.layout is torch.strided:
                sums = sums * COMBINE + row_checksums(leaf).cpu()
        self.require(indices, sums)

    def require(self, indices: Int[Tensor, " b"], sums: Int[Tensor, " b"]) -> None:
        """Keep the checksums of examples that are new, and compare those that are not.

        Raises:
            DataChanged: An example is not what it was.
        """
        changed = self.known[indices] & (self.sums[indices] != sums)
        if bool(changed.any()):
            which = sorted(set(indices[changed].tolist()))
            raise DataChanged(
                "Each training example must be the same whenever it is read, from fit on.",
                f"training example {which[0]} is another"
                + (f", and so are {len(which) - 1} more of its batch." if which[1:] else "."),
                "arrays written to in place after fit (X.mul_(…), X[i] = …, a NumPy array that "
                "the tensor shares), or a data set that gives another example each time it is "
                "asked (random augmentation).",
                "fit again after the change, fit to a copy (X.clone(), X.copy()), or pass the "
                "data set without its random transform.",
            )
        self.sums[indices], self.known[indices] = sums, True
