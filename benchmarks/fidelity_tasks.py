"""The tasks of `fidelity.py`: data, learning algorithm, and the model that is attributed.

The model of a network is trained by a plain loop over the same batches as `uw.Training` takes, and
kept at five times on the way for TracIn. A second model is trained on the data with a tenth of the
labels wrong, for the detection of mislabeled examples.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity_networks import NETWORKS, WINDOW, Problem, losses
from torch import Tensor

import upweight as uw

CHECKPOINTS = 5
FLIPPED = 0.1
"""Share of labels that are wrong in the second copy of a task."""
RELATIVE = 0.1
"""Damping in mean eigenvalues of the curvature, which is kronfluence's default too."""


@dataclass(frozen=True)
class Arrays:
    """Training and query examples, and the class, genre or size by which groups are removed."""

    X: Tensor
    y: Tensor
    Xq: Tensor
    yq: Tensor
    labels: Tensor


def digits(folder: Path) -> Arrays:
    """5 000 training and 100 test images of MNIST, pixels / 255."""
    read = np.load(folder / "mnist.npz")
    X, Xq = (
        torch.tensor(read[k][:n]).flatten(1).float() / 255 for k, n in (("X", 5000), ("Xt", 100))
    )
    y, yq = (torch.tensor(read[k][:n]).long() for k, n in (("y", 5000), ("yt", 100)))
    return Arrays(X, y, Xq, yq, y)


def digits_in_float64(folder: Path) -> Arrays:
    """The same in float64, where leave-one-out does not drown in rounding."""
    read = digits(folder)
    return Arrays(read.X.double(), read.y, read.Xq.double(), read.yq, read.labels)


def small_digits(_: Path) -> Arrays:
    """1 500 training and 100 other images of 8 × 8 pixels, which come with scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = shuffled(len(found.target))
    X = torch.tensor(found.images / 16, dtype=torch.float32)[order, None]
    y = torch.tensor(found.target)[order].long()
    return Arrays(X[:1500], y[:1500], X[1500:1600], y[1500:1600], y[:1500])


def diabetes(_: Path) -> Arrays:
    """342 training and 100 other patients, which come with scikit-learn; target standardized."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    order = shuffled(len(found.target))
    X, y = torch.tensor(found.data)[order], torch.tensor(found.target)[order]
    X, y = (X - X[:342].mean(0)) / X[:342].std(0), (y - y[:342].mean()) / y[:342].std()
    X, y = X.float(), y.float()[:, None]
    fifths = torch.bucketize(y[:342, 0], y[:342, 0].quantile(torch.tensor([0.2, 0.4, 0.6, 0.8])))
    return Arrays(X[:342], y[:342], X[342:], y[342:], fifths)


def mails(folder: Path) -> Arrays:
    """3 000 mails and 100 others, as log(1 + count) of the 1 000 most frequent words."""
    with gzip.open(folder / "spamassassin.jsonl.gz", "rt", encoding="utf-8") as lines:
        read = [json.loads(line) for line in lines]
    chosen = [read[k] for k in shuffled(len(read))[:3100].tolist()]
    counts = [Counter(re.findall(r"[a-z]{2,}", mail["text"].lower())) for mail in chosen]
    frequent = Counter(word for count in counts[:3000] for word in count)
    words = [word for word, _ in frequent.most_common(1000)]
    X = torch.tensor([[count[word] for word in words] for count in counts]).float().log1p()
    y = torch.tensor([int(mail["spam"]) for mail in chosen])
    return Arrays(X[:3000], y[:3000], X[3000:], y[3000:], y[:3000])


def passages(folder: Path) -> Arrays:
    """The first 65 bytes of Brown's 500 documents; queries: the next 65 of 50 of them."""
    with gzip.open(folder / "brown.jsonl.gz", "rt", encoding="utf-8") as lines:
        read = [json.loads(line) for line in lines]
    width = WINDOW + 1
    texts = [torch.tensor(list(document["text"].encode()[: 2 * width])) for document in read]
    first, second = (torch.stack([t[k : k + width] for t in texts]) for k in (0, width))
    asked = second[shuffled(len(read))[:50]]
    genres = sorted({document["genre"] for document in read})
    labels = torch.tensor([genres.index(document["genre"]) for document in read])
    return Arrays(first[:, :-1], first[:, 1:], asked[:, :-1], asked[:, 1:], labels)


def shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Spec:
    """A task, and how much truth there is of it."""

    read: Callable[[Path], Arrays]
    recipe: Any
    loss: uw.task.losses.Loss
    penalty: float
    fractions: Sequence[float]
    """Shares of the data that subset models keep; the first is the one of the table."""
    subsets: int
    seeds: int
    """How often each model is trained for the truth, and again for the ceiling; 1: no noise."""
    groups: int
    size: int
    """Examples that are removed together, of one class, genre or fifth of the target."""


def sgd(name: str, epochs: int, batch: int, lr: float = 0.05) -> uw.Training:
    optimizer = uw.SGD(lr, momentum=0.9)
    return uw.Training(NETWORKS[name].make, optimizer, epochs, batch, uw.training.Cosine())


