"""Cross-validation from one fit: what would the loss be on examples that the model never saw?

    f₋ᵢ(xᵢ) ≈ f(xᵢ) + (I − KᵢΛᵢ)⁻¹ Kᵢ δᵢ           approximate leave-one-out, ALO
    CV = (1/n) Σᵢ ℓ(f₋ᵢ(xᵢ), yᵢ)                    evaluated there, not linearised

with Kᵢ = (1/n) Jᵢ H⁻¹ Jᵢᵀ, δ and Λ the first and second derivative of ℓ in f: exact for least
squares (Allen 1974), one Newton step otherwise (Pregibon 1981; Rad & Maleki 2020; "NS" in
Stephenson & Broderick 2020). The infinitesimal jackknife leaves (I − KΛ)⁻¹ out, and is too low
where examples have leverage (Giordano et al. 2019). Where leverage is near 1 neither is to be
trusted: those few examples are fitted again.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.applications.cross_validated import CrossValidated, Difference, difference
from upweight.applications.labels import classes_gone, outputs_at
from upweight.applications.left_out import (
    ByRecipe,
    KeptRefits,
    Refits,
    is_followed,
    left_out,
    losses_of,
)
from upweight.applications.penalty_path import Path
from upweight.applications.subject import Subject, curvature_left_out, subject_of
from upweight.curvature.hessian import Hessian
from upweight.errors import (
    DataError,
    NonFinite,
    NotWritten,
    ShapeError,
    SpecError,
    StaleStore,
    UpweightError,
)
from upweight.linalg.cholesky import Cholesky
from upweight.methods import health
from upweight.methods.fitted import Fitted
from upweight.methods.influence import Influence
from upweight.notation import loss_in_words
from upweight.runtime.fingerprint import digest
from upweight.runtime.resources import Resources
from upweight.runtime.selection import require_labels
from upweight.runtime.streams import stream
from upweight.task.identity import described
from upweight.task.recipe import Recipe
from upweight.training.newton import Newton

__all__ = ["CrossValidated", "Difference", "Path", "difference", "grouped", "kfold", "loo", "path"]

UNSAFE = 0.5
"""‖∇‖ left of a group's removal, as a share, from which it is refitted."""

FOLLOWED = 32
"""Examples of leave-one-out that one step is not left to decide, where the model is linear in θ:
two or three examples of some hundred carry most of what a step is wrong by."""

SETTLED = 1e-4
"""‖∇‖ that is left of an example that was followed, as a share."""

FAR = 0.5
"""Rise of a loss from which it is asked whether it still moved between `TOLERANCE` and `SETTLED`:
where classes separate without the example, ‖∇‖ falls for ever as θ grows, and it has no limit."""

REFITS = "cross-validation"
"""The folder of the refits in that of the resources."""

STOPPED = (
    "the model is not convex: this is the loss at the minimum near θ̂ without the examples, and not "
    "that of another run of training, which may stop early or end elsewhere; with recipe= and "
    "confirm= runs tell"
)


