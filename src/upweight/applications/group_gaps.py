"""How differently a classifier treats groups: a gap with a derivative, and the one that is counted.

    soft    m_ab = mean of s over group b − mean of s over group a        s = P(positive | x)
    hard    h_ab = share of b that is decided positive − share of a

over all rows (demographic parity), over the rows whose label is positive (equal opportunity), or
over these and over the others by themselves (equalized odds: Hardt, Price & Srebro 2016). With more
than two groups there is a difference for each pair, and *the* gap is the largest of them.

A count has no derivative, so scores are of the soft gap and reports are of the hard one. The two
have other scales: what closes one leaves a part of the other, which only a refit can say.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_map

from upweight._typing import Batch, Params
from upweight.errors import DataError, ShapeError, SpecError, UnsupportedModel
from upweight.evaluation.bootstrap import Estimate, wilson
from upweight.runtime.selection import labels_by_place, require_labels
from upweight.task.data import Data
from upweight.task.losses import Bernoulli, CrossEntropy, Weighted
from upweight.task.measures import AT_ONCE, Functional
from upweight.task.task import Task

Kind = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]

CONDITIONS: dict[str, tuple[str, ...]] = {
    "demographic_parity": ("all",),
    "equal_opportunity": ("positive",),
    "equalized_odds": ("positive", "negative"),
}
"""Over which rows each kind compares the groups."""


@dataclass(frozen=True, eq=False)
class Readings:
    """What a classifier says of each row, and whether it is right.

    Args:
        scores: P(positive | x), or the output itself where the loss gives no probability.
        decided: Whether the decision is the positive class.
        positive: Whether the label is.
        correct: Whether the decision is the label.
        losses: ℓ of each row.
    """

    scores: Float[Tensor, " q"]
    decided: Bool[Tensor, " q"]
    positive: Bool[Tensor, " q"]
    correct: Bool[Tensor, " q"]
    losses: Float[Tensor, " q"]

    @property
    def accuracy(self) -> float:
        """The share that is decided as labeled."""
        return float(self.correct.double().mean())


@dataclass(frozen=True)
class Pair:
    """Two groups, and the rows over which they are compared."""

    condition: str
    first: int
    second: int

    def rows(
        self, places: Tensor, positive: Bool[Tensor, " q"]
    ) -> tuple[Bool[Tensor, " q"], Bool[Tensor, " q"]]:
        """Which rows of the first and of the second group count."""
        counted = {"all": torch.ones_like(positive), "positive": positive, "negative": ~positive}
        rows = counted[self.condition]
        return rows & (places == self.first), rows & (places == self.second)


@dataclass(frozen=True)
class _Differences:
    """m_ab of every pair, as the function of a `Gap`."""

    kind: str
    names: tuple[str, ...]
    places: tuple[int, ...]
    positive: Any

    def __call__(
        self, task: Task, params: Params, queries: Any, weights: Tensor
    ) -> Float[Tensor, " k"]:
        _require_rows(queries)
        scores, _, positive, _ = read(task, params, queries, self.positive)
        return differences(self, scores, positive)


def differences(
    gap: "Gap | _Differences", values: Float[Tensor, " q"], positive: Bool[Tensor, " q"]
) -> Float[Tensor, " k"]:
    """Mean over the second group − mean over the first, of every pair.

    Raises:
        ShapeError: There is not one group for each row.
        DataError: A group has no row to compare.
    """
    places = torch.tensor(gap.places, device=values.device)
    if len(places) != len(values):
        raise ShapeError(
            "A gap knows the group of every row that it is asked about.",
            f"{len(places)} groups for {len(values)} rows.",
            "groups of another split.",
            "gap(kind, groups) with the groups of these rows, in their order.",
        )
    found = []
    for pair in pairs(gap.kind, len(gap.names)):
        one, other = pair.rows(places, positive)
        for group, rows in ((pair.first, one), (pair.second, other)):
            if not bool(rows.any()):
                raise _empty(gap.names[group], pair.condition)
        found.append(values[other].mean() - values[one].mean())
    return torch.stack(found)


class Gap(Functional):
    """The soft gap, one number for each pair of groups. Made by `gap`.

    Attributes:
        kind: What is compared.
        names: The groups, sorted.
        places: Which of them each row is of.
        positive: The class that is in a person's favour.
    """

    def __init__(self, kind: str, names: tuple[str, ...], places: tuple[int, ...], positive: Any):
        super().__init__(_Differences(kind, names, places, positive))
        for name in ("kind", "names", "places", "positive"):
            object.__setattr__(self, name, getattr(self.function, name))

    kind: str
    names: tuple[str, ...]
    places: tuple[int, ...]
    positive: Any

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {self.places.count(k)}" for k, name in enumerate(self.names))
        return f"gap({self.kind!r}, {{{sizes}}}, positive={self.positive!r})"

    @property
    def words(self) -> str:
        """`equal-opportunity gap`."""
        return f"{self.kind.replace('_', '-')} gap"

    def pair(self, index: int) -> str:
        """Which difference the entry is, in words: `Male − Female`."""
        return pair_in_words(self.names, pairs(self.kind, len(self.names))[index], self.kind)

    def of(self, groups: Iterable[Any]) -> "Gap":
        """The same gap for the rows of another split.

        Raises:
            DataError: A group that this gap does not know.
        """
        other = gap(self.kind, groups, self.positive)  # type: ignore[arg-type]
        if other.names != self.names:
            raise DataError(
                "Every split must hold the same groups.",
                f"{list(other.names)[:6]} beside {list(self.names)[:6]}.",
                "a small group that one split has no row of, or names in another spelling.",
                "stratify the splits by group, or leave the rows of that group out of all.",
            )
        return other


def gap(kind: Kind, groups: Iterable[Any], positive: Any = 1) -> Gap:
    """The difference between groups of the mean score for the positive class, as a `Functional`.

        m_ab = (1/n_b) Σ_{i ∈ b} s(xᵢ) − (1/n_a) Σ_{i ∈ a} s(xᵢ),      s(x) = P(positive | x; θ)

    a before b in the order of their names. Which rows count is the kind's: all of them
    ("demographic_parity"), those whose label is positive ("equal_opportunity"), or those and the
    others by themselves ("equalized_odds"). Where the loss gives no probability (hinge, squares),
    s is the output f(x) itself, signed towards the positive class, and the unit that of f.

    Ask it of rows as `fitted.attribute(validation, gap(...))`: one gradient and one solve per pair.

    Args:
        kind: "demographic_parity", "equal_opportunity" or "equalized_odds".
        groups: One label for each row that will be asked about, in their order.
        positive: The class in a person's favour: its index, or its name where the model is a
            scikit-learn estimator's.

    Raises:
        SpecError: Another kind.
        DataError: Fewer than two groups. When it is asked: a group without a row to compare.
        ShapeError: When it is asked: another number of rows than of groups.
        UnsupportedModel: When it is asked: a model that is no classifier with one decision.
    """
    if kind not in CONDITIONS:
        raise SpecError(
            f"A gap is one of {', '.join(map(repr, CONDITIONS))}.",
            f"{kind!r}.",
            "another name for one of them: statistical parity is demographic_parity, equal true "
            "positive rates are equal_opportunity.",
            "gap('demographic_parity', groups).",
        )
    given = groups if hasattr(groups, "__len__") else list(groups)
    require_labels(given, "row")
    names, places = labels_by_place(given, len(given), "row")  # type: ignore[arg-type]
    if len(names) < 2:
        raise DataError(
            "A gap is between at least two groups.",
            f"{len(places)} rows, all of {list(names)}.",
            "a column that was filtered before, or the groups of one part of the data.",
            "pass the group of every row, of all groups.",
        )
    return Gap(kind, names, tuple(places), positive)


@dataclass(frozen=True)
class HardGap(Estimate):
    """A difference of two shares, counted. Made by `hard_gap`.

    Args:
        value: Share of the second group − share of the first, of the pair where it is largest.
        low, high: Newcombe's (1998) interval, method 10: from Wilson's of each share.
        error: Its standard error, √(p_a(1 − p_a)/n_a + p_b(1 − p_b)/n_b).
        pair: Which groups, in words.
        place: Which entry of the gap.
        shares: The two shares, first and second.
        sizes: The two numbers of rows.
    """

    error: float
    pair: str
    place: int
    shares: tuple[float, float]
    sizes: tuple[int, int]

    def __str__(self) -> str:
        return f"{self:+.3f} ({self.pair})"

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is within the interval."""
        return self.low <= 0 <= self.high


