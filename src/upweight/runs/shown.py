"""RUN/shown: what a page shows of the data, so that a run can be looked at without its project.

    shown.safetensors    numbers: thumbnails, rows, losses
    shown.json           texts, the hash of the other, and of which model and data they are; last

Written after the scores. Neither file can run anything.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from upweight.errors import StaleStore
from upweight.runs.directory import Run
from upweight.runtime.headers import read_json, write_json
from upweight.runtime.whole import make_folder, write_whole

SCHEMA = 2

Facts = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class _Shown:
    """What shown.json holds."""

    numbers: str  # the hash of the other file
    of: Mapping[str, str]  # which model and data
    facts: Mapping[str, Any]


def write(run: Run, facts: Facts, arrays: Arrays) -> None:
    """Keep it in place of what was kept before.

    Raises:
        OSError: The disk is full or not writable.
    """
    make_folder(run.shown)
    numbers = safetensors.numpy.save({k: np.ascontiguousarray(x) for k, x in arrays.items()})
    header = {
        "numbers": hashlib.sha256(numbers).hexdigest(),
        "of": run.record.fingerprints,
        "facts": facts,
    }
    write_whole(run.shown / "shown.safetensors", numbers)
    write_json(run.shown / "shown.json", SCHEMA, header)


def read(run: Run) -> tuple[Facts, Arrays]:
    """What `write` wrote.

    Raises:
        StaleStore: It is not there, damaged, or of another model or data.
    """
    way_out = (
        "name the project, if you trust it: its code then runs, and what it shows is kept for the "
        f"next time: {run.command('report')}"
    )

    def refused(given: str, cause: str) -> StaleStore:
        required = "A page of a run alone is made of what attribute kept to show."
        return StaleStore(required, f"{given}.", cause, way_out)

    try:
        header = read_json(run.shown / "shown.json", SCHEMA, _Shown, way_out)
        numbers = (run.shown / "shown.safetensors").read_bytes()
        arrays = safetensors.numpy.load(numbers)
    except FileNotFoundError as error:
        cause = "it was made by upweight 0.1.0, or its attribute was stopped after the scores."
        raise refused("a run that holds no such thing", cause) from error
    except StaleStore:
        raise
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        given = f"{run.shown}: {type(error).__name__}: {error}"
        raise refused(given, "a file that was cut or edited.") from error
    if header.numbers != hashlib.sha256(numbers).hexdigest():
        raise refused(f"{run.shown}, whose files are not of each other", "an edited file.")
    if header.of != run.record.fingerprints:
        raise refused(f"{run.shown}, of another model or other data", "a copied folder.")
    return header.facts, arrays