def loo(
    asked: Any,
    train: Any = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    recipe: Recipe | None = None,
    refit_above: float = 0.9,
    confirm: int = 0,
    seed: int = 0,
    resources: Resources | None = None,
) -> CrossValidated:
    """Leave-one-out loss of every example, from one fit and few refits.

    Args:
        asked: A fitted method; a fitted scikit-learn estimator or Pipeline, ℓ1-penalized ones too
            (on their support); or statsmodels results.
        train: Of an estimator (X, y) or (X, y, sample_weight), as given to its `fit`.
        loss: `(outputs, targets) -> [b]`, as the task has them. None: ℓ of the objective, weights
            included, penalty not.
        recipe: How to fit again. None: the library's own fit where it is its model.
        refit_above: Examples of a leverage above it are fitted again, where the model knows how.
        confirm: How many random examples to fit again, to check the others by.
        seed: Of that draw.
        resources: With a `folder`, which keeps the refits: an interrupted call resumes. None:
            those of the fitted method.

    Returns:
        The losses, their mean with its standard error, and what was refitted.

    Raises:
        SpecError: A limit or count makes no sense; or `confirm` without a way to fit again.
        NonFinite: A loss is not finite, or without an example the minimum is not determined.
        StaleStore: The folder holds refits of another model, recipe or training set.
        UpweightError: From the adapter or the fit.

    Where the model is linear in θ, the 32 examples whose step matters most are followed to the
    minimum without them, with the same inverse; see `upweight.applications.left_out`.

    Exact when: J is quadratic in θ and f linear in it. The objective keeps its 1/n: for `C` that is
    leave-one-out itself; where `alpha` multiplies the mean, it is but for a change of alpha by
    1/n of itself.
    Cost: one Hessian and its factor, c solves per example, and the refits.
    """
    started = time.perf_counter()
    if not (isinstance(refit_above, int | float) and refit_above >= 0):
        raise SpecError(
            "refit_above is a leverage, at least 0.",
            f"refit_above={refit_above!r}.",
            "a number of examples in its place, or a NaN.",
            "0.9; 0 refits all, 1 or more none of a convex model.",
        )
    place = _place(asked, train, recipe, resources)
    fitted, n = place.fitted, len(place.fitted.train)
    curvature = curvature_left_out(fitted)
    outputs, leverage = fitted.loo_outputs(curvature), fitted.leverage(curvature).double().cpu()
    # `not <=`: a NaN is unsafe as well.
    unsafe = [i for i in range(n) if not float(leverage[i]) <= refit_above]
    # A refit says that the model then knows no such class.
    unsafe += [i for i, _, _ in _gone(place, [[i] for i in range(n)]) if i not in unsafe]
    options, followed = _Options(loss, confirm, seed, started), []
    for i, found, left in list(_followed(place, outputs, leverage, loss)):
        outputs[i] = found
        followed.append(i)
        unsafe += [i] if not left <= UNSAFE and i not in unsafe else []
    groups, parts = [[i] for i in range(n)], [outputs[i : i + 1] for i in range(n)]
    return _answer(
        "leave-one-out", place, groups, parts, sorted(unsafe), options, leverage, followed
    )


def kfold(
    asked: Any,
    train: Any = None,
    folds: int | Sequence[Any] | Any = 10,
    *,
    loss: Callable[..., Tensor] | None = None,
    recipe: Recipe | None = None,
    confirm: int = 0,
    seed: int = 0,
    resources: Resources | None = None,
) -> CrossValidated:
    """K-fold cross-validation from one fit.

    Where the model is linear in θ all folds descend together from θ̂, with the inverse Hessian of
    all the data, until 1 % of the gradient is left; otherwise a removal step of each fold. With a
    curvature by layer that is to first order.

    Args:
        asked: As for `loo`.
        train: As for `loo`.
        folds: How many, drawn at random in equal parts; or one label per example.
        loss: As for `loo`.
        recipe: As for `loo`.
        confirm: How many random folds to fit again.
        seed: Of that draw, and of the folds.
        resources: As for `loo`.

    Raises:
        ShapeError: There are fewer than two folds, or not one label per example.
        UpweightError: As for `loo`.

    Cost: one Hessian and its factor, and for linear models some 3 gradients per fold.
    """
    started = time.perf_counter()
    place = _place(asked, train, recipe, resources)
    n = len(place.fitted.train)
    groups = _random_folds(folds, n, seed) if isinstance(folds, int) else _by_label(folds, n)
    options = _Options(loss, confirm, seed, started)
    return _by_groups(f"{len(groups)}-fold", place, groups, options)


def grouped(
    asked: Any,
    labels: Sequence[Any] | Any,
    train: Any = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    recipe: Recipe | None = None,
    confirm: int = 0,
    seed: int = 0,
    resources: Resources | None = None,
) -> CrossValidated:
    """Leave-one-group-out: patients, villages, documents, whose rows are not independent.

    As `kfold` with the groups as folds, and with a standard error over groups.

    Args:
        asked: As for `loo`.
        labels: Of each example, which group it is of.
        train: As for `loo`.
        loss: As for `loo`.
        recipe: As for `loo`.
        confirm: How many random groups to fit again.
        seed: Of that draw.
        resources: As for `loo`.
    """
    started = time.perf_counter()
    place = _place(asked, train, recipe, resources)
    groups = _by_label(labels, len(place.fitted.train))
    options = _Options(loss, confirm, seed, started)
    kind = f"leave-one-group-out ({len(groups)} groups)"
    return _by_groups(kind, place, groups, options, is_clustered=True)


