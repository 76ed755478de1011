"""Methods that look at features in place of gradients: what is near the query?

KNNShapley            the Shapley values of a k-nearest-neighbour classifier, exactly
FeatureSimilarity     the cosine of features
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import DataError, SpecError, UnsupportedModel
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, BlockScorer, Job, Scorer
from upweight.runtime.memory import working_bytes
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Loss
from upweight.task.task import Task

TOGETHER = 16
"""Queries sorted together: n distances of each stay in the cache."""


@dataclass(frozen=True)
class KNNShapley(Method):
    """The Shapley value of each training example for a k-nearest-neighbour classifier.

    The game is the share of the right class among the k nearest of a coalition,

        v(C) = (1/k) Σ_{j ≤ min(k, |C|)} 1[y_{α_j(C)} = y_q]

    whose Shapley values follow from the order α of all n by distance (Jia et al. 2019, Theorem 1):

        s(α_n) = 1[y_{α_n} = y_q] min(k, n)/(n k)
        s(α_i) = s(α_{i+1}) + (1[y_{α_i} = y_q] − 1[y_{α_{i+1}} = y_q]) min(k, i)/(i k)

    S = −s, so that as with a loss S > 0 is harm, and the columns of a row add up to −v(D), the
    accuracy of the classifier. No training, no gradients; the model gives the features only.

    Args:
        k: Neighbours that vote.
        layer: The module whose outputs are the features; None: the inputs as they are. Distances
            are Euclidean; equal ones are in the order of the data.

    Raises:
        SpecError: k is not positive, the model has no such layer, or a measure is asked for.
        DataError: The targets are no classes, or features are not one tensor with a row an example.

    Cost: a forward pass if there is a layer, then q n (d + log n); memory for n features and for a
    few rows of n values.

    Exact: always, to rounding. Known failure: it values an example for this classifier, not for the
    model that was trained.
    """

    k: int = 5
    layer: str | None = None

    unit = Unit.VALUE

    def __post_init__(self) -> None:
        if self.k < 1:
            raise SpecError(
                "A vote needs k ≥ 1 neighbours.",
                f"k={self.k!r}.",
                "a number that was computed from few data.",
                "KNNShapley(k=5).",
            )

    def prepare(self, fitting: Fitting) -> Scorer:
        features = features_of(fitting.task, fitting.theta, fitting.data, self.layer)
        labels = classes(fitting.task, fitting.theta, fitting.data)
        return _Neighbours(self, fitting, features, features.square().sum(dim=1), labels)


@dataclass(frozen=True, eq=False)
class _Neighbours(Scorer):
    spec: KNNShapley
    fitting: Fitting
    features: Float[Tensor, "n d"]
    squares: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    notes: tuple[str, ...] = ()

    def jobs(self, asked: Asked) -> Iterator[Job]:
        if not isinstance(asked.measure, Loss) or asked.queries is None:
            raise SpecError(
                "KNNShapley has a measure of its own: the share of the right class among k.",
                f"measure={asked.measure!r}.",
                "a measure of the trained model, which this method does not look at.",
                "leave the measure out.",
            )
        device, n = self.features.device, len(self.features)
        bytes_ = working_bytes(device, asked.memory_bytes)
        room = max(1, bytes_ // (8 * n * 4))
        for first, queries in asked.groups(min(room, asked.together or room, len(asked))):
            task, theta = self.fitting.task, self.fitting.theta
            found = features_of(task, theta, queries, self.spec.layer)
            yield _Values(first, -self.values(found, classes(task, theta, queries)))

    def values(
        self, features: Float[Tensor, "q d"], labels: Int[Tensor, " q"]
    ) -> Float[Tensor, "q n"]:
        """s of every training example, for each query by itself."""
        n, k = len(self.features), self.spec.k
        place = torch.arange(1, n, dtype=torch.float64, device=features.device)
        factor = place.clamp(max=k) / place / k
        found = torch.empty(len(features), n, dtype=self.features.dtype, device=features.device)
        for start in range(0, len(features), TOGETHER):
            some, right = features[start : start + TOGETHER], labels[start : start + TOGETHER]
            # ‖a − b‖² but for ‖b‖², which is the same for all.
            order = (self.squares - 2 * some @ self.features.T).argsort(dim=1, stable=True)
            match = (self.labels[order] == right[:, None]).double()
            steps = torch.empty_like(match)
            steps[:, -1] = match[:, -1] * (min(k, n) / (n * k))
            steps[:, :-1] = (match[:, :-1] - match[:, 1:]) * factor
            sums = steps.flip(1).cumsum(dim=1).flip(1)
            found[start : start + TOGETHER].scatter_(1, order, sums.to(found.dtype))
        return found


@dataclass(frozen=True, eq=False)
class _Values(Job):
    first: int
    values: Float[Tensor, "q n"]

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return int(self.values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    def block(self, start: int, stop: int) -> Float[Tensor, "q b"]:
        return self.values[:, start:stop]


@dataclass(frozen=True)
class FeatureSimilarity(Method):
    """S[q, i] = −cos(h(x_q), h(xᵢ)): whose features are alike, whatever their labels.

    The sign is that of an example of the same label on a loss. The baseline of Hanawa et al.
    (2021), §3; it looks at no label, loss or measure.

    Args:
        layer: The module whose outputs are the features h; None: the inputs as they are.

    Cost: a forward pass if there is a layer, and q n d; 0 where features are 0.
    """

    layer: str | None = None

    unit = Unit.RANK

    def prepare(self, fitting: Fitting) -> Scorer:
        task, theta = fitting.task, fitting.theta

        def directions(data: Data) -> Float[Tensor, "b d"]:
            found = features_of(task, theta, data, self.layer)
            norms = found.norm(dim=1, keepdim=True)
            return found / torch.where(norms > 0, norms, 1)

        train = directions(fitting.data)
        asked = _Last(directions)

        def score(queries: Data, measure: Any, start: int, stop: int) -> Tensor:
            return -asked(queries) @ train[start:stop].T

        return BlockScorer(score, diagonal=lambda: -(train * train).sum(dim=1))


@dataclass(eq=False)
class _Last:
    """A function of queries, remembered while blocks of the same queries are asked for."""

    of: Any
    held: tuple[Data, Tensor] | None = field(default=None)

    def __call__(self, queries: Data) -> Tensor:
        if self.held is None or self.held[0] is not queries:
            self.held = queries, self.of(queries)
        return self.held[1]


def features_of(
    task: Task, theta: Float[Tensor, " p"], data: Data, layer: str | None
) -> Float[Tensor, "n d"]:
    """Inputs, or what a module of the model puts out, one row an example.

    Raises:
        SpecError: The model has no such module.
        DataError: They are not one tensor with a row an example, or hold NaN.
    """
    parts = []
    for _, _, batch in data.batches(data.together(1024)):
        found = inputs(batch) if layer is None else _outputs(task, theta, batch, layer)
        if not isinstance(found, Tensor) or len(found) != len(inputs(batch)):
            raise DataError(
                "Features are one tensor with a row for each example.",
                f"{type(found).__name__} from {'the inputs' if layer is None else layer!r}.",
                "inputs in several parts, or a layer that mixes examples or runs several times.",
                "name a layer that puts out one row an example: KNNShapley(layer='0').",
            )
        parts.append(found.detach().flatten(1))
    every = torch.cat(parts)
    every = every if every.is_floating_point() else every.float()
    if not bool(every.isfinite().all()):
        raise DataError(
            "Features must be finite.",
            f"example {int((~every.isfinite()).any(dim=1).nonzero()[0])} has NaN or infinity.",
            "a missing value, or a layer that overflows.",
            "impute it, or name another layer.",
        )
    return every


def inputs(batch: Any) -> Any:
    """What a model is given first."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def _outputs(task: Task, theta: Float[Tensor, " p"], batch: Any, layer: str) -> Any:
    modules = dict(task.model.named_modules())
    if layer not in modules:
        raise SpecError(
            "Features are the outputs of a module of the model.",
            f"layer={layer!r}.",
            "a name of another model, or of a parameter.",
            f"one of {', '.join(repr(name) for name in list(modules)[1:13]) or 'none'}; "
            "or None for the inputs.",
        )
    seen: list[Any] = []
    handle = modules[layer].register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        with torch.no_grad():
            task.call(theta, task.to_device(batch))
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UnsupportedModel(
            "A layer of features runs once.",
            f"{layer!r} ran {len(seen)} times in a forward pass.",
            "a module that is used at several places, or at none.",
            "name another layer, or None for the inputs.",
        )
    return seen[0]


def classes(task: Task, theta: Float[Tensor, " p"], data: Data) -> Int[Tensor, " n"]:
    """The classes of the examples.

    Raises:
        DataError: The targets are not one class an example.
    """
    parts = []
    for _, _, batch in data.batches(data.together(1024)):
        with torch.no_grad():
            found = task.call(theta, task.to_device(batch))[1]
        if isinstance(found, Tensor) and found.numel() == len(found):
            found = found.flatten()
            whole = not found.is_floating_point() or bool(((found == 0) | (found == 1)).all())
            if whole:
                parts.append(found.long())
                continue
        given = type(found).__name__
        if isinstance(found, Tensor):
            given = f"targets of shape {tuple(found.shape)} and {found.dtype}"
        raise DataError(
            "A vote of neighbours needs one class an example.",
            f"{given}.",
            "a regression, a sequence, or one-hot targets.",
            "integer targets [n]; for numbers ask GradientCosine() or Influence(...).",
        )
    return torch.cat(parts)
