"""Which training examples made the model do that, and what would change without them?

    S[q, i] = ∂m_q(θ(w)) / ∂wᵢ   at w = 1

Every score is a derivative with respect to a data weight: upweight example i, watch measurement q.
"""

from upweight import data, errors, evaluation, report
from upweight.curvature.empirical_fisher import EmpiricalFisher
from upweight.curvature.fisher import Fisher
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.curvature.newton import Newton
from upweight.linalg.block_cg import BlockCG
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Absolute, Relative
from upweight.linalg.minres import MINRES
from upweight.linalg.solve import Auto
from upweight.methods.influence import Influence
from upweight.scores import Context, Provenance, Ranking, Scores, Unit
from upweight.task.data import Data, as_data
from upweight.task.losses import (
    Bernoulli,
    CrossEntropy,
    Poisson,
    SmoothHinge,
    SquaredError,
    Weighted,
)
from upweight.task.measures import Logit, LogProb, Loss, Margin, Measure
from upweight.task.penalties import L2, NoPenalty, SumToZero
from upweight.task.task import Task

__all__ = [
    "CG",
    "GGN",
    "L2",
    "MINRES",
    "Absolute",
    "Auto",
    "Bernoulli",
    "BlockCG",
    "Cholesky",
    "Context",
    "CrossEntropy",
    "Data",
    "EmpiricalFisher",
    "Fisher",
    "Hessian",
    "Influence",
    "LogProb",
    "Logit",
    "Loss",
    "Margin",
    "Measure",
    "Newton",
    "NoPenalty",
    "Poisson",
    "Provenance",
    "Ranking",
    "Relative",
    "Scores",
    "SmoothHinge",
    "SquaredError",
    "SumToZero",
    "Task",
    "Unit",
    "Weighted",
    "as_data",
    "data",
    "errors",
    "evaluation",
    "report",
]
