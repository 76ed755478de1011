"""Maps of an output or of a score on an input; see `saliency`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upweight._typing import Axes, Batch, DataFrame
from upweight.applications import attributions as own
from upweight.applications import packaged
from upweight.applications.attributions import TCAV, Attribution, shuffled
from upweight.applications.explained import Explained
from upweight.applications.outcome import Outcome, as_table
from upweight.errors import NonFinite, ShapeError, SpecError
from upweight.evaluation import metrics
from upweight.gradients.autograd import total_gradient
from upweight.methods.fitted import Fitted
from upweight.methods.perturbation import input_of
from upweight.notation import percent, readable
from upweight.plot import axes
from upweight.runtime.fingerprint import described
from upweight.runtime.selection import places
from upweight.task.check import checked_losses, checked_measurements, require_answerable
from upweight.task.measures import Logit, Loss, as_measure
from upweight.task.task import Task, require_task

METHODS: dict[str, type[Attribution]] = {
    kind.name: kind
    for kind in (
        own.CAM,
        own.GradCAM,
        own.TCAV,
        packaged.Deconvolution,
        packaged.GuidedBackprop,
        packaged.DeepTaylor,
        packaged.LRP,
        packaged.DeepLIFT,
        own.Deletion,
        own.Additive,
        own.Gradient,
        own.Saliency,
        own.InputXGradient,
        own.IntegratedGradients,
        packaged.LIME,
        packaged.SHAP,
        own.SmoothGrad,
    )
}
"""By the name that `method=` takes."""

STEP = 1e-5
"""‖εu‖ as a share of ‖θ̂‖: errors of ε² and of rounding in float64 are then both far below 1e-8."""

MISSED = 1e-4
"""Share of a score by which its central difference may be off before a note says so."""

ALIKE = 0.5
"""Rank correlation with the map under shuffled weights from which on a note says so."""

COMPLETE = 0.02
"""Share of the total by which a map that should add up may be off before a note says so."""


@dataclass(frozen=True, eq=False)
class Map(Outcome):
    """Maps of a number, one per query.

    Args:
        method: What made them.
        about: What was mapped, in words.
        predicted: The maps `[q, *x]`. A negative entry lowers what was mapped.
        inputs: The inputs `[q, *x]`.
        sums: What the map of each adds up to, before its absolute value or positive part was taken.
        totals: What it would add up to, m(x) − m(x₀); of `LRP` ⟨∂m/∂f, f⟩.
        baseline: x₀, in words.
        randomized: The maps under shuffled upper weights, `[q, *x]`; None of a score, or where
            there are no upper weights.
        alike: Rank correlation of the map with these, per query, where one is not 0.
        doubts: What else to know.
        of_score: Whether a score was mapped.
    """

    method: Attribution
    about: str
    predicted: Float[Tensor, "q *x"] = field(repr=False)
    inputs: Float[Tensor, "q *x"] = field(repr=False)
    sums: Float[Tensor, " q"]
    totals: Float[Tensor, " q"]
    baseline: str
    randomized: Float[Tensor, "q *x"] | None = field(default=None, repr=False)
    alike: tuple[float | None, ...] = ()
    doubts: tuple[str, ...] = ()
    of_score: bool = False
    actual: None = None

    @property
    def values(self) -> Float[Tensor, "q *x"]:
        """The maps."""
        return self.predicted

    @property
    def errors(self) -> Float[Tensor, " q"]:
        """|Σ − total| / |total|: how far a map is from adding up. NaN where total is 0."""
        missed = (self.sums - self.totals).abs()
        return torch.where(self.totals == 0, torch.nan, missed / self.totals.abs())

    def mass(self, region: Bool[Tensor, "*x"]) -> Float[Tensor, " q"]:
        """Σ_region of each map: where `score` made it by a linear method, ∂Mass/∂wᵢ."""
        chosen = region_of(region, self.values.shape[1:]).to(self.values)
        return (self.values * chosen).flatten(1).sum(dim=1)

    @property
    def title(self) -> str:
        return f"{self.method.name} of {self.about}"

    @property
    def verdict(self) -> str:
        q = len(self.values)
        maps, they, add = ("map", "its", "adds") if q == 1 else ("maps", "their", "add")
        said = f"The {self.method.name} {maps} of {self.about}"
        if not self.method.adds_up:
            first, at = "" if q == 1 else " of the first", _largest_at(self.values[0])
            return f"{said}: the largest entry{first} is at {at}; {they} entries need not add up."
        worst = self.errors.nan_to_num(-1.0)
        k = int(worst.argmax())
        if worst[k] < 0:
            return f"{said} {'has' if q == 1 else 'have'} nothing to add up to."
        return (
            f"{said} {add} up to {readable(float(self.sums[k]))} of "
            f"{readable(float(self.totals[k]))}{'' if q == 1 else f' for the worst of {q}'}: "
            f"{percent(float(worst[k]))} off."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        said = [*self.doubts]
        worst = self.errors.nan_to_num(0.0)
        at = int(worst.argmax())
        off = percent(float(worst[at]))
        if self.method.adds_up and worst[at] > COMPLETE:
            steps = "more steps add up better"
            if self.of_score:
                steps += (
                    ", unless the network has rectifiers: its scores jump where one switches, and "
                    "no gradient sees a jump; 'shap' and 'deeplift' do"
                )
            why = {
                "integrated-gradients": steps,
                "lrp": "relevance goes to the biases",
                "deep-taylor": "relevance ends where no weight is positive",
                "deeplift": "an operation is no module that captum knows",
            }.get(self.method.name, "of a method that should add up")
            said.append(f"it misses its total by {off}: {why}")
        if self.method.name == "additive" and worst[at] > COMPLETE:
            said.append(
                f"the terms miss the total by {off}: the model is not additive in these patches, "
                "and no additive model says what it does"
            )
        alike = [each for each in self.alike if each is not None]
        if alike and max(alike) > ALIKE:
            said.append(
                f"with the upper weights shuffled the map is much the same (rank correlation "
                f"{max(alike):.2f}): it shows the input more than what the model learned"
            )
        if self.method.drawn:
            said.append(
                f"its entries are estimates from {self.method.drawn}: another seed= says how far "
                "they may be off"
            )
        if self.method.name in ("guided-backprop", "deconvolution"):
            said.append(
                "it hardly depends on the upper weights (Adebayo et al. 2018; Nie et al. 2018)"
            )
        if self.baseline:
            said.append(f"the baseline is {self.baseline}")
        return tuple(said)

    def frame(self) -> "DataFrame":
        """A row per query: sum, total, error, and where the largest entry is."""
        largest = [_largest_at(each) for each in self.values]
        columns = {"sum": self.sums, "total": self.totals, "error": self.errors}
        return as_table({**{k: v.cpu() for k, v in columns.items()}, "largest_at": largest})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The map of the first query: an image in red (raises) and blue, or a bar per feature."""
        ax = axes(ax)
        first = self.values[0].cpu()
        if first.ndim >= 2:
            image = first.reshape(-1, *first.shape[-2:]).sum(dim=0)
            size = float(image.abs().max()) or 1.0
            ax.imshow(image.numpy(), cmap="RdBu_r", vmin=-size, vmax=size)
            ax.set_axis_off()
        else:
            ax.bar(range(first.numel()), first.reshape(-1).numpy())
            ax.set(xlabel="feature", ylabel=self.about)
        ax.set_title(self.title)
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "method": repr(self.method),
            "about": self.about,
            "shape": self.values.shape,
            **self._fields("sums", "totals", "errors", "alike", "baseline"),
        }


