"""What the page may claim: the verdict on its scores, and whether sizes are printed.

    a comparison with retraining     its verdict; sizes from "Order and size" on
    8 removals or more               the worst of their verdicts
    neither                          none; sizes where the computation itself supports them, see
                                     `upweight.provenance.Provenance.against_removal`

What is shown of removals, the scores or better predictions, may itself say that some of them miss;
then there are no sizes, whatever was found of others. Elsewhere the page shows ranks and bars: a
predicted change there is a number nobody has looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from upweight.effects import FIRST_ORDER, Effects
from upweight.methods.removal import MEASURED, SUMMED
from upweight.report.evidence import Evidence
from upweight.scores import Scores, Unit
from upweight.verdict import Verdict

MISSED = "removal: "
"""How a removal's notes on itself start. They say that its predicted changes may be off, apart from
those that say how it was predicted."""

CAUTIONS = {
    Verdict.DOUBT: "not to be believed",
    Verdict.ORDER: "size not supported",
    Verdict.SIZE: "",
}
LEVELS = {Verdict.DOUBT: "doubt", Verdict.ORDER: "order", Verdict.SIZE: "size"}


@dataclass(frozen=True)
class Trust:
    """The banner of the page: the verdict, or that there is none, and why.

    `level` is its colour, and `caution` stands in place of sizes, empty where they are printed.
    """

    title: str
    reason: str
    level: str
    caution: str
    notes: tuple[str, ...] = ()

    @property
    def data(self) -> dict[str, Any]:
        """What every card says of it."""
        return {"caution": self.caution, "verdict": {"title": self.title, "level": self.level}}

    @property
    def has_sizes(self) -> bool:
        """Whether predicted changes are printed."""
        return not self.caution


def trust(scores: Scores, evidence: Evidence, removal: Effects | None = None) -> Trust:
    """What is known of these scores, and of the better predictions that are shown beside them."""
    shown: list[Scores | Effects] = [scores] if removal is None else [scores, removal]
    found = _trust(scores, shown, evidence)
    found = replace(found, notes=tuple(dict.fromkeys((*found.notes, *evidence.notes))))
    missed = _missed(shown)
    if missed is None or not found.has_sizes:
        return found
    # Of what was retrained the sizes were right; the removals shown are others.
    return _found(Verdict.ORDER, f"{found.reason}; but {missed}", found.notes)


def _trust(scores: Scores, shown: Sequence[Scores | Effects], evidence: Evidence) -> Trust:
    comparison = evidence.comparison
    if comparison is not None:
        notes = tuple(note for note in comparison.notes if note not in comparison.reason)
        return _found(comparison.verdict, comparison.reason, notes)
    found = evidence.judgement
    if found is not None:
        return _found(found.verdict, found.reason)
    title = "Not checked against retraining"
    if scores.unit is Unit.RANK:
        reason = "these scores have an order within each query and no size"
        return Trust(title, reason, "unchecked", "scores only rank")
    few = "the removals below are too few for a verdict; " if evidence.series else ""
    notes = (_missed(shown), *(_against(each, len(shown) == 1) for each in shown))
    against = next(filter(None, notes), None)
    if against is None and "against_sizes" in scores.provenance.health:
        reason = f"{few}the method itself trained again, and its sizes are of what that measured"
        return Trust(title, reason, "unchecked", "")
    if against is None:
        reason = (
            f"{few}the curvature is exact, the objective convex and the model at its minimum, so "
            "sizes are good to first order"
        )
        return Trust(title, reason, "unchecked", "")
    reason = f"{few}read the order of the scores, not their size: {against}"
    return Trust(title, reason, "unchecked", "size not checked")


def _against(each: Scores | Effects, is_predicted: bool) -> str:
    """Why not to read its sizes; of scores as removals only where no others are shown."""
    made = each.provenance
    if isinstance(each, Effects):
        return made.against_removal() if each.how == FIRST_ORDER else made.against_sizes
    return each.against_sizes if is_predicted else made.against_sizes


def _found(verdict: Verdict, reason: str, notes: tuple[str, ...] = ()) -> Trust:
    caution = CAUTIONS[verdict]
    return Trust(verdict.value, reason, LEVELS[verdict], caution, notes)


def _missed(shown: Sequence[Scores | Effects]) -> str | None:
    """What removals say of themselves, in the first sentence of their note; None: nothing."""
    for scores in shown:
        for note in scores.provenance.notes:
            if note.startswith(MISSED) and note not in (MEASURED, SUMMED):
                first = note.removeprefix(MISSED).partition(". ")[0].rstrip(".")
                return f"the removals' own note says: {first}"
    return None
