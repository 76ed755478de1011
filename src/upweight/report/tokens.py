"""A score by the tokens of its example, held against the score: S[q, i] = Σₜ share[t] + rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import DataError, ShapeError
from upweight.methods.reduce import PerToken
from upweight.notation import short
from upweight.report.display import Display
from upweight.report.strongest import numbers
from upweight.scores import Scores
from upweight.task.data import Data

MOST = 400
"""Tokens of one example that are shown and coloured."""

SHARES = 400_000
"""Shares on the whole page; with many queries only the strongest examples have them."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of every training example, and their shares of the scores `of`.

    `scores` is (query, examples) → the shares of their positions [k, t] and what has none [k].
    """

    of: Scores
    words: Sequence[Sequence[str]]
    scores: Callable[[int, list[int]], Any]

    def shares(self, q: int, columns: Sequence[int]) -> dict[str, Any]:
        """A share per token shown, and the rest of each score; together they are the score.

        Raises:
            DataError: They are of another question than the scores.
            ShapeError: The tokens are not those of the positions.
        """
        longest = max((min(MOST, len(self.words[i])) for i in columns), default=1)
        room = SHARES // (2 * len(self.of) * max(1, longest))
        some = list(columns[: max(1, room)])
        if not some:
            return {"tokens": [], "rest": []}
        shares, rest = _shares_and_rest(self.scores(q, some), len(some))
        _require_sum(shares.sum(axis=1) + rest, self.of, q, some)
        told = []
        for i, row in zip(some, shares, strict=True):
            _require_aligned(i, len(self.words[i]), row)
            told.append([short(v, 3) for v in row[: min(MOST, len(self.words[i]))]])
        return {"tokens": told, "rest": [short(v, 3) for v in rest]}


def tokens_of(scores: Scores, queries: Data | None, display: Display) -> Tokens | None:
    """The tokens to colour; None: there are none.

    Where no shares are given they are asked of the method that made the scores, with the measure
    that made them.

    Raises:
        ShapeError: There is only one of the two.
    """
    words, shares, context = display.train_tokens, display.token_scores, scores.context
    fitted = None if context is None else context.fitted
    if shares is None and words is not None and fitted is not None:
        assert context is not None
        asked, measure = context.queries if queries is None else queries, context.measure

        def live(q: int, some: list[int]) -> Any:
            return fitted.attribute(asked.subset([q]), measure, into=PerToken(some))

        shares = live

    if (words is None) != (shares is None):
        raise ShapeError(
            "Colouring tokens takes train_tokens and token_scores, both.",
            f"only {'train_tokens' if shares is None else 'token_scores'}.",
            "scores without their live method, which is asked where token_scores is left out.",
            "give both, or train_texts alone.",
        )
    return None if words is None or shares is None else Tokens(scores, words, shares)


def _shares_and_rest(found: Any, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`TokenScores` of one query, with or without the axis of that query."""
    given = f"a {type(found).__name__}"
    if isinstance(found, tuple | list) and len(found) == 2:
        parts = [np.asarray(x, dtype=np.float64) for x in found]
        given = f"shapes {parts[0].shape} and {parts[1].shape}"
        shares, rest = (x[0] if x.ndim == 3 - j and len(x) == 1 else x for j, x in enumerate(parts))
        if shares.ndim == 2 and len(shares) == k and rest.shape == (k,):
            return shares, rest
    raise ShapeError(
        f"token_scores must return shares [{k}, t] and what has no position, [{k}].",
        f"{given}.",
        "the shares alone, or those of all queries at once.",
        "return fitted.attribute(queries.subset([q]), measure, into=PerToken(examples)), both "
        "parts.",
    )


def _require_sum(total: NDArray[np.float64], scores: Scores, q: int, some: Sequence[int]) -> None:
    row = numbers(scores, q)
    mine = row[list(some)]
    tolerance = float(scores.provenance.health.get("tolerance", 0.0))
    error = float(np.linalg.norm(total - mine))
    # The tolerance is a mean over queries, and relative to the whole row.
    if not error <= 3 * tolerance * np.linalg.norm(row) + 1e-3 * np.linalg.norm(mine):
        raise DataError(
            "The shares of an example's positions and the rest must add up to its score.",
            f"query {q}, example {some[0]}: {total[0]:.3g} in all, score {mine[0]:.3g} of "
            f"{scores.provenance.measure}.",
            "PerToken(...) asked with another measure than the scores, or of another fit.",
            "pass the measure to attribute(...) too; or leave token_scores out where the "
            "scores carry their method.",
        )


def _require_aligned(i: int, words: int, shares: NDArray[np.float64]) -> None:
    beyond = np.abs(shares[words:]).sum()
    if words > len(shares) or beyond > 1e-6 * np.abs(shares).sum():
        raise ShapeError(
            "train_tokens must name the positions of each training example, in their order.",
            f"example {i}: {words} tokens for {len(shares)} positions, "
            f"{int((shares != 0).sum())} of which have a share.",
            "special tokens or padding on the left that were left out, or positions of a "
            "coarser grid than tokens.",
            "give a token for every position of the model's input, padding on the left too.",
        )