def output(
    task: Task,
    queries: Any,
    method: str | Attribution | type = "integrated-gradients",
    *,
    target: int | Callable[..., Tensor] | None = None,
    baseline: float | Tensor = 0.0,
    input: int | str = 0,
    seed: int | None = 0,
) -> Map:
    """Maps of an output of the model on its input.

    Args:
        task: The model, and how it is called.
        queries: As for `as_data`; of a method by activations all of one shape.
        method: A name of `METHODS`, one of their objects with settings, or a class of
            `captum.attr`.
        target: Which output; None: that of the query's own class. Or a measure, such as `Loss()`.
        baseline: x₀, what a feature has where it is taken away: a number or an input.
        input: Which input, where the model has several: its place or its name.
        seed: Of the shuffle of upper weights whose maps stand beside; None: none do.

    Raises:
        SpecError: There is no such method, or its package is not installed.
        NotOffered, UnsupportedModel: The method is of models of another kind.
        DtypeError: The input is not floating point.
        UpweightError: The queries do not pass the checks of `upweight.task.check`.

    Cost: a map per query and the one beside; the model is copied, in float64.
    """
    require_task(task)
    chosen = attribution(method)
    measure = as_measure(target) if callable(target) else Logit(target)
    data = task.queries(queries)
    probe = require_answerable(task, data, "queries")
    checked_losses(task, data, "queries", probe)
    checked_measurements(task, measure, data)
    theta, rows = task.theta(), []
    for k in range(len(data)):
        example = task.to_device(data.take([k]))
        input_of(example, input)
        m = Explained.at(task, theta, example, input, measure)
        x0 = baseline_of(baseline, m.x)
        raw = _checked(chosen.raw(m, m.x, x0), chosen)
        total = chosen.total(m, m.x, x0)
        beside = None
        upper = None if seed is None else Explained.at(task, theta, example, input, measure)
        if upper is not None and seed is not None and shuffled(upper.model, seed):
            beside = chosen.finished(chosen.raw(upper, m.x, x0))[0]
        rows.append(_Row(m.x[0], raw[0], chosen.finished(raw)[0], total, beside))
    which = "the target's output" if target is None else f"output {target}"
    about = f"{described(target)}" if callable(target) else which
    return _maps(chosen, about, rows, baseline, data.notes)


