"""Which kernel for which block? By operation count, at a stated relative error.

The error of a query is ‖Ŝ_q − S_q‖/‖S_q‖ over the training set, and `tolerance` bounds its root
mean square over the queries, each against its own size: a query with small scores counts as much as
one with large ones. Errors are measured, not assumed: candidates are compared with the untruncated
score on some training examples, and the choice is then checked on others, drawn by loss and drawn
evenly: both must keep the tolerance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.contraction.kernels import Explicit, Kernel, OfVector, Separable
from upweight.contraction.queries import BlockQueries, FactoredQueries, rotated
from upweight.contraction.separable import Expansion, expansion
from upweight.gradients.factored import Factors, Rows, Tokens

TERM_OVERHEAD = 256
"""What one more product of q × b costs beside its multiply-adds, in multiply-adds per entry: its
two factors are written to memory and read again."""

TRUNCATION_SHARE = 0.7
"""Of the squared tolerance, how much the truncation may use; the rest is for rounding."""

SOLVE_BYTES = 64 * 2**20


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


@dataclass(frozen=True, eq=False)
class Reference:
    """Untruncated scores of a few queries and training examples, block by block.

    Args:
        rows: Which queries.
        parts: The share of each block.
    """

    rows: Int[Tensor, " k"]
    parts: tuple[Float[Tensor, "k s"], ...]

    @property
    def norms(self) -> Float[Tensor, " k"]:
        """‖S_q‖ over the examples."""
        return torch.stack(self.parts).sum(dim=0).norm(dim=1)

    def relative(self, error: Float[Tensor, "k s"]) -> Float[Tensor, " k"]:
        """‖error_q‖/‖S_q‖, 0 for a query without any score."""
        norms = self.norms
        return torch.where(norms > 0, error.norm(dim=1) / norms.clamp_min(1e-300), 0.0)


def reference_scores(
    queries: Sequence[BlockQueries], rows: Int[Tensor, " k"], sample: Sequence[Factors]
) -> Reference:
    """⟨V_q, gᵢ⟩ of some queries and examples in full, in full precision."""
    return Reference(
        rows, tuple(_share(q, rows, part) for q, part in zip(queries, sample, strict=True))
    )


def _share(queries: BlockQueries, rows: Tensor, part: Factors) -> Float[Tensor, "k s"]:
    if not isinstance(queries, FactoredQueries):
        g = part.values if isinstance(part, Rows) else part.matrices().flatten(1)
        return queries.reference.flatten(1) @ g.mT
    assert isinstance(part, Tokens)
    o, i = queries.inverse.shape
    size = max(1, SOLVE_BYTES // (o * i * queries.left.element_size()))
    # In the eigenbases: rotating the examples takes far less than turning the queries back.
    tokens = rotated(part, queries.eigen)
    left, right = tokens.left[:, 0].mT, tokens.right[:, 0].mT
    shares = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        v = queries.left[some][:, :, None] * queries.right[some][:, None, :] * queries.inverse
        shares.append(((v @ right) * left).sum(dim=1))  # [k, o, s] summed over o
    return torch.cat(shares)


def choose(
    queries: Sequence[BlockQueries],
    reference: Reference,
    sample: Sequence[Factors],
    right_moments: Sequence[Tensor],
    tolerance: float,
    short: bool,
) -> tuple[tuple[Kernel, ...], tuple[str, ...]]:
    """A kernel per block, the cheapest together that keep the tolerance on the reference.

    Args:
        queries: Of each block.
        reference: Their untruncated scores on the sample.
        sample: Training examples.
        right_moments: Λ of each block: what training gradients are expected to be, squared.
        tolerance: Relative error; 0 for exact products in full precision.
        short: Whether bfloat16 may be used.
    """
    curves: dict[int, _Curve] = {}
    if tolerance > 0:
        for k, block in enumerate(queries):
            if isinstance(block, FactoredQueries):
                curves[k] = _curve(block, reference, k, sample[k], right_moments[k], tolerance)
    ranks = _ranks(curves, tolerance**2 * TRUNCATION_SHARE)
    rounding = {
        k: _rounding(queries[k], reference, k, sample[k], curve, ranks[k])  # type: ignore[arg-type]
        for k, curve in curves.items()
        if short
    }
    shorts = _short_terms(rounding, tolerance**2 * (1 - TRUNCATION_SHARE))
    kernels: list[Kernel] = []
    words: list[str] = []
    for k, block in enumerate(queries):
        rank = ranks.get(k)
        if isinstance(block, FactoredQueries) and rank is not None:
            in_short = shorts.get(k, frozenset())
            kernels.append(_separable(block, curves[k].terms, rank, in_short))
            words.append(f"{rank} products ({len(in_short)} in bfloat16)")
            continue
        if isinstance(block, FactoredQueries):
            vectors = _solved_all(block, torch.bfloat16 if shorts.get(k) else block.left.dtype)
        else:
            vectors = block.vectors
        kernels.append(Explicit(vectors) if vectors.ndim == 3 else OfVector(vectors))
        words.append(f"in full, {str(vectors.dtype).removeprefix('torch.')}")
    return tuple(kernels), tuple(words)


@dataclass(frozen=True, eq=False)
class _Curve:
    """How the error of a block falls with the number of terms, and what they cost.

    Args:
        terms: The expansion.
        errors: After r terms, r = 0, 1, …: root mean square over queries, relative to S_q.
        per_term: Multiply-adds per query and example of one term.
        in_full: Of the block in full.
    """

    terms: Expansion
    errors: tuple[float, ...]
    per_term: int
    in_full: int


def _curve(
    block: FactoredQueries,
    reference: Reference,
    k: int,
    part: Factors,
    moments: Float[Tensor, "o i"],
    tolerance: float,
) -> _Curve:
    assert isinstance(part, Tokens)
    o, i = block.inverse.shape
    per_term, in_full = o + i + TERM_OVERHEAD, o * i + TERM_OVERHEAD
    most = max(1, in_full // per_term)
    norms = reference.norms
    scale = torch.where(norms > 0, 1.0 / norms.clamp_min(1e-300), 0.0)
    left, right = block.left[reference.rows], block.right[reference.rows]
    # Queries count by their own size; training gradients by their second moments, whose row and
    # column sums are those of δ̃² and ã².
    left_weight = ((scale[:, None] * left).square().mean(dim=0) * moments.sum(dim=1)).sqrt()
    right_weight = (right.square().mean(dim=0) * moments.sum(dim=0)).sqrt()
    terms = expansion(block.inverse, left_weight, right_weight, most)
    tokens = rotated(part, block.eigen)
    remaining = -reference.parts[k]
    errors = [_rms(reference.relative(remaining))]
    for u, v in zip(terms.left, terms.right, strict=True):
        term = ((left * u) @ tokens.left[:, 0].mT) * ((right * v) @ tokens.right[:, 0].mT)
        remaining = remaining + term
        errors.append(_rms(reference.relative(remaining)))
        if errors[-1] < 0.05 * tolerance:
            break
    return _Curve(terms, tuple(errors), per_term, in_full)


def _rounding(
    block: FactoredQueries,
    reference: Reference,
    k: int,
    part: Factors,
    curve: _Curve,
    rank: int | None,
) -> tuple[float, ...]:
    """What bfloat16 does to each of the first terms, or to the block in full (rank None).

    Measured where it is used, in θ's own coordinates: there it is more than the 8 bits of a
    product, because solved queries are large where training gradients are small.
    """
    few = FactoredQueries(
        block.eigen, block.inverse, block.left[reference.rows], block.right[reference.rows]
    )

    def off(kernel: Kernel, exact: Float[Tensor, "k s"]) -> float:
        short = torch.zeros_like(exact)
        kernel.add_to(short, part)
        return _rms(reference.relative(short - exact))

    if rank is None:
        return (off(Explicit(_solved_all(few, torch.bfloat16)), reference.parts[k]),)
    (lefts, rights), _ = _pairs(few, curve.terms, list(range(rank)), [])
    nothing = (lefts[:0], rights[:0])
    errors = []
    for r in range(rank):
        one = (lefts[r : r + 1], rights[r : r + 1])
        exact = torch.zeros_like(reference.parts[k])
        Separable(one, nothing).add_to(exact, part)
        in_short = (one[0].to(torch.bfloat16), one[1].to(torch.bfloat16))
        errors.append(off(Separable(nothing, in_short), exact))
    return tuple(errors)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _ranks(curves: dict[int, _Curve], budget: float) -> dict[int, int | None]:
    """Terms of each block, None for in full: greedily the steps that buy most error per cost."""
    ranks: dict[int, int | None] = dict.fromkeys(curves, 1)

    def squared(k: int, r: int | None) -> float:
        return 0.0 if r is None else curves[k].errors[r] ** 2

    def price(k: int, r: int | None) -> int:
        return curves[k].in_full if r is None else r * curves[k].per_term

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


def _separable(
    block: FactoredQueries, terms: Expansion, rank: int, short: frozenset[int]
) -> Separable:
    full = [t for t in range(rank) if t not in short]
    return Separable(*_pairs(block, terms, full, sorted(short)))


def _pairs(
    block: FactoredQueries, terms: Expansion, full: list[int], short: list[int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(δ̃_q∘u_r) Q_Gᵀ and (ã_q∘v_r) Q_Aᵀ, so that training factors need no rotation."""

    def pair(which: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pairs = []
        for factor, scales, q in zip(
            (block.left, block.right), (terms.left, terms.right), block.eigen.bases, strict=True
        ):
            out = factor.new_empty(len(which), *factor.shape, dtype=dtype)
            for k, r in enumerate(which):  # a term at a time: all in full precision are many
                scaled = factor * scales[r]
                out[k] = scaled if q is None else scaled @ q.mT.to(scaled.dtype)
            pairs.append(out)
        return pairs[0], pairs[1]

    return pair(full, block.left.dtype), pair(short, torch.bfloat16)


def _solved_all(block: FactoredQueries, dtype: torch.dtype) -> Float[Tensor, "q o i"]:
    o, i = block.inverse.shape
    out = block.left.new_empty(len(block), o, i, dtype=dtype)
    size = max(1, SOLVE_BYTES // (o * i * block.left.element_size()))
    for start in range(0, len(block), size):
        rows = slice(start, start + size)
        out[rows] = block.solved(rows)
    return out


@dataclass(frozen=True)
class Measured:
    """The error of kernels on a sample.

    Args:
        error: Root mean square over the reference queries.
        worst: Of the worst of them.
        by_block: The root mean square error that each block alone contributes.
    """

    error: float
    worst: float
    by_block: tuple[float, ...]


def measured(
    kernels: Sequence[Kernel], q: int, reference: Reference, sample: Sequence[Factors]
) -> Measured:
    """The error of the kernels themselves on a sample."""
    total = torch.zeros_like(reference.parts[0])
    by_block = []
    for kernel, part, exact in zip(kernels, sample, reference.parts, strict=True):
        scores = exact.new_zeros(q, exact.shape[1])
        kernel.add_to(scores, part)
        error = scores[reference.rows] - exact
        by_block.append(_rms(reference.relative(error)))
        total += error
    errors = reference.relative(total)
    return Measured(_rms(errors), float(errors.max()), tuple(by_block))
