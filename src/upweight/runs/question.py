"""Question: the live objects of a run, and what tells them from others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upweight.methods.method import Method
from upweight.runtime.fingerprint import digest
from upweight.task.data import Data
from upweight.task.identity import contents, described, subject
from upweight.task.task import Task


@dataclass(frozen=True, eq=False)
class Question:
    """The live objects of a run."""

    task: Task
    train: Data
    queries: Data
    method: Method
    measure: Callable[..., Tensor]
    history: Any = None

    def fingerprints(self) -> dict[str, str]:
        """A hash of each thing that the scores depend on.

        Raises:
            SpecError: A loss, a measure or a method says nothing but its address in memory.

        Cost: reads all data once.
        """
        return fingerprints_of(
            {
                "method": described(self.method),
                "measure": described(self.measure),
                "queries": contents(self.queries),
                **subject(self.task, self.train),
                **({} if self.history is None else {"history": described(self.history)}),
            }
        )


def fingerprints_of(about: Mapping[str, str]) -> dict[str, str]:
    """A hash of each thing that scores depend on, from its description as in their manifest.json.

    Raises:
        KeyError: Something is not described.
    """
    task = (about[part] for part in ("loss", "penalty", "forward", "parameters"))
    return {
        "model": digest(about["model"]),
        "task": digest(*task),
        "train": about["train"],
        "queries": about["queries"],
        "method": digest(about["method"]),
        "measure": digest(about["measure"]),
        **({"history": digest(about["history"])} if "history" in about else {}),
    }
