"""upweight's own methods in `fidelity.py`, and the rankings that need no library."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from fidelity_methods import Contender, Method
from fidelity_networks import Problem, losses
from fidelity_tasks import SPECS, task_of
from torch import Tensor

import upweight as uw
from upweight.front.choice import LEARNED
from upweight.front.choice import stacked as by_segment

MEASURES = {"loss": uw.Loss(), "margin": uw.Margin(), "output": uw.Logit(0)}
BY_LAYER = "Relative(0.1); softmax regression: Absolute(1e-6) beside its penalty"
MEMBERS = 20
"""Subset models at most at which EK-FAC is taken, or SOURCE before `Datamodels`."""
EXACT_SIZE = 3_000
"""Parameters of a network up to which its p × p matrix is factorized."""
SEQUENCES = 10
"""Queries at once, where a query is a sequence and its system is solved by products."""
TINY_SIZE = 500
"""Up to which a system is solved for every training example, or by MINRES to the end."""


class Ours(Method):
    """A method of upweight's; one that looks at training is given the recipe, and trains again."""

    def __init__(self, problem: Problem, folder: Path, method: uw.Method) -> None:
        super().__init__(problem, folder)
        self.method = method
        self.data = (problem.X, problem.y)

    def fit(self) -> None:
        method = self.method
        looks = method.takes_history and not method.history_is_optional
        recipe = SPECS[self.problem.name].recipe if looks else None
        self.fitted = self.method.fit(task_of(self.problem), self.data, history=recipe)

    def scores(self, measure: str) -> Tensor:
        Xq, yq = self.problem.Xq, self.problem.yq
        solver = getattr(self.method, "solver", None)
        of_all = isinstance(self.method, uw.ASTRA | uw.Averaged)
        by_products = of_all or solver not in (None, uw.solvers.Auto())
        whole = self.problem.kind != "text" or not by_products
        size = len(Xq) if whole else SEQUENCES  # products with all at once take gigabytes
        parts = [
            self.fitted.attribute(part, MEASURES[measure]).values
            for part in zip(Xq.split(size), yq.split(size), strict=True)
        ]
        return torch.cat(parts)

    def self_scores(self) -> Tensor:
        values: Tensor = -self.fitted.self_influence()
        return values


class Baseline(Ours):
    """A ranking of the queries that knows no measure: its sign is that of a loss."""

    def scores(self, measure: str) -> Tensor:
        values: Tensor = self.fitted.attribute((self.problem.Xq, self.problem.yq)).values
        return values


class Retraining(Method):
    """A method that is fitted to models of random halves, none of which is among the truth's."""

    def __init__(self, problem: Problem, folder: Path, method: uw.Method) -> None:
        super().__init__(problem, folder)
        self.method = method

    def fit(self) -> None:
        recipe = replace(SPECS[self.problem.name].recipe, skip_absent=True)
        data = (self.problem.X, self.problem.y)
        self.fitted = self.method.fit(task_of(self.problem), data, history=recipe)

    def scores(self, measure: str) -> Tensor:
        queries = (self.problem.Xq, self.problem.yq)
        values: Tensor = self.fitted.attribute(queries, MEASURES[measure]).values
        return values


class Ranking(Method):
    """The training loss of each example, which needs no attribution."""

    def fit(self) -> None: ...

    def scores(self, measure: str) -> Tensor:
        raise NotImplementedError

    def self_scores(self) -> Tensor:
        p = self.problem
        with torch.no_grad():
            return losses(p.kind, p.model(p.X), p.y)


def ours(
    name: str,
    method: Callable[[Problem], uw.Method],
    settings: str,
    refusal: Callable[[Problem], str | None] = lambda problem: None,
    detects: Callable[[Problem], bool] = lambda problem: True,
    calibrated: bool = True,
) -> Contender:
    return Contender(
        f"upweight {name}",
        lambda problem, folder: Ours(problem, folder, method(problem)),
        "upweight",
        settings,
        refusal,
        detects=detects,
        calibrated=calibrated,
    )


def baseline(
    name: str,
    method: Callable[[Problem], uw.Method],
    settings: str,
    refusal: Callable[[Problem], str | None] = lambda problem: None,
) -> Contender:
    return Contender(
        f"upweight {name}",
        lambda problem, folder: Baseline(problem, folder, method(problem)),
        "upweight",
        settings,
        refusal,
        measures=lambda problem: ("loss",),
        calibrated=False,
        detects=lambda problem: False,
    )


def convex(problem: Problem) -> bool:
    return isinstance(SPECS[problem.name].recipe, uw.training.Newton)