SPECS: Mapping[str, Spec] = {
    "digits-softmax": Spec(
        digits_in_float64,
        uw.training.Newton(tol=1e-8),
        uw.CrossEntropy(),
        penalty=0.01,
        fractions=(0.5, 0.75, 0.9),
        subsets=100,
        seeds=1,
        groups=50,
        size=1,
    ),
    "digits-mlp": Spec(
        digits, sgd("digits-mlp", 10, 32), uw.CrossEntropy(), 0.0, (0.5,), 100, 5, 40, 250
    ),
    "digits-cnn": Spec(
        small_digits, sgd("digits-cnn", 15, 32), uw.CrossEntropy(), 0.0, (0.5,), 100, 5, 40, 75
    ),
    "diabetes-mlp": Spec(
        diabetes, sgd("diabetes-mlp", 60, 32, 0.02), uw.SquaredError(), 1e-2, (0.5,), 100, 5, 50, 10
    ),
    "spam-mlp": Spec(
        mails, sgd("spam-mlp", 10, 32), uw.CrossEntropy(), 0.0, (0.5,), 100, 5, 40, 300
    ),
    "brown-gpt": Spec(
        passages,
        uw.Training(NETWORKS["brown-gpt"].make, uw.Adam(3e-3), 10, 20, uw.training.Cosine()),
        uw.CrossEntropy(), 0.0, (0.5,), 100, 2, 40, 10,
    ),
}  # fmt: skip


def task_of(problem: Problem) -> uw.Task:
    """What upweight is given."""
    spec = SPECS[problem.name]
    penalty = uw.L2(spec.penalty) if spec.penalty else uw.NoPenalty()
    return uw.Task(problem.model, spec.loss, penalty)


def trained(name: str, X: Tensor, y: Tensor) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Parameters on the way and at the end, and the learning rate at each."""
    spec, network = SPECS[name], NETWORKS[name]
    recipe = spec.recipe
    if isinstance(recipe, uw.training.Newton):
        task = uw.Task(network.make(), spec.loss, uw.L2(spec.penalty))
        center = recipe.prepare(task, uw.as_data((X, y))).center
        return [dict(task.layout.unflatten(center))], [1.0]
    torch.manual_seed(recipe.seed)
    model = recipe.init()
    rule = recipe.optimizer  # of the same name and with the same arguments as PyTorch's own
    optimizer = getattr(torch.optim, type(rule).__name__)(model.parameters(), **vars(rule))
    steps = recipe.epochs * -(-len(X) // recipe.batch)
    every, step = recipe.epochs // CHECKPOINTS, 0
    states, rates = [], []
    for epoch in range(recipe.epochs):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        for rows in torch.randperm(len(X), generator=generator).split(recipe.batch):
            mean = losses(network.kind, model(X[rows]), y[rows]).mean()
            square = sum(p.square().sum() for p in model.parameters())
            optimizer.param_groups[0]["lr"] = rule.lr * recipe.schedule(step, steps)
            optimizer.zero_grad()
            (mean + 0.5 * spec.penalty * square).backward()
            optimizer.step()
            step += 1
        if (epoch + 1) % every == 0:
            states.append({k: v.detach().clone() for k, v in model.state_dict().items()})
            # In the middle of what it stands for: at its end a cosine's rate is zero.
            middle = round((epoch + 1 - every / 2) / recipe.epochs * steps)
            rates.append(rule.lr * recipe.schedule(middle, steps))
    return states, rates


def wrong_labels(name: str, arrays: Arrays) -> tuple[Tensor, list[int]]:
    """Labels of which a tenth are wrong, and which: another class, or another patient's number."""
    n, generator = len(arrays.y), torch.Generator().manual_seed(1)
    wrong = torch.randperm(n, generator=generator)[: round(FLIPPED * n)].sort().values
    y = arrays.y.clone()
    if NETWORKS[name].kind == "number":
        y[wrong] = y[wrong.roll(1)]
    else:
        classes = int(y.max()) + 1
        shift = torch.randint(1, classes, (len(wrong),), generator=generator)
        y[wrong] = (y[wrong] + shift) % classes
    return y, wrong.tolist()


def damping(problem: Problem) -> float:
    """The penalty's λ and, for a network, a tenth of the mean eigenvalue of its Fisher matrix."""
    spec = SPECS[problem.name]
    if isinstance(spec.recipe, uw.training.Newton):
        return spec.penalty
    task = uw.Task(problem.model, spec.loss)
    fisher = uw.Diagonal().fit(task, uw.as_data((problem.X, problem.y)), task.theta())
    return spec.penalty + RELATIVE * float(fisher.trace()) / task.layout.size


def problem(name: str, data: Path, cache: Path, *, flipped: bool = False) -> Path:
    """The file of a trained task, made if it is not there."""
    file = cache / f"fidelity-{name}{'-flipped' if flipped else ''}.safetensors"
    if file.exists():
        return file
    arrays = SPECS[name].read(data)
    y, wrong = wrong_labels(name, arrays) if flipped else (arrays.y, list[int]())
    states, rates = trained(name, arrays.X, y)
    network = NETWORKS[name]
    model = network.make()
    model.load_state_dict(states[-1])
    facts = {
        "name": name,
        "penalty": SPECS[name].penalty,
        "rates": rates,
        "wrong": wrong,
        "labels": arrays.labels.tolist(),
    }
    tensors = (arrays.X, y, arrays.Xq, arrays.yq)
    made = Problem(name, network.kind, model.eval(), tuple(states), *tensors, facts)
    facts["damping"] = damping(made)
    cache.mkdir(parents=True, exist_ok=True)
    made.save(file)
    return file
