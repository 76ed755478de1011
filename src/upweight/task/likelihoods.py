"""Negative log-likelihoods of generalized linear models in η, for any variance and link.

    ℓ(η, y) = −∫ (y − t)/V(t) dt at μ(η)      the log-likelihood times −φ, less terms without η
    u = −∂ℓ/∂η = (y − μ) μ'/V                 the score
    I = μ'²/V                                 expected information
    O = I − (y − μ)(μ''/V − μ'² V'/V²)        observed information ∂²ℓ/∂η²; I of a canonical link

    variance              V                  distributions
    "power"               μᵖ                 normal 0, Poisson 1, Tweedie 1 < p < 2, Gamma 2,
                                             inverse Gaussian 3
    "negative binomial"   μ + α μ²           α fixed
    "binomial"            μ (1 − μ)          y a share of successes

Removals use O, which is the Hessian; standard errors by iteratively reweighted least squares use I.
McCullagh & Nelder (1989), §2.5 and §9.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.errors import DataError, SpecError
from upweight.task.losses import Bernoulli, Loss, Poisson, SquaredError
from upweight.task.targets import require_range, require_same_shape, require_tensor

Variance = Literal["power", "negative binomial", "binomial"]

LINKS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "identity": lambda eta: (eta, torch.ones_like(eta), torch.zeros_like(eta)),
    "log": lambda eta: (eta.exp(), eta.exp(), eta.exp()),
    "inverse": lambda eta: (1 / eta, -(eta**-2), 2 * eta**-3),
    "inverse squared": lambda eta: (eta**-0.5, -0.5 * eta**-1.5, 0.75 * eta**-2.5),
    "sqrt": lambda eta: (eta**2, 2 * eta, torch.full_like(eta, 2.0)),
}
"""μ, μ' and μ'' as functions of η, by the name of the link."""

BINOMIAL_LINKS = ("probit", "cloglog", "log")

CONVEX = {
    ("power", 1.0): {"identity", "log", "sqrt"},
    ("power", 2.0): {"log", "inverse"},
    ("power", 3.0): {"inverse squared"},
    ("negative binomial", 0.0): {"log"},
    ("binomial", 0.0): {"probit", "cloglog"},
}