def extra(problem: Problem) -> float:
    """λ beyond the penalty, for curvatures over all parameters."""
    return problem.damping - problem.penalty


def layered(curvature: uw.EKFAC | uw.KFAC | uw.Diagonal) -> Callable[[Problem], uw.Influence]:
    """With a tenth of each block's mean eigenvalue, or the penalty alone at a strict minimum."""

    def made(problem: Problem) -> uw.Influence:
        damping = uw.Absolute(1e-6) if convex(problem) else uw.Relative(0.1)
        return uw.Influence(curvature, damping=damping)

    return made


def trained_by_sgd(problem: Problem) -> str | None:
    if convex(problem):
        return "trained to its minimum"
    adam = not isinstance(SPECS[problem.name].recipe.optimizer, uw.SGD)
    return "Adam has no one step size" if adam else None


def trained_in_steps(problem: Problem) -> str | None:
    return "trained to its minimum, by no steps" if convex(problem) else None


def size(problem: Problem) -> int:
    return sum(p.numel() for p in problem.model.parameters())


def not_convex(problem: Problem) -> str | None:
    return None if convex(problem) else "the Hessian is indefinite: see Hessian, MINRES"


def only_small_networks(problem: Problem) -> str | None:
    if convex(problem):
        return "the same as the Hessian here"
    if size(problem) > EXACT_SIZE:
        return f"{size(problem)} parameters: see GGN, CG"
    return None


def tiny(problem: Problem) -> bool:
    return size(problem) <= TINY_SIZE


def only_tiny_networks(problem: Problem) -> str | None:
    if convex(problem) or tiny(problem):
        return only_small_networks(problem)
    return "indefinite and ill-conditioned: MINRES takes hundreds of products for each query"


def only_large_networks(problem: Problem) -> str | None:
    if convex(problem):
        return "the same as the Hessian here"
    return "its p × p matrix is factorized instead" if size(problem) <= EXACT_SIZE else None


def retrained(name: str, method: Callable[[Problem], uw.Method], settings: str) -> Contender:
    return Contender(
        f"upweight {name}",
        lambda problem, folder: Retraining(problem, folder, method(problem)),
        "upweight",
        settings,
        lambda problem: "trained to its minimum" if convex(problem) else None,
        detects=lambda problem: False,
    )


def stacked(halves: int) -> uw.Stacked:
    """EK-FAC at two dampings and two times of the training of each half, by layer."""
    methods = tuple(
        uw.Ensemble(uw.Influence(uw.EKFAC(), damping=uw.Relative(f)), min(halves, MEMBERS), 0.5, at)
        for f in (0.1, 0.01)
        for at in (0.3, 1.0)
    )
    return uw.Stacked(methods, halves, 0.5, seeds=min(halves // 2, 20))


def corrected(halves: int) -> uw.Datamodels:
    """Ridge regression of what SOURCE of some of the halves leaves unexplained."""
    methods = tuple(uw.Ensemble(uw.SOURCE(3, states=1, segment=k), MEMBERS, 0.5) for k in range(3))
    return uw.Datamodels(halves, 0.5, 20, prior=uw.Stacked(methods, halves, 0.5, seeds=20))


def roughly(problem: Problem) -> uw.Influence:
    """The GGN with the λ of the front door, by conjugate gradients to a residual of a tenth."""
    by_cg = uw.solvers.CG(rtol=0.1, preconditioner=uw.EKFAC())
    return uw.Influence(uw.GGN(), by_cg, usual(problem))


def beside_ggn(problem: Problem, halves: int) -> uw.Stacked:
    """What `uw.attribute` stacks where there is time: the GGN of the model as one more method."""
    plain = by_segment(halves)
    return replace(plain, methods=(*plain.methods, roughly(problem)))


RETRAINED = (
    retrained(
        "EK-FAC, 10 seeds",
        lambda problem: uw.Ensemble(uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)), 10),
        "Ensemble of 10 models: 10 trainings",
    ),
    retrained(
        "EK-FAC, calibrated",
        lambda problem: uw.Stacked(
            (uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)),), 40, by_layer=False
        ),
        "one factor, fitted to 40 halves: 20 trainings",
    ),
    retrained(
        "stacked, 10 halves",
        lambda problem: stacked(10),
        "EK-FAC of halves by layer: 5 trainings",
    ),
    *(
        retrained(
            f"stacked SOURCE, {halves} halves",
            lambda problem, halves=halves: by_segment(halves),
            f"SOURCE of halves by third, all members: {halves // 2} trainings",
        )
        for halves in (10, 16, 40)
    ),
    *(
        retrained(
            f"stacked SOURCE, {halves} halves, beside the GGN",
            lambda problem, halves=halves: beside_ggn(problem, halves),
            f"the same, and GGN() of the model by CG to a tenth: {halves // 2} trainings",
        )
        for halves in (10, 16, 40)
    ),
    retrained(
        "datamodels on stacked SOURCE, 160 halves",
        lambda problem: corrected(160),
        "ridge on what stacked SOURCE leaves: 80 trainings",
    ),
)
BEST: Mapping[str, float] = {
    "digits-mlp": 0.01,
    "digits-cnn": 0.01,
    "diabetes-mlp": 0.05,
    "spam-mlp": 0.01,
    "brown-gpt": 0.5,
}
"""λ at which the Gauss–Newton matrix ranks best, of a few per decade: docs/methods/astra.md."""

