"""What does each fact mean to somebody who acts on the scores: what is wrong, how bad, what to do?

A sentence for each fact that methods state; the numbers and their limits stand elsewhere. A fact
without a sentence here is told in its own words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from upweight.facts import FIRST_ORDER, Fact
from upweight.methods.facts import COMPRESSION, RESIDUAL_LIMIT, SUM
from upweight.notation import count, percent
from upweight.report.evidence import Evidence
from upweight.scores import Scores


@dataclass(frozen=True)
class Sentence:
    """A fact in a sentence, and what to do about it: nothing where it is no concern."""

    said: str
    todo: str = ""

    @property
    def concern(self) -> bool:
        """Whether there is something to do."""
        return bool(self.todo)


def plainly(scores: Scores, evidence: Evidence) -> list[Sentence]:
    """A sentence for each fact: what is to be done something about first."""
    health = scores.provenance.health
    found = [_retraining(evidence)]
    for fact in scores.provenance.facts:
        known = SENTENCES.get(fact.name)
        found.append(_own_words(fact) if known is None else known(fact, health))
    if scores.error is not None:
        share = float(scores.error.norm() / scores.values.norm())
        found.append(
            Sentence(f"What was drawn at random changes scores by about {percent(share)}.")
        )
    return sorted(found, key=lambda each: not each.concern)


def _retraining(evidence: Evidence) -> Sentence:
    if evidence.series:
        removals = len({removal for each in evidence.series for removal in each.removed})
        return Sentence(f"{count(removals, 'removal')} were made and the model retrained without.")
    if evidence.comparison is not None:
        models = count(evidence.comparison.models, "model")
        return Sentence(
            f"{models} retrained on parts of the data say: {evidence.comparison.verdict}."
        )
    return Sentence(
        "No model was retrained to see whether these scores come true.",
        "check them before acting on their size.",
    )


def _minimum(fact: Fact, _: Mapping[str, Any]) -> Sentence:
    if not fact.concern:
        return Sentence("The model is at the minimum of its objective, as the scores assume.")
    gain = "" if fact.number is None else f" by {percent(fact.number)} of the mean loss"
    return Sentence(
        f"The fit stopped before its minimum: one more step would lower the objective{gain}.",
        "train on (scikit-learn: tol=1e-8 and a larger max_iter), or read scores as approximate.",
    )


def _row_sum(fact: Fact, _: Mapping[str, Any]) -> Sentence:
    if not fact.concern:
        return Sentence("The scores of each query add up as the theory says.")
    off = "an unknown amount" if fact.number is None else f"{percent(fact.number)} of their size"
    return Sentence(
        f"The scores of a query do not add up to what the theory says: they are off by {off}.",
        "read their order, not their size. Usual causes are training that stopped early, weight "
        "decay that penalty= does not name, and damping.",
    )


def _solver(fact: Fact, _: Mapping[str, Any]) -> Sentence:
    if not fact.concern:
        if fact.number is not None and fact.number > RESIDUAL_LIMIT:
            return Sentence(
                f"The equations behind the scores were solved to {percent(fact.number)}, as asked."
            )
        return Sentence("The equations behind the scores were solved accurately.")
    left = "unknown" if fact.number is None else percent(fact.number)
    return Sentence(
        f"The solver stopped early; what it left over is {left}.",
        "allow more steps, or add damping.",
    )


def _contraction(fact: Fact, _: Mapping[str, Any]) -> Sentence:
    if fact.limit is None:
        return Sentence("All products were formed in full.")
    if not fact.concern:
        assert fact.number is not None
        return Sentence(
            f"Compression and rounding change a query's scores by {percent(fact.number)}."
        )
    off = "an unknown amount" if fact.number is None else percent(fact.number)
    return Sentence(
        f"Compression and rounding change a query's scores by {off}, where {percent(fact.limit)} "
        "was allowed.",
        "give a smaller tolerance=, which takes more memory.",
    )


def _damping(fact: Fact, health: Mapping[str, Any]) -> Sentence:
    if health.get("damping") == 0.0:
        return Sentence("No damping was added.")
    blocks = health.get("blocks")
    if not isinstance(blocks, Mapping):
        return Sentence("Damping was added, which makes scores smaller and smoother.")
    entries = sum(int(block["entries"]) for block in blocks.values())
    below = sum(float(b["below_damping"]) * int(b["entries"]) for b in blocks.values())
    return Sentence(
        f"Damping makes scores smaller and smoother: along {percent(below / max(1, entries))} of "
        "all directions it weighs more than the data."
    )


def _seen(fact: Fact, _: Mapping[str, Any]) -> Sentence:
    return Sentence(f"The curvature was measured on a part of the data: {fact.value}.")


def _removal(fact: Fact, health: Mapping[str, Any]) -> Sentence:
    known = health["beyond_first_order"]
    told = [_away(*each) for each in (known[:1] if len(known) == 1 else (known[0], known[-1]))]
    todo = "show fitted.removal(queries), which allows for leverage, or retrain without them."
    return Sentence(" ".join(told), todo if fact.concern else "")


def _away(number: int, off: float | None) -> str:
    removed = "the strongest example" if number == 1 else f"the {number:,} strongest together"
    if off is None:
        return f"Without {removed} the others determine no minimum."
    score = "its score says" if number == 1 else "their scores add up to"
    return f"What removing {removed} does to a query is {100 * off:.2g} % away from what {score}."


def _own_words(fact: Fact) -> Sentence:
    said = f"{fact.name}: {fact.value}."
    return Sentence(said, f"{fact.told}." if fact.concern else "")


SENTENCES: dict[str, Callable[[Fact, Mapping[str, Any]], Sentence]] = {
    "At a minimum": _minimum,
    SUM: _row_sum,
    "Solver": _solver,
    COMPRESSION: _contraction,
    "Damping": _damping,
    "Curvature": _seen,
    FIRST_ORDER: _removal,
}
"""By the names of `upweight.methods.facts`."""
