"""The same fitted method with another tolerance, so that one fit serves several tests."""

from dataclasses import replace


def at(fitted, tolerance):
    """Its products at that relative error."""
    spec = replace(fitted.spec, tolerance=tolerance)
    return replace(fitted, spec=spec, scorer=replace(fitted.scorer, tolerance=tolerance))
