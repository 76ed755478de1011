"""Scores: the answer, with its unit, its error and where it came from.

    S[q, i] = ∂m_q/∂wᵢ  at w = 1         m_q(w) ≈ m_q(1) + Σᵢ S[q, i] (wᵢ − 1)

Upweighting example i raises m_q where S > 0. Removing it is wᵢ = 0, so Δm_q ≈ −S[q, i].
"""

import enum
from collections.abc import Iterable, Iterator, ValuesView
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight._text import readable
from upweight.effects import FIRST_ORDER, Effects, as_groups, first_order, without
from upweight.errors import (
    NonFinite,
    ShapeError,
    SpecError,
    StaleStore,
    UpweightError,
    message,
)
from upweight.notation import count
from upweight.notation import readable as readable_number
from upweight.plot import Plot
from upweight.provenance import Answered, Context, Provenance
from upweight.runtime.headers import Misfit, fitting, own_digest, read_json, write_json
from upweight.runtime.selection import is_row, labels_by_place, places, row_of
from upweight.runtime.shards import AGAIN, RERUN, ScoreShards, require_one_kind
from upweight.runtime.tensors import read_plain, tensors_digest, write_plain
from upweight.runtime.whole import make_folder

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2

NEXT = ".top(query=0), .to_pandas(), .predict(drop=[…]); upweight.report.html(scores, 'page.html')"

LOOKED_AT_ONCE = 4_000_000
"""Numbers looked at together for NaN and infinity."""


class Unit(enum.Enum):
    """What one entry of the scores means."""

    DERIVATIVE = "∂m/∂w: change of the measurement per unit weight of a training example"
    VALUE = "value: a share of a total, as Shapley values are; the columns of a row add up"
    RANK = "rank: only the order within a row means anything"


