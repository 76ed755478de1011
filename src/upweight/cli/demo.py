"""`upweight demo`: from a trained classifier to an answer that retraining confirms."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from upweight.curvature.hessian import Hessian
from upweight.curvature.newton import Newton
from upweight.data import mnist_subset
from upweight.evaluation import LOO, compare, leave_one_out
from upweight.linalg.cholesky import Cholesky
from upweight.methods.influence import Influence
from upweight.report import Display, html, summary
from upweight.scores import Scores
from upweight.task.losses import CrossEntropy
from upweight.task.measures import Loss
from upweight.task.penalties import L2
from upweight.task.task import Task

PENALTY = 0.01
QUERIES = 100
REMOVALS = 60


@dataclass(frozen=True)
class Split:
    """Images in [0, 1], flattened or not, and their digits."""

    X: Tensor
    y: Tensor

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """As `fit` and `attribute` take it."""
        return self.X, self.y


def run(out: Path) -> None:
    """Softmax regression: train, attribute, remove, retrain, report; writes into `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train, test = digits()

    with step(1, f"Train softmax regression on {len(train.y):,} digits") as done:
        model = trained(train)
        accuracy = float((model(test.X).argmax(dim=1) == test.y).double().mean())
        done(f"test accuracy {accuracy:.1%}")

    with step(2, f"Attribute the {QUERIES} test images it gets most wrong") as done:
        task = Task(model, CrossEntropy(), L2(PENALTY))
        hardest = task.losses(task.theta(), test.data).argsort(descending=True)[:QUERIES]
        queries = Split(test.X[hardest], test.y[hardest])
        fitted = Influence(Hessian(), Cholesky()).fit(task, train.data)
        scores = fitted.attribute(queries.data, measure=Loss())
        residual = scores.provenance.health["largest_residual"]
        done(f"{scores.values.numel():,} scores, residual {residual:.0e}")

    with step(3, "Correct each predicted removal for its leverage") as done:
        removal = fitted.removal(queries.data, measure=Loss())
        done(f"{removal.values.numel():,} predictions")

    with step(4, f"Remove {REMOVALS} training images, one at a time, and retrain") as done:
        comparisons, norm = compared(scores, removal)
        done(f"each retrained to a gradient of {norm:.0e}")

    with step(5, "Write the report") as done:
        scores.save(out / "scores")
        display = Display(
            title="Softmax regression on 5 000 handwritten digits",
            names=[str(digit) for digit in range(10)],
            train_images=train.X.reshape(-1, 28, 28),
            query_images=queries.X.reshape(-1, 28, 28),
            train_labels=train.y.tolist(),
        )
        command = f"upweight demo --out {out}"
        report = html(
            scores, out / "report.html", display, evidence=comparisons, removal=removal,
            command=command,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        facts = {
            "loo": {key(loo.label): loo.summary() for loo in comparisons},
            "seconds": seconds,
            "test_accuracy": accuracy,
            "query": {"test_index": int(hardest[0]), "label": int(queries.y[0])},
            "provenance": asdict(scores.provenance),
        }
        (out / "summary.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        done(f"{report.stat().st_size / 1e6:.1f} MB")

    click.echo()
    click.echo(summary(scores, query=0, display=display, evidence=comparisons))
    click.echo(f"\n{seconds:.0f} s in all. Open {report} in a browser.")


@contextmanager
def step(number: int, title: str, of: int = 5) -> Iterator[Callable[[str], None]]:
    """Announce a step on standard error, and how long it took once it said that it is done."""
    started = time.perf_counter()
    click.echo(f"[{number}/{of}] {title} …", err=True)
    yield lambda said: click.echo(f"      {said}, {time.perf_counter() - started:.1f} s", err=True)


def compared(scores: Scores, removal: Scores) -> tuple[list[LOO], float]:
    """Both predictions for query 0 beside one round of retraining, and its largest ‖∇J‖."""
    context = scores.require_context()
    chosen = scores.values[0].abs().argsort(descending=True)[:REMOVALS].tolist()
    queries = context.queries.subset([0])
    retrained = leave_one_out(
        Newton(), context.task, context.train, chosen, queries, context.measure
    )
    comparisons = [
        compare(scores, retrained, chosen, query=0),
        compare(removal, retrained, chosen, query=0, label="leverage-corrected"),
    ]
    return comparisons, float(retrained.gradient_norms.max())


def key(label: str) -> str:
    """A label as a key of summary.json."""
    return label.replace(" ", "_").replace("-", "_")


def digits() -> tuple[Split, Split]:
    """The bundled digits as float64 rows of 784 pixels."""
    subset = mnist_subset()
    train = Split(_rows(subset.X), torch.from_numpy(subset.y))
    return train, Split(_rows(subset.X_test), torch.from_numpy(subset.y_test))


def images() -> tuple[Split, Split]:
    """The bundled digits as float32 images [n, 1, 28, 28], which networks are trained on."""
    return tuple(Split(s.X.float().reshape(-1, 1, 28, 28), s.y) for s in digits())  # type: ignore[return-value]


def _rows(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).reshape(-1, 784).double() / 255


def trained(train: Split) -> nn.Module:
    """Softmax regression, as anyone would train it: L-BFGS on the mean loss plus weight decay."""
    model = nn.Linear(784, 10).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=1000,
        tolerance_grad=1e-9,
        tolerance_change=0.0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = torch.stack([(p**2).sum() for p in model.parameters()]).sum()
        loss = nn.functional.cross_entropy(model(train.X), train.y) + PENALTY / 2 * squares
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call,arg-type]
    return model.eval()