def path(
    estimator: Any,
    X: Any,
    y: Any,
    grid: Mapping[str, Sequence[Any]],
    *,
    sample_weight: Any = None,
    folds: int | Sequence[Any] | Any | None = None,
    loss: Callable[..., Tensor] | None = None,
    refit_above: float = 0.9,
    confirm: int = 0,
    seed: int = 0,
    resources: Resources | None = None,
) -> Path:
    """The cross-validated loss along one parameter of a scikit-learn estimator.

    Args:
        estimator: Fitted or not; a clone is fitted for each value, to a tight tolerance.
        X: All rows.
        y: Their labels or targets.
        grid: One parameter and its values: {"C": [0.1, 1, 10]}; of a Pipeline with the name of the
            step, {"logisticregression__C": [...]}.
        sample_weight: Their weights.
        folds: None: leave-one-out; otherwise as for `kfold`, the same for every value.
        loss: As for `loo`, at every value.
        refit_above: As for `loo`.
        confirm: As for `loo`.
        seed: As for `loo`.
        resources: As for `loo`; each value has a folder in the folder, named by what it is.

    Returns:
        The curve; a value that has no minimum, or no translation, says why and takes no part.

    Raises:
        SpecError: Not one parameter, no such parameter, or no values.
        StaleStore: A folder holds refits of another estimator or other data.
        NotWritten: The folder cannot be written.
        UpweightError: No value could be cross-validated: the error of the first.

    Cost: one fit and one `loo` or `kfold` per value.
    """
    import upweight.adapters.sklearn_folds as sk

    if not isinstance(grid, Mapping) or len(grid) != 1 or not len(next(iter(grid.values()))):
        raise SpecError(
            "A path is along one parameter, with at least one value.",
            f"grid={grid!r:.80}.",
            "values without their name, or a product of parameters as for GridSearchCV.",
            'grid={"C": [0.1, 1.0, 10.0]}; one path per combination of the others.',
        )
    ((parameter, values),) = grid.items()
    along: list[CrossValidated | None] = []
    reasons: dict[int, str] = {}
    first: UpweightError | None = None
    chosen: dict[str, Any] = {"loss": loss, "confirm": confirm, "seed": seed}
    using = Resources() if resources is None else resources
    fits = sk.along(estimator, X, y, parameter, list(values), sample_weight)
    for k, (value, fit) in enumerate(fits):
        own = using if using.folder is None else using.within(_folder(parameter, value))
        try:
            known = sk.translated(fit, X, y, sample_weight, minimize=True)
            place = _of_sklearn(known, own)
            at = (
                loo(place, refit_above=refit_above, **chosen)
                if folds is None
                else kfold(place, folds=folds, **chosen)
            )
        except (StaleStore, NotWritten):  # of the folder, not of the value
            raise
        except UpweightError as error:
            first = error if first is None else first
            along.append(None)
            reasons[k] = " ".join(str(error).split())[:200]
            continue
        along.append(at)
    if first is not None and len(reasons) == len(along):
        raise first
    return Path(parameter, tuple(values), tuple(along), reasons)


def _folder(parameter: str, value: Any) -> str:
    """A name that is the same in another order of the values, or among others."""
    return f"value-{digest(parameter, described(value))[:32]}"


# -- shared steps ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """A fitted method, and how its examples are left out for real."""

    fitted: Fitted
    refits: Refits | None
    renormalize: bool = False
    notes: tuple[str, ...] = ()
    holds: Callable[[Tensor, list[int]], bool] | None = None
    needs_classes: bool = False
    """Whether a fit must see every class: of libraries, whose intercepts have no penalty."""
    refits_minimize: bool = False
    """Whether refits end at the minimum of the task's own objective: no earlier steps of a
    Pipeline that leak, no weights that are balanced anew, no training that stops."""


