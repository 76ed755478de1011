"""Groups of training examples to remove together: tuples of indices.

Three of the kinds of groups on which Koh, Ang, Teo & Liang (2019, "On the accuracy of influence
functions for measuring group effects") compared influence with retraining: at random, within one
class, and by influence. They are `examples` of `leave_one_out` and `compare`. `sizes` says how many
examples each group has, 1 ≤ k < n; what has no group of that size is a ShapeError.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from upweight.effects import Effects, Groups
from upweight.errors import ShapeError
from upweight.evaluation.prediction import query_index, single_removals
from upweight.scores import Scores, Unit


def random_groups(n: int, sizes: Sequence[int], seed: int = 0) -> Groups:
    """One group per size, of examples drawn uniformly without replacement; no group comes twice."""
    return _drawn([torch.arange(n)], n, sizes, seed)


def class_groups(labels: Sequence[int] | Tensor, sizes: Sequence[int], seed: int = 0) -> Groups:
    """One group per size, within one class: the class is drawn first, then its examples.

    The class is drawn uniformly from those with at least k examples, so a group may be a whole
    class. The effects of such a group point the same way and add up, which is what strains a
    first-order prediction.
    """
    classes = torch.as_tensor(labels).detach().cpu().reshape(-1)
    pools = [(classes == value).nonzero()[:, 0] for value in torch.unique(classes)]
    return _drawn(pools, len(classes), sizes, seed)


def influential_groups(scores: Scores | Effects, query: int, sizes: Sequence[int]) -> Groups:
    """Two groups per size: whose removal lowers one query's m most, and whose removal raises it.

    To first order these are the k examples with the largest and with the smallest S[q, i], the
    groups of k with the largest predicted |Δm| of either sign.

    Raises:
        ShapeError: Also where fewer than k examples have an effect of that sign. Scores of unit
            RANK have no sign; there the ends of the order are taken.
    """
    row = query_index(query, len(scores))
    effects = single_removals(scores)[row]
    require_sizes(sizes, len(effects))
    order = effects.argsort(stable=True)
    has_signs = isinstance(scores, Effects) or scores.unit is not Unit.RANK
    groups = []
    for size in sizes:
        for ends, sign, word in ((order, -1, "lowers"), (order.flip(0), 1, "raises")):
            usable = int((sign * effects > 0).sum())
            if has_signs and usable < size:
                raise ShapeError(
                    f"A group of {size} whose removal {word} m needs {size} examples that do.",
                    f"{usable} of {len(order)} for query {row}.",
                    "a group larger than the examples of one sign.",
                    f"use sizes up to {usable}.",
                )
            groups.append(tuple(ends[:size].tolist()))
    return tuple(groups)


def removal_order(scores: Scores | Effects) -> Int[Tensor, "q n"]:
    """Training examples by the predicted effect of removing each: what lowers m most comes first.

    With Δm = −S this is the order of falling S; equal scores keep the order of the data. What
    raises m most comes last: use `.flip(1)` where a rising m is of interest, as for a loss.

    Raises:
        ShapeError: The columns of the scores are not the training examples in order.
    """
    return single_removals(scores).argsort(dim=1, stable=True)


def require_sizes(sizes: Sequence[int], n: int) -> None:
    """Refuse sizes that no removal from n examples can have."""
    wrong = [size for size in sizes if not (float(size).is_integer() and 0 < size < n)]
    if not len(sizes) or wrong:
        raise ShapeError(
            f"A removal takes out some, not all, of the {n} training examples.",
            f"sizes {wrong[:5] if wrong else list(sizes)}.",
            "shares in place of counts, or sizes for a larger data set.",
            f"use whole numbers in 1…{n - 1}.",
        )


def _drawn(pools: Sequence[Int[Tensor, " k"]], n: int, sizes: Sequence[int], seed: int) -> Groups:
    """Each group from one pool, which is drawn uniformly from those that are large enough."""
    require_sizes(sizes, n)
    asked = {size: list(sizes).count(size) for size in sizes}
    for size, count in asked.items():
        possible = sum(math.comb(len(pool), size) for pool in pools)
        if possible < count:
            raise ShapeError(
                "There must be as many different groups as are asked for.",
                f"{count} groups of {size}, of which there are {possible}; the largest class "
                f"or data set has {max(map(len, pools))} examples.",
                "groups larger than a class, or many groups from few examples.",
                "use other sizes or fewer groups.",
            )
    generator = torch.Generator().manual_seed(seed)
    groups: dict[tuple[int, ...], None] = {}  # in the order drawn
    for wanted, size in enumerate(sizes, start=1):
        large = [pool for pool in pools if len(pool) >= size]
        while len(groups) < wanted:
            pool = large[int(torch.randint(len(large), (), generator=generator))]
            rows = pool[torch.randperm(len(pool), generator=generator)[:size]]
            groups.setdefault(tuple(rows.sort().values.tolist()))
    return tuple(groups)
