"""Scores → one HTML file that opens offline: can it be trusted, what moved each query, what if.

The file is data (JSON), sheets of thumbnails, columns of scores and our own style and script. The
bytes depend on the arguments alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upweight.errors import ShapeError, message
from upweight.report.check import Check, Comparison, require_checks
from upweight.report.content import (
    Tokens,
    including,
    payload,
    require_fit,
    selection,
    short,
)
from upweight.report.examples import (
    Examples,
    all_labels,
    examples,
    inputs_of,
    read_queries,
    read_training,
    require_one_each,
)
from upweight.report.facts import noun_of, query_facts, train_facts
from upweight.report.health import convention, health, verdict
from upweight.report.notation import count, interval, readable
from upweight.report.rendering import render_page, write
from upweight.report.shown import Render
from upweight.report.spectrum import spectrum
from upweight.report.sprite import Sprite, display_range, geometry, sheets
from upweight.report.strongest import require_scores
from upweight.report.training import Training, training_set
from upweight.report.trust import trust
from upweight.report.whatif import columns
from upweight.scores import Scores
from upweight.task.data import Data

PER_SIDE = 12
"""Examples shown at each end of a query's ranking."""

MOST_DOTS = 2000
"""Dots of the figure of a comparison on subsets."""


def html(
    scores: Scores,
    train: Any,
    queries: Any,
    path: str | Path,
    *,
    checks: Sequence[Check] = (),
    comparison: Comparison | None = None,
    removal: Scores | None = None,
    title: str | None = None,
    names: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    values: Sequence[float] | None = None,
    predictions: Sequence[Any] | None = None,
    train_images: Any = None,
    query_images: Any = None,
    train_texts: Sequence[str] | None = None,
    query_texts: Sequence[str] | None = None,
    train_tokens: Sequence[Sequence[str]] | None = None,
    token_scores: Callable[[int, list[int]], Any] | None = None,
    render: Render | None = None,
    metadata: Mapping[str, Sequence[Any]] | None = None,
    train_labels: Sequence[Any] | None = None,
    train_losses: Sequence[float] | None = None,
    self_influence: Sequence[float] | None = None,
    k: int = PER_SIDE,
    start: int | None = None,
    command: str | None = None,
) -> Path:
    """Write a report: can it be trusted, what moved each query, what the training set is worth.

    Args:
        scores: S or Δm, `[q, n]` or `[q, groups]`.
        train: The training data, as for `as_data`. Arrays are read once for labels and duplicates;
            of a Dataset only the examples shown are read.
        queries: The queries, in the order of the rows.
        path: The file to write; it is replaced whole or not at all.
        checks: Predictions beside what retraining gave; they make the first panel.
        comparison: What `fitted.check(recipe, budget)` found; the page says it first, and draws it.
        removal: Better predictions of Δm for the same columns, as from `fitted.removal(queries)`;
            by default removal is predicted as minus the derivative.
        title: What the page is about: the data and the model.
        names: Of the classes, by index.
        features: Names of the columns, where inputs are tables `[n, f]`.
        values: m of each query as trained. By default asked of the model, where scores carry it.
        predictions: The predicted class of each query, as index or name; by default as `values`.
        train_images: What to show in place of the training inputs, one per example: images where
            the model's inputs are flattened, rows where they are transformed.
        query_images: The same for the queries.
        train_texts: Texts to show in place of the training inputs, one per example.
        query_texts: The same for the queries.
        train_tokens: The tokens of every training example, one per position, to be coloured by
            their shares of a score.
        token_scores: (query, examples) → shares `[k, t]` and what has no position, `[k]`; they must
            add up to the scores. By default asked of the fitted method, where scores carry it, with
            their own measure; else `lambda q, some:
            fitted.by_token(uw.as_data(queries).subset([q]), some, measure)`.
        render: ("train" or "query", index) → what to show of an example: a text, a mapping of names
            to values, an image array, or a list of these. Markup is shown as text: nothing that a
            renderer returns can run script.
        metadata: Columns of facts about the training examples, by name. The page sums scores over
            their values; numbers of more than 200 values are binned.
        train_labels: The label of every training example, where the data are no arrays.
        train_losses: ℓ of every training example. By default asked of the model, where scores
            carry it; () leaves them out.
        self_influence: S[i, i], as from `fitted.self_influence()`; by default asked of the fitted
            method, where scores carry it, at the cost written there; () leaves it out.
        k: Examples at each end of a query's ranking.
        start: The query shown first; by default the first that was checked, else 0.
        command: The command that makes this page again, for its footer.

    Returns:
        The path.

    Cost: one pass over the scores, which are never copied whole.

    Raises:
        DataError: There is nothing to show, or a renderer returned what cannot be shown.
        SpecError: `checks` holds what `comparison` takes, or the other way round.
        NonFinite: A score is NaN or infinite.
        ShapeError: Parts disagree about the number of queries, examples or columns.

    Example:
        >>> html(scores, (X, y), (X_test, y_test), path="cats.html")
    """
    require_scores(scores)
    require_checks(checks, comparison)
    train_data, query_data = read_training(scores, train), read_queries(scores, queries)
    require_fit(scores, removal, checks, len(train_data), len(query_data))
    _require_options(k, start, len(query_data))
    if train_tokens is not None and token_scores is None:
        token_scores = _token_scores_of(scores, query_data)
    if (train_tokens is None) != (token_scores is None):
        raise ShapeError(
            message(
                "Colouring tokens takes train_tokens and token_scores, both.",
                f"only {'train_tokens' if token_scores is None else 'token_scores'}.",
                "scores without a live method of curvatures by layer, whose by_token is asked "
                "where token_scores is left out.",
                "give both, or train_texts alone.",
            )
        )
    tokens = None
    if train_tokens is not None and token_scores is not None:
        tokens = Tokens(train_tokens, token_scores)
        train_texts = train_texts or [" ".join(words) for words in train_tokens]
    facts = query_facts(scores, values, predictions)
    asked = examples(
        query_data, range(len(query_data)), names, query_images, "query", query_texts, render
    )
    chosen = selection(scores, checks, k)
    absolute, page = _training(
        scores, train_data, names, train_labels, train_losses, self_influence, metadata or {},
        train_texts, asked.labels,
    )  # fmt: skip
    listed = including(chosen, page.listed)
    if scores.columns is None:
        shown = examples(
            train_data, listed.columns, names, train_images, "train", train_texts, render
        )
    else:
        # A column is a group: there is no one image of it, and its name is its index.
        shown = Examples(("",) * len(listed.columns))
    sprites = _sprites(shown, asked)
    first = start if start is not None else checks[0].query if checks else 0
    removed = [i for check in checks for removal in check.removed for i in removal]
    whole = columns(scores, chosen.ends, [*page.listed, *removed], absolute)
    data = payload(scores, removal, checks, listed, shown, asked, facts, names, features, tokens)
    data |= {
        "noun": noun_of(scores),
        "kind": asked.noun,
        "start": first,
        "sprites": {role: geometry(found) for role, found in sprites.items()},
        "training": page.data,
        "whole": list(whole.examples),
        "comparison": subsets_of(comparison),
    }
    parts = {"columns": whole.text}
    for role, found in sprites.items():
        parts |= {f"sheet-{role}-{k}": sheet.text for k, sheet in enumerate(found)}
    words = words_of(scores, checks, comparison, asked.noun, title, command, removal)
    data["caution"] = words["trust"].caution
    return write(Path(path), render_page(data, words, parts))


