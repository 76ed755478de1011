"""Conformance suites: what an operator or a solver must do to be used by everything else.

    for name, check in check_operator(MyOperator(...)): check()

Each suite yields (name, check) pairs, which pytest takes as parameters. The package's own operators
and solvers are the first to be held to them.
"""

from upweight.testing.operators import check_operator
from upweight.testing.solvers import check_solver

__all__ = ["check_operator", "check_solver"]
