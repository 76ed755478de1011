"""RUN/shown: what a page shows of the data, so that a run can be looked at without its project.

A store of numbers (thumbnails, rows, losses) and of what is said of them, of one model and data.
Written after the scores. Nothing in it can run anything.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight.errors import ShapeError, StaleStore
from upweight.runs.directory import Run
from upweight.runtime.store import Store

Facts = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]


def write(run: Run, facts: Facts, arrays: Arrays) -> None:
    """Keep it in place of what was kept before.

    Raises:
        OSError: The disk is full or not writable.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
    Store.replace(run.shown, run.record.fingerprints, {"shown": tensors}, facts)


def read(run: Run) -> tuple[Facts, Arrays]:
    """What `write` wrote; a StaleStore where it is damaged, gone, or of another model or data."""
    again = run.command("report")
    try:
        store = Store.load(run.shown, again)
        store.require(run.record.fingerprints)
        facts, tensors = store.require_finished(), store.read("shown")
    except (FileNotFoundError, ShapeError) as error:
        raise StaleStore(
            "A page of a run alone is made of what attribute kept to show.",
            "a run that holds no such thing, or not all of it.",
            "its attribute was stopped after the scores.",
            "name the project, if you trust it: its code then runs, and what it shows is kept for "
            f"the next time: {again}",
        ) from error
    return facts, {name: each.numpy() for name, each in tensors.items()}
