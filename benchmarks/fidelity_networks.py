"""The models of `fidelity.py`, in PyTorch alone: peers in another environment read this file.

    classes   cross entropy of one label; measured: the loss, and the margin log p/(1 − p)
    number    ½ (f − y)²; measured: the loss, and the output f
    text      cross entropy summed over the bytes of a passage; measured: the loss

A `Problem` is a trained model with its data. It travels as a `.safetensors` file with a header in
JSON.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from ekfac_networks import GPT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WINDOW = 64
"""Bytes of a passage."""

MEASURES: Mapping[str, tuple[str, ...]] = {
    "classes": ("loss", "margin"),
    "number": ("loss", "output"),
    "text": ("loss",),
}


def layers(inputs: int, outputs: int) -> nn.Module:
    """Two hidden layers with ReLU."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs)
    )


def convolutions() -> nn.Module:
    """Of images of 8 × 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def regression() -> nn.Module:
    """Ten features, one number."""
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))


def language_model() -> nn.Module:
    """The byte-level transformer of `ekfac.py`, with two layers of width 32, for `WINDOW` bytes."""
    model = GPT(width=32, heads=2, layers=2)
    model.positions = nn.Parameter(torch.zeros(WINDOW, 32))
    return model


@dataclass(frozen=True)
class Network:
    """How to make a model, and what it predicts."""

    make: Callable[[], nn.Module]
    kind: str


NETWORKS: Mapping[str, Network] = {
    "digits-softmax": Network(lambda: nn.Linear(784, 10).double(), "classes"),
    "digits-mlp": Network(lambda: layers(784, 10), "classes"),
    "digits-cnn": Network(convolutions, "classes"),
    "diabetes-mlp": Network(regression, "number"),
    "spam-mlp": Network(lambda: layers(1000, 2), "classes"),
    "brown-gpt": Network(language_model, "text"),
}


def losses(kind: str, outputs: Tensor, y: Tensor) -> Tensor:
    """ℓ of each example."""
    if kind == "number":
        return 0.5 * (outputs - y).square().flatten(1).sum(dim=1)
    flat = F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
    return flat.view(y.shape).flatten(1).sum(dim=1) if y.ndim > 1 else flat


def measured(kind: str, name: str, outputs: Tensor, y: Tensor) -> Tensor:
    """A measurement of each query."""
    if name == "loss":
        return losses(kind, outputs, y)
    if name == "output":
        return outputs.flatten(1)[:, 0]
    right = outputs.gather(-1, y[:, None])[:, 0]
    others = outputs.scatter(-1, y[:, None], -torch.inf).logsumexp(dim=-1)
    return right - others


@dataclass(frozen=True)
class Problem:
    """A trained model and its data. `facts` says the rest."""

    name: str
    kind: str
    model: nn.Module
    """As trained, in eval mode."""
    checkpoints: tuple[dict[str, Tensor], ...]
    """Parameters on the way; the last are those of the model."""
    X: Tensor
    y: Tensor
    Xq: Tensor
    yq: Tensor
    facts: dict[str, Any]

    @property
    def penalty(self) -> float:
        """λ of λ/2 ‖θ‖²."""
        return float(self.facts["penalty"])

    @property
    def damping(self) -> float:
        """What is added to the curvature of the mean loss, the penalty's included."""
        return float(self.facts["damping"])

    @property
    def measures(self) -> tuple[str, ...]:
        return MEASURES[self.kind]

    @property
    def linear(self) -> dict[str, nn.Module]:
        """The layers that are a matrix product or a convolution."""
        named = self.model.named_modules()
        return {k: m for k, m in named if isinstance(m, nn.Linear | nn.Conv2d)}

    def contained(self) -> Self:
        """The same with a model that is no bare layer: some peers want layers with a name."""
        if "" not in self.linear:
            return self
        states = [{f"0.{k}": v for k, v in state.items()} for state in self.checkpoints]
        return replace(self, model=nn.Sequential(self.model).eval(), checkpoints=tuple(states))

    def single(self) -> Self:
        """The same in float32, which is what some peers make their factors in."""
        tensors = {k: getattr(self, k) for k in ("X", "y", "Xq", "yq")}
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        states = tuple({k: v.float() for k, v in state.items()} for state in self.checkpoints)
        return replace(self, model=self.model.float(), checkpoints=states, **tensors)

    @classmethod
    def load(cls, file: Path) -> Self:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
        network = NETWORKS[facts["name"]]
        states = [dict[str, Tensor]() for _ in facts["rates"]]
        for key, value in tensors.items():
            if key.startswith("checkpoint/"):
                _, k, name = key.split("/")
                states[int(k)][name] = value
        model = network.make()
        model.load_state_dict(states[-1])
        data = (tensors[key] for key in ("X", "y", "Xq", "yq"))
        return cls(facts["name"], network.kind, model.eval(), tuple(states), *data, facts)

    def save(self, file: Path) -> None:
        tensors = {"X": self.X, "y": self.y, "Xq": self.Xq, "yq": self.yq}
        for k, state in enumerate(self.checkpoints):
            tensors |= {f"checkpoint/{k}/{name}": value for name, value in state.items()}
        kept = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        unfinished = file.with_suffix(".unfinished")
        save_file(kept, unfinished, {"facts": json.dumps(self.facts)})
        unfinished.replace(file)


def plain_epoch(problem: Problem) -> None:
    """One plain forward and backward epoch over the training data at batch 512."""
    for start in range(0, len(problem.X), 512):
        rows = slice(start, start + 512)
        mean = losses(problem.kind, problem.model(problem.X[rows]), problem.y[rows]).mean()
        torch.autograd.grad(mean, list(problem.model.parameters()))
