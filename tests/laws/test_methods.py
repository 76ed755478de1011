"""The laws that `upweight.testing.check_method` states, over every method on the market.

A row, a column, a batch, a copy, a sum, a transpose: laws 3 to 7 and the linearity of law 10. The
closed forms are asked in `tests/methods/test_method_conformance.py`.
"""

from dataclasses import dataclass

import pytest

import upweight as uw
from tests.laws.subjects import DIRECT, EVERYONE, SAMPLED, SAMPLED_LAYERED, spread, tolerance
from tests.market import problem
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, BlockScorer
from upweight.testing import check_method

PROBLEMS = ["softmax", "mlp_tanh", "dict_batch"]
RTOL = 1e-11


@dataclass(frozen=True)
class Blocks(Method):
    """The scores of another method, a block of three at a time, as a stranger's would come."""

    method: uw.Influence
    unit = uw.Unit.DERIVATIVE

    def prepare(self, fitting):
        scorer = self.method.prepare(fitting)

        def score(queries, measure, start, stop):
            (job,) = scorer.jobs(Asked(queries, measure))
            return job.block(start, stop)

        return BlockScorer(score, at_once=3, diagonal=scorer.self_influence)


METHODS = EVERYONE | {
    "GGN, CG by EK-FAC": uw.Influence(
        uw.GGN(),
        uw.solvers.CG(rtol=RTOL, preconditioner=uw.EKFAC(uw.labels.Observed())),
        damping=0.1,
    ),
    "EK-FAC, Cholesky": uw.Influence(
        uw.EKFAC(uw.labels.Expected()), uw.solvers.Cholesky(), damping=0.1
    ),
    "gradient product": uw.GradientDot(),
    "gradient cosine": uw.GradientCosine(),
    "blocks": Blocks(DIRECT["damped Hessian"]),
}
DRAWN = SAMPLED | SAMPLED_LAYERED


def cases():
    problems = [problem(name) for name in PROBLEMS]
    for turn, (label, method) in enumerate(METHODS.items()):
        rtol = 10 * RTOL if "CG" in label else tolerance(label)
        promises = {"rtol": rtol, "deterministic": label not in DRAWN}
        checks = check_method(method, problems=problems, **promises)
        for name, check in spread(checks, PROBLEMS, turn):
            # The others ask of no problem; batches are law 3, which counts them too.
            if name.endswith(tuple(PROBLEMS)) and not name.startswith("batches"):
                yield pytest.param(check, id=f"{label}: {name}")


@pytest.mark.parametrize("check", list(cases()))
def test_law(check):
    check()
