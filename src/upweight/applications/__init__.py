"""Questions about data and models that scores or closed forms answer: one file per question.

outcome.py           what every answer has: predicted, actual, a verdict, a table, a figure
subject.py           what is asked about, and how it is fitted again
robustness.py        which few rows carry a coefficient or a prediction?
cross_validation.py  what is the loss on examples that the model never saw, from one fit?
debugging.py         which labels are wrong, what they should be, what correcting them gains
selection.py         which training rows to keep, and with which weights?
fairness.py          why does a classifier treat groups differently, and what does a repair cost?
memorization.py      which rows are known by heart, and does that help on others?
poisoning.py         which training rows taught an attack, and a fit without them
privacy.py           what explanations that show training rows tell of who was trained on
valuation.py         what are examples worth, and what would dropping or buying some do?
payout.py            what is each contributor of data paid?
acquisition.py       which examples of a pool to label next, and does it pay?
saliency.py          where does the model look, and which training examples made it look there?
unlearning.py        the model without some examples, and how far it is from a refit
regression.py        what does each row do to a (generalized) linear regression?

The other files are parts of these, named by their subject.

Imported by adapters, reports and the command line, and by nothing below them. Each is loaded when
it is first named: adapters import `regression`, and need none of the others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.applications import acquisition as acquisition
    from upweight.applications import cross_validation as cross_validation
    from upweight.applications import debugging as debugging
    from upweight.applications import fairness as fairness
    from upweight.applications import memorization as memorization
    from upweight.applications import payout as payout
    from upweight.applications import poisoning as poisoning
    from upweight.applications import privacy as privacy
    from upweight.applications import regression as regression
    from upweight.applications import robustness as robustness
    from upweight.applications import saliency as saliency
    from upweight.applications import selection as selection
    from upweight.applications import unlearning as unlearning
    from upweight.applications import valuation as valuation

__all__ = [
    "acquisition",
    "cross_validation",
    "debugging",
    "fairness",
    "memorization",
    "payout",
    "poisoning",
    "privacy",
    "regression",
    "robustness",
    "saliency",
    "selection",
    "unlearning",
    "valuation",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"upweight.applications.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
