"""Sums over all scores, kept beside them: a view that is started again need not wait."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from upweight._typing import Folder
from upweight.errors import NotWritten, StaleStore
from upweight.report.answers import Summed
from upweight.report.totals import Grouping, Totals, totals
from upweight.runtime.fingerprint import digest
from upweight.runtime.store import Store
from upweight.scores import Scores, stored_in


def keeping_totals(folder: Folder | None) -> Summed:
    """`totals`, from where they were kept for the same scores and groups.

    Args:
        folder: That of the scores, which gets a subfolder `totals`. None: nowhere. Sums that were
            altered, or are of other scores, are made again, and where nothing can be written
            nothing is kept.
    """
    if folder is None:
        return totals
    place = Path(folder) / "totals"

    def summed(scores: Scores, groupings: Mapping[str, Grouping]) -> Totals:
        told = json.dumps([scores.unit.name, *([name, *g.names] for name, g in groupings.items())])
        codes = [torch.from_numpy(g.codes) for g in groupings.values()]
        about = {"scores": stored_in(folder)[0].digest, "groups": digest(told, *codes)}
        with contextlib.suppress(FileNotFoundError, StaleStore):
            store = Store.load(place)
            store.require(about)
            held = {name: each.numpy() for name, each in store.read("totals").items()}
            groups = {name: held[f"group-{k}"] for k, name in enumerate(groupings)}
            return Totals(held["signed"], held["absolute"], groups)
        found = totals(scores, groupings)
        kept = {"signed": found.signed, "absolute": found.absolute}
        kept |= {f"group-{k}": found.groups[name] for k, name in enumerate(groupings)}
        with contextlib.suppress(NotWritten):
            if not place.is_symlink():
                tensors = {name: torch.from_numpy(each) for name, each in kept.items()}
                Store.replace(place, about, {"totals": tensors}, {})
        return found

    return summed
