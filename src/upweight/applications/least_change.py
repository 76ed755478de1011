"""The least change of training rows that takes away a share of a gap: a linear program.

    min Σⱼ xⱼ    subject to   E_gap x ≤ −β |m|,   E_loss x ≤ budget,   0 ≤ x ≤ 1

Li & Liu (2022), Eq. 5: x is how much each row is changed, E what a whole change is predicted to do.
A basic solution has no more entries strictly between 0 and 1 than there are constraints.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NotConverged
from upweight.runtime.packages import missing

ROOM = 1.01
"""Where no change keeps the loss: how much above the least increase the least change may cost."""


def least_change(
    gaps: Float[Tensor, "k m"],
    loss: Float[Tensor, " m"],
    soft: Float[Tensor, " k"],
    share: float,
    budget: float,
) -> Float[Tensor, " m"] | None:
    """x in [0, 1] with the least sum that takes away a share of the gaps; None if there is none.

    `gaps` is E_gap, `loss` is E_loss, `soft` are the gaps m and `share` is β.
    """
    rows, bounds = _closing(gaps, soft, share)
    rows, bounds = torch.cat([rows, loss[None]]), torch.cat([bounds, loss.new_tensor([budget])])
    return _solved(torch.ones_like(loss), rows, bounds)


def cheapest_change(
    gaps: Float[Tensor, "k m"],
    loss: Float[Tensor, " m"],
    soft: Float[Tensor, " k"],
    share: float,
) -> Float[Tensor, " m"] | None:
    """x in [0, 1] that takes the share away at the least predicted loss; None if there is none.

    Of those within 1 % of that loss the one with the least sum.
    """
    rows, bounds = _closing(gaps, soft, share)
    found = _solved(loss * len(loss), rows, bounds)
    if found is None:
        return None
    least = float(loss @ found)
    return least_change(gaps, loss, soft, share, max(least * ROOM, least / ROOM) + 1e-9)


def _closing(gaps: Tensor, soft: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A x ≤ b: one gap past the share of it, several within what is left of the largest."""
    if len(soft) == 1:
        sign = soft.sign()
        return sign[:, None] * gaps, -share * soft.abs()
    left = (1 - share) * soft.abs().max()
    return torch.cat([gaps, -gaps]), torch.cat([left - soft, left + soft])


def _solved(cost: Tensor, rows: Tensor, bounds: Tensor) -> Float[Tensor, " m"] | None:
    """min cost·x, A x ≤ b, 0 ≤ x ≤ 1, by HiGHS; None where there is no such x.

    Raises:
        MissingPackage: SciPy is not installed.
        NotConverged: HiGHS stopped without either answer.
    """
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        what = "The solution of a linear program"
        raise missing(what, "scipy", "sklearn", error) from error

    # Scores carry 1/n, and HiGHS takes entries below 1e-9 for zero: in units of a typical one.
    scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
    found = linprog(
        cost.numpy(),
        A_ub=(rows / scale[:, None]).numpy(),
        b_ub=(bounds / scale).numpy(),
        bounds=(0, 1),
        method="highs",
    )
    if found.status == 2:
        return None
    if found.status != 0:
        raise NotConverged(
            "The linear program of the least change must be solved.",
            f"HiGHS says: {found.message}",
            "scores that differ by many orders of magnitude.",
            "look at scores.values of the gap: rows with extreme ones may be errors in the data.",
            solution=found.x,
        )
    return torch.from_numpy(np.clip(found.x, 0.0, 1.0))
