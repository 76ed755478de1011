"""How near does each solver come to the direct solve, for how many products? And what is a product?

    python benchmarks/solvers.py                       # a table, printed
    python benchmarks/solvers.py --write               # results/solvers.json and the chart
    python benchmarks/solvers.py --only products       # with curvlinops, if it is installed

Softmax regression of scikit-learn's digits at its minimum, λ = 0.01: 1 500 examples, 650
parameters, 20 queries. Products are counted in vectors times all examples, of the set-up as well.
Hessian and GGN products are timed on an MLP (784-128-64-10, 5 000 examples) and a small CNN, on one
core, beside curvlinops and double backward by hand; their inputs are noise, which costs the same.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from environment import environment  # noqa: E402

import upweight as uw  # noqa: E402
from upweight.linalg import CG, MINRES, BlockCG, Cholesky, Lanczos, LiSSA, Neumann, Nystrom  # noqa: E402
from upweight.linalg.blockdiag import BlockDiagonal  # noqa: E402
from upweight.linalg.damping import damped  # noqa: E402
from upweight.linalg.matrices import Dense  # noqa: E402
from upweight.linalg.operator import LinearOperator  # noqa: E402
from upweight.task.data import as_data  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "solvers.json"
CHART = ROOT / "docs" / "images" / "solvers.png"
QUERIES, PENALTY = 20, 1e-2


def digits() -> tuple[Any, Any, Any]:
    """The task at its minimum, its training data and its queries."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X / 16.0), torch.tensor(y)
    model = nn.Linear(64, 10).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * PENALTY * sum(x.square().sum() for x in model.parameters())
        value = nn.functional.cross_entropy(model(X[:1500]), y[:1500]) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(PENALTY))
    return task, (X[:1500], y[:1500]), (X[1500 : 1500 + QUERIES], y[1500 : 1500 + QUERIES])


class Counted(Dense):
    """A written-out operator that counts the vectors it was given."""

    seen: list[int]

    def mv(self, v: Tensor) -> Tensor:
        self.seen.append(v.shape[:-1].numel())
        return super().mv(v)


SERIES: dict[str, list[Any]] = {
    "CG": [CG(rtol=r) for r in (0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)],
    "BlockCG": [BlockCG(rtol=r) for r in (0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)],
    "MINRES": [MINRES(rtol=r) for r in (0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)],
    "CG, EK-FAC": [("ekfac", CG(rtol=r)) for r in (0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)],
    "CG, Nystrom(100)": [
        CG(rtol=r, preconditioner=Nystrom(100)) for r in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
    ],
    "Neumann": [Neumann(steps) for steps in (3, 10, 30, 100, 300)],
    "Neumann, EK-FAC": [("ekfac", Neumann(steps)) for steps in (3, 10, 30, 100)],
    "Neumann, Nystrom(100)": [Neumann(steps, Nystrom(100)) for steps in (2, 4, 8, 16, 32)],
    "Nystrom": [Nystrom(rank) for rank in (25, 50, 100, 200, 400, 650)],
    "Lanczos": [Lanczos(rank) for rank in (12, 25, 50, 100, 200, 325)],
    "LiSSA": [LiSSA(batch=b, depth=d) for b, d in ((16, 100), (16, 400), (64, 400), (256, 400))],
}


def errors() -> list[dict[str, Any]]:
    """Error of the scores against the direct solve, residual and products, of every solver."""
    task, train, queries = digits()
    theta, data = task.theta(), as_data(train)
    exact = uw.GGN().fit(task, data, theta)
    right = torch.func.vmap(
        lambda x, t: torch.func.grad(lambda v: task.losses(v, (x[None], t[None])).sum())(theta)
    )
    b, g = right(*queries), right(*train)
    matrix = exact.dense()
    truth = Cholesky().solve(Cholesky().init(exact), b).throw().value @ g.mT
    ekfac = preconditioner(task, data, theta)
    rows = []
    for name, solvers in SERIES.items():
        for each in solvers:
            solver = each
            if isinstance(each, tuple):
                kind = type(each[1])
                options = {k: getattr(each[1], k) for k in kind.__dataclass_fields__}
                solver = kind(**{**options, "preconditioner": ekfac})
                each = each[1]
            A: LinearOperator = exact
            if not isinstance(solver, LiSSA):
                A = Counted(matrix - PENALTY * torch.eye(len(theta)).double(), exact.tags)
                object.__setattr__(A, "seen", [])
                # The penalty as the multiple of the identity that it is
                A, counted = damped(A, PENALTY), A
            solution = solver.solve(solver.init(A), b)
            stats = solution.stats
            if isinstance(solver, LiSSA):
                products = stats.extra["products"] * QUERIES + 10 + 50 * solver.batch / 1500
            else:
                # One look at every right-hand side is the residual that is reported.
                products = sum(counted.seen)
            found = solution.value @ g.mT
            rows.append(
                {
                    "family": name,
                    "solver": repr(each),
                    "result": solution.result.name,
                    "products": products / QUERIES,
                    "error": float((found - truth).norm() / truth.norm()),
                    "residual": float(stats.residuals.max()),
                    "standard_error": stats.extra.get("standard_error"),
                }
            )
    return rows


