"""Conformance suites: what an operator, solver or method must do to be used by everything else.

    for name, check in check_operator(MyOperator(...)): check()

Each suite yields (name, check) pairs, which pytest takes as parameters. The package's own
operators, solvers and methods are the first to be held to them. `problems.py` has tasks with
closed-form answers.
"""

from upweight.testing.methods import check_method
from upweight.testing.operators import check_operator
from upweight.testing.solvers import check_solver

__all__ = ["check_method", "check_operator", "check_solver"]
