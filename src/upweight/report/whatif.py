"""What if I drop these? The predicted changes of single examples, which the page adds up.

    Δm_q = Σᵢ change[i, q],    change[i] = scores.predict(drop=[i])

They are first-order predictions, the only ones that add up; of how many together the size is
supported, `together` says. A file cannot hold all q·n of them: it holds whole columns of the
examples that matter most, and of all examples where they are few.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from upweight.effects import without
from upweight.report.strongest import numbers
from upweight.scores import Scores, Unit

BUDGET_BYTES = 1_500_000
"""Of all embedded columns together, as float32; base64 makes a third more of it."""


def columns(
    scores: Scores, shown: Iterable[int], first: Sequence[int], absolute: NDArray[np.float64]
) -> tuple[list[int], str]:
    """Which columns fit into the budget, ascending; and the changes they make to every query.

    These are little-endian float32 in base64, example after example.

    Args:
        scores: Of those that are not ∂m/∂w no column is taken.
        shown: What queries show; an example that many of them show comes before one of few.
        first: Examples that come before all others, as those of the page on the training set.
        absolute: Σ_q |S[q, i]| of each example, which decides between equals.
    """
    q, n = scores.values.shape
    room = max(1, BUDGET_BYTES // (4 * q))
    chosen: list[int] = []
    if scores.unit is Unit.DERIVATIVE and n <= room:
        chosen = list(range(n))
    elif scores.unit is Unit.DERIVATIVE:
        times = Counter(shown)
        others = sorted(times, key=lambda i: (-times[i], -absolute[i], i))
        chosen = sorted(list(dict.fromkeys([*first, *others]))[:room])
    changes = without(numbers(scores, (slice(None), chosen)).T)
    return chosen, base64.b64encode(changes.astype("<f4").tobytes()).decode("ascii")


def together(scores: Scores) -> int | None:
    """Of how many columns dropped together the size is supported; None: no limit is known.

    Where retraining was, its verdict decides.
    """
    most = scores.provenance.supported_removal
    return None if scores.checks or most is None else int(most / scores.examples_a_column)
