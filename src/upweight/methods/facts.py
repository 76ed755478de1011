"""What the numbers of `provenance.health` mean, in the order a careful reader asks.

θ̂ at a minimum · Σᵢ S[q, i] = ∇mᵀ H⁻¹ ∇R · H + λI inverted to a residual · products · damping
"""

import math
from collections.abc import Mapping
from typing import Any

from upweight.facts import FIRST_ORDER, REMOVAL_LIMIT, Fact
from upweight.notation import count, percent, readable

SUM = "Sum of scores (row-sum excess)"
COMPRESSION = "Compression of products (contraction)"
"""Names of facts, with the field's term."""

RESIDUAL_LIMIT = 1e-3
"""Relative residual of a solve that would change the third digit of a score."""
NOISE_LIMIT = 0.5
"""Of the scores beyond two standard errors, the part that chance alone would give."""
BEYOND_BY_CHANCE = 0.05
"""Of a normal variable, about what lies beyond two standard errors."""
ROW_SUM_LIMIT = 1e-2
"""Row-sum excess over the sum of |scores|: past it the scores miss an effect they should have."""
DECREMENT_LIMIT = 1e-4
"""What a Newton step would still gain, over the mean loss: past it θ̂ is not yet the minimum."""


def stated(health: Mapping[str, Any]) -> tuple[Fact, ...]:
    """The facts of numbers that `upweight.methods.health` measured; those not there are left out.

    Args:
        health: As in `Provenance.health`.
    """
    found = (_minimum, _row_sum, _solver, _contraction, _damping, _seen, _noise, _beyond)
    return tuple(fact for each in found if (fact := each(health)) is not None)


def _number(health: Mapping[str, Any], name: str) -> float | None:
    value = health.get(name)
    return float(value) if isinstance(value, int | float) else None


def _minimum(health: Mapping[str, Any]) -> Fact | None:
    gradient = _number(health, "gradient_norm")
    if gradient is None:
        return None
    value = f"‖∇J‖ = {readable(gradient)}"
    decrement, loss = _number(health, "decrement"), _number(health, "mean_loss")
    if decrement is None:
        meaning = "the theory is about a minimum, where this is zero"
        return Fact("At a minimum", value, meaning=meaning)
    gain = decrement / loss if loss else math.inf
    meaning = f"one Newton step would lower the objective by {readable(decrement)}"
    if loss is not None and math.isfinite(gain):
        meaning += f", {readable(gain, 2)} of the mean loss {readable(loss)}"
    past = "the fit stopped before its minimum (Newton decrement)"
    return Fact("At a minimum", value, DECREMENT_LIMIT, meaning, gain, past)


def _row_sum(health: Mapping[str, Any]) -> Fact | None:
    excess = _number(health, "row_sum_excess_relative")
    if excess is None:
        return None
    meaning = (
        "how far a query's scores are from adding up as they do at a minimum, relative to their "
        "size: upweighting everything alike must do only what the penalty says"
    )
    past = "a query's scores do not add up as at a minimum (row-sum excess)"
    return Fact(SUM, readable(excess), ROW_SUM_LIMIT, meaning, excess, past)


def _solver(health: Mapping[str, Any]) -> Fact | None:
    if "solver" not in health:
        return None
    residual = _number(health, "largest_residual")
    steps = _number(health, "solver_steps")
    value = str(health["solver"]) + (f", {count(int(steps), 'step')}" if steps else "")
    error = _number(health, "standard_error")
    if error is not None:
        left = _number(health, "residual")
        meaning = (
            f"standard error of a query's scores from drawn minibatches {readable(error)} of their "
            f"size, residual over all the data {readable(left or 0.0)}; largest of the queries"
        )
        return Fact("Solver", value, meaning=meaning)
    if residual is None:
        return Fact("Solver", value, meaning="the residual was not recorded")
    meaning = f"largest residual ‖Ax − b‖/‖b‖ = {readable(residual)}"
    past = "the solver stopped early (residual)"
    return Fact("Solver", value, residual_allowed(health), meaning, residual, past)


def residual_allowed(health: Mapping[str, Any]) -> float:
    """The relative residual above which a solve is unfinished: what was asked for, if it was more.

    Args:
        health: As in `Provenance.health`.
    """
    return max(RESIDUAL_LIMIT, _number(health, "solver_rtol") or 0.0)


