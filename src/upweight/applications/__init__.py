"""Questions about data and models that scores or closed forms answer: one file per question.

outcome.py        what every answer has: predicted, actual, a verdict, a table, a figure
subject.py        what is asked about, and how it is fitted again
poisoning.py      which training rows taught an attack, and a fit without them
privacy.py        what explanations that show training rows tell of who was trained on
regression.py     what does each row do to a (generalized) linear regression?
unlearning.py     the model without some examples, and how far it is from a refit
certified.py      models that promise something of removals, for `unlearning`

Imported by adapters, reports and the command line, and by nothing below them. Each is loaded when
it is first named: adapters import `regression`, and need none of the others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.applications import poisoning as poisoning
    from upweight.applications import privacy as privacy
    from upweight.applications import regression as regression
    from upweight.applications import unlearning as unlearning

__all__ = [
    "poisoning",
    "privacy",
    "regression",
    "unlearning",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"upweight.applications.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
