"""What a sceptic asks for: rankings that know nothing of influence.

Random        no information at all
TrainingLoss  the loss of the training example, whatever the query
BM25          words in common, for models of token sequences
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import DataError, SpecError
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.neighbours import inputs
from upweight.methods.scorer import BlockScorer, Scorer
from upweight.runtime.fingerprint import digest
from upweight.scores import Unit
from upweight.task.batches import tensors
from upweight.task.data import Data


@dataclass(frozen=True)
class Random(Method):
    """S[q, i] ~ N(0, 1): what chance gives.

    The draws of a query follow from the seed and what the query holds, so neither batches nor the
    other queries change them.

    Args:
        seed: Of the draws.
    """

    seed: int = 0

    unit = Unit.RANK

    def prepare(self, fitting: Fitting) -> Scorer:
        n, dtype = len(fitting.data), fitting.theta.dtype

        def row(queries: Data, q: int) -> Tensor:
            held = digest(*(x.cpu() for x in tensors(queries.batch(q, q + 1))), str(self.seed))
            generator = torch.Generator().manual_seed(int(held[:15], 16))
            return torch.randn(n, generator=generator, dtype=torch.float64)

        def score(queries: Data, measure: Any, start: int, stop: int) -> Tensor:
            rows = [row(queries, q)[start:stop] for q in range(len(queries))]
            return torch.stack(rows).to(fitting.theta.device, dtype)

        return BlockScorer(score, at_once=n)


@dataclass(frozen=True)
class TrainingLoss(Method):
    """S[q, i] = ℓᵢ(θ̂), for every query alike: hard examples first.

    What is inspected first by whoever looks for wrong labels without any attribution.
    """

    unit = Unit.RANK

    def prepare(self, fitting: Fitting) -> Scorer:
        losses = fitting.checked_losses().to(fitting.theta)

        def score(queries: Data, measure: Any, start: int, stop: int) -> Tensor:
            return losses[start:stop].expand(len(queries), -1)

        return BlockScorer(score, diagonal=lambda: losses)


@dataclass(frozen=True)
class BM25(Method):
    """Okapi BM25 of the query's tokens in each training example; S = −BM25.

        BM25(q, i) = Σ_{t ∈ q} idf(t) f(t, i) (k₁ + 1) / (f(t, i) + k₁ (1 − b + b |i| / mean |·|))
        idf(t)     = log(1 + (n − n(t) + ½) / (n(t) + ½))

    with f(t, i) how often token t is in example i, |i| its length, n(t) in how many examples it is;
    a token that the query holds twice counts twice. Robertson & Zaragoza (2009), Eq. 3.15; the idf
    is that of Lucene, which is never negative. Lexical overlap finds the sentence that a model
    copied better than gradients do (Akyürek et al. 2022), so beat it before believing a method.

    Args:
        k1: How soon further occurrences stop counting.
        b: How much length is taken out, from 0 to 1.
        ignore: Tokens that are none, as padding that no attention_mask leaves out.

    Raises:
        DataError: Inputs are not one integer tensor of tokens `[b, t]`.
        SpecError: k1 is negative or b not from 0 to 1.

    Cost: a pass over the tokens, and nothing of the model.
    """

    k1: float = 1.2
    b: float = 0.75
    ignore: tuple[int, ...] = ()

    unit = Unit.RANK

    def __post_init__(self) -> None:
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise SpecError(
                "BM25 needs k1 ≥ 0 and 0 ≤ b ≤ 1.",
                f"k1={self.k1!r}, b={self.b!r}.",
                "the two exchanged.",
                "BM25(k1=1.2, b=0.75).",
            )

    def prepare(self, fitting: Fitting) -> Scorer:
        row = self.ranking(token_sequences(fitting.data))
        n = len(fitting.data)

        def score(queries: Data, measure: Any, start: int, stop: int) -> Tensor:
            rows = torch.stack([-row(sequence) for sequence in token_sequences(queries)])
            return rows[:, start:stop].to(fitting.theta)

        return BlockScorer(score, at_once=n)

    def ranking(
        self, sequences: Sequence[Int[Tensor, " t"]]
    ) -> Callable[[Int[Tensor, " t"]], Float[Tensor, " n"]]:
        """A function from a query's tokens to BM25 of each of these examples."""
        documents = [self._tokens(row) for row in sequences]
        n = len(documents)
        lengths = torch.tensor([len(document) for document in documents], dtype=torch.float64)
        terms, which, counts = _counted(documents)
        norm = self.k1 * (1 - self.b + self.b * lengths / lengths.mean().clamp(min=1))
        weight = counts * (self.k1 + 1) / (counts + norm[which])
        starts = torch.cat([terms.new_zeros(1), 1 + (terms[1:] != terms[:-1]).nonzero()[:, 0]])
        ends = torch.cat([starts[1:], starts.new_full((1,), len(terms))]) if len(terms) else starts
        postings = {
            int(terms[s]): (which[s:e], weight[s:e] * _idf(n, int(e - s)))
            for s, e in zip(starts.tolist(), ends.tolist(), strict=True)
            if e > s
        }

        def row(sequence: Int[Tensor, " t"]) -> Float[Tensor, " n"]:
            found = torch.zeros(n, dtype=torch.float64)
            for token in self._tokens(sequence).tolist():
                if token in postings:
                    where, much = postings[token]
                    found[where] += much
            return found

        return row

    def _tokens(self, sequence: Int[Tensor, " t"]) -> Int[Tensor, " s"]:
        if not self.ignore:
            return sequence
        return sequence[~torch.isin(sequence, torch.tensor(self.ignore))]


def _idf(n: int, holding: int) -> float:
    return math.log(1 + (n - holding + 0.5) / (holding + 0.5))


def _counted(documents: list[Tensor]) -> tuple[Tensor, Tensor, Float[Tensor, " m"]]:
    """(token, document, how often), ordered by token."""
    n = max(1, len(documents))
    pairs = [document.long() * n + i for i, document in enumerate(documents)]  # sorts as one number
    keys, counts = torch.cat(pairs).unique(return_counts=True)  # type: ignore[no-untyped-call]
    token = keys.div(n, rounding_mode="floor")
    return token, keys - token * n, counts.double()


def token_sequences(data: Data) -> list[Int[Tensor, " t"]]:
    """The tokens of every example, without those that its attention mask leaves out.

    Raises:
        DataError: Inputs are not one integer tensor of tokens `[b, t]`.
    """
    found: list[Tensor] = []
    for _, _, batch in data.batches(data.together(4096)):
        first = batch.get("input_ids") if isinstance(batch, dict) else inputs(batch)
        if not isinstance(first, Tensor) or first.ndim != 2 or first.is_floating_point():
            given = type(first).__name__
            if isinstance(first, Tensor):
                given = f"inputs of shape {tuple(first.shape)} and {first.dtype}"
            raise DataError(
                "BM25 counts tokens: integer inputs [b, t], or a dict with input_ids.",
                f"{given}.",
                "images or features, where nothing is a word.",
                "FeatureSimilarity() or GradientCosine() for such data.",
            )
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        if isinstance(mask, Tensor) and mask.shape == first.shape:
            pairs = zip(first.cpu(), mask.cpu().bool(), strict=True)
            found += [row[kept] for row, kept in pairs]
        else:
            found += list(first.cpu())
    return found
