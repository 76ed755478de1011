"""ℓ1-penalized estimators on the support of their coefficients.

    J(θ) = (1/n) Σᵢ vᵢ ℓ(W xᵢ + b, yᵢ) + λ₁ ‖W‖₁ + (λ₂/2) ‖W‖²

On S = {j : θ̂ⱼ ≠ 0}, and as long as no sign changes, λ₁‖W‖₁ is linear with slope λ₁ sign(θ̂). J on S
is then twice differentiable with its minimum at θ̂, and leave-one-out and folds are those of that
objective: only |S| enters (Stephenson & Broderick 2020; Rad & Maleki 2020, §3.2). What a removal
does to the support itself is not seen: fits by scikit-learn are what tells.

    α ρ ‖W‖₁ + ½ α (1 − ρ) ‖W‖²          (Lasso: ρ = 1; ElasticNet)     λ₁ = αρ, λ₂ = α(1 − ρ)
    C Σ vᵢ ℓᵢ + ρ ‖W‖₁ + ½ (1 − ρ) ‖W‖²   (LogisticRegression)           divided by nC
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from torch import Tensor, nn

from upweight._typing import Params
from upweight.adapters.sklearn import unit_weights
from upweight.adapters.sklearn_arrays import encoded, example_weights, features, require_rows
from upweight.adapters.sklearn_objectives import Encoding, Objective, coefficients, final_step
from upweight.adapters.stationarity import judged
from upweight.adapters.support import linear_map
from upweight.errors import UnsupportedModel
from upweight.task.data import ArrayData, Data
from upweight.task.losses import Bernoulli, CrossEntropy, SquaredError, Weighted
from upweight.task.params import Layout
from upweight.task.penalties import L2, Penalty, SumToZero
from upweight.task.task import Task

DEPENDENT = 1e-9
"""A pivot of columns of length 1, relative to the largest, below which one is dependent."""

SLACK = 0.05
"""How much harder than the penalty a column that was left out may pull before it counts: one that
only just enters changes little."""


def is_sparse(estimator: Any) -> bool:
    """Whether it is a linear model with an ℓ1 part, of those translated here."""
    final = final_step(estimator)
    if type(final) in (Lasso, ElasticNet):
        return True
    return type(final) is LogisticRegression and _share(final) > 0


def objective_of(estimator: Any) -> Objective:
    """The loss and how its targets are written; the penalty is in `task`."""
    final = final_step(estimator)
    if type(final) is not LogisticRegression:
        return Objective(SquaredError(), Encoding.REAL, lambda *_: 1.0)
    if len(final.classes_) > 2:
        return Objective(CrossEntropy(), Encoding.INDEX, lambda *_: 1.0, softmax=True)
    return Objective(Bernoulli(), Encoding.ZERO_ONE, lambda *_: 1.0)


def task(
    estimator: Any, X: Any, y: Any, sample_weight: Any = None, *, tolerance: float = 1.0
) -> tuple[Task, Data, Callable[[Tensor, list[int]], bool], tuple[str, ...]]:
    """A fitted ℓ1-penalized estimator on its support: task, training data, `holds`, and notes.

    `holds(θ, group)` says whether θ, fitted on the support without the group, is a minimum with all
    columns: no sign has changed, and no column left out pulls harder than the penalty.

    Arguments as for `upweight.adapters.sklearn.task`; the examples of the task are the kept columns
    of X, transformed by a Pipeline's earlier steps.

    Raises:
        UnsupportedModel: It kept no column and no intercept, or constrains its signs.
        NotStationary: It is farther from the minimum than `tolerance`.
        DataError, ShapeError: X or y are not what it was fitted on.
    """
    final, objective = final_step(estimator), objective_of(estimator)
    _require_translatable(final)
    Z, targets = features(estimator, X), encoded(estimator, objective, y)
    require_rows(Z, targets)
    n = len(Z)
    weights, _ = example_weights(final, y, sample_weight, n)
    if weights is not None and type(final) is not LogisticRegression:
        weights = weights * n / weights.sum()  # as Lasso scales them
    weight, bias = coefficients(final, objective)
    if bias is not None and _is_liblinear(final) and not bool(bias.any()):
        bias = None  # which it penalizes too, and took out
    kept, count = weight != 0, int((weight != 0).sum())
    by_l1, by_l2 = _strengths(final, n)
    support = kept
    if by_l2 == 0 and len(weight) == 1 and count > 1:
        weight, bias, kept, signs = _independent(weight, bias, kept, Z)
    else:
        signs = weight.sign()
    whole = Z
    inner, Z = _model(weight, bias, kept, Z)
    slopes = {"weight": by_l1 * signs[kept]}
    if bias is not None:
        # liblinear penalizes its intercept b = s β as it does β.
        scaled = by_l1 / float(final.intercept_scaling) if _is_liblinear(final) else 0.0
        slopes["bias"] = scaled * bias.sign()
    layout = Layout.of(inner, ("*",))
    flat = torch.cat([slopes[name].reshape(-1).double() for name in layout.names])
    penalty: Penalty = FixedSigns(tuple(flat.tolist()))
    if by_l2 > 0:
        penalty = penalty + L2(by_l2, exclude=("*bias",))
    if objective.softmax and bias is not None:
        penalty = penalty + SumToZero("*bias")
    arrays: tuple[Any, Any] = (Z, targets)
    made = Task(inner, objective.loss, penalty)
    if weights is not None:
        arrays = (Z, (targets, weights))
        made = Task(inner, Weighted(objective.loss), penalty, forward=unit_weights)
    train = ArrayData(arrays)
    name = type(final).__name__
    notes = judged(made, train, tolerance, name)
    notes.append(
        f"{name} is held to its support, {count} of {kept.numel()} coefficients: that "
        "another may enter or leave without an example is seen by refits only"
    )
    if int(kept.sum()) < count:
        notes.append(
            f"{count - int(kept.sum())} columns of the support depend on the others, and their "
            "coefficients were moved to those, which changes no output"
        )

    def holds(theta: Float[Tensor, " p"], group: list[int]) -> bool:
        with torch.no_grad():
            outputs, given = made.outputs(theta, train.batch(0, n))
        slope = made.output_gradient(outputs, given).reshape(n, -1)
        slope[group] = 0.0
        pulls = (slope.T @ whole / n)[~support].abs()
        signs = made.layout.unflatten(theta)["weight"] if int(kept.sum()) else theta.new_zeros(0)
        same = torch.equal(signs.reshape(-1).sign(), weight[kept].sign())
        return same and not bool((pulls > (1 + SLACK) * by_l1).any())

    return made, train, holds, tuple(notes)


@dataclass(frozen=True)
class FixedSigns(Penalty):
    """R(θ) = Σⱼ sⱼ θⱼ: λ‖θ‖₁ as long as no θⱼ changes its sign.

    Args:
        slopes: sⱼ = λ sign(θ̂ⱼ), one per entry of θ, flat.
    """

    slopes: tuple[float, ...]

    def __repr__(self) -> str:
        return f"FixedSigns({len(self.slopes)} slopes)"

    def __call__(self, params: Params, layout: Layout) -> Float[Tensor, ""]:
        theta = layout.flatten(params)
        return (self._slopes(theta) * theta).sum()

    def gradient(self, theta: Float[Tensor, " p"], layout: Layout) -> Float[Tensor, " p"]:
        return self._slopes(theta)

    def curvature(self, theta: Float[Tensor, " p"], layout: Layout) -> None:
        return None

    def _slopes(self, theta: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        return torch.tensor(self.slopes, dtype=theta.dtype, device=theta.device)


class OnSupport(nn.Module):
    """W x + b where only some entries of W are parameters, the others 0."""

    places: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, kept: Bool[Tensor, "c i"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight[kept].clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.register_buffer("places", kept.flatten().nonzero()[:, 0])
        self.shape = tuple(kept.shape)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.new_zeros(self.shape[0] * self.shape[1])
        whole = flat.index_put((self.places,), self.weight).reshape(self.shape)
        outputs = x @ whole.T
        return outputs if self.bias is None else outputs + self.bias


class Constant(nn.Module):
    """b, whatever the input."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), len(self.bias)) + self.bias