@dataclass(frozen=True, eq=False)
class _Options:
    loss: Callable[..., Tensor] | None
    confirm: int
    seed: int
    started: float


def _place(asked: Any, train: Any, recipe: Recipe | None, resources: Resources | None) -> _Place:
    if isinstance(asked, _Place):
        return asked
    of_sklearn = type(asked).__module__.startswith("sklearn.")
    if recipe is None and of_sklearn and isinstance(train, tuple | list):
        import upweight.adapters.sklearn_folds as sk

        if len(train) in (2, 3):
            known = sk.translated(asked, *train)
            return _of_sklearn(known, Resources() if resources is None else resources)
    subject = subject_of(asked, train, recipe)
    fitted = subject.fitted
    refits = None
    if subject.recipe is not None:
        using = (fitted.resources if resources is None else resources).within(REFITS)
        refits = ByRecipe(fitted.task, fitted.train, subject.recipe, using)
    convex = health.is_convex(fitted.task, fitted.theta, fitted.train)
    return _Place(
        fitted,
        refits,
        notes=() if convex else (STOPPED,),
        needs_classes=not isinstance(asked, Fitted),
        refits_minimize=convex
        and (isinstance(recipe, Newton) or (recipe is None and not isinstance(asked, Fitted))),
    )


def _followed(
    place: _Place,
    outputs: Float[Tensor, "n *c"],
    leverage: Float[Tensor, " n"],
    loss: Callable[..., Tensor] | None,
) -> Iterator[tuple[int, Float[Tensor, " *c"], float]]:
    """Where the steps end that go farthest: (example, its output there, what is left of ‖∇‖)."""
    fitted = place.fitted
    moved = (losses_of(fitted, outputs, loss) - _at_theta(fitted, loss)).abs()
    second = moved.nan_to_num(nan=0.0, posinf=1e300) * leverage.clamp(0.0, 1.0)
    chosen = second.topk(min(FOLLOWED, len(second)))
    farthest = chosen.indices[chosen.values > 0].tolist()
    if not farthest or not is_followed(fitted):
        return
    groups = [[i] for i in farthest]
    before = left_out(fitted, groups, place.renormalize)
    found = left_out(fitted, groups, place.renormalize, SETTLED)
    assert found.theta is not None and found.remainders is not None
    ends = zip(farthest, found.outputs, found.theta, found.remainders.tolist(), strict=True)
    unsettled = _unsettled(fitted, farthest, before.outputs, found.outputs, loss)
    for i, part, theta, left in ends:
        is_minimum = i not in unsettled and (place.holds is None or place.holds(theta, [i]))
        yield i, part[0], left if is_minimum else math.inf


def _unsettled(
    fitted: Fitted,
    followed: list[int],
    before: list[Float[Tensor, "1 *c"]],
    after: list[Float[Tensor, "1 *c"]],
    loss: Callable[..., Tensor] | None,
) -> set[int]:
    """Examples whose loss still moves by a tenth of its rise on the way to the minimum."""
    at_theta = _at_theta(fitted, loss)
    every = outputs_at(fitted.task, fitted.theta, fitted.train)[0].clone()

    def rises(parts: Sequence[Tensor]) -> Float[Tensor, " e"]:
        every[followed] = torch.cat(list(parts)).to(every)
        return (losses_of(fitted, every, loss) - at_theta)[followed].abs()

    first, last = rises(before), rises(after)
    # `not <=`: a NaN has no limit either.
    moves = ~(first <= FAR) & ~((last - first).abs() <= 0.1 * first)
    return {i for i, still in zip(followed, moves.tolist(), strict=True) if still}


def _of_sklearn(known: Any, resources: Resources) -> _Place:
    fitted = known.fitted
    if fitted is None:
        fitted = Influence(Hessian(), Cholesky()).fit(known.task, known.train)
    refits = KeptRefits(known.refits, resources.within(REFITS))
    return _Place(
        fitted,
        refits,
        known.renormalizes,
        known.notes,
        known.holds,
        needs_classes=True,
        refits_minimize=known.refits_minimize,
    )


