"""A score by the tokens of its example, and of its query, held against the score.

S[q, i] = Σₜ share[t] + rest
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import DataError, NotOffered, ShapeError, UpweightError
from upweight.methods.reduce import PerToken
from upweight.notation import short
from upweight.report.display import Display
from upweight.report.strongest import numbers
from upweight.report.tokenizer import Words, words_in
from upweight.scores import Scores
from upweight.task.data import Data
from upweight.task.measures import Functional

MOST = 400
"""Tokens of one example that are shown and coloured."""

SHARES = 400_000
"""Shares on the whole page; with many queries only the strongest examples have them."""

Shares = Callable[[int, list[int]], Any]


@dataclass(eq=False)
class Tokens:
    """The tokens of every training example, and their shares of the scores `of`.

    Args:
        of: The scores.
        words: The tokens of every example, as they were given.
        scores: (query, examples) → the shares of their positions [k, t] and what has none [k].
    """

    of: Scores
    words: Sequence[Sequence[str]]
    scores: Shares

    def told(self, columns: Sequence[int]) -> list[dict[str, Any]]:
        """The tokens of some training examples, as JSON."""
        return [{"tokens": [str(token) for token in self.words[i][:MOST]]} for i in columns]

    def told_query(self, q: int) -> dict[str, Any]:
        """The tokens of a query; nothing where they are not known."""
        return {}

    def shares(self, q: int, columns: Sequence[int]) -> dict[str, Any]:
        """A share per token shown, and the rest of each score; together they are the score.

        Raises:
            DataError: They are of another question than the scores.
            ShapeError: The tokens are not those of the positions.
        """
        some = self._some(columns, max((len(self.words[i]) for i in columns), default=1))
        if not some:
            return {"tokens": [], "rest": []}
        shares, rest = self._held(self.scores(q, some), q, some)
        told = []
        for i, row in zip(some, shares, strict=True):
            _require_aligned(i, len(self.words[i]), row)
            told.append([short(v, 3) for v in row[: min(MOST, len(self.words[i]))]])
        return {"tokens": told, "rest": [short(v, 3) for v in rest]}

    def _some(self, columns: Sequence[int], longest: int) -> list[int]:
        """Those of which there is room for shares."""
        room = SHARES // (2 * len(self.of) * max(1, min(MOST, longest)))
        return list(columns[: max(1, room)])

    def _held(
        self, found: Any, q: int, some: list[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shares, rest = _shares_and_rest(found, len(some))
        _require_sum(shares.sum(axis=1) + rest, self.of, q, some)
        return shares, rest


@dataclass(eq=False)
class ReadTokens(Tokens):
    """The same, in the words of a tokenizer; also those of the query, where the method tells.

    Args:
        tokenizer: Of `transformers`.
        data: Training data and queries that hold token numbers.
        theirs: (query, examples) → the shares of the query's positions; None: not asked.
        most: Queries that are coloured: the first ones; None: all.
    """

    tokenizer: Any = None
    data: Mapping[str, Data | None] = field(default_factory=dict)
    theirs: Shares | None = None
    most: int | None = None
    why: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def told(self, columns: Sequence[int]) -> list[dict[str, Any]]:
        found = self._read("train", columns)
        return [{}] * len(columns) if found is None else [_told(each) for each in found]

    def told_query(self, q: int) -> dict[str, Any]:
        found = self._read("query", [q])
        return {} if found is None or self.theirs is None or not self._has(q) else _told(found[0])

    def shares(self, q: int, columns: Sequence[int]) -> dict[str, Any]:
        if not self._has(q) or not len(columns):
            return {}
        with self._lock:
            try:
                return self._shares(q, columns)
            except UpweightError as error:
                # Nobody asked for colours: a page without them is better than none.
                self.why = f"tokens are not coloured: {str(error).splitlines()[0]}"
                return {"uncoloured": self.why}

    def _has(self, q: int) -> bool:
        return not self.why and (self.most is None or q < self.most)

    def _shares(self, q: int, columns: Sequence[int]) -> dict[str, Any]:
        mine, asked = self._read("train", columns), self._read("query", [q])
        if mine is None:
            return {}
        some = self._some(columns, max(len(each.pieces) for each in mine))
        if len(some) < len(columns):
            mine = self._read("train", some) or []  # padded as these are together
        shares, rest = self._held(self.scores(q, some), q, some)
        if shares.shape[1] != mine[0].width:
            raise ShapeError(
                "Shares have one place for each token of the inputs.",
                f"{shares.shape[1]} places for {mine[0].width} tokens.",
                "a model with positions of its own, as of a decoder.",
                "train_tokens= and token_scores= name them.",
            )
        told: dict[str, Any] = {
            "tokens": [_at(row, each) for row, each in zip(shares, mine, strict=True)],
            "rest": [short(v, 3) for v in rest],
        }
        if self.theirs is None or asked is None:
            return told
        try:
            theirs, left = self._held(self.theirs(q, some), q, some)
        except NotOffered:
            self.theirs = None
            return told
        if theirs.shape[1] == asked[0].width:
            told["theirs"] = [_at(row, asked[0]) for row in theirs]
            told["theirs_rest"] = [short(v, 3) for v in left]
        return told

    def _read(self, role: str, columns: Sequence[int]) -> list[Words] | None:
        data = self.data[role]
        if data is None or not len(columns):
            return None
        return words_in(data.take(list(columns)), self.tokenizer)


def _told(words: Words) -> dict[str, Any]:
    special = [t for t, is_special in enumerate(words.special[:MOST]) if is_special]
    return {"tokens": list(words.pieces[:MOST]), "special": special}


def _at(row: NDArray[np.float64], words: Words) -> list[float]:
    """The shares of an example's own tokens."""
    return [short(row[t], 3) for t in words.positions[:MOST]]


def tokens_of(
    scores: Scores, data: Mapping[str, Data | None], display: Display, most: int | None = None
) -> Tokens | None:
    """The tokens to colour; None: there are none.

    Where no shares are given they are asked of the method that made the scores, with the measure
    that made them.

    Args:
        scores: What is shared out.
        data: Training data and queries.
        display: With tokens and their shares, or a tokenizer.
        most: Queries that are coloured where only a tokenizer is known; None: all.

    Raises:
        ShapeError: There is only one of the two.
    """
    words, shares, context = display.train_tokens, display.token_scores, scores.context
    fitted: Any = None if context is None else context.fitted
    is_live = fitted is not None and shares is None
    if is_live and context is not None and not isinstance(context.measure, Functional):
        asked = context.queries if data["query"] is None else data["query"]
        measure = context.measure

        def live(q: int, some: list[int]) -> Any:
            return fitted.attribute(asked.subset([q]), measure, into=PerToken(some))

        def theirs(q: int, some: list[int]) -> Any:
            return fitted.query_tokens(asked.subset([q]), measure, some)

        if words is not None:
            return Tokens(scores, words, live)
        instead = (display.render, display.train_images, display.train_texts)
        if display.tokenizer is None or any(each is not None for each in instead):
            return None
        if scores.columns is not None or not hasattr(fitted, "query_tokens"):
            return None
        return ReadTokens(
            scores, (), live, tokenizer=display.tokenizer, data=dict(data), theirs=theirs,
            most=most,
        )  # fmt: skip
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
