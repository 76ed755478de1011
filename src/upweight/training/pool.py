"""Training many models: in chunks, here or in other processes, each chunk recorded at once.

    chunk of weights [k n]  →  trainer  →  θ [k p]  →  measured [k q]  →  recorded

A chunk is what a trainer takes in one call. Chunks are cut from the whole plan, so that a resumed
run trains the same models together as an uninterrupted one and gets the same last digits.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import ShapeError, SpecError
from upweight.runtime.fingerprint import digest
from upweight.runtime.store import Store
from upweight.task.data import Data
from upweight.task.measures import measured
from upweight.task.recipe import Recipe, Trained, Trainer
from upweight.task.task import Task

BLOCKS_PER_JOB = 8
"""Blocks of models per process: enough that one slow block does not keep the others waiting."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What every model shares."""

    recipe: Recipe
    task: Task
    train: Data
    queries: Data
    measure: Callable[..., Tensor]

    def measured(self, task: Task, theta: Float[Tensor, " p"]) -> Float[Tensor, " q"]:
        """m_q(θ) of every query, on the CPU in float64."""
        return measured(task, theta, self.queries, self.measure).cpu()


@dataclass(frozen=True, eq=False)
class Finished:
    """Models of one call: name → columns, and name → why there is none."""

    rows: dict[str, dict[str, Tensor]]
    failures: Mapping[str, str]


def run(
    bench: Bench,
    plan: Mapping[str, Tensor],
    wanted: set[str],
    jobs: int | None,
    store: Store | None,
) -> Iterator[Finished]:
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
            "jobs counts processes.",
            "jobs=0.",
            "0 meant as 'in this process'.",
            "use Resources(jobs=None) for this process, or jobs=-1 for one process per core.",
        )
    return int(joblib.effective_n_jobs(jobs))


def _train_share(
    bench: Bench,
    chunks: Sequence[Mapping[str, Tensor]],
    store: Store | None,
    parent: int,
    threads: int,
) -> list[Finished]:
    """In a worker: prepare once, train each chunk, record each at once."""
    if os.getpid() != parent:
        torch.set_num_threads(threads)  # the worker's own; all of them share the cores
    trainer = bench.recipe.prepare(bench.task, bench.train)
    return [_train_chunk(bench, trainer, chunk, store) for chunk in chunks]


def _train_chunk(
    bench: Bench, trainer: Trainer, chunk: Mapping[str, Tensor], store: Store | None
) -> Finished:
    names, weights = list(chunk), torch.stack(list(chunk.values()))
    try:
        trained = trainer(weights)
    except Exception as error:
        error.add_note(f"while retraining {'; '.join(in_words(row) for row in weights[:5])}")
        raise
    _require_rows(bench, trained, len(names))
    failures = {names[row]: reason for row, reason in trained.failures.items()}
    rows: dict[str, dict[str, Tensor]] = {}
    norms = trained.gradient_norms.detach().cpu().double()
    for row, name in enumerate(names):
        if name in failures:
            continue
        values = bench.measured(trained.task_of(bench.task, row), trained.theta[row])
        if bool(values.isfinite().all()):
            rows[name] = {"values": values, "gradient_norm": norms[row]}
        else:
            failures[name] = f"{int((~values.isfinite()).sum())} measurements are not finite"
    if store is not None and rows:
        kept = {key: torch.stack([r[key] for r in rows.values()]) for key in rows[next(iter(rows))]}
        kept["names"] = torch.tensor([list(bytes.fromhex(n)) for n in rows], dtype=torch.uint8)
        store.write(digest(*rows)[:32], kept)
    return Finished(rows, failures)


def recorded(store: Store) -> dict[str, dict[str, Tensor]]:
    """What is kept of every model, by the hash of its weights.

    Raises:
        StaleStore: A file is damaged.
    """
    rows: dict[str, dict[str, Tensor]] = {}
    for shard in store.names():
        columns = dict(store.read(shard))
        for k, name in enumerate(columns.pop("names")):
            rows[bytes(name.tolist()).hex()] = {key: c[k] for key, c in columns.items()}
    return rows


def _require_rows(bench: Bench, trained: Trained, s: int) -> None:
    p = bench.task.layout.size
    if tuple(trained.theta.shape) != (s, p) or tuple(trained.gradient_norms.shape) != (s,):
        raise ShapeError(
            f"A trainer returns one model per row of weights: theta [{s}, {p}] and "
            f"gradient_norms [{s}].",
            f"theta {tuple(trained.theta.shape)}, gradient_norms "
            f"{tuple(trained.gradient_norms.shape)} from {bench.recipe!r}.",
            "a recipe that trains one model whatever it is given.",
            "stack one θ per row, flat in task.layout.",
        )


def in_words(row: Float[Tensor, " n"]) -> str:
    """A row of weights in words."""
    removed = (row == 0).nonzero()[:, 0].tolist()
    others = row[row != 0]
    shown = ", ".join(map(str, removed[:8])) + (
        f", … ({len(removed)} in all)" if removed[8:] else ""
    )
    if bool((others == 1).all()):
        return f"without examples [{shown}]" if removed else "the full data"
    return f"with {int((others != 1).sum())} weights other than 1, without examples [{shown}]"


def shown(results: Iterator[Finished], total: int, progress: bool) -> Iterator[Finished]:
    """The same results, counted on a progress bar."""
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
