"""m(𝒜(w)) for many w: the only expensive thing here, so every finished model is kept.

    values[s, q] = m_q(θ(w_s))          baseline[q] = m_q(θ(1)), by the same recipe

The baseline is retrained too: what changes between w and 1 is then the weights and nothing else,
even where the task's own parameters were reached in another way (`drift` says how far off they
were). The objective keeps its 1/n; see `upweight.evaluation.weights` for the other convention.

With a cache, models are recorded as soon as they are measured and are found again by their weights.
A run that was killed goes on where it was; another recipe, model, data set or question never sees
these rows.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import NonFinite, NotConverged, ShapeError, SpecError, message
from upweight.evaluation.identity import identity
from upweight.runtime.fingerprint import digest
from upweight.runtime.rows import RowStore
from upweight.task.data import Data, as_data
from upweight.task.measures import Loss, as_measure
from upweight.task.recipe import Recipe, Trained, Trainer
from upweight.task.task import Task

BLOCKS_PER_JOB = 8
"""Blocks of models per process: enough that one slow block does not keep the others waiting."""


@dataclass(frozen=True, eq=False)
class Retrained:
    """Measurements of retrained models.

    Args:
        values: m_q(θ(w_s)), one row per row of weights. NaN only in the `.solution` of an error.
        baseline: m_q(θ(1)), retrained by the same recipe.
        given: m_q(θ̂), of the task's own parameters.
        gradient_norms: ‖∇J(θ(w_s), w_s)‖: how well each model was trained.
        baseline_gradient_norm: The same for θ(1).
        reused: Models that came from the cache, the baseline among them.
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
    def change(self) -> Float[Tensor, "s q"]:
        """Δm = m(θ(w)) − m(θ(1))."""
        return self.values - self.baseline

    @property
    def drift(self) -> Float[Tensor, " q"]:
        """m(θ(1)) − m(θ̂): how far the task's own parameters are from what the recipe makes."""
        return self.baseline - self.given