def _by_groups(
    kind: str,
    place: _Place,
    groups: list[list[int]],
    options: _Options,
    is_clustered: bool = False,
) -> CrossValidated:
    _require_classes(place, groups)
    found = left_out(place.fitted, groups, place.renormalize)
    unsafe = []
    if found.remainders is not None:
        unsafe = [k for k, left in enumerate(found.remainders.tolist()) if not left <= UNSAFE]
    return _answer(
        kind, place, groups, found.outputs, unsafe, options, is_clustered=is_clustered
    )  # fmt: skip


def _answer(
    kind: str,
    place: _Place,
    groups: list[list[int]],
    parts: Sequence[Float[Tensor, "e *c"]],
    unsafe: list[int],
    options: _Options,
    leverage: Float[Tensor, " n"] | None = None,
    followed: Sequence[int] = (),
    is_clustered: bool = False,
) -> CrossValidated:
    """Refit what is unsafe and what is drawn, and evaluate the loss everywhere."""
    fitted = place.fitted
    _require_options(options, place)
    outputs = torch.cat(list(parts))
    order = torch.tensor([i for group in groups for i in group])
    outputs = outputs[order.argsort().to(outputs.device)]
    approximate = losses_of(fitted, outputs, options.loss)
    at_theta = _at_theta(fitted, options.loss)
    known = followed if place.refits_minimize else ()
    chances = _chances(groups, approximate - at_theta, leverage, unsafe, known)
    sampled = _drawn(options, chances)
    wanted = sorted({*unsafe, *sampled}) if place.refits is not None else []
    refitted, failures = [], {}
    exact = outputs.clone()
    if wanted:
        assert place.refits is not None
        for k, (found, reason) in zip(
            wanted, place.refits([groups[k] for k in wanted]), strict=True
        ):
            if found is None:
                failures[k] = reason
                continue
            exact[groups[k]] = found.to(exact).reshape(len(groups[k]), *exact.shape[1:])
            refitted.append(k)
    losses = losses_of(fitted, exact, options.loss)
    _require_finite(losses)
    done = set(refitted)
    return CrossValidated(
        kind=kind,
        approximate=approximate,
        exact=losses,
        train_losses=at_theta,
        outputs=exact.cpu(),
        leverage=leverage,
        groups=tuple(tuple(group) for group in groups),
        unsafe=tuple(unsafe),
        refitted=tuple(refitted),
        sampled=tuple(k for k in sampled if k in done),
        chances=chances,
        failures=failures,
        is_clustered=is_clustered,
        loss=loss_in_words(fitted.task.loss if options.loss is None else options.loss),
        said=place.notes,
        seconds=time.perf_counter() - options.started,
    )


def _at_theta(fitted: Fitted, loss: Callable[..., Tensor] | None) -> Float[Tensor, " n"]:
    if loss is None:
        return fitted.losses.double().cpu()
    return losses_of(fitted, outputs_at(fitted.task, fitted.theta, fitted.train)[0], loss)


def _require_finite(losses: Float[Tensor, " n"]) -> None:
    bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise NonFinite(
            "Every held-out loss must be finite.",
            f"{float(losses[bad[0]])} for examples {bad[:5]}{' and more' if bad[5:] else ''}.",
            "a step so long that exp() overflows, or a loss with a logarithm of 0.",
            "lower refit_above, so that these examples are refitted, or use a bounded loss=.",
        )


def _gone(place: _Place, groups: Sequence[list[int]]) -> Iterator[tuple[int, Any, int]]:
    fitted = place.fitted
    if place.needs_classes:
        yield from classes_gone(fitted.task, fitted.theta, fitted.train, groups)