@dataclass(frozen=True)
class Ranking:
    """The training examples that raise and lower one measurement most when upweighted.

    Args:
        query: Which row.
        raises: Indices with the largest positive scores, largest first.
        raises_by: Their scores.
        lowers: Indices with the most negative scores, most negative first.
        lowers_by: Their scores.
    """

    query: int
    raises: tuple[int, ...]
    raises_by: tuple[float, ...]
    lowers: tuple[int, ...]
    lowers_by: tuple[float, ...]

    @classmethod
    def of(cls, query: int, high: Tensor, high_by: Tensor, low: Tensor, low_by: Tensor) -> Self:
        """From both ends of an order, without what has no effect or one of the other sign."""
        above, below = int((high_by > 0).sum()), int((low_by < 0).sum())
        ends = (high[:above], high_by[:above], low[:below], low_by[:below])
        return cls(query, *(tuple(end.tolist()) for end in ends))

    def __str__(self) -> str:
        lines = [f"query {self.query}"]
        for word, indices, values in (
            ("raises", self.raises, self.raises_by),
            ("lowers", self.lowers, self.lowers_by),
        ):
            lines += [f"  {word} m  {i:>8}  {v:+.4e}" for i, v in zip(indices, values, strict=True)]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TopScores:
    """The extreme scores of each query, for training sets whose scores are too many to hold.

    Args:
        raises: Indices of the k largest scores of each query, largest first.
        raises_by: Those scores.
        lowers: Indices of the k smallest, most negative first.
        lowers_by: Those scores.
        unit: What a score means.
        provenance: How they were made.
    """

    raises: Int[Tensor, "q k"]
    raises_by: Float[Tensor, "q k"]
    lowers: Int[Tensor, "q k"]
    lowers_by: Float[Tensor, "q k"]
    unit: Unit
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.raises)

    def top(self, k: int | None = None, query: int = 0) -> Ranking:
        """As `Scores.top`, for k up to the number that was kept, which is the default.

        Raises:
            ShapeError: There is no such query, or fewer were kept.
            SpecError: k is not a number of examples.
        """
        k = self.raises.shape[1] if k is None else k
        _require_count(k)
        if not is_row(query, len(self)) or k > self.raises.shape[1]:
            raise ShapeError(
                f"Kept are {self.raises.shape[1]} examples for each of {len(self)} queries.",
                f"k={k}, query={query}.",
                "an index into the full data set, or a larger k than was asked for.",
                f"use a query in 0…{len(self) - 1}, or attribute(..., into=Top({k})).",
            )
        query = row_of(query, len(self))
        kept = (self.raises, self.raises_by, self.lowers, self.lowers_by)
        return Ranking.of(query, *(each[query, :k] for each in kept))


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Answered):
    """S[q, i] with its unit, standard error and provenance.

    Args:
        values: One row per query, one column per training example (or per group).
        unit: What an entry means.
        provenance: How it was made.
        error: Standard error of each entry, or None where the method is deterministic.
        columns: What the columns are when they are groups: their labels. None: training examples.
        context: The live task and data, lost on `save`.

    Raises:
        ShapeError: `values` is not a matrix, or `error` or `columns` do not fit it.
        NonFinite: An entry is NaN or infinite.
    """

    values: Float[Tensor, "q n"]
    unit: Unit
    provenance: Provenance
    error: Float[Tensor, "q n"] | None = None
    columns: tuple[str, ...] | None = None
    context: Context | None = None

    def __post_init__(self) -> None:
        error_fits = self.error is None or self.error.shape == self.values.shape
        columns_fit = self.columns is None or len(self.columns) == self.values.shape[-1]
        if self.values.ndim != 2 or not error_fits or not columns_fit:
            raise ShapeError(
                "Scores are a matrix [q, n], with errors of the same shape and one label per "
                "column.",
                f"values {tuple(self.values.shape)}, "
                f"error {None if self.error is None else tuple(self.error.shape)}, "
                f"{None if self.columns is None else len(self.columns)} column labels.",
                "scores put together by hand.",
                "use the Scores that attribute(...) returns.",
            )
        if (bad := _first_not_finite(self.values)) is not None:
            row, column = bad
            raise NonFinite(
                "Scores must be finite.",
                f"{float(self.values[row, column])} for query {row}, column {column}.",
                "a gradient that overflows in this dtype.",
                "use a float64 model, or look at that query's loss.",
            )

    def __len__(self) -> int:
        return len(self.values)

    def _shape_and_unit(self) -> tuple[str, str]:
        what = "training example" if self.columns is None else "group"
        shape = f"{count(len(self), 'query')} × {count(self.values.shape[1], what)}"
        return shape, self.unit.value.split(":")[0]

    def _about(self) -> dict[str, str]:
        """As of every answer, with the strongest pair and what to ask next."""
        return super()._about() | {"strongest": self._strongest(), "next": NEXT}

    def _strongest(self) -> str:
        if not self.values.numel():
            return "none"
        place = int(self.values.abs().argmax())
        q, i = divmod(place, self.values.shape[1])
        what = f"training example {i}" if self.columns is None else f"group {self.columns[i]}"
        return f"{what} on query {q}: {readable_number(float(self.values[q, i]), signed=True)}"

    def top(self, k: int = 10, query: int = 0) -> Ranking:
        """The k examples that raise and the k that lower measurement `query` when upweighted.

        Examples with a score of zero or of the other sign are never listed.

        Raises:
            ShapeError: There is no such query.
            SpecError: k is not a number of examples.
        """
        _require_count(k)
        query = row_of(query, len(self))
        row = self.values[query]
        order = row.argsort(descending=True, stable=True)
        up, down = order[:k], order.flip(0)[:k]
        return Ranking.of(query, up, row[up], down, row[down])

    def predict(
        self, drop: Iterable[int] = (), weights: Iterable[float] | None = None
    ) -> Float[Tensor, " q"]:
        """Δm_q if the examples in `drop` are removed, or the data weights become `weights`.

            Δm_q ≈ Σᵢ S[q, i] (wᵢ − 1)

        First order in w: effects add up.
        `drop` holds indices, or is a mask that is True where an example is removed.

        Raises:
            UpweightError: The unit is not ∂m/∂w.
            ShapeError: An index is out of range or repeated, a mask or `weights` is not `[n]`.
            NonFinite: A weight is NaN or infinite.
            SpecError: Both `drop` and `weights` are given.
        """
        self.require_derivatives()
        n = self.values.shape[1]
        if weights is not None and not (isinstance(drop, tuple) and not drop):
            raise SpecError(
                "A prediction takes either examples to drop or weights.",
                "both.",
                "weights for some examples and a removal of others.",
                "give weights alone, with 0 for what is dropped.",
            )
        if weights is None:
            dropped = self.values[:, places(drop, n, "Columns to drop")]
            return without(dropped.sum(dim=1))
        w: Any = weights
        if not isinstance(w, Tensor):
            w = np.asarray(list(w) if isinstance(w, Iterator | ValuesView) else w)
        is_number = isinstance(w, Tensor) or w.dtype.kind in "biuf"
        w = torch.as_tensor(w if is_number else 0)
        if tuple(w.shape) != (n,):
            raise ShapeError(
                f"Data weights have one entry per column: shape ({n},).",
                f"shape {tuple(w.shape)}." if is_number else "weights that are no numbers.",
                "weights of another data set.",
                "start from torch.ones(n) and change entries.",
            )
        if not bool(w.isfinite().all()):
            first = int((~w.isfinite()).nonzero()[0])
            raise NonFinite(
                "Data weights must be finite.",
                f"{float(w[first])} for column {first}.",
                "a weight computed by a division by 0, or missing in a table.",
                "give 0 to what is left out and 1 to what stays as it is.",
            )
        return self.values @ (w.to(self.values) - 1.0)

    def removal(self, groups: Iterable[Any] | None = None) -> Effects:
        """Δm of removing each group of training examples, to first order: −Σ S[q, i].

        Args:
            groups: What each column removes, as for `Fitted.removal`. None: each example by itself.

        Raises:
            UpweightError: The unit is not ∂m/∂w.
            ShapeError: The columns are not the training examples, or a group names others.
        """
        self.require_derivatives()
        self.require_examples()
        chosen = as_groups(groups, self.values.shape[1])
        values = first_order(self.values, chosen)
        return Effects(values, chosen, FIRST_ORDER, self.provenance, context=self.context)

    def require_derivatives(self) -> None:
        """Refuse scores that predict nothing.

        Raises:
            UpweightError: The unit is not ∂m/∂w.
        """
        if self.unit is not Unit.DERIVATIVE:
            ranks = self.unit is Unit.RANK
            raise UpweightError(
                message(
                    "A prediction needs scores in ∂m/∂w.",
                    "scores that only rank." if ranks else "values, which share out a total.",
                    "a similarity or an uncalibrated projection method."
                    if ranks
                    else "Shapley values, which are means over many data sets.",
                    "use Influence(...), or only compare the order of these scores; where their "
                    "sums should rank subsets, pass (weights - 1) @ scores.values.T as a matrix.",
                )
            )

    def require_examples(self) -> None:
        """Refuse scores whose columns are not the training examples in order.

        Raises:
            ShapeError: They are groups.
        """
        if self.columns is not None:
            raise ShapeError(
                "This needs one column per training example, in order.",
                f"columns {list(self.columns[:5])}.",
                "scores of groups.",
                "use attribute(...) as it comes, over all training examples.",
            )

    def group(self, labels: Iterable[Any]) -> "Scores":
        """Scores of groups: the sum over the examples that share a label.

        Exact for ∂m/∂w and for values.

        Raises:
            ShapeError: There is not one label per column.
            DataError: Labels that differ have one text, such as 1 and "1".
        """
        names, at = labels_by_place(labels, self.values.shape[1], "column")
        where = torch.tensor(at, device=self.values.device)
        total = self.values.new_zeros(len(self), len(names)).index_add(1, where, self.values)
        error = None
        if self.error is not None:
            squares = total.new_zeros(total.shape).index_add(1, where, self.error**2)
            error = squares.sqrt()
        return replace(self, values=total, error=error, columns=names)

    def attach(self, context: Context) -> "Scores":
        """The same scores with a live task and data."""
        return replace(self, context=context)

    @property
    def plot(self) -> Plot:
        """Figures by Matplotlib: `histogram`, `agreement`, `value`, `classes`, `spectrum`."""
        return Plot(self)

    def to_pandas(self) -> "pd.DataFrame":
        """A table with a row per query and a column per training example or group.

        Names of groups are those that were given. A spreadsheet that opens a CSV file of them takes
        a name that starts with =, +, - or @ for a formula, which may be somebody else's text:

            frame.columns = ["'" + name if name[:1] in "=+-@" else name for name in frame.columns]
        """
        import pandas as pd

        columns = [*map(readable, self.columns)] if self.columns else range(self.values.shape[1])
        frame = pd.DataFrame(self.values.cpu().numpy(), columns=columns)
        frame.index.name, frame.columns.name = "query", "example" if not self.columns else "group"
        return frame

    def save(self, directory: str | Path) -> Path:
        """Write `scores.safetensors` and `scores.json` into a directory; no pickle.

        Each file is whole or not there, the JSON last: an interrupted save leaves either the old
        scores or none that load. The JSON holds the hash of the numbers, and of itself.

        Raises:
            NotWritten: The disk is full or not writable.
            StaleStore: The directory holds scores that `LayerwiseInfluence.write` wrote.
        """
        target = Path(directory)
        way_out = (
            "free space or save elsewhere; the scores are still in memory, and what was saved "
            "before is as it was."
        )
        make_folder(target, way_out)
        require_one_kind(target, "manifest.json")
        tensors = {"values": self.values.detach().cpu().contiguous()}
        if self.error is not None:
            tensors["error"] = self.error.detach().cpu().contiguous()
        header = {
            "unit": self.unit.name,
            "columns": self.columns,
            "tensors": tensors_digest(tensors, {}),
            "provenance": asdict(self.provenance),
        }
        write_plain(target / "scores.safetensors", tensors, {}, way_out)
        write_json(target / "scores.json", SCHEMA, header)
        return target

    @classmethod
    def load(cls, directory: str | Path) -> "Scores":
        """Read what `save` or `LayerwiseInfluence.write` wrote. The live context is not part of it.

        Raises:
            FileNotFoundError: There are no scores in the directory, or not all of them.
            SpecError: They do not fit into memory.
            StaleStore: The files do not belong together, are damaged, or are of another version.
        """
        source = Path(directory)
        if (source / "finished.json").exists():
            require_one_kind(source, "scores.json")
            shards = ScoreShards.load(source)
            unit, provenance = told_of(shards)
            return cls(shards.values(), unit, provenance)
        header = _saved_header(source)
        tensors, _ = read_plain(source / "scores.safetensors", _saved_way_out(source))
        if header.tensors != tensors_digest(tensors, {}) or "values" not in tensors:
            raise StaleStore(
                "scores.json and scores.safetensors must belong together.",
                f"{source}, where they do not match.",
                "a save that was interrupted, or a file that was edited, damaged or copied "
                "from another run.",
                _saved_way_out(source),
            )
        return cls(
            tensors["values"], header.unit, header.provenance, tensors.get("error"), header.columns
        )

    @classmethod
    def are_all_in(cls, directory: str | Path) -> bool:
        """Whether a directory holds all of its scores, by their headers and the names of files.

        Raises:
            StaleStore: A header is damaged.
        """
        source = Path(directory)
        if (source / "finished.json").exists():
            shards = ScoreShards.load(source)
            return shards.header is not None and shards.is_whole
        return (source / "scores.json").exists() and (source / "scores.safetensors").exists()

    @classmethod
    def provenance_in(cls, directory: str | Path) -> Provenance:
        """How the scores of a directory came about, without reading them.

        Raises:
            FileNotFoundError, StaleStore: As for `load`.
        """
        source = Path(directory)
        if (source / "finished.json").exists():
            return told_of(ScoreShards.load(source))[1]
        return _saved_header(source).provenance

    @classmethod
    def digest_in(cls, directory: str | Path) -> str:
        """The hash of the scores of a directory, as their headers tell it.

        Raises:
            FileNotFoundError, StaleStore: As for `load`.
        """
        source = Path(directory)
        if (source / "finished.json").exists():
            return own_digest(ScoreShards.load(source).digests())
        return _saved_header(source).tensors

    @classmethod
    def verify(cls, directory: str | Path) -> None:
        """See that the scores of a directory are those that were written.

        Raises:
            FileNotFoundError, StaleStore: As for `load`.

        Cost: reads all of them, of shards one at a time.
        """
        if (Path(directory) / "finished.json").exists():
            ScoreShards.load(directory).verify()
        else:
            cls.load(directory)


