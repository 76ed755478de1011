"""Shards: all scores on disk as they are computed, resumable, by one process or several."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Folder
from upweight.methods.health import require_finite
from upweight.methods.reduce import Answer, Reducer, Sink, Sweep
from upweight.methods.scorer import Job
from upweight.runtime.atomic import make_folder
from upweight.runtime.lock import CLAIM, claimed
from upweight.runtime.matrix import StoredMatrix, Tile
from upweight.runtime.ranks import share_of
from upweight.scores import AGAIN

SHARD_BYTES = 64 * 2**20
"""Scores in one file: few enough files for a million examples, little to lose when interrupted."""

SHARD = 2048
"""Training examples of a file at most: what several processes share out."""


@dataclass(frozen=True)
class Shards(Reducer):
    """All scores on disk as they are computed, for scores that do not fit into memory.

    Interrupted, the same call solves the queries again and computes what is not there yet; what
    was written is read and compared with its hash. Processes that make the same call at the same
    time share the work, each claiming a file that nobody makes. `row(query)` of what comes back
    reads the scores of one query; `Scores.load(folder)` reads all of them with their provenance,
    and `Scores.open(folder)` only what is asked for.

    Args:
        folder: Where to; one folder for each question.
        begun: What the manifest says besides of how the scores were begun, as JSON.
        shards: "i/m": only every m-th file, from the i-th on, for m processes that do not talk to
            each other. The last to end finishes the scores; until then they cannot be loaded.

    Raises:
        StaleStore: The folder holds the scores of something else, or a damaged file.
        SpecError: A loss or measure is an object that says nothing but its address; or a share
            that is none.
        NotWritten: The disk is full or not writable; what was written stays readable.
        NonFinite: A score is NaN or infinite; it is not written.
    """

    folder: Folder
    begun: Mapping[str, Any] = field(default_factory=dict)
    shards: str = "1/1"

    def begin(self, sweep: Sweep) -> Sink:
        share, folder = share_of(self.shards), Path(self.folder)
        description = sweep.description()
        make_folder(folder)
        # The first says with which settings.
        with claimed(folder, "begin", wait=True, meanwhile=sweep.meanwhile):
            stored = StoredMatrix.open(
                folder,
                description,
                shape=(sweep.q, sweep.n),
                begun={**self.begun, "settings": sweep.settings},
                again=AGAIN,
            )
        stored.verify()
        return _Shards(stored, share, sweep.dtype.itemsize, sweep.meanwhile)


@dataclass(eq=False)
class _Shards(Sink):
    stored: StoredMatrix
    share: tuple[int, int]
    itemsize: int
    meanwhile: Callable[[], None] | None = None
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

    def missing(self, job: Job, n: int) -> Iterator[tuple[int, int]]:
        """Ranges that nobody else makes; what was taken of one is written before the next."""
        first, last = job.first, job.first + len(job)
        left = self.stored.missing(first, last)
        # First what nobody makes; then what others make, or were making when they were killed.
        for wait in (False, True):
            for tile in self._grid(job, n):
                parts = [(max(a, tile.start), min(b, tile.stop)) for a, b in left]
                parts = [(a, b) for a, b in parts if a < b]
                if not parts or self.stored.path(tile.name).exists():
                    continue
                claim = claimed(
                    self.stored.directory, tile.name, wait=wait, meanwhile=self.meanwhile
                )
                with claim as is_mine:
                    for a, b in parts if is_mine else ():
                        if not self.stored.path(Tile(first, last, a, b).name).exists():
                            yield a, b
                            self.flush(job)

    def _grid(self, job: Job, n: int) -> list[Tile]:
        """The files of a job that are this process's, of whole blocks of it: the same for all."""
        most = min(SHARD, SHARD_BYTES // (len(job) * self.itemsize))
        size = max(1, most // max(1, job.at_once)) * max(1, job.at_once)
        first, of = self.share
        starts = [k for number, k in enumerate(range(0, n, size)) if number % of == first]
        return [Tile(job.first, job.first + len(job), k, min(k + size, n)) for k in starts]

    def see(self, job: Job, start: int, part: Float[Tensor, "q b"]) -> None:
        if start != self.stop:
            self.flush(job)
        if not self.held:
            self.begin = start
        require_finite(part, start, job.first)
        self.held.append(part)
        self.stop = start + part.shape[1]

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

    def rows(self, at: Sequence[int]) -> Tensor:
        return torch.cat([self.stored[q : q + 1] for q in at])

    def result(self, answer: Answer) -> StoredMatrix:
        folder = self.stored.directory
        if not self.stored.is_whole:  # others have shares of it
            return self.stored
        with claimed(folder, "begin", wait=True, meanwhile=self.meanwhile):
            if not self.is_done:
                made = answer.provenance(())
                self.stored.finish({"unit": answer.unit.name, "provenance": asdict(made)})
            for path in folder.glob(f".tile-*{CLAIM}"):
                path.unlink(missing_ok=True)
        (folder / f".begin{CLAIM}").unlink(missing_ok=True)
        return self.stored
