"""Scores in a folder as one memory-mapped matrix [q, n], of which a page reads what it shows.

    folder/scores-….safetensors      as the pass wrote them, examples first
    folder/by-query/values.npy       the same numbers, one row per query, made once in blocks
    folder/by-query/totals-….safetensors     sums over all queries
    folder/by-query/made.json        of which files, and the hash of the copy; of others, or where
                                     it was altered, all of it is made again

What the ranking of a query needs is then contiguous, and the system keeps what is looked at.
"""

import contextlib
import io
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upweight._typing import Folder
from upweight.errors import DataError, NotWritten, StaleStore, message
from upweight.runtime.fingerprint import digest
from upweight.runtime.headers import read_json, write_json
from upweight.runtime.progress import progress
from upweight.runtime.shards import ScoreShards, require_one_kind
from upweight.runtime.whole import make_folder, remove_left_over, replacing, require_no_link
from upweight.scores import Scores, told_of

SCHEMA = 2

BLOCK = 4_000_000
"""Scores that are turned from examples first to queries first at once."""

WAY_OUT = (
    "free space, or copy the folder to a disk with room and open it there; the scores are as they "
    "were."
)


@dataclass(frozen=True)
class _Made:
    """What made.json holds: the state and the hash of each file, and the hash of the copy."""

    of: Mapping[str, str]
    values: str


def opened(
    folder: Folder, held: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
) -> Scores:
    """The scores of a folder: of `ScoreShards`, or what `Scores.save` wrote.

    Args:
        folder: The folder; of shards it gets a subfolder `by-query` of the same size again.
        held: Keeps other processes away while that is made. A folder that has it may be read-only.

    Raises:
        DataError: There are no scores.
        ShapeError: The pass over the training data did not finish.
        StaleStore: A file is damaged.
        NotWritten: There is no room for the copy.

    Cost: the first time one pass over the scores, to turn them; each time one to see that they are
    what was written, and one to see that all are finite.
    """
    path = Path(folder)
    if not (path / "manifest.json").exists():
        if (path / "scores.json").exists():
            return Scores.load(path)
        raise DataError(
            "A view needs a folder with scores.",
            f"{path}, with neither manifest.json nor scores.json.",
            "the folder above it, or a run that has not begun.",
            "give the folder that write(…) or scores.save(…) was given.",
        )
    require_one_kind(path, "scores.json")
    require_no_link(path / "by-query")
    shards = ScoreShards.load(path)
    values = _copy(shards)
    if values is None:
        with held():
            values = _copied(shards)
    unit, provenance = told_of(shards)
    return Scores(values, unit, provenance)


def keeping(folder: Folder) -> Path | None:
    """Where things made of the scores of a folder may be kept; None where there is no copy."""
    path = Path(folder) / "by-query"
    return path if (path / "made.json").exists() else None


def copied(folder: Path) -> str:
    """The hash of the copy in a folder that `keeping` gave.

    Raises:
        FileNotFoundError, StaleStore: There is none, or one of which nothing is known.
    """
    return read_json(folder / "made.json", SCHEMA, _Made, "").values


def _copy(shards: ScoreShards) -> torch.Tensor | None:
    """The copy; None where there is none, or one of other files, or an altered one."""
    folder = shards.directory / "by-query"
    try:
        made = read_json(folder / "made.json", SCHEMA, _Made, "")
        source = _source(shards)
        if _hashes(made.of) != _hashes(source):
            return None
        if made.of != source:  # files that were copied have new times: read them to be sure
            shards.verify()
        values = _mapped(shards)
    except (StaleStore, OSError):
        return None
    return values if values is not None and digest(values) == made.values else None


def _mapped(shards: ScoreShards) -> torch.Tensor | None:
    """The numbers of the copy, whatever they are; None where the file is none of their size."""
    path, header = shards.directory / "by-query" / "values.npy", _npy_header(shards)
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        fits = os.fstat(file.fileno()).st_size == len(header) + 4 * shards.q * shards.n
        if not fits or file.read(len(header)) != header:
            return None
        # Copy on write: PyTorch wants memory that could be written, and the file stays as it is.
        shape = (shards.q, shards.n)
        return torch.from_numpy(np.memmap(file, "<f4", "c", len(header), shape))


def _npy_header(shards: ScoreShards) -> bytes:
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (shards.q, shards.n)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _source(shards: ScoreShards) -> dict[str, str]:
    """The files that the copy is made of, each with its state and its hash."""
    found = {}
    for name, told in shards.digests().items():
        state = (shards.directory / name).stat()
        found[name] = f"{state.st_size} {state.st_mtime_ns} {told}"
    return found


def _hashes(of: Mapping[str, str]) -> dict[str, str]:
    return {name: told.rpartition(" ")[2] for name, told in of.items()}


def _copied(shards: ScoreShards) -> torch.Tensor:
    """The copy, made anew."""
    folder = shards.directory / "by-query"
    target = folder / "values.npy"
    make_folder(folder, WAY_OUT)
    remove_left_over(folder)
    try:
        for stale in (folder / "made.json", *folder.glob("totals-*")):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise NotWritten(_no_room(shards, error)) from error
    with replacing(target, WAY_OUT) as file:
        _turn(shards, file)
    values = _mapped(shards)
    assert values is not None
    write_json(folder / "made.json", SCHEMA, {"of": _source(shards), "values": digest(values)})
    return values


def _turn(shards: ScoreShards, file: Any) -> None:
    q, n, header = shards.q, shards.n, _npy_header(shards)
    file.write(header)
    file.flush()
    _claim(shards, file, len(header) + 4 * q * n)
    out = np.memmap(file, dtype="<f4", mode="r+", offset=len(header), shape=(q, n))
    parts = ((start, start + len(part), (first, part)) for first, start, part in shards.pieces())
    for start, _, (first, part) in progress(parts, n, "rows by query"):
        values = part.float().numpy()
        size = max(1, BLOCK // max(1, values.shape[1]))
        for k in range(0, len(values), size):
            rows = values[k : k + size]
            out[first : first + rows.shape[1], start + k : start + k + len(rows)] = rows.T
    out.flush()


def _claim(shards: ScoreShards, file: Any, size: int) -> None:
    """Take the room for a file now: writing to a map on a full disk would end the process."""
    try:
        os.ftruncate(file.fileno(), size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise NotWritten(_no_room(shards, error)) from error


def _no_room(shards: ScoreShards, error: OSError) -> str:
    return message(
        "A view needs room for a second copy of the scores.",
        f"{4 * shards.q * shards.n / 1e9:.1f} GB for {shards.directory / 'by-query'}: {error}",
        "a full disk or quota, or a disk that is mounted for reading only.",
        WAY_OUT,
    )
