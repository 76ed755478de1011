"""RUN/shown: what a page shows of the data, so that a run can be looked at without its project.

    shown.safetensors    numbers: thumbnails, rows, losses
    shown.json           texts, a digest of the other, and of which model and data they are; last

Written after the scores. Neither file can run anything.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from upweight.errors import StaleStore, message
from upweight.runs.directory import Run
from upweight.runtime.whole import make_folder, write_whole

SCHEMA = 1

Facts = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]


def write(run: Run, facts: Facts, arrays: Arrays) -> None:
    """Keep it in place of what was kept before.

    Raises:
        OSError: The disk is full or not writable.
    """
    make_folder(run.shown)
    numbers = safetensors.numpy.save({k: np.ascontiguousarray(x) for k, x in arrays.items()})
    told = {
        "schema": SCHEMA,
        "digest": hashlib.sha256(numbers).hexdigest(),
        "of": _of(run),
        "facts": facts,
    }
    (run.shown / "shown.json").unlink(missing_ok=True)
    write_whole(run.shown / "shown.safetensors", numbers)
    write_whole(run.shown / "shown.json", json.dumps(told, separators=(",", ":")).encode())


def read(run: Run) -> tuple[Facts, Arrays]:
    """What `write` wrote.

    Raises:
        StaleStore: It is not there, damaged, or of another model or data.
    """
    if not (run.shown / "shown.json").exists():
        raise _unread(run, "a run that holds no such thing", "it was made by upweight 0.1.0, or "
                      "its attribute was stopped after the scores.")  # fmt: skip
    try:
        told = json.loads((run.shown / "shown.json").read_text(encoding="utf-8"))
        numbers = (run.shown / "shown.safetensors").read_bytes()
        arrays = safetensors.numpy.load(numbers)
        facts, schema, digest, of = (told[k] for k in ("facts", "schema", "digest", "of"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        given = f"{run.shown}: {type(error).__name__}: {error}"
        raise _unread(run, given, "a file that was cut or edited.") from error
    except safetensors.SafetensorError as error:
        raise _unread(run, f"{run.shown}: {error}", "a file that was cut or edited.") from error
    if schema != SCHEMA or not isinstance(facts, dict):
        raise _unread(run, f"{run.shown}, of schema {schema}", "another version of upweight.")
    if digest != hashlib.sha256(numbers).hexdigest():
        raise _unread(run, f"{run.shown}, whose files are not of each other", "an edited file.")
    if of != _of(run):
        raise _unread(run, f"{run.shown}, of another model or other data", "a copied folder.")
    return facts, arrays


def _of(run: Run) -> dict[str, str]:
    record = run.record
    assert record is not None
    return dict(record.fingerprints)


def _unread(run: Run, given: str, cause: str) -> StaleStore:
    return StaleStore(
        message(
            "A page of a run alone is made of what attribute kept to show.",
            f"{given}.",
            cause,
            "name the project, if you trust it: its code then runs, and what it shows is kept for "
            f"the next time: {run.command('report')}",
        )
    )