def _contraction(health: Mapping[str, Any]) -> Fact | None:
    error, tolerance = _number(health, "contraction_error"), _number(health, "tolerance")
    if error is None or tolerance is None:
        return None
    if tolerance == 0.0:
        return Fact(COMPRESSION, "exact", meaning="every product was formed in full")
    worst = _number(health, "contraction_error_worst")
    meaning = (
        "error of a query's scores against the products in full, ‖Ŝ − S‖/‖S‖, measured on some "
        f"queries and examples: root mean square{f', worst {readable(worst)}' if worst else ''}; "
        "the limit is the tolerance asked for"
    )
    past = "products were compressed more than tolerance= allows (contraction)"
    return Fact(COMPRESSION, readable(error), tolerance, meaning, error, past)


def _damping(health: Mapping[str, Any]) -> Fact | None:
    damping = _number(health, "damping")
    if damping is None:
        return None
    spectrum = [
        f"{words} {readable(number)}"
        for words, name in (
            ("mean eigenvalue", "mean_eigenvalue"),
            ("smallest eigenvalue", "solver_smallest_eigenvalue"),
            ("largest eigenvalue", "solver_largest_eigenvalue"),
            ("smallest Ritz value of H + λI", "solver_smallest_ritz"),
            ("largest", "solver_largest_ritz"),
            ("condition number at least", "solver_condition"),
        )
        if (number := _number(health, name)) is not None
    ]
    about = ", ".join(spectrum) or "the spectrum was not estimated"
    if damping == 0.0:
        return Fact("Damping", "none", meaning=f"the curvature is inverted as it is: {about}")
    means = "λ makes scores those of an objective with λ/2·‖θ − θ̂‖² added"
    if "blocks" in health:
        blocks = list(health["blocks"].values())
        entries = sum(int(block["entries"]) for block in blocks)
        below = sum(float(block["below_damping"]) * int(block["entries"]) for block in blocks)
        lams = [float(block["damping"]) for block in blocks]
        low, high = readable(min(lams)), readable(max(lams))
        meaning = (
            f"{means}; {percent(below / entries)} of all eigenvalues are below their block's λ, "
            "as the table of blocks shows"
        )
        value = f"λ = {low}" if low == high else f"λ from {low} to {high}"
        return Fact("Damping", value, meaning=meaning)
    mean = _number(health, "mean_eigenvalue")
    share = f" = {readable(damping / mean)} × mean eigenvalue" if mean else ""
    return Fact("Damping", f"λ = {readable(damping)}{share}", meaning=f"{means}; {about}")


def _seen(health: Mapping[str, Any]) -> Fact | None:
    blocks = health.get("blocks")
    if not isinstance(blocks, Mapping):
        return None
    errors = [float(block.get("mean_eigenvalue_error", 0.0)) for block in blocks.values()]
    if not any(errors):
        return None
    meaning = "largest standard error of a block's mean eigenvalue, from seeing a part of the data"
    return Fact("Curvature", f"± {percent(max(errors))}", meaning=meaning)


def _noise(health: Mapping[str, Any]) -> Fact | None:
    share = _number(health, "share_beyond_two_errors")
    if share is None:
        return None
    by_chance = min(1.0, BEYOND_BY_CHANCE / share) if share else 1.0
    meaning = f"chance alone would give {percent(by_chance)} of them"
    if by_chance > NOISE_LIMIT:
        meaning += ": the order is mostly noise, and more trainings make it less"
    value = f"{percent(share)} of the scores exceed two standard errors"
    past = "most of what looks like an effect may be chance (noise)"
    return Fact("Noise", value, NOISE_LIMIT, meaning, by_chance, past)


def _beyond(health: Mapping[str, Any]) -> Fact | None:
    known = health.get("beyond_first_order")
    if not known:
        return None
    told = ", ".join(
        f"{'no minimum' if off is None else f'{100 * off:.2g} %'} for {k:,}" for k, off in known
    )
    meaning = (
        "scores are derivatives in the weights: how far what removing the strongest examples of a "
        "query does, so many together, is from their sum, relative to it"
    )
    past = "removing an example does not do what its score says (leverage)"
    return Fact(FIRST_ORDER, told, REMOVAL_LIMIT, meaning, known[0][1], past)
