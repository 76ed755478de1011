"""Questions about data and models that scores or closed forms answer: one file per question.

outcome.py        what every answer has: predicted, actual, a verdict, a table, a figure
subject.py        what is asked about, and how it is fitted again
regression.py     what does each row do to a (generalized) linear regression?
valuation.py      what are examples worth, and what would dropping or buying some do?
payout.py         what is each contributor of data paid?

Imported by adapters, reports and the command line, and by nothing below them. Each is loaded when
it is first named: adapters import `regression`, and need none of the others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.applications import payout as payout
    from upweight.applications import regression as regression
    from upweight.applications import valuation as valuation

__all__ = [
    "payout",
    "regression",
    "valuation",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"upweight.applications.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
