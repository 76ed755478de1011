"""Sums over all scores, kept beside their copy: a view that is started again need not wait."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from upweight.errors import NotWritten, StaleStore
from upweight.report.totals import Grouping, Totals, totals
from upweight.runtime.fingerprint import digest
from upweight.runtime.tensors import read_tensors, write_tensors
from upweight.scores import Scores
from upweight.view.matrix import copied


def keeping_totals(folder: Path | None) -> Callable[[Scores, Mapping[str, Grouping]], Totals]:
    """`totals`, from the folder where they were kept for the same scores and groups.

    Args:
        folder: Where they are kept: that of the copy of these scores. None: nowhere. Sums that were
            altered, or are of other scores, are made again, and where nothing can be written
            nothing is kept.
    """
    try:
        copy = None if folder is None else copied(folder)
    except (FileNotFoundError, StaleStore):
        copy = None
    if folder is None or copy is None:
        return totals

    def summed(scores: Scores, groupings: Mapping[str, Grouping]) -> Totals:
        told = json.dumps([scores.unit.name, *([name, *g.names] for name, g in groupings.items())])
        codes = [torch.from_numpy(g.codes) for g in groupings.values()]
        about = {"of": digest(copy, told, *codes)}
        target = folder / f"totals-{about['of'][:16]}.safetensors"
        with contextlib.suppress(FileNotFoundError, StaleStore):
            held, of = read_tensors(target, "")
            if of == about:
                arrays = {name: each.numpy() for name, each in held.items()}
                groups = {each: arrays[f"group-{k}"] for k, each in enumerate(groupings)}
                return Totals(arrays["signed"], arrays["absolute"], groups)
        found = totals(scores, groupings)
        kept = {"signed": found.signed, "absolute": found.absolute}
        kept |= {f"group-{k}": found.groups[each] for k, each in enumerate(groupings)}
        with contextlib.suppress(NotWritten):
            tensors = {name: torch.from_numpy(each) for name, each in kept.items()}
            write_tensors(target, tensors, about)
        return found

    return summed
