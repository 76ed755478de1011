"""Random numbers by place: which number belongs to this draw, example and position?

    u = hash(seed, draw, place of the example, place of the position)

Nothing is drawn in turn, so that a number depends neither on the batch that an example is in, nor
on how far the batch is padded, nor on the process. The hash is SplitMix64 (Steele, Lea & Flood
2014): an example's key starts a sequence of its own, and a position is a place in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_BITS = {torch.float64: 52, torch.float32: 23}


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of one draw for the examples of a batch.

    Args:
        keys: One per example.
        counted: `[b, ...]`, the positions that count: they are numbered by how many of them come
            before, so that padding on either side shifts none. None: by their place.
    """

    keys: Int[Tensor, " b"]
    counted: Bool[Tensor, "b ..."] | None = None

    @classmethod
    def of(cls, seed: int, draw: int, places: Int[Tensor, " b"]) -> "Draws":
        """Those of the examples at these places of the data."""
        key = _mixed(torch.tensor(_signed(seed), device=places.device))
        key = _mixed(key + _signed(_GAMMA * (draw + 1)))
        return cls(_mixed(key + (places + 1) * _signed(_GAMMA)))

    @classmethod
    def by(cls, generator: torch.Generator, size: int) -> "Draws":
        """New ones, for as many examples, from the next number of a generator."""
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        return cls.of(int(seed), 0, torch.arange(size, device=generator.device))

    def counting(self, counted: Bool[Tensor, "b ..."]) -> "Draws":
        """The same, with positions numbered among those that count."""
        if self.counted is not None:
            more = counted.ndim - self.counted.ndim
            mask = self.counted.reshape(*self.counted.shape, *(1,) * more)
            counted = counted & mask
        return Draws(self.keys, counted)

    def uniform(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "b ..."]:
        """Independent numbers of U(0, 1), `[b, *shape]`; neither 0 nor 1 is among them."""
        bits = _BITS[dtype]
        words = (_mixed(self._places(shape)) >> (64 - bits)) & (2**bits - 1)
        return (words.to(dtype) + 0.5) * 2.0**-bits

    def normal(self, shape: tuple[int, ...]) -> Float[Tensor, "b ..."]:
        """Independent numbers of N(0, 1), `[b, *shape]`, in float64."""
        return torch.special.ndtri(self.uniform(shape))

    def generators(self) -> Iterator[torch.Generator]:
        """A generator for each example."""
        generator = torch.Generator(device=self.keys.device)
        for key in self.keys.tolist():
            yield generator.manual_seed(key)

    def _places(self, shape: tuple[int, ...]) -> Int[Tensor, "b ..."]:
        """key + Σ_k place_k · γ_k: where in its sequence each number lies."""
        axes, first = [], 0
        if self.counted is not None and self.counted.ndim > 1:
            rank = self.counted.flatten(1).cumsum(dim=1).reshape(self.counted.shape)
            first = rank.ndim - 1
            axes.append(rank.reshape(*rank.shape, *(1,) * (len(shape) - first)))
        for k, extent in enumerate(shape[first:], first):
            place = torch.arange(1, extent + 1, device=self.keys.device)
            axes.append(place.reshape(-1, *(1,) * (len(shape) - k - 1)))
        total = self.keys.reshape(-1, *(1,) * len(shape)).expand(-1, *shape)
        for k, place in enumerate(axes):
            total = total + place * _signed(_GAMMA * (2 * k + 1) ** 9)
        return total


def _signed(x: int) -> int:
    """x modulo 2⁶⁴, as an int64 holds it."""
    return (x + 2**63) % 2**64 - 2**63


def _mixed(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """SplitMix64's output function; products of int64 are taken modulo 2⁶⁴."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))
