"""Everything the page shows, as plain data: only what is shown, of however many scores."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import DataError, ShapeError, message
from upweight.report.check import Check
from upweight.report.examples import Examples, class_name
from upweight.report.facts import QueryFacts
from upweight.report.shown import clipped, length
from upweight.report.strongest import Strongest, effects, histogram, strongest
from upweight.scores import Scores, Unit

COLUMNS_SHOWN = 5
"""Columns of a table row on a card: those in which the example and the query differ most."""

ROW_SHOWN = 40
"""Columns of a query's own row: the first ones."""

MOST_TOKENS = 400
"""Tokens of one example that are shown and coloured."""

NOT_KEPT = "Not kept in the run, which holds what it shows of the strongest examples alone."

TOKEN_SCORES = 400_000
"""Scores of tokens on the whole page; with many queries only the strongest examples have them."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Scores of the tokens of training examples.

    Args:
        words: The tokens of every training example.
        scores: (query, examples) → the shares of their positions [k, t] and what has none [k].
    """

    words: Sequence[Sequence[str]]
    scores: Callable[[int, list[int]], Any]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which training examples the page shows, and where.

    Args:
        ends: The strongest examples of each query.
        columns: Every column of the scores that is shown somewhere, ascending.
    """

    ends: tuple[Strongest, ...]
    columns: tuple[int, ...]

    @property
    def place(self) -> dict[int, int]:
        """Column of the scores → place among the shown."""
        return {column: place for place, column in enumerate(self.columns)}


def selection(scores: Scores, checks: Sequence[Check], k: int) -> Selection:
    """The k strongest examples of every query at each end, and those that were removed."""
    ends = tuple(strongest(effects(scores, q), k) for q in range(len(scores.values)))
    shown = {column for end in ends for column in (*end.raised, *end.lowered)}
    shown |= {i for check in checks for removal in check.removed for i in removal}
    return Selection(ends, tuple(sorted(shown)))


def including(chosen: Selection, columns: Iterable[int]) -> Selection:
    """The same, with more columns shown."""
    return Selection(chosen.ends, tuple(sorted({*chosen.columns, *columns})))


def require_fit(
    scores: Scores, removal: Scores | None, checks: Sequence[Check], n: int, q: int
) -> None:
    """Refuse parts that are not about the same queries and training examples.

    Raises:
        ShapeError: Sizes disagree, or a check is about a query or example that is not there.
    """
    rows, columns = scores.values.shape
    expected = n if scores.columns is None else columns
    if (rows, columns) != (q, expected):
        raise ShapeError(
            message(
                "Scores have one row per query and one column per training example.",
                f"scores of shape ({rows}, {columns}) with {n} training examples and {q} queries.",
                "train and queries swapped, or data of another split.",
                "pass the data that fit(...) and attribute(...) were given.",
            )
        )
    if removal is not None and (
        removal.unit is not Unit.DIFFERENCE or removal.values.shape != scores.values.shape
    ):
        raise ShapeError(
            message(
                f"removal must hold Δm of shape ({rows}, {columns}), as the scores.",
                f"unit {removal.unit.name}, shape {tuple(removal.values.shape)}.",
                "removals of some examples or groups only.",
                "pass fitted.removal(queries) for all training examples, or leave it out.",
            )
        )
    for check in checks:
        outside = [i for removal in check.removed for i in removal if not 0 <= i < columns]
        if outside or not 0 <= check.query < rows:
            raise ShapeError(
                message(
                    f"A check is about queries 0…{rows - 1} and examples 0…{columns - 1}.",
                    f"query {check.query}, examples {outside[:5]} in {check.label!r}.",
                    "indices into another data set.",
                    "use row and column indices of the scores.",
                )
            )


def payload(
    scores: Scores,
    removal: Scores | None,
    checks: Sequence[Check],
    chosen: Selection,
    train: Examples,
    queries: Examples,
    facts: QueryFacts,
    names: Sequence[str] | None,
    features: Sequence[str] | None,
    tokens: Tokens | None,
) -> dict[str, Any]:
    """The data of the page, all of it JSON."""
    place = chosen.place
    spread = spread_of(train, queries)
    asked = query_words(queries, facts, names)
    rows = []
    for q, end in enumerate(chosen.ends):
        effect = effects(scores, q)
        row: dict[str, Any] = {
            "histogram": histogram_of(effect),
            **asked[q],
        }
        change = None if removal is None else -effects(removal, q)
        for side, columns in (("raised", end.raised), ("lowered", end.lowered)):
            places = [place[i] for i in columns]
            row[side] = {"places": places, "scores": [short(effect[i]) for i in columns]}
            if change is not None:
                row[side]["changes"] = [short(change[i]) for i in columns]
            if spread is not None:
                row[side]["differs"] = [differences(train, queries, p, q, spread) for p in places]
            if tokens is not None:
                shares, rest = _token_scores(tokens, scores, q, columns)
                row[side] |= {"tokens": shares, "rest": rest}
        rows.append(row)
    index = [scores.columns[i] if scores.columns else i for i in chosen.columns]
    shown: dict[str, Any] = {
        "index": index,
        "column": list(chosen.columns),
        "label": list(train.labels),
        "contents": contents(train),
    }
    if tokens is not None:
        shown["tokens"] = [
            [str(token) for token in tokens.words[i][:MOST_TOKENS]] for i in chosen.columns
        ]
    return {
        "train": shown,
        "queries": rows,
        "checks": [_check(check, place) for check in checks],
        "features": _features(train, features),
        "newton": removal is not None,
        "predicts": scores.unit is not Unit.RANK,
        "n": scores.values.shape[1],
        "groups": scores.columns is not None,
    }


def query_words(
    queries: Examples, facts: QueryFacts, names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Of each query its label, what the model says of it, and what is not a tile."""
    return [
        {"label": label, **_facts(facts, q, label, names), **content}
        for q, (label, content) in enumerate(zip(queries.labels, contents(queries), strict=True))
    ]


