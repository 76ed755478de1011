"""Both views of one prediction: where the model looks, and which training examples did it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.applications.attributions import TCAV, Attribution
from upweight.applications.maps import METHODS, Map, attribution, output, score
from upweight.errors import ShapeError, SpecError, UpweightError
from upweight.methods.fitted import Fitted
from upweight.methods.perturbation import input_of
from upweight.task.data import Data
from upweight.task.measures import Loss

CONCEPT = 100
"""Examples at most that show the concept of a class, and that do not."""


@dataclass(frozen=True, eq=False)
class Row:
    """One method: its maps, or in their place why there are none.

    Args:
        name: Of the method.
        meaning: What it is, in a line.
        query: Map of the output for the query.
        examples: The same of each training example.
        on_query: Map of the score of the first training example in the query's input.
        on_train: Of that score in the training example's own input.
    """

    name: str
    meaning: str
    query: Map | str
    examples: tuple[Map | str, ...]
    on_query: Map | str
    on_train: Map | str


@dataclass(frozen=True, eq=False)
class Views:
    """What `uw.report.explain` shows.

    Args:
        rows: A row per method.
        query: The query's input `[*x]`, and what its target is.
        label: The query's target, in words.
        examples: The training examples, the strongest first.
        labels: Their targets.
        inputs: Their inputs, `[k, *x]`.
        scores: S of each on the query's loss.
        concept: What TCAV was told, in words; "" where it was not asked.
    """

    rows: tuple[Row, ...]
    query: Float[Tensor, "*x"] = field(repr=False)
    label: str
    examples: tuple[int, ...]
    labels: tuple[str, ...]
    inputs: Float[Tensor, "k *x"] = field(repr=False)
    scores: Float[Tensor, " k"]
    concept: str

    @property
    def unanswered(self) -> dict[str, str]:
        """Methods without some map, and why."""
        found: dict[str, str] = {}
        for row in self.rows:
            for each in (row.query, row.on_query, row.on_train, *row.examples):
                if isinstance(each, str):
                    found.setdefault(row.name, each)
        return found


def views(
    fitted: Fitted,
    query: Any,
    methods: Iterable[str | Attribution | type] | None = None,
    *,
    top: int = 5,
    baseline: float | Tensor = 0.0,
    input: int | str = 0,
) -> Views:
    """Maps of one query by every method, and of the training examples that move its loss most.

    Args:
        fitted: At θ̂, with one P for the maps of scores.
        query: One, as for `as_data`.
        methods: As for `saliency.output`; None: all, TCAV with the query's class as its concept.
        top: How many training examples, by |S|.
        baseline: As for `saliency.output`.
        input: As for `saliency.output`.

    Raises:
        ShapeError: There is not one query.
        UpweightError: From `fitted.attribute`. What a method cannot map is in its row, and why.

    Cost: for each method `top` + 2 maps of outputs, and four for both scores.
    """
    data = fitted.task.queries(query)
    if len(data) != 1:
        raise ShapeError(
            "Both views are of one query.",
            f"{len(data)}.",
            "a batch of queries.",
            "(X_test[:1], y_test[:1]).",
        )
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= len(fitted.train):
        raise SpecError(
            f"top= is how many of the {len(fitted.train)} training examples are shown.",
            f"{top!r}.",
            "more than there are, or none.",
            "top=5.",
        )
    values = fitted.attribute(data, Loss()).values[0]
    chosen = tuple(int(i) for i in values.abs().topk(top).indices)
    train = fitted.train.subset(chosen)
    asked: list[str | Attribution | type] = [*(METHODS if methods is None else methods)]
    concept = ""
    if methods is None:
        found = _concept(fitted, data, input)
        at = asked.index(TCAV.name)
        if found is None:
            del asked[at]
        else:
            asked[at], concept = found
    rows, alone = [], [train.subset([k]) for k in range(top)]
    for each in asked:
        method = attribution(each)
        more = {"baseline": baseline, "input": input}
        task, i = fitted.task, chosen[0]
        beside = [_tried(output, task, one, method, seed=None, **more) for one in alone]
        rows.append(
            Row(
                method.name,
                (type(method).__doc__ or "").partition("\n")[0].replace("`", ""),
                _tried(output, task, data, method, **more),
                tuple(beside),
                _tried(score, fitted, data, i, method, side="query", **more),
                _tried(score, fitted, data, i, method, side="train", **more),
            )
        )
    asked_of = _seen(fitted, data, input)
    every = [_seen(fitted, one, input) for one in alone]
    return Views(
        tuple(rows),
        asked_of[0][0],
        _named(asked_of[1]),
        chosen,
        tuple(_named(target) for _, target in every),
        torch.cat([x for x, _ in every]),
        values[list(chosen)],
        concept,
    )


def _tried(what: Any, *args: Any, **more: Any) -> Map | str:
    """A map, or the message that says why there is none."""
    try:
        return what(*args, **more)
    except UpweightError as error:
        return str(error)


def _seen(fitted: Fitted, data: Data, key: int | str) -> tuple[Tensor, Any]:
    """Inputs and targets of some examples."""
    task = fitted.task
    batch = task.to_device(data.take(range(len(data))))
    with torch.no_grad():
        _, targets = task.outputs(fitted.theta, batch)
    return input_of(batch, key), targets[0] if isinstance(targets, tuple | list) else targets


def _named(target: Any) -> str:
    """The target of one example, in words."""
    values = torch.as_tensor(target).flatten().tolist()
    return ", ".join(f"{v:.3g}" for v in values[:3]) + (", …" if len(values) > 3 else "")


def _concept(fitted: Fitted, query: Data, key: int | str) -> tuple[TCAV, str] | None:
    """The query's class as a concept: training examples of it against others; None without one."""
    _, target = _seen(fitted, query, key)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != (1,):
        return None
    there: list[Tensor] = []
    others: list[Tensor] = []
    n = len(fitted.train)
    for start in range(0, n, CONCEPT):
        part = fitted.train.subset(range(start, min(start + CONCEPT, n)))
        x, y = _seen(fitted, part, key)
        there.extend(x[y == target])
        others.extend(x[y != target])
        if min(len(there), len(others)) >= CONCEPT:
            break
    if not there or not others:
        return None
    both = [torch.stack(each[:CONCEPT]) for each in (there, others)]
    said = (
        f"training examples of class {int(target)} ({len(both[0])}) against others ({len(both[1])})"
    )
    return TCAV(both[0], both[1]), said
