"""Training loops of a user's own, by `torch.optim`, for what records them."""

import torch
from torch import nn

import upweight as uw


def data(n=14, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=draw).double(), torch.arange(n) % 3


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(n, size, epochs, seed=1):
    """The same order whoever asks."""
    draw = torch.Generator().manual_seed(seed)
    return [b for _ in range(epochs) for b in torch.randperm(n, generator=draw).split(size)]


def loop(model, optimizer, train, steps, run=None, scheduler=None, stop=None, parts=1):
    """Take the steps from where the run stands; `stop` is where it is killed."""
    X, y = train
    for t in range(0 if run is None else run.taken, len(steps)):
        if t == stop:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        micro = steps[t].chunk(parts)
        for some in micro:
            loss = nn.functional.cross_entropy(model(X[some]), y[some], reduction="sum")
            (loss / len(steps[t])).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if run is not None:
            run.step(*micro)


def task(model):
    return uw.Task(model, uw.CrossEntropy())