def preconditioner(task: Any, data: Any, theta: Tensor) -> Any:
    """EK-FAC, inverted with the penalty in it, as a method makes it."""
    fitted = uw.EKFAC().fit_blocks(task, data, theta)
    made = tuple(block.eigen.inverse(0.0) for block in fitted.blocks)
    return BlockDiagonal(made, tuple(block.block.index(task.layout) for block in fitted.blocks))


def networks() -> dict[str, tuple[nn.Module, int]]:
    """The networks whose products are timed, and how many examples."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    cnn = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(784, 10),
    )  # fmt: skip
    return {"MLP": (mlp, 5000), "CNN": (cnn, 500)}


def by_hand(model: nn.Module, X: Tensor, y: Tensor, kind: str) -> Callable[[Tensor], Tensor]:
    """H v or G v by double backward, 1 000 examples at a time, a vector at a time."""
    params = list(model.parameters())

    def product(v: Tensor) -> Tensor:
        cut = v.split([q.numel() for q in params])
        parts = [x.view_as(q) for x, q in zip(cut, params, strict=True)]
        total = torch.zeros_like(v)
        for some, labels in zip(X.split(1000), y.split(1000), strict=True):
            f = model(some)
            if kind == "Hessian":
                loss = nn.functional.cross_entropy(f, labels, reduction="sum")
                gradient = torch.autograd.grad(loss, params, create_graph=True)
                found = torch.autograd.grad(gradient, params, parts)
            else:
                u = torch.zeros_like(f, requires_grad=True)
                pulled = torch.autograd.grad(f, params, u, create_graph=True)
                (jv,) = torch.autograd.grad(pulled, u, parts, retain_graph=True)
                q = f.detach().softmax(1)
                weighted = q * jv - q * (q * jv).sum(1, keepdim=True)
                found = torch.autograd.grad(f, params, weighted)
            total += torch.cat([x.flatten() for x in found])
        return total / len(X)

    return product


def products(rounds: int = 3) -> list[dict[str, Any]]:
    """CPU seconds of a product with one vector, and per vector of eight: least of some rounds."""
    torch.set_num_threads(1)
    rows = []
    for name, (model, n) in networks().items():
        X, y = torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))
        task = uw.Task(model, uw.CrossEntropy())
        theta = task.theta()
        V = torch.randn(8, len(theta))
        for kind, spec in (("Hessian", uw.Hessian()), ("GGN", uw.GGN())):
            operator = spec.fit(task, as_data((X, y)), theta)
            hand = by_hand(model, X, y, kind)
            ways: dict[str, Callable[[Tensor], Any]] = {
                "upweight": operator.mv,
                "by hand": lambda v, hand=hand: [hand(x) for x in v.reshape(-1, v.shape[-1])],
            }
            gap = (operator.mv(V[0]) - hand(V[0])).norm() / hand(V[0]).norm()
            assert float(gap) < 1e-4, f"{kind} products of {name} differ by {float(gap):.1e}"
            theirs = curvlinops(kind, model, X, y)
            if theirs is not None:
                ways["curvlinops"] = lambda v, theirs=theirs: (
                    theirs @ (v if v.ndim == 1 else v.T.contiguous())
                )
            for vectors, v in ((1, V[0]), (8, V)):
                best = dict.fromkeys(ways, float("inf"))
                for _ in range(rounds if vectors == 1 else 1):
                    for way, function in ways.items():
                        started = time.process_time()
                        function(v)
                        best[way] = min(best[way], time.process_time() - started)
                seconds = {way: spent / vectors for way, spent in best.items()}
                rows.append({"model": name, "curvature": kind, "vectors": vectors, **seconds})
    return rows


def curvlinops(kind: str, model: nn.Module, X: Tensor, y: Tensor) -> Any:
    """Its operator, or None where it is not installed."""
    try:
        import curvlinops as peer
    except ImportError:
        return None
    make = peer.HessianLinearOperator if kind == "Hessian" else peer.GGNLinearOperator
    batches = list(zip(X.split(1000), y.split(1000), strict=True))
    loss = nn.CrossEntropyLoss()
    return make(model, loss, list(model.parameters()), batches, check_deterministic=False)


def chart(rows: list[dict[str, Any]]) -> Any:
    """Error of the scores against products for a query."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(SERIES):
        points = [row for row in rows if row["family"] == name]
        axes.loglog(
            [row["products"] for row in points],
            [max(row["error"], 1e-10) for row in points],
            "os^Dv"[k % 5] + ("-" if k < 5 else "--"),
            label=name,
            markersize=4,
        )
    axes.set(
        xlabel="products with the curvature for each of 20 queries, set-up included",
        ylabel="error of the scores against the direct solve, ‖Ŝ − S‖/‖S‖",
        title="Softmax regression of digits, p = 650, λ = 0.01",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["errors", "products"])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    result: dict[str, Any] = {"environment": environment()}
    if given.only != "products":
        result["errors"] = errors()
        for row in result["errors"]:
            print(
                f"{row['solver'][:58]:58} {row['result']:12} {row['products']:8.1f} products  "
                f"error {row['error']:.1e}  residual {row['residual']:.1e}"
            )
    if given.only != "errors":
        result["products"] = products()
        for row in result["products"]:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    if given.write:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, **result}, indent=1) + "\n")
        if "errors" in result:
            chart(result["errors"]).savefig(CHART, dpi=110)


if __name__ == "__main__":
    main()
