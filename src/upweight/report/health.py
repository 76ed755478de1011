"""Can these scores be trusted? What the computation says about itself, in sentences.

    H + λI inverted to a residual · θ̂ at a minimum · Σᵢ S[q, i] = ∇mᵀ H⁻¹ ∇R · agreement

A mark is put only where a number is past a limit that is written beside it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upweight.report.check import Check, Comparison
from upweight.report.facts import noun_of
from upweight.report.notation import count, interval, readable
from upweight.report.spectrum import percent
from upweight.scores import DECREMENT_LIMIT, RESIDUAL_LIMIT, ROW_SUM_LIMIT, Scores, Unit
from upweight.verdict import Verdict


@dataclass(frozen=True)
class Fact:
    """One line of the health panel.

    Args:
        name: What it is about.
        value: The number or choice, in words.
        meaning: Why it matters.
        concern: Whether it is past its limit.
    """

    name: str
    value: str
    meaning: str
    concern: bool = False


def convention(scores: Scores, has_sizes: bool = True) -> str:
    """The unit and its sign, in a sentence or two.

    Args:
        scores: S, Δm or ranks.
        has_sizes: Whether anything supports the sizes of predicted changes.
    """
    m = noun_of(scores)
    if scores.unit is Unit.DERIVATIVE:
        return (
            f"A score is ∂{m}/∂w, the change of the {m} per unit of weight on one training "
            f"example in (1/n) Σ wᵢ ℓᵢ + R: positive raised the {m}, negative lowered it. "
            "Removing the example sets its weight from 1 to 0, so the score predicts a change "
            + ("of minus itself." if has_sizes else "the other way; its size is not supported.")
        )
    if scores.unit is Unit.DIFFERENCE:
        return (
            f"A score is minus the predicted change of the {m} when the example is removed from "
            f"(1/n) Σ wᵢ ℓᵢ + R (its weight goes from 1 to 0): positive raised the {m}, negative "
            "lowered it."
        )
    return "Only the order of scores within one query means anything; they predict no change."


def verdict(checks: Sequence[Check], noun: str) -> str:
    """What removals and retraining found, without a judgement it cannot support."""
    # One prediction, of all the queries that were checked: the best query alone would flatter it.
    by_label: dict[str, list[Check]] = {}
    for check in checks:
        by_label.setdefault(check.label, []).append(check)
    best = min(by_label.values(), key=lambda each: max(map(_miscalibration, each)))
    removed = _removed(best[0], noun)
    known = [c for c in best if math.isfinite(c.pearson[0]) and math.isfinite(c.slope[0])]
    if not known:
        return f"{removed} That is too little to say how well prediction and change agree."
    label = best[0].label
    if len(known) > 1:
        return (
            f"{removed} On {len(known)} queries the {label} prediction correlates with the "
            f"measured change at {_range([c.pearson[0] for c in known])}; the measured change is "
            f"{_range([c.slope[0] for c in known])} times the predicted one."
        )
    brackets = " (95% intervals in brackets)" if math.isfinite(known[0].slope[1]) else ""
    return (
        f"{removed} The {label} prediction correlates with the measured change at "
        f"{interval(known[0].pearson)}; the measured change is {interval(known[0].slope)} times "
        f"the predicted one{brackets}."
    )


def _removed(check: Check, noun: str) -> str:
    """What was done, in a sentence."""
    removals, sizes = len(check.examples), {len(removal) for removal in check.removed}
    again = f" from {check.repeats} seeds each" if check.repeats > 1 else ""
    if sizes == {1}:
        were = "were really removed, one at a time," if removals > 1 else "was really removed"
        return f"{count(removals, f'training {noun}')} {were} and the model retrained{again}."
    size = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    were = "were really removed, one set at a time," if removals > 1 else "was really removed"
    return (
        f"{count(removals, 'set')} of {size} training {noun}s {were} and the model "
        f"retrained{again}."
    )


def _range(values: Sequence[float]) -> str:
    nothing = (math.nan, math.nan)
    low, high = (interval((v, *nothing), 2) for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _miscalibration(check: Check) -> float:
    """|log slope|: twice too large is as bad as twice too small."""
    slope = check.slope[0]
    return abs(math.log(slope)) if math.isfinite(slope) and slope > 0 else math.inf


def health(
    scores: Scores, checks: Sequence[Check], comparison: Comparison | None = None
) -> list[Fact]:
    """The lines of the health panel, in the order a careful reader asks."""
    known = scores.provenance.health
    facts = [_retraining(checks, comparison), *computation(scores)]
    facts += [*_contraction(known), *_damping(known), *_seen(known)]
    facts += [*_error(scores), *_time(scores)]
    return facts


def computation(scores: Scores) -> list[Fact]:
    """What says whether an exact method computed what it claims: minimum, row sums, solver."""
    known = scores.provenance.health
    return [*_minimum(known), *_row_sum(known), *_solver(known)]


def _number(known: Mapping[str, Any], name: str) -> float | None:
    value = known.get(name)
    return float(value) if isinstance(value, int | float) else None


def _retraining(checks: Sequence[Check], comparison: Comparison | None) -> Fact:
    if not checks and comparison is not None:
        meaning = "on random subsets of the data, for all queries at once"
        value = f"{count(comparison.models, 'model')}: {comparison.verdict}"
        return Fact("Retraining", value, meaning, comparison.verdict is not Verdict.SIZE)
    if not checks:
        return Fact("Retraining", "not compared", "nothing here shows that removal does this", True)
    queries = len({check.query for check in checks})
    removals = len({removal for check in checks for removal in check.removed})
    meaning = "the comparison holds for these; for others it is evidence, not proof"
    repeats = max(check.repeats for check in checks)
    if repeats > 1:
        meaning = f"each the mean of {repeats} retrainings from their own seeds; {meaning}"
    return Fact("Retraining", f"{count(removals, 'removal')}, {count(queries, 'query')}", meaning)


def _minimum(known: Mapping[str, Any]) -> list[Fact]:
    gradient = _number(known, "gradient_norm")
    if gradient is None:
        return []
    value = f"‖∇J‖ = {readable(gradient)}"
    decrement, loss = _number(known, "decrement"), _number(known, "mean_loss")
    if decrement is None:
        return [Fact("At a minimum", value, "the theory is about a minimum, where this is zero")]
    gain = decrement / loss if loss else math.inf
    meaning = (
        f"one Newton step would lower the objective by {readable(decrement)}"
        + (f", mean loss {readable(loss)}" if loss is not None else "")
        + f"; marked from {readable(DECREMENT_LIMIT, 1)} of the loss"
    )
    # `not <`: a NaN decrement, where the curvature could not be inverted, is a concern.
    return [Fact("At a minimum", value, meaning, not gain < DECREMENT_LIMIT)]


def _row_sum(known: Mapping[str, Any]) -> list[Fact]:
    excess = _number(known, "row_sum_excess_relative")
    if excess is None:
        return []
    meaning = (
        "upweighting everything alike must do only what the penalty says; marked from "
        f"{readable(ROW_SUM_LIMIT, 1)} of the scores"
    )
    return [Fact("Row-sum excess", readable(excess), meaning, not excess < ROW_SUM_LIMIT)]


def _solver(known: Mapping[str, Any]) -> list[Fact]:
    if "solver" not in known:
        return []
    residual = _number(known, "largest_residual")
    steps = _number(known, "solver_steps")
    value = str(known["solver"])
    if steps:
        value += f", {count(int(steps), 'step')}"
    if residual is None:
        return [Fact("Solver", value, "the residual was not recorded")]
    meaning = (
        f"largest residual ‖Ax − b‖/‖b‖ = {readable(residual)}; marked from "
        f"{readable(RESIDUAL_LIMIT, 1)}"
    )
    return [Fact("Solver", value, meaning, not residual < RESIDUAL_LIMIT)]


def _contraction(known: Mapping[str, Any]) -> list[Fact]:
    error, tolerance = _number(known, "contraction_error"), _number(known, "tolerance")
    if error is None or tolerance is None:
        return []
    if tolerance == 0.0:
        return [Fact("Contraction", "exact", "every product was formed in full")]
    worst = _number(known, "contraction_error_worst")
    meaning = (
        "error of a query's scores against the products in full, ‖Ŝ − S‖/‖S‖, measured on some "
        f"queries and examples: root mean square{f', worst {readable(worst)}' if worst else ''}; "
        f"tolerance {readable(tolerance, 1)}, marked past it"
    )
    return [Fact("Contraction", readable(error), meaning, not error <= tolerance)]


def _seen(known: Mapping[str, Any]) -> list[Fact]:
    blocks = known.get("blocks")
    if not isinstance(blocks, Mapping):
        return []
    errors = [float(block.get("mean_eigenvalue_error", 0.0)) for block in blocks.values()]
    if not any(errors):
        return []
    meaning = "largest standard error of a block's mean eigenvalue, from seeing a part of the data"
    return [Fact("Curvature", f"± {percent(max(errors))}", meaning)]


def _damping(known: Mapping[str, Any]) -> list[Fact]:
    damping = _number(known, "damping")
    if damping is None:
        return []
    spectrum = [
        f"{words} {readable(number)}"
        for words, name in (
            ("mean eigenvalue", "mean_eigenvalue"),
            ("smallest eigenvalue", "solver_smallest_eigenvalue"),
            ("largest eigenvalue", "solver_largest_eigenvalue"),
            ("condition number at least", "solver_condition"),
        )
        if (number := _number(known, name)) is not None
    ]
    about = ", ".join(spectrum) or "the spectrum was not estimated"
    if damping == 0.0:
        return [Fact("Damping", "none", f"the curvature is inverted as it is: {about}")]
    if "blocks" in known:
        return _damping_by_block(known["blocks"])
    mean = _number(known, "mean_eigenvalue")
    share = f" = {readable(damping / mean)} × mean eigenvalue" if mean else ""
    meaning = f"λ makes scores those of an objective with λ/2·‖θ − θ̂‖² added; {about}"
    return [Fact("Damping", f"λ = {readable(damping)}{share}", meaning)]


def _damping_by_block(blocks: Mapping[str, Any]) -> list[Fact]:
    lams = [float(block["damping"]) for block in blocks.values()]
    entries = [int(block["entries"]) for block in blocks.values()]
    below = sum(
        float(block["below_damping"]) * size
        for block, size in zip(blocks.values(), entries, strict=True)
    )
    low, high = readable(min(lams)), readable(max(lams))
    meaning = (
        f"λ makes scores those of an objective with λ/2·‖θ − θ̂‖² added; "
        f"{percent(below / sum(entries))} of all eigenvalues are below their block's λ, "
        "as the table of blocks shows"
    )
    return [Fact("Damping", f"λ = {low}" if low == high else f"λ from {low} to {high}", meaning)]


def _error(scores: Scores) -> list[Fact]:
    if scores.error is None:
        return []
    relative = float(scores.error.norm() / scores.values.norm())
    meaning = "root mean square of the standard errors over that of the scores"
    return [Fact("Standard error", readable(relative), meaning)]


def _time(scores: Scores) -> list[Fact]:
    seconds = scores.provenance.seconds
    if not seconds:
        return []
    # "fit: pass 1" is a part of "fit".
    stages = {name: float(s) for name, s in seconds.items() if ": " not in name}
    words = []
    for name, s in stages.items():
        parts = [
            f"{part.removeprefix(f'{name}: ')} {readable(float(took))} s"
            for part, took in seconds.items()
            if part.startswith(f"{name}: ")
        ]
        words.append(f"{name} {readable(s)} s" + (f" (of which {', '.join(parts)})" * bool(parts)))
    return [Fact("Time", f"{readable(sum(stages.values()))} s", ", ".join(words))]
