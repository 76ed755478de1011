"""Why is the exact first-order score of softmax regression not at the ceiling?

Half of the data is a large change of w. The score replaces two things by their first order at
w = 1, and each is put back here by itself and with the other:

    Δθ = −H⁻¹ (∇J(w) − ∇J(1))    the score's        Δθ = −H_w⁻¹ ∇J(w)         one Newton step
    Δm = ∇mᵀ Δθ                  the score's        Δm = m(θ̂ + Δθ) − m(θ̂)    m itself

with H the Hessian of all data and H_w that of the subset, solved by conjugate gradients that H's
Cholesky factor preconditions. Softmax regression in closed form; no part of upweight makes Δm. Adds
`second_order` to the task's entry in results/fidelity.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from environment import DATA
from fidelity import HERE, judged, written
from fidelity_networks import Problem, measured
from fidelity_tasks import problem
from fidelity_truth import plans, truth
from torch import Tensor

NAME = "digits-softmax"
TOLERANCE = 1e-6
STEPS = 60


class Softmax:
    """J(θ, w) = (1/n) Σ wᵢ ℓᵢ + λ/2 ‖θ‖² near its minimum, with θ as `[c, i + 1]`."""

    def __init__(self, made: Problem) -> None:
        self.made, self.n = made, len(made.X)
        linear = made.model
        self.theta = torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach()
        self.X = torch.cat([made.X, torch.ones(self.n, 1).double()], dim=1)
        self.p = (self.X @ self.theta.T).softmax(-1)
        self.delta = self.p - torch.nn.functional.one_hot(made.y, self.p.shape[1])
        self.factor = torch.linalg.cholesky(self.hessian())

    def hessian(self) -> Tensor:
        """H of all data, `[c i, c i]`."""
        c, i = self.theta.shape
        H = torch.empty(c, i, c, i, dtype=torch.float64)
        for a in range(c):
            for b in range(a, c):
                share = self.p[:, a] * (float(a == b) - self.p[:, b]) / self.n
                H[a, :, b] = (self.X * share[:, None]).T @ self.X
                H[b, :, a] = H[a, :, b].T
        return H.view(c * i, c * i) + self.made.penalty * torch.eye(c * i).double()

    def gradient(self, w: Tensor) -> Tensor:
        """∇J(θ̂, w) `[s, c, i]`."""
        terms = torch.einsum("sn,nc,ni->sci", w, self.delta, self.X) / self.n
        return terms + self.made.penalty * self.theta

    def product(self, w: Tensor, v: Tensor) -> Tensor:
        """H_w v of each subset."""
        a = torch.einsum("ni,sci->snc", self.X, v)
        b = self.p * a - self.p * (self.p * a).sum(-1, keepdim=True)
        return (
            torch.einsum("snc,ni->sci", b * w[..., None], self.X) / self.n + self.made.penalty * v
        )

    def solve(self, v: Tensor) -> Tensor:
        """H⁻¹ v."""
        return torch.cholesky_solve(v.flatten(1).T, self.factor).T.reshape(v.shape)

    def newton(self, w: Tensor, gradient: Tensor) -> Tensor:
        """−H_w⁻¹ ∇J(w), to a relative residual of `TOLERANCE`."""

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(dim=(1, 2), keepdim=True)

        x, r = torch.zeros_like(gradient), -gradient
        z = self.solve(r)
        d, rz = z, dot(r, z)
        for _ in range(STEPS):
            Hd = self.product(w, d)
            step = rz / dot(d, Hd)
            x, r = x + step * d, r - step * Hd
            if bool((dot(r, r) <= TOLERANCE**2 * dot(gradient, gradient)).all()):
                return x
            z = self.solve(r)
            new = dot(r, z)
            d, rz = z + new / rz * d, new
        raise ArithmeticError("conjugate gradients did not converge")

    def measurements(self, name: str, theta: Tensor) -> Tensor:
        """m of each query."""
        Xq = torch.cat([self.made.Xq, torch.ones(len(self.made.Xq), 1).double()], dim=1)
        return measured("classes", name, Xq @ theta.T, self.made.yq)


def found(made: Problem, known: dict[str, Tensor]) -> dict[str, Any]:
    """The linear datamodeling score of each combination, for each share of the data."""
    model, report = Softmax(made), dict[str, Any]()
    for plan, weights in plans(made).items():
        if plan == "removals":
            continue
        w = weights.double()
        gradient = model.gradient(w)
        whole = model.gradient(torch.ones(1, model.n).double())
        steps = {"first order": -model.solve(gradient - whole), "Newton": model.newton(w, gradient)}
        report[plan] = {}
        for measure in made.measures:

            def at(theta: Tensor, measure: str = measure) -> Tensor:
                return model.measurements(measure, theta)

            jacobian, start = torch.func.jacrev(at)(model.theta), at(model.theta)
            truth = known[f"{plan}/{measure}/first"]
            rows = {}
            for name, step in steps.items():
                linear = torch.einsum("qci,sci->sq", jacobian, step)
                itself = torch.stack([at(model.theta + one) - start for one in step])
                for word, predicted in (("linear", linear), ("itself", itself)):
                    away = (predicted - truth).norm() / truth.norm()
                    rows[f"{name}, m {word}"] = judged(predicted, truth, None) | {
                        "relative_error": float(away)
                    }
            report[plan][measure] = rows
            for name, row in rows.items():
                value, low, high = row["lds"]
                print(f"{plan} {measure:7} {name:24} LDS {value:.4f} [{low:.4f}, {high:.4f}]  "
                      f"error {row['relative_error']:.3f}", flush=True)  # fmt: skip
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DATA, metavar="DIR")
    add("--cache", type=Path, default=HERE / ".cache", metavar="DIR")
    add("--out", type=Path, default=HERE / "results" / "fidelity.json", metavar="FILE")
    given = parser.parse_args()
    made = Problem.load(problem(NAME, given.data, given.cache))
    report = json.loads(given.out.read_text()) if given.out.exists() else {"tasks": {}}
    entry = report["tasks"].setdefault(NAME, {"methods": {}})
    entry["second_order"] = found(made, truth(made, given.cache)[0])
    given.out.write_text(written(report))


if __name__ == "__main__":
    main()
