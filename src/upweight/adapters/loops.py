"""Which examples did a step of another library's training loop use, and how much of each?

    order     what the sampler of a DataLoader hands out, batch after batch
    clipped   min(1, c/‖g‖), of which only its effect can be seen

Both only look: the loader and the gradients are what they would have been.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, IterableDataset

from upweight.errors import DataError, SpecError, message


class Order:
    """The order of the examples of a loader, as it is read.

    It stands in the place of the loader's sampler until `close`.

    Args:
        loader: A `DataLoader` of a data set whose examples have indices, or what holds one.
        skipped: Batches that the first pass leaves out, of training that goes on.

    Raises:
        DataError: The examples have no indices, or batches are put together in another way.
    """

    def __init__(self, loader: Any, skipped: int = 0) -> None:
        batches = getattr(loader, "batch_sampler", None)
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            raise DataError(_no_order("an IterableDataset, whose examples have no indices"))
        if type(batches) is not BatchSampler or isinstance(batches.sampler, Order):
            raise DataError(_no_order(f"a {type(loader).__name__} with {type(batches).__name__}"))
        self._batches, self._sampler = batches, batches.sampler
        self._skipped = skipped
        self._drawn: list[int] = []
        self._at = 0
        batches.sampler = self

    def __iter__(self) -> Iterator[int]:
        drawn: list[int] = []
        self._drawn, self._at = drawn, self._skipped * self._batches.batch_size
        self._skipped = 0
        for index in self._sampler:
            drawn.append(index)
            yield index

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sampler"], name)

    def take(self) -> Tensor:
        """The indices of the next batch of the pass."""
        end = self._at + self._batches.batch_size
        found, self._at = self._drawn[self._at : end], end
        if not found or not all(isinstance(i, int) or hasattr(i, "__index__") for i in found):
            raise DataError(_no_order(f"a sampler that handed out {found!r:.60}"))
        return torch.tensor([int(i) for i in found])

    def close(self) -> None:
        """Put the sampler back."""
        if self._batches.sampler is self:
            self._batches.sampler = self._sampler


class Clipped:
    """What clipping leaves of the gradient of each step, told from parameters that are vectors.

    Their norm is taken after the backward passes and again after the step: all gradients were
    multiplied with the same number. Of a model without vectors (biases, scales), all are looked at.
    """

    def __init__(self, params: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        trained = [p for p in params if p.requires_grad]
        self._watched = [p for p in trained if p.ndim <= 1] or trained
        self._before: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[Any] = [
            p.register_post_accumulate_grad_hook(self._seen)  # type: ignore[no-untyped-call]
            for p in self._watched
        ]
        # After the step: a loop may take its backward pass within it, as a closure.
        self._hooks.append(optimizer.register_step_post_hook(self._step))
        self.factor = 1.0
        """Of the last step."""

    def _seen(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter) and p.grad is not None
        self._before[p] = torch.linalg.vector_norm(p.grad.detach())

    def _step(self, *_: Any) -> None:
        found = [(norm, p.grad) for p, norm in self._before.items() if p.grad is not None]
        self._before = {}
        if not found:
            self.factor = 1.0
            return
        before = torch.stack([norm for norm, _ in found]).double()
        after = torch.stack([torch.linalg.vector_norm(g.detach()) for _, g in found]).double()
        whole, left = float(before.norm()), float(after.norm())
        # A gradient of 0 is not clipped. NaN stays: the run refuses it.
        self.factor = left / whole if whole != 0 else 1.0

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def require_one_process(count: int) -> None:
    """Refuse, by a SpecError, several processes or devices, each with a part of every batch."""
    if count > 1:
        raise SpecError(
            "A recorded run is of one process and one device, that sees all examples of a step.",
            f"{count} of them.",
            "torchrun or several GPUs, each of which draws its own part of a batch.",
            "train on one (CUDA_VISIBLE_DEVICES=0) with gradient accumulation; or leave the "
            "recorder out and use Influence(...), which needs no history.",
        )


def _no_order(given: str) -> str:
    return message(
        "Which examples a step used must be known: their indices in the training data, as a "
        "sampler hands them out.",
        f"{given}.",
        "streamed data, or a batch sampler of one's own.",
        "a data set with __getitem__ (list(stream), Dataset.from_generator); or uw.record(...) in "
        "a loop of your own, which tells run.step(indices).",
    )


def spread(batches: Sequence[Tensor], values: Sequence[float]) -> Tensor:
    """The value of each batch, for each of its examples."""
    sizes = [len(batch) for batch in batches]
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
