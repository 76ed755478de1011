"""Where an answer came from: the method and its health, which are saved; the live objects, not.

Also how an answer introduces itself at a prompt and in a notebook.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from upweight.errors import MissingContext
from upweight.facts import Fact
from upweight.task.data import Data
from upweight.task.task import Task


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


class Answered:
    """What scores and effects share: how they introduce themselves, and their live objects."""

    provenance: Provenance
    context: Context | None

    def _shape_and_unit(self) -> tuple[str, str]:
        raise NotImplementedError

    def _about(self) -> dict[str, str]:
        """Its shape, unit, measure and method, and its health."""
        made, (shape, unit) = self.provenance, self._shape_and_unit()
        past = [fact.name.lower() for fact in made.facts if fact.concern]
        health = f"past its limit: {', '.join(past)}" if past else "nothing past its limit"
        notes = f"; {len(made.notes)} in provenance.notes" if made.notes else ""
        told = (health if made.facts else "not told") + notes
        return {
            "shape": shape, "unit": unit, "measure": made.measure, "method": made.method,
            "health": told,
        }  # fmt: skip

    def __repr__(self) -> str:
        about = self._about()
        shape, unit, measure = (about.pop(name) for name in ("shape", "unit", "measure"))
        first = f"{type(self).__name__}: {shape}, {unit} of {measure}"
        return "\n  ".join([first, *(f"{name}: {told}" for name, told in about.items())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(told)}</td></tr>"
            for name, told in self._about().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"

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
                "use scores.attach(Context(task, train, queries, measure)).",
            )
        return self.context
