"""Training loops of a user's own, by `torch.optim`, for what records them."""

import torch
from torch import nn

import upweight as uw
from upweight.training.steps import TrainingState


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


def replayed(about, train, history):
    """How far the kept states are from taking the recorded steps again, from the first one."""
    state, away = history.state(0), 0.0
    for step in history.steps():
        params = {k: x.requires_grad_() for k, x in about.layout.unflatten(state.theta).items()}
        factors = 1.0 if step.factors is None else step.factors
        losses = about.losses(params, uw.as_data(train).take(step.indices))
        leaves = list(params.values())
        parts = torch.autograd.grad((factors * losses).mean(), leaves, materialize_grads=True)
        gradient = about.layout.flatten(dict(zip(params, parts, strict=True)))
        state = TrainingState(
            *history.optimizer.step(state.theta.detach(), gradient, state.optimizer, step.lr)
        )
        if state.step in history.kept:
            away = max(away, float((state.theta - history.state(state.step).theta).abs().max()))
    return away
