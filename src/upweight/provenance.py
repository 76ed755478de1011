"""Where an answer came from: the method and its health, which are saved; the live objects, not.

Also how an answer introduces itself at a prompt and in a notebook.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any, Literal, Self

from upweight._html import card
from upweight.errors import MissingContext
from upweight.facts import FIRST_ORDER, REMOVAL_LIMIT, Fact, in_a_line
from upweight.notation import count, in_short, percent
from upweight.task.data import Data
from upweight.task.measures import Functional
from upweight.task.rows import Rows, class_names, labels_in
from upweight.task.task import Task

Role = Literal["train", "query"]

EXACT = re.compile(r"Influence\(curvature=(Hessian|GGN|Fisher)\(")
"""Methods whose curvature is the Hessian, where a model is linear in its parameters."""

FEW, LIKE = 0.01, (0.5, 1.5)
"""Shares of the data whose removal sizes hold for that were fitted to random drops: at most so few,
or so many times what was dropped then."""

BEGINNING = 60
"""Characters of a text that stand for it in a line."""


@dataclass(frozen=True)
class Provenance:
    """How an answer came about: enough to repeat them and to judge them. All of it is JSON.

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
        threads: Of PyTorch: sums round by how they are shared out. 0: not told.
        facts: What the method says of the computation, in words and against limits.
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
    threads: int = 0
    facts: tuple[Fact, ...] = ()

    @property
    def against_sizes(self) -> str:
        """Why nothing that the computation says of itself supports sizes; empty: something does.

        Of derivatives; how far removals are from their sums, `against_removal` says. Sizes are
        supported where the method is exact (a convex objective, its own curvature without
        damping, solved, at its minimum), or measured them by training again. A method that does the
        latter says in `health["against_sizes"]` how far that goes.
        """
        known, own = self.health, [fact for fact in self.facts if fact.name != FIRST_ORDER]
        marked = [fact for fact in own if fact.concern]
        past = ", ".join(f"{fact.name.lower()}: {fact.value}" for fact in marked)
        if "against_sizes" in known:
            return known["against_sizes"] or (past and f"past its limit is {past}")
        if not EXACT.match(self.method):
            return (
                "the method is not known to be exact, and approximate ones are often several times "
                "off"
            )
        if known.get("convex") is not True:
            return "the objective is not known to be convex"
        if known.get("damping") != 0.0:
            return "damping changes sizes"
        if not {"At a minimum", "Solver"} <= {fact.name for fact in self.facts}:
            return "it is not recorded how well the model was at its minimum"
        return past and f"past its limit is {past}"

    def against_removal(self, gone: float = 1.0) -> str:
        """Why nothing supports the size of −Σ S of so many removed examples; empty: something does.

        As `against_sizes`, and of exact methods whether first order is near what removing the
        strongest examples of some queries does (`health["beyond_first_order"]`). Between the
        numbers that were removed the larger counts; past them it is taken to grow in proportion. Of
        sizes that were fitted to random drops of a share of the data, so many must be like that, or
        few.
        """
        against = self.against_sizes
        if against or not gone:
            return against
        if "against_sizes" in self.health:
            return self._against_share(gone / self.n)
        known = self.health.get("beyond_first_order")
        if not known:
            return "it is not recorded how far removals are from first order"
        number, off = next((each for each in known if each[0] >= gone), known[-1])
        if off is not None and off * max(1.0, gone / number) <= REMOVAL_LIMIT:
            return ""
        strongest = "example" if number == 1 else f"{number:,} examples"
        if off is None:
            return f"without the strongest {strongest} of a query there is no minimum (leverage 1)"
        return (
            f"first order is off by {100 * off:.0f} % for the strongest {strongest} of a query "
            "(leverage), and Fitted.removal is more than first order"
        )

    @property
    def supported_removal(self) -> int | None:
        """Of how many removed examples at most the size is supported; None: no limit is known."""
        asked = [number for number, _ in self.health.get("beyond_first_order", ())]
        if "share_dropped" in self.health:
            asked = [max(1, int(FEW * self.n))]
        if not asked:
            return None
        return max((number for number in asked if not self.against_removal(number)), default=0)

    def _against_share(self, share: float) -> str:
        """The same of sizes that were fitted to random drops of a share of the data, if they were.

        On four networks changes without rows chosen by their scores were 0.9 to 2.1 times the
        predicted ones for a hundredth of the data, and 0.3 to 4.2 times for more (decision 0053).
        """
        fitted = self.health.get("share_dropped")
        if fitted is None or share <= FEW or share * self.n <= 1:
            return ""
        low, high = (factor * fitted for factor in LIKE)
        if low <= share <= high:
            return ""
        return (
            f"they were fitted to random drops of {percent(fitted)} of the data, and of "
            f"{percent(share)}, or of rows chosen by their scores, may be several times off"
        )


