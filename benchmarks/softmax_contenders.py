"""Who computes the scores in `exact.py`, each by its own public interface.

A contender gets the trained model and the data and returns its scores in its own convention;
`mapping` says in words and `factor` in numbers what turns them into S = ∂m/∂w `[q, n]`. Every
peer gets the settings that served it best in trials at n = 1 000 and 2 000; `settings` states
them. Peers are imported inside their functions, so that only the one that runs must be there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

PLAIN_EPOCH_BATCH = 512


@dataclass(frozen=True)
class Problem:
    """The trained model and its data, in float64."""

    model: nn.Module
    X: Tensor
    y: Tensor
    Xq: Tensor
    yq: Tensor
    strength: float

    @classmethod
    def load(cls, workload: Path) -> Self:
        """From the file that `softmax_workload.py` writes."""
        with np.load(workload) as w:
            X, y, Xq, yq = (torch.from_numpy(w[k]) for k in ("X", "y", "Xq", "yq"))
            theta, strength = torch.from_numpy(w["theta"]), float(w["strength"])
        classes, features = theta.shape[0], theta.shape[1] - 1
        linear = nn.Linear(features, classes, dtype=theta.dtype)
        with torch.no_grad():
            linear.weight.copy_(theta[:, :-1])
            linear.bias.copy_(theta[:, -1])
        model = nn.Sequential(nn.Flatten(), linear).eval()
        side = round(features**0.5)
        images = (-1, side, side)
        return cls(model, X.reshape(images), y, Xq.reshape(images), yq, strength)

    def loader(self, batch: int) -> DataLoader[tuple[Tensor, ...]]:
        """The training data in order; a batch is one slice, which spares peers the collating."""
        data = TensorDataset(self.X, self.y)
        sampler = BatchSampler(SequentialSampler(data), batch, drop_last=False)
        return DataLoader(data, sampler=sampler, batch_size=None)


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    modules: tuple[str, ...]
    """What must be importable; the first names the library."""
    distribution: str
    """The name under which its version is recorded."""
    runs: int
    """How many times it is timed; the smallest time is reported."""
    settings: str
    mapping: str
    factor: Callable[[int], float]
    scores: Callable[[Problem], Tensor]


def plain_epoch(problem: Problem) -> Tensor:
    """One plain forward and backward pass over the training data at batch 512."""
    parameters = list(problem.model.parameters())
    last = torch.zeros(())
    for start in range(0, len(problem.X), PLAIN_EPOCH_BATCH):
        stop = start + PLAIN_EPOCH_BATCH
        loss = F.cross_entropy(problem.model(problem.X[start:stop]), problem.y[start:stop])
        last = torch.autograd.grad(loss, parameters)[-1]
    return last


def _upweight(solver: str) -> Callable[[Problem], Tensor]:
    def scores(problem: Problem) -> Tensor:
        import upweight as uw

        solvers = {
            "cholesky": uw.solvers.Cholesky(),
            "cg": uw.solvers.CG(rtol=1e-6),
            "block-cg": uw.solvers.BlockCG(rtol=1e-6),
        }
        task = uw.Task(problem.model, loss=uw.CrossEntropy(), penalty=uw.L2(problem.strength))
        method = uw.Influence(curvature=uw.Hessian(), solver=solvers[solver], damping=0.0)
        fitted = method.fit(task, (problem.X, problem.y))
        values: Tensor = fitted.attribute((problem.Xq, problem.yq), measure=uw.Loss()).values
        return values

    return scores


def _pydvl_scores(influence: object, problem: Problem) -> Tensor:
    """⟨(H + λI)⁻¹∇m, ∇ℓ⟩ `[q, n]`; the training gradients are formed in slices of 500."""
    factors = influence.influence_factors(problem.Xq, problem.yq)  # type: ignore[attr-defined]
    return torch.cat(
        [
            influence.influences_from_factors(factors, x, y)  # type: ignore[attr-defined]
            for x, y in problem.loader(500)
        ],
        dim=1,
    )


def _pydvl_direct(problem: Problem) -> Tensor:
    from pydvl.influence.torch import DirectInfluence

    influence = DirectInfluence(
        problem.model, F.cross_entropy, regularization=problem.strength
    ).fit(problem.loader(1000))
    return _pydvl_scores(influence, problem)


def _pydvl_cg(problem: Problem) -> Tensor:
    from pydvl.influence.torch import CgInfluence

    influence = CgInfluence(
        problem.model,
        F.cross_entropy,
        regularization=problem.strength,
        # Its stopping rule is ‖residual‖ < max(rtol² ‖b‖, atol²): this asks for 1e-6 ‖b‖.
        rtol=1e-3,
        atol=1e-8,
        solve_simultaneously=True,
    ).fit(_even_loader(problem, 1000))
    return _pydvl_scores(influence, problem)


def _even_loader(problem: Problem, at_most: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of one size: pyDVL's CG averages over batches, whatever their sizes."""
    n = len(problem.X)
    size = next(b for b in range(min(at_most, n), 0, -1) if n % b == 0)
    return problem.loader(size)