def _model(
    weight: Tensor, bias: Tensor | None, kept: Bool[Tensor, "c i"], Z: Tensor
) -> tuple[nn.Module, Tensor]:
    """The model on the support, and the columns that it takes."""
    if not bool(kept.any()):
        if bias is None:
            raise UnsupportedModel(
                "Cross-validation on the support needs a coefficient that is not 0.",
                "an estimator that kept no column and has no intercept.",
                "a penalty so large that nothing is worth it.",
                "lower alpha, raise C, or fit with fit_intercept=True.",
            )
        return Constant(bias).eval(), Z
    columns = kept.any(dim=0)
    Z = Z[:, columns].contiguous()
    if len(weight) > 1:
        return OnSupport(weight[:, columns], bias, kept[:, columns]).eval(), Z
    return linear_map(weight[:, columns], bias), Z


def _independent(
    weight: Float[Tensor, "1 i"],
    bias: Float[Tensor, " 1"] | None,
    kept: Bool[Tensor, "1 i"],
    Z: Float[Tensor, "n i"],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The same outputs by columns of the support that do not depend on each other; and the signs.

    Where columns depend on each other θ̂ is one of many minima, J is constant along the way from one
    to the next as long as no sign changes, and any of the columns may carry what they share.
    """
    columns, signs = kept[0].nonzero()[:, 0], weight.sign()
    chosen = Z[:, columns]
    centred = chosen if bias is None else chosen - chosen.mean(dim=0)
    lengths = centred.norm(dim=0).clamp_min(torch.finfo(Z.dtype).tiny)
    _, r, order = scipy.linalg.qr((centred / lengths).numpy(), mode="economic", pivoting=True)
    pivots = np.abs(np.diagonal(r))
    rank = int((pivots > DEPENDENT * pivots[0]).sum())
    if rank == len(columns):
        return weight, bias, kept, signs
    left = columns[torch.from_numpy(np.sort(order[:rank]).astype(np.int64))]
    ones = [] if bias is None else [torch.ones(len(Z), 1, dtype=Z.dtype)]
    outputs = chosen @ weight[0, columns] + (0.0 if bias is None else bias)
    design = torch.cat([Z[:, left], *ones], dim=1)
    found = torch.from_numpy(scipy.linalg.lstsq(design.numpy(), outputs.numpy())[0])
    moved, fewer = torch.zeros_like(weight), torch.zeros_like(kept)
    moved[0, left], fewer[0, left] = found[: len(left)], True
    return moved, None if bias is None else found[len(left) :], fewer, signs


def _share(final: Any) -> float:
    """ρ: the share of the ℓ1 part in the penalty of a LogisticRegression."""
    penalty = getattr(final, "penalty", "deprecated")
    if penalty == "l1":
        return 1.0
    ratio = float(getattr(final, "l1_ratio", None) or 0.0)
    return ratio if penalty in ("elasticnet", "deprecated") else 0.0


def _strengths(final: Any, n: int) -> tuple[float, float]:
    """λ₁ and λ₂, beside the mean loss."""
    if type(final) is LogisticRegression:
        share, whole = _share(final), 1.0 / (n * float(final.C))
    else:
        share = 1.0 if type(final) is Lasso else float(final.l1_ratio)
        whole = float(final.alpha)
    return share * whole, (1 - share) * whole


def _is_liblinear(final: Any) -> bool:
    return getattr(final, "solver", "") == "liblinear"


def _require_translatable(final: Any) -> None:
    name = type(final).__name__
    if getattr(final, "positive", False):
        raise UnsupportedModel(
            "On the support the objective must be smooth.",
            f"{name}(positive=True).",
            "coefficients that stop at a constraint.",
            "fit with positive=False.",
        )
    many = len(getattr(final, "classes_", ())) > 2
    if not hasattr(final, "coef_") or (many and _is_liblinear(final)):
        raise UnsupportedModel(
            "An ℓ1-penalized estimator must be fitted, and of several classes be one softmax.",
            f"{name}, {'one classifier per class' if many else 'not fitted'}.",
            "solver='liblinear' with several classes." if many else "a clone, or a new object.",
            "fit with solver='saga'." if many else "call .fit(X, y) first.",
        )
    if not isinstance(final.coef_, np.ndarray):
        raise UnsupportedModel(
            "Coefficients must be a dense array.",
            f"{name} with coef_ of type {type(final.coef_).__name__}.",
            "sparsify() was called.",
            "call .densify() first.",
        )
