"""What random vectors tell of a spectrum: its trace, its ends and its density, with their errors.

    tr f(A) = p E[vᵀ f(A) v],    vᵀ f(A) v ≈ Σₖ ωₖ f(θₖ)        v: random signs / √p

θ and ω are the eigenvalues of Lanczos' matrix for v and the squares of their first components,
Gauss quadrature for the spectral measure of v: stochastic Lanczos quadrature (Ubaru, Chen & Saad
2017; for the Hessians of networks Ghorbani, Krishnan & Xiao 2019).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError
from upweight.linalg.lanczos import finite, normal
from upweight.linalg.operator import LinearOperator, square


@dataclass(frozen=True)
class Estimate:
    """A number from random draws, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The spectrum of a symmetric operator as some random vectors see it.

    Args:
        size: p.
        trace: Σⱼ λⱼ.
        smallest: Smallest Ritz value: never below the smallest eigenvalue.
        largest: Largest Ritz value: never above the largest eigenvalue.
        smallest_error: The Ritz value is within this of an eigenvalue.
        largest_error: Likewise.
        nodes: θ of each probe.
        weights: ω of each probe; they sum to 1.
    """

    size: int
    trace: Estimate
    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    nodes: tuple[Float[Tensor, " s"], ...]
    weights: tuple[Float[Tensor, " s"], ...]

    def below(self, value: float) -> Estimate:
        """The share of eigenvalues ≤ value, as 0 for negative ones or the λ of damping."""
        return _mean(
            [
                float(weight[node <= value].sum())
                for node, weight in zip(self.nodes, self.weights, strict=True)
            ]
        )

    def density(
        self, at: Float[Tensor, " m"], width: float
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """(1/p) Σⱼ N(x; λⱼ, width²) at each x, and its standard error.

        A normal density stands for each eigenvalue, so that the whole integrates to 1.
        """
        rows = []
        for node, weight in zip(self.nodes, self.weights, strict=True):
            z = (at.to(node)[:, None] - node) / width
            rows.append(torch.exp(-0.5 * z.square()) @ weight / (width * math.sqrt(2 * math.pi)))
        each = torch.stack(rows)
        return each.mean(dim=0), each.std(dim=0) / math.sqrt(len(each))


def spectrum(A: LinearOperator, probes: int = 8, steps: int = 40, seed: int = 0) -> Spectrum:
    """Trace, ends and density of a symmetric A.

    Args:
        A: A symmetric operator.
        probes: Random vectors, at least 2: standard errors fall as 1/√probes.
        steps: Products with A of each; errors of the ends, and the blur of the density, fall with
            them.
        seed: Of the random vectors.

    Raises:
        SpecError: Fewer than two probes, or no step.
        NonFinite: A v has a NaN or an infinity.

    Exact when: A is a multiple of the identity, or diagonal as far as the trace goes; otherwise
    unbiased for the trace, and for moments of the density up to order 2·steps − 1.
    Cost: `steps` products of A with `probes` vectors; probes · steps · p numbers.
    """
    p = square(A, "A spectrum")
    if probes < 2 or steps < 1:
        raise SpecError(
            "A spectrum with its errors needs at least two random vectors, and a step of each.",
            f"probes={probes!r}, steps={steps!r}.",
            "one probe, whose error nothing tells.",
            "spectrum(A, probes=8, steps=40).",
        )
    steps = min(steps, p)
    eps = torch.finfo(A.dtype).eps
    basis = torch.zeros(steps, probes, p, dtype=A.dtype, device=A.device)
    alphas = torch.zeros(probes, steps, dtype=torch.float64)
    betas = torch.zeros(probes, steps, dtype=torch.float64)
    lengths = [steps] * probes
    basis[0] = _signs(A, seed, probes) / math.sqrt(p)
    for step in range(steps):
        w = finite(A, A.mv(basis[step]))
        alphas[:, step] = (w * basis[step]).sum(dim=1).double()
        known = basis[: step + 1]
        for _ in range(2):
            w = w - torch.einsum("skp,sk->kp", known, torch.einsum("skp,kp->sk", known, w))
        betas[:, step] = torch.linalg.vector_norm(w, dim=1).double()
        sizes = torch.maximum(alphas.abs(), betas).amax(dim=1) if step else alphas[:, 0].abs()
        ended = betas[:, step] <= 10 * eps * math.sqrt(p) * sizes
        for k in ended.nonzero().flatten().tolist():  # an invariant subspace: that is all of it
            lengths[k] = min(lengths[k], step + 1)
        if step + 1 < steps:
            # After an end, zeros: they add nothing.
            scale = torch.where(ended, torch.inf, betas[:, step]).to(w)
            basis[step + 1] = w / scale[:, None]
    return _assembled(p, alphas, betas, lengths)


def _assembled(
    p: int, alphas: Float[Tensor, "k s"], betas: Float[Tensor, "k s"], lengths: list[int]
) -> Spectrum:
    nodes, weights, lows, highs = [], [], [], []
    for k, length in enumerate(lengths):
        off = betas[k, : length - 1]
        T = torch.diag(alphas[k, :length]) + torch.diag(off, 1) + torch.diag(off, -1)
        theta, vectors = torch.linalg.eigh(T)
        bounds = (betas[k, length - 1] * vectors[-1]).abs()
        nodes.append(theta)
        weights.append(vectors[0].square())
        lows.append((float(theta[0]), float(bounds[0])))
        highs.append((float(theta[-1]), float(bounds[-1])))
    (low, low_error), (high, high_error) = min(lows), max(highs)
    trace = _mean([p * float(node @ weight) for node, weight in zip(nodes, weights, strict=True)])
    return Spectrum(p, trace, low, high, low_error, high_error, tuple(nodes), tuple(weights))


def trace(A: LinearOperator, products: int = 60, seed: int = 0) -> Estimate:
    """tr(A) by Hutch++ of a symmetric A: exact on the space of a sketch, Hutchinson on the rest.

        tr(A) ≈ tr(Qᵀ A Q) + (1/m) Σ gᵀ (I − QQᵀ) A (I − QQᵀ) g,    Q = orth(A S)

    Meyer, Musco, Musco & Woodruff (2021), Algorithm 1. For A ⪰ 0 the relative error falls as
    1/products, where Hutchinson's falls as 1/√products. The standard error is that of the mean over
    g, given Q.

    Args:
        A: A symmetric operator.
        products: Vectors that A is multiplied with, a third each for AS, AQ and Ag; at least 6.
        seed: Of the random vectors.

    Raises:
        SpecError: Fewer than 6 products.
        NonFinite: A v has a NaN or an infinity.

    Exact when: the rank of A is at most a third of `products`.
    Cost: three products of A with blocks of vectors, O(p · products²).
    """
    p = square(A, "A trace")
    if products < 6:
        raise SpecError(
            "Hutch++ takes at least 6 products, 2 of which are for the standard error.",
            f"products={products!r}.",
            "a number of probes where products are meant.",
            "trace(A, products=60); A.trace() is exact, for p products.",
        )
    m = min(products // 3, p)
    S, G = _signs(A, seed, 2 * m).reshape(2, m, p)
    Q = torch.linalg.qr(finite(A, A.mv(S)).mT)[0].mT
    caught = float((Q * A.mv(Q)).sum())
    G = G - (G @ Q.mT) @ Q
    rest = _mean((G * A.mv(G)).sum(dim=1).tolist())
    return Estimate(caught + rest.value, rest.standard_error)


def _signs(A: LinearOperator, seed: int, count: int) -> Float[Tensor, "k p"]:
    """Entries ±1."""
    return torch.where(normal(A, seed, count) < 0, -1.0, 1.0).to(A.dtype)


def _mean(values: list[float]) -> Estimate:
    each = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(each.mean()), float(each.std()) / math.sqrt(len(each)))