def contents(shown: Examples) -> list[dict[str, Any]]:
    """Of each example what is not a tile: its text, its row, or what a renderer gave."""
    if shown.known is not None:
        told = contents(replace(shown, known=None))
        pairs = zip(told, shown.known, strict=True)
        return [one if known else {"text": NOT_KEPT} for one, known in pairs]
    if shown.custom is not None:
        return [{"custom": parts} for parts in shown.custom]
    if shown.texts is not None:
        most = length(len(shown.texts))
        return [{"text": clipped(text, most)} for text in shown.texts]
    if shown.table is not None:
        return [{"row": [short(v) for v in row[:ROW_SHOWN]]} for row in shown.table]
    return [{}] * len(shown.labels)


def _token_scores(
    tokens: Tokens, scores: Scores, q: int, columns: Sequence[int]
) -> tuple[list[list[float]], list[float]]:
    """A share per token shown, and the rest of each score; together they are the score."""
    longest = max((min(MOST_TOKENS, len(tokens.words[i])) for i in columns), default=1)
    some = list(columns[: max(1, TOKEN_SCORES // (2 * len(scores.values) * max(1, longest)))])
    if not some:
        return [], []
    shares, rest = _shares_and_rest(tokens.scores(q, some), len(some))
    _require_sum(shares.sum(axis=1) + rest, scores, q, some)
    for i, row in zip(some, shares, strict=True):
        _require_aligned(i, len(tokens.words[i]), row)
    return (
        [
            [float(f"{v:.3g}") for v in row[: min(MOST_TOKENS, len(tokens.words[i]))]]
            for i, row in zip(some, shares, strict=True)
        ],
        [float(f"{v:.3g}") for v in rest],
    )


def _shares_and_rest(found: Any, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What `by_token` of one query returns, with or without the axis of that query."""
    given = f"a {type(found).__name__}"
    if isinstance(found, tuple | list) and len(found) == 2:
        parts = [np.asarray(x, dtype=np.float64) for x in found]
        given = f"shapes {parts[0].shape} and {parts[1].shape}"
        shares, rest = (x[0] if x.ndim == 3 - j and len(x) == 1 else x for j, x in enumerate(parts))
        if shares.ndim == 2 and len(shares) == k and rest.shape == (k,):
            return shares, rest
    raise ShapeError(
        message(
            f"token_scores must return shares [{k}, t] and what has no position, [{k}].",
            f"{given}.",
            "the shares alone, or those of all queries at once.",
            "return fitted.by_token(queries.subset([q]), examples, measure), both parts.",
        )
    )


def _require_sum(total: NDArray[np.float64], scores: Scores, q: int, some: Sequence[int]) -> None:
    """Refuse shares of another question than the scores'."""
    row = effects(scores, q)
    tolerance = float(scores.provenance.health.get("tolerance", 0.0))
    error = float(np.linalg.norm(total - row[list(some)]))
    # The tolerance is a mean over queries, and relative to the whole row.
    allowed = 3 * tolerance * np.linalg.norm(row) + 1e-3 * np.linalg.norm(row[list(some)])
    if not error <= allowed:
        raise DataError(
            message(
                "The shares of an example's positions and the rest must add up to its score.",
                f"query {q}, example {some[0]}: {total[0]:.3g} in all, score {row[some[0]]:.3g} of "
                f"{scores.provenance.measure}.",
                "by_token asked with another measure than the scores, or of another fit.",
                "pass the measure to by_token too, as its third argument; or leave token_scores "
                "out where the scores carry their method.",
            )
        )


def _require_aligned(i: int, words: int, shares: NDArray[np.float64]) -> None:
    """Refuse tokens that are not those of the positions."""
    beyond = np.abs(shares[words:]).sum()
    if words > len(shares) or beyond > 1e-6 * np.abs(shares).sum():
        raise ShapeError(
            message(
                "train_tokens must name the positions of each training example, in their order.",
                f"example {i}: {words} tokens for {len(shares)} positions, "
                f"{int((shares != 0).sum())} of which have a share.",
                "special tokens or padding on the left that were left out, or positions of a "
                "coarser grid than tokens.",
                "give a token for every position of the model's input, padding on the left too.",
            )
        )


def short(value: float, digits: int = 6) -> float:
    """Six digits: more than a reader or a pixel can tell apart, at a third of the bytes."""
    return float(f"{value:.{digits}g}")


def histogram_of(effect: NDArray[np.float64]) -> dict[str, Any]:
    """The histogram of one row of effects, as the page draws it."""
    start, width, counts = histogram(effect)
    ends = {"low": short(float(effect.min())), "high": short(float(effect.max()))}
    ends["positive"] = int((effect > 0).sum())
    return {"start": short(start), "width": short(width), "counts": counts, **ends}


def _facts(facts: QueryFacts, q: int, label: str, names: Sequence[str] | None) -> dict[str, Any]:
    known: dict[str, Any] = {}
    if facts.values is not None and math.isfinite(facts.values[q]):
        known["value"] = short(facts.values[q])
    if facts.predictions is not None:
        value = facts.predictions[q]
        known["prediction"] = value if isinstance(value, str) else class_name(value, names)
        known["wrong"] = known["prediction"] != label
    return known


def _check(check: Check, place: dict[int, int]) -> dict[str, Any]:
    return {
        "label": check.label,
        "query": check.query,
        "removed": [[place[i] for i in removal] for removal in check.removed],
        "names": None if check.names is None else [str(name) for name in check.names],
        "predicted": [short(float(v)) for v in check.predicted],
        "actual": [short(float(v)) for v in check.actual],
        "errors": None if check.errors is None else [short(float(v)) for v in check.errors],
        "repeats": check.repeats,
        "slope": short(check.slope[0]) if math.isfinite(check.slope[0]) else None,
    }


def spread_of(train: Examples, queries: Examples) -> NDArray[np.float64] | None:
    """Per column the standard deviation over what is shown, so that columns can be compared."""
    if train.table is None or queries.table is None:
        return None
    there = train.table if train.known is None else train.table[list(train.known)]
    spread = np.concatenate([there, queries.table]).std(axis=0)
    return np.where(spread > 0, spread, 1.0)


def differences(
    train: Examples, queries: Examples, place: int, q: int, spread: NDArray[np.float64]
) -> list[list[float]]:
    """[column, value of query q, value of the example at a place] where the two differ most."""
    assert train.table is not None
    assert queries.table is not None
    if train.known is not None and not train.known[place]:
        return []
    mine, theirs = train.table[place], queries.table[q]
    order = np.argsort(-np.abs(mine - theirs) / spread, kind="stable")[:COLUMNS_SHOWN]
    return [[int(c), short(theirs[c]), short(mine[c])] for c in order]


def _features(train: Examples, features: Sequence[str] | None) -> list[str]:
    if train.table is None:
        return []
    width = train.table.shape[1]
    if features is not None and len(features) != width:
        raise ShapeError(
            message(
                f"features must name each of the {width} columns of the table.",
                f"{len(features)} names.",
                "the target's column among the names.",
                "pass one name per input column, in order.",
            )
        )
    return [f"x{c}" for c in range(width)] if features is None else [str(f) for f in features]