def hard_gap(
    kind: Kind,
    groups: Iterable[Any],
    decided: Sequence[Any] | Any,
    labels: Sequence[Any] | Any = None,
    positive: Any = 1,
) -> HardGap:
    """The gap in decisions, with its interval: what to report.

    Args:
        kind: As for `gap`.
        groups: The group of each row.
        decided: The class that each row was given.
        labels: Its own class; "demographic_parity" needs none.
        positive: The class in a person's favour.

    Returns:
        Of the pair of groups whose difference is largest. Its interval is that of one pair: it does
        not allow for having looked at others.

    Raises:
        SpecError, DataError, ShapeError: As for `gap`; or labels are missing.
    """
    made = gap(kind, groups, positive)
    if labels is None and kind != "demographic_parity":
        raise SpecError(
            f"{kind} compares rows of one label.",
            "no labels.",
            "a call for demographic_parity with another kind.",
            "pass labels=y.",
        )
    is_decided = _is(decided, positive)
    is_positive = is_decided if labels is None else _is(labels, positive)
    if len(is_positive) != len(is_decided):
        raise ShapeError(
            "Each row has a decision and a label.",
            f"{len(is_decided)} decisions, {len(is_positive)} labels.",
            "labels of another split.",
            "pass both for the same rows.",
        )
    return counted(made, is_decided, is_positive)


