"""Which tokens of a passage stand in a query too, in the same order and without a gap?"""

from collections.abc import Sequence

import numpy as np

LEAST = 3
"""Tokens in a row that are no chance: of fewer nearly every text has some in common."""


def copied(passage: Sequence[int], query: Sequence[int]) -> tuple[list[bool], tuple[int, int]]:
    """Of each token of a passage whether it is in a run that the query has verbatim.

    Returns:
        That, and the start and stop of the longest run in the passage; (0, 0) where there is none.

    Cost: |passage| vector operations of length |query|.
    """
    asked = np.asarray(query)
    ending, found = np.zeros(len(asked), dtype=np.int64), [False] * len(passage)
    longest = (0, 0)
    for i, token in enumerate(passage):
        before = np.concatenate(([0], ending[:-1])) if len(asked) else ending
        ending = np.where(asked == token, before + 1, 0)  # of the run that ends here and there
        run = int(ending.max(initial=0))
        if run >= LEAST:
            found[i + 1 - run : i + 1] = [True] * run
            if run > longest[1] - longest[0]:
                longest = (i + 1 - run, i + 1)
    return found, longest