def score(
    fitted: Fitted,
    queries: Any,
    example: int,
    method: str | Attribution | type = "integrated-gradients",
    *,
    side: Literal["query", "train"] = "query",
    measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    baseline: float | Tensor = 0.0,
    input: int | str = 0,
) -> Map:
    """Maps of the influence score S[q, i] on the test or on the training input.

        side="query":   x ↦ S(x, i) = d/dε m(x; θ̂ + εu),     u = −P gᵢ/n
        side="train":   x ↦ S(q, x) = d/dε ℓ(x, yᵢ; θ̂ + εu), u = −P ∇m_q/n

    By central difference of the maps of two copies of the model in float64, ‖εu‖ = 10⁻⁵ ‖θ̂‖.

    Args:
        fitted: Any method with one P at θ̂, also by layer.
        queries: As for `as_data`: one map each.
        example: i, a training example.
        method: As for `output`.
        side: Which of both inputs the map is on.
        measure: As for `Fitted.attribute`.
        baseline: As for `output`, of the example that the map is on.
        input: As for `output`.

    Returns:
        Maps; a positive entry raises S, the effect of more weight of i on m_q. Where the method is
        not linear in m they are ∂map/∂wᵢ.

    Raises:
        NotOffered: The method has no movement of the parameters.
        UpweightError: As for `output`.

    Exact when: up to O(ε²) where m is smooth in θ. On a network of rectifiers a step over a kink is
    an error, which is measured on the score itself and noted.
    Cost: one solve (on the training side one per query), and two maps per query.
    """
    if side not in ("query", "train"):
        raise SpecError(
            "A map of a score is on the query's input or on the training example's.",
            f"side={side!r}.",
            "another word for one of them.",
            'side="query" or side="train".',
        )
    if not isinstance(fitted, Fitted):
        raise SpecError(
            "A score is of a fitted method.",
            f"a {type(fitted).__module__}.{type(fitted).__qualname__}.",
            "a task or scores in its place.",
            "fitted = uw.Influence(uw.Hessian()).fit(task, train); of an output: output(task, …).",
        )
    chosen, measure = attribution(method), as_measure(measure)
    task, theta, n = fitted.task, fitted.theta, len(fitted.train)
    i = _one_of(example, n)
    moved = task.layout.flatten(fitted.parameter_influence(i)) / n
    data = task.queries(queries)
    probe = require_answerable(task, data, "queries")
    checked_losses(task, data, "queries", probe)
    checked_measurements(task, measure, data)
    rows, doubts = [], list(data.notes)
    for k in range(len(data)):
        query = task.to_device(data.take([k]))
        if side == "query":
            on, m, u = query, measure, moved
        else:
            on, m = task.to_device(fitted.train.take([i])), Loss()
            gradient = _gradient(task, theta, query, measure)
            u = -fitted.scorer.solve(gradient[None].to(theta))[0] / n
        input_of(on, input)
        row, missed = _of_score(task, theta, u, on, input, m, chosen, baseline)
        rows.append(row)
        if missed > MISSED:
            doubts.append(
                f"query {k}: the score by central difference is {percent(missed)} off its "
                "derivative, a step over a kink: its map is as rough"
            )
    if not chosen.is_linear:
        doubts.append("it is ∂map/∂w: the method is not linear in what it maps")
    where = "query" if side == "query" else "training"
    about = f"the score of example {i} in the {where} input"
    return _maps(chosen, about, rows, baseline, tuple(doubts), of_score=True)


