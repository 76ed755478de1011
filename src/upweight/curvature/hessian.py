"""∇²J: the Hessian of the mean loss plus the penalty.

Products are taken by `torch.func`, many vectors at a time, or by double backward, one vector at a
time from a graph that they share, whichever is faster. Where `torch.func` cannot run the model, or
disagrees with plain autograd on a few examples (it differentiates through `.data`, where autograd
does not), it is always the latter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._typing import Batch
from upweight.curvature.curvature import (
    BatchTerm,
    BatchTerms,
    mean_plus_penalty,
    no_second_derivative,
)
from upweight.curvature.linear import linear_term
from upweight.errors import DtypeError, UnsupportedModel, listed
from upweight.gradients.autograd import (
    agrees,
    attempted,
    few,
    first_line,
    hessian_products,
    is_cut,
    one_by_one,
    product_batch,
    saved_bytes,
)
from upweight.gradients.linear import linear_form
from upweight.linalg.operator import SYMMETRIC, LinearOperator
from upweight.task.data import Data
from upweight.task.precision import dtypes_in
from upweight.task.task import Task


@dataclass(frozen=True, eq=False, repr=False)
class HessianTerm(BatchTerm):
    """Σᵢ ∇²ℓᵢ(θ) over one batch, applied by reverse mode over reverse mode.

    A Hessian is symmetric, so the pullback of v through ∇ℓ is H v; unlike forward over reverse this
    needs only operations that have a backward pass.

    Args:
        batch: The examples.
        by_func: Whether `torch.func` takes the products.
        saved: Bytes that autograd keeps of the batch, where double backward would take them as
            well; None: it would not.
    """

    batch: Batch
    by_func: bool = True
    saved: int | None = None

    def mv(self, v: Float[Tensor, "*k p"]) -> Float[Tensor, "*k p"]:
        self.check(v)
        rows = v.reshape(-1, v.shape[-1])
        plain = not self.by_func
        if self.saved is not None:
            plain = plain or one_by_one(self.theta, len(rows), self.saved)
        if plain and v.numel() > 0:
            losses = partial(self.task.losses, batch=self.batch)
            found = hessian_products(self.task, self.theta, losses, rows)
            return found.reshape(v.shape)
        gradient = torch.func.grad(lambda t: self.task.losses(t, self.batch).sum())
        pullback = torch.func.vjp(gradient, self.theta)[1]
        if v.numel() == 0:  # vmap needs at least one vector
            return v.clone()
        rows = torch.func.vmap(lambda u: pullback(u)[0], chunk_size=16)(rows)
        return rows.reshape(v.shape)


@dataclass(frozen=True)
class Hessian:
    """H = (1/n) Σᵢ ∇²ℓᵢ(θ) + ∇²R(θ), exact.

    Symmetric; positive definite at a strict minimum, usually indefinite elsewhere. A model that is
    one linear map of fixed features (softmax, logistic, Poisson, linear regression, or a last
    layer) is recognized and assembled by matrix products.

    Cost: one product is two backward passes over the data; `dense()` takes p of them, or
    O(n·c²·i²) multiply-adds for a linear model. Without `torch.func` vectors are not taken
    together.

    Exact when: always. Koh & Liang (2017), §2.
    """

    def fit(
        self, task: Task, data: Data, theta: Float[Tensor, " p"], *, n: int | None = None
    ) -> LinearOperator:
        """∇²J at θ; see `Curvature.fit`.

        Raises:
            UnsupportedModel: An operation has no second derivative; or the model's gradients are
                those of no function, so that there is no Hessian.
        """
        n = len(data) if n is None else n
        probe = task.to_device(data.batch(0, data.together(min(4, len(data)))))
        form = linear_form(task, theta, probe)
        if form is not None:
            term = linear_term(task, theta, form, data)
            return mean_plus_penalty(task, theta, (term,), n, term.tags)
        by_func, plain, notes = _way(task, theta, data)
        saved = saved_bytes(task, theta, data)

        def term_of(places: Int[Tensor, " b"], batch: Batch) -> HessianTerm:
            known = saved * len(places) if plain else None
            return HessianTerm(task, theta, batch, by_func, known)

        terms = BatchTerms(task, data, product_batch(saved), term_of)
        return mean_plus_penalty(task, theta, terms, n, SYMMETRIC, notes)


_FIRST_ORDER = (
    "use curvature=GGN(), which needs first derivatives of the model and second ones of the loss, "
    "or EKFAC(), which needs first ones only (EKFAC(Observed()) for a loss whose labels cannot be "
    "drawn)."
)


def _way(task: Task, theta: Float[Tensor, " p"], data: Data) -> tuple[bool, bool, tuple[str, ...]]:
    """Whether `torch.func` takes the products, whether double backward does, and a note."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, task.layout.size, generator=generator, dtype=torch.float64)
    v = v.to(task.layout.device, task.layout.dtype)
    why, is_plain = None, True
    for _, batch in few(task, data):
        ways = [HessianTerm(task, theta, batch, by_func) for by_func in (True, False)]
        fast, refused = attempted(partial(ways[0].mv, v))
        plain, missing = attempted(partial(ways[1].mv, v))
        if plain is None:
            assert missing is not None
            if fast is not None:  # nothing to compare it with
                is_plain = False
                continue
            if not isinstance(missing, RuntimeError):
                raise missing
            # If it is the loss, the way out is another.
            with torch.no_grad():
                outputs, targets = task.outputs(theta, batch)
            task.loss.hessian(outputs, targets)
            raise UnsupportedModel(
                no_second_derivative(f"PyTorch says: {first_line(missing)}", _FIRST_ORDER)
            ) from missing
        if is_cut(task, theta, partial(task.losses, batch=batch)):
            raise UnsupportedModel(
                no_second_derivative("A function is marked once_differentiable.", _FIRST_ORDER)
            )
        _require_symmetric(v, plain, partial(task.losses, theta, batch))
        if fast is None:
            why = f"torch.func cannot run the model: {first_line(refused)}"
        elif not agrees(fast, plain):
            why = "torch.func gives others than autograd does for the model (.data in forward)"
    if why is None:
        return True, is_plain, ()
    return False, True, (f"products with the Hessian by double backward, because {why}",)


