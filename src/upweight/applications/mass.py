"""The attribution mass in a region as a measure of θ: who makes the model look there?"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.applications.attributions import Attribution
from upweight.applications.explained import Followed
from upweight.applications.maps import METHODS, attribution, baseline_of, region_of
from upweight.errors import SpecError
from upweight.methods.perturbation import input_of
from upweight.runtime.fingerprint import checksum, described
from upweight.task.batches import mapped
from upweight.task.measures import Functional, Logit, Measure, as_measure
from upweight.task.task import Task


@dataclass(frozen=True, eq=False, repr=False)
class Mass(Measure):
    """m(θ; q) = Σ_region of the map of query q: `attribute` says who makes the model look there.

        S[q, i] = ∂/∂wᵢ Σ_{j ∈ region} a_j(f_c, x_q)

    Args:
        method: As for `output`, of those that ask for values and gradients alone: gradients,
            integrated gradients, SmoothGrad, deletion, additive.
        region: Which entries of an input, `[*x]` of bool.
        share: The mass of |a| in the region as a share of all of it, in place of the signed sum.
        target, baseline, input: As for `output`.

    Raises:
        SpecError: The method sets hooks or fits a model, of which no derivative in θ is taken.
        ShapeError: The region is not of the input's shape.

    By layer (EK-FAC, K-FAC): ask its `.functional`.

    Exact when: as any measure; a map by gradients of a network of rectifiers is piecewise, and its
    derivative leaves the kinks out.
    """

    method: str | Attribution | type
    region: Any
    share: bool = False
    target: int | Callable[..., Tensor] | None = None
    baseline: float | Tensor = 0.0
    input: int | str = 0

    def __post_init__(self) -> None:
        chosen = attribution(self.method)
        if not chosen.follows:
            raise SpecError(
                "The mass of a map is a measure where the map is made of values and gradients.",
                f"{chosen.name!r}, which sets hooks or fits a model of its own.",
                "a method whose derivative in θ nobody takes.",
                f"one of {', '.join(repr(k) for k, v in METHODS.items() if v.follows)}; of one "
                "training example score(fitted, queries, example, method).mass(region).",
            )

    def __repr__(self) -> str:
        region = torch.as_tensor(self.region)
        baseline = self.baseline
        if not isinstance(baseline, int | float):
            baseline = f"#{checksum(torch.as_tensor(baseline)):x}"  # type: ignore[assignment]
        return (
            f"Mass({self._chosen!r}, region=#{checksum(region.contiguous()):x}, "
            f"share={self.share}, target={described(self.target)}, baseline={baseline}, "
            f"input={self.input!r})"
        )

    @functools.cached_property
    def _chosen(self) -> Attribution:
        return attribution(self.method)

    @property
    def functional(self) -> Functional:
        """The same of all queries together, for methods by layer such as EK-FAC.

        Their gradients are taken at the layers in one backward pass, which a map by gradients is
        not: `fitted.attribute(queries, mass.functional)` takes them of all of θ, q × p numbers.
        """
        return Functional(_OfAll(self))

    def __call__(self, task: Task, params: Params, batch: Batch) -> Float[Tensor, " q"]:
        target, method = self.target, self._chosen
        measure = as_measure(target) if callable(target) else Logit(target)
        x = input_of(batch, self.input)
        region = region_of(self.region, x.shape[1:]).to(x.device)
        found = []
        for k in range(len(x)):
            example = mapped(functools.partial(_one, k=k), batch)
            m = Followed(task, params, example, self.input, measure)
            xk = x[k : k + 1]
            a = method.finished(method.raw(m, xk, baseline_of(self.baseline, xk)))[0]
            shown = a.abs() / a.abs().sum() if self.share else a
            found.append((shown * region).sum())
        return torch.stack(found)


@dataclass(frozen=True)
class _OfAll:
    """The function of a `Functional`."""

    mass: Mass

    def __call__(self, task: Task, params: Params, queries: Batch, weights: Tensor) -> Tensor:
        return self.mass(task, params, queries)


def _one(value: Any, k: int) -> Any:
    return value[k : k + 1] if isinstance(value, Tensor | list) else value