def counted(
    made: Gap,
    decided: Bool[Tensor, " q"],
    positive: Bool[Tensor, " q"],
    at: int | None = None,
) -> HardGap:
    """The hard gap of decisions: of the largest pair, or of the one at a place."""
    values = differences(made, decided.double(), positive)
    place = int(values.abs().argmax()) if at is None else at
    pair = pairs(made.kind, len(made.names))[place]
    one, other = pair.rows(torch.tensor(made.places), positive)
    sizes = int(one.sum()), int(other.sum())
    hits = int(decided[one].sum()), int(decided[other].sum())
    a, b = map(wilson, hits, sizes)
    p = (a.value, b.value)
    value = b.value - a.value
    return HardGap(
        value=value,
        error=(sum(q * (1 - q) / n for q, n in zip(p, sizes, strict=True))) ** 0.5,
        low=value - ((b.value - b.low) ** 2 + (a.high - a.value) ** 2) ** 0.5,
        high=value + ((b.high - b.value) ** 2 + (a.value - a.low) ** 2) ** 0.5,
        pair=pair_in_words(made.names, pair, made.kind),
        place=place,
        shares=p,
        sizes=sizes,
    )


def difference_error(
    made: Gap, place: int, values: Float[Tensor, " q"], positive: Bool[Tensor, " q"]
) -> float:
    """Standard error of a pair's difference of means: √(s_a²/n_a + s_b²/n_b), over these rows."""
    pair = pairs(made.kind, len(made.names))[place]
    parts = pair.rows(torch.tensor(made.places), positive)
    rest = [values[rows].double() for rows in parts]
    if min(map(len, rest)) < 2:
        raise DataError(
            "An interval needs at least two rows of each group to compare.",
            f"{len(rest[0])} and {len(rest[1])} for {pair_in_words(made.names, pair, made.kind)}.",
            "a rare group, or few rows with its label.",
            "use more rows of that group, or leave its rows out.",
        )
    return sum(float(v.var()) / len(v) for v in rest) ** 0.5


def pairs(kind: str, count: int) -> list[Pair]:
    """Every pair of groups under every condition of the kind."""
    return [
        Pair(condition, first, second)
        for condition in CONDITIONS[kind]
        for first in range(count)
        for second in range(first + 1, count)
    ]


def pair_in_words(names: Sequence[str], pair: Pair, kind: str) -> str:
    """`Male − Female`, and over which rows where the kind has several."""
    of = f" of {pair.condition} labels" if len(CONDITIONS[kind]) > 1 else ""
    return f"{names[pair.second]} − {names[pair.first]}{of}"


def readings(task: Task, theta: Float[Tensor, " p"], data: Data, positive: Any) -> Readings:
    """What the model at θ says of every row, on the CPU in float64."""
    params = task.named(theta.to(task.layout.device, task.layout.dtype))
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for _, _, batch in data.batches(AT_ONCE):
            moved = task.to_device(batch)
            found = read(task, params, moved, positive)
            each = [part.cpu() for part in (*found, task.losses(params, moved))]
            parts.append(each)
    scores, decided, labels, correct, losses = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    return Readings(scores.double(), decided, labels, correct, losses.double())


