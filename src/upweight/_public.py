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
from upweight.front.attribute import attribute
from upweight.front.plan import plan
from upweight.index.index import Index
from upweight.linalg.damping import Absolute, Evidence, FromTraining, Relative
from upweight.methods.astra import ASTRA
from upweight.methods.averaged import Averaged
from upweight.methods.baselines import BM25, Random, TrainingLoss
from upweight.methods.bif import BIF
from upweight.methods.datainf import DataInf
from upweight.methods.datamodels import Datamodels
from upweight.methods.ensemble import Ensemble
from upweight.methods.influence import Influence
from upweight.methods.logra import LoGra
from upweight.methods.magic import MAGIC
from upweight.methods.method import Method
from upweight.methods.neighbours import FeatureSimilarity, KNNShapley
from upweight.methods.reduce import GroupSums, Matrix, PerLayer, PerToken, Top
from upweight.methods.refits import LeaveOneOut, SubsampledInfluence
from upweight.methods.representer import RepresenterPoints
from upweight.methods.shapley import DataShapley
from upweight.methods.similarity import GradientCosine, GradientDot
from upweight.methods.source import SOURCE
from upweight.methods.stacked import Stacked
from upweight.methods.tracin import TracIn
from upweight.methods.trak import TRAK
from upweight.runtime.resources import Resources
from upweight.scores import Scores, Unit
from upweight.shards import Shards
from upweight.task.data import Data, as_data
from upweight.task.losses import (
    AbsoluteError,
    Bernoulli,
    CrossEntropy,
    Huber,
    Poisson,
    SmoothHinge,
    SquaredError,
    Weighted,
)
from upweight.task.measures import Coefficient, Functional, Logit, LogProb, Loss, Margin, Measure
from upweight.task.penalties import L2, NoPenalty, SumToZero
from upweight.task.task import Task, next_token
from upweight.training.optimizers import SGD, Adam, AdamW
from upweight.training.record import record
from upweight.training.training import Training

__all__ = [
    "ASTRA",
    "BIF",
    "BM25",
    "EKFAC",
    "GGN",
    "KFAC",
    "L2",
    "MAGIC",
    "SGD",
    "SOURCE",
    "TRAK",
    "Absolute",
    "AbsoluteError",
    "Adam",
    "AdamW",
    "Averaged",
    "Bernoulli",
    "Blockwise",
    "Coefficient",
    "CrossEntropy",
    "Data",
    "DataInf",
    "DataShapley",
    "Datamodels",
    "Diagonal",
    "Effects",
    "EmpiricalFisher",
    "Ensemble",
    "Evidence",
    "FeatureSimilarity",
    "Fisher",
    "FromTraining",
    "Functional",
    "GradientCosine",
    "GradientDot",
    "GroupSums",
    "Hessian",
    "Huber",
    "Index",
    "Influence",
    "KNNShapley",
    "LeaveOneOut",
    "LoGra",
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
    "Random",
    "Relative",
    "RepresenterPoints",
    "Resources",
    "Scores",
    "Shards",
    "SmoothHinge",
    "SquaredError",
    "Stacked",
    "SubsampledInfluence",
    "SumToZero",
    "Task",
    "Top",
    "TracIn",
    "Training",
    "TrainingLoss",
    "Unit",
    "Weighted",
    "applications",
    "as_data",
    "attribute",
    "check",
    "curvature",
    "data",
    "errors",
    "evaluation",
    "labels",
    "next_token",
    "plan",
    "record",
    "report",
    "solvers",
    "training",
]
