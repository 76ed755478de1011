"""Figures of scores by Matplotlib, as `scores.plot.histogram(query=0)` and its like.

Each draws on the Axes given, or on a new one, and returns it; nothing is shown or saved. The
interactive figures are those of the report. Needs the extra `plot`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from upweight._text import readable
from upweight._typing import Axes
from upweight.errors import DataError, ShapeError
from upweight.runtime.packages import missing
from upweight.runtime.selection import row_of

RAISED, LOWERED, NEUTRAL = "#b8480a", "#00639c", "#0072b2"


class _Made(Protocol):
    @property
    def health(self) -> Mapping[str, Any]: ...


class _Scored(Protocol):
    @property
    def values(self) -> Tensor: ...

    @property
    def provenance(self) -> _Made: ...


@dataclass(frozen=True, eq=False)
class Plot:
    """Figures of one matrix of scores `[q, n]`."""

    scores: _Scored

    def histogram(self, query: int, ax: "Axes | None" = None, bins: int = 40) -> "Axes":
        """All scores of one query, counted on a logarithmic axis: most are near zero.

        Raises:
            ShapeError: There is no such query.
        """
        query = row_of(query, len(self.scores.values))
        ax = axes(ax)
        row = self.scores.values[query].detach().double().cpu().numpy()
        for part, color in ((row[row < 0], LOWERED), (row[row >= 0], RAISED)):
            if len(part):
                ax.hist(part, bins=max(1, bins // 2), color=color)
        ax.set(yscale="log", xlabel=f"score of query {query}", ylabel="training examples")
        return ax

    def agreement(
        self, predicted: Sequence[float], actual: Sequence[float], ax: "Axes | None" = None
    ) -> "Axes":
        """Predicted against actual changes, as from retraining; agreement is the diagonal.

        Raises:
            ShapeError: The two differ in length.
        """
        if len(predicted) != len(actual):
            raise ShapeError(
                "Each predicted change stands against one actual change.",
                f"{len(predicted)} predicted, {len(actual)} actual.",
                "changes of other removals.",
                "pass both for the same removals, in one order.",
            )
        ax = axes(ax)
        x, y = [float(v) for v in actual], [float(v) for v in predicted]
        ends = (min([0.0, *x, *y]), max([0.0, *x, *y]))
        ax.plot(ends, ends, color="0.4", linewidth=1)
        ax.scatter(x, y, s=18, color=NEUTRAL, alpha=0.8)
        ax.set(xlabel="actual change, retrained", ylabel="predicted change", aspect="equal")
        return ax

    def value(self, ax: "Axes | None" = None) -> "Axes":
        """Σ_q |S[q, i]| of every training example, sorted: how few hold how much."""
        ax = axes(ax)
        total = torch.zeros(self.scores.values.shape[1], dtype=torch.float64)
        for row in self.scores.values:  # a row at a time: nothing else of size q·n
            total += row.detach().double().cpu().abs()
        total = total.sort(descending=True).values
        ax.plot(range(1, len(total) + 1), total.numpy(), color=NEUTRAL)
        ax.set(xscale="log", xlabel="training examples, sorted", ylabel="sum of |score|")
        return ax

    def classes(
        self, train: Sequence[Any], queries: Sequence[Any], ax: "Axes | None" = None
    ) -> "Axes":
        """Mean score of a training example of one class on a query of another.

        Args:
            train: The label of every training example.
            queries: The label of every query.
            ax: Where to draw.

        Raises:
            ShapeError: There is not one label per row or column.
        """
        q, n = self.scores.values.shape
        if (len(queries), len(train)) != (q, n):
            raise ShapeError(
                f"Classes need one label per query and training example: {q} and {n}.",
                f"{len(queries)} and {len(train)} labels.",
                "labels of another split.",
                "pass the labels of the attributed queries and of the training set.",
            )
        told = [readable(str(getattr(v, "item", lambda v=v: v)())) for v in train]
        asked = [readable(str(getattr(v, "item", lambda v=v: v)())) for v in queries]
        rows, columns = sorted(set(told)), sorted(set(asked))
        codes = torch.tensor([rows.index(v) for v in told])
        sizes = torch.bincount(codes, minlength=len(rows)).double()
        matrix = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for name, row in zip(asked, self.scores.values, strict=True):
            sums = torch.zeros(len(rows), dtype=torch.float64)
            sums.index_add_(0, codes, row.detach().double().cpu())
            matrix[:, columns.index(name)] += sums / sizes / asked.count(name)
        ax = axes(ax)
        most = float(matrix.abs().max()) or 1.0
        image = ax.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        figure = ax.figure
        figure.colorbar(image, ax=ax, label="mean score")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.set(xlabel="class of the query", ylabel="class trained on")
        return ax

    def spectrum(self, ax: "Axes | None" = None) -> "Axes":
        """Mean and largest eigenvalue of every block of the curvature, and the damping.

        Raises:
            DataError: The scores come from no curvature a block at a time.
        """
        blocks = self.scores.provenance.health.get("blocks")
        if not isinstance(blocks, Mapping) or not blocks:
            raise DataError(
                "The spectrum is drawn of curvatures a block at a time.",
                "scores whose provenance has no blocks.",
                "another curvature than EKFAC(), KFAC() or Blockwise(…).",
                "read provenance.health, which has what is known.",
            )
        ax = axes(ax)
        places = range(len(blocks))
        marks = {"mean_eigenvalue": "o", "largest_eigenvalue": "|", "damping": "D"}
        for name, marker in marks.items():
            found = [float(block[name]) for block in blocks.values()]
            shown = [v if v > 0 else float("nan") for v in found]
            color = RAISED if name == "damping" else NEUTRAL
            ax.scatter(shown, places, marker=marker, color=color, label=name.replace("_", " "))
        ax.set_yticks(places, [str(name) for name in blocks])
        ax.invert_yaxis()
        ax.set(xscale="log", xlabel="eigenvalue")
        ax.legend()
        return ax


def reaches(ends: Iterable[Iterable[float]]) -> list[list[float]]:
    """How far intervals (value, low, high) reach down and up, as `Axes.errorbar` takes it."""
    pairs = [(max(value - low, 0.0), max(high - value, 0.0)) for value, low, high in ends]
    return [[low for low, _ in pairs], [high for _, high in pairs]]


def axes(ax: "Axes | None") -> "Axes":
    """The Axes given, or new ones of a figure of their own.

    Raises:
        MissingPackage: Matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("A figure", "matplotlib", "plot", error) from error

    figure = Figure(layout="constrained")  # not pyplot's: no window, no global state
    FigureCanvasAgg(figure)
    return figure.subplots()
