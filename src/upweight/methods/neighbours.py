"""Methods that look at features in place of gradients: what is near the query?

KNNShapley            the Shapley values of k nearest neighbours, exactly
FeatureSimilarity     the cosine of features
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from upweight.errors import DataError, SpecError, UnsupportedModel
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.scorer import Asked, BlockScorer, Job, Known, Scorer
from upweight.runtime.memory import working_bytes
from upweight.scores import Unit
from upweight.task.data import Data
from upweight.task.measures import Loss
from upweight.task.task import Task

TOGETHER = 16
"""Queries sorted together, of data whose distances stay in the cache: n × 16 ≤ `CACHED`."""

CACHED = 1_000_000

PLACES = 2**32
"""A distance and a place share an int64 while there are fewer places than this."""


@dataclass(frozen=True)
class KNNShapley(Method):
    """The Shapley value of each training example for k nearest neighbours.

    The game of classes is the share of the right class among the k nearest of a coalition, that of
    numbers the negative squared error of their mean,

        v(C) = (1/k) Σ_{j ≤ min(k, |C|)} z_j          z_j = a_j 1[y_{α_j(C)} = y_q]
        v(C) = −((1/k) Σ_{j ≤ min(k, |C|)} z_j − y_q)²   z_j = a_j y_{α_j(C)}

    with votes a_j = 1, or exp(−d_j²/(2 h²)) at distance d_j. The values follow from the order α of
    all n by distance: of classes (Jia et al. 2019, Theorem 1, with z for the indicator)

        s(α_n) = z_n min(k, n)/(n k)
        s(α_i) = s(α_{i+1}) + (z_i − z_{i+1}) min(k, i)/(i k)

    and of numbers (their Theorem 6, as sums that take n steps)

        s(α_n) = −(z_n M/(k n)) (z_n/k − 2 y_q + (M − 1) z̄/k)      z̄ of the others, M = min(k, n)
        s(α_i) = s(α_{i+1}) + (z_{i+1} − z_i)/k · (((z_i + z_{i+1})/k − 2 y_q) min(k, i)/i
                 + (2/k) (c_i Σ_{j < i} z_j + Σ_{j > i+1} c_{j−1} z_j))
        c_i    = min(k − 1, i − 1) min(k, i)/(2 i (i − 1)),  c_1 = 0

    S = −s, so that as with a loss S > 0 is harm, and a row adds up to −(v(D) − v(∅)): v(D) is the
    accuracy of the classifier, and v(∅) = 0 or, of numbers, −y_q² (subtract their mean first). No
    training, no gradients; the model gives the features only.

    Args:
        k: Neighbours that vote.
        layer: The module whose outputs are the features; None: the inputs as they are. Distances
            are Euclidean; equal ones are in the order of the data.
        target: Whether targets are a "class" or a "number".
        bandwidth: h of votes that fall with the distance; None: all votes count alike. They are not
            divided by their sum, or no closed form of O(n log n) would be known.

    Raises:
        SpecError: k or the bandwidth is not positive, there is no such target, the model has no
            such layer, or a measure is asked for.
        DataError: The targets are no classes or no numbers, or features are not one tensor with a
            row an example.

    Cost: a forward pass if there is a layer, then q n (d + log n); memory for n features and for a
    few rows of n values. On a CPU distances in float32 are sorted several times faster.

    Exact: always, to rounding. Known failure: it values an example for this classifier, not for the
    model that was trained.
    """

    k: int = 5
    layer: str | None = None
    target: Literal["class", "number"] = "class"
    bandwidth: float | None = None

    unit = Unit.VALUE

    def __post_init__(self) -> None:
        if self.k < 1:
            raise SpecError(
                "A vote needs k ≥ 1 neighbours.",
                f"k={self.k!r}.",
                "a number that was computed from few data.",
                "KNNShapley(k=5).",
            )
        if self.target not in ("class", "number"):
            raise SpecError(
                "Neighbours vote for a class, or a number is predicted by their mean.",
                f"target={self.target!r}.",
                "another word for one of the two.",
                'KNNShapley(target="class") or KNNShapley(target="number").',
            )
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise SpecError(
                "Votes fall with the distance over a bandwidth h > 0.",
                f"bandwidth={self.bandwidth!r}.",
                "a median distance of data that are all alike.",
                "a typical distance to the k-th neighbour, or None for votes that count alike.",
            )

    def prepare(self, fitting: Fitting) -> Scorer:
        features = features_of(fitting.task, fitting.theta, fitting.data, self.layer)
        read = classes if self.target == "class" else numbers
        targets = read(fitting.task, fitting.theta, fitting.data)
        return _Neighbours(self, fitting, features, features.square().sum(dim=1), targets)


@dataclass(frozen=True, eq=False)
class _Neighbours(Scorer):
    spec: KNNShapley
    fitting: Fitting
    features: Float[Tensor, "n d"]
    squares: Float[Tensor, " n"]
    targets: Shaped[Tensor, " n"]
    notes: tuple[str, ...] = ()

    def jobs(self, asked: Asked) -> Iterator[Job]:
        if not isinstance(asked.measure, Loss) or asked.queries is None:
            raise SpecError(
                "KNNShapley has a measure of its own: the share of the right class among k, or "
                "the squared error of their mean.",
                f"measure={asked.measure!r}.",
                "a measure of the trained model, which this method does not look at.",
                "leave the measure out.",
            )
        device, n = self.features.device, len(self.features)
        bytes_ = working_bytes(device, asked.memory_bytes)
        room = max(1, bytes_ // (8 * n * 4))
        read = classes if self.spec.target == "class" else numbers
        for first, queries in asked.groups(min(room, asked.together or room, len(asked))):
            task, theta = self.fitting.task, self.fitting.theta
            found = features_of(task, theta, queries, self.spec.layer)
            values, total = self.values(found, read(task, theta, queries))
            yield Known(-values, first, n, -total)

    def values(
        self, features: Float[Tensor, "q d"], targets: Shaped[Tensor, " q"]
    ) -> tuple[Float[Tensor, "q n"], Float[Tensor, " q"]]:
        """s of every training example for each query by itself, and v(D) − v(∅)."""
        n, k = len(self.features), self.spec.k
        found = torch.empty(len(features), n, dtype=self.features.dtype, device=features.device)
        totals = []
        by_class = self.spec.target == "class"
        at_once = max(1, min(TOGETHER, CACHED // n))
        for start in range(0, len(features), at_once):
            some, asked = features[start : start + at_once], targets[start : start + at_once, None]
            # ‖a − b‖² but for ‖a‖², which is the same for all.
            nearness = torch.addmm(self.squares, some, self.features.T, alpha=-2)
            order = ordered(nearness)
            z = self.targets[order]
            z = (z == asked).double() if by_class else z.double()
            if self.spec.bandwidth is not None:
                squares = nearness.double() + some.double().square().sum(dim=1, keepdim=True)
                exponent = squares.clamp(min=0).gather(1, order) / (2 * self.spec.bandwidth**2)
                z = z * exponent.neg().exp()
            steps = _of_classes(z, k) if by_class else _of_numbers(z, asked.double(), k)
            sums = steps.flip(1).cumsum(dim=1).flip(1)
            found[start : start + at_once].scatter_(1, order, sums.to(found.dtype))
            mean = z[:, :k].sum(dim=1) / k
            y = asked[:, 0].double()
            totals.append(mean if by_class else y.square() - (mean - y).square())
        return found, torch.cat(totals)


def _of_classes(z: Float[Tensor, "q n"], k: int) -> Float[Tensor, "q n"]:
    """s(α_i) − s(α_{i+1}), and s(α_n) in the last place."""
    n = z.shape[1]
    place = torch.arange(1, n, dtype=z.dtype, device=z.device)
    steps = torch.empty_like(z)
    steps[:, -1] = z[:, -1] * (min(k, n) / (n * k))
    torch.sub(z[:, :-1], z[:, 1:], out=steps[:, :-1])
    steps[:, :-1] *= place.clamp(max=k) / place / k
    return steps


def _of_numbers(z: Float[Tensor, "q n"], y: Float[Tensor, "q 1"], k: int) -> Float[Tensor, "q n"]:
    """The same of numbers."""
    n = z.shape[1]
    place = torch.arange(1, n + 1, dtype=z.dtype, device=z.device)
    pairs = (place - 1).clamp(max=k - 1) * place.clamp(max=k)
    pairs[1:] /= 2 * place[1:] * (place[1:] - 1)  # c_i
    before = z.cumsum(dim=1) - z
    after = torch.zeros_like(z)  # Σ_{j > i+1} c_{j−1} z_j
    after[:, :-2] = (z[:, 2:] * pairs[1:-1]).flip(1).cumsum(dim=1).flip(1)
    near, far = z[:, :-1], z[:, 1:]
    shares = (place.clamp(max=k) / place)[:-1]
    others = 2 / k * (pairs * before + after)[:, :-1]
    steps = torch.empty_like(z)
    steps[:, :-1] = (far - near) / k * (((near + far) / k - 2 * y) * shares + others)
    m, last = min(k, n), z[:, -1]
    mean = before[:, -1] / max(1, n - 1)
    steps[:, -1] = -last * m / (k * n) * (last / k - 2 * y[:, 0] + (m - 1) * mean / k)
    return steps


def ordered(nearness: Float[Tensor, "q n"]) -> Int[Tensor, "q n"]:
    """Places by rising value, equal ones in their order: a stable argsort of finite numbers.

    NumPy sorts by vector instructions, several times as fast as PyTorch: of float32 the bits of a
    value and its place as one int64; of float64 the values, and rows with equal ones again.
    """
    n = nearness.shape[1]
    on_cpu = nearness.device.type == "cpu" and n < PLACES
    if on_cpu and nearness.dtype == torch.float64:
        order = torch.from_numpy(nearness.numpy().argsort(axis=1))
        values = nearness.gather(1, order)
        tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
        if bool(tied.any()):  # whose order may be any
            order[tied] = nearness[tied].argsort(dim=1, stable=True)
        return order
    if not on_cpu or nearness.dtype != torch.float32:
        return nearness.argsort(dim=1, stable=True)
    bits = (nearness + 0.0).view(torch.int32)  # −0.0 is 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative floats fall as their bits rise
    keys = bits.long().mul_(PLACES).add_(torch.arange(n))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(PLACES - 1)


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
    for start, stop, batch in data.batches(data.together(1024)):
        found = inputs(batch) if layer is None else _outputs(task, theta, batch, layer)
        if not isinstance(found, Tensor) or len(found) != stop - start:
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
            'integer targets [n]; for numbers KNNShapley(target="number").',
        )
    return torch.cat(parts)


def numbers(task: Task, theta: Float[Tensor, " p"], data: Data) -> Float[Tensor, " n"]:
    """The targets, one finite number an example; a DataError where they are not."""
    parts = []
    for _, _, batch in data.batches(data.together(1024)):
        with torch.no_grad():
            found = task.call(theta, task.to_device(batch))[1]
        one = isinstance(found, Tensor) and found.numel() == len(found)
        if not one or not bool(found.isfinite().all()):
            given = f"targets of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise DataError(
                "The mean of neighbours needs one finite number an example.",
                f"{given or type(found).__name__}{', some NaN or infinite' if one else ''}.",
                "several targets, classes by name, or a missing value.",
                "targets [n] or [n, 1]; ask one column at a time, and impute what is missing.",
            )
        parts.append(found.flatten().double())
    return torch.cat(parts)
