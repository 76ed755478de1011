"""gᵢ kept as its factors: a sum of outer products over the positions where a weight was used.

    Tokens    gᵢ = Σ_t left[i, t] ⊗ right[i, t]        for a weight [o, i]
    Lookups   the same with left[i, t] = e(index[i, t])  for an embedding
    Rows      gᵢ as it is, [b, d]                      for biases, gains and what has no rule

A linear layer has left = δ and right = a (extended by a 1 where the bias goes with the weight); a
convolution has a position per patch; a weight used several times has the positions of all uses.
Where δ = 0 (padding) left = 0 too, whichever side δ is on: `alive` asks there, up to rounding.
Nothing of size o·i is formed per example until somebody asks for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.linalg.products import product

FEW = 40
"""Multiply-adds per number of the factors that forming gᵢ takes, where they are few: no more than
rounding that number to a shorter dtype costs. 6 and 26 for a convolution's first layers, 64 for a
transformer of width 128."""


def extended(x: Float[Tensor, "b t i"]) -> Float[Tensor, "b t j"]:
    """x with a 1 behind each row."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


ROUNDING = 64
"""How many ε of the largest δ of an example a δ may be that is 0 but for rounding: 10 was seen,
where attention is nearly sure."""


def any_nonzero(x: Float[Tensor, "b t i"]) -> Bool[Tensor, "b t"]:
    """Which rows hold more than zeros and what rounding makes of them; NaN counts.

    The first token of a sequence attends to itself alone, so that nothing depends on its query. Its
    δ is 0 or a rounding error, as it happens: by how a batch is padded, for one.
    """
    # As norms of rows, or where these do not lie in memory as such as sums: any() takes many times
    # as long, and so do norms there.
    if x.is_contiguous():
        sizes = torch.linalg.vector_norm(x, dim=-1)
    elif x.mT.is_contiguous():
        sizes = x.mT.abs().sum(dim=1)
    else:
        sizes = x.abs() @ x.new_ones(x.shape[-1])
    if not sizes.numel():
        return sizes != 0
    largest = sizes.amax(dim=-1)
    odd = ~((largest > 0) & (largest < torch.inf))  # zeros, or squares beyond the dtype
    if bool(odd.any()):
        sizes[odd] = x[odd].abs().sum(dim=-1)
    # In half precision ε is no longer small.
    eps = torch.finfo(x.dtype).eps if x.dtype in (torch.float32, torch.float64) else 0.0
    return ~(sizes <= ROUNDING * eps * sizes.amax(dim=-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class Tokens:
    """gᵢ = Σ_t left[i, t] ⊗ right[i, t], a matrix [o, i] per example."""

    left: Float[Tensor, "b t o"]
    right: Float[Tensor, "b t i"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.left, self.right

    def __len__(self) -> int:
        return len(self.right)

    @property
    def positions(self) -> int:
        """t."""
        return self.right.shape[1]

    @property
    def alive(self) -> Bool[Tensor, "b t"]:
        """Where something is added to gᵢ: not where there is padding."""
        return any_nonzero(self.left)

    @property
    def width(self) -> int:
        """i."""
        return self.right.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of both sides."""
        return self.tensors[-1].dtype

    def chunks(self) -> Iterator["Tokens"]:
        """The examples, as many at a time as it pays to multiply out together."""
        yield self

    def with_ones(self) -> "Tokens":
        """right extended by a 1, whose column of gᵢ is the bias's gradient."""
        return Extended(self.left, self.right)

    def matrices(self) -> Float[Tensor, "b o i"]:
        """gᵢ in full."""
        if self.positions == 1:
            return self.left[:, 0, :, None] * self.right[:, 0, None, :]
        return self.left.mT @ self.right

    def form(self, out: Float[Tensor, "b o i"], bias: Float[Tensor, "b o"] | None) -> None:
        """gᵢ written to `out`, its last column to `bias` where there is one."""
        if bias is None and type(self) is Tokens:
            if self.positions == 1:
                torch.mul(self.left[:, 0, :, None], self.right[:, 0, None, :], out=out)
            else:
                torch.bmm(self.left.mT, self.right, out=out)
            return
        full = self.matrices()
        out.copy_(full if bias is None else full[..., :-1])
        if bias is not None:
            bias.copy_(full[..., -1])

    def total(self) -> Float[Tensor, "o i"]:
        """Σᵢ gᵢ."""
        return self.left.flatten(0, 1).mT @ self.right.flatten(0, 1)

    def squared_norm(self) -> Float[Tensor, " b"]:
        """‖gᵢ‖², by inner products over pairs of positions or from gᵢ, whichever takes less."""
        t, o, i = self.positions, self.left.shape[2], self.width
        if t * (o + i) < o * i:
            pairs = (self.left @ self.left.mT) * (self.right @ self.right.mT)
            return pairs.sum(dim=(1, 2))
        return self.matrices().square().sum(dim=(1, 2))

    def inner(self, vectors: Float[Tensor, "q o i"]) -> Float[Tensor, "q b"]:
        """⟨V_q, gᵢ⟩."""
        return vectors.flatten(1) @ self.matrices().flatten(1).mT

    def absolute(self) -> "Tokens":
        """Σ_t |left| ⊗ |right|: no smaller than |gᵢ|, and what its rounding is relative to."""
        return Tokens(self.left.abs(), self.right.abs())

    def projected(self, left: Float[Tensor, "o k"], right: Float[Tensor, "i l"]) -> "Tokens":
        """leftᵀ gᵢ right, still factored: the projection acts on the factors."""
        return Tokens(self.left @ left, product(self.right, right))

    def take(self, index: Int[Tensor, " k"] | slice) -> "Tokens":
        """Some of the examples."""
        return Tokens(self.left[index], self.right[index])

    def scaled(self, by: Float[Tensor, " b"]) -> "Tokens":
        """byᵢ gᵢ."""
        return Tokens(self.left * by[:, None, None], self.right)

    def to(self, dtype: torch.dtype) -> "Tokens":
        """The same in another dtype."""
        return Tokens(self.left.to(dtype), self.right.to(dtype))

    def compact(self) -> "Tokens":
        """gᵢ itself, where it is smaller than its factors and takes few products to form."""
        t, o, i = self.positions, self.left.shape[2], self.width
        is_large = t > 1 and t * (o + i) > o * i
        return Formed(self.matrices()) if is_large and o * i < FEW * (o + i) else self

    def rounded(self, dtype: torch.dtype) -> "Tokens":
        """The same gᵢ for products in a shorter dtype: what is smaller is rounded."""
        return self if self.dtype == dtype else self.compact().to(dtype)


class Formed(Tokens):
    """gᵢ in full, as tokens: left[i, t] = e_t and right[i, t] row t of gᵢ."""

    def __init__(self, values: Float[Tensor, "b o i"]) -> None:
        object.__setattr__(self, "right", values)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.right,)

    @property
    def left(self) -> Float[Tensor, "b t o"]:  # type: ignore[override]
        """The identity, for each example."""
        b, o, _ = self.right.shape
        return torch.eye(o, dtype=self.right.dtype, device=self.right.device).expand(b, o, o)

    def matrices(self) -> Float[Tensor, "b o i"]:
        return self.right

    def total(self) -> Float[Tensor, "o i"]:
        return self.right.sum(dim=0)

    def squared_norm(self) -> Float[Tensor, " b"]:
        return self.right.square().sum(dim=(1, 2))

    def absolute(self) -> "Formed":
        return Formed(self.right.abs())

    def projected(self, left: Float[Tensor, "o k"], right: Float[Tensor, "i l"]) -> "Formed":
        return Formed((left.mT @ self.right) @ right)

    def take(self, index: Int[Tensor, " k"] | slice) -> "Formed":
        return Formed(self.right[index])

    def scaled(self, by: Float[Tensor, " b"]) -> "Formed":
        return Formed(self.right * by[:, None, None])

    def to(self, dtype: torch.dtype) -> "Formed":
        return Formed(self.right.to(dtype))

    def compact(self) -> "Formed":
        return self


class Extended(Tokens):
    """Tokens with a 1 behind each row of right, which most products of them need not write out.

    Rows of a power of two and one more numbers make slow products.

    Args:
        left: As of tokens.
        inputs: right without the 1.
    """

    def __init__(self, left: Float[Tensor, "b t o"], inputs: Float[Tensor, "b t j"]) -> None:
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "inputs", inputs)

    inputs: Float[Tensor, "b t j"]

    @property
    def right(self) -> Float[Tensor, "b t i"]:  # type: ignore[override]
        """With the 1: made when asked for, since gradients are kept for a second pass."""
        return extended(self.inputs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.left, self.inputs

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    @property
    def positions(self) -> int:
        return self.inputs.shape[1]

    @property
    def width(self) -> int:
        return self.inputs.shape[2] + 1

    def form(self, out: Float[Tensor, "b o i"], bias: Float[Tensor, "b o"] | None) -> None:
        if bias is None:
            super().form(out, None)
            return
        Tokens(self.left, self.inputs).form(out, None)
        torch.sum(self.left, dim=1, out=bias)

    def projected(self, left: Float[Tensor, "o k"], right: Float[Tensor, "i l"]) -> Tokens:
        return Tokens(self.left @ left, product(self.inputs, right[:-1], plus=right[-1]))

    def absolute(self) -> "Extended":
        return Extended(self.left.abs(), self.inputs.abs())

    def take(self, index: Int[Tensor, " k"] | slice) -> "Extended":
        return Extended(self.left[index], self.inputs[index])

    def scaled(self, by: Float[Tensor, " b"]) -> "Extended":
        return Extended(self.left * by[:, None, None], self.inputs)

    def to(self, dtype: torch.dtype) -> "Extended":
        return Extended(self.left.to(dtype), self.inputs.to(dtype))


class Lookups(Tokens):
    """gᵢ = Σ_t e(index[i, t]) ⊗ right[i, t]: each position adds to the one row that it looked up.

    Nothing of the size of the vocabulary is formed, unless somebody asks for `left`.

    Args:
        index: The rows.
        rows: How many the weight has.
        right: What is added to them.
    """

    def __init__(self, index: Int[Tensor, "b t"], rows: int, right: Float[Tensor, "b t i"]) -> None:
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "right", right)

    index: Int[Tensor, "b t"]
    rows: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.index, self.right

    @property
    def left(self) -> Float[Tensor, "b t o"]:  # type: ignore[override]
        """e(index), in full; 0 where nothing is added."""
        out = self.right.new_zeros(*self.index.shape, self.rows)
        return out.scatter_(2, self.index[..., None], self.alive[..., None].to(out.dtype))

    @property
    def alive(self) -> Bool[Tensor, "b t"]:
        return any_nonzero(self.right)

    def matrices(self) -> Float[Tensor, "b o i"]:
        b, _, i = self.right.shape
        offset = self.rows * torch.arange(b, device=self.index.device)[:, None]
        flat = self.right.new_zeros(b * self.rows, i)
        flat.index_add_(0, (self.index + offset).flatten(), self.right.flatten(0, 1))
        return flat.reshape(b, self.rows, i)

    def total(self) -> Float[Tensor, "o i"]:
        out = self.right.new_zeros(self.rows, self.right.shape[2])
        return out.index_add_(0, self.index.flatten(), self.right.flatten(0, 1))

    def squared_norm(self) -> Float[Tensor, " b"]:
        same = self.index[:, :, None] == self.index[:, None, :]
        return torch.where(same, self.right @ self.right.mT, 0.0).sum(dim=(1, 2))

    def inner(self, vectors: Float[Tensor, "q o i"]) -> Float[Tensor, "q b"]:
        # One vector at a time: all would hold q·b·t·i numbers.
        return torch.stack([(v[self.index] * self.right).sum(dim=(1, 2)) for v in vectors])

    def scaled(self, by: Float[Tensor, " b"]) -> "Lookups":
        return Lookups(self.index, self.rows, self.right * by[:, None, None])

    def absolute(self) -> "Lookups":
        return Lookups(self.index, self.rows, self.right.abs())

    def projected(self, left: Float[Tensor, "o k"], right: Float[Tensor, "i l"]) -> Tokens:
        return Tokens(left[self.index], self.right @ right)

    def take(self, index: Int[Tensor, " k"] | slice) -> "Lookups":
        return Lookups(self.index[index], self.rows, self.right[index])

    def to(self, dtype: torch.dtype) -> "Lookups":
        return Lookups(self.index, self.rows, self.right.to(dtype))

    def compact(self) -> "Lookups":
        return self


class Joined(Tokens):
    """gᵢ = Σ over several uses of one weight, each as it is: of a tied weight lookups and products.

    `left` and `right` have the positions of all uses, one use after the other. A rotation of it
    need not write lookups as products with rows of zeros and a one.

    Args:
        parts: The uses.
    """

    def __init__(self, parts: Sequence[Tokens]) -> None:
        object.__setattr__(self, "parts", tuple(parts))

    parts: tuple[Tokens, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for part in self.parts for x in part.tensors)

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def positions(self) -> int:
        return sum(part.positions for part in self.parts)

    @cached_property
    def left(self) -> Float[Tensor, "b t o"]:  # type: ignore[override]
        """Of all uses."""
        return torch.cat([part.left for part in self.parts], dim=1)

    @cached_property
    def right(self) -> Float[Tensor, "b t i"]:  # type: ignore[override]
        """Of all uses."""
        return torch.cat([part.right for part in self.parts], dim=1)

    @property
    def alive(self) -> Bool[Tensor, "b t"]:
        return torch.cat([part.alive for part in self.parts], dim=1)

    def matrices(self) -> Float[Tensor, "b o i"]:
        first, *rest = (part.matrices() for part in self.parts)
        for each in rest:
            first = first + each
        return first

    def projected(self, left: Float[Tensor, "o k"], right: Float[Tensor, "i l"]) -> Tokens:
        turned = [part.projected(left, right) for part in self.parts]
        return Tokens(
            torch.cat([p.left for p in turned], 1), torch.cat([p.right for p in turned], 1)
        )

    def take(self, index: Int[Tensor, " k"] | slice) -> "Joined":
        return Joined([part.take(index) for part in self.parts])

    def scaled(self, by: Float[Tensor, " b"]) -> "Joined":
        return Joined([part.scaled(by) for part in self.parts])

    def to(self, dtype: torch.dtype) -> "Joined":
        return Joined([part.to(dtype) for part in self.parts])


@dataclass(frozen=True, eq=False)
class Rows:
    """gᵢ over d parameters, in full."""

    values: Float[Tensor, "b d"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return (self.values,)

    def __len__(self) -> int:
        return len(self.values)

    def total(self) -> Float[Tensor, " d"]:
        """Σᵢ gᵢ."""
        return self.values.sum(dim=0)

    def squared_norm(self) -> Float[Tensor, " b"]:
        """‖gᵢ‖²."""
        return self.values.square().sum(dim=1)

    def inner(self, vectors: Float[Tensor, "q d"]) -> Float[Tensor, "q b"]:
        """⟨v_q, gᵢ⟩."""
        return vectors @ self.values.mT

    def absolute(self) -> "Rows":
        """|gᵢ|."""
        return Rows(self.values.abs())

    def take(self, index: Int[Tensor, " k"] | slice) -> "Rows":
        """Some of the examples."""
        return Rows(self.values[index])

    def scaled(self, by: Float[Tensor, " b"]) -> "Rows":
        """byᵢ gᵢ."""
        return Rows(self.values * by[:, None])

    def to(self, dtype: torch.dtype) -> "Rows":
        """The same in another dtype."""
        return Rows(self.values.to(dtype))


class Summed(Rows):
    """gᵢ = Σ_t left[i, t], summed when somebody asks: most biases go with their weight.

    Args:
        left: What is summed.
    """

    def __init__(self, left: Float[Tensor, "b t d"]) -> None:
        object.__setattr__(self, "left", left)

    left: Float[Tensor, "b t d"]

    def __len__(self) -> int:
        return len(self.left)

    @cached_property
    def values(self) -> Float[Tensor, "b d"]:  # type: ignore[override]
        """gᵢ."""
        return self.left.sum(dim=1)


Factors: TypeAlias = Tokens | Rows


def stacked(parts: Sequence[Factors]) -> Factors:
    """Examples of several batches in one; positions that some of them lack are zero."""
    if len(parts) == 1:
        return parts[0]
    tokens = [p for p in parts if isinstance(p, Tokens)]
    if not tokens:
        return Rows(torch.cat([p.values for p in parts if isinstance(p, Rows)]))
    most = max(p.positions for p in tokens)

    def filled(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, most - x.shape[1]))

    lookups = [p for p in tokens if isinstance(p, Lookups)]
    if len(lookups) == len(tokens):
        index = torch.cat([F.pad(p.index, (0, most - p.positions)) for p in lookups])
        return Lookups(index, lookups[0].rows, torch.cat([filled(p.right) for p in lookups]))
    return Tokens(
        torch.cat([filled(p.left) for p in tokens]), torch.cat([filled(p.right) for p in tokens])
    )