@dataclass(frozen=True)
class Likelihood(Loss):
    """ℓ of one variance function and link, as above; outputs and targets `[b, ...]` alike.

    Args:
        variance: "power", "negative binomial" or "binomial".
        link: "identity", "log", "inverse", "inverse squared" or "sqrt"; of "binomial" "probit",
            "cloglog" or "log" (for the logit use `Bernoulli()`).
        parameter: The power p, or α; 0 of "binomial".

    Raises:
        SpecError: There is no such variance or link, or no distribution with such a parameter.
    """

    variance: Variance
    link: str
    parameter: float = 0.0

    def __post_init__(self) -> None:
        p, binomial = self.parameter, self.variance == "binomial"
        links = BINOMIAL_LINKS if binomial else tuple(LINKS)
        fine = {
            "power": p == 0 or p >= 1,
            "negative binomial": p > 0,
            "binomial": p == 0,
        }
        if self.link not in links or not fine.get(self.variance, False):
            raise SpecError(
                "Likelihood takes a variance, one of its links, and a power of 0 or at least 1, "
                "or an α above 0.",
                f"{self!r}.",
                "a quasi-likelihood, or a link that has no formula here.",
                "Likelihood('power', 'log', 2.0) is Gamma with a log link; for others write ℓ as "
                "a function (outputs, targets) -> [b].",
            )

    @property
    def convex(self) -> bool:  # type: ignore[override]
        key = (self.variance, self.parameter if self.variance == "power" else 0.0)
        tweedie = self.variance == "power" and 1 < self.parameter < 2 and self.link == "log"
        return tweedie or self.link in CONVEX.get(key, set())

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        require_same_shape("Likelihood", outputs, targets)
        self.possible(targets)

    def possible(self, targets: Tensor) -> None:
        """Refuse responses that the distribution does not have.

        Raises:
            DataError: With some of them.
        """
        valid, required = self._valid(targets)
        require_range(f"Likelihood {self.variance}", targets, valid, required)

    def _valid(self, y: Tensor) -> tuple[Tensor, str]:
        if self.variance == "binomial":
            return (y >= 0) & (y <= 1), "that are shares, between 0 and 1"
        if self.variance == "power" and self.parameter >= 2:
            return y > 0, "above 0"
        if self.variance == "power" and self.parameter == 0:
            return y.isfinite(), "that are finite"
        return y >= 0, "of at least 0"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return self._values(outputs, targets).reshape(len(outputs), -1).sum(dim=1)

    def _values(self, eta: Tensor, y: Tensor) -> Tensor:
        p = self.parameter
        if self.variance == "binomial":
            yes, no = self._logarithms(eta)
            return -(y * yes + (1 - y) * no)
        mu = LINKS[self.link](eta)[0]
        log = eta if self.link == "log" else mu.log()
        if self.variance == "negative binomial":
            return (y + 1 / p) * torch.log1p(p * mu) - y * log
        if p == 1:
            return mu - y * log
        if p == 2:
            return y / mu + log
        return mu ** (2 - p) / (2 - p) - y * mu ** (1 - p) / (1 - p)

    def _logarithms(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """log μ and log (1 − μ)."""
        if self.link == "probit":
            return _log_ndtr(eta), _log_ndtr(-eta)
        if self.link == "log":
            return eta, torch.log(-torch.expm1(eta))
        return torch.log(-torch.expm1(-eta.exp())), -eta.exp()

    def mean(self, eta: Tensor) -> Tensor:
        """μ(η)."""
        return (
            self._logarithms(eta)[0].exp()
            if self.variance == "binomial"
            else LINKS[self.link](eta)[0]
        )

    def moments(self, eta: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, O and I, of the shape of η; differentiable."""
        if self.variance == "binomial":
            (a, a1), (b, b1) = self._slopes_of_logarithms(eta)
            return y * a + (1 - y) * b, -(y * a1 + (1 - y) * b1), -a * b
        mu, first, second = LINKS[self.link](eta)
        if self.variance == "power":
            v, slope = mu**self.parameter, self.parameter * mu ** (self.parameter - 1)
        else:
            v, slope = mu + self.parameter * mu**2, 1 + 2 * self.parameter * mu
        expected = first**2 / v
        observed = expected - (y - mu) * (second / v - first**2 * slope / v**2)
        return (y - mu) * first / v, observed, expected

    def _slopes_of_logarithms(
        self, eta: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """First and second derivatives of log μ and log (1 − μ); products of neither underflow."""
        if self.link == "probit":
            log_density = -0.5 * eta**2 - 0.9189385332046727
            a, b = ((log_density - _log_ndtr(x)).exp() for x in (eta, -eta))
            return (a, -a * (eta + a)), (-b, -b * (b - eta))
        if self.link == "log":
            b = -torch.exp(eta) / -torch.expm1(eta)
            return (torch.ones_like(eta), torch.zeros_like(eta)), (b, b * (1 - b))
        rate = eta.exp()
        a = rate / torch.expm1(rate)
        return (a, a * (1 - rate - a)), (-rate, -rate)

    def gradient(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c"]:
        return -self.moments(outputs, targets)[0].reshape(len(outputs), -1)

    def hessian(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c c"]:
        return torch.diag_embed(self.moments(outputs, targets)[1].reshape(len(outputs), -1))

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        """Of "binomial" and "negative binomial"; the others have a dispersion beside η."""
        if self.variance == "power":
            return super().log_prob(outputs, targets)
        constant = torch.zeros_like(outputs)
        if self.variance == "negative binomial":
            y, size = targets.to(outputs), torch.tensor(1 / self.parameter).to(outputs)
            constant = torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1)
            constant = constant + y * torch.log(1 / size)
        return constant.reshape(len(outputs), -1).sum(dim=1) - self(outputs, targets)

    def margin(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        """Of "binomial": log μ − log (1 − μ), with its sign by the target."""
        if self.variance != "binomial":
            return super().margin(outputs, targets)
        yes, no = self._logarithms(outputs)
        return ((2 * targets.to(outputs) - 1) * (yes - no)).reshape(len(outputs), -1).sum(dim=1)


@dataclass(frozen=True)
class DispersedCounts(Loss):
    """−log p of a negative binomial with a log link and an α of its own parameter.

        ℓ = (y + 1/α) log(1 + α eᶯ) − y (η + log α) − log Γ(y + 1/α) + log Γ(1/α) + log y!

    Outputs `[b, 2]` are (η, α), of `DispersedLinear`; targets `[b, 1]` are counts. Its Hessian in
    (β, α) is that of statsmodels' `NegativeBinomial`.
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        require_tensor("DispersedCounts", targets)
        if outputs.shape[1:] != (2,) or targets.shape != (len(outputs), 1):
            raise DataError(
                "DispersedCounts needs outputs [b, 2], η and α, and targets [b, 1].",
                f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}.",
                "another model.",
                "use it with DispersedLinear.",
            )
        require_range("DispersedCounts", targets, targets >= 0, "that are counts, at least 0")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        eta, alpha = outputs[:, 0], outputs[:, 1]
        y, size = targets[:, 0], 1 / alpha
        constant = torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1)
        mean = alpha * eta.exp()
        return (y + size) * torch.log1p(mean) - y * (eta + alpha.log()) - constant

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " b"]:
        return -self(outputs, targets)


class DispersedLinear(nn.Module):
    """(η, α) of each row: η = x W, and the same α for all."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, columns, dtype=torch.float64))
        self.alpha = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        eta = x @ self.weight.T
        return torch.cat([eta, self.alpha.expand_as(eta)], dim=1)


def _log_ndtr(x: Tensor) -> Tensor:
    """log Φ; torch.special.log_ndtr has no rule for vmap."""
    below, above = x.clamp(max=0) * -(0.5**0.5), x.clamp(min=0) * 0.5**0.5
    tail = torch.log(torch.special.erfcx(below) / 2) - below**2
    return torch.where(x < 0, tail, torch.log1p(-torch.special.erfc(above) / 2))


def moments(loss: Loss, eta: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, O and I of `SquaredError()`, `Bernoulli()`, `Poisson()` or a `Likelihood`."""
    if isinstance(loss, Likelihood):
        return loss.moments(eta, y)
    if isinstance(loss, SquaredError):
        return y - eta, torch.ones_like(eta), torch.ones_like(eta)
    if isinstance(loss, Bernoulli):
        yes, no = torch.sigmoid(eta), torch.sigmoid(-eta)  # 1 − yes would lose its digits
        return y * no - (1 - y) * yes, yes * no, yes * no
    assert isinstance(loss, Poisson)
    mean = eta.exp()
    return y - mean, mean, mean
