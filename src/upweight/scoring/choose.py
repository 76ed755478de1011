"""Which kernel for which block? By operation count, at a stated relative error.

Errors are measured, not assumed: candidates are compared with the untruncated score on some
training examples (`reference.py`), and the choice is then checked on others.

A block of products is truncated twice: 1/(Λ + λ) to a few terms, and the eigenbases to the
coordinates that matter. Where those are few enough to pay for it, training factors are projected on
them, and everything that follows is that much smaller.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.gradients.factored import Tokens
from upweight.linalg.products import product
from upweight.scoring.kernels import Explicit, Kernel, OfVector, Separable, add_pairs
from upweight.scoring.queries import (
    PAIR_OVERHEAD,
    BlockQueries,
    FactoredQueries,
    pair_cost,
    rotated,
)
from upweight.scoring.reference import SOLVE_BYTES, Reference, Sample
from upweight.scoring.separable import Expansion, expansion

TRUNCATION_SHARE = 0.7
"""Of the squared tolerance, how much the truncation may use; the rest is for rounding."""

DROPPED = 0.15
"""Error that coordinates left out on one side may make, in units of a block's part."""

ENOUGH = 0.25
"""Error at which further terms are not looked at, in the same units."""

STILL = 0.5
"""Of the part that a curve was measured for, how much a later part must be for it to serve."""

UNSEEN = 1e-6
"""Second moment, relative to the mean, that is assumed where none was seen."""

USUAL_TERMS = 16
"""Terms that a block is assumed to take when coordinates are chosen."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What the scores are computed with.

    Args:
        kernels: One per block.
        error: Measured root mean square over queries of ‖Ŝ_q − S_q‖/‖S_q‖; 0 where nothing is
            approximated.
        worst: That of the worst of the reference queries.
        terms: What was chosen, in words, by block.
    """

    kernels: tuple[Kernel, ...]
    error: float
    worst: float
    terms: tuple[str, ...]


def choose(
    queries: Sequence[BlockQueries],
    reference: Reference,
    sample: Sample,
    right_moments: Sequence[Tensor],
    tolerance: float,
    short: bool,
    curves: "dict[int, _Curve] | None" = None,
) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """A kernel per block, the cheapest together that keep the tolerance on the reference.

    Args:
        queries: Of each block.
        reference: Their untruncated scores on the sample.
        sample: Training examples.
        right_moments: Λ of each block: what training gradients are expected to be, squared.
        tolerance: Relative error, above 0.
        short: Whether bfloat16 may be used.
        curves: What an earlier choice on the same queries and sample has measured, if there was
            one; what this one measures is put there.
    """
    curves = {} if curves is None else curves
    factored = {k: block for k, block in enumerate(queries) if isinstance(block, FactoredQueries)}
    if factored:
        scale = _scale(factored, right_moments)
        share = tolerance / len(factored) ** 0.5
        for k, some in factored.items():
            part = sample.factors[k]
            assert isinstance(part, Tokens)
            if k not in curves or share < STILL * curves[k].share:
                curves[k] = _curve(some, reference, k, part, right_moments[k], scale, share)
    ranks = _ranks(curves, tolerance**2 * TRUNCATION_SHARE)
    rounding = {
        k: _rounding(curve, reference, k, sample, ranks[k]) for k, curve in curves.items() if short
    }
    shorts = _short_terms(rounding, tolerance**2 * (1 - TRUNCATION_SHARE))
    kernels: list[Kernel] = []
    words: list[str] = []
    for k, block in enumerate(queries):
        rank = ranks.get(k)
        if rank is not None:
            in_short = shorts.get(k, frozenset())
            kernels.append(curves[k].kernel(rank, in_short))
            words.append(f"{rank} products ({len(in_short)} in bfloat16){curves[k].in_words}")
            continue
        kernel, word = _in_full(block, torch.bfloat16 if shorts.get(k) else None)
        kernels.append(kernel)
        words.append(word)
    return tuple(kernels), tuple(words)