BY_CG: Mapping[str, float] = {**BEST, "brown-gpt": 5.4}
"""The same, solved to a residual of a tenth: there .65 at 2, .669 at 5.4 and .666 at 15."""


def usual(problem: Problem) -> uw.Relative | uw.Absolute:
    """What `uw.attribute` adds where nothing is known of training."""
    if problem.kind == "number":
        return uw.Relative(1.0)
    return uw.Absolute(LEARNED * problem.y[0].numel())


def resolved(problem: Problem) -> uw.Influence:
    """The GGN with the λ of its training."""
    return replace(roughly(problem), damping=uw.FromTraining())


def only_networks(problem: Problem) -> str | None:
    return "the same as the Hessian here" if convex(problem) else None


def no_draws(problem: Problem) -> str | None:
    if convex(problem):
        return "draws add noise to the Hessian's answer"
    return None if size(problem) <= EXACT_SIZE else f"{size(problem)} parameters × 400 draws"


def penalized(problem: Problem) -> str | None:
    return None if problem.penalty else "no penalty on its last layer"


def only_text(problem: Problem) -> str | None:
    return None if problem.kind == "text" else "its examples have no words"


def no_text(problem: Problem) -> str | None:
    return "a passage has many targets" if problem.kind == "text" else None


def localized(problem: Problem) -> uw.BIF:
    """λ = γ/n as for the Gauss–Newton matrix; a step of 1 over the largest curvature."""
    n, task = len(problem.X), task_of(problem)
    eigen = uw.EKFAC().fit(task, uw.as_data((problem.X, problem.y)), task.theta())
    largest = max(float(block.values.max()) for block in eigen.blocks)
    gamma = BEST[problem.name] * n
    return uw.BIF(1.0 / (n * largest + gamma), gamma, thinning=3)


FEATURES: Mapping[str, str | None] = {
    "digits-softmax": None,
    "digits-mlp": "3",
    "digits-cnn": "6",
    "diabetes-mlp": "1",
    "spam-mlp": "3",
    "brown-gpt": "norm",
}
"""The module before the last layer; None: the inputs."""


def neighbours(problem: Problem) -> uw.KNNShapley:
    target = "number" if problem.kind == "number" else "class"
    return uw.KNNShapley(5, layer=FEATURES[problem.name], target=target)


BASELINES = (
    baseline("kNN-Shapley", neighbours, "KNNShapley(5), features before the last layer", no_text),
    baseline(
        "feature similarity",
        lambda problem: uw.FeatureSimilarity(FEATURES[problem.name]),
        "FeatureSimilarity, features before the last layer",
    ),
    baseline("BM25", lambda problem: uw.BM25(), "BM25() of bytes", only_text),
    baseline("training loss", lambda problem: uw.TrainingLoss(), "TrainingLoss()"),
    baseline("random", lambda problem: uw.Random(), "Random()"),
)

