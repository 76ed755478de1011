"""Σ_b Jᵇᵀ Λᵇ Jᵇ: the product form shared by the GGN and both Fishers.

For a map F(θ) with one row per example, Jᵢ = ∂Fᵢ/∂θ and a small symmetric Λᵢ,

    A v = Σᵢ Jᵢᵀ Λᵢ (Jᵢ v)

costs two reverse-mode passes per vector. The GGN takes F = f and Λ = ∂²ℓ/∂f²; the Fishers take F =
ℓ and Λ = 1, which is Σ gᵢ gᵢᵀ.

`torch.func` takes many vectors at a time, and plain autograd one at a time from a graph that they
share: whichever is faster. Where the former cannot run the model it is always the latter; where an
operation has no second derivative, which the product above needs though the matrix does not, it is
made of the Jacobians themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.curvature import BatchTerm
from upweight.gradients.autograd import (
    PROBE,
    agrees,
    attempted,
    few,
    first_line,
    gauss_newton_products,
    one_by_one,
    saved_bytes,
)
from upweight.gradients.blocks import Plan
from upweight.gradients.planning import plan
from upweight.linalg.operator import LinearOperator
from upweight.task.batches import cut
from upweight.task.data import WORKING_BYTES, Data, batch_size
from upweight.task.task import Task

TOGETHER = 16
"""Vectors that share a backward pass."""

Weigh: TypeAlias = Callable[[Float[Tensor, "k m c"], slice], Float[Tensor, "k m c"]]


@dataclass(frozen=True)
class Way:
    """How products and Jacobians are computed.

    Args:
        products: By `torch.func`, by plain autograd, or from the Jacobians.
        plan: How Jacobians are computed by the layers' rules; None: by `torch.func`.
        notes: Why, where it is not `torch.func`.
        is_plain: Whether plain autograd gives the same as `torch.func`.
        saved: Bytes that autograd keeps of an example.
    """

    products: Literal["func", "autograd", "jacobians"] = "func"
    plan: Plan | None = None
    notes: tuple[str, ...] = ()
    is_plain: bool = True
    saved: int = 0

    def takes(
        self, theta: Float[Tensor, " p"], vectors: int, examples: int
    ) -> Literal["func", "autograd", "jacobians"]:
        """How so many products of a batch are taken: of two ways, the faster."""
        plain = self.is_plain and one_by_one(theta, vectors, self.saved * examples)
        return "autograd" if self.products == "func" and plain else self.products


@dataclass(frozen=True, eq=False, repr=False)
class GaussNewtonTerm(BatchTerm):
    """Σᵢ Jᵢᵀ Λᵢ Jᵢ over one batch.

    Args:
        function: θ ↦ F(θ), `[p] -> [b, c]`; θ flat or by name.
        jacobians: () ↦ J in pieces `[m, c, p]`, some examples each, in their order; called to write
            the matrix out, or where the way is that.
        weigh: (u, some) ↦ Λ u for some of the examples and `[k, m, c]`, or None for the identity.
        how: How products are taken.
        count: b.
        outputs: c.
    """

    function: Callable[..., Float[Tensor, "b c"]]
    jacobians: Callable[[], Iterator[Float[Tensor, "m c p"]]]
    weigh: Weigh | None
    how: Way
    count: int
    outputs: int

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        if v.numel() == 0:  # vmap needs at least one vector
            return v.clone()
        flat = v.reshape(-1, v.shape[-1])
        products = self.how.takes(self.theta, len(flat), self.count)
        if products == "autograd":
            rows = gauss_newton_products(self.task, self.theta, self.function, self._weighed, flat)
        elif products == "jacobians":
            rows = torch.zeros_like(flat)
            for j, weighted in self._factors():
                along = torch.einsum("bcp,kp->kbc", weighted, flat)
                rows += torch.einsum("bcp,kbc->kp", j, along)
        else:
            rows = self._by_func(flat)
        return rows.reshape(v.shape)

    def _by_func(self, flat: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        values, pullback = torch.func.vjp(self.function, self.theta)  # type: ignore[misc]
        # u ↦ Jᵀu is linear, so its own pullback at v is J v. Unlike forward mode this needs only
        # operations that have a backward pass (fused encoder layers have no forward mode), and the
        # forward pass is shared by all vectors.
        pushforward = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(values))[1]

        rows = []
        for some in torch.split(flat, TOGETHER):
            along = torch.func.vmap(lambda v: pushforward(v)[0])(some)
            rows.append(torch.func.vmap(lambda u: pullback(u)[0])(self._weighed(along)))
        return torch.cat(rows)

    def _weighed(self, u: Float[Tensor, "k b c"]) -> Float[Tensor, "k b c"]:
        """Λ u of all the examples."""
        return u if self.weigh is None else self.weigh(u, slice(0, u.shape[1]))

    def add_to(self, out: Float[Tensor, "p p"], scale: float = 1.0) -> None:
        for j, weighted in self._factors():
            out.addmm_(j.flatten(0, 1).T.to(out), weighted.flatten(0, 1).to(out), alpha=scale)

    def diagonal(self) -> Float[Tensor, " p"]:
        total = torch.zeros_like(self.theta)
        for j, weighted in self._factors():
            total += (j * weighted).sum(dim=(0, 1))
        return total

    @property
    def trace_products(self) -> int:
        """A backward pass per output, where the Jacobian of one example can be formed."""
        size = self.outputs * len(self.theta) * self.theta.element_size()
        return self.outputs if size <= WORKING_BYTES else len(self.theta)

    def _factors(self) -> Iterator[tuple[Float[Tensor, "m c p"], Float[Tensor, "m c p"]]]:
        """J and Λ J of some examples at a time."""
        start = 0
        for j in self.jacobians():
            stop = start + len(j)
            if self.weigh is None:
                yield j, j
            else:
                yield j, self.weigh(j.movedim(2, 0), slice(start, stop)).movedim(0, 2)
            start = stop


def pieces(batch: Any, size: int, at_once: int) -> Iterator[tuple[Any, int]]:
    """A batch of `size` examples cut into some at a time, and how many each has."""
    if size <= at_once:
        yield batch, size
        return
    for start in range(0, size, at_once):
        stop = min(start + at_once, size)
        yield cut(batch, slice(start, stop), size), stop - start


def way(
    task: Task,
    theta: Float[Tensor, " p"],
    data: Data,
    outputs: int,
    make: Callable[[Way, Int[Tensor, " b"], Batch], LinearOperator],
) -> Way:
    """The fastest way that runs and agrees with plain autograd on a few examples.

    Raises:
        UnsupportedModel: There is neither a layer rule nor a gradient by autograd.

    Cost: products with two vectors, in up to three ways.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, task.layout.size, generator=generator, dtype=torch.float64)
    v = v.to(task.layout.device, task.layout.dtype)
    chosen = Way(saved=saved_bytes(task, theta, data))
    # No more examples than a batch of the curvature itself may hold.
    values = outputs * (task.layout.size + outputs)
    count = min(PROBE, batch_size(values, task.layout.dtype.itemsize))
    for taken, batch in few(task, data, count):
        chosen = _compared(task, theta, data, chosen, v, outputs, torch.tensor(taken), batch, make)
    return chosen