def _captum(rank: int) -> Callable[[Problem], Tensor]:
    def scores(problem: Problem) -> Tensor:
        from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

        influence = ArnoldiInfluenceFunction(
            problem.model,
            problem.loader(200),
            checkpoint="",
            checkpoints_load_func=lambda model, path: 1.0,  # the model is already as trained
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            sample_wise_grads_per_batch=True,
            hessian_dataset=problem.loader(1000),
            projection_dim=rank,
            arnoldi_dim=200,
            arnoldi_tol=1e-6,
            # It works with the sum of the losses' Hessians, so the penalty's share is n λ.
            hessian_reg=len(problem.X) * problem.strength,
            hessian_inverse_tol=0.0,
        )
        values: Tensor = influence.influence((problem.Xq, problem.yq)).detach()
        return values

    return scores


_OURS = "S itself"
_PYDVL = "S = −G/n for its G = ∇mᵀ(H̄ + λI)⁻¹∇ℓ, H̄ the mean loss's Hessian"
_PYDVL_MODULES = ("pydvl", "dask", "distributed", "zarr", "torch")
_CAPTUM = "S = −G for its G = ∇mᵀ(Σ∇²ℓ + nλI)⁻¹∇ℓ on a Krylov subspace"
_CAPTUM_SETTINGS = (
    "hessian_reg=n·λ, arnoldi_tol=1e-6, sample_wise_grads_per_batch=True, batch 1000 for Hessian "
    "products and 200 for gradients"
)

CONTENDERS = (
    Contender(
        "upweight-cholesky",
        ("upweight", "torch"),
        "upweight",
        3,
        "Influence(curvature=Hessian(), solver=Cholesky(), damping=0.0)",
        _OURS,
        lambda n: 1.0,
        _upweight("cholesky"),
    ),
    Contender(
        "upweight-cg",
        ("upweight", "torch"),
        "upweight",
        3,
        "Influence(curvature=Hessian(), solver=CG(rtol=1e-6), damping=0.0)",
        _OURS,
        lambda n: 1.0,
        _upweight("cg"),
    ),
    Contender(
        "upweight-block-cg",
        ("upweight", "torch"),
        "upweight",
        3,
        "Influence(curvature=Hessian(), solver=BlockCG(rtol=1e-6), damping=0.0)",
        _OURS,
        lambda n: 1.0,
        _upweight("block-cg"),
    ),
    Contender(
        "pydvl-cg",
        _PYDVL_MODULES,
        "pyDVL",
        3,
        "CgInfluence(regularization=λ, rtol=1e-3, atol=1e-8, solve_simultaneously=True): relative "
        "residual 1e-6 by its rule; batches of at most 1000, all equal",
        _PYDVL,
        lambda n: -1.0 / n,
        _pydvl_cg,
    ),
    Contender(
        "pydvl-direct",
        _PYDVL_MODULES,
        "pyDVL",
        1,
        "DirectInfluence(regularization=λ), batch 1000",
        _PYDVL,
        lambda n: -1.0 / n,
        _pydvl_direct,
    ),
    Contender(
        "captum-arnoldi-50",
        ("captum", "torch"),
        "captum",
        1,
        f"projection_dim=50, arnoldi_dim=200 (its defaults); {_CAPTUM_SETTINGS}",
        _CAPTUM,
        lambda n: -1.0,
        _captum(50),
    ),
    Contender(
        "captum-arnoldi-200",
        ("captum", "torch"),
        "captum",
        1,
        f"projection_dim=200, arnoldi_dim=200 (nothing dropped); {_CAPTUM_SETTINGS}",
        _CAPTUM,
        lambda n: -1.0,
        _captum(200),
    ),
)