OURS = (
    ours(
        "Hessian",
        lambda problem: uw.Influence(uw.Hessian(), solver=uw.solvers.Cholesky()),
        "Hessian(), Cholesky()",
        not_convex,
    ),
    ours(
        "Hessian, MINRES",
        lambda problem: uw.Influence(uw.Hessian(), uw.solvers.MINRES(rtol=1e-3), extra(problem)),
        "Hessian(), MINRES(rtol=1e-3), λ of the task",
        only_tiny_networks,
        tiny,
    ),
    ours(
        "GGN",
        lambda problem: uw.Influence(uw.GGN(), uw.solvers.Cholesky(), extra(problem)),
        "GGN(), Cholesky(), λ of the task",
        only_small_networks,
        tiny,
    ),
    ours(
        "GGN, CG",
        lambda problem: uw.Influence(uw.GGN(), uw.solvers.BlockCG(rtol=1e-2), extra(problem)),
        "GGN(), BlockCG(rtol=1e-2), λ of the task",
        only_large_networks,
        lambda problem: False,
    ),
    ours("EK-FAC", layered(uw.EKFAC()), f"EKFAC(), {BY_LAYER}"),
    ours(
        "EK-FAC, λ of the task",
        lambda problem: uw.Influence(uw.EKFAC(), damping=uw.Absolute(extra(problem))),
        "EKFAC(), one λ for all layers",
        lambda problem: "the same as EK-FAC here" if convex(problem) else None,
    ),
    ours(
        "GGN, λ of training",
        lambda problem: uw.Influence(uw.GGN(), uw.solvers.BlockCG(rtol=1e-2), uw.FromTraining()),
        "GGN(), BlockCG(rtol=1e-2), λ = 1/(step size × steps)",
        trained_by_sgd,
        lambda problem: False,
    ),
    ours(
        "EK-FAC, λ of training",
        lambda problem: uw.Influence(uw.EKFAC(), damping=uw.FromTraining()),
        "EKFAC(), λ = 1/(step size × steps)",
        trained_by_sgd,
    ),
    ours("gradient dot", lambda problem: uw.GradientDot(), "GradientDot()"),
    ours(
        "gradient cosine",
        lambda problem: uw.GradientCosine(),
        "GradientCosine()",
        detects=lambda problem: False,
        calibrated=False,
    ),
    ours("TracIn", lambda problem: uw.TracIn(5), "TracIn(5), of the recipe", trained_in_steps),
    ours(
        "SOURCE, 3 segments",
        lambda problem: uw.SOURCE(3),
        "SOURCE(3), EKFAC(), of the recipe",
        trained_in_steps,
    ),
    ours(
        "SOURCE and GGN",
        lambda problem: uw.Averaged((uw.SOURCE(3), roughly(problem))),
        "Averaged: SOURCE(3), and GGN(), CG(rtol=0.1, preconditioner=EKFAC()), λ of the front door",
        trained_in_steps,
        lambda problem: False,
    ),
    ours(
        "SOURCE and GGN, λ of training",
        lambda problem: uw.Averaged((uw.SOURCE(3), resolved(problem))),
        "Averaged: SOURCE(3), and GGN(), CG(rtol=0.1, preconditioner=EKFAC()), "
        "λ = 1/(step size × steps)",
        trained_by_sgd,
        lambda problem: False,
    ),
    ours(
        "GGN, CG by EK-FAC",
        lambda problem: uw.Influence(
            uw.GGN(),
            uw.solvers.BlockCG(rtol=0.1, preconditioner=uw.EKFAC()),
            BY_CG[problem.name],
        ),
        "GGN(), BlockCG(rtol=0.1, preconditioner=EKFAC()), the λ that ranks best of a few",
        only_networks,
        lambda problem: False,
    ),
    ours(
        "GGN, usual λ",
        lambda problem: uw.Influence(
            uw.GGN(),
            uw.solvers.Cholesky()
            if size(problem) <= EXACT_SIZE
            else uw.solvers.CG(rtol=1e-2, preconditioner=uw.EKFAC()),
            usual(problem),
        ),
        "GGN(), Cholesky() or CG(rtol=1e-2, preconditioner=EKFAC()), what the front door takes: "
        "λ = 0.02 for each label of an example; of no classes Relative(1)",
        only_networks,
        tiny,
    ),
    ours(
        "ASTRA",
        lambda problem: uw.ASTRA(BEST[problem.name], epochs=5),
        "epochs=5, batch=64, the λ that ranks best of a few",
        only_networks,
        lambda problem: False,
    ),
    ours("DataInf", lambda problem: uw.DataInf(uw.Relative(0.1)), "Relative(0.1)"),
    ours("BIF", localized, "400 draws of 4 chains, λ = γ/n as for the GGN", no_draws),
    ours("K-FAC", layered(uw.KFAC()), f"KFAC(), {BY_LAYER}"),
    ours("diagonal", layered(uw.Diagonal()), f"Diagonal(), {BY_LAYER}"),
    *RETRAINED,
    ours(
        "LoGra",
        lambda problem: uw.LoGra(rank=64),
        "LoGra(rank=64), Relative(0.1)",
        calibrated=False,
    ),
    ours(
        "TRAK",
        lambda problem: uw.TRAK(dim=2048),
        "TRAK(dim=2048), Relative(1.0)",
        calibrated=False,
    ),
    ours(
        "representer points",
        lambda problem: uw.RepresenterPoints(),
        "RepresenterPoints()",
        penalized,
        lambda problem: False,
        calibrated=False,
    ),
    *BASELINES,
    Contender("loss", Ranking, "none", "the training loss", predicts=False),
)
