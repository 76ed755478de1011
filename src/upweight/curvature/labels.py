"""Whose labels does the curvature see? The model's own, drawn or in expectation, or the data's.

Sampled     E_{ŷ∼p}[g gᵀ] with a few draws ŷ per example      the Fisher, unbiased
Expected    E_{ŷ∼p}[g gᵀ] = Jᵀ Λ J, a pass per output          the Fisher and GGN, exactly
Observed    g gᵀ with the data's y                            the empirical Fisher
"""

import abc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from upweight.errors import NotPositiveDefinite, SpecError, UnsupportedModel
from upweight.task.draws import Draws
from upweight.task.losses import Loss, residual

Head: TypeAlias = tuple[Callable[[Tensor, Any, Any], Tensor], Any]
"""A value per example, `head(outputs, targets, extra)`, and its extra."""


class Labels(abc.ABC):
    """Which labels each example's gradient is taken with."""

    per_example: int
    """How many gradients of an example make its share of the curvature; each counts 1/this."""

    draws_anew: bool = False
    """Whether each pass sees other labels. What the first has fitted to its draws (an eigenbasis)
    would else be judged by the same draws (its eigenvalues)."""

    @abc.abstractmethod
    def heads(
        self, loss: Loss, outputs: Tensor, targets: Any, places: Int[Tensor, " b"], stream: int
    ) -> Iterator[Head]:
        """The values whose gradients to take.

        Args:
            loss: ℓ.
            outputs: Of a batch, detached.
            targets: Of the batch.
            places: Of the examples in the data; see `Data.places`.
            stream: Number of the pass.
        """


@dataclass(frozen=True)
class Sampled(Labels):
    """Labels ŷ ~ p(· | f(x)) drawn from the model: the Fisher information, without bias.

    An example's labels belong to its place in the data and to the positions in it that count, not
    to its batch nor to how far that is padded. A loss of your own has its `sample` called for each
    example with a generator of its own: padding then matters if it changes how many numbers it
    draws.

    The gradients are Jᵀδ with δ = ∂ℓ(f, ŷ)/∂f, which the losses of this package have without ŷ: a
    label of outputs ± 1 cannot be told from the output where that is large.

    Args:
        samples: Draws per example.
        seed: Of the draws.

    Raises:
        SpecError: Not at least one sample.
    """

    samples: int = 1
    seed: int = 0

    draws_anew = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SpecError(
                "Sampled needs at least one sample per example.",
                f"samples={self.samples!r}.",
                "0 meant as no sampling.",
                "use Expected() for the exact expectation or Observed() for the data's labels.",
            )

    @property
    def per_example(self) -> int:  # type: ignore[override]
        return self.samples

    def heads(
        self, loss: Loss, outputs: Tensor, targets: Any, places: Int[Tensor, " b"], stream: int
    ) -> Iterator[Head]:
        for k in range(self.samples):
            draw = stream * self.samples + k
            draws = Draws.of(self.seed, draw, places.to(outputs.device))
            yield _product, residual(loss, outputs, targets, draws)


@dataclass(frozen=True)
class Expected(Labels):
    """Every label, weighted by its probability: Jᵀ Λ J with Λ = ∂²ℓ/∂f², without sampling.

    Any loss that is convex in the outputs will do; for negative log-likelihoods of an exponential
    family in its natural parameter this is the Fisher (Martens 2020, §9).

    Args:
        most: The most outputs per example for which to take that many backward passes.

    Cost: one backward pass per output of the model (rank of Λ), where `Sampled` takes one in all.
    """

    most: int = 256

    per_example = 1

    def heads(
        self, loss: Loss, outputs: Tensor, targets: Any, places: Int[Tensor, " b"], stream: int
    ) -> Iterator[Head]:
        width = outputs[0].numel()
        if width > self.most:
            raise UnsupportedModel(
                f"Expected() takes one backward pass per output, up to {self.most}.",
                f"{width} outputs per example, of shape {tuple(outputs.shape[1:])}.",
                "a model with many classes or one output per position.",
                "use Sampled(), or Expected(most=...) if that many passes are meant.",
            )
        # In half precision the Hessian's own rounding would be taken for a negative eigenvalue.
        precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        blocks, at = _by_position(loss.hessian(precise, targets).double(), outputs.shape)
        values, vectors = torch.linalg.eigh(blocks)
        if float(values.min()) < -1e-6 * float(values.abs().max()):
            raise NotPositiveDefinite(
                "Expected() needs a loss that is convex in the model's outputs.",
                f"∂²ℓ/∂f² with eigenvalue {float(values.min()):.3g} under {loss!r}.",
                "a robust or bounded loss.",
                "use Observed() or Sampled().",
                smallest=float(values.min()),
            )
        # What is rounding, of either sign, becomes a gradient of exactly 0.
        eps = torch.finfo(precise.dtype).eps
        rounding = blocks.shape[-1] * eps * values.amax(dim=(1, 2), keepdim=True)
        sizes = torch.where(values > rounding, values, 0.0).sqrt()
        # The symmetric root: every column has a part in every output that counts, so that each
        # example and position gives as many pairs (a, δ), whatever rounding makes of a null space.
        roots = (vectors * sizes[:, :, None, :]) @ vectors.mT
        roots = roots * (blocks.diagonal(dim1=2, dim2=3) != 0)[..., None]
        for t, k in itertools.product(range(roots.shape[1]), range(roots.shape[3])):
            column = roots.new_zeros(len(roots), width)
            column[:, at[t]] = roots[:, t, :, k]
            yield _product, column.reshape(outputs.shape).to(outputs.dtype)


def _product(f: Tensor, _: Any, delta: Tensor) -> Tensor:
    """⟨f, δ⟩ of each example, whose gradient in f is δ."""
    return (f * delta).reshape(len(f), -1).sum(dim=1)


def _by_position(hessian: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Λ [b, c, c] as [b, t, c, c], one block for each position where it has no others.

    Eigenvectors are then of one position each, also where positions have equal eigenvalues: which
    ones a whole decomposition would mix depends on how far the batch is padded.

    Returns:
        The blocks, and where the outputs of each position lie among all, [t, c]. Positions are on
        every axis but the last, or but that after the examples.
    """
    every = torch.arange(hessian.shape[1], device=hessian.device)
    last, second = (shape[-1], shape[1]) if len(shape) > 1 else (1, 1)
    for at in (every.reshape(-1, last), every.reshape(second, -1).T):
        blocks = hessian[:, at[:, :, None], at[:, None, :]]
        if bool(torch.count_nonzero(blocks) == torch.count_nonzero(hessian)):
            return blocks, at
    return hessian[:, None], every[None]


@dataclass(frozen=True)
class Observed(Labels):
    """The data's own labels: the empirical Fisher, which is not the Fisher.

    The two agree only where the model is right about the label distribution (Kunstner, Balles &
    Hennig 2019, §3).
    """

    per_example = 1

    def heads(
        self, loss: Loss, outputs: Tensor, targets: Any, places: Int[Tensor, " b"], stream: int
    ) -> Iterator[Head]:
        def head(f: Tensor, y: Any, _: Any) -> Tensor:
            return loss(f, y)

        yield head, torch.zeros(len(outputs), device=outputs.device)