# -- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Row:
    """Of one query: input, raw and finished map, total, and the map beside."""

    x: Tensor
    raw: Tensor
    values: Tensor
    total: Tensor
    beside: Tensor | None = None


def _maps(
    method: Attribution,
    about: str,
    rows: Iterable[_Row],
    baseline: float | Tensor,
    doubts: tuple[str, ...],
    of_score: bool = False,
) -> Map:
    rows = list(rows)
    besides = [row.beside for row in rows if row.beside is not None]
    uses = method.adds_up or method.name in ("input-x-gradient", "deletion", "lime", "additive")
    is_number = torch.as_tensor(baseline).ndim == 0
    said = f"{float(baseline):g} everywhere" if is_number else "an input that was given"
    return Map(
        method,
        about,
        torch.stack([row.values for row in rows]),
        torch.stack([row.x for row in rows]),
        torch.stack([row.raw.sum() for row in rows]),
        torch.stack([row.total.detach() for row in rows]),
        said if uses and method.name not in ("lrp", "deep-taylor") else "",
        torch.stack(besides) if besides else None,
        tuple(_alike(row.values, row.beside) for row in rows if row.beside is not None),
        tuple(dict.fromkeys(doubts)),
        of_score,
    )


def _of_score(
    task: Task,
    theta: Tensor,
    u: Tensor,
    example: Batch,
    key: int | str,
    measure: Callable[..., Tensor],
    method: Attribution,
    baseline: float | Tensor,
) -> tuple[_Row, float]:
    """The map of d/dε m(x; θ̂ + εu), and how far its central difference is off at x."""
    theta, u = theta.double(), u.double()
    size = float(u.norm())
    # No movement: the map is 0 whatever the step is.
    step = STEP * (float(theta.norm()) or 1.0) / size if size else 1.0
    raws, totals, values = [], [], []
    for side in (1.0, -1.0):
        m = Explained.at(task, theta + side * step * u, example, key, measure)
        x0 = baseline_of(baseline, m.x)
        raws.append(_checked(method.raw(m, m.x, x0), method))
        totals.append(method.total(m, m.x, x0))
        values.append(m.values(m.x)[0])
    raw, total, value = ((a - b) / (2 * step) for a, b in (raws, totals, values))
    middle = Explained.at(task, theta, example, key, measure)
    exact = float(_gradient(middle.task, theta, middle.example, measure) @ u)
    missed = abs(float(value) - exact) / abs(exact) if exact else 0.0
    return _Row(m.x[0], raw[0], method.finished(raw)[0], total), missed


def _one_of(example: Any, n: int) -> int:
    found = places(example, n, "Training examples", least=1)
    if len(found) > 1:
        raise ShapeError(
            "A map of a score is of one training example.",
            f"{len(found)} of them.",
            "the strongest examples, all at once.",
            "one call for each: [score(fitted, queries, i, method) for i in examples].",
        )
    return found[0]


