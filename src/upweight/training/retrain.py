"""m(𝒜(w)) for many w: the only expensive thing here, so every finished model is kept.

    values[s, q] = m_q(θ(w_s))          baseline[q] = m_q(θ(1)), by the same recipe

The baseline is retrained too: what changes between w and 1 is then the weights and nothing else,
even where the task's own parameters were reached in another way (`drift` says how far off they
were). The objective keeps its 1/n; see `weights.py` for the other convention.

With a folder, models are recorded as soon as they are measured and are found again by their
weights. An interrupted run resumes where it was; another recipe, model, data set or question
never sees these rows.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.errors import NonFinite, NotConverged, ShapeError, SpecError, message
from upweight.runtime.fingerprint import digest
from upweight.runtime.headers import own_digest
from upweight.runtime.resources import Resources
from upweight.runtime.store import Store
from upweight.task.data import Data
from upweight.task.identity import contents, described
from upweight.task.measures import Functional, Loss, as_measure
from upweight.task.recipe import Recipe
from upweight.task.task import Task, require_task
from upweight.training.function import as_recipe
from upweight.training.kept import training_identity
from upweight.training.pool import Bench, in_words, recorded, run, shown


@dataclass(frozen=True, eq=False)
class Retrained:
    """Measurements of retrained models.

    Args:
        values: m_q(θ(w_s)), one row per row of weights. NaN only in the `.solution` of an error.
        baseline: m_q(θ(1)), retrained by the same recipe.
        given: m_q(θ̂), of the task's own parameters.
        gradient_norms: ‖∇J(θ(w_s), w_s)‖: how well each model was trained.
        baseline_gradient_norm: The same for θ(1).
        reused: Models that came from the folder, the baseline among them.
        seconds: Time spent.
    """

    values: Float[Tensor, "s q"]
    baseline: Float[Tensor, " q"]
    given: Float[Tensor, " q"]
    gradient_norms: Float[Tensor, " s"]
    baseline_gradient_norm: float
    reused: int
    seconds: float

    @property
    def models(self) -> int:
        """How many were trained for it, rather than found in the folder."""
        return len(self.values) + 1 - self.reused

    @property
    def change(self) -> Float[Tensor, "s q"]:
        """Δm = m(θ(w)) − m(θ(1))."""
        return self.values - self.baseline

    @property
    def drift(self) -> Float[Tensor, " q"]:
        """m(θ(1)) − m(θ̂): how far the task's own parameters are from what the recipe makes."""
        return self.baseline - self.given

    def of(self, queries: Int[Tensor, " k"]) -> "Retrained":
        """The measurements on some of the queries."""
        kept = {name: getattr(self, name)[..., queries] for name in ("values", "baseline", "given")}
        return replace(self, **kept)


def retrain(
    recipe: Recipe,
    task: Task,
    train: Any,
    weights: Float[Tensor, "..."],
    queries: Any,
    measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    *,
    resources: Resources | None = None,
) -> Retrained:
    """Train one model per row of weights, and measure it on the queries.

    Args:
        recipe: The learning algorithm.
        task: What is trained.
        train: On what, as for `as_data`.
        weights: Data weights `[s, n]`, one row a model. Equal rows are trained once.
        queries: What each model is asked about, as for `as_data`.
        measure: What it is asked.
        resources: `jobs`, the `folder` to record models in and to find them again, and `progress`.

    Raises:
        ShapeError, NonFinite: The weights do not fit the data, or are not numbers.
        NotConverged: Some models failed; says which. `.solution` is a `Retrained` of the others,
            and the folder keeps them.
        UpweightError, OSError: From the recipe or the folder, with a note on the models in flight.

    Cost: s + 1 trainings.
    """
    started, recipe = time.perf_counter(), as_recipe(recipe)
    require_task(task)
    if isinstance(measure, Functional):
        raise SpecError(
            "Trained models are measured on single queries.",
            f"measure={measure!r}.",
            "a Functional or a Coefficient, one number of the whole model.",
            "ask about a measure of each query, as Loss(); or about this number "
            "applications.robustness.amip(fitted, target=…, value=…, recipe=recipe), and for a "
            "coefficient of statsmodels fragile(results, name), which train again.",
        )
    bench = Bench(recipe, task, task.training(train), task.queries(queries), as_measure(measure))
    plan = _plan(weights, len(bench.train))
    store, using = None, Resources() if resources is None else resources
    if using.folder is not None:
        about = identity(recipe, task, bench.train, bench.queries, bench.measure)
        folder = Path(using.folder) / own_digest(about)[:32]  # others lie beside it
        store = Store.open(folder, about, again="the same retraining; other models are kept")
    names = [digest(row) for row in plan]
    rows = {} if store is None else recorded(store)
    reused = sum(name in rows for name in names)
    failures: dict[str, str] = {}
    wanted = {name: row for name, row in zip(names, plan, strict=True) if name not in rows}
    if wanted:
        unique = dict(zip(names, plan, strict=True))
        results = run(bench, unique, set(wanted), using.jobs, store)
        for finished in shown(results, len(wanted), using.progress):
            rows.update(finished.rows)
            failures.update(finished.failures)
    retrained = _collected(bench, names, rows, reused, time.perf_counter() - started)
    if failures:
        raise NotConverged(_failed(failures, unique, names), solution=retrained)
    return retrained