@dataclass(frozen=True)
class _Saved:
    """What scores.json holds."""

    unit: Unit
    columns: tuple[str, ...] | None
    tensors: str
    provenance: Provenance


@dataclass(frozen=True)
class _Told:
    """What `LayerwiseInfluence.write` says of its scores."""

    unit: Unit
    provenance: Provenance


def told_of(shards: ScoreShards) -> tuple[Unit, Provenance]:
    """The unit and provenance of scores in shards; of those that nobody finished, what is known.

    Raises:
        StaleStore: finished.json says something else.
    """
    header = shards.header
    if header is None:
        method, task, measure = (
            shards.description.get(name, "not recorded") for name in ("method", "task", "measure")
        )
        unknown = "not recorded"
        known = Provenance(method, task, measure, shards.n, shards.q, 0, unknown, unknown)
        return Unit.DERIVATIVE, known
    try:
        told: _Told = fitting(header, _Told, "header")
    except Misfit as misfit:
        path = shards.directory / "finished.json"
        raise StaleStore(
            f"`{misfit.key}` in finished.json must be {misfit.required}.",
            f"{path}, where it is {misfit.given}.",
            "a file of another version of upweight.",
            f"delete the file and ask again: {AGAIN}; no scores are computed again.",
        ) from misfit
    return told.unit, told.provenance


def _saved_header(source: Path) -> _Saved:
    return read_json(source / "scores.json", SCHEMA, _Saved, _saved_way_out(source))


def _saved_way_out(source: Path) -> str:
    return (
        f"delete {source / 'scores.json'} and compute the scores again: scores.save(…), or {RERUN}."
    )


def _require_count(k: Any) -> None:
    if not isinstance(k, Integral) or isinstance(k, bool) or k < 0:
        raise SpecError(
            "A ranking lists a number of examples, 0 or more.",
            f"k={k!r}.",
            "a negative count meant as the other end of the ranking, or a share of the data.",
            "pass k=10 for ten at each end: .raises and .lowers are the two ends.",
        )


def _first_not_finite(values: Float[Tensor, "q n"]) -> tuple[int, int] | None:
    """Where the first NaN or infinity is. Some rows at a time: asking takes as much again."""
    size = max(1, LOOKED_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), size):
        bad = ~values[start : start + size].isfinite()
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            return start + row, column
    return None