def _require_symmetric(
    v: Float[Tensor, "2 p"], products: Float[Tensor, "2 p"], losses: Callable[[], Tensor]
) -> None:
    one, other = float(v[0] @ products[1]), float(v[1] @ products[0])
    scale = float((v.norm(dim=1) * products.flip(0).norm(dim=1)).sum())
    gap, eps = abs(one - other), torch.finfo(v.dtype).eps
    if gap > 100 * eps * scale:
        dtypes = {d for d in dtypes_in(losses) if torch.finfo(d).eps > eps}
        if dtypes:
            raise DtypeError(
                "A Hessian is symmetric: uᵀHv must be vᵀHu.",
                f"{one:.6g} and {other:.6g} on a few examples, from a model of {v.dtype} that "
                f"computes in {listed(sorted(map(str, dtypes)))} on its way.",
                "reduced precision inside of forward (torch.autocast, .bfloat16(), .half()), "
                "whose rounding second derivatives do not bear.",
                "take it out of forward, such as torch.autocast(..., enabled=False); or use "
                "curvature=GGN() or EKFAC().",
            )
    if gap > eps**0.5 * scale:
        raise UnsupportedModel(
            "A Hessian is symmetric: uᵀHv must be vᵀHu.",
            f"{one:.6g} and {other:.6g} on a few examples.",
            "gradients that are not those of a function: a backward pass of one's own that is "
            "not the derivative of its forward pass (gradient reversal), .detach() or .data in "
            "it.",
            "use curvature=GGN() or EKFAC(), which are made of first derivatives.",
        )