def _token_scores_of(scores: Scores, queries: Data) -> Callable[[int, list[int]], Any] | None:
    """by_token of the method that made the scores, with the measure that made them."""
    context = scores.context
    by_token = getattr(getattr(context, "fitted", None), "by_token", None)
    if context is None or by_token is None:
        return None
    return lambda q, some: by_token(queries.subset([q]), some, context.measure)


def _training(
    scores: Scores,
    data: Data,
    names: Sequence[str] | None,
    labels: Sequence[Any] | None,
    losses: Sequence[float] | None,
    self_influence: Sequence[float] | None,
    metadata: Mapping[str, Sequence[Any]],
    texts: Sequence[str] | None,
    query_labels: Sequence[str],
) -> tuple[NDArray[np.float64], Training]:
    """The page on the training set, and Σ_q |S[q, i]|."""
    require_one_each("train_texts", texts, len(data))
    facts = train_facts(scores, losses, self_influence)
    known = inputs = None
    if scores.columns is None:
        known = all_labels(data, names, labels)
        inputs = texts if texts is not None else inputs_of(data)
    found, page = training_set(scores, known, inputs, metadata, facts, query_labels)
    return found.absolute, page


def subsets_of(comparison: Comparison | None) -> dict[str, Any] | None:
    """Predicted and measured changes of a comparison on subsets, each query about its own mean."""
    lds = getattr(comparison, "lds", None)
    if lds is None:
        return None
    predicted, measured = (
        (x - x.mean(dim=0)).detach().double().cpu().numpy() for x in (lds.predicted, lds.measured)
    )
    step = max(1, predicted.size // MOST_DOTS)
    query = np.broadcast_to(np.arange(predicted.shape[1]), predicted.shape)
    told = [[short(v, 4) for v in x.ravel()[::step].tolist()] for x in (predicted, measured)]
    return {
        "predicted": told[0],
        "measured": told[1],
        "query": query.ravel()[::step].tolist(),
        "subsets": len(predicted),
        "all": predicted.size,
    }


def _require_options(k: int, start: int | None, q: int) -> None:
    if k < 1 or (start is not None and not 0 <= start < q):
        raise ShapeError(
            message(
                f"k must be at least 1 and start one of the queries 0…{q - 1}.",
                f"k={k}, start={start}.",
                "an index into the full test set where only some queries were attributed.",
                "use a row of the scores.",
            )
        )


def _sprites(train: Examples, queries: Examples) -> dict[str, tuple[Sprite, ...]]:
    images = {"train": train.images, "query": queries.images}
    present = {r: x for r, x in images.items() if x is not None and len(x)}
    if not present:
        return {}
    low, high = display_range(*present.values())
    return {role: sheets(x, low, high) for role, x in present.items()}


def words_of(
    scores: Scores,
    checks: Sequence[Check],
    comparison: Comparison | None,
    kind: str,
    title: str | None,
    command: str | None,
    removal: Scores | None = None,
) -> dict[str, Any]:
    """The text of the page that does not change with the query, for `render_page`."""
    provenance = scores.provenance
    noun = noun_of(scores)
    columns = "group" if scores.columns is not None else kind
    found = trust(scores, checks, comparison, removal)
    notes = [*provenance.notes, *(() if removal is None else removal.provenance.notes)]
    return {
        "title": title,
        "heading": f"Which training {_plural(columns)} moved the {noun}",
        "scale": ", ".join(
            [
                count(scores.values.shape[1], f"training {columns}"),
                count(len(scores.values), "query"),
                *([count(provenance.p, "parameter")] if provenance.p else []),  # 0: not recorded
            ]
        ),
        "noun": noun,
        "kind": kind,
        "subsets": subsets_of(comparison) is not None,
        "command": None if command is None else _clean(command),
        "trust": found,
        "removals": verdict(checks, kind) if checks else None,
        "convention": convention(scores, found.has_sizes),
        "health": [asdict(fact) for fact in health(scores, checks, comparison)],
        "sets": any(len(removal) > 1 for check in checks for removal in check.removed),
        "spectrum": spectrum(provenance.health),
        "notes": [_clean(note) for note in dict.fromkeys(notes)],
        "checks": [
            {
                "label": check.label,
                "query": check.query,
                "n": len(check.examples),
                "estimates": [
                    interval(estimate).partition(" ")[::2]
                    for estimate in (check.pearson, check.slope, check.spearman)
                ],
            }
            for check in checks
        ],
        "provenance": _provenance(scores),
    }


def _provenance(scores: Scores) -> list[tuple[str, str]]:
    made = scores.provenance
    rows = [
        ("method", made.method),
        ("task", made.task),
        ("measure", made.measure),
        ("numbers", f"{made.dtype} on {made.device}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
        *(
            (name.replace("_", " "), _value(value))
            for name, value in made.health.items()
            if name != "blocks"  # they have a table of their own
        ),
    ]
    return [(name, _clean(value)) for name, value in rows]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_value(part)}" for name, part in value.items())
    return readable(value, 4) if isinstance(value, float) else str(value)


def _clean(text: str) -> str:
    """Without memory addresses, which the repr of a function has and which no two runs share."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _plural(noun: str) -> str:
    return count(0, noun).removeprefix("0 ")
