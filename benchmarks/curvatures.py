"""How far is each curvature from the Hessian, and what does it cost? See docs/curvatures.

A network small enough for its exact Hessian, 49-16-10 with tanh (970 parameters), trained in
float64 on the bundled digits averaged to 7 × 7 pixels, with the penalty (λ/2)‖θ‖², by L-BFGS until
it stands. Influence of all 5 000 training images on the 100 test images of largest loss, by each
curvature and with no damping but the penalty, beside that of the Hessian and of the GGN:

    pearson     correlation over the training images: mean over the queries, and lowest query
    slope       ⟨S, T⟩/⟨T, T⟩ over all scores: 1 where the size is right
    plain_epochs  seconds for fit and scores, in plain forward and backward epochs at batch 512

The same network is then stopped early, where the Hessian need not be positive definite. Writes
results/curvatures.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from environment import environment  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import upweight as uw  # noqa: E402

PENALTY = 1e-3
QUERIES = 100
EARLY = 15
"""L-BFGS iterations of the network that is stopped early."""

BLOCKS = (("0.*", uw.EKFAC()), ("*", uw.Diagonal()))
CURVATURES = {
    "Hessian()": uw.Hessian(),
    "GGN()": uw.GGN(),
    "Fisher(samples=1)": uw.Fisher(samples=1),
    "Fisher(samples=10)": uw.Fisher(samples=10),
    "EmpiricalFisher()": uw.EmpiricalFisher(),
    "EKFAC(labels=Expected())": uw.EKFAC(labels=uw.labels.Expected()),
    "EKFAC()": uw.EKFAC(),
    "EKFAC(labels=Observed())": uw.EKFAC(labels=uw.labels.Observed()),
    "EKFAC(examples=500)": uw.EKFAC(examples=500),
    "KFAC(labels=Expected())": uw.KFAC(labels=uw.labels.Expected()),
    "KFAC()": uw.KFAC(),
    "Diagonal(labels=Expected())": uw.Diagonal(labels=uw.labels.Expected()),
    "Diagonal()": uw.Diagonal(),
    "Blockwise(EKFAC, Diagonal)": uw.Blockwise(BLOCKS),
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of 49 averaged pixels in [0, 1], and classes."""
    found = uw.data.mnist_subset()

    def rows(images: Any) -> Tensor:
        pixels = torch.from_numpy(images).double()[:, None] / 255
        return F.avg_pool2d(pixels, 4).flatten(1)

    return (
        rows(found.X),
        torch.from_numpy(found.y),
        rows(found.X_test),
        torch.from_numpy(found.y_test),
    )


def trained(X: Tensor, y: Tensor, steps: int) -> nn.Module:
    """L-BFGS on the mean loss and the penalty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(49, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        max_eval=2 * steps,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = torch.stack([(p**2).sum() for p in model.parameters()]).sum()
        loss = F.cross_entropy(model(X), y) + PENALTY / 2 * squares
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.eval()


def plain_epoch(model: nn.Module, X: Tensor, y: Tensor) -> float:
    """Seconds of one plain forward and backward epoch at batch 512, the fastest of nine."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        for a, b in zip(X.split(512), y.split(512), strict=True):
            model.zero_grad()
            F.cross_entropy(model(a), b).backward()
        times.append(time.perf_counter() - started)
    return min(times)


def against(S: Tensor, T: Tensor) -> dict[str, float]:
    """Agreement of scores with others."""
    rows = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(S, T, strict=True)]
    return {
        "pearson_mean": sum(rows) / len(rows),
        "pearson_lowest": min(rows),
        "slope": float((S * T).sum() / (T * T).sum()),
    }


def extremes(task: uw.Task, data: tuple[Tensor, Tensor], curvature: Any) -> dict[str, float]:
    """The smallest and the largest eigenvalue, by decomposition."""
    values = torch.linalg.eigvalsh(curvature.fit(task, uw.as_data(data), task.theta()).dense())
    return {"smallest": float(values[0]), "largest": float(values[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs", type=int, default=3, help="timed runs, of which the fastest counts"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/curvatures.json")
    options = parser.parse_args()
    where = environment()
    X, y, X_test, y_test = digits()
    model = trained(X, y, 5000)
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(PENALTY))
    hardest = task.losses(task.theta(), (X_test, y_test)).argsort(descending=True)[:QUERIES]
    queries = (X_test[hardest], y_test[hardest])
    unit = plain_epoch(model, X, y)
    scores, rows = {}, {}
    for name, curvature in CURVATURES.items():
        seconds = []
        for _ in range(options.runs):
            started = time.perf_counter()
            fitted = uw.Influence(curvature=curvature).fit(task, (X, y))
            scores[name] = fitted.attribute(queries).values.double()
            seconds.append(time.perf_counter() - started)
        rows[name] = {
            "hessian": against(scores[name], scores["Hessian()"]),
            "ggn": against(scores[name], scores["GGN()"]) if "GGN()" in scores else None,
            "seconds": min(seconds),
            "plain_epochs": min(seconds) / unit,
        }
        found, cost = rows[name]["hessian"], rows[name]["plain_epochs"]
        print(
            f"{name:<28} against the Hessian: Pearson {found['pearson_mean']:.3f} "
            f"(lowest {found['pearson_lowest']:.3f}), slope {found['slope']:.2f}; "
            f"{cost:,.0f} epochs",
            flush=True,
        )
    early = uw.Task(trained(X, y, EARLY), uw.CrossEntropy(), uw.L2(PENALTY))
    result = {
        "what": __doc__.split("\n")[0],
        "environment": where,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "accuracy": float((model(X_test).argmax(dim=1) == y_test).double().mean()),
        "gradient_norm": uw.Influence().fit(task, (X, y)).stationarity["gradient_norm"],
        "epoch_seconds": unit,
        "curvatures": rows,
        "eigenvalues": {
            place: {
                "Hessian()": extremes(at, (X, y), uw.Hessian()),
                "GGN()": extremes(at, (X, y), uw.GGN()),
                "EmpiricalFisher()": extremes(at, (X, y), uw.EmpiricalFisher()),
            }
            for place, at in (("at the minimum", task), (f"after {EARLY} steps", early))
        },
    }
    print(json.dumps(result["eigenvalues"]))
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
