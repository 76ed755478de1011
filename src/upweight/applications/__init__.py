"""Questions about data and models that scores or closed forms answer: one file per question.

outcome.py        what every answer has: predicted, actual, a verdict, a table, a figure
subject.py        what is asked about, and how it is fitted again
fairness.py       why does a classifier treat groups differently, and what does a repair cost?
regression.py     what does each row do to a (generalized) linear regression?

Imported by adapters, reports and the command line, and by nothing below them. Each is loaded when
it is first named: adapters import `regression`, and need none of the others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.applications import fairness as fairness
    from upweight.applications import regression as regression

__all__ = [
    "fairness",
    "regression",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"upweight.applications.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
