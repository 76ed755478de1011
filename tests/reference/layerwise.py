"""K-FAC and EK-FAC as their papers write them: loops over examples, uses of a layer and outputs.

    g = Σ_t left_t ⊗ right_t       left = δ, right = a; an embedding's left is one-hot, its right δ

Inputs and output gradients come from hooks on a deep copy, one example and one label at a time;
blocks of curvature from rows of `dense.py`. Nothing of the package's gradients is used.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.reference.dense import Replica, gradients, jacobians, output_hessians

NOTHING = 1e-12


class Weight:
    """A weight [o, i], with the bias that is its last column, and the layers that use it."""

    def __init__(self, task, name, bias, layers):
        self.task, self.name, self.bias, self.layers = task, name, bias, layers
        self.slices = task.layout.slices
        self.outputs = dict(zip(task.layout.names, task.layout.shapes, strict=True))[name][0]

    def matrix(self, flat):
        """The block's share of a vector like θ, [o, i]."""
        out = flat[self.slices[self.name]].reshape(self.outputs, -1)
        if self.bias is not None:
            out = torch.cat([out, flat[self.slices[self.bias]][:, None]], dim=1)
        return out

    def vectors(self, rows):
        return torch.stack([self.matrix(row).reshape(-1) for row in rows])


def observed(outputs, targets, task):
    """One value per label that is looked at: the loss itself."""
    return [task.loss(outputs, targets)[0]]


def expected(outputs, targets, task):
    """⟨r_k, f⟩ for each column of √(∂²ℓ/∂f²): their gradients' squares add up to Jᵀ Λ J."""
    values, vectors = torch.linalg.eigh(task.loss.hessian(outputs.detach(), targets)[0])
    flat = outputs.reshape(-1)
    values = torch.where(values > NOTHING * values.max(), values, 0.0)  # the rest is rounding
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    return [flat @ column for column in root]


def uses(weight, data, i, labels):
    """(left [t, o], right [t, i]) of example i, for each label."""
    replica, seen = Replica(weight.task, data), []

    def keep(module, args, output):
        seen.append((module, args[0].detach(), output))

    for layer in weight.layers:
        replica.model.get_submodule(layer).register_forward_hook(keep)
    outputs, targets = replica.outputs(i)
    found = []
    for value in labels(outputs, targets, weight.task):
        deltas = torch.autograd.grad(value, [output for _, _, output in seen], retain_graph=True)
        parts = [_sides(m, a, d, weight) for (m, a, _), d in zip(seen, deltas, strict=True)]
        found.append(tuple(torch.cat(side) for side in zip(*parts, strict=True)))
    return found


def _sides(module, a, delta, weight):
    if isinstance(module, nn.Embedding):
        one_hot = F.one_hot(a.reshape(-1), module.num_embeddings)
        return one_hot.to(delta), delta.reshape(-1, delta.shape[-1])
    if isinstance(module, nn.Conv2d):
        a = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)[0].T
        left = delta[0].flatten(1).T
    else:
        a, left = a.reshape(-1, a.shape[-1]), delta.reshape(-1, delta.shape[-1])
    if weight.bias is not None:
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
    return left, a


def covariances(weight, data, labels, reduce=False):
    """A per pair (a, δ), and G per example; by Eschenhagen et al. (2023), Eq. 15 or Eq. 22."""
    n, A, G, pairs = len(data), 0.0, 0.0, 0
    for i in range(n):
        for left, right in uses(weight, data, i, labels):
            # Positions that add nothing to g are padding.
            sizes = torch.einsum("to,ti->toi", left, right).abs().amax(dim=(1, 2))
            left, right = left[sizes >= NOTHING], right[sizes >= NOTHING]
            if reduce and len(left):
                left, right = left.sum(dim=0, keepdim=True), right.mean(dim=0, keepdim=True)
            for d, a in zip(left, right, strict=True):
                A, G, pairs = A + torch.outer(a, a), G + torch.outer(d, d), pairs + 1
    return A / pairs, G / n


def empirical_block(weight, data):
    """(1/n) Σ vec(gᵢ) vec(gᵢ)ᵀ."""
    g = weight.vectors(gradients(weight.task, data))
    return sum(torch.outer(row, row) for row in g) / len(g)


def expected_block(weight, data):
    """(1/n) Σ Jᵢᵀ Λᵢ Jᵢ on the block."""
    J, L = jacobians(weight.task, data), output_hessians(weight.task, data)
    J = torch.stack([weight.vectors(rows) for rows in J])
    return sum(j.T @ block @ j for j, block in zip(J, L, strict=True)) / len(J)
