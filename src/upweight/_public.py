"""The public names, in the order of the mathematics."""

from upweight import applications, data, errors, evaluation, report, training
from upweight.curvature.blockwise import Blockwise
from upweight.curvature.diagonal import Diagonal
from upweight.curvature.ekfac import EKFAC
from upweight.curvature.empirical_fisher import EmpiricalFisher
from upweight.curvature.estimators import Expand, Reduce
from upweight.curvature.fisher import Fisher
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.curvature.kfac import KFAC
from upweight.curvature.labels import Expected, Observed, Sampled
from upweight.effects import Effects
from upweight.evaluation.check import check
from upweight.linalg.block_cg import BlockCG
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Absolute, Evidence, Relative
from upweight.linalg.minres import MINRES
from upweight.linalg.solve import Auto
from upweight.methods.influence import Influence
from upweight.methods.method import Method
from upweight.methods.reduce import GroupSums, Matrix, PerLayer, PerToken, Shards, Top
from upweight.methods.similarity import GradientCosine, GradientDot
from upweight.provenance import Context, Provenance
from upweight.runtime.resources import Resources
from upweight.scores import Ranking, Scores, TopScores, Unit
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
from upweight.training.function import FromFunction
from upweight.training.newton import Newton
from upweight.training.optimizers import SGD, Adam, AdamW
from upweight.training.pbrf import PBRF
from upweight.training.schedules import Cosine, LinearDecay, Stepwise
from upweight.training.training import Training

__all__ = [
    "CG",
    "EKFAC",
    "GGN",
    "KFAC",
    "L2",
    "MINRES",
    "PBRF",
    "SGD",
    "Absolute",
    "Adam",
    "AdamW",
    "Auto",
    "Bernoulli",
    "BlockCG",
    "Blockwise",
    "Cholesky",
    "Coefficient",
    "Context",
    "Cosine",
    "CrossEntropy",
    "Data",
    "Diagonal",
    "Effects",
    "EmpiricalFisher",
    "Evidence",
    "Expand",
    "Expected",
    "Fisher",
    "FromFunction",
    "Functional",
    "GradientCosine",
    "GradientDot",
    "GroupSums",
    "Hessian",
    "Influence",
    "LinearDecay",
    "LogProb",
    "Logit",
    "Loss",
    "Margin",
    "Matrix",
    "Measure",
    "Method",
    "Newton",
    "NoPenalty",
    "Observed",
    "PerLayer",
    "PerToken",
    "Poisson",
    "Provenance",
    "Ranking",
    "Reduce",
    "Relative",
    "Resources",
    "Sampled",
    "Scores",
    "Shards",
    "SmoothHinge",
    "SquaredError",
    "Stepwise",
    "SumToZero",
    "Task",
    "Top",
    "TopScores",
    "Training",
    "Unit",
    "Weighted",
    "applications",
    "as_data",
    "check",
    "data",
    "errors",
    "evaluation",
    "next_token",
    "report",
    "training",
]
