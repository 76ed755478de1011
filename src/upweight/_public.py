"""The public names, in the order of the mathematics."""

from upweight import (
    applications,
    curvature,
    data,
    errors,
    evaluation,
    labels,
    report,
    solvers,
    training,
)
from upweight.curvature.blockwise import Blockwise
from upweight.curvature.diagonal import Diagonal
from upweight.curvature.ekfac import EKFAC
from upweight.curvature.empirical_fisher import EmpiricalFisher
from upweight.curvature.fisher import Fisher
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.curvature.kfac import KFAC
from upweight.effects import Effects
from upweight.evaluation.check import check
from upweight.linalg.damping import Absolute, Evidence, Relative
from upweight.methods.influence import Influence
from upweight.methods.method import Method
from upweight.methods.reduce import GroupSums, Matrix, PerLayer, PerToken, Top
from upweight.methods.similarity import GradientCosine, GradientDot
from upweight.runtime.resources import Resources
from upweight.scores import Scores, Unit
from upweight.shards import Shards
from upweight.task.data import Data, as_data
from upweight.task.losses import (
    Bernoulli,
    CrossEntropy,
    Poisson,
    SmoothHinge,
    SquaredError,
    Weighted,
)
from upweight.task.measures import Coefficient, Functional, Logit, LogProb, Loss, Margin, Measure
from upweight.task.penalties import L2, NoPenalty, SumToZero
from upweight.task.task import Task, next_token
from upweight.training.optimizers import SGD, Adam, AdamW
from upweight.training.training import Training

__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "L2",
    "SGD",
    "Absolute",
    "Adam",
    "AdamW",
    "Bernoulli",
    "Blockwise",
    "Coefficient",
    "CrossEntropy",
    "Data",
    "Diagonal",
    "Effects",
    "EmpiricalFisher",
    "Evidence",
    "Fisher",
    "Functional",
    "GradientCosine",
    "GradientDot",
    "GroupSums",
    "Hessian",
    "Influence",
    "LogProb",
    "Logit",
    "Loss",
    "Margin",
    "Matrix",
    "Measure",
    "Method",
    "NoPenalty",
    "PerLayer",
    "PerToken",
    "Poisson",
    "Relative",
    "Resources",
    "Scores",
    "Shards",
    "SmoothHinge",
    "SquaredError",
    "SumToZero",
    "Task",
    "Top",
    "Training",
    "Unit",
    "Weighted",
    "applications",
    "as_data",
    "check",
    "curvature",
    "data",
    "errors",
    "evaluation",
    "labels",
    "next_token",
    "report",
    "solvers",
    "training",
]
