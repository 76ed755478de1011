"""Scores: the answer, with its unit, its error and where it came from.

    S[q, i] = ∂m_q/∂wᵢ  at w = 1         m_q(w) ≈ m_q(1) + Σᵢ S[q, i] (wᵢ − 1)

Upweighting example i raises m_q where S > 0. Removing it is wᵢ = 0, so Δm_q ≈ −S[q, i].
"""

import enum
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upweight.errors import (
    MissingContext,
    NonFinite,
    ShapeError,
    StaleStore,
    UpweightError,
    message,
)
from upweight.plot import Plot
from upweight.runtime.fingerprint import digest
from upweight.runtime.shards import ScoreShards
from upweight.task.data import Data
from upweight.task.task import Task

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1

LOOKED_AT_ONCE = 4_000_000
"""Numbers looked at together for NaN and infinity."""


class Unit(enum.Enum):
    """What one entry of the scores means."""

    DERIVATIVE = "∂m/∂w: change of the measurement per unit weight of a training example"
    DIFFERENCE = "Δm: change of the measurement when the column's examples are removed"
    RANK = "rank: only the order within a row means anything"


RESIDUAL_LIMIT = 1e-3
"""Relative residual of a solve that would change the third digit of a score."""
ROW_SUM_LIMIT = 1e-2
"""Row-sum excess over the sum of |scores|: past it the scores miss an effect they should have."""
DECREMENT_LIMIT = 1e-4
"""What a Newton step would still gain, over the mean loss: past it θ̂ is not yet the minimum."""


@dataclass(frozen=True)
class Provenance:
    """How scores came about: enough to repeat them and to judge them. All of it is JSON.

    Args:
        method: `repr` of the method's spec.
        task: The loss, penalty and parameters of the task.
        measure: `repr` of the measure.
        n, q, p: Training examples, queries, parameters.
        dtype, device: Of the parameters.
        health: Numbers to judge the computation by (residuals, damping, stationarity, row sums).
        seconds: Time spent, by stage; "fit: pass 1" is a part of "fit".
        versions: Of the libraries used.
        notes: Choices made on the user's behalf, and warnings.
    """

    method: str
    task: str
    measure: str
    n: int
    q: int
    p: int
    dtype: str
    device: str
    health: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Provenance":
        """From JSON, which has no tuples."""
        return cls(**{**fields, "notes": tuple(fields["notes"])})


