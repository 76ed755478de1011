"""gᵢ of a convolution, from its input: patches are formed for a few examples at a time.

Patches take as many times the memory of the input as the kernel has offsets. Written whole and read
again, they cost more time than all that is computed from them; formed for a few examples, they are
used while the processor's cache still holds them.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.gradients.factored import Tokens
from upweight.runtime.hardware import has_fast_convolutions

NARROW = 32
"""Columns of patches that are few."""

CACHE_BYTES = 4 * 2**20
"""Memory for patches that are formed at once: what a processor's cache holds."""

DEVICE_BYTES = 256 * 2**20
"""The same on a GPU, where small products take their time to start."""

SMALL = 100
"""Numbers of gᵢ per position up to which a grouped convolution is the quickest way to it: twice to
three times as quick as products with patches up to 190, half as quick from 370 on."""


@dataclass(frozen=True)
class Window:
    """What a convolution multiplies at each of its output positions, in any number of dimensions.

    Args:
        kernel, stride, dilation: As the layer has them.
        ones: Whether a 1 follows each patch.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    ones: bool = False

    def positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a padded input `[..., *shape]`, along each axis."""
        return tuple(
            (length - step * (k - 1) - 1) // s + 1
            for length, k, s, step in zip(
                shape, self.kernel, self.stride, self.dilation, strict=True
            )
        )

    def width(self, channels: int) -> int:
        """i: channels, then offsets of the kernel, as the weight has them, and the 1."""
        return channels * math.prod(self.kernel) + self.ones

    def patches(self, x: Float[Tensor, "b c ..."]) -> Float[Tensor, "b t i"]:
        """The patch under each of the t output positions of an input that is padded already."""
        sizes, channels = self.positions(x.shape[2:]), x.shape[1]
        width, first = self.width(channels), x.movedim(1, 0)
        out = x.new_empty(width, len(x), *sizes)
        if self.ones:
            out[-1] = 1.0
        offsets = out[: width - self.ones].view(channels, *self.kernel, len(x), *sizes)
        # A copy per offset of the kernel, with positions last: what is read and written lies
        # together.
        for offset in itertools.product(*map(range, self.kernel)):
            where = tuple(
                slice(step * k, step * k + s * (size - 1) + 1, s)
                for k, s, step, size in zip(offset, self.stride, self.dilation, sizes, strict=True)
            )
            offsets[(slice(None), *offset)] = first[(slice(None), slice(None), *where)]  # type: ignore[index]
        found = out.flatten(2).permute(1, 2, 0)
        # A product with a matrix of few columns wants rows that lie together: twice as fast.
        return found.contiguous() if width < NARROW else found


class Convolved(Tokens):
    """gᵢ = Σ_t left[i, t] ⊗ (the patch of the input under position t).

    Args:
        left: δ.
        inputs: What was convolved, padded: k inputs per example, whose positions follow each other.
        window: How.
    """

    def __init__(
        self, left: Float[Tensor, "b t o"], inputs: Float[Tensor, "b k c ..."], window: Window
    ) -> None:
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "window", window)

    inputs: Float[Tensor, "b k c ..."]
    window: Window

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.left, self.inputs

    def __len__(self) -> int:
        return len(self.left)

    @property
    def positions(self) -> int:
        return self.left.shape[1]

    @property
    def width(self) -> int:
        return self.window.width(self.inputs.shape[2])

    @cached_property
    def right(self) -> Float[Tensor, "b t i"]:  # type: ignore[override]
        """The patches of all examples, in full."""
        found = self.window.patches(self.inputs.flatten(0, 1))
        return found.reshape(len(self), self.positions, self.width)

    def chunks(self) -> Iterator[Tokens]:
        held = self.positions * self.width * self.left.element_size()
        most = CACHE_BYTES if self.left.device.type == "cpu" else DEVICE_BYTES
        size = max(1, most // max(1, held))
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    @property
    def _is_quick_in_groups(self) -> bool:
        """Whether PyTorch's own gradient of a convolution is a quick way to every example's."""
        small = self.left.shape[2] * self.width <= SMALL * self.positions
        is_plane = self.inputs.ndim == 5 and self.inputs.shape[1] == 1
        some = len(self) > 0  # a convolution has a group or more
        return (
            some and small and is_plane and has_fast_convolutions(self.left.device, self.left.dtype)
        )

    def _in_groups(self) -> Float[Tensor, "b o i"]:
        """Of all examples as the groups of one convolution of b times as many channels."""
        (b, _, c, *shape), o = self.inputs.shape, self.left.shape[2]
        window = self.window
        _, weight, _ = torch.ops.aten.convolution_backward(
            self.left.mT.reshape(1, b * o, *window.positions(tuple(shape))),
            self.inputs.reshape(1, b * c, *shape),
            self.left.new_empty(1).expand(b * o, c, *window.kernel),
            None,
            window.stride,
            (0, 0),
            window.dilation,
            False,
            (0, 0),
            b,
            (False, True, False),
        )
        return weight.reshape(b, o, -1)

    def with_ones(self) -> Tokens:
        return Convolved(self.left, self.inputs, replace(self.window, ones=True))

    def matrices(self) -> Float[Tensor, "b o i"]:
        out = self.left.new_empty(len(self), self.left.shape[2], self.width)
        if self._is_quick_in_groups:
            ones = self.window.ones
            out[..., : self.width - ones] = self._in_groups()
            if ones:
                out[..., -1] = self.left.mT.sum(dim=2)
            return out
        start = 0
        for part in self.chunks():
            stop = start + len(part)
            torch.bmm(part.left.mT, part.right, out=out[start:stop])
            start = stop
        return out

    def total(self) -> Float[Tensor, "o i"]:
        out = self.left.new_zeros(self.left.shape[2], self.width)
        for part in self.chunks():
            out.addmm_(part.left.flatten(0, 1).mT, part.right.flatten(0, 1))
        return out

    def squared_norm(self) -> Float[Tensor, " b"]:
        return torch.cat([Tokens(p.left, p.right).squared_norm() for p in self.chunks()])

    def absolute(self) -> "Convolved":
        return Convolved(self.left.abs(), self.inputs.abs(), self.window)

    def projected(self, left: Float[Tensor, "o k"], right: Float[Tensor, "i l"]) -> Tokens:
        return Tokens(self.left @ left, torch.cat([p.right @ right for p in self.chunks()]))

    def take(self, index: Int[Tensor, " k"] | slice) -> "Convolved":
        return Convolved(self.left[index], self.inputs[index], self.window)

    def scaled(self, by: Float[Tensor, " b"]) -> "Convolved":
        return Convolved(self.left * by[:, None, None], self.inputs, self.window)

    def to(self, dtype: torch.dtype) -> "Convolved":
        return Convolved(self.left.to(dtype), self.inputs.to(dtype), self.window)