def retrain(
    recipe: Recipe,
    task: Task,
    train: Any,
    weights: Float[Tensor, "s n"],
    queries: Any,
    measure: Callable[..., Tensor] = Loss(),  # noqa: B008  a frozen spec
    *,
    jobs: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Retrained:
    """Train one model per row of weights, and measure it on the queries.

    Args:
        recipe: The learning algorithm.
        task, train: What is trained on what, as for `as_data`.
        weights: Data weights, one row a model. Equal rows are trained once.
        queries, measure: What is asked of each model.
        jobs: Processes, each on its share of the cores, through `joblib` and its current backend.
            None trains in this process, which is best for recipes that train many models at once.
        cache: A directory to record models in and to find them again. No pickle.
        progress: Whether to show it on stderr, where that is a terminal.

    Raises:
        ShapeError, NonFinite: The weights do not fit the data, or are not numbers.
        NotConverged: Some models failed; says which. `.solution` is a `Retrained` of the others,
            and the cache keeps them.
        UpweightError, OSError: From the recipe or the cache, with a note on the models in flight.

    Cost: s + 1 trainings.
    """
    started = time.perf_counter()
    bench = _Bench(recipe, task, as_data(train), as_data(queries), as_measure(measure))
    plan = _plan(weights, len(bench.train))
    store = None
    if cache is not None:
        about = identity(recipe, task, bench.train, bench.queries, bench.measure)
        store = RowStore.open(cache, about)
    names = [digest(row) for row in plan]
    rows = {} if store is None else store.read()
    reused = sum(name in rows for name in names)
    failures: dict[str, str] = {}
    wanted = {name: row for name, row in zip(names, plan, strict=True) if name not in rows}
    if wanted:
        unique = dict(zip(names, plan, strict=True))
        results = _run(bench, unique, set(wanted), jobs, store)
        for finished in _shown(results, len(wanted), progress):
            rows.update(finished.rows)
            failures.update(finished.failures)
    retrained = _collected(bench, names, rows, reused, time.perf_counter() - started)
    if failures:
        raise NotConverged(_failed(failures, unique, names), retrained)
    return retrained


@dataclass(frozen=True, eq=False)
class _Bench:
    """What every model shares."""

    recipe: Recipe
    task: Task
    train: Data
    queries: Data
    measure: Callable[..., Tensor]

    def measured(self, theta: Float[Tensor, " p"]) -> Float[Tensor, " q"]:
        """m_q(θ) of every query, on the CPU in float64."""
        params = self.task.named(theta.to(self.task.layout.device, self.task.layout.dtype))
        with torch.no_grad():
            parts = [
                self.measure(self.task, params, self.task.to_device(batch))
                for _, _, batch in self.queries.batches(1024)
            ]
        return torch.cat(parts).detach().cpu().double()


@dataclass(frozen=True, eq=False)
class _Finished:
    """Models of one call: name → columns, and name → why there is none."""

    rows: dict[str, dict[str, Tensor]]
    failures: Mapping[str, str]


def _plan(weights: Float[Tensor, "s n"], n: int) -> Float[Tensor, "r n"]:
    """w = 1 and then the rows asked for, checked."""
    if weights.ndim != 2 or weights.shape[1] != n or len(weights) == 0:
        raise ShapeError(
            message(
                f"Data weights have one row per model and one column per example: [s, {n}].",
                f"shape {tuple(weights.shape)}.",
                "indices in place of weights, or weights of another data set.",
                "use removal_weights(n, examples), or start from torch.ones(s, n).",
            )
        )
    rows = weights.detach().cpu().double()
    if not bool(rows.isfinite().all()):
        row, column = (~rows.isfinite()).nonzero()[0].tolist()
        raise NonFinite(
            message(
                "Data weights must be finite.",
                f"{float(rows[row, column])} for model {row}, example {column}.",
                "a division by an empty group.",
                "use 0 to remove an example.",
            )
        )
    return torch.cat([rows.new_ones(1, n), rows])


def _run(
    bench: _Bench,
    plan: Mapping[str, Tensor],
    wanted: set[str],
    jobs: int | None,
    store: RowStore | None,
) -> Iterator[_Finished]:
    """Train what is wanted, chunk by chunk.

    Chunks are cut from the whole plan, so that a resumed run trains the same models together as an
    uninterrupted one and gets the same last digits.
    """
    trainer = bench.recipe.prepare(bench.task, bench.train)
    workers = 1 if jobs is None else _workers(jobs)
    names = list(plan)
    size = max(1, min(trainer.at_once, -(-len(names) // workers)))
    chunks = [names[k : k + size] for k in range(0, len(names), size)]
    kept = [[name for name in chunk if name in wanted] for chunk in chunks]
    work = [{name: plan[name] for name in chunk} for chunk in kept if chunk]
    if jobs is None:
        yield from (_train_chunk(bench, trainer, chunk, store) for chunk in work)
        return
    import joblib

    # Trainers that train many at once are costly to prepare: one block for each process.
    blocks = workers * (1 if trainer.at_once > 1 else BLOCKS_PER_JOB)
    del trainer
    shares = [work[k::blocks] for k in range(min(blocks, len(work)))]
    threads = max(1, (os.cpu_count() or 1) // workers)
    parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")
    call = joblib.delayed(_train_share)
    for finished in parallel(call(bench, share, store, os.getpid(), threads) for share in shares):
        yield from finished


def _workers(jobs: int) -> int:
    import joblib

    if jobs == 0:
        raise SpecError(
            message(
                "jobs counts processes.",
                "jobs=0.",
                "0 meant as 'in this process'.",
                "use jobs=None for this process, or jobs=-1 for one process per core.",
            )
        )
    return int(joblib.effective_n_jobs(jobs))


def _train_share(
    bench: _Bench,
    chunks: Sequence[Mapping[str, Tensor]],
    store: RowStore | None,
    parent: int,
    threads: int,
) -> list[_Finished]:
    """In a worker: prepare once, train each chunk, record each at once."""
    if os.getpid() != parent:
        torch.set_num_threads(threads)  # the worker's own; all of them share the cores
    trainer = bench.recipe.prepare(bench.task, bench.train)
    return [_train_chunk(bench, trainer, chunk, store) for chunk in chunks]


def _train_chunk(
    bench: _Bench, trainer: Trainer, chunk: Mapping[str, Tensor], store: RowStore | None
) -> _Finished:
    names, weights = list(chunk), torch.stack(list(chunk.values()))
    try:
        trained = trainer(weights)
    except Exception as error:
        error.add_note(f"while retraining {'; '.join(_subset(row) for row in weights[:5])}")
        raise
    _require_rows(bench, trained, len(names))
    failures = {names[row]: reason for row, reason in trained.failures.items()}
    rows: dict[str, dict[str, Tensor]] = {}
    norms = trained.gradient_norms.detach().cpu().double()
    for row, name in enumerate(names):
        if name in failures:
            continue
        values = bench.measured(trained.theta[row])
        if bool(values.isfinite().all()):
            rows[name] = {"values": values, "gradient_norm": norms[row]}
        else:
            failures[name] = f"{int((~values.isfinite()).sum())} measurements are not finite"
    if store is not None and rows:
        columns = {
            key: torch.stack([row[key] for row in rows.values()])
            for key in ("values", "gradient_norm")
        }
        store.record(list(rows), columns)
    return _Finished(rows, failures)


def _require_rows(bench: _Bench, trained: Trained, s: int) -> None:
    p = bench.task.layout.size
    if tuple(trained.theta.shape) != (s, p) or tuple(trained.gradient_norms.shape) != (s,):
        raise ShapeError(
            message(
                f"A trainer returns one model per row of weights: theta [{s}, {p}] and "
                f"gradient_norms [{s}].",
                f"theta {tuple(trained.theta.shape)}, gradient_norms "
                f"{tuple(trained.gradient_norms.shape)} from {bench.recipe!r}.",
                "a recipe that trains one model whatever it is given.",
                "stack one θ per row, flat in task.layout.",
            )
        )


def _collected(
    bench: _Bench,
    names: Sequence[str],
    rows: Mapping[str, Mapping[str, Tensor]],
    reused: int,
    seconds: float,
) -> Retrained:
    """The rows in the order asked for; NaN where there is none."""
    given = bench.measured(bench.task.theta())
    none = {
        "values": torch.full_like(given, torch.nan),
        "gradient_norm": given.new_tensor(torch.nan),
    }
    found = [rows.get(name, none) for name in names]
    values = torch.stack([row["values"] for row in found])
    norms = torch.stack([row["gradient_norm"] for row in found])
    return Retrained(values[1:], values[0], given, norms[1:], float(norms[0]), reused, seconds)


def _shown(results: Iterator[_Finished], total: int, progress: bool) -> Iterator[_Finished]:
    from tqdm import tqdm

    # disable=None: quiet where stderr is not a terminal.
    with tqdm(
        total=total,
        desc="retraining",
        unit="model",
        file=sys.stderr,
        disable=None if progress else True,
    ) as bar:
        for finished in results:
            bar.update(len(finished.rows) + len(finished.failures))
            yield finished


def _subset(row: Float[Tensor, " n"]) -> str:
    """A row of weights in words."""
    removed = (row == 0).nonzero()[:, 0].tolist()
    others = row[row != 0]
    shown = ", ".join(map(str, removed[:8])) + (
        f", … ({len(removed)} in all)" if removed[8:] else ""
    )
    if bool((others == 1).all()):
        return f"without examples [{shown}]" if removed else "the full data"
    return f"with {int((others != 1).sum())} weights other than 1, without examples [{shown}]"


def _failed(failures: Mapping[str, str], plan: Mapping[str, Tensor], names: Sequence[str]) -> str:
    listed = [f"{_subset(plan[name])}: {failures[name]}" for name in plan if name in failures]
    more = f"; and {len(listed) - 5} more" if len(listed) > 5 else ""
    return message(
        "Every model must train to the recipe's tolerance and give finite measurements.",
        f"{len(failures)} of {len(set(names))} models did not. {'; '.join(listed[:5])}{more}.",
        "a subset on which the objective has no minimum, a step size that diverges, or too few "
        "steps.",
        "loosen the recipe for these subsets or leave them out; what finished is in "
        "error.solution and in the cache.",
    )