def library_versions() -> dict[str, str]:
    """What the numbers were computed with."""
    try:
        own = importlib.metadata.version("upweight")
    except importlib.metadata.PackageNotFoundError:
        own = "source tree"
    return {"upweight": own, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class Context:
    """The live objects behind scores; needed to retrain, never saved."""

    task: Task
    train: Data
    queries: Data
    measure: Any
    fitted: Any = None


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

    def top(self, k: int, query: int) -> Ranking:
        """As `Scores.top`, for k up to the number that was kept.

        Raises:
            ShapeError: There is no such query, or fewer were kept.
        """
        if not -len(self) <= query < len(self) or k > self.raises.shape[1]:
            raise ShapeError(
                message(
                    f"Kept are {self.raises.shape[1]} examples for each of {len(self)} queries.",
                    f"k={k}, query={query}.",
                    "an index into the full data set, or a larger k than was asked for.",
                    f"use a query in 0…{len(self) - 1}, or call top(queries, k={k}) again.",
                )
            )
        up, up_by = self.raises[query, :k].tolist(), self.raises_by[query, :k].tolist()
        down, down_by = self.lowers[query, :k].tolist(), self.lowers_by[query, :k].tolist()
        above = sum(value > 0 for value in up_by)
        below = sum(value < 0 for value in down_by)
        return Ranking(
            query,
            tuple(up[:above]),
            tuple(up_by[:above]),
            tuple(down[:below]),
            tuple(down_by[:below]),
        )


@dataclass(frozen=True, eq=False)
class Scores:
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
    context: Context | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        error_fits = self.error is None or self.error.shape == self.values.shape
        columns_fit = self.columns is None or len(self.columns) == self.values.shape[-1]
        if self.values.ndim != 2 or not error_fits or not columns_fit:
            raise ShapeError(
                message(
                    "Scores are a matrix [q, n], with errors of the same shape and one label per "
                    "column.",
                    f"values {tuple(self.values.shape)}, "
                    f"error {None if self.error is None else tuple(self.error.shape)}, "
                    f"{None if self.columns is None else len(self.columns)} column labels.",
                    "scores put together by hand.",
                    "use the Scores that attribute(...) returns.",
                )
            )
        if (bad := _first_not_finite(self.values)) is not None:
            row, column = bad
            raise NonFinite(
                message(
                    "Scores must be finite.",
                    f"{float(self.values[row, column])} for query {row}, column {column}.",
                    "a gradient that overflows in this dtype.",
                    "use a float64 model, or look at that query's loss.",
                )
            )

    def __len__(self) -> int:
        return len(self.values)

    def top(self, k: int, query: int) -> Ranking:
        """The k examples that raise and the k that lower measurement `query` when upweighted.

        Examples with a score of zero or of the other sign are never listed.

        Raises:
            ShapeError: There is no such query.
        """
        if not -len(self) <= query < len(self):
            raise ShapeError(
                message(
                    f"The query must be one of the {len(self)} scored.",
                    f"query={query}.",
                    "an index into the full data set where only some queries were scored.",
                    f"use an index in 0…{len(self) - 1}.",
                )
            )
        row = self.values[query]
        order = row.argsort(descending=True, stable=True)
        up = [int(i) for i in order[:k] if row[i] > 0]
        down = [int(i) for i in order.flip(0)[:k] if row[i] < 0]
        return Ranking(
            query,
            tuple(up),
            tuple(float(row[i]) for i in up),
            tuple(down),
            tuple(float(row[i]) for i in down),
        )

    def predict(
        self, drop: Iterable[int] = (), weights: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, " q"]:
        """Δm_q if the examples in `drop` are removed, or the data weights become `weights`.

            Δm_q ≈ Σᵢ S[q, i] (wᵢ − 1)

        First order in w: effects add up. Scores in Δm already are removals, and add up too.

        Raises:
            UpweightError: The unit is RANK, which predicts nothing.
            ShapeError: An index is out of range or repeated, or `weights` is not `[n]`.
        """
        if self.unit is Unit.RANK:
            raise UpweightError(
                message(
                    "A prediction needs scores in ∂m/∂w or Δm.",
                    "scores that only rank.",
                    "a similarity or an uncalibrated projection method.",
                    "use Influence(...), or only compare the order of these scores.",
                )
            )
        n = self.values.shape[1]
        if weights is None:
            indices = [int(i) for i in drop]
            if len(set(indices)) < len(indices) or any(not 0 <= i < n for i in indices):
                raise ShapeError(
                    message(
                        f"Examples to drop must be distinct columns in 0…{n - 1}.",
                        f"drop={indices[:10]}.",
                        "indices of another data set, or the same example listed twice.",
                        "pass each column once.",
                    )
                )
            change = self.values.new_zeros(n)
            change[indices] = -1.0
        else:
            if tuple(weights.shape) != (n,):
                raise ShapeError(
                    message(
                        f"Data weights have one entry per column: shape ({n},).",
                        f"shape {tuple(weights.shape)}.",
                        "weights of another data set.",
                        "start from torch.ones(n) and change entries.",
                    )
                )
            change = weights.to(self.values) - 1.0
        sign = -1.0 if self.unit is Unit.DIFFERENCE else 1.0
        return sign * (self.values @ change)

    def removal(self) -> "Scores":
        """The first-order change Δm of removing each example: −S, in unit DIFFERENCE."""
        if self.unit is Unit.DIFFERENCE:
            return self
        if self.unit is Unit.RANK:
            self.predict()  # raises, with the reason
        return replace(self, values=-self.values, unit=Unit.DIFFERENCE)

    def group(self, labels: Iterable[Any]) -> "Scores":
        """Scores of groups: the sum over the examples that share a label.

        Exact for derivatives; for Δm it is the first-order sum of single removals.

        Raises:
            ShapeError: There is not one label per column.
        """
        keys = [str(label.item() if isinstance(label, Tensor) else label) for label in labels]
        if len(keys) != self.values.shape[1]:
            raise ShapeError(
                message(
                    f"Grouping needs one label per column: {self.values.shape[1]}.",
                    f"{len(keys)} labels.",
                    "labels of another split.",
                    "pass labels in the order of the training data.",
                )
            )
        names = sorted(set(keys))
        where = torch.tensor([names.index(key) for key in keys], device=self.values.device)
        total = self.values.new_zeros(len(self), len(names)).index_add(1, where, self.values)
        error = None
        if self.error is not None:
            squares = total.new_zeros(total.shape).index_add(1, where, self.error**2)
            error = squares.sqrt()
        return replace(self, values=total, error=error, columns=tuple(names))

    def require_context(self) -> Context:
        """The live task and data behind these scores.

        Raises:
            MissingContext: The scores were loaded from disk.
        """
        if self.context is None:
            raise MissingContext(
                message(
                    "This needs the model and data that the scores were made from.",
                    "scores without them.",
                    "scores loaded from disk, which keeps numbers only.",
                    "use scores.attach(Context(task, train, queries, measure)).",
                )
            )
        return self.context

    def attach(self, context: Context) -> "Scores":
        """The same scores with a live task and data."""
        return replace(self, context=context)

    @property
    def plot(self) -> Plot:
        """Figures by Matplotlib: `histogram`, `agreement`, `value`, `classes`, `spectrum`."""
        return Plot(self)

    def to_pandas(self) -> "pd.DataFrame":
        """A table with a row per query and a column per training example or group."""
        import pandas as pd

        columns = list(self.columns) if self.columns else range(self.values.shape[1])
        frame = pd.DataFrame(self.values.cpu().numpy(), columns=columns)
        frame.index.name, frame.columns.name = "query", "example" if not self.columns else "group"
        return frame

    def save(self, directory: str | Path) -> Path:
        """Write `scores.safetensors` and `scores.json` into a directory; no pickle.

        Each file is written beside its place and then renamed, the JSON last: an interrupted save
        leaves either the old scores or none that load.

        Raises:
            OSError: The files could not be written.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {"values": self.values.detach().cpu().contiguous()}
        if self.error is not None:
            tensors["error"] = self.error.detach().cpu().contiguous()
        header = {
            "schema": SCHEMA,
            "unit": self.unit.name,
            "columns": self.columns,
            "digest": _digest(tensors, self.unit.name, self.columns),
            "provenance": asdict(self.provenance),
        }
        staged = target / "scores.safetensors.part"
        try:
            save_file(tensors, staged)
        except SafetensorError as error:  # what safetensors makes of a full disk
            staged.unlink(missing_ok=True)
            raise OSError(
                message(
                    "The directory must have room for the scores.",
                    f"{sum(t.nbytes for t in tensors.values()):,} bytes for {target}; {error}",
                    "a full disk or quota.",
                    "free space or save elsewhere; the scores are still in memory, and what was "
                    "saved before is as it was.",
                )
            ) from error
        os.replace(staged, target / "scores.safetensors")
        staged = target / "scores.json.part"
        staged.write_text(json.dumps(header, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(staged, target / "scores.json")
        return target

    @staticmethod
    def headers(directory: str | Path) -> tuple[Path, ...]:
        """The JSON files of which one is there once all scores are; it holds their provenance."""
        return Path(directory) / "scores.json", Path(directory) / "finished.json"

    @classmethod
    def load(cls, directory: str | Path) -> "Scores":
        """Read what `save` or `LayerwiseInfluence.write` wrote. The live context is not part of it.

        Raises:
            FileNotFoundError: There are no scores in the directory, or not all of them.
            SpecError: They do not fit into memory.
            StaleStore: The two files do not belong together, are damaged, or are of another
                version.
        """
        source = Path(directory)
        whole, in_shards = cls.headers(source)
        if in_shards.exists():
            shards = ScoreShards.load(source)
            header = shards.header or {}
            return cls(shards.values(), Unit[header["unit"]], Provenance.read(header["provenance"]))
        header = json.loads(whole.read_text(encoding="utf-8"))
        try:
            tensors = load_file(source / "scores.safetensors")
            found = _digest(tensors, header.get("unit"), header.get("columns"))
        except SafetensorError as error:
            found = f"unreadable: {error}"
        if header.get("schema") != SCHEMA or header.get("digest") != found:
            match = "match" if header.get("digest") == found else f"do not match ({found:.60})"
            raise StaleStore(
                message(
                    f"scores.json and scores.safetensors must belong together, schema {SCHEMA}.",
                    f"schema {header.get('schema')} and contents that {match}.",
                    "a save that was interrupted, or a file copied from another run.",
                    "save the scores again.",
                )
            )
        return cls(
            tensors["values"],
            Unit[header["unit"]],
            Provenance.read(header["provenance"]),
            tensors.get("error"),
            None if header["columns"] is None else tuple(header["columns"]),
        )


def _digest(tensors: Mapping[str, Tensor], unit: str | None, columns: Sequence[str] | None) -> str:
    """Of the numbers and of what says how to read them."""
    reading = json.dumps([unit, columns], ensure_ascii=False)
    return digest(*(tensors[name] for name in sorted(tensors)), reading)


def _first_not_finite(values: Float[Tensor, "q n"]) -> tuple[int, int] | None:
    """Where the first NaN or infinity is. Some rows at a time: asking takes as much again."""
    size = max(1, LOOKED_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), size):
        bad = ~values[start : start + size].isfinite()
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            return start + row, column
    return None
