"""Shards: all scores of a question on disk as they are computed, resumable."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Folder
from upweight.methods.reduce import Answer, Reducer, Sink, Sweep, finite
from upweight.methods.scorer import Job
from upweight.runtime.matrix import StoredMatrix
from upweight.scores import AGAIN

SHARD_BYTES = 64 * 2**20
"""Scores in one file: few enough files for a million examples, little to lose when interrupted."""


@dataclass(frozen=True)
class Shards(Reducer):
    """All scores on disk as they are computed, for scores that do not fit into memory.

    Interrupted, the same call solves the queries again and computes what is not there yet; what
    was written is read and compared with its hash. `row(query)` of what comes back reads the scores
    of one query; `Scores.load(folder)` reads all of them with their provenance, and
    `Scores.open(folder)` only what is asked for.

    Args:
        folder: Where to; one folder for each question.
        begun: What the manifest says besides of how the scores were begun, as JSON.

    Raises:
        StaleStore: The folder holds the scores of something else, or a damaged file.
        SpecError: A loss or measure is an object that says nothing but its address.
        NotWritten: The disk is full or not writable; what was written stays readable.
        NonFinite: A score is NaN or infinite; it is not written.
    """

    folder: Folder
    begun: Mapping[str, Any] = field(default_factory=dict)

    def begin(self, sweep: Sweep) -> Sink:
        stored = StoredMatrix.open(
            self.folder,
            sweep.description(),
            shape=(sweep.q, sweep.n),
            begun={**self.begun, "settings": sweep.settings},
            again=AGAIN,
        )
        stored.verify()
        return _Shards(stored)


@dataclass(eq=False)
class _Shards(Sink):
    stored: StoredMatrix
    begin: int = 0
    stop: int = 0
    held: list[Tensor] = field(default_factory=list)

    @property
    def settings(self) -> Mapping[str, int]:  # type: ignore[override]
        found: Mapping[str, int] = self.stored.begun["settings"]
        return found

    @property
    def is_done(self) -> bool:
        return self.stored.facts is not None and self.stored.is_whole

    def missing(self, job: Job, n: int) -> list[tuple[int, int]]:
        return self.stored.missing(job.first, job.first + len(job))

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:
        if start != self.stop:
            self.flush(job)
        if not self.held:
            self.begin = start
        self.held.append(finite(part, start, job.first))
        self.stop = start + part.shape[1]
        if sum(x.nbytes for x in self.held) >= SHARD_BYTES:
            self.flush(job)

    def end(self, job: Job) -> None:
        self.flush(job)

    def flush(self, job: Job) -> None:
        """Write what is held."""
        if self.held:
            self.stored.append(job.first, self.begin, torch.cat(self.held, dim=1))
            self.held = []

    def row_sums(self) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(len(self.stored), dtype=torch.float64)
        sizes = torch.zeros_like(sums)
        for first, block in self.stored.blocks():
            sums[first : first + len(block)] = block.sum(dim=1, dtype=torch.float64)
            sizes[first : first + len(block)] = block.abs().sum(dim=1, dtype=torch.float64)
        return sums, sizes

    def result(self, answer: Answer) -> StoredMatrix:
        if not self.is_done:
            made = answer.provenance(())
            self.stored.finish({"unit": answer.unit.name, "provenance": asdict(made)})
        return self.stored