def _compared(
    task: Task,
    theta: Float[Tensor, " p"],
    data: Data,
    chosen: Way,
    v: Float[Tensor, "2 p"],
    outputs: int,
    places: Int[Tensor, " b"],
    batch: Batch,
    make: Callable[[Way, Int[Tensor, " b"], Batch], LinearOperator],
) -> Way:
    """What is left of the way chosen so far after another batch."""

    def by(way: Way) -> Callable[[], Tensor]:
        return lambda: make(way, places, batch).mv(v)

    made, products, notes = chosen.plan, chosen.products, list(chosen.notes)

    def planned() -> Plan:
        return made if made is not None else plan(task, theta, data)

    # Jacobians need first derivatives only, which makes them the judge; where they are too large to
    # be formed for a few examples nobody will ask for them.
    size = len(places) * outputs * task.layout.size * task.layout.dtype.itemsize
    plain, missing = attempted(by(Way("autograd")))
    expected, formed, refused = plain, None, None
    if size <= WORKING_BYTES:
        formed, refused = attempted(by(Way("jacobians", made)))
    is_formed = plain is not None and agrees(formed, plain)
    if plain is None or (size <= WORKING_BYTES and not is_formed):
        judge = planned()
        expected = by(Way("jacobians", judge))()
        is_formed = agrees(formed, expected)
        if made is None and not is_formed:
            made = judge
            notes.append(f"Jacobians by layer, because {_reason(formed, refused)}")
    assert expected is not None
    if products == "func":
        found, refused = attempted(by(Way(is_plain=False)))
        if not agrees(found, expected):
            products = "autograd"
            reason = _reason(found, refused)
            notes.append(f"products by double backward, because {reason}")
            if size > WORKING_BYTES and made is None:
                made = planned()
    if products == "autograd" and not agrees(plain, expected):
        products = "jacobians"
        reason = "it gives others" if missing is None else first_line(missing)
        notes = [note for note in notes if not note.startswith("products")]
        notes.append(f"products from Jacobians, because of double backward: {reason}")
    is_plain = chosen.is_plain and agrees(plain, expected)
    return Way(products, made, tuple(notes), is_plain, chosen.saved)


def _reason(found: Tensor | None, error: Exception | None) -> str:
    if found is not None:
        return "torch.func gives others than autograd does for the model"
    return f"torch.func cannot run the model: {first_line(error)}"
