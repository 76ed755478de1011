"""A text → the training passages behind it, from an index, served to this machine's browser.

    scan       products of the text's row with all rows: candidates
    scores     of the candidates, position by position, from their gradients
    beside     the tokens that a passage shares with the text verbatim, and BM25

So the scores shown are those of the method, and an example is missed only where the scan did not
propose it, as with `Index.top`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from upweight.errors import SpecError
from upweight.index.index import Index
from upweight.methods.baselines import BM25, token_sequences
from upweight.methods.scorer import TokenScores
from upweight.report.rendering import as_json, filled, script_of
from upweight.task.data import Data
from upweight.view.overlap import copied
from upweight.view.server import Loopback, answering

MOST = 100
"""Passages at once."""

SHOWN = 400
"""Tokens of a passage that are shown."""

LONGEST = 20_000
"""Characters of a text."""

CANDIDATES = 2
"""How many times as many examples as are shown are taken from the scan and scored."""

ORDERS = {
    "lowers": "made it more likely",
    "raises": "made it less likely",
    "bm25": "share its words (BM25)",
}
"""By what the passages are chosen, in words."""

Source: TypeAlias = Callable[[int], str]


class Search:
    """What the page asks.

    Args:
        index: With the data of its examples.
        data: These data, in order.
        tokenizer: Of the model.
        queries: From texts to queries.
        source: Where an example comes from, in words.

    Raises:
        DataError: The examples are no tokens.

    Cost: reads all tokens once.
    """

    def __init__(
        self,
        index: Index,
        data: Sequence[Data],
        tokenizer: Any,
        queries: Callable[[list[str]], Data],
        source: Source,
    ) -> None:
        self.index, self.tokenizer, self._queries, self._source = index, tokenizer, queries, source
        self._passages = [row for each in data for row in token_sequences(each)]
        self._bm25 = BM25().ranking(self._passages)
        self._one = threading.Lock()  # one question at a time: they share the model

    def answer(self, text: str, k: int = 20, order: str = "lowers") -> dict[str, Any]:
        """The k passages behind a text that the model said, in one of `ORDERS`, as JSON.

        Raises:
            SpecError: There is no text, it is too long, or k or the order mean nothing.
            UpweightError: From the index.
        """
        _require(text, k, order)
        started = time.perf_counter()
        with self._one:
            asked = self._queries([text])
            (tokens,) = token_sequences(asked)
            lexical = self._bm25(tokens)
            ids, found = self._candidates(asked, lexical, min(k, len(self._passages)), order)
            shares, rest = (part[0].double() for part in found)
            scores = shares.sum(dim=1) + rest
        if order != "bm25":
            best = scores.argsort(descending=order == "raises", stable=True)[:k]
        else:
            best = torch.arange(len(ids))
        ranks = 1 + lexical.argsort(descending=True, stable=True).argsort()
        query, spans = tokens.tolist(), [False] * len(tokens)
        results = []
        for place in best.tolist():
            i = ids[place]
            passage = self._passages[i].tolist()
            marks, (start, stop) = copied(passage, query)
            spans = [a or b for a, b in zip(spans, copied(query, passage)[0], strict=True)]
            shown = min(len(passage), SHOWN)
            results.append({
                "id": i,
                "source": self._source(i),
                "score": float(scores[place]),
                "rest": float(rest[place]),
                "bm25": float(lexical[i]),
                "bm25_rank": int(ranks[i]),
                "tokens": self._words(passage[:shown]),
                "shares": shares[place, :shown].tolist(),
                "copied": marks[:shown],
                "longest": stop - start,
                "span": self.tokenizer.decode(passage[start:stop]).strip(),
                "cut": len(passage) - shown,
            })  # fmt: skip
        return {
            "tokens": self._words(query),
            "copied": spans,
            "results": results,
            "notes": list(asked.notes),
            "seconds": time.perf_counter() - started,
        }

    def _candidates(
        self, asked: Data, lexical: Tensor, k: int, order: str
    ) -> tuple[list[int], TokenScores]:
        if order == "bm25":
            ids: list[int] = lexical.topk(k).indices.tolist()
            return ids, self.index.tokens(asked, ids)
        count = min(CANDIDATES * k, len(self._passages))
        return self.index.nearest(asked, count, raises=order == "raises")

    def _words(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself; half a character is the sign for it."""
        return [str(self.tokenizer.decode([i])) for i in ids]


def application(search: Search, token: str) -> Any:
    """The page of an index as an ASGI application, of which an address must carry `?token=`."""
    from starlette.requests import Request
    from starlette.responses import Response

    index = search.index
    checked = index.verified
    words = {
        "title": "An index of training texts",
        "heading": "Which training texts are behind this?",
        "scale": f"{len(index)} passages, a row of {index.bytes_per_example} bytes each",
        "checked": "The rows were not compared with the scores yet: upweight index verify."
        if checked is None
        else f"{str(checked)[0].upper()}{str(checked)[1:]}.",
        "orders": ORDERS,
    }
    page = filled(
        "search.html", ["template.css", "search.css"], script_of("search"), {}, words, connects=True
    )

    def top(request: Request) -> Response:
        given = request.query_params
        k = given.get("k", "20")
        found = search.answer(
            given.get("text", ""),
            int(k) if k.isdecimal() and len(k) < 9 else 0,
            given.get("order", "lowers"),
        )
        # What somebody asks about stays out of the browser's cache.
        never = {"Cache-Control": "no-store"}
        return Response(as_json(found), media_type="application/json", headers=never)

    return answering(page, {"/top": top}, token)


class SearchServer(Loopback):
    """The page of an index, served until it is closed; port and errors are those of `Loopback`."""

    def __init__(self, search: Search, port: int = 0) -> None:
        super().__init__(lambda token: application(search, token), port)


def _require(text: str, k: int, order: str) -> None:
    if not text.strip() or len(text) > LONGEST:
        raise SpecError(
            f"A text of 1 to {LONGEST} characters is asked about.",
            f"{len(text)} characters{'' if text.strip() else ', none of them visible'}.",
            "an empty box, or a whole document.",
            "write what the model said, a sentence or a paragraph.",
        )
    if not 1 <= k <= MOST or order not in ORDERS:
        raise SpecError(
            f"From 1 to {MOST} passages are shown, in one of the orders {', '.join(ORDERS)}.",
            f"k={k}, order={order[:20]!r}.",
            "an address written by hand.",
            "go by the page.",
        )
