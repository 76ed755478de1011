"""Questions about data and models that scores or closed forms answer: one file per question.

outcome.py        what every answer has: predicted, actual, a verdict, a table, a figure
subject.py        what is asked about, and how it is fitted again
memorization.py   which rows are known by heart, and does that help on others?
regression.py     what does each row do to a (generalized) linear regression?
unlearning.py     the model without some examples, and how far it is from a refit
certified.py      models that promise something of removals, for `unlearning`
acquisition.py    which examples of a pool to label next, and does it pay?
cross_validation.py  what is the loss on examples that the model never saw, from one fit?

Imported by adapters, reports and the command line, and by nothing below them. Each is loaded when
it is first named: adapters import `regression`, and need none of the others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.applications import acquisition as acquisition
    from upweight.applications import cross_validation as cross_validation
    from upweight.applications import memorization as memorization
    from upweight.applications import regression as regression
    from upweight.applications import unlearning as unlearning

__all__ = [
    "acquisition",
    "cross_validation",
    "memorization",
    "regression",
    "unlearning",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"upweight.applications.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