def _require_classes(place: _Place, groups: Sequence[list[int]]) -> None:
    """Refuse groups that take all rows of a class: nothing is learned of it without them."""
    for k, name, count in _gone(place, groups):
        raise DataError(
            "Every class must have rows that stay when others are left out.",
            f"all {count} of class {name!r} leave together, with example {groups[k][0]}.",
            "folds that follow the label, data sorted by it, or a class of few rows.",
            "folds=10, which are drawn at random; or fit without that class, or join it to "
            "another.",
        )


def _require_options(options: _Options, place: _Place) -> None:
    confirm = options.confirm
    if isinstance(confirm, bool) or not isinstance(confirm, int) or confirm < 0:
        raise SpecError(
            "confirm is how many groups to fit again: a whole number, at least 0.",
            f"confirm={confirm!r}.",
            "yes or no in place of a number.",
            "confirm=20.",
        )
    if confirm and place.refits is None:
        Subject(place.fitted, None).require_recipe("confirm=")


def _chances(
    groups: list[list[int]],
    moved: Float[Tensor, " n"],
    leverage: Float[Tensor, " n"] | None,
    unsafe: Sequence[int],
    known: Sequence[int],
) -> Float[Tensor, " g"]:
    """The chance of each group in a draw: near its share of what one fit misses; 0 where unsafe.

    A part is the same for all. Of single examples a part goes by Δℓ^{3/2}: what a step leaves out
    is of third order in its length, and Δℓ of second. Where refits and `known` end at one minimum
    nothing is left there. Elsewhere refits may differ from one fit by more than a step leaves out,
    in proportion to Δℓ, and to Δℓ times the leverage where an example moves what comes before.
    """
    moved = moved.abs().nan_to_num(nan=0.0, posinf=0.0)
    rows = torch.tensor([row for group in groups for row in group])
    owner = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g) for g in groups]))

    def summed(values: Float[Tensor, " n"]) -> Float[Tensor, " g"]:
        found = values.new_zeros(len(groups)).index_add(0, owner, values[rows])
        found[list(unsafe)] = 0.0
        return found

    parts = [torch.ones_like(moved[: len(groups)])]
    parts[0][list(unsafe)] = 0.0
    if leverage is not None:
        third = summed(moved.pow(1.5))
        third[list(known)] = 0.0
        parts.append(third)
    if not len(known) or not float(parts[-1].sum()) > 0:
        parts.append(summed(moved))
        parts += [] if leverage is None else [summed(moved * leverage.clamp(0.0, 1.0))]
    shares = [part / part.sum() for part in parts if float(part.sum()) > 0]
    return torch.stack(shares).mean(dim=0) if shares else torch.zeros_like(parts[0])


def _drawn(options: _Options, chances: Float[Tensor, " g"]) -> list[int]:
    """Groups to fit again, drawn with replacement; all of them where as many are asked for."""
    if options.confirm >= len(chances):
        return list(range(len(chances)))
    if not options.confirm or not float(chances.sum()) > 0:
        return []
    generator = stream("refitted groups", options.seed)
    drawn = torch.multinomial(chances, options.confirm, replacement=True, generator=generator)
    return sorted(drawn.tolist())


def _random_folds(folds: int, n: int, seed: int) -> list[list[int]]:
    if isinstance(folds, bool) or not 2 <= folds <= n:
        raise ShapeError(
            f"There are from 2 folds to one for each of the {n} examples.",
            f"folds={folds!r}.",
            "more folds than examples, or a single one.",
            "folds=10, or one label per example.",
        )
    order = torch.randperm(n, generator=stream("folds", seed))
    return [sorted(order[k::folds].tolist()) for k in range(folds)]


def _by_label(labels: Any, n: int) -> list[list[int]]:
    """Places by label, in the order in which labels first come."""
    entries = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    require_labels(entries, "example")
    found: dict[Any, list[int]] = {}
    for place, label in enumerate(entries):
        found.setdefault(label, []).append(place)
    if len(entries) != n or len(found) < 2:
        raise ShapeError(
            f"Every one of the {n} examples has one label, and there are at least two labels.",
            f"{len(entries)} labels, {len(found)} of them different.",
            "labels of another split, or rows that were dropped for missing values.",
            "pass one label per row that was fitted, in its order.",
        )
    return list(found.values())
