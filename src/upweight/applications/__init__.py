"""Questions about data and models that scores or closed forms answer: one file per question.

regression.py     what does each row do to a (generalized) linear regression?

Imported by adapters, reports and the command line, and by nothing below them.
"""

from upweight.applications import regression

__all__ = ["regression"]
