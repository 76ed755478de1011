"""What random vectors tell of a spectrum: its trace, its ends and its density, with their errors.

    tr f(A) = p E[vᵀ f(A) v],    vᵀ f(A) v ≈ Σₖ ωₖ f(θₖ)        v: random signs / √p

θ and ω are the eigenvalues of Lanczos' matrix for v and the squares of their first components,
Gauss quadrature for the spectral measure of v: stochastic Lanczos quadrature (Ubaru, Chen & Saad
2017; for the Hessians of networks Ghorbani, Krishnan & Xiao 2019). There are two errors: of the
draw of v, and of what so few products leave open of its measure. The second is bounded by the
inequalities of Chebyshev, Markov and Stieltjes (Golub & Meurant 2010, Matrices, Moments and
Quadrature): of all measures with the same α and β none has more or less mass below x than the
quadrature with a node at x.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError
from upweight.linalg.lanczos import finite, normal
from upweight.linalg.operator import LinearOperator, square

CORNER = 1e8
"""How far a corner may exceed T's size: rounding then moves nodes by 1e-8 of that size."""

ABOUT = (-2.0, -0.5, -0.125, 0.125, 0.5, 2.0)
"""Where the bounds of F are asked around each θ for a density, in widths of its kernel. Any points
give true bounds; these separate what has converged from the rest."""


