"""Scores in a folder as one memory-mapped matrix [q, n], of which a page reads what it shows.

    folder/scores-….safetensors      as the pass wrote them, examples first
    folder/by-query/values.npy       the same numbers, one row per query, made once in blocks
    folder/by-query/totals-….npz     sums over all queries
    folder/by-query/made.json        of which files; of others all of it is made again

What the ranking of a query needs is then contiguous, and the system keeps what is looked at.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upweight._typing import Folder
from upweight.errors import DataError, message
from upweight.runtime.progress import progress
from upweight.runtime.shards import ScoreShards
from upweight.runtime.whole import write_whole
from upweight.scores import Provenance, Scores, Unit

BLOCK = 4_000_000
"""Scores that are turned from examples first to queries first at once."""


def opened(folder: Folder) -> Scores:
    """The scores of a folder: of `ScoreShards`, or what `Scores.save` wrote.

    Args:
        folder: The folder; of shards it gets a subfolder `by-query` of the same size again.

    Raises:
        DataError: There are no scores.
        ShapeError: The pass over the training data did not finish.
        OSError: There is no room for the copy.

    Cost: the first time one pass over the scores, to turn them; each time one to see that all are
    finite.
    """
    path = Path(folder)
    if (path / "scores.json").exists():
        return Scores.load(path)
    if not (path / "manifest.json").exists():
        raise DataError(
            message(
                "A view needs a folder with scores.",
                f"{path}, with neither manifest.json nor scores.json.",
                "the folder above it, or a run that has not begun.",
                "give the folder that write(…) or scores.save(…) was given.",
            )
        )
    shards = ScoreShards.load(path)
    header = shards.header or {}
    unit = Unit[header.get("unit", Unit.DERIVATIVE.name)]
    # Copy on write: PyTorch wants memory that could be written, and the file stays as it is.
    values = np.load(_by_query(path, shards), mmap_mode="c")
    return Scores(torch.from_numpy(values), unit, _provenance(shards, header.get("provenance")))


def keeping(folder: Folder) -> Path | None:
    """Where things made of the scores of a folder may be kept; None where there is no copy."""
    path = Path(folder) / "by-query"
    return path if (path / "made.json").exists() else None


def _provenance(shards: ScoreShards, known: Mapping[str, Any] | None) -> Provenance:
    if known is not None:
        return Provenance.read(known)
    manifest = json.loads((shards.directory / "manifest.json").read_text(encoding="utf-8"))
    method, task, measure = (
        str(manifest.get(name, "not recorded")) for name in ("method", "task", "measure")
    )
    return Provenance(method, task, measure, shards.n, shards.q, 0, "not recorded", "not recorded")


def _by_query(path: Path, shards: ScoreShards) -> Path:
    """The copy, made where it is not there or of other files."""
    made, target = path / "by-query" / "made.json", path / "by-query" / "values.npy"
    source = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(path.glob("scores-*.safetensors"))
    ]
    if made.exists() and json.loads(made.read_text(encoding="utf-8")) == source:
        return target
    target.parent.mkdir(exist_ok=True)
    made.unlink(missing_ok=True)
    for stale in target.parent.glob("totals-*"):
        stale.unlink()
    staged = target.with_name("values.npy.part")
    try:
        _turn(shards, staged)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    os.replace(staged, target)
    write_whole(made, json.dumps(source).encode())
    return target


def _turn(shards: ScoreShards, target: Path) -> None:
    q, n = shards.q, shards.n
    out: Any = np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=(q, n))
    _claim(target)
    parts = ((start, start + len(part), (first, part)) for first, start, part in shards.pieces())
    for start, _, (first, part) in progress(parts, n, "rows by query"):
        values = part.float().numpy()
        size = max(1, BLOCK // max(1, values.shape[1]))
        for k in range(0, len(values), size):
            rows = values[k : k + size]
            out[first : first + rows.shape[1], start + k : start + k + len(rows)] = rows.T
    out.flush()


def _claim(path: Path) -> None:
    """Take the room for a file now: writing to a map on a full disk would end the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                message(
                    "A view needs room for a second copy of the scores.",
                    f"{size / 1e9:.1f} GB for {path.parent}: {error}",
                    "a full disk or quota.",
                    "free space, or move the folder; the scores are as they were.",
                )
            ) from error
