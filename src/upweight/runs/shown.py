"""RUN/shown: what a page shows of the data, so that a run can be looked at without its project.

A store of numbers (thumbnails, rows, losses) and of what is said of them, of one model and data.
Written after the scores. Nothing in it can run anything.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from upweight.errors import StaleStore
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
    """What `write` wrote.

    Raises:
        StaleStore: It is not there, damaged, or of another model or data.
    """
    try:
        store = Store.load(run.shown)
        store.require(run.record.fingerprints)
        facts, tensors = store.facts, store.read("shown")
    except (FileNotFoundError, StaleStore) as error:
        is_there = isinstance(error, StaleStore)
        told = str(error).splitlines()
        raise StaleStore(
            "A page of a run alone is made of what attribute kept to show.",
            told[1].removeprefix("  Given: ") if is_there else "a run that holds no such thing.",
            told[2].removeprefix("  Usual cause: ")
            if is_there
            else "its attribute was stopped after the scores.",
            "name the project, if you trust it: its code then runs, and what it shows is kept for "
            f"the next time: {run.command('report')}",
        ) from error
    return facts or {}, {name: each.numpy() for name, each in tensors.items()}
