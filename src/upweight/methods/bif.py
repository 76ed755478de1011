"""BIF, the local Bayesian influence function: a covariance over draws of θ around θ̂, no Hessian.

    S[q, i] = −(B/n) Cov(ℓᵢ(θ), m_q(θ)),   θ ~ exp(−B [(1/n) Σᵢ wᵢ ℓᵢ + R] − (γ/2)‖θ − θ̂‖²)

with B = nβ. Kreer, Wu, Adam, Furman & Hoogland (2025), arXiv 2509.26544, whose BIF is −Cov; times
B/n it is ∂E[m_q]/∂wᵢ, since ∂ log p/∂wᵢ = −(B/n)(ℓᵢ − E ℓᵢ). For Gaussian θ with H at θ̂ and m
linear the covariance is gᵢᵀ (BH + γI)⁻¹ ∇m, so that

    S[q, i] = −(1/n) gᵢᵀ (H + λI)⁻¹ ∇m_q,   λ = γ/B

Draws are by stochastic-gradient Langevin dynamics (Welling & Teh 2011), chains starting at θ̂:

    θ ← θ − (ε/2) D [B ∇J_batch + γ(θ − θ̂)] + √(ε D) ξ,   ξ ~ N(0, I)

D = I, or by the root mean square of the gradients in the burn-in (Li et al. 2016) and fixed from
then on, so that the draws keep their distribution without a correction term.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import DtypeError, NotConverged, SpecError
from upweight.gradients.autograd import data_gradient
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import AT_ONCE, Asked, Job, Scorer, Work, not_offered
from upweight.runtime.memory import require_bytes
from upweight.runtime.progress import progress
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Functional, Loss, measured
from upweight.task.task import Task

LOSS = Loss()

MOST_LOST = 100.0
"""B (L(θ) − L(θ̂)) over p at most: of draws from a Gaussian it is ½ in the mean."""


@dataclass(frozen=True)
class BIF(Method):
    """S[q, i] = −(B/n) Cov(ℓᵢ, m_q) over draws around θ̂, the derivative of the posterior mean.

    Args:
        step: ε. The draws' covariance in a direction of curvature h is that of the posterior
            divided by 1 − εA/4, A = Bh + γ; beyond εA = 4 the sampler diverges.
        localization: γ: how strongly draws are held near θ̂. γ/B is what damping λ is elsewhere.
        inverse_temperature: B = nβ; None: n, the posterior itself. The larger, the nearer to θ̂.
        draws: Kept states per chain.
        chains: Independent chains, one after another.
        burn_in: Steps of each chain before the first is kept.
        thinning: Steps between kept states.
        batch: Examples in a gradient; None: all. Noise of small batches widens the distribution.
        rmsprop: Decay of the mean square gradient in the burn-in, by which steps are scaled per
            parameter to a mean of 1; None: all alike.
        floor: Added to the root mean squares there, in units of their mean.
        seed: Of the noise and the batches.

    The provenance has the standard error of a query's scores over chains, relative to their norm
    (it needs two chains or more), and the mean loss that the draws give up.

    Raises:
        SpecError: A number is out of its range.
        NotConverged: A chain diverges.
        DtypeError: Parameters in half precision.

    Exact when: draws → ∞ and ε → 0, of ∂E[m]/∂w; and of influence with λ = γ/B where moreover f is
    linear in θ with squared loss, θ̂ the minimum, and m linear.
    Cost: chains × (burn_in + draws × thinning) gradients of a batch; chains × draws forward passes
    over the training data at fit, and over the queries for each question; chains × draws × (p + n)
    numbers.
    """

    step: float
    localization: float
    inverse_temperature: float | None = None
    draws: int = 100
    chains: int = 4
    burn_in: int = 100
    thinning: int = 10
    batch: int | None = None
    rmsprop: float | None = None
    floor: float = 0.1
    seed: int = 0

    unit = Unit.DERIVATIVE

    def __post_init__(self) -> None:
        positive = self.step > 0 and self.localization >= 0 and self.floor > 0
        positive = positive and (self.inverse_temperature is None or self.inverse_temperature > 0)
        counts = self.draws >= 2 and self.chains >= 1 and self.burn_in >= 0 and self.thinning >= 1
        counts = counts and (self.batch is None or self.batch >= 1)
        scaled = self.rmsprop is None or (0 < self.rmsprop < 1 and self.burn_in >= 1)
        if not (positive and counts and scaled):
            raise SpecError(
                "BIF needs step > 0, localization ≥ 0, inverse_temperature > 0, draws ≥ 2, chains, "
                "thinning and batch ≥ 1, floor > 0, and 0 < rmsprop < 1 with a burn-in for it.",
                f"{self!r}.",
                "a sign slip, or the paper's β in place of nβ.",
                "BIF(step=ε, localization=γ) with the other arguments left out.",
            )

    def prepare(self, fitting: Fitting) -> Scorer:
        task, data, theta = fitting.task, fitting.data, fitting.theta
        losses = fitting.checked_losses()
        if task.layout.dtype.itemsize < 4:
            raise DtypeError(
                "BIF needs parameters in float32 or float64.",
                f"{task.layout.dtype}, whose rounding is larger than the sampler's steps.",
                "a model in half precision.",
                "use model.float().",
            )
        count = self.chains * self.draws
        require_bytes(
            count * (len(theta) * theta.element_size() + 8 * len(data)),
            f"{count} draws of {len(theta)} parameters and of {len(data)} losses",
            theta.device,
            "keep fewer draws: BIF(draws=..., chains=...).",
        )
        inverse = float(len(data) if self.inverse_temperature is None else self.inverse_temperature)
        states, values = [], []
        start = float(losses.double().mean())
        for chain in range(self.chains):
            for theta_t in self._chain(task, data, theta, inverse, chain):
                seen = measured(task, theta_t, data, LOSS)
                excess = inverse * (float(seen.mean()) - start)
                if not excess <= MOST_LOST * len(theta):
                    raise self._diverged(chain, excess, len(theta))
                states.append(theta_t)
                values.append(seen)
        kept = torch.stack(states)
        note = f"{count} draws of θ kept in memory, {kept.nbytes / 2**20:.3g} MiB"
        return DrawsScorer(
            self, task, data, kept, torch.stack(values), inverse, start, notes=(note,)
        )

    def _chain(
        self, task: Task, data: Data, center: Float[Tensor, " p"], inverse: float, chain: int
    ) -> Iterator[Float[Tensor, " p"]]:
        """The kept states of one chain."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + chain)
        theta, n = center.clone(), len(data)
        squares, scale = torch.zeros_like(theta), torch.ones_like(theta)
        steps = self.burn_in + self.draws * self.thinning
        for t, _, _ in progress(((t, t + 1, None) for t in range(steps)), steps, "draws"):
            part = data
            if self.batch is not None and self.batch < n:
                rows = torch.randperm(n, generator=generator)[: self.batch].sort().values
                part = data.subset(rows.tolist())
            mean = data_gradient(task, theta, part, AT_ONCE) / len(part)
            slope = mean + task.penalty.gradient(theta, task.layout)
            if self.rmsprop is not None and t < self.burn_in:
                decay = self.rmsprop
                squares = decay * squares + (1 - decay) * slope.square()
                root = (squares / (1 - decay ** (t + 1))).sqrt()
                root = root + self.floor * root.mean()
                scale = root.mean() / root if bool(root.any()) else torch.ones_like(root)
            noise = torch.randn(len(theta), generator=generator, dtype=torch.float64).to(theta)
            drift = inverse * slope + self.localization * (theta - center)
            theta = theta - 0.5 * self.step * scale * drift + (self.step * scale).sqrt() * noise
            if not bool(theta.isfinite().all()):
                raise self._diverged(chain, float("inf"), len(theta))
            if t >= self.burn_in and (t - self.burn_in + 1) % self.thinning == 0:
                yield theta

    def _diverged(self, chain: int, excess: float, p: int) -> NotConverged:
        return NotConverged(
            "The draws must stay near θ̂.",
            f"chain {chain}, where nβ (L − L̂) is {excess:.3g} with {p} parameters; about half "
            "their number is usual.",
            "a step beyond 4/(nβ h + γ), with h the largest curvature; or noise of small batches.",
            f"a step well below {self.step:g}, a larger localization, or larger batches.",
        )


