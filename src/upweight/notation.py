"""Numbers as people read them: three digits, a true minus sign, powers of ten spelled out.

Also specs, and what a measure is called.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

NOUNS = {
    "Loss": "loss", "Margin": "margin", "LogProb": "log-probability", "Logit": "logit",
    "Coefficient": "coefficient",
}  # fmt: skip

_NUMBER = re.compile(r"(?<![\w.])\d[\d.,]*(?:e[-+]?\d+)?(?!\.?\w)")
"""A number by itself, not one in a name such as `layers.0.weight`."""

_MORE = re.compile(r" \(and (\d+) others? alike, with other numbers\)$")

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def readable(value: float, digits: int = 3, signed: bool = False) -> str:
    """`−0.0123`, `1.47`, `6.1×10⁻¹²`; `signed` writes the plus as well."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value)
    if size == 0.0:
        return "0"
    mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 < power < 6:
        # A fixed number of significant digits keeps a column of scores comparable at a glance.
        return f"{sign}{float(f'{size:.{digits}g}'):,.{max(digits - 1 - power, 0)}f}"
    return f"{sign}{mantissa}×{superscript(power)}"


def written(value: float) -> str:
    """A value of the user's data: four digits, or its whole part where that has more."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def superscript(power: int) -> str:
    """`10⁻³`."""
    return "10" + str(power).translate(_SUPERSCRIPTS)


def bracketed(value: float, low: float, high: float, *, signed: bool = False) -> str:
    """`0.012 [0.008, 0.016]`, each as `readable`; without brackets where there is no interval."""
    text = readable(value, signed=signed)
    if math.isnan(low) or math.isnan(high):
        return text
    return f"{text} [{readable(low)}, {readable(high)}]"


def interval(estimate: tuple[float, float, float], digits: int = 3) -> str:
    """`1.012 [1.008, 1.016]` from (value, low, high); a dash for NaN, no bracket for NaN ends."""
    value, low, high = estimate
    text = _fixed(value, digits)
    if math.isnan(low) or math.isnan(high):
        return text
    return f"{text} [{_fixed(low, digits)}, {_fixed(high, digits)}]"


def _fixed(value: float, digits: int) -> str:
    """Correlations near one need as many decimals as it takes to tell them from one."""
    if not math.isfinite(value):
        return "–"
    decimals = digits
    while decimals < 7 and 0 < abs(1 - abs(value)) < 0.5 * 10**-decimals:
        decimals += 1
    return f"{value:.{decimals}f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """`1 image`, `5,000 images`, `20 queries`."""
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {plural}"


def percent(share: float) -> str:
    """`0 %`, `0.3 %`, `12 %`, `>99.9 %`: a share, never rounded to nothing or everything."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    if share < 1e-3:
        return "<0.1 %"
    if share > 0.999:
        return ">99.9 %"
    return f"{100 * share:.1f} %" if share < 0.1 or share > 0.9 else f"{100 * share:.0f} %"


def alike(notes: Iterable[str]) -> tuple[str, ...]:
    """Each note once; those that differ in nothing but numbers as the first, and how many more."""
    groups: dict[str, dict[str, int]] = {}
    for note in notes:
        said, *more = _MORE.split(note)[:2]  # it may be the first of several already
        groups.setdefault(_NUMBER.sub("#", said), {})[said] = int(more[0]) if more else 0
    found = []
    for group in groups.values():
        others = len(group) - 1 + sum(group.values())
        told = f" (and {count(others, 'other')} alike, with other numbers)" if others else ""
        found.append(next(iter(group)) + told)
    return tuple(found)


def short(value: float, digits: int = 6) -> float:
    """Six digits: more than a reader or a pixel can tell apart, at a third of the bytes."""
    return float(f"{value:.{digits}g}")


def noun_of(measure: str) -> str:
    """What was measured, in a word: "loss", "margin", …; "measurement" for a user's function."""
    return NOUNS.get(measure.split("(")[0], "measurement")


LOSSES = {
    "CrossEntropy": "cross-entropy",
    "LogProbabilities": "cross-entropy",
    "Bernoulli": "log loss",
    "SquaredError": "half the squared error",
    "Poisson": "Poisson loss exp(f) − y f",
    "SmoothHinge": "smooth hinge loss",
    "SquaredHinge": "squared hinge loss",
    "Huber": "Huber loss",
    "AbsoluteError": "absolute error",
    "DispersedCounts": "negative binomial −log p",
}
"""What losses of ours are called."""


def loss_in_words(loss: Any) -> str:
    """What a loss is called, for a sentence: "log loss"; of a user's function its name."""
    base, function = getattr(loss, "base", None), getattr(loss, "function", loss)
    if base is not None:
        factor = getattr(loss, "factor", None)
        return f"{'weighted' if factor is None else f'{factor:g} ×'} {loss_in_words(base)}"
    if type(loss).__name__ in LOSSES:
        return LOSSES[type(loss).__name__]
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        return in_short(loss) if is_dataclass(loss) and function is loss else "a function of yours"
    return name


def in_short(spec: Any) -> str:
    """A spec as a person writes it: what is as by default is left out. `parse` reads it back."""
    if isinstance(spec, tuple):
        return f"({', '.join(map(in_short, spec))}{',' * (len(spec) == 1)})"
    if not is_dataclass(spec):
        return repr(spec)
    parts: list[str] = []
    for place, field in enumerate(fields(spec)):
        value = getattr(spec, field.name)
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != made:
            is_next = place == len(parts)
            parts.append(in_short(value) if is_next else f"{field.name}={in_short(value)}")
    return f"{type(spec).__name__}({', '.join(parts)})"