def read(
    task: Task, params: Params, batch: Batch, positive: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, decisions, labels and whether they agree, of a batch."""
    outputs, targets = task.outputs(params, batch)
    index = _index(task, batch, positive)
    loss = task.loss.base if isinstance(task.loss, Weighted) else task.loss
    y = targets[0] if isinstance(targets, tuple | list) else targets
    if outputs.numel() == len(outputs):
        f, y = outputs.reshape(-1), y.reshape(-1)
        values = set(y.unique().tolist())
        if index not in (0, 1) or not (values <= {0, 1} or values <= {-1, 1}):
            raise _no_classes(f"one output, targets such as {sorted(values)[:4]}")
        sign = 1 if index == 1 else -1
        scores = torch.sigmoid(sign * f) if isinstance(loss, Bernoulli) else sign * f
        decided, labels = (f > 0) == (index == 1), (y > 0) == (index == 1)
        return scores, decided, labels, decided == labels
    is_whole = not (y.is_floating_point() or y.is_complex())
    if not (
        isinstance(loss, CrossEntropy)
        and outputs.ndim == 2
        and is_whole
        and y.shape == outputs.shape[:1]
        and 0 <= index < outputs.shape[1]
    ):
        raise _no_classes(f"{loss!r} with outputs {tuple(outputs.shape)}")
    decision = outputs.argmax(dim=1)
    return outputs.softmax(dim=1)[:, index], decision == index, y == index, decision == y


def _index(task: Task, batch: Batch, positive: Any) -> int:
    """Which class is meant, by the names that the model's user knows."""
    if task.reads is None:
        if isinstance(positive, bool) or not isinstance(positive, int):
            raise SpecError(
                "The positive class of a network is named by its index.",
                f"positive={positive!r}.",
                "the name of a class, which the network does not know.",
                "positive=1 for the second class.",
            )
        return positive
    one = tree_map(lambda a: a[:1] if isinstance(a, Tensor) else a, batch)
    if isinstance(one, tuple) and isinstance(one[-1], Tensor):
        # Readers relabel training examples, which may carry a weight; queries carry none.
        one = (*one[:-1], (one[-1], torch.ones(1, dtype=torch.float64)))
    row = task.reads.relabeled(one, positive)
    target = row["labels"] if isinstance(row, dict) else row[-1]
    y = target[0] if isinstance(target, tuple | list) else target
    return int(y.reshape(-1)[0]) if not y.is_floating_point() else int(float(y.reshape(-1)[0]) > 0)


def _is(values: Any, positive: Any) -> Bool[Tensor, " q"]:
    entries = values.tolist() if hasattr(values, "tolist") else list(values)
    return torch.tensor([entry == positive for entry in entries], dtype=torch.bool)


def require_gap(given: Any, required: str) -> None:
    """Refuse what is no gap between groups."""
    if not isinstance(given, Gap):
        raise SpecError(
            required,
            f"{given!r}.",
            "the name of a kind, or another functional.",
            "pass fairness.gap('equal_opportunity', groups_of_the_validation_rows).",
        )


def _require_rows(queries: Any) -> None:
    if queries is None:
        raise SpecError(
            "A gap is measured on rows that the model was not fitted to.",
            "no rows.",
            "a call of attribute(None, gap(...)).",
            "attribute((X_validation, y_validation), gap(kind, groups_validation)).",
        )


def _empty(name: str, condition: str) -> DataError:
    what = {"all": "row", "positive": "row with a positive label", "negative": "row without one"}
    return DataError(
        "Every group needs rows to compare.",
        f"group {name!r} has no {what[condition]}.",
        "a group of one class, or another class than positive= in a person's favour.",
        "use 'demographic_parity', which asks for no label; or more rows of that group; or leave "
        "its rows out.",
    )


def _no_classes(given: str) -> UnsupportedModel:
    return UnsupportedModel(
        "A gap needs a classifier: one output against two classes, or CrossEntropy over classes.",
        f"{given}.",
        "a regression, shares in place of labels, one-vs-rest outputs of several classes, or a "
        "positive class that does not exist.",
        "fit one classifier for the class in question, with labels 0 and 1; of a network pass "
        "positive= as a class index.",
    )