@dataclass(frozen=True, eq=False)
class DrawsScorer(Scorer):
    """θ and ℓᵢ at every draw."""

    spec: BIF
    task: Task
    train: Data
    states: Float[Tensor, "d p"]
    losses: Float[Tensor, "d n"]
    inverse: float
    start: float
    notes: tuple[str, ...] = ()

    is_quick_of_itself = True

    @property
    def factor(self) -> float:
        """−B/n."""
        return -self.inverse / len(self.train)

    @property
    def dtype(self) -> torch.dtype:
        return self.task.layout.dtype

    def jobs(self, asked: Asked) -> Iterator[Job]:
        if isinstance(asked.measure, Functional) or asked.queries is None:
            raise not_offered("A Functional", "gradients of the model's parameters")
        values = [measured(self.task, state, asked.queries, asked.measure) for state in self.states]
        yield DrawsJob(self, torch.stack(values))

    def self_influence(self) -> Float[Tensor, " n"]:
        centered = self.losses - self.losses.mean(dim=0)
        variance = centered.square().sum(dim=0) / (len(centered) - 1)
        return (self.factor * variance).to(self.dtype)

    def health(self) -> dict[str, Any]:
        excess = self.inverse * (float(self.losses.mean()) - self.start)
        return {
            "damping": self.spec.localization / self.inverse,
            "draws": len(self.states),
            # ½ p for a Gaussian with γ = 0: the estimate of the local learning coefficient.
            "excess_loss": excess,
        }

    def work(self, q: int, memory_bytes: int | None) -> Work:
        spec = self.spec
        steps = spec.chains * (spec.burn_in + spec.draws * spec.thinning)
        return Work(f"{steps} gradients of a batch and {len(self.states)} forward passes")

    def summary(self, records: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
        told = [record for record in records if record is not None]
        if not told:
            return {}, ("one chain: no standard error",) if self.spec.chains == 1 else ()
        return {"standard_error_over_chains": max(told)}, ()


@dataclass(eq=False)
class DrawsJob(Job):
    """m of every query at every draw."""

    scorer: DrawsScorer
    values: Float[Tensor, "d q"]
    first: int = 0
    at_once: int = AT_ONCE
    _errors: Tensor = field(init=False)
    _sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = self.values - self.values.mean(dim=0)
        self._errors = torch.zeros(len(self), dtype=torch.float64, device=self.values.device)
        self._sizes = self._errors.clone()

    def __len__(self) -> int:
        return self.values.shape[1]

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        scorer, chains = self.scorer, self.scorer.spec.chains
        losses = scorer.losses[:, start:stop]
        losses = losses - losses.mean(dim=0)
        d = len(losses)
        # Each chain's own covariance around the mean of all.
        each = torch.einsum(
            "cdq,cdb->cqb",
            self.values.reshape(chains, d // chains, -1),
            losses.reshape(chains, d // chains, -1),
        ) * (scorer.factor * chains / (d - 1))
        found = each.mean(dim=0)
        if chains > 1:
            self._errors += each.var(dim=0).sum(dim=1) / chains
            self._sizes += found.square().sum(dim=1)
        return found.to(scorer.dtype)

    @property
    def record(self) -> float | None:
        """The largest of the queries' standard errors, ‖SE‖/‖S‖."""
        some = self._sizes > 0
        if self.scorer.spec.chains == 1 or not bool(some.any()):
            return None
        return float((self._errors[some] / self._sizes[some]).sqrt().max())