@dataclass(frozen=True)
class Context:
    """The live objects behind an answer; needed to retrain, never saved.

    `queries` are `Data`, or None where a `Functional` was asked of none.
    """

    task: Task
    train: Data
    queries: Any
    measure: Any
    fitted: Any = None

    def read(self) -> Self:
        """The same with the data as the task reads them; itself where they were read before."""
        train, queries = self.task.training(self.train), self.queries
        if queries is not None:
            queries = self.task.queries(queries)
        is_read = train is self.train and queries is self.queries
        return self if is_read else replace(self, train=train, queries=queries)

    @property
    def asked_of_all(self) -> str:
        """The measure, where it is one number of all queries together; empty where it is not."""
        return repr(self.measure) if isinstance(self.measure, Functional) else ""

    def data(self, role: Role) -> Any:
        """The training data or the queries."""
        return self.train if role == "train" else self.queries

    def rows(self, role: Role) -> Rows | None:
        """What the user calls the examples; None where their places are all that is known."""
        return getattr(self.data(role), "given", None)

    @property
    def classes(self) -> tuple[Any, ...] | None:
        """The classes as the user knows them, by number; None where they have no names."""
        reads = self.task.reads
        return class_names(self.task.model) if reads is None else reads.classes

    def name(self, role: Role, index: int) -> str:
        """The id of an example, or its place."""
        rows = self.rows(role)
        return str(index if rows is None or rows.ids is None else rows.ids[index])

    def beginnings(self, role: Role, indices: Sequence[int]) -> list[str] | None:
        """How some texts begin, in quotes; None where the examples are no texts."""
        rows = self.rows(role)
        if rows is None or rows.texts is None:
            return None
        return [f"“{_beginning(rows.texts[i])}”" for i in indices]

    def labels(self, role: Role, indices: Sequence[int]) -> list[Any] | None:
        """The labels of some examples as the user knows them; None where they have none.

        Cost: a reading of these examples.
        """
        data = self.data(role)
        if data is None or not len(indices):
            return None
        known = getattr(self.task.reads, "label", None)
        return labels_in(data.take(list(indices)), self.classes, known)


def _beginning(text: str) -> str:
    """The first whole words, or the beginning of a first word that is longer than that."""
    told = shorten(text, BEGINNING, placeholder=" …")
    return f"{text.split()[0][: BEGINNING - 1]}…" if told == "…" else told


class Answered:
    """What scores and effects share: how they introduce themselves, and their live objects."""

    provenance: Provenance
    context: Context | None

    def _shape_and_unit(self) -> tuple[str, str]:
        raise NotImplementedError

    def _about(self) -> dict[str, str]:
        """Its shape, unit, measure and method, and its health."""
        made, (shape, unit) = self.provenance, self._shape_and_unit()
        notes = f"; {count(len(made.notes), 'note')} in provenance.notes" if made.notes else ""
        return {
            "shape": shape, "unit": unit, "measure": made.measure, "method": self._method(),
            "health": in_a_line(made.facts) + notes,
        }  # fmt: skip

    def _method(self) -> str:
        """As a person writes it, with its λ."""
        made = self.provenance
        spec = getattr(getattr(self.context, "fitted", None), "spec", None)
        told = made.method if spec is None else in_short(spec)
        lam = [f.value for f in made.facts if f.name == "Damping" and f.value.startswith("λ")]
        return ", ".join([told, *lam])

    def __repr__(self) -> str:
        first, about = self._told()
        return "\n  ".join([first, *(f"{name}: {told}" for name, told in about.items())])

    def _told(self) -> tuple[str, dict[str, str]]:
        """What it is in a line, and the rest of what is said of it."""
        about = self._about()
        shape, unit, measure = (about.pop(name) for name in ("shape", "unit", "measure"))
        return f"{type(self).__name__}: {shape}, {unit} of {measure}", about

    def _repr_html_(self) -> str:
        return card(*self._told())

    def require_context(self) -> Context:
        """The live task and data behind this answer.

        Raises:
            MissingContext: There are none, as after loading from disk.
        """
        if self.context is None:
            raise MissingContext(
                "This needs the model and data that the scores were made from.",
                "scores without them.",
                "scores loaded from disk, which keeps numbers only.",
                "give them: scores.attach(upweight.provenance.Context(task, train, queries, "
                "measure)).",
            )
        return self.context
