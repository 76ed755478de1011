"""Are two runs of one question the same? In words, and whether that is a failure."""

from typing import Any

import torch

from upweight.runs.directory import Run
from upweight.runs.environment import differences
from upweight.scores import Scores

ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference, over the largest score, that another machine's rounding is taken to explain:
what remains of the digits after sums and a solve. Coarser dtypes have the last."""


def compared(first: Run, second: Run) -> tuple[dict[str, Any], str, bool]:
    """Whether two finished runs have the same scores.

    Returns:
        Facts, the same in words, and whether it is a failure: the scores differ by more than
        rounding, or by rounding though both runs were made by the same versions on one machine.

    Raises:
        StaleStore: Scores are damaged.
    """
    a, b = Scores.load(first.scores), Scores.load(second.scores)
    facts: dict[str, Any] = {"bit_identical": False, "same": "different"}
    if (a.unit, a.values.shape, a.values.dtype) != (b.unit, b.values.shape, b.values.dtype):
        facts["largest_difference"] = None
        return facts, "different: the scores are of another unit, shape or dtype", True
    if torch.equal(*(x.values.contiguous().view(torch.uint8) for x in (a, b))):
        facts |= {"bit_identical": True, "same": "bits", "largest_difference": 0.0}
        return facts, "the same bits: all scores are bit-identical", False
    x, y = a.values.double(), b.values.double()
    apart = float((x - y).abs().max() / x.abs().max())
    limit = ROUNDING.get(a.values.dtype, ROUNDING[torch.float32])
    between, known = _between(first, second)
    facts |= {"largest_difference": apart, "differences": between}
    about = f"the scores differ by up to {apart:.1e} of the largest"
    made = "what machine the first run was made on is not recorded"
    if between:
        made = f"made with different {'; '.join(between)}"
    elif known:
        made = "made with the same versions and threads, on the same kind of machine"
    if not apart <= limit:  # NaN is different too
        return facts, f"different: {about}, more than rounding ({limit:.0e}); {made}", True
    facts["same"] = "rounding"
    if known and not between:
        said = f"not the same bits, though {made}: {about}. Something is not deterministic"
        return facts, said, True
    return facts, f"the same to rounding: {about}; {made}", False


def _between(first: Run, second: Run) -> tuple[list[str], bool]:
    """What the two were made with that differs, and whether both say what they were made with."""
    a, b = first.record, second.record
    known = bool(a.environment and b.environment)
    made = [{**(r.environment if known else r.versions), "threads": str(r.threads)} for r in (a, b)]
    mine, theirs = ({**r.sources, **r.files} for r in (a, b))
    edited = [f"{name} was edited" for name in mine if theirs.get(name) != mine[name]]
    return differences(*made) + edited, known