def _gradient(
    task: Task, theta: Tensor, batch: Batch, measure: Callable[..., Tensor]
) -> Float[Tensor, " p"]:
    """∇m of one query."""
    return total_gradient(task, theta, lambda params: measure(task, params, batch))


def attribution(method: Any) -> Attribution:
    """A method from what the user holds."""
    if isinstance(method, Attribution):
        return method
    if isinstance(method, type) and issubclass(method, Attribution) and method is not TCAV:
        return method()
    if isinstance(method, type) and method.__module__.startswith("captum."):
        return packaged.Captum(method)
    if isinstance(method, str) and method in METHODS and method != TCAV.name:
        return METHODS[method]()
    if method in (TCAV.name, TCAV):
        raise SpecError(
            "A concept is defined by inputs that show it, and others that do not.",
            f"{method!r}.",
            "the name alone.",
            "TCAV(concept=X[is_striped], others=X[~is_striped]).",
        )
    raise SpecError(
        "A map is made by a method: its name, an object with settings, or a class of captum.attr.",
        f"{method!r}.",
        "another spelling, or a function of one's own.",
        f"one of {', '.join(map(repr, METHODS))}; IntegratedGradients(steps=50); or a subclass of "
        "Attribution with raw(m, x, baseline).",
    )


def baseline_of(given: Any, x: Float[Tensor, "1 *x"]) -> Float[Tensor, "1 *x"]:
    """x₀ for an input.

    Raises:
        SpecError: It is no number and no array.
        ShapeError: It is not of the input's shape.
    """
    if isinstance(given, str | bytes) or given is None:
        raise SpecError(
            "A baseline is what a feature has where it is taken away: a number, or an input.",
            f"{given!r}.",
            "the name of a baseline.",
            "baseline=X.mean(dim=0), or baseline=0.0.",
        )
    given = torch.as_tensor(given)
    if given.ndim == 0:
        return torch.full_like(x, float(given))
    if given.shape != x.shape[1:]:
        raise ShapeError(
            f"A baseline is an input: {tuple(x.shape[1:])}, or one number.",
            f"{tuple(given.shape)}.",
            "a batch of baselines, or an image in another order of axes.",
            "baseline=X.mean(dim=0), or baseline=0.0.",
        )
    return given.detach().to(x)[None]


def region_of(region: Any, shape: torch.Size) -> Bool[Tensor, "*x"]:
    """A region of an input of this shape.

    Raises:
        ShapeError: It is of another, or no mask.
    """
    chosen = torch.as_tensor(region)
    if chosen.dtype != torch.bool or chosen.shape != shape:
        raise ShapeError(
            f"A region is True or False for each entry of an input: {tuple(shape)}.",
            f"{tuple(chosen.shape)} of {chosen.dtype}.",
            "indices, or a mask without the channels.",
            f"region = torch.zeros({tuple(shape)}, dtype=torch.bool), and True where it is.",
        )
    return chosen


def _checked(raw: Tensor, method: Attribution) -> Tensor:
    if not bool(raw.isfinite().all()):
        raise NonFinite(
            "Every entry of a map must be finite.",
            f"{int((~raw.isfinite()).sum())} of {raw.numel()} are not, by {method!r}.",
            "an infinite slope at a kink, or a baseline outside of what the model takes.",
            "another baseline, or a method of values alone such as 'deletion'.",
        )
    return raw


def _alike(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation of a and b where one of them is not 0; None where that says nothing."""
    a, b = a.flatten(), b.flatten()
    there = (a != 0) | (b != 0)  # of a background all methods say 0
    if int(there.sum()) < 3:
        return None
    rho = metrics.rank_correlation(a[there], b[there], a.new_ones(1, int(there.sum())))
    return float(rho) if bool(rho.isfinite()) else None


def _largest_at(values: Float[Tensor, "*x"]) -> str:
    at = torch.unravel_index(values.abs().argmax(), values.shape)
    return "[" + ", ".join(str(int(i)) for i in at) + "]"
