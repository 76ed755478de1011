"""What untruncated EK-FAC scores are, given a contender's factors: slow, plain, in float64.

    T[q, i] = −(1/n) Σ_l ⟨ Q_Gᵀ ∇m_q Q_A / (Λ + λ),  Q_Gᵀ ∇ℓᵢ Q_A ⟩    over layers l, `[o, i]` each

Gradients are taken example by example with `torch.func`; for a random sample of the training set
the scores of all queries are compared with the contender's. The factors are the contender's own, so
this says what its contraction and its precision cost, and whether it computes what it says; not
whether its factors are good. It has no part of any contender in it.

The gradient of an example that the model is sure of is a difference p − 1 of nearly equal numbers,
of which float32 keeps few digits or none. `float32_gradients` in the result is the error of T
itself when the gradients, and nothing else, are taken in float32: what no contender that takes them
in float32 can beat.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ekfac_networks import token_losses
from ekfac_workloads import Problem
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Layer = tuple[str, str | None]
QUERY_CHUNK, TRAIN_CHUNK = 16, 128
"""How many gradients are held at once."""


def per_example_gradients(
    model: nn.Module, layers: list[Layer], X: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """∇ℓᵢ of each layer as `[b, o, i]`, the bias as last column."""
    names = {name for layer in layers for name in layer if name is not None}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: parameters.pop(name) for name in names}

    def loss(theta: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(model, theta | parameters, (x[None],))
        return token_losses(outputs, target[None]).sum()

    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(chosen, X, y)
    result = {}
    for weight, bias in layers:
        matrix = gradients[weight].flatten(2)
        if bias is not None:
            matrix = torch.cat([matrix, gradients[bias][..., None]], dim=2)
        result[weight] = matrix
    return result


def true_scores(problem: Problem, factors: Path, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """T for all queries and the training examples in `rows`, with gradients taken in `dtype`."""
    with safe_open(factors, "pt") as f:
        described = json.loads(f.metadata()["blocks"])
        tensors = {name: f.get_tensor(name).double() for name in f.keys()}
    model = problem.model.to(dtype)
    layers = [(block["weight"], block["bias"]) for block in described]

    def in_eigenbasis(X: Tensor, y: Tensor) -> dict[str, Tensor]:
        X = X.to(dtype) if X.is_floating_point() else X
        return {
            name: tensors[f"{name}/left"].T @ g.double() @ tensors[f"{name}/right"]
            for name, g in per_example_gradients(model, layers, X, y).items()
        }

    total = torch.zeros(len(problem.Xq), len(rows), dtype=torch.float64)
    for start in range(0, len(rows), TRAIN_CHUNK):
        chosen = rows[start : start + TRAIN_CHUNK]
        trained = in_eigenbasis(problem.X[chosen], problem.y[chosen])
        for block in described:
            divisor = tensors[f"{block['weight']}/eigenvalues"] + block["damping"]
            trained[block["weight"]] /= divisor
        for first in range(0, len(problem.Xq), QUERY_CHUNK):
            chunk = slice(first, first + QUERY_CHUNK)
            asked = in_eigenbasis(problem.Xq[chunk], problem.yq[chunk])
            for name, g in asked.items():
                total[chunk, start : start + len(chosen)] += (
                    g.flatten(1) @ trained[name].flatten(1).T
                )
    return -total / len(problem.X)


def errors(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """‖S − T‖ / ‖T‖ of all scores and of those of one query: the worst, the median and the rms."""
    error = scores - truth
    per_query = error.norm(dim=1) / truth.norm(dim=1)
    return {
        "relative_error": float(error.norm() / truth.norm()),
        "worst_query": float(per_query.max()),
        "median_query": float(per_query.median()),
        "rms_query": float(per_query.square().mean().sqrt()),
    }


def spectrum(factors: Path) -> dict[str, Any]:
    """The mean and the largest eigenvalue of each layer: what the damping is to be seen beside."""
    with safe_open(factors, "pt") as f:
        return {
            block["weight"]: {
                "mean": float(values.mean()),
                "largest": float(values.max()),
                "damping": block["damping"],
            }
            for block in json.loads(f.metadata()["blocks"])
            for values in [f.get_tensor(f"{block['weight']}/eigenvalues")]
        }


def main() -> None:
    """Compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", type=Path)
    parser.add_argument("factors", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--queries", type=int, required=True)
    parser.add_argument("--sample", type=int, required=True)
    given = parser.parse_args()
    problem = Problem.load(given.workload, given.n, given.queries)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(given.n, generator=generator)[: given.sample].sort().values
    rounded = true_scores(problem, given.factors, rows, torch.float32)
    truth = true_scores(problem, given.factors, rows, torch.float64)
    scores = torch.from_numpy(np.load(given.scores, mmap_mode="r")[:, rows.numpy()]).double()
    result = {
        "sample": len(rows),
        **errors(scores, truth),
        "float32_gradients": errors(rounded, truth),
        "layers": spectrum(given.factors),
    }
    given.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