def joined(parts: Sequence[Retrained]) -> Retrained:
    """Rows of several calls with the same recipe and question, one after the other."""
    first = parts[0]
    return Retrained(
        torch.cat([part.values for part in parts]),
        first.baseline,
        first.given,
        torch.cat([part.gradient_norms for part in parts]),
        first.baseline_gradient_norm,
        sum(part.reused for part in parts),
        sum(part.seconds for part in parts),
    )


def identity(
    recipe: Any, task: Task, train: Data, queries: Data, measure: Callable[..., Tensor]
) -> dict[str, str]:
    """Everything a retrained measurement depends on but the weights.

    Raises:
        SpecError: A part cannot be distinguished from another of its kind.
    """
    return {
        **training_identity(recipe, task, train),
        "measure": described(measure),
        "queries": f"{len(queries)} examples {contents(queries)}",
    }


def _plan(weights: Float[Tensor, "..."], n: int) -> Float[Tensor, "r n"]:
    """w = 1 and then the rows asked for, checked."""
    if weights.ndim != 2 or weights.shape[1] != n or len(weights) == 0:
        raise ShapeError(
            f"Data weights have one row per model and one column per example: [s, {n}].",
            f"shape {tuple(weights.shape)}.",
            "indices in place of weights, or weights of another data set.",
            "use removal_weights(n, examples), or start from torch.ones(s, n).",
        )
    rows = weights.detach().cpu().double()
    if not bool(rows.isfinite().all()):
        row, column = (~rows.isfinite()).nonzero()[0].tolist()
        raise NonFinite(
            "Data weights must be finite.",
            f"{float(rows[row, column])} for model {row}, example {column}.",
            "a division by an empty group.",
            "use 0 to remove an example.",
        )
    return torch.cat([rows.new_ones(1, n), rows])


def _collected(
    bench: Bench,
    names: Sequence[str],
    rows: Mapping[str, Mapping[str, Tensor]],
    reused: int,
    seconds: float,
) -> Retrained:
    """The rows in the order asked for; NaN where there is none."""
    given = bench.measured(bench.task, bench.task.theta())
    none = {
        "values": torch.full_like(given, torch.nan),
        "gradient_norm": given.new_tensor(torch.nan),
    }
    found = [rows.get(name, none) for name in names]
    values = torch.stack([row["values"] for row in found])
    norms = torch.stack([row["gradient_norm"] for row in found])
    return Retrained(values[1:], values[0], given, norms[1:], float(norms[0]), reused, seconds)


def _failed(failures: Mapping[str, str], plan: Mapping[str, Tensor], names: Sequence[str]) -> str:
    listed = [f"{in_words(plan[name])}: {failures[name]}" for name in plan if name in failures]
    more = f"; and {len(listed) - 5} more" if len(listed) > 5 else ""
    return message(
        "Every model must train to the recipe's tolerance and give finite measurements.",
        f"{len(failures)} of {len(set(names))} models did not. {'; '.join(listed[:5])}{more}.",
        "a subset on which the objective has no minimum, a step size that diverges, or too few "
        "steps.",
        "loosen the recipe for these subsets or leave them out; what finished is in "
        "error.solution and in the folder.",
    )