def exact(queries: Sequence[BlockQueries]) -> Choice:
    """Every block in full, in the precision that its queries were solved in."""
    kernels, words = zip(*(_in_full(block) for block in queries), strict=True)
    return Choice(kernels, 0.0, 0.0, words)


def _in_full(block: BlockQueries, dtype: torch.dtype | None = None) -> tuple[Kernel, str]:
    kernel: Kernel
    if isinstance(block, FactoredQueries):
        kernel = Explicit(_solved_all(block, block.left.dtype if dtype is None else dtype))
        held = kernel.vectors.dtype
    else:
        is_matrix, held = block.vectors.ndim == 3, block.vectors.dtype
        kernel = Explicit(block.vectors, block.bias) if is_matrix else OfVector(block.vectors)
    return kernel, f"in full, {str(held).removeprefix('torch.')}"


@dataclass(frozen=True, eq=False)
class _Curve:
    """How the error of a block falls with the number of terms, and what they cost.

    Args:
        block: The queries.
        kept: The coordinates of each side that training factors are projected on; None: none are.
        terms: The expansion, over those coordinates.
        errors: After r terms, r = 0, 1, …: root mean square over queries, relative to S_q.
        per_term: Multiply-adds per query and example of one term.
        fixed: Of the projection.
        in_full: Of the block in full.
        share: The part of the tolerance that it was measured for.
        exact: What each term adds to the scores of the sample in full precision.
        short: The factors of the first terms in bfloat16, as far as somebody asked for them.
        rounding: What bfloat16 does to them, or (None) to the block in full.
    """

    block: FactoredQueries
    kept: tuple[Int[Tensor, " j"], Int[Tensor, " k"]] | None
    terms: Expansion
    errors: tuple[float, ...]
    per_term: int
    fixed: int
    in_full: int
    share: float
    exact: tuple[Float[Tensor, "k s"], ...]
    short: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rounding: dict[int | None, float] = field(default_factory=dict)

    @property
    def bases(self) -> tuple[Tensor, Tensor] | None:
        """What training factors are projected on."""
        if self.kept is None:
            return None
        left, right = self.block.eigen.bases
        assert left is not None and right is not None
        return left[:, self.kept[0]], right[:, self.kept[1]]

    @property
    def in_words(self) -> str:
        """The coordinates that are left."""
        if self.kept is None:
            return ""
        o, i = self.block.inverse.shape
        return f" over {len(self.kept[0])} of {o} × {len(self.kept[1])} of {i} directions"

    def kernel(self, rank: int, short: frozenset[int]) -> Separable:
        """The first terms, some of them in bfloat16."""
        full = [r for r in range(rank) if r not in short]
        rounded = [self.in_short(rank)[r] for r in sorted(short)]
        none = self.pairs([], torch.bfloat16)
        sides = tuple(torch.stack(side) for side in zip(*rounded, strict=True)) or none
        return Separable(self.pairs(full, self.block.left.dtype), (sides[0], sides[1]), self.bases)

    def in_short(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        """The factors of the first terms in bfloat16: of all queries, as in the kernel."""
        missing = range(len(self.short), rank)
        self.short.extend(zip(*self.pairs(missing, torch.bfloat16), strict=True))
        return self.short[:rank]

    def pairs(
        self, which: Sequence[int], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "r q s o"], Float[Tensor, "r q s i"]]:
        """δ̃_q∘u_r and ã_q∘v_r; without a projection (δ̃_q∘u_r) Q_Gᵀ and (ã_q∘v_r) Q_Aᵀ."""
        found = []
        sides = zip(
            (self.block.left, self.block.right),
            (self.terms.left, self.terms.right),
            self.kept or (None, None),
            self.block.eigen.bases,
            strict=True,
        )
        for factor, scales, kept, basis in sides:
            factor = factor if kept is None else factor[..., kept]
            out = factor.new_empty(len(which), *factor.shape, dtype=dtype)
            # Some terms at a time: all in full precision are many.
            size = max(1, SOLVE_BYTES // max(1, factor.nbytes))
            for start in range(0, len(which), size):
                some = list(which[start : start + size])
                # Rotated in the dtype of the kernel, whose rounding is measured as it is used.
                scaled = (factor * scales[some][:, None, None]).to(dtype)
                if kept is None and basis is not None:
                    scaled = product(scaled, basis.mT.to(dtype))
                out[start : start + size] = scaled
            found.append(out)
        return found[0], found[1]


def _scale(
    factored: Mapping[int, FactoredQueries], right_moments: Sequence[Tensor]
) -> Float[Tensor, " q"]:
    """1/‖S_q‖ of every query up to a factor, as second moments expect it: √(Σ q̃² M² Λ)."""
    squares = torch.stack([
        (_squares(b.left) @ (b.inverse.square() * right_moments[k]) * _squares(b.right)).sum(dim=1)
        for k, b in factored.items()
    ]).sum(dim=0)  # fmt: skip
    return torch.where(squares > 0, squares.clamp_min(1e-300).rsqrt(), 0.0)


def _squares(factor: Float[Tensor, "q s d"]) -> Float[Tensor, "q d"]:
    return factor.square().sum(dim=1)


def _curve(
    block: FactoredQueries,
    reference: Reference,
    k: int,
    part: Tokens,
    moments: Float[Tensor, "o i"],
    scale: Float[Tensor, " q"],
    share: float,
) -> _Curve:
    """Args as for `choose`; `share` is the part of the tolerance that falls to this block.

    What matters is asked of all queries: a coordinate that none of the references has (a token of
    an embedding, say) may be all that another query has.
    """
    (o, i), s, t = block.inverse.shape, block.left.shape[1], part.positions
    # Of what the curvature has not seen (it may have been learned from some examples) a trace.
    moments = moments.clamp_min(UNSEEN * float(moments.mean()))
    sizes, widths = scale[:, None].square() * _squares(block.left), _squares(block.right)
    # E[q̃²] over queries, each by its own size, and E[g̃²] = Λ of training gradients.
    of_queries = sizes.mT @ widths / len(block)
    j, m = _kept(block.inverse.square() * of_queries * moments, share)
    kept: tuple[Tensor, Tensor] | None = (j, m)
    fixed = t * (o * len(j) + i * len(m)) // len(block)
    per_term = pair_cost((len(j), len(m)), s, t)
    saved = USUAL_TERMS * (pair_cost((o, i), s, t) - per_term)
    if saved <= fixed or any(basis is None for basis in block.eigen.bases):
        kept, fixed, per_term = None, 0, pair_cost((o, i), s, t)
    in_full = o * i * (len(block) + t * (t > 1)) // len(block) + PAIR_OVERHEAD
    # Queries count by their own size; training gradients by their second moments, whose row and
    # column sums are those of δ̃² and ã².
    left_weight = (sizes.mean(dim=0) * moments.sum(dim=1)).sqrt()
    right_weight = (widths.mean(dim=0) * moments.sum(dim=0)).sqrt()
    left, right = block.left[reference.rows], block.right[reference.rows]
    inverse, tokens = block.inverse, rotated(part, block.eigen)
    if kept is not None:
        inverse, left_weight, right_weight = inverse[j][:, m], left_weight[j], right_weight[m]
        left, right = left[..., j], right[..., m]
        tokens = Tokens(tokens.left[..., j], tokens.right[..., m])
    terms = expansion(inverse, left_weight, right_weight, max(1, (in_full - fixed) // per_term))
    remaining = -reference.parts[k]
    errors, exact = [reference.rms(remaining)], []
    for u, v in zip(terms.left, terms.right, strict=True):
        exact.append(torch.zeros_like(remaining))
        add_pairs(exact[-1], Tokens(left * u, right * v), tokens)
        remaining += exact[-1]
        errors.append(reference.rms(remaining))
        if errors[-1] < ENOUGH * share:
            break
    return _Curve(block, kept, terms, tuple(errors), per_term, fixed, in_full, share, tuple(exact))


def _kept(
    energy: Float[Tensor, "o i"], share: float
) -> tuple[Int[Tensor, " j"], Int[Tensor, " k"]]:
    """Coordinates without which no more than a small part of the scores' squares is lost."""

    def of(sums: Float[Tensor, " d"]) -> Int[Tensor, " k"]:
        ordered, index = sums.double().sort()
        lost = ordered.cumsum(dim=0) > (DROPPED * share) ** 2 * ordered.sum()
        lost[-1] = True  # one at least
        return index[lost].sort().values

    return of(energy.sum(dim=1)), of(energy.sum(dim=0))


def _rounding(
    curve: _Curve, reference: Reference, k: int, sample: Sample, rank: int | None
) -> tuple[float, ...]:
    """What bfloat16 does to each of the first terms, or to the block in full (rank None).

    Measured where it is used: in θ's own coordinates it is more than the 8 bits of a product,
    because solved queries are large where training gradients are small.
    """
    part, rows = sample.factors[k], reference.rows
    assert isinstance(part, Tokens)
    known = curve.rounding
    if rank is None:
        if None not in known:
            few = FactoredQueries(
                curve.block.eigen,
                curve.block.inverse,
                curve.block.left[rows],
                curve.block.right[rows],
            )
            short = torch.zeros_like(reference.parts[k])
            Explicit(_solved_all(few, torch.bfloat16)).add_to(short, part)
            known[None] = reference.rms(short - reference.parts[k])
        return (known[None],)
    missing = [r for r in range(rank) if r not in known]
    if missing:
        part = part if curve.bases is None else part.projected(*curve.bases)
        rounded = part.to(torch.bfloat16)
        for r in missing:
            left, right = curve.in_short(rank)[r]
            short = torch.zeros_like(reference.parts[k])
            add_pairs(short, Tokens(left[rows], right[rows]), rounded)
            known[r] = reference.rms(short - curve.exact[r])
    return tuple(known[r] for r in range(rank))


def _ranks(curves: dict[int, _Curve], budget: float) -> dict[int, int | None]:
    """Terms of each block, None for in full: greedily the steps that buy most error per cost."""
    ranks: dict[int, int | None] = dict.fromkeys(curves, 1)

    def squared(k: int, r: int | None) -> float:
        return 0.0 if r is None else curves[k].errors[r] ** 2

    def price(k: int, r: int | None) -> int:
        return curves[k].in_full if r is None else curves[k].fixed + r * curves[k].per_term

    while sum(squared(k, r) for k, r in ranks.items()) > budget:
        best: tuple[float, int, int | None] = (0.0, -1, None)
        for k, r in ranks.items():
            if r is None:
                continue
            further: list[int | None] = [*range(r + 1, len(curves[k].errors)), None]
            for to in further:
                gained = squared(k, r) - squared(k, to)
                rate = gained / max(1, price(k, to) - price(k, r))
                if price(k, to) <= price(k, r) and gained >= 0:
                    rate = math.inf
                if rate > best[0]:
                    best = (rate, k, to)
        if best[1] < 0:
            break  # every block is in full, or no step helps
        ranks[best[1]] = best[2]
    # A block in full may cost less than its terms.
    return {
        k: None if r is not None and price(k, None) <= price(k, r) else r for k, r in ranks.items()
    }


def _short_terms(
    rounding: dict[int, tuple[float, ...]], budget: float
) -> dict[int, frozenset[int]]:
    """Terms of all blocks whose rounding together stays within the budget, the least ones first.

    For a block in full: {0} if it may be in bfloat16.
    """
    errors = sorted((error, k, t) for k, terms in rounding.items() for t, error in enumerate(terms))
    spent, chosen = 0.0, {k: set[int]() for k in rounding}
    for error, k, t in errors:
        spent += error**2
        if spent > budget:
            break
        chosen[k].add(t)
    return {k: frozenset(t) for k, t in chosen.items()}


def _solved_all(block: FactoredQueries, dtype: torch.dtype) -> Float[Tensor, "q o i"]:
    o, i = block.inverse.shape
    out = block.left.new_empty(len(block), o, i, dtype=dtype)
    size = max(1, SOLVE_BYTES // (o * i * block.left.element_size()))
    for start in range(0, len(block), size):
        rows = slice(start, start + size)
        out[rows] = block.solved(rows)
    return out
