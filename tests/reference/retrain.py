"""θ(w) = argmin J(θ, w) by Newton's method with the Hessian written out: brute force.

    J(θ, w) = (1/n) Σ wᵢ ℓᵢ(θ) + R(θ)

A step divides by |eigenvalues|, so that it also descends where J is not convex, and is halved until
J falls. From a minimum it follows that minimum as w changes, which is what a derivative means for a
model with several minima.
"""

import torch

from tests.reference.dense import Replica
from upweight.task.data import as_data


def objective(replica, weights):
    losses = replica.losses()
    return (weights.to(losses) * losses).sum() / len(losses) + replica.penalty()


def minimize(task, data, weights=None, start=None, tolerance=1e-13, most=200):
    """θ(w), with ‖∇J‖ ≤ tolerance or as small as rounding allows."""
    replica = Replica(task, data, start)
    theta = torch.cat([p.detach().reshape(-1) for p in replica.params]).clone()
    weights = torch.ones(len(as_data(data))) if weights is None else weights
    best = torch.inf
    for _ in range(most):
        replica.move_to(theta)
        value = objective(replica, weights)
        slope = replica.gradient(value, graph=True)
        gradient = slope.detach()
        norm = float(gradient.norm())
        if norm <= tolerance or (norm < 1e-10 and norm >= best):
            return theta
        best = norm
        eigenvalues, Q = torch.linalg.eigh(_hessian(replica, slope))
        floor = 1e-6 * eigenvalues.abs().max()
        step = -(Q @ ((Q.T @ gradient) / eigenvalues.abs().clamp_min(floor)))
        theta = theta + _length(replica, weights, theta, step, float(value.detach())) * step
    raise AssertionError(f"no minimum after {most} steps: gradient norm {norm:.1e}")


def _hessian(replica, slope):
    """∂²J/∂θ², all rows at once: a step only has to lower J, and the end is told by ∇J."""
    rows = torch.autograd.grad(
        slope, replica.params, torch.eye(len(slope)).to(slope), is_grads_batched=True,
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return torch.cat([part.reshape(len(slope), -1) for part in rows], dim=1).detach()


def _length(replica, weights, theta, step, value):
    length = 1.0
    while length > 1e-8:
        replica.move_to(theta + length * step)
        with torch.no_grad():
            # Close to the minimum J changes by less than its rounding: full steps there.
            if float(objective(replica, weights)) <= value + 1e-13 * abs(value):
                return length
        length /= 2
    return length


def measured(task, theta, function, queries):
    """m(θ) for a function `(outputs, targets) -> [q]`."""
    replica = Replica(task, queries, theta)
    with torch.no_grad():
        outputs, targets = replica.forward(replica.data.batch(0, len(replica.data)))
        return function(outputs, targets)


def weight_derivative(response, n, example, h=0.005):
    """∂ response(w)/∂wᵢ at w = 1 by central differences of fourth order.

    The weight's share of the mean is h/n, so the error is of order (h/n)⁴.
    """

    def central(step):
        up, down = torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        up[example] += step
        down[example] -= step
        return (response(up) - response(down)) / (2 * step)

    return (4 * central(h) - central(2 * h)) / 3