@dataclass(frozen=True)
class Estimate:
    """A number from random draws, and how far it may be off.

    Args:
        value: The estimate.
        standard_error: From the draw of the vectors.
        bound: From what the quadrature of these vectors cannot see, at most; 0 where it is exact.
    """

    value: float
    standard_error: float
    bound: float = 0.0


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
        couplings: βₛ times the last entries of the eigenvectors of T, of each probe, which have
            first entries √ω.
        rounding: What rounding may move an eigenvalue by.
    """

    size: int
    trace: Estimate
    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    nodes: tuple[Float[Tensor, " s"], ...]
    weights: tuple[Float[Tensor, " s"], ...]
    couplings: tuple[Float[Tensor, " s"], ...]
    rounding: float

    def below(self, value: float) -> Estimate:
        """The share of eigenvalues ≤ value, as 0 for negative ones or the λ of damping.

        It is within `bound` + 4 `standard_error`. `bound` is half of the mass that no quadrature
        of as many steps can place on one side of the value, by the inequalities of Chebyshev,
        Markov and Stieltjes: it falls with `steps`, and is large where eigenvalues crowd around the
        value. `standard_error` is that of random signs, √(cF(1 − F)) with c = 2/(p·probes), for the
        share F within c of these bounds that makes it largest. Eigenvalues so near the value that
        rounding moves them across count as not placed.
        """
        x = torch.tensor([value], dtype=torch.float64)
        parts = [self._shares(k, x) for k in range(len(self.nodes))]
        low, high = (float(torch.cat(part).mean()) for part in zip(*parts, strict=True))
        ends = torch.tensor([low]), torch.tensor([high])
        error = float(self._error(*ends, 1.0))
        return Estimate((low + high) / 2, error, max(0.0, high - low) / 2)

    def density(
        self, at: Float[Tensor, " m"], width: float
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
        """(1/p) Σⱼ N(x; λⱼ, width²) at each x, its standard error, and the bound of quadrature.

        A normal density stands for each eigenvalue, so that the whole integrates to 1. It is within
        the bound + 4 standard errors, which are as in `below`: of all ways to place the eigenvalues
        that agree with the products, the bound takes the one farthest off at x. It falls where
        `steps` bring the Ritz values within a width of each other, or where they converge.
        """
        at, middle, low, high = at.to(self.nodes[0]), [], [], []
        for k, (node, weight) in enumerate(zip(self.nodes, self.weights, strict=True)):
            middle.append(_normal(at, node, width) @ weight)
            ends = self._density_bounds(k, at, width)
            low.append(ends[0])
            high.append(ends[1])
        least, value, most = (torch.stack(rows).mean(dim=0) for rows in (low, middle, high))
        error = self._error(least, most, 1 / (width * math.sqrt(2 * math.pi)))
        return value, error, torch.maximum(most - value, value - least).clamp_min(0.0)

    def _error(
        self, low: Float[Tensor, " m"], high: Float[Tensor, " m"], most: float
    ) -> Float[Tensor, " m"]:
        """Standard error of the mean of vᵀ f(A) v, where 0 ≤ f ≤ `most` and it is between these.

        The variance over random signs is at most 2/p times that of f over the eigenvalues, which is
        at most mean(most − mean).
        """
        unit = 2 / (self.size * len(self.nodes))
        # The ends are of the same draw: where it has too little, the variance would be as well.
        low, high = low - unit * most, high + unit * most
        mean = torch.full_like(low, most / 2).clamp(low, high)
        return (unit * mean * (most - mean)).sqrt()

    def _shares(
        self, k: int, x: Float[Tensor, " m"]
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Sharp bounds of the mass of probe k at and below each x, given its α and β.

        They are the masses below x, and at and below it, of the quadrature that has x for a node:
        T with another row, whose corner α̃ makes x an eigenvalue (Golub 1973).
        """
        node, weight, b = self.nodes[k], self.weights[k], self.couplings[k]
        size = float(torch.maximum(node.abs().max(), b.abs().max())) or 1.0
        n, bounds = len(node), []
        for side, upper in ((x - self.rounding, 0), (x + self.rounding, 1)):
            side = side.clamp(-CORNER * size, CORNER * size)
            gap = node - side[:, None]
            gap = torch.where(gap == 0, 1e-300, gap)
            corner = (side + (b.square() / gap).sum(dim=1)).clamp(-CORNER * size, CORNER * size)
            T = torch.zeros(len(x), n + 1, n + 1, dtype=torch.float64, device=node.device)
            T[:, range(n), range(n)] = node
            T[:, n, :n] = T[:, :n, n] = b
            T[:, n, n] = corner
            vectors = torch.linalg.eigh(T)[1]
            mass = torch.einsum("n,mnj->mj", weight.sqrt(), vectors[:, :n]).square().cumsum(dim=1)
            mass = torch.cat([torch.zeros_like(mass[:, :1]), mass], dim=1)
            place = (node < side[:, None]).sum(dim=1) + upper  # θ and the nodes of T interlace
            bounds.append(mass.gather(1, place[:, None])[:, 0].clamp(0.0, 1.0))
        return bounds[0], bounds[1]

    def _density_bounds(
        self, k: int, at: Float[Tensor, " m"], width: float
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """What the density of probe k may be at each x: ∫ N(x; λ, width²) dF over all F in bounds.

        The kernel rises up to x and falls from there, so that −∫ F dN is largest with the least F
        below x and the largest above.
        """
        node = self.nodes[k]
        points = torch.cat([node, *[node + part * width for part in ABOUT]]).sort().values
        low, high = self._shares(k, points)
        ends = torch.tensor([math.inf]).to(node)
        edges = torch.cat([-ends, points, ends])
        low = torch.cat([0 * ends.nan_to_num(), low.cummax(dim=0).values])
        high = torch.cat([high.flip(0).cummin(dim=0).values.flip(0), 1 + 0 * ends.nan_to_num()])
        x = at[:, None]
        # What N rises by in each interval as far as it is below x, and falls by above.
        rise = _normal(at, torch.minimum(edges, x), width).diff(dim=1)
        fall = -_normal(at, torch.maximum(edges, x), width).diff(dim=1)
        return fall @ low - rise @ high, fall @ high - rise @ low


def _normal(
    at: Float[Tensor, " m"], mean: Float[Tensor, "*m n"], width: float
) -> Float[Tensor, "m n"]:
    z = (at[:, None] - mean) / width
    return torch.exp(-0.5 * z.square()) / (width * math.sqrt(2 * math.pi))


def spectrum(A: LinearOperator, probes: int = 8, steps: int = 40, seed: int = 0) -> Spectrum:
    """Trace, ends and density of a symmetric A.

    `below(x)` and `density(at, width)` of the result state both of their errors: a standard error
    for the random vectors, and a bound for what `steps` products of each leave open.

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
    return _assembled(p, alphas, betas, lengths, eps)


def _assembled(
    p: int,
    alphas: Float[Tensor, "k s"],
    betas: Float[Tensor, "k s"],
    lengths: list[int],
    eps: float,
) -> Spectrum:
    nodes, weights, couplings, lows, highs = [], [], [], [], []
    for k, length in enumerate(lengths):
        off = betas[k, : length - 1]
        T = torch.diag(alphas[k, :length]) + torch.diag(off, 1) + torch.diag(off, -1)
        theta, vectors = torch.linalg.eigh(T)
        last = betas[k, length - 1] * vectors[-1]
        bounds = last.abs()
        nodes.append(theta)
        weights.append(vectors[0].square())
        couplings.append(torch.where(vectors[0] < 0, -last, last))
        lows.append((float(theta[0]), float(bounds[0])))
        highs.append((float(theta[-1]), float(bounds[-1])))
    (low, low_error), (high, high_error) = min(lows), max(highs)
    trace = _mean([p * float(node @ weight) for node, weight in zip(nodes, weights, strict=True)])
    rounding = 10 * eps * math.sqrt(p) * max(abs(low), abs(high))
    return Spectrum(
        p,
        trace,
        low,
        high,
        low_error,
        high_error,
        tuple(nodes),
        tuple(weights),
        tuple(couplings),
        rounding,
    )


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
