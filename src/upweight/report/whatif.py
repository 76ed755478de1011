"""What if I drop these? The predicted changes of single examples, which the page adds up.

    Δm_q = Σᵢ change[i, q],    change[i] = scores.predict(drop=[i]) = −S[:, i], or Δm[:, i]

They are first-order predictions, the only ones that add up. A file cannot hold all q·n of them: it
holds whole columns of the examples that matter most, and of all examples where they are few.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upweight.report.strongest import Strongest
from upweight.scores import Scores, Unit

BUDGET_BYTES = 1_500_000
"""Of all embedded columns together, as float32; base64 makes a third more of it."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Predicted changes of some examples for every query.

    Args:
        examples: Columns of the scores, ascending.
        changes: One row per example, one entry per query.
    """

    examples: tuple[int, ...]
    changes: NDArray[np.float32]

    @property
    def text(self) -> str:
        """Little-endian float32 in base64, example after example."""
        return base64.b64encode(self.changes.astype("<f4").tobytes()).decode("ascii")


def columns(
    scores: Scores,
    ends: Sequence[Strongest],
    first: Iterable[int],
    absolute: NDArray[np.float64],
) -> Columns:
    """The columns that fit into the budget.

    Args:
        scores: S or Δm.
        ends: What each query shows; an example that many queries show comes before one of few.
        first: Examples that come before all others, as those of the page on the training set.
        absolute: Σ_q |S[q, i]| of each example, which decides between equals.
    """
    q, n = scores.values.shape
    room = max(1, BUDGET_BYTES // (4 * q))
    if scores.unit is Unit.RANK:
        chosen: list[int] = []
    elif n <= room:
        chosen = list(range(n))
    else:
        shown = Counter(i for end in ends for i in (*end.raised, *end.lowered))
        others = sorted(shown, key=lambda i: (-shown[i], -absolute[i], i))
        chosen = sorted(list(dict.fromkeys([*first, *others]))[:room])
    values = scores.values[:, chosen].detach().double().cpu().numpy().T
    sign = 1.0 if scores.unit is Unit.DIFFERENCE else -1.0
    return Columns(tuple(chosen), np.ascontiguousarray(sign * values, dtype=np.float32))
