"""Gradients, Jacobians and curvatures by loops over `torch.autograd.grad`: slow and obvious.

    H = (1/n) Σ ∇²ℓᵢ + ∇²R     G = (1/n) Σ Jᵢᵀ Λᵢ Jᵢ + ∇²R     F̂ = (1/n) Σ gᵢ gᵢᵀ + ∇²R

One example at a time, one derivative at a time, on a deep copy of the model, whose parameters are
real leaves: neither `torch.func` nor anything of the package's gradients and curvature is used.
"""

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight.task.data import as_data


class Replica:
    """A copy of the model with the chosen parameters as leaves, and one example at a time."""

    def __init__(self, task, data, theta=None):
        self.task, self.data = task, as_data(data)
        self.model = copy.deepcopy(task.model)
        named = dict(self.model.named_parameters())
        for parameter in named.values():
            parameter.requires_grad_(False)
        self.params = [named[name].requires_grad_(True) for name in task.layout.names]
        if theta is not None:
            self.move_to(theta)

    def move_to(self, theta):
        start = 0
        for parameter in self.params:
            stop = start + parameter.numel()
            parameter.data.copy_(theta[start:stop].reshape(parameter.shape))
            start = stop

    def forward(self, batch):
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no second derivative
            return self.task.forward(self.model, batch)

    def outputs(self, i):
        return self.forward(self.data.take([i]))

    def loss(self, i):
        outputs, targets = self.outputs(i)
        return self.task.loss(outputs, targets)[0]

    def losses(self):
        outputs, targets = self.forward(self.data.batch(0, len(self.data)))
        return self.task.loss(outputs, targets)

    def penalty(self):
        named = dict(zip(self.task.layout.names, self.params, strict=True))
        return self.task.penalty(named, self.task.layout)

    def gradient(self, value, graph=False):
        """∂value/∂θ as one flat vector; zero where the value does not depend on a parameter."""
        if not value.requires_grad:
            return torch.zeros(sum(p.numel() for p in self.params), dtype=self.params[0].dtype)
        parts = torch.autograd.grad(
            value, self.params, create_graph=graph, retain_graph=True, allow_unused=True
        )
        return torch.cat(
            [
                (torch.zeros_like(p) if part is None else part).reshape(-1)
                for p, part in zip(self.params, parts, strict=True)
            ]
        )

    def hessian(self, value):
        """∂²value/∂θ², row by row."""
        gradient = self.gradient(value, graph=True)
        return torch.stack([self.gradient(entry) for entry in gradient]).detach()


def gradients(task, data):
    """gᵢ as rows."""
    replica = Replica(task, data)
    return torch.stack([replica.gradient(replica.loss(i)) for i in range(len(replica.data))])


def jacobians(task, data):
    """∂fᵢ/∂θ, [n c p]."""
    replica = Replica(task, data)
    rows = []
    for i in range(len(replica.data)):
        f, _ = replica.outputs(i)
        rows.append(torch.stack([replica.gradient(entry) for entry in f.reshape(-1)]))
    return torch.stack(rows)


def output_hessians(task, data):
    """∂²ℓᵢ/∂f², [n c c]."""
    replica = Replica(task, data)
    blocks = []
    for i in range(len(replica.data)):
        f, y = replica.outputs(i)
        f = f.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(task.loss(f, y)[0], f, create_graph=True)
        rows = []
        for entry in slope.reshape(-1):
            if entry.requires_grad:
                rows.append(torch.autograd.grad(entry, f, retain_graph=True)[0].reshape(-1))
            else:
                rows.append(torch.zeros(f.numel(), dtype=f.dtype))
        blocks.append(torch.stack(rows))
    return torch.stack(blocks)


def penalty_hessian(task):
    replica = Replica(task, (torch.zeros(1), torch.zeros(1)))
    return replica.hessian(replica.penalty())


def penalty_gradient(task):
    replica = Replica(task, (torch.zeros(1), torch.zeros(1)))
    return replica.gradient(replica.penalty()).detach()


def hessian(task, data):
    replica = Replica(task, data)
    n = len(replica.data)
    mean = torch.stack([replica.loss(i) for i in range(n)]).sum() / n
    return replica.hessian(mean) + penalty_hessian(task)


def ggn(task, data):
    J, L = jacobians(task, data), output_hessians(task, data)
    total = sum(j.T @ block @ j for j, block in zip(J, L, strict=True))
    return total / len(J) + penalty_hessian(task)


def empirical_fisher(task, data):
    g = gradients(task, data)
    return sum(torch.outer(row, row) for row in g) / len(g) + penalty_hessian(task)


def measure_gradients(task, function, data):
    """∇m for a function `(outputs, targets) -> [q]`."""
    replica = Replica(task, data)
    return torch.stack(
        [replica.gradient(function(*replica.outputs(i))[0]) for i in range(len(replica.data))]
    )


def scores(task, train, queries, function, H):
    """−(1/n) ∇mᵀ H⁻¹ g, with the matrix written out."""
    m, g = measure_gradients(task, function, queries), gradients(task, train)
    return -(m @ torch.linalg.solve(H, g.T)) / len(g)
