"""Sums over all scores, kept beside their copy: a view that is started again need not wait."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upweight.report.totals import Grouping, Totals, totals
from upweight.runtime.fingerprint import digest
from upweight.runtime.whole import write_whole
from upweight.scores import Scores


def kept_totals(scores: Scores, groupings: Mapping[str, Grouping], folder: Path | None) -> Totals:
    """`totals`, from the folder where they were kept for the same scores and groups.

    Args:
        scores: S or Δm.
        groupings: Of the columns.
        folder: Where they are kept; it must hold nothing of other scores. None: nowhere.
    """
    if folder is None:
        return totals(scores, groupings)
    told = json.dumps([scores.unit.name, *([name, *g.names] for name, g in groupings.items())])
    codes = [torch.from_numpy(g.codes) for g in groupings.values()]
    target = folder / f"totals-{digest(told, *codes)[:16]}.npz"
    if not target.exists():
        found = totals(scores, groupings)
        held: dict[str, Any] = {"signed": found.signed, "absolute": found.absolute}
        held |= {f"group-{k}": found.groups[each] for k, each in enumerate(groupings)}
        file = io.BytesIO()
        np.savez(file, **held)
        write_whole(target, file.getvalue())
        return found
    with np.load(target, allow_pickle=False) as kept:
        groups = {each: kept[f"group-{k}"] for k, each in enumerate(groupings)}
        return Totals(kept["signed"], kept["absolute"], groups)
