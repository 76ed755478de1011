"""The workloads of `ekfac.py`: what is attributed, how much of it and with what damping.

Networks and data come from the files that `ekfac_networks.py` makes.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from ekfac_networks import NETWORKS, as_inputs, token_losses
from safetensors import safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """One network, its sizes and how it is attributed."""

    name: str
    parameters: int
    n: int
    queries: int
    batch: int
    """Of a plain epoch, and of ours where a batch size is asked for."""
    damping: float
    """Absolute: added to the eigenvalues of the mean loss's curvature."""
    params: tuple[str, ...]
    """Globs of the parameters attributed."""
    trial: int
    """Training examples when a contender tries its settings; all queries."""
    seeds: tuple[int, int] | None
    """Training examples and queries when two seeds are compared."""
    data: str

    @property
    def made_as(self) -> str:
        """The name of the trained network, which workloads may share."""
        return self.name.partition("-")[0]

    def model(self) -> nn.Module:
        """The network, untrained."""
        return NETWORKS[self.made_as][0]()

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers attributed, by name."""
        inside = "blocks." if self.made_as == "gpt" else ""
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(inside)
        }


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            name="mlp",
            parameters=567_434,
            n=60_000,
            queries=1_000,
            batch=512,
            damping=1e-4,
            params=("*",),
            trial=2_000,
            seeds=(5_000, 200),
            data="MNIST, all training images and the first 1 000 test images, pixels / 255",
        ),
        Workload(
            name="cnn",
            parameters=105_866,
            n=10_000,
            queries=200,
            batch=512,
            damping=1e-4,
            params=("*",),
            trial=2_000,
            seeds=(10_000, 200),
            data="MNIST, the first 10 000 training and 200 test images, pixels / 255",
        ),
        Workload(
            name="gpt",
            parameters=875_264,
            n=2_000,
            queries=100,
            batch=32,
            # Between a tenth of the median layer's mean eigenvalue and a tenth of all layers'.
            damping=1e-2,
            params=("blocks.*.attn.*", "blocks.*.mlp.*"),
            trial=200,
            seeds=(2_000, 100),
            data="Brown corpus, sequences of 128 bytes; queries from documents held out",
        ),
    )
}
WORKLOADS["gpt-1000q"] = replace(WORKLOADS["gpt"], name="gpt-1000q", queries=1_000, seeds=None)


@dataclass(frozen=True)
class Problem:
    """A trained network and its data, in float32."""

    workload: Workload
    model: nn.Module
    X: Tensor
    y: Tensor
    Xq: Tensor
    yq: Tensor

    @classmethod
    def load(cls, file: Path, n: int, queries: int) -> Self:
        """The first n training examples and queries of a file of `ekfac_networks.py`."""
        with safe_open(file, "pt") as f:
            workload = WORKLOADS[f.metadata()["network"]]
            names = [name for name in f.keys() if name.startswith("model.")]
            state = {name.removeprefix("model."): f.get_tensor(name) for name in names}
            X, y = f.get_slice("X")[:n], f.get_slice("y")[:n]
            Xq, yq = f.get_slice("Xq")[:queries], f.get_slice("yq")[:queries]
        if (len(X), len(Xq)) != (n, queries):
            refusal = f"{file} holds {len(X)} and {len(Xq)}; asked for {n} and {queries}."
            raise ValueError(refusal)
        model = workload.model().eval()
        model.load_state_dict(state)
        inputs = as_inputs(workload.name)
        return cls(workload, model, inputs(X), y.long(), inputs(Xq), yq.long())


def plain_epoch(problem: Problem) -> Tensor:
    """One plain forward and backward pass of the mean loss over the training data."""
    parameters = list(problem.model.parameters())
    batch, last = problem.workload.batch, torch.zeros(())
    for start in range(0, len(problem.X), batch):
        rows = slice(start, start + batch)
        loss = token_losses(problem.model(problem.X[rows]), problem.y[rows]).mean()
        last = torch.autograd.grad(loss, parameters)[-1]
    return last


def training(file: Path) -> dict[str, Any]:
    """Mean loss (per byte) and accuracy of the network, on what is attributed and held out."""
    with safe_open(file, "pt") as f:
        facts: dict[str, Any] = json.loads(f.metadata()["training"])
    return facts
